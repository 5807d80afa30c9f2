//! Running the recipe's probes at their times.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;

use crate::contract::{at_size, Dataset, Features, ImageSize, Probe, ProbeContext};
use crate::recipe::{ProbeEntry, Recipe};
use crate::step::Learner;
use crate::{Device, Result, Tensor};

/// The enabled probes, built.
pub(super) struct Probes {
    probes: Vec<Taken>,
    train: Arc<dyn Dataset>,
    test: Arc<dyn Dataset>,
}

/// Bytes of features that are remembered while probes run.
const MOST: usize = 256 << 20;

/// A model that remembers what it gave: several probes look at the same batches. Those that come first are remembered.
struct Seen<'a> {
    learner: &'a Learner,
    known: RefCell<Known>,
}

/// Features by the hash of the pixels, and the bytes of all.
type Known = (BTreeMap<[u8; 32], Features>, usize);

impl<'a> Seen<'a> {
    fn new(learner: &'a Learner) -> Self {
        Self { learner, known: RefCell::default() }
    }

    /// [`Learner::teacher_features`] of pixels `[B, channels, h, w]`.
    fn features(&self, pixels: &Tensor) -> Result<Features> {
        let hash = pixels.to(Device::Cpu).hash();
        if let Some(known) = self.known.borrow().0.get(&hash) {
            return Ok(known.clone());
        }
        let features = self.learner.teacher_features(pixels)?;
        let (known, total) = &mut *self.known.borrow_mut();
        if *total + features.bytes() <= MOST {
            *total += features.bytes();
            known.insert(hash, features.clone());
        }
        Ok(features)
    }
}

/// A probe, when it is taken, and at which sizes; at that of global crops if there is none.
struct Taken {
    name: String,
    every: u64,
    sizes: Vec<ImageSize>,
    probe: Box<dyn Probe>,
}

impl Taken {
    /// The sizes that are listed, or none at all once.
    fn sizes(&self) -> impl Iterator<Item = Option<ImageSize>> + '_ {
        self.sizes.iter().copied().map(Some).chain(self.sizes.is_empty().then_some(None))
    }
}

impl Probes {
    pub(super) fn new(recipe: &Recipe, train: Arc<dyn Dataset>, test: Arc<dyn Dataset>) -> Result<Self> {
        let enabled = recipe.probes.0.iter().filter(|(_, e)| e.enabled);
        let build = |(name, entry): (&String, &ProbeEntry)| {
            let (every, sizes) = (entry.every, entry.sizes.clone());
            Ok(Taken { name: name.clone(), every, sizes, probe: entry.probe.build(&mut ())? })
        };
        Ok(Self { probes: enabled.map(build).collect::<Result<_>>()?, train, test })
    }

    /// Names of the probes that are due after `done` steps.
    pub(super) fn due(&self, done: u64, recipe: &Recipe) -> Vec<String> {
        let due = |every: u64| done == recipe.steps || (every > 0 && done.is_multiple_of(every));
        self.probes.iter().filter(|taken| due(taken.every)).map(|taken| taken.name.clone()).collect()
    }

    /// Names of all probes.
    pub(super) fn names(&self) -> Vec<String> {
        self.probes.iter().map(|taken| taken.name.clone()).collect()
    }

    /// Scores of these probes, `probe/<name>/<score>` (at one of a list of sizes: `probe/<name>/<score>@<size>`), and what to
    /// warn of. A probe that cannot be taken is no reason to lose a run.
    pub(super) fn run(
        &self,
        names: &[String],
        learner: &Learner,
        recipe: &Recipe,
    ) -> (BTreeMap<String, f64>, Vec<String>) {
        let mut scores = BTreeMap::new();
        let warnings = RefCell::new(Vec::new());
        let seen = Seen::new(learner);
        let named = self.probes.iter().filter(|taken| names.contains(&taken.name));
        for (taken, size) in named.flat_map(|taken| taken.sizes().map(move |size| (taken, size))) {
            let at = size.map_or(String::new(), |size| format!("@{size}"));
            let name = &taken.name;
            let [train, test] = match size {
                Some(size) => at_size(&self.train, &self.test, size),
                None => [self.train.clone(), self.test.clone()],
            };
            let context = ProbeContext {
                features: &|pixels| seen.features(pixels)?.finite(),
                train: train.as_ref(),
                test: test.as_ref(),
                image_size: size.unwrap_or(ImageSize::square(recipe.crops.global_size)),
                patch_size: learner.model().backbone.patch_size(),
                normalization: (&recipe.crops.mean, &recipe.crops.std),
                seed: recipe.seed,
                warn: &|text| warnings.borrow_mut().push(format!("probe `{name}{at}`: {text}")),
                show: None,
            };
            match taken.probe.run(&context) {
                Ok(found) => {
                    let curves = found.into_iter().filter(|s| !s.detail);
                    scores.extend(curves.map(|s| (format!("probe/{name}/{}{at}", s.name), s.value)));
                }
                Err(error) => warnings.borrow_mut().push(format!("probe `{name}{at}` could not be taken: {error}")),
            }
        }
        (scores, warnings.into_inner())
    }
}
