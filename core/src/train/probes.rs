//! Running the recipe's probes at their times.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;

use crate::contract::{Dataset, Probe, ProbeContext};
use crate::recipe::{ProbeEntry, Recipe};
use crate::step::Learner;
use crate::Result;

/// The enabled probes, built.
pub(super) struct Probes {
    probes: Vec<(String, u64, Box<dyn Probe>)>,
    train: Arc<dyn Dataset>,
    test: Arc<dyn Dataset>,
}

impl Probes {
    pub(super) fn new(recipe: &Recipe, train: Arc<dyn Dataset>, test: Arc<dyn Dataset>) -> Result<Self> {
        let enabled = recipe.probes.0.iter().filter(|(_, e)| e.enabled);
        let build =
            |(name, entry): (&String, &ProbeEntry)| Ok((name.clone(), entry.every, entry.probe.build(&mut ())?));
        Ok(Self { probes: enabled.map(build).collect::<Result<_>>()?, train, test })
    }

    /// Names of the probes that are due after `done` steps.
    pub(super) fn due(&self, done: u64, recipe: &Recipe) -> Vec<String> {
        let due = |every: u64| done == recipe.steps || (every > 0 && done.is_multiple_of(every));
        self.probes.iter().filter(|(_, every, _)| due(*every)).map(|(name, ..)| name.clone()).collect()
    }

    /// Names of all probes.
    pub(super) fn names(&self) -> Vec<String> {
        self.probes.iter().map(|(name, ..)| name.clone()).collect()
    }

    /// Scores of these probes, `probe/<name>/<score>`, and what to warn of. A probe that cannot be taken is no reason to
    /// lose a run.
    pub(super) fn run(
        &self,
        names: &[String],
        learner: &Learner,
        recipe: &Recipe,
    ) -> (BTreeMap<String, f64>, Vec<String>) {
        let mut scores = BTreeMap::new();
        let warnings = RefCell::new(Vec::new());
        for (name, _, probe) in self.probes.iter().filter(|(name, ..)| names.contains(name)) {
            let context = ProbeContext {
                features: &|pixels| learner.teacher_features(pixels),
                train: self.train.as_ref(),
                test: self.test.as_ref(),
                image_size: recipe.crops.global_size,
                patch_size: learner.model().backbone.patch_size(),
                normalization: (recipe.crops.mean, recipe.crops.std),
                seed: recipe.seed,
                warn: &|text| warnings.borrow_mut().push(format!("probe `{name}`: {text}")),
            };
            match probe.run(&context) {
                Ok(found) => {
                    let curves = found.into_iter().filter(|s| !s.detail);
                    scores.extend(curves.map(|s| (format!("probe/{name}/{}", s.name), s.value)));
                }
                Err(error) => warnings.borrow_mut().push(format!("probe `{name}` could not be taken: {error}")),
            }
        }
        (scores, warnings.into_inner())
    }
}
