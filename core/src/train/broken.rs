//! Samples that could not be used.

use std::collections::BTreeMap;

use crate::data::BrokenSample;

/// How often each was replaced.
#[derive(Default)]
pub(super) struct Broken(BTreeMap<usize, u64>);

impl Broken {
    /// Counts samples; gives what to say of each that was not met before.
    pub(super) fn count(&mut self, samples: Vec<BrokenSample>) -> Vec<String> {
        let mut texts = Vec::new();
        for sample in samples {
            *self.0.entry(sample.index).or_default() += 1;
            if self.0[&sample.index] == 1 {
                let (name, reason, n) = (sample.name, sample.reason, self.0.len());
                texts.push(format!("{name} cannot be used and was replaced: {reason} (broken sample {n})"));
            }
        }
        texts
    }

    /// What to say of all of them at the end of a run.
    pub(super) fn total(&self) -> Option<String> {
        let times: u64 = self.0.values().sum();
        let samples = self.0.len();
        (samples > 0).then(|| format!("{samples} broken samples were replaced {times} times by others"))
    }
}
