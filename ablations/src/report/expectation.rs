//! What a recipe's own table `[measured]` says of its runs, beside what a run gave.

use std::collections::BTreeMap;
use std::path::Path;

use dinolab_core::files::write_file;
use dinolab_core::recipe::{Expected, Overrides, RawRecipe};
use dinolab_core::resolved::{changes, Resolved};
use dinolab_core::{Error, Result};

use super::rounded_to;
use crate::statistics::prediction;

/// The file in a run's folder, from which its page draws.
const FILE: &str = "measured.json";

/// What the recipe at `path`, or the run in this folder, says of runs of `resolved`: nothing if anything that changes numbers, but for the seed, is
/// another than in the file.
pub fn of(path: &Path, resolved: &Resolved) -> Option<Expected> {
    let raw = RawRecipe::load(path).ok()?;
    let expected = if path.is_dir() { read(path).ok()?? } else { raw.expected()?.clone() };
    let plain = Resolved::of(raw.with(&Overrides::default()).ok()?).ok()?;
    let other = changes(&plain.value, &resolved.value);
    (!other.iter().any(|change| change.key != "seed" && resolved.matters(&change.key))).then_some(expected)
}

/// Writes it into the run's folder.
///
/// # Errors
/// If it cannot be written.
pub fn write(expected: &Expected, run: &Path) -> Result<()> {
    let text = serde_json::to_string(expected).expect("plain data");
    write_file(&run.join(FILE), text.as_bytes())
}

/// What was expected of the run in `run`, if anything was.
///
/// # Errors
/// If the file cannot be understood.
pub fn read(run: &Path) -> Result<Option<Expected>> {
    let path = run.join(FILE);
    let Ok(text) = std::fs::read_to_string(&path) else { return Ok(None) };
    let help = "remove this file: only the page of the run reads it";
    serde_json::from_str(&text).map(Some).map_err(|e| Error::content(&path, e.to_string(), help))
}

/// What a run gave beside it, line by line; `data` is the hash of what it saw.
pub fn compare(expected: &Expected, metrics: &BTreeMap<String, f64>, data: Option<&str>) -> Vec<String> {
    let mut lines = Vec::new();
    if let Some(other) = expected.data.as_deref().filter(|hash| data != Some(hash)) {
        let now = data.unwrap_or("none");
        lines.push(format!("the data are others than those that the recipe tells of: hash {now}, not {other}"));
    }
    for (name, spread) in &expected.metrics {
        let Some(&value) = metrics.get(name) else {
            lines.push(format!("{name}: not measured, and the recipe says {}", spread.mean));
            continue;
        };
        let within = prediction(spread.mean, spread.sd, expected.n, 1);
        let show = rounded_to(within);
        let range = within.map(|[low, high]| format!("{} to {}", show(low), show(high)));
        lines.push(match (within, range) {
            (Some([low, high]), Some(range)) if value < low || value > high => {
                format!("{name}: {} is outside of what the recipe says: {range}", show(value))
            }
            (Some(_), Some(range)) => format!("{name}: {}, as the recipe says: {range}", show(value)),
            _ => format!("{name}: {}, and one run before gave {}", show(value), show(spread.mean)),
        });
    }
    lines
}
