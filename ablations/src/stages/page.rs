//! The report of a chain of stages: the graph of what came from what, every curve on one axis, final scores; and the same as
//! data, `stages.json`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use dinolab_core::files::write_file;
use dinolab_core::train::Parent;
use dinolab_core::Result;
use serde_json::json;

use super::execute::{stale, PlannedStage};
use super::file::{Stages, FILE, REPORT};
use crate::report::{stages_page, StageRow};
use crate::suite::{RunRecord, Status};

/// Height of a stage in the graph, and of the box in it, in pixels.
const ROW: usize = 88;
const BOX: usize = 52;
/// Left side and width of the boxes.
const LEFT: usize = 250;
const WIDTH: usize = 300;

/// Writes `stages.json` and `report.html` into `out`; gives the path of the report.
///
/// # Errors
/// If a run's files cannot be read, or the outputs not be written.
pub fn write(stages: &Stages, planned: &[PlannedStage], out: &Path) -> Result<PathBuf> {
    let (mut records, mut rows, mut data, mut edges) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (i, stage) in planned.iter().enumerate() {
        let name = &stage.stage.name;
        let seed = stage.prepared.recipe().get("seed").and_then(toml::Value::as_integer).unwrap_or(0);
        let record = RunRecord::of(name, seed.unsigned_abs(), name.clone(), &stage.dir)?;
        let (parents, stale) = (Parent::read(&stage.dir)?, stale(stage)?);
        for (key, parent) in &stage.stage.parents {
            let from = planned.iter().position(|p| p.stage.name == *parent).expect("the file was checked");
            let within = |source: &String| key.starts_with(source.as_str()) || source.starts_with(key.as_str());
            edges.push((from, i, key.clone(), stale.iter().any(within)));
        }
        data.push(json!({
            "stage": name, "status": record.status.word(), "recipe": stage.prepared.hash(), "parents": parents, "stale": stale,
            "steps": record.result().map(|r| r.steps), "seconds": record.result().map(|r| r.seconds),
            "metrics": record.result().map(|r| &r.metrics),
        }));
        rows.push(StageRow {
            name: name.clone(),
            said: said(&record.status, parents.iter().find_map(|parent| parent.step)),
            hash: stage.prepared.hash().chars().take(12).collect(),
            parents: parents
                .iter()
                .map(|p| format!("{}: {} ({})", p.key, p.path.display(), short(&p.weights)))
                .collect(),
        });
        records.push(record);
    }
    let text = serde_json::to_string_pretty(&json!({ "name": stages.name, "stages": data })).expect("plain data");
    write_file(&out.join(FILE), format!("{text}\n").as_bytes())?;
    let report = out.join(REPORT);
    let page = stages_page(&stages.name, &stages.description, &graph(&rows, &edges), &rows, &records);
    write_file(&report, page.as_bytes())?;
    Ok(report)
}

fn short(hash: &str) -> &str {
    &hash[..hash.len().min(12)]
}

/// How far a stage is, and from where it counts its steps.
fn said(status: &Status, from: Option<u64>) -> String {
    match (status, from) {
        (Status::Finished(result), Some(from)) => format!("steps {from} to {}", result.steps),
        (Status::Finished(result), None) => format!("{} steps", result.steps),
        (other, _) => other.word().into(),
    }
}

/// The stages from top to bottom, with a line from each to those that came from it, and the key that says so.
fn graph(rows: &[StageRow], edges: &[(usize, usize, String, bool)]) -> String {
    let (width, height) = (LEFT + WIDTH + 20, ROW * rows.len());
    let mut svg = format!("<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" role=\"img\" aria-label=\"which stage came from which\">");
    let escaped = |text: &str| text.replace('&', "&amp;").replace('<', "&lt;");
    for (k, (from, to, key, stale)) in edges.iter().enumerate() {
        let middle = |row: usize| row * ROW + ROW / 2;
        // Each line has an upright of its own, left of the boxes.
        let x = LEFT - 24 - 14 * (k % 8);
        let (above, below) = (middle(*from) + 10, middle(*to) - 10);
        let dashes = if *stale { " stroke-dasharray=\"4 4\"" } else { "" };
        let _ = write!(
            svg,
            "<path d=\"M{LEFT} {above} H{x} V{below} H{}\" fill=\"none\" stroke=\"currentColor\" stroke-width=\"1.5\"{dashes}/>\
             <path d=\"M{LEFT} {below} l-8 -4 v8 z\" fill=\"currentColor\"/>\
             <text x=\"{}\" y=\"{}\" text-anchor=\"end\" font-size=\"12\" font-family=\"sans-serif\" fill=\"currentColor\">{}{}</text>",
            LEFT - 8,
            x - 5,
            below + 4 - 14 * (k % 2),
            escaped(key),
            if *stale { " (other weights now)" } else { "" },
        );
    }
    for (i, row) in rows.iter().enumerate() {
        let top = i * ROW + (ROW - BOX) / 2;
        let text = |y: usize, size: usize, text: &str| {
            let x = LEFT + 14;
            format!("<text x=\"{x}\" y=\"{y}\" font-size=\"{size}\" font-family=\"sans-serif\" fill=\"currentColor\">{}</text>", escaped(text))
        };
        let _ = write!(
            svg,
            "<rect x=\"{LEFT}\" y=\"{top}\" width=\"{WIDTH}\" height=\"{BOX}\" rx=\"8\" fill=\"none\" stroke=\"currentColor\"/>{}{}",
            text(top + 22, 15, &row.name),
            text(top + 41, 12, &format!("{}, recipe {}", row.said, row.hash)),
        );
    }
    svg + "</svg>"
}
