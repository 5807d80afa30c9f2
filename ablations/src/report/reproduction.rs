//! What a suite's head says that it gives, beside what it gave.

use serde::{Deserialize, Serialize};

use super::rounded_to;
use crate::statistics::{estimate, prediction};
use crate::suite::{Plan, RunRecord};

/// A value of an arm beside what the suite's head says of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Reproduction {
    /// The arm.
    pub arm: String,
    /// The metric.
    pub metric: String,
    /// Its mean here.
    pub here: f64,
    /// The seeds that went in.
    pub n: usize,
    /// The mean that the head says.
    pub said: f64,
    /// Where the mean of as many seeds lies in 95 of 100 cases, if the head's seeds and these are of one kind.
    pub within95: Option<[f64; 2]>,
    /// Whether it lies there; unknown where the head has one seed.
    pub agrees: Option<bool>,
}

impl Reproduction {
    /// In a sentence.
    pub fn sentence(&self) -> String {
        let Self { arm, metric, n, said, .. } = self;
        let show = rounded_to(self.within95);
        let (here, said) = (show(self.here), show(*said));
        match (self.agrees, self.within95) {
            (Some(true), _) => format!("{arm}, {metric}: {here} ({n} seeds), as the suite's file says ({said})"),
            (_, Some([low, high])) => format!(
                "{arm}, {metric}: {here} ({n} seeds) is other than the suite's file says: {said}, and 95% of such means within \
                 {} to {}",
                show(low),
                show(high)
            ),
            _ => format!("{arm}, {metric}: {here} ({n} seeds), and the suite's file says {said} of one seed"),
        }
    }
}

/// What the suite's head says, beside what its runs gave: nothing if the command line made them others.
pub(super) fn reproduction(plan: &Plan, records: &[RunRecord]) -> Vec<Reproduction> {
    let Some(said) = plan.suite.measured.as_ref().filter(|_| !plan.is_changed()) else { return Vec::new() };
    let mut all = Vec::new();
    for arm in plan.suite.arms.iter().filter_map(|arm| Some((&arm.name, said.arms.get(&arm.name)?))) {
        for (metric, spread) in arm.1 {
            let scores: Vec<f64> = records.iter().filter(|r| r.arm == *arm.0).filter_map(|r| r.score(metric)).collect();
            let Some(here) = estimate(&scores).mean else { continue };
            let within95 = prediction(spread.mean, spread.sd, said.n, scores.len());
            // Equal seeds on an equal machine give equal numbers, but for the digits that the head leaves out.
            let slack = 5e-3 * spread.mean.abs();
            let agrees = within95.map(|[low, high]| here >= low - slack && here <= high + slack);
            let (arm, metric, n, said) = (arm.0.clone(), metric.clone(), scores.len(), spread.mean);
            all.push(Reproduction { arm, metric, here, n, said, within95, agrees });
        }
    }
    all
}
