//! The drawings of a report as inline SVG: curves with bands over seeds, and intervals on a common axis.
//!
//! Drawings have no background, and axes and letters in `currentColor`, so that they fit a light and a dark page.

use std::ops::Range;

use plotters::coord::types::RangedCoordf64;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::suite::Series;

/// Blue, vermilion, green, purple, orange, sky: the colours of Okabe and Ito (2008), which people with any kind of colour
/// vision tell apart; yellow is left out for its contrast on white.
const PALETTE: [RGBColor; 6] = [
    RGBColor(0x00, 0x72, 0xb2),
    RGBColor(0xd5, 0x5e, 0x00),
    RGBColor(0x00, 0x9e, 0x73),
    RGBColor(0xcc, 0x79, 0xa7),
    RGBColor(0xe6, 0x9f, 0x00),
    RGBColor(0x56, 0xb4, 0xe9),
];
/// The baseline is grey in every drawing.
const BASELINE: RGBColor = RGBColor(0x80, 0x80, 0x88);
/// Stands for the page's text colour until the SVG is done.
const INK: RGBColor = RGBColor(1, 2, 3);
const INK_HEX: &str = "#010203";

/// Points that a curve is drawn with at most; more are averaged, since a screen has no more.
const MAX_POINTS: usize = 300;

/// The colour of an arm: grey for the baseline, then the palette in the order of the suite.
pub fn color(index: usize, baseline: usize) -> RGBColor {
    match index.cmp(&baseline) {
        std::cmp::Ordering::Equal => BASELINE,
        std::cmp::Ordering::Less => PALETTE[index % PALETTE.len()],
        std::cmp::Ordering::Greater => PALETTE[(index - 1) % PALETTE.len()],
    }
}

/// A colour as CSS writes it.
pub fn css(color: RGBColor) -> String {
    format!("#{:02x}{:02x}{:02x}", color.0, color.1, color.2)
}

/// A curve over seeds: the mean, and one standard deviation to each side where there are two seeds or more.
#[derive(Clone, Debug, PartialEq)]
pub struct Band {
    /// Colour of the arm.
    pub color: RGBColor,
    /// At steps ascending.
    pub points: Vec<Point>,
}

/// A metric of several runs over steps.
pub struct Points(pub Vec<Point>);

/// A curve at a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// Steps done; the mean of several where points are many.
    pub step: f64,
    /// Mean over seeds.
    pub mean: f64,
    /// Standard deviation over seeds; 0 of one.
    pub std: f64,
    /// Seeds; the fewest of several points.
    pub n: usize,
}

impl Points {
    /// Mean and spread of the runs' curves at every step that any of them logged.
    pub fn over(runs: &[&Series]) -> Self {
        let mut at = std::collections::BTreeMap::<u64, Vec<f64>>::new();
        for &(step, value) in runs.iter().copied().flatten().filter(|(_, v)| v.is_finite()) {
            at.entry(step).or_default().push(value);
        }
        let summary = |(step, values): (u64, Vec<f64>)| {
            let estimate = crate::statistics::estimate(&values);
            let (mean, std) = (estimate.mean.unwrap_or(f64::NAN), estimate.std.unwrap_or(0.0));
            Point { step: step as f64, mean, std, n: values.len() }
        };
        let points: Vec<_> = at.into_iter().map(summary).collect();
        let size = points.len().div_ceil(MAX_POINTS).max(1);
        let thin = |chunk: &[Point]| {
            let mean = |of: fn(&Point) -> f64| chunk.iter().map(of).sum::<f64>() / chunk.len() as f64;
            let n = chunk.iter().map(|p| p.n).min().unwrap_or(0);
            Point { step: mean(|p| p.step), mean: mean(|p| p.mean), std: mean(|p| p.std), n }
        };
        Self(points.chunks(size).map(thin).collect())
    }
}

/// A line across every curve: something happened at a step.
#[derive(Clone, Debug, PartialEq)]
pub struct Mark {
    /// Steps done.
    pub step: f64,
    /// Colour of the arm, or none if it happened in all.
    pub color: Option<RGBColor>,
}

/// The colour of the trunk that arms go on from.
pub const TRUNK_COLOR: RGBColor = RGBColor(0x4a, 0x4a, 0x52);

