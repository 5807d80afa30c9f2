//! The page of a chain of stages.

use std::collections::{BTreeMap, BTreeSet};

use minijinja::value::Serde;
use minijinja::{context, Value};
use plotters::style::RGBColor;
use serde::Serialize;

use super::html::{curve_groups, environment, happened, marks, Happened};
use super::number;
use super::plots::{color, css};
use super::summary::events;
use crate::suite::RunRecord;

const TEMPLATE: &str = include_str!("stages.html");

/// A stage, as its row and its box say it.
#[derive(Clone, Debug, Serialize)]
pub struct StageRow {
    /// Its name.
    pub name: String,
    /// How far it is.
    pub said: String,
    /// The first digits of its recipe's hash.
    pub hash: String,
    /// The weights that it started from.
    pub parents: Vec<String>,
}

/// The page, with the graph as SVG; `records` are those of `rows`.
pub fn stages_page(name: &str, description: &str, graph: &str, rows: &[StageRow], records: &[RunRecord]) -> String {
    // No stage is a baseline: all have a colour.
    let colors: Vec<RGBColor> = (0..rows.len()).map(|i| color(i + 1, 0)).collect();
    let lines: Vec<(&str, RGBColor)> = rows.iter().map(|row| row.name.as_str()).zip(colors).collect();
    let events = events(records);
    let happened = happened(&events, &lines);
    let curve_groups = curve_groups(&[], records, &lines, &marks(&happened), &BTreeMap::new());
    let shown = |name: &&String| name.starts_with("probe/") || name.starts_with("loss/");
    let names: BTreeSet<&String> =
        records.iter().filter_map(|r| r.result()).flat_map(|result| result.metrics.keys()).filter(shown).collect();
    let scores = names.into_iter().map(|name| {
        let values: Vec<Option<String>> = records.iter().map(|record| record.score(name).map(number)).collect();
        context! { name, values }
    });
    let environment = environment("stages.html", TEMPLATE);
    let page = environment.get_template("stages.html").expect("it was added above").render(context! {
        name, description, graph => Value::from_safe_string(graph.into()), stages => Value::from(Serde(rows)),
        single => true, summary => context! {}, curve_groups, scores => scores.collect::<Vec<_>>(),
        lines => lines.iter().map(|(name, color)| context! { name => *name, color => css(*color) }).collect::<Vec<_>>(),
        happened => happened.iter().map(Happened::shown).collect::<Vec<_>>(),
    });
    page.expect("the template asks for nothing that it is not given")
}
