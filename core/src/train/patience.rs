//! Ending a run whose score stops improving: the recipe's `stop`. What was measured is read from the log, so that a run that
//! was interrupted ends where an uninterrupted one does.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::problem::nearest;
use crate::recipe::StopConfig;
use crate::{Error, Result};

/// The score that decides, as it was measured so far.
pub(super) struct Patience {
    config: StopConfig,
    /// (steps done, score), in order; a score that is not finite is none.
    history: Vec<(u64, Option<f64>)>,
}

impl Patience {
    /// Of a run whose log has these lines of the steps that were done.
    pub(super) fn new(config: &StopConfig, lines: &[Map<String, Value>]) -> Self {
        let mut patience = Self { config: config.clone(), history: Vec::new() };
        for line in lines {
            if let (Some(step), Some(value)) = (line.get("step").and_then(|s| s.as_u64()), line.get(&config.metric)) {
                patience.history.push((step, value.as_f64()));
            }
        }
        patience
    }

    /// Takes note of what was measured after `done` steps.
    ///
    /// # Errors
    /// If the probe gives scores, and not this one.
    pub(super) fn measured(&mut self, done: u64, scores: &BTreeMap<String, f64>) -> Result<()> {
        let metric = &self.config.metric;
        if let Some(score) = scores.get(metric) {
            self.history.push((done, Some(*score).filter(|s| s.is_finite())));
            return Ok(());
        }
        let probe = metric.rsplit_once('/').map_or("", |(probe, _)| probe);
        let others: Vec<&str> =
            scores.keys().map(String::as_str).filter(|k| k.starts_with(&format!("{probe}/"))).collect();
        if others.is_empty() {
            return Ok(());
        }
        let meant =
            nearest(metric, others.iter().copied()).map_or(String::new(), |name| format!("did you mean `{name}`? "));
        let problem = format!("stop.metric = \"{metric}\" is not measured: the probe gives {}", others.join(", "));
        Err(Error::user(problem, format!("{meant}correct it and go on with --resume")))
    }

    /// Why the run ends here, if it does.
    pub(super) fn is_out(&self) -> Option<String> {
        let StopConfig { metric, patience, lower_is_better, min_delta } = &self.config;
        let sign = if *lower_is_better { -1.0 } else { 1.0 };
        let mut best: Option<(u64, f64)> = None;
        let mut waited = 0;
        for (step, score) in &self.history {
            match score {
                Some(score) if best.is_none_or(|(_, b)| sign * (score - b) > *min_delta) => {
                    (best, waited) = (Some((*step, *score)), 0);
                }
                _ => waited += 1,
            }
        }
        let (step, score) = best.filter(|_| waited >= *patience)?;
        Some(format!("{metric} was best at step {step} ({score:.4}) and not better in {waited} measurements since"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The measurement after which a run with these scores ends.
    fn ends(config: &StopConfig, scores: &[f64]) -> Option<usize> {
        let mut patience = Patience { config: config.clone(), history: Vec::new() };
        scores.iter().position(|score| {
            patience.measured(0, &BTreeMap::from([("probe/knn/top1".into(), *score)])).expect("it is measured");
            patience.is_out().is_some()
        })
    }

    #[test]
    fn a_run_ends_after_so_many_measurements_that_are_not_better() {
        let higher =
            StopConfig { metric: "probe/knn/top1".into(), patience: 2, lower_is_better: false, min_delta: 0.0 };
        assert_eq!(ends(&higher, &[0.1, 0.2, 0.3, 0.4]), None);
        assert_eq!(ends(&higher, &[0.3, 0.2, 0.4, 0.4, 0.1, 0.9]), Some(4));
        assert_eq!(ends(&higher, &[0.3, f64::NAN, f64::NAN]), Some(2));
        // Without a score that was finite there is nothing to be better than.
        assert_eq!(ends(&higher, &[f64::NAN; 5]), None);
        let lower = StopConfig { lower_is_better: true, ..higher.clone() };
        assert_eq!(ends(&lower, &[0.4, 0.3, 0.2, 0.3, 0.2]), Some(4));
        let coarse = StopConfig { min_delta: 0.1, ..higher };
        assert_eq!(ends(&coarse, &[0.1, 0.15, 0.19]), Some(2));
    }

    #[test]
    fn a_score_that_the_probe_does_not_give_is_an_error_that_names_those_it_gives() {
        let config =
            StopConfig { metric: "probe/knn/top2".into(), patience: 2, lower_is_better: false, min_delta: 0.0 };
        let mut patience = Patience { config, history: Vec::new() };
        let error = patience.measured(4, &BTreeMap::from([("probe/knn/top1".into(), 0.5)])).unwrap_err().to_string();
        assert!(error.contains("the probe gives probe/knn/top1") && error.contains("did you mean"), "{error}");
        // Another probe was due.
        patience.measured(4, &BTreeMap::from([("probe/other/mean".into(), 0.5)])).unwrap();
    }
}