/// Curves over steps, one band an arm, on an axis from the first of `steps` to the last, with lines where something happened;
/// behind them, in grey, two standard deviations to each side of the points that were `expected`.
pub fn curves(bands: &[Band], (x0, x1): (f64, f64), marks: &[Mark], expected: &[Point]) -> String {
    let all = || bands.iter().flat_map(|b| b.points.iter());
    let expected: Vec<&Point> = expected.iter().filter(|p| (x0..=x1).contains(&p.step)).collect();
    let seen = all().flat_map(|p| [p.mean - p.std, p.mean + p.std]);
    let (y0, y1) = bounds(seen.chain(expected.iter().flat_map(|p| [p.mean - 2.0 * p.std, p.mean + 2.0 * p.std])));
    draw((400, 250), |area| {
        let mut chart = axes(area, x0..x1, (y0, y1))?;
        if !expected.is_empty() {
            let upper = expected.iter().map(|p| (p.step, p.mean + 2.0 * p.std));
            let lower = expected.iter().rev().map(|p| (p.step, p.mean - 2.0 * p.std));
            chart.draw_series([Polygon::new(upper.chain(lower).collect::<Vec<_>>(), INK.mix(0.1))])?;
        }
        for mark in marks {
            let y = chart.y_range();
            let line = vec![(mark.step, y.start), (mark.step, y.end)];
            let style = mark.color.map_or(INK.mix(0.3), |color| color.mix(0.6)).stroke_width(1);
            chart.draw_series([PathElement::new(line, style)])?;
        }
        for band in bands {
            if band.points.iter().any(|p| p.std > 0.0) {
                let upper = band.points.iter().map(|p| (p.step, p.mean + p.std));
                let lower = band.points.iter().rev().map(|p| (p.step, p.mean - p.std));
                chart.draw_series([Polygon::new(upper.chain(lower).collect::<Vec<_>>(), band.color.mix(0.18))])?;
            }
            let line = LineSeries::new(band.points.iter().map(|p| (p.step, p.mean)), band.color.stroke_width(2));
            chart.draw_series(line)?;
            // Few points are probes: when they were measured matters.
            if band.points.len() <= 12 {
                let dots = band.points.iter().map(|p| Circle::new((p.step, p.mean), 3, band.color.filled()));
                chart.draw_series(dots)?;
            }
        }
        Ok(())
    })
}

/// The axes of a small plot of numbers between `y0` and `y1`, with some room above and below.
fn axes<'a, 'b>(
    area: &'b Area<'a>,
    x: Range<f64>,
    (y0, y1): (f64, f64),
) -> Result<ChartContext<'b, SVGBackend<'a>, Cartesian2d<RangedCoordf64, RangedCoordf64>>, Failure> {
    let pad = 0.06 * (y1 - y0);
    let mut chart = ChartBuilder::on(area)
        .margin(6)
        .margin_right(16)
        .x_label_area_size(24)
        .y_label_area_size(54)
        .build_cartesian_2d(x, y0 - pad..y1 + pad)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .x_labels(5)
        .y_labels(5)
        .light_line_style(TRANSPARENT)
        .bold_line_style(INK.mix(0.12))
        .axis_style(INK.mix(0.4))
        .label_style(("sans-serif", 13).into_font().color(&INK.mix(0.75)))
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| super::number(if y.abs() < 1e-9 * (y1 - y0) { 0.0 } else { *y }))
        .draw()?;
    Ok(chart)
}

/// A score at an image size.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SizePoint {
    /// Side in pixels, of a rectangle that of a square of as many.
    pub size: f64,
    /// Whether it is a square: squares are joined by a curve.
    pub square: bool,
    /// The score.
    pub value: f64,
    /// Its interval.
    pub ci95: Option<[f64; 2]>,
}

