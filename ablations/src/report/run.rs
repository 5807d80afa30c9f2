//! The page of one run, and of a folder in which nothing has begun: what `dinolab watch` shows of them.

use std::collections::BTreeMap;
use std::path::Path;

use dinolab_core::recipe::Overrides;
use dinolab_core::resolved::Resolved;
use dinolab_core::text::printable;
use dinolab_core::Result;
use minijinja::value::Serde;
use minijinja::{context, Value};

use super::html::{curve_groups, environment, happened, marks, Happened};
use super::plots::{color, css};
use super::summary::events;
use super::{duration, expectation, number};
use crate::filmstrip::Filmstrip;
use crate::suite::{RunRecord, Status};

const TEMPLATE: &str = include_str!("run.html");

/// The page of the run in `folder`, with its filmstrip if there is one.
///
/// # Errors
/// If a file of it cannot be read.
pub fn run_page(folder: &Path, film: Option<&Filmstrip>) -> Result<String> {
    let recipe = Resolved::load(folder.join("recipe.toml"), &Overrides::default())?.recipe;
    let name = recipe.name.clone();
    let record = RunRecord::of(&name, recipe.seed, String::new(), folder)?;
    let last = |name: &str| record.curves.get(name).and_then(|curve| curve.last());
    let step = record.curves.values().filter_map(|curve| curve.last()).map(|(step, _)| *step).max().unwrap_or(0);
    let mut facts = vec![
        ("step", format!("{step} of {}", recipe.steps)),
        ("", record.status.word().replace("interrupted", "not finished")),
        ("seed", recipe.seed.to_string()),
    ];
    facts.extend(last("throughput/seconds").map(|(_, seconds)| ("time in steps", duration(*seconds))));
    facts.extend(last("throughput/images_per_s").map(|(_, rate)| ("images a second", number(*rate))));
    facts.extend(record.device.clone().map(|device| ("on", device)));
    let mut warnings: Vec<String> =
        record.warnings.iter().map(|warning| format!("step {}: {}", warning.step, warning.text)).collect();
    if let Status::Failed(error) = &record.status {
        warnings.insert(0, format!("the run failed: {error}"));
    }
    let scores: Vec<(&String, u64, String)> = record
        .curves
        .iter()
        .filter(|(name, _)| name.starts_with("probe/") || name.starts_with("loss/"))
        .filter_map(|(name, curve)| curve.last().map(|(step, value)| (name, *step, number(*value))))
        .collect();
    let records = [record.clone()];
    let (lines, events) = ([(name.as_str(), color(1, 0))], events(&records));
    let happened = happened(&events, &lines);
    let expected = expectation::read(folder)?;
    let bands = expected.as_ref().map_or(BTreeMap::new(), |expected| expected.curves.clone());
    let groups = curve_groups(&[], &records, &lines, &marks(&happened), &bands);
    let behind = expected.filter(|expected| !expected.curves.is_empty());
    let behind =
        behind.map(|e| format!("Grey: {} runs on {}, two standard deviations to each side of their mean.", e.n, e.on));
    let environment = environment("run.html", TEMPLATE);
    let page = environment.get_template("run.html").expect("it was added above").render(context! {
        name => name.as_str(), facts, warnings, single => true, summary => context! {}, scores => Value::from(Serde(&scores)), curve_groups => groups,
        behind,
        said => record.result().and_then(|r| r.stopped.clone()),
        lines => vec![context! { name => lines[0].0, color => css(lines[0].1) }],
        happened => happened.iter().map(Happened::shown).collect::<Vec<_>>(),
        filmstrip => film.map(|film| Value::from(Serde(film))),
    });
    Ok(page.expect("the template asks for nothing that it is not given"))
}

/// A page that says why there is nothing to see of `folder` yet.
pub fn waiting_page(folder: &Path, said: &str) -> String {
    let environment = environment("run.html", TEMPLATE);
    let page = environment.get_template("run.html").expect("it was added above");
    let page = page.render(context! { name => printable(folder), said });
    page.expect("the template asks for nothing that it is not given")
}
