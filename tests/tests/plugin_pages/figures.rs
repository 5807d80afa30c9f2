//! Figures of the plugins' pages, drawn from what the plugins compute.

use std::fmt::Write as _;

use dinolab_core::contract::{At, DataContext, Dataset, Grid, Masking, PosContext, PosEncoding, Scheduler};
use dinolab_core::params::{ParamBuilder, Params};
use dinolab_core::rng::{Rng, Stream};
use dinolab_core::testing::contracts;
use dinolab_core::DType;
use plotters::prelude::*;

/// A drawing and what it shows.
pub struct Figure {
    pub caption: &'static str,
    pub svg: String,
}

/// Lines and letters: read on a light and on a dark page.
const INK: RGBColor = RGBColor(0x80, 0x80, 0x88);
const BLUE: RGBColor = RGBColor(0x00, 0x72, 0xb2);

/// The figure of a plugin, if a drawing helps.
pub fn of(kind: &str, name: &str) -> Option<Figure> {
    let example = super::content::example(kind, name);
    match (kind, name) {
        ("scheduler", "constant") => None,
        ("scheduler", _) => {
            let example: toml::Table = example.expect("schedulers have examples").parse().expect("it is TOML");
            let table = example.values().flat_map(|t| t.as_table()).flat_map(|t| t.values()).find_map(|v| v.as_table());
            let table = toml::to_string(table.expect("it chooses a scheduler")).expect("it is TOML");
            let schedule = contracts::plugin::<dyn Scheduler>(&table, &mut ()).expect("the example is right");
            let values = (0..300).map(|step| (step as f64, schedule.value(At { step, total: 300 }))).collect();
            Some(Figure { caption: "The example over 300 steps.", svg: curve("step", values) })
        }
        ("pos_encoding", "rope_box") => Some(Figure {
            caption:
                "What a patch near the middle scores with every other patch of a 16 x 16 grid when all queries and \
                      keys are equal: the mean of cos(angle difference) over the periods of a head of width 64.",
            svg: rope(),
        }),
        ("loss", "koleo") => {
            let values = (1..200).map(|i| i as f64 / 100.0).map(|d| (d, -(d + 1e-8).ln())).collect();
            Some(Figure {
                caption: "The loss of a class token over the distance to its nearest neighbour (two unit vectors are \
                          at most 2 apart).",
                svg: curve("distance", values),
            })
        }
        ("dataset", "scenes") => {
            Some(Figure { caption: "Eight images, and the classes of their pixels.", svg: scenes() })
        }
        ("masking", _) => Some(Figure {
            caption: "Eight masked crops of 16 x 16 patches with the default keys. Blue patches are hidden.",
            svg: masks(name),
        }),
        _ => None,
    }
}

/// Masked crops side by side, with a gap of a patch.
fn masks(plugin: &str) -> String {
    let (grid, shown) = (Grid { height: 16, width: 16 }, 8);
    let masking =
        contracts::plugin::<dyn Masking>(&format!("plugin = \"{plugin}\""), &mut ()).expect("it has defaults");
    let drawn = masking.draw(&mut Rng::new(0, Stream::Mask, 0, 0), 64, grid);
    let masked: Vec<&Vec<bool>> = drawn.iter().filter(|mask| mask.contains(&true)).take(shown).collect();
    let columns = shown * (grid.width + 1) - 1;
    let colour = |place: usize| {
        let (row, column) = (place / columns, place % columns);
        match (column / (grid.width + 1), column % (grid.width + 1)) {
            (_, 16) => [0xff; 3],
            (crop, x) if masked[crop][row * grid.width + x] => [0x00, 0x72, 0xb2],
            _ => [0xdd; 3],
        }
    };
    squares(5, columns, &(0..grid.height * columns).map(colour).collect::<Vec<_>>())
}

/// One curve with axes.
fn curve(x: &str, points: Vec<(f64, f64)>) -> String {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (520, 240)).into_drawing_area();
        let over =
            |f: fn(f64, f64) -> f64, of: fn(&(f64, f64)) -> f64| points.iter().map(of).reduce(f).expect("points");
        let (left, right) = (over(f64::min, |p| p.0), over(f64::max, |p| p.0));
        let (low, high) = (over(f64::min, |p| p.1), over(f64::max, |p| p.1));
        let margin = 0.05 * (high - low).max(1e-12);
        let mut chart = ChartBuilder::on(&area)
            .margin(8)
            .x_label_area_size(34)
            .y_label_area_size(64)
            .build_cartesian_2d(left..right, low - margin..high + margin)
            .expect("an SVG can be drawn on");
        chart
            .configure_mesh()
            .disable_mesh()
            .axis_style(INK)
            .label_style(("sans-serif", 13, &INK))
            .x_desc(x)
            .y_label_formatter(&|y| format!("{y:.4}").trim_end_matches('0').trim_end_matches('.').to_string())
            .draw()
            .expect("an SVG can be drawn on");
        chart.draw_series(LineSeries::new(points, BLUE.stroke_width(2))).expect("an SVG can be drawn on");
        area.present().expect("an SVG can be drawn on");
    }
    svg
}

