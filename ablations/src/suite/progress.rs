//! What a person sees while a suite runs: one bar for the suite, one for the current run, a line for every run done; where
//! bars cannot be drawn, a line now and then.

use std::cell::RefCell;
use std::collections::BTreeSet;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::plan::Event;
use crate::pulse::Pulse;
use crate::style;

/// Bars on a terminal; plain lines elsewhere.
pub struct Progress {
    bars: MultiProgress,
    suite: ProgressBar,
    run: ProgressBar,
    pulse: RefCell<Pulse>,
    /// Lines that are said of every run, and here once.
    told: RefCell<BTreeSet<String>>,
}

impl Progress {
    /// Progress over `runs` runs, `done` of them finished before.
    pub fn new(name: &str, runs: usize, done: usize) -> Self {
        let bars = MultiProgress::new();
        let suite = bars.add(ProgressBar::new(runs as u64)).with_prefix(name.to_string());
        let style = "{prefix:.bold} [{bar:30.cyan/dim}] {pos}/{len} runs, {elapsed} gone, about {eta} left";
        suite.set_style(bar_style(style));
        // Runs done before this session took none of its time.
        suite.set_position(done as u64);
        suite.reset_eta();
        let run = bars.add(ProgressBar::new(0));
        run.set_style(bar_style("  {prefix} [{bar:30.green/dim}] {pos}/{len} steps, {eta} left  {msg}"));
        suite.tick();
        Self { bars, suite, run, pulse: RefCell::default(), told: RefCell::default() }
    }

    /// Nothing is shown: for tests.
    pub fn hidden() -> Self {
        let bars = MultiProgress::with_draw_target(indicatif::ProgressDrawTarget::hidden());
        let (suite, run) = (ProgressBar::hidden(), ProgressBar::hidden());
        Self { bars, suite, run, pulse: RefCell::default(), told: RefCell::default() }
    }

    /// A run begins.
    pub fn begin(&self, label: &str) {
        self.run.reset();
        self.run.set_length(0);
        self.run.set_prefix(label.to_string());
        self.run.set_message("");
        *self.pulse.borrow_mut() = Pulse::default();
    }

    /// Something happened in the run.
    pub fn watch(&self, event: &Event<'_>) {
        match *event {
            Event::Step { step, steps, text, .. } => {
                self.run.set_length(steps);
                self.run.set_position(step);
                self.run.set_message(text.to_string());
                if self.suite.is_hidden() {
                    if let Some(left) = self.pulse.borrow_mut().due(step, steps) {
                        let (run, done, runs) = (self.run.prefix(), self.suite.position(), self.suite.length());
                        let of = runs.map_or(String::new(), |runs| format!(" of {runs}"));
                        style::line(&format!("{run}: step {step} of {steps}: {text}, {left}; {done}{of} runs done"));
                    }
                }
            }
            Event::Started(text) => {
                for line in text.lines().filter(|line| self.told.borrow_mut().insert(line.to_string())) {
                    self.say(line);
                }
            }
            Event::Message(text) => self.say(&format!("  {text}")),
            Event::Probed { .. } => {}
        }
    }

    /// A run of the suite is done, well or not.
    pub fn done(&self) {
        self.suite.inc(1);
    }

    /// A line above the bars.
    pub fn say(&self, line: &str) {
        if self.suite.is_hidden() {
            style::line(line);
        } else {
            // A terminal that cannot be written to has nobody who could be told.
            let _ = self.bars.println(style::shown(line));
        }
    }

    /// Takes the bars away.
    pub fn finish(&self) {
        self.run.finish_and_clear();
        self.suite.finish_and_clear();
    }
}

/// The look of every bar.
pub(crate) fn bar_style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("the template is well formed").progress_chars("━╸─")
}
