//! `dinolab recipe diff A B`: changed keys with both values; of two runs also code, data and metrics.

use std::collections::BTreeSet;
use std::path::Path;

use dinolab_core::recipe::{toml_value, Overrides};
use dinolab_core::resolved::Resolved;
use dinolab_core::train::{RunInfo, RunResult};
use dinolab_core::Result;
use serde_json::{Map, Value as Json};

use crate::report::number;
use crate::style;

/// Runs the command.
pub(super) fn run(a: &Path, b: &Path) -> Result<()> {
    let none = Overrides::default();
    let (left, right) = (Resolved::load(a, &none)?, Resolved::load(b, &none)?);
    style::print(&changes(&left.value, &right.value).unwrap_or_else(|| "no difference\n".into()));
    if let (Some(left), Some(right)) = (RunInfo::read(a)?, RunInfo::read(b)?) {
        style::print(&surroundings(&left, &right));
    }
    if let (Some(left), Some(right)) = (RunResult::read(a)?, RunResult::read(b)?) {
        style::print(&metrics(&left, &right));
    }
    Ok(())
}

/// One line a key that differs: `key  a -> b`; `none` where a side does not have it.
pub(super) fn changes(a: &Json, b: &Json) -> Option<String> {
    let mut rows = Vec::new();
    compare("", Some(a), Some(b), &mut rows);
    (!rows.is_empty()).then(|| style::table(rows))
}

fn compare(path: &str, a: Option<&Json>, b: Option<&Json>, rows: &mut Vec<Vec<String>>) {
    let table = |value: Option<&Json>| value.map_or(Some(Map::new()), |v| v.as_object().cloned());
    match (table(a), table(b)) {
        // Tables are compared key by key, also with one that is not there.
        (Some(a), Some(b)) => {
            let keys: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
            for key in keys {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                compare(&path, a.get(key), b.get(key), rows);
            }
        }
        _ if a.filter(|v| !v.is_null()) == b.filter(|v| !v.is_null()) => {}
        _ => {
            let show = |value: Option<&Json>| value.map_or("none".into(), toml_value);
            rows.push(vec![style::out().bold(path), format!("{} -> {}", show(a), show(b))]);
        }
    }
}

/// Program, data and device of two runs, each as one value or as two.
fn surroundings(a: &RunInfo, b: &RunInfo) -> String {
    let program = |run: &RunInfo| format!("dinolab {} ({})", run.dinolab, run.revision);
    let data = |run: &RunInfo| run.data.as_ref().map_or("as the recipe says".into(), |hash| hash[..16].to_string());
    let device = |run: &RunInfo| run.device.clone();
    let row = |name: &str, value: &dyn Fn(&RunInfo) -> String| {
        let (a, b) = (value(a), value(b));
        vec![style::out().bold(name), if a == b { format!("{a} in both") } else { format!("{a} -> {b}") }]
    };
    format!("\n{}", style::table([row("code", &program), row("data", &data), row("device", &device)]))
}

/// Final metrics of two runs with the difference.
fn metrics(a: &RunResult, b: &RunResult) -> String {
    let style = style::out();
    let names: BTreeSet<&String> = a.metrics.keys().chain(b.metrics.keys()).collect();
    let head = ["metric", "A", "B", "B - A"].map(|h| style.dim(h)).to_vec();
    // Scores of runs that ended elsewhere are of another training.
    let steps = (a.steps != b.steps).then(|| vec![style.bold("steps"), a.steps.to_string(), b.steps.to_string()]);
    let rows = names.into_iter().map(|name| {
        let (a, b) = (a.metrics.get(name).copied(), b.metrics.get(name).copied());
        let show = |value: Option<f64>| value.map_or("–".into(), number);
        vec![style.bold(name), show(a), show(b), show(a.zip(b).map(|(a, b)| b - a))]
    });
    format!("\n{}", style::table(std::iter::once(head).chain(steps).chain(rows)))
}
