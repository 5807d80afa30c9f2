//! Steps whose loss jumps above those before: they are not taken, if a recipe says so.

use std::collections::VecDeque;

use crate::files::TensorFiles;
use crate::recipe::SpikeConfig;
use crate::{Device, Result, Tensor};

/// The losses that a step's is compared with, and how many were too high.
#[derive(Clone, Debug)]
pub(super) struct Spikes {
    config: SpikeConfig,
    /// The last losses, oldest first.
    recent: VecDeque<f64>,
    skipped: u64,
}

const LOSSES: &str = "spike.losses";
const SKIPPED: &str = "spike.skipped";

impl Spikes {
    pub(super) fn new(config: &SpikeConfig) -> Self {
        Self { config: config.clone(), recent: VecDeque::new(), skipped: 0 }
    }

    /// Steps that were skipped because their loss jumped.
    pub(super) fn skipped(&self) -> u64 {
        self.skipped
    }

    /// The loss above which a step is not taken; infinite until the window is full.
    pub(super) fn limit(&self) -> f64 {
        if self.recent.len() < self.config.window.max(1) {
            return f64::INFINITY;
        }
        let mut sorted: Vec<f64> = self.recent.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        let n = sorted.len();
        let median = 0.5 * (sorted[(n - 1) / 2] + sorted[n / 2]);
        // Comparisons are made in f32 on a GPU.
        f64::from((median + (self.config.factor - 1.0) * median.abs()) as f32)
    }

    /// After a step with this loss. Those that jumped count too: a loss that stays where it is is no jump.
    pub(super) fn seen(&mut self, loss: f64, jumped: bool) {
        self.skipped += u64::from(jumped);
        if loss.is_finite() {
            self.recent.push_back(loss);
        }
        while self.recent.len() > self.config.window.max(1) {
            self.recent.pop_front();
        }
    }

    /// For a checkpoint.
    pub(super) fn content(&self) -> Vec<(String, Tensor)> {
        let losses: Vec<f64> = self.recent.iter().copied().collect();
        let host = |make: &dyn Fn() -> Result<Tensor>| Device::Cpu.with(make).expect("a list has one axis");
        vec![
            (LOSSES.into(), host(&|| Tensor::from_slice(&losses, &[losses.len()]))),
            (SKIPPED.into(), host(&|| Tensor::from_slice(&[self.skipped as u32], &[1]))),
        ]
    }

    /// Goes on from those of another run: jumps are counted from here, and losses that are another sum are not compared with.
    pub(super) fn begin(&mut self, same_losses: bool) {
        self.skipped = 0;
        if !same_losses {
            self.recent.clear();
        }
    }

    /// From a checkpoint; one that was written without begins anew.
    pub(super) fn restore(&mut self, from: &TensorFiles) -> Result<()> {
        if let (Some(losses), Some(skipped)) = (from.read(LOSSES)?, from.read(SKIPPED)?) {
            self.recent = losses.to_f64_vec().into();
            self.skipped = skipped.to_f64_vec().first().map_or(0, |&n| n as u64);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spikes(factor: f64, losses: &[f64]) -> Spikes {
        let mut spikes = Spikes::new(&SpikeConfig { factor, window: 3 });
        losses.iter().for_each(|&loss| spikes.seen(loss, false));
        spikes
    }

    #[test]
    fn the_limit_is_a_multiple_of_the_median_once_the_window_is_full() {
        assert_eq!(spikes(2.0, &[5.0, 1.0]).limit(), f64::INFINITY);
        assert_eq!(spikes(2.0, &[9.0, 5.0, 1.0, 3.0]).limit(), 6.0);
        assert_eq!(spikes(3.0, &[-2.0, -1.0, -4.0]).limit(), 2.0, "losses may be negative");
    }

    #[test]
    fn a_loss_that_stays_high_becomes_the_median() {
        let mut spikes = spikes(2.0, &[1.0; 3]);
        spikes.seen(10.0, true);
        spikes.seen(10.0, true);
        assert_eq!((spikes.limit(), spikes.skipped()), (20.0, 2));
    }

    #[test]
    fn a_run_that_goes_on_from_another_counts_its_own_jumps_and_compares_what_is_the_same_sum() {
        let mut parent = spikes(2.0, &[1.0; 3]);
        parent.seen(1.5, true);
        for (same, limit) in [(true, 2.0), (false, f64::INFINITY)] {
            let mut child = parent.clone();
            child.begin(same);
            assert_eq!((child.skipped(), child.limit()), (0, limit));
        }
    }

    #[test]
    fn a_loss_that_is_not_finite_is_not_compared_with() {
        let mut spikes = spikes(2.0, &[1.0; 3]);
        spikes.seen(f64::NAN, false);
        assert_eq!(spikes.limit(), 2.0);
    }
}
