//! Naming the known sicknesses of self-supervised training when they show.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::contract::Dataset;
use crate::step::{Declared, Learner, Report};

/// What was seen so far, and what was said already: each sickness is named once.
#[derive(Default)]
pub(super) struct Verdict {
    measured: usize,
    /// The least standard deviation of the CLS feature.
    least_std: Option<f64>,
    best_rank: f64,
    first_cosine: Option<f64>,
    at_uniform: usize,
    said: Vec<&'static str>,
}

/// Measurements before anything is judged: early features are not yet features.
const PATIENCE: usize = 5;
/// Standard deviation of the CLS feature below which it counts as constant.
const CONSTANT: f64 = 0.02;
/// How many times the least that it was it may be, and counts as no longer so.
const GROWS: f64 = 2.0;

impl Verdict {
    /// What was seen until a run was stopped, by the lines of its log.
    pub(super) fn of(lines: &[Map<String, Value>], model: &Declared) -> Self {
        let mut verdict = Self::default();
        for line in lines {
            // What shows here was named then.
            verdict.look(&|name| line.get(name)?.as_f64(), model);
        }
        verdict
    }

    /// Sicknesses that show now and were not named before: a short name, and what it is.
    pub(super) fn judge(
        &mut self,
        report: &Report,
        learner: &Learner,
        data: &dyn Dataset,
    ) -> Vec<(&'static str, String)> {
        let Some(health) = &report.health else { return Vec::new() };
        let numbers: BTreeMap<String, f64> = report.numbers().into_iter().collect();
        let mut found = self.look(&|name| numbers.get(name).copied(), learner.model());
        // In a constant output everything coincides; that has its own name.
        if let (Some(&(a, b)), true) = (health.coinciding.first(), health.feature_std >= CONSTANT) {
            let text = format!(
                "{} and {} have the same CLS feature: copies of each other, or pictures without content; losses push \
                them apart in vain, so remove one",
                data.describe(a),
                data.describe(b)
            );
            found.extend(self.named(vec![("duplicates", text)]));
        }
        found
    }

    /// Sicknesses that the numbers of a step show, as the log has them, and that were not named before.
    fn look(&mut self, number: &dyn Fn(&str) -> Option<f64>, model: &Declared) -> Vec<(&'static str, String)> {
        let of_health = ["health/feature_std", "health/effective_rank", "health/cls_patch_cosine"];
        let of_health = of_health.map(|name| number(name).filter(|x| x.is_finite()));
        let [Some(feature_std), Some(rank), Some(cosine)] = of_health else { return Vec::new() };
        self.measured += 1;
        self.best_rank = self.best_rank.max(rank);
        let least_std = self.least_std.map_or(feature_std, |least| least.min(feature_std));
        self.least_std = Some(least_std);
        let mut found: Vec<(&'static str, String)> = Vec::new();

        let uniform = model.losses.iter().find_map(|l| {
            let k = l.needs.targets.filter(|spec| spec.distribution)?.width;
            let loss = number(&format!("loss/{}", l.name))?;
            let ln_k = (k as f64).ln();
            ((loss - ln_k).abs() < 0.01 * ln_k).then(|| (l.name.clone(), loss, k))
        });
        self.at_uniform = if uniform.is_some() { self.at_uniform + 1 } else { 0 };
        if let (Some((name, loss, k)), true) = (uniform, self.at_uniform > PATIENCE) {
            let text = format!(
                "loss `{name}` has stayed at {loss:.3} = ln {k}: uniform collapse, the teacher says the \
                same of every image; try a lower teacher temperature, a higher learning rate or a longer warm-up"
            );
            found.push(("uniform", text));
        }
        if self.measured > PATIENCE {
            // Blocks whose layer_scale begins near 0 begin alike, and grow apart.
            if feature_std < CONSTANT && feature_std < GROWS * least_std {
                let advice = match model.losses.iter().any(|l| l.needs.runs_teacher()) {
                    true => "a loss that spreads features, a higher teacher temperature or more EMA momentum",
                    false => "a loss that spreads features, a lower learning rate, or backbone.layer_scale = 1.0 for a short run",
                };
                let text = format!(
                    "the CLS feature is nearly constant (standard deviation {feature_std:.4}): collapse; try {advice}"
                );
                found.push(("constant", text));
            }
            for name in model.losses.iter().map(|l| &l.name) {
                let Some(marginal) = number(&format!("health/{name}/marginal_entropy")).filter(|m| *m < 0.05) else {
                    continue;
                };
                let text = format!(
                    "targets of `{name}` fall on few prototypes (entropy of their mean is {:.0}% of ln K): \
                    one-hot collapse; use Sinkhorn-Knopp or a higher teacher temperature",
                    100.0 * marginal
                );
                found.push(("one_hot", text));
            }
            if rank < 0.25 * self.best_rank {
                let text = format!(
                    "the effective rank of the CLS features fell from {:.1} to {rank:.1}: dimensional \
                    collapse; try more of a loss that spreads features, or a lower learning rate",
                    self.best_rank
                );
                found.push(("rank", text));
            }
            let first = *self.first_cosine.get_or_insert(cosine);
            if cosine > 0.5 && cosine > first + 0.25 {
                let text = format!(
                    "the cosine between CLS and patches crept up from {first:.2} to {cosine:.2}: dense features \
                    are losing locality; a loss that holds the similarities of patches to those of an earlier teacher is \
                    meant for this"
                );
                found.push(("locality", text));
            }
        }
        self.named(found)
    }

    /// Those that were not named before.
    fn named(&mut self, mut found: Vec<(&'static str, String)>) -> Vec<(&'static str, String)> {
        found.retain(|(key, _)| !self.said.contains(key));
        self.said.extend(found.iter().map(|(key, _)| *key));
        found
    }
}