/// Curves over the size of images, with a bar for every interval.
pub fn over_size(curves: &[(RGBColor, Vec<SizePoint>)]) -> String {
    let all = || curves.iter().flat_map(|(_, points)| points);
    let (x0, x1) = bounds(all().map(|p| p.size));
    let (y0, y1) = bounds(all().flat_map(|p| p.ci95.into_iter().flatten().chain([p.value])));
    let pad_x = 0.04 * (x1 - x0);
    draw((400, 250), |area| {
        let mut chart = axes(area, x0 - pad_x..x1 + pad_x, (y0, y1))?;
        for (color, points) in curves {
            for point in points {
                if let Some([low, high]) = point.ci95 {
                    let bar = vec![(point.size, low), (point.size, high)];
                    chart.draw_series([PathElement::new(bar, color.mix(0.5).stroke_width(2))])?;
                }
                let style = if point.square { color.filled() } else { color.stroke_width(1) };
                chart.draw_series([Circle::new((point.size, point.value), 3, style)])?;
            }
            let squares = points.iter().filter(|p| p.square).map(|p| (p.size, p.value));
            chart.draw_series(LineSeries::new(squares, color.stroke_width(2)))?;
        }
        Ok(())
    })
}

/// One row of a forest plot.
#[derive(Clone, Debug, PartialEq)]
pub struct ForestRow {
    /// What is compared.
    pub label: String,
    /// Colour of the arm.
    pub color: RGBColor,
    /// Mean difference.
    pub difference: f64,
    /// Its 95% interval; `None` for one pair.
    pub ci95: Option<[f64; 2]>,
    /// The differences of the single seeds.
    pub seeds: Vec<f64>,
}

/// Differences to the baseline with their intervals on a common axis; faint dots are single seeds.
pub fn forest(rows: &[ForestRow]) -> String {
    let values = rows.iter().flat_map(|r| r.seeds.iter().copied().chain(r.ci95.into_iter().flatten()).chain([0.0]));
    let (low, high) = bounds(values);
    let pad = 0.06 * (high - low);
    let (row, label) = (30, 190);
    let height = row * rows.len() as i32;
    draw((760, (height + 44) as u32), |area| {
        let mut chart = ChartBuilder::on(area)
            .margin_top(6)
            .margin_left(label)
            .margin_right(20)
            .x_label_area_size(26)
            .build_cartesian_2d(low - pad..high + pad, 0.0..rows.len() as f64)?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .disable_y_axis()
            .x_labels(7)
            .light_line_style(TRANSPARENT)
            .bold_line_style(INK.mix(0.1))
            .axis_style(INK.mix(0.4))
            .label_style(("sans-serif", 13).into_font().color(&INK.mix(0.75)))
            .x_label_formatter(&|x| super::number(if x.abs() < 1e-9 * (high - low) { 0.0 } else { *x }))
            .draw()?;
        let zero = PathElement::new(vec![(0.0, 0.0), (0.0, rows.len() as f64)], INK.mix(0.6).stroke_width(1));
        chart.draw_series([zero])?;
        for (i, r) in rows.iter().enumerate() {
            let y = rows.len() as f64 - i as f64 - 0.5;
            let seeds = r.seeds.iter().map(|&x| Circle::new((x, y), 3, r.color.mix(0.35).filled()));
            chart.draw_series(seeds)?;
            if let Some([a, b]) = r.ci95 {
                chart.draw_series([PathElement::new(vec![(a, y), (b, y)], r.color.stroke_width(3))])?;
            }
            chart.draw_series([Circle::new((r.difference, y), 5, r.color.filled())])?;
            let at = (label - 10, 6 + (f64::from(height) * (i as f64 + 0.5) / rows.len() as f64) as i32);
            let style = ("sans-serif", 14).into_font().color(&INK).pos(Pos::new(HPos::Right, VPos::Center));
            area.draw_text(&r.label, &style, at)?;
        }
        Ok(())
    })
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Failure = DrawingAreaErrorKind<std::io::Error>;

fn draw(size: (u32, u32), paint: impl for<'a> FnOnce(&Area<'a>) -> Result<(), Failure>) -> String {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        paint(&area).and_then(|()| area.present()).expect("drawing into a string cannot fail");
    }
    svg.replace(INK_HEX, "currentColor")
}

/// Least and largest value, opened up where they are equal or absent.
pub fn bounds(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) =
        values.filter(|v| v.is_finite()).fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    if low > high {
        (0.0, 1.0)
    } else if low == high {
        let open = if low == 0.0 { 1.0 } else { 0.1 * low.abs() };
        (low - open, high + open)
    } else {
        (low, high)
    }
}
