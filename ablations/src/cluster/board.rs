//! What a person sees of runs side by side: a bar for the suite and one for each process; where bars cannot be drawn, a
//! line now and then. How far a run is stands in its `metrics.jsonl`.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use indicatif::{MultiProgress, ProgressBar};

use crate::pulse::Pulse;
use crate::style;
use crate::suite::bar_style;

/// Bytes at the end of a log in which its last line is looked for.
const TAIL: u64 = 1 << 16;

/// The bars.
pub(super) struct Board {
    bars: MultiProgress,
    suite: ProgressBar,
}

/// The bar of one process.
pub(super) struct Row {
    bar: ProgressBar,
    pulse: Pulse,
}

impl Board {
    /// Over `runs` runs, `done` of them finished before.
    pub(super) fn new(name: &str, runs: usize, done: usize) -> Self {
        let bars = MultiProgress::new();
        let suite = bars.add(ProgressBar::new(runs as u64)).with_prefix(name.to_string());
        suite.set_style(bar_style("{prefix:.bold} [{bar:30.cyan/dim}] {pos}/{len} runs, {elapsed} gone"));
        suite.set_position(done as u64);
        suite.tick();
        Self { bars, suite }
    }

    /// A process begins with something of so many steps, as far as that is known.
    pub(super) fn begin(&self, label: &str, steps: Option<u64>) -> Row {
        let (bar, style) = match steps {
            Some(steps) => {
                (ProgressBar::new(steps), "  {prefix} [{bar:30.green/dim}] {pos}/{len} steps, {eta} left  {msg}")
            }
            None => (ProgressBar::no_length(), "  {prefix} {pos} steps  {msg}"),
        };
        let bar = self.bars.add(bar).with_prefix(label.to_string());
        bar.set_style(bar_style(style));
        bar.tick();
        Row { bar, pulse: Pulse::default() }
    }

    /// Looks how far the run in `dir` is.
    pub(super) fn look(&self, row: &mut Row, dir: &Path) {
        let Some((step, loss)) = newest(dir) else { return };
        let text = loss.map_or(String::new(), |loss| format!("loss {loss:.3}"));
        row.bar.set_position(step);
        row.bar.set_message(text.clone());
        let steps = row.bar.length();
        if self.suite.is_hidden() {
            if let Some(left) = row.pulse.due(step, steps.unwrap_or(step)) {
                let (done, runs) = (self.suite.position(), self.suite.length().unwrap_or(0));
                let (of, left) = steps.map_or_else(Default::default, |n| (format!(" of {n}"), format!(", {left}")));
                let run = row.bar.prefix();
                style::line(&format!("{run}: step {step}{of}: {text}{left}; {done} of {runs} runs done"));
            }
        }
    }

    /// Its process has ended.
    pub(super) fn end(&self, row: &Row) {
        row.bar.finish_and_clear();
    }

    /// A run of the suite is done, well or not.
    pub(super) fn done(&self) {
        self.suite.inc(1);
    }

    /// A line above the bars.
    pub(super) fn say(&self, line: &str) {
        if self.suite.is_hidden() {
            style::line(line);
        } else {
            // A terminal that cannot be written to has nobody who could be told.
            let _ = self.bars.println(style::shown(line));
        }
    }

    /// Takes the bars away.
    pub(super) fn finish(&self) {
        self.suite.finish_and_clear();
    }
}

/// The last step that the run in `dir` logged, and its loss.
pub(super) fn newest(dir: &Path) -> Option<(u64, Option<f64>)> {
    let mut file = File::open(dir.join("metrics.jsonl")).ok()?;
    let size = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(TAIL))).ok()?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    // The last line may be half written.
    let line = text.lines().rev().find_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())?;
    Some((line["step"].as_u64()?, line["loss/total"].as_f64()))
}
