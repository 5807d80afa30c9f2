//! Steps that are not taken: what is not finite, what would make a weight so, and spikes of the loss.

use std::collections::BTreeMap;

use crate::contract::{At, Draws};
use crate::cuda;
use crate::data::Batch;
use crate::tensor::{catch_out_of_memory, first_non_finite};
use crate::Result;

use super::bounds::Reach;
use super::spikes::Spikes;
use super::{Learner, Report};

/// Why a step is not taken.
pub(super) enum Refusal {
    /// This is not finite, or would not be.
    NonFinite(String),
    /// The total loss is above this.
    Spike(f64),
}

/// What a step may be, decided before it is computed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// The longest clipped gradient.
    pub(super) gradient: f64,
    /// The greatest total loss.
    pub(super) loss: f64,
}

impl Learner {
    /// What a step at `at` may be so that everything stays finite, and what its update does at most.
    pub(super) fn limits(&mut self, at: At) -> Result<(Limits, Reach)> {
        let reach = self.optimizer.reach(at, self.weights.updates(at));
        let mut gradient = self.weights.bounds(&self.model, &self.ranks)?.longest_gradient(reach);
        if gradient < 0.0 {
            // The bounds may have drifted from the numbers.
            self.weights.forget_bounds();
            gradient = self.weights.bounds(&self.model, &self.ranks)?.longest_gradient(reach);
        }
        let loss = self.spikes.as_ref().map_or(f64::INFINITY, Spikes::limit);
        Ok((Limits { gradient, loss }, reach))
    }

    /// The longest gradient of a sub-model, after clipping.
    pub(super) fn clipped(&self, report: &Report) -> f64 {
        let by = self.clipped_by(&report.grad_norms);
        let clipped = |(name, &norm): (&String, &f64)| self.optimizer.clip(by.get(name).copied().unwrap_or(0.0)) * norm;
        report.grad_norms.iter().map(clipped).fold(0.0, f64::max)
    }

    /// The norms that gradients of these norms are clipped by: their own, or those of the last step.
    pub(super) fn clipped_by<'a>(&'a self, own: &'a BTreeMap<String, f64>) -> &'a BTreeMap<String, f64> {
        if self.optimizer.config().is_fused() {
            &self.last_norms
        } else {
            own
        }
    }

    /// Why a step with this report is not taken, if it is not.
    pub(super) fn refusal(
        &mut self,
        at: At,
        batches: &[Batch],
        draws: &[Draws],
        report: &Report,
        marks: &[(String, f64)],
        limits: Limits,
    ) -> Result<Option<Refusal>> {
        if let Some(what) = self.find_non_finite(at, batches, draws, report, marks)? {
            return Ok(Some(Refusal::NonFinite(what)));
        }
        let gradient = self.clipped(report);
        if gradient > limits.gradient {
            let what = match limits.gradient < 0.0 {
                true => "the update of the weights, by its rates and the size of the weights alone,".to_string(),
                false => format!("the update of the weights by a gradient of length {gradient:.3e}"),
            };
            return Ok(Some(Refusal::NonFinite(what)));
        }
        let total = report.losses.get("loss/total").copied().unwrap_or(0.0);
        Ok((total > limits.loss).then_some(Refusal::Spike(limits.loss)))
    }

    /// What was not finite, and the operation where it began: found by running the step again and watching.
    pub(super) fn find_non_finite(
        &mut self,
        at: At,
        batches: &[Batch],
        draws: &[Draws],
        report: &Report,
        marks: &[(String, f64)],
    ) -> Result<Option<String>> {
        let bad_mark = marks.iter().find(|(_, mark)| !mark.is_finite());
        let bad_loss = report.losses.iter().find(|(_, v)| !v.is_finite());
        let bad_norm = report.grad_norms.iter().find(|(_, v)| !v.is_finite());
        let what = match (bad_loss, bad_norm, bad_mark) {
            (Some((name, _)), ..) => name.clone(),
            (None, Some((module, _)), _) => format!("the gradient of {module}"),
            (None, None, Some((state, _))) => state.clone(),
            (None, None, None) => return Ok(None),
        };
        // In the memory of the step, which is over: only the answers of recorded steps are kept there.
        let _step = cuda::step_scope();
        let mut grads = self.weights.take_grads();
        let (result, first) = first_non_finite(|| {
            catch_out_of_memory(|| self.forward_backward(at, batches, draws, (&mut grads, None), false))
        });
        self.weights.grads = grads;
        result?;
        Ok(Some(match first {
            Some(first) => format!("{what} (first: {first})"),
            None => what,
        }))
    }
}