/// Squares of colour, row by row: (side in pixels, columns, colours).
fn squares(side: usize, columns: usize, colours: &[[u8; 3]]) -> String {
    let rows = colours.len() / columns;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{}\" shape-rendering=\"crispEdges\">\n",
        side * columns,
        side * rows
    );
    for (row, line) in colours.chunks(columns).enumerate() {
        // Neighbours of one colour are one rectangle.
        let mut column = 0;
        for run in line.chunk_by(|a, b| a == b) {
            let [r, g, b] = run[0];
            let (x, y, width) = (side * column, side * row, side * run.len());
            writeln!(
                svg,
                "<rect x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{side}\" fill=\"#{r:02x}{g:02x}{b:02x}\"/>"
            )
            .expect("a string grows");
            column += run.len();
        }
    }
    svg + "</svg>\n"
}

/// Scores of one patch with all others under rotation alone.
fn rope() -> String {
    let grid = Grid { height: 16, width: 16 };
    let mut encoding = contracts::plugin::<dyn PosEncoding>("plugin = \"rope_box\"", &mut ()).expect("it has defaults");
    let mut builder = ParamBuilder::new();
    encoding.declare(&mut builder, PosContext { dim: 64, heads: 1, grid }).expect("64 channels fit");
    let layout = builder.finish();
    let flat = layout.init(0, DType::F64).expect("there is no parameter");
    let tables = encoding.tables(&Params::frozen(&layout, &flat), grid, None, 1, DType::F64).expect("it was declared");
    let (sin, cos) = tables.rotary.expect("RoPE rotates");
    let (sin, cos) = (sin.to_f64_vec(), cos.to_f64_vec());
    let here = 7 * grid.width + 7;
    let score = |p: usize| {
        let pairs = (0..64).map(|j| (p * 64 + j, here * 64 + j));
        pairs.map(|(a, b)| cos[a] * cos[b] + sin[a] * sin[b]).sum::<f64>() / 64.0
    };
    // White at -1, blue at 1.
    let colour = |score: f64| {
        let share = ((score + 1.0) / 2.0).clamp(0.0, 1.0);
        [0x00, 0x72, 0xb2].map(|c| (255.0 + (f64::from(c) - 255.0) * share).round() as u8)
    };
    squares(16, grid.width, &(0..grid.patches()).map(|p| colour(score(p))).collect::<Vec<_>>())
}

/// Small images of the dataset `scenes`, every second pixel, with their masks below.
fn scenes() -> String {
    let table = "plugin = \"scenes\"\nsize = 64\ncount = 64\nheld_out = 0";
    let data = contracts::plugin::<dyn Dataset>(table, &mut DataContext { seed: 0 }).expect("the table is right");
    let samples: Vec<_> = (0..8).map(|i| data.get(i).expect("it draws")).collect();
    let (side, shown) = (64, 32);
    let palette = [
        [0xee, 0xee, 0xee],
        [0x00, 0x72, 0xb2],
        [0xd5, 0x5e, 0x00],
        [0x00, 0x9e, 0x73],
        [0xcc, 0x79, 0xa7],
        [0xe6, 0x9f, 0x00],
        [0x56, 0xb4, 0xe9],
        [0xf0, 0xe4, 0x42],
        [0x80, 0x80, 0x88],
    ];
    let mut colours = Vec::new();
    for (masks, y) in [false, true].into_iter().flat_map(|masks| (0..shown).map(move |y| (masks, y))) {
        for (sample, x) in samples.iter().flat_map(|sample| (0..shown).map(move |x| (sample, x))) {
            let at = 2 * y * side + 2 * x;
            colours.push(if masks {
                palette[usize::from(sample.mask.as_ref().expect("scenes have masks")[at])]
            } else {
                // Fewer colours, so that the file stays small.
                [0, 1, 2].map(|c| sample.rgb()[3 * at + c] & 0xf0 | 0x08)
            });
        }
    }
    squares(2, 8 * shown, &colours)
}
