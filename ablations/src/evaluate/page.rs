//! `eval.html`: one file with everything in it, no script and no request.

use dinolab_core::contract::ImageSize;
use minijinja::value::Serde;
use minijinja::{context, Value};
use plotters::style::RGBColor;

use super::{Evaluation, PictureRecord, ScoreLine, SizeRecord};
use crate::report::html::environment;
use crate::report::plots::{color, css, over_size, SizePoint};
use crate::report::rounded_to;

const PAGE: &str = include_str!("page.html");

/// The page of an evaluation, with the pictures of its records by weights and size.
pub fn page(evaluation: &Evaluation, records: &[Vec<SizeRecord>]) -> String {
    let (sizes, weights) = (evaluation.sizes(), &evaluation.weights);
    // Nobody is the baseline here: all have colours.
    let colors: Vec<RGBColor> = (0..weights.len()).map(|i| color(i, usize::MAX)).collect();
    let legend =
        weights.iter().zip(&colors).map(|(w, &color)| context! { name => w.name.as_str(), color => css(color) });
    let cell = |line: Option<&ScoreLine>| {
        let text = line.map(ScoreLine::text);
        let difference = line.and_then(|line| line.difference).map(|d| {
            let show = rounded_to(Some(d.ci95));
            format!("{} [{}, {}]", show(d.value), show(d.ci95[0]), show(d.ci95[1]))
        });
        context! { text, difference }
    };
    let row = |name: &(String, String), size: ImageSize| {
        let cells: Vec<Value> = weights.iter().map(|w| cell(w.at(name, size))).collect();
        context! { probe => name.0.as_str(), score => name.1.as_str(), size => size.to_string(), cells }
    };
    let table = |names: &[(String, String)], sizes: &[ImageSize]| -> Vec<Value> {
        names.iter().flat_map(|name| sizes.iter().map(|&size| row(name, size)).collect::<Vec<_>>()).collect()
    };
    let names = evaluation.scores(false);
    let plot = |name: &(String, String)| {
        let of = |size: &ImageSize, line: &ScoreLine| {
            let (side, square) = ((size.pixels() as f64).sqrt(), size.side().is_some());
            line.of.value.map(|value| SizePoint { size: side, square, value, ci95: line.of.ci95 })
        };
        let curve = |w: &super::WeightsScores| -> Vec<SizePoint> {
            sizes.iter().filter_map(|size| of(size, w.at(name, *size)?)).collect()
        };
        let curves: Vec<(RGBColor, Vec<SizePoint>)> = colors.iter().copied().zip(weights.iter().map(curve)).collect();
        let svg = Value::from_safe_string(over_size(&curves));
        context! { name => format!("{}/{}", name.0, name.1), svg }
    };
    let plots: Vec<Value> = if sizes.len() > 1 { names.iter().map(plot).collect() } else { Vec::new() };
    let warnings = weights.iter().flat_map(|w| {
        w.sizes.iter().flat_map(move |size| size.warnings.iter().map(move |text| format!("{}: {text}", w.name)))
    });
    let environment = environment("page.html", PAGE);
    let template = environment.get_template("page.html").expect("it was added above");
    let page = template.render(context! {
        evaluation => Value::from(Serde(evaluation)),
        legend => legend.collect::<Vec<_>>(),
        rows => table(&names, &sizes),
        details => table(&evaluation.scores(true), &sizes),
        plots,
        warnings => warnings.collect::<Vec<_>>(),
        pictures => pictures(evaluation, records),
        tables => serde_json::to_string_pretty(&serde_json::json!({
            "data": evaluation.data, "seed": evaluation.seed, "probes": evaluation.probes,
        })).expect("plain data"),
    });
    page.expect("the template asks for nothing that it is not given")
}

/// Pictures by probe, of every probe by weights and size.
fn pictures(evaluation: &Evaluation, records: &[Vec<SizeRecord>]) -> Vec<Value> {
    let all = || evaluation.weights.iter().zip(records).flat_map(|(w, sizes)| sizes.iter().map(move |size| (w, size)));
    let mut probes: Vec<&str> = Vec::new();
    for picture in all().flat_map(|(_, size)| &size.pictures) {
        if !probes.contains(&picture.probe.as_str()) {
            probes.push(&picture.probe);
        }
    }
    let row = |picture: &PictureRecord| {
        let panels =
            picture.panels.iter().map(|(label, png)| context! { label, png => Value::from_safe_string(png.clone()) });
        context! { caption => picture.caption.as_str(), panels => panels.collect::<Vec<_>>() }
    };
    let of_probe = |probe: &str| {
        let sets = all().filter_map(|(weights, record)| {
            let rows: Vec<Value> = record.pictures.iter().filter(|p| p.probe == probe).map(row).collect();
            let any = !rows.is_empty();
            any.then(|| context! { weights => weights.name.as_str(), size => record.size.to_string(), rows })
        });
        context! { probe, sets => sets.collect::<Vec<_>>() }
    };
    probes.into_iter().map(of_probe).collect()
}
