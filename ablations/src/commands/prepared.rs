//! A recipe of a suite, ready to run by the trainer.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use dinolab_core::recipe::{Overrides as Sets, RawRecipe};
use dinolab_core::resolved::Resolved;
use dinolab_core::step::sources_of;
use dinolab_core::text::printable;
use dinolab_core::train::{self, Observer, RunOptions, Start};
use dinolab_core::Result;

use crate::suite::{Event, Job, Outcome, Overrides, Prepared};

/// A resolved recipe and the trainer.
struct Recipe {
    resolved: Resolved,
    table: toml::Table,
}

/// The recipe at `base` under the environment and overrides by a suite or by stages, whose file is named as their origin.
///
/// # Errors
/// If it cannot be resolved.
pub(super) fn resolve(by: &Path, base: &Path, overrides: &Overrides) -> Result<Resolved> {
    let environment = Sets { sets: Vec::new(), env: true };
    let pairs = overrides.iter().map(|(key, value)| (key.as_str(), value));
    Resolved::of(RawRecipe::load(base)?.with(&environment)?.with_overrides(&printable(by), pairs)?)?.absolute()
}

/// A recipe of a suite or of a stage, ready to run.
///
/// # Errors
/// If it cannot be resolved.
pub(super) fn prepare(by: &Path, base: &Path, overrides: &Overrides) -> Result<Box<dyn Prepared>> {
    let resolved = resolve(by, base, overrides)?;
    let table = resolved.to_toml().parse().expect("a resolved recipe is written as TOML");
    Ok(Box::new(Recipe { resolved, table }))
}

impl Prepared for Recipe {
    fn recipe(&self) -> &toml::Table {
        &self.table
    }

    fn hash(&self) -> &str {
        &self.resolved.hash
    }

    fn matters(&self, key: &str) -> bool {
        self.resolved.matters(key)
    }

    fn warnings(&self) -> Vec<String> {
        self.resolved.warnings.iter().map(ToString::to_string).collect()
    }

    fn sources(&self) -> Result<Vec<(String, PathBuf)>> {
        sources_of(&self.resolved.recipe)
    }

    fn check_parent(&self, run: &Path, parent: &toml::Table) -> Result<()> {
        self.resolved.check_sources_of(run, &Resolved::from_text(&parent.to_string())?)
    }

    fn run(&self, job: Job<'_>) -> Result<Outcome> {
        let Job { out, resume, stop, save_within, watch } = job;
        let revision = crate::build().into();
        let options = RunOptions { out: out.to_path_buf(), resume, stop, revision, save_within };
        Ok(match train::run(&self.resolved, &options, &mut Watcher(watch))? {
            train::Outcome::Finished(_) => Outcome::Finished,
            train::Outcome::Interrupted { step } => Outcome::Interrupted { step },
        })
    }
}

/// Hands the trainer's news to the suite.
struct Watcher<'a>(&'a mut dyn FnMut(Event<'_>));

impl Observer for Watcher<'_> {
    fn started(&mut self, start: &Start) {
        (self.0)(Event::Started(&start.to_string()));
    }

    fn step(&mut self, p: &train::Progress<'_>) {
        let loss = p.report.losses.get("loss/total").copied().unwrap_or(f64::NAN);
        let text = format!("loss {loss:.3}, {:.0} img/s", p.images_per_s);
        let values = p.report.numbers().into_iter().collect();
        (self.0)(Event::Step { step: p.step, steps: p.total, text: &text, values: &values });
    }

    fn probed(&mut self, step: u64, scores: &BTreeMap<String, f64>) {
        (self.0)(Event::Probed { step, values: scores });
    }

    fn warning(&mut self, text: &str) {
        (self.0)(Event::Message(text));
    }
}
