//! The update alone: weights without a model, and gradients that are given.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::comm::Ranks;
use crate::contract::At;
use crate::params::Layout;
use crate::recipe::OptimizerEntry;
use crate::{cuda, DType, Device, Result, Tensor};

use super::optimizer::{from_the_start, Groups};
use super::parts::Share;
use super::update::DeviceUpdate;
use super::{Limits, ParamRule, Weights};

/// Updates of weights by gradients that are given: what holds for an optimizer can be seen without a model.
pub struct Updates {
    groups: Groups,
    weights: Weights,
    device: Device,
    on_gpu: Option<DeviceUpdate>,
    total: u64,
}

impl Updates {
    /// Weights as drawn from seed 0, for features of type `features` on `device`, for a run of `total` steps. The teacher
    /// begins at zero. `depth` is that of the backbone.
    ///
    /// # Errors
    /// If the optimizer cannot be built.
    pub fn new(
        entry: &OptimizerEntry,
        layout: &Arc<Layout>,
        depth: usize,
        total: u64,
        (device, features): (Device, DType),
    ) -> Result<Self> {
        let groups = Groups::new(entry, layout, depth, Share::default(), from_the_start)?;
        let mut weights = device.with(|| Weights::of_layout(layout, &groups, true, [], features))?;
        weights.student.draw(layout, 0)?;
        let on_gpu = device.gpu().map(|gpu| DeviceUpdate::new(gpu, &groups)).transpose()?;
        Ok(Self { groups, weights, device, on_gpu, total })
    }

    /// Step `step` (0-based), with these gradients of the whole layout; the teacher keeps the share `momentum`.
    ///
    /// # Errors
    /// If the optimizer's operations fail.
    pub fn update(&mut self, step: u64, grads: &[f64], momentum: f64) -> Result<()> {
        let at = At { step, total: self.total };
        let Self { groups, weights, .. } = self;
        let grads = Tensor::from_f64(grads, &[grads.len()], weights.student.dtype())?;
        let Some(on_gpu) = &self.on_gpu else {
            let norms = groups.grad_norms(&grads, &Ranks::one(1))?;
            weights.grads = grads;
            return groups.update(at, weights, &norms, Some(momentum));
        };
        let grads = grads.to(self.device);
        let limits = Limits { gradient: f64::from(f32::MAX), loss: f64::INFINITY };
        on_gpu.write(at, groups, weights.updates(at), limits, Some(momentum), &BTreeMap::new())?;
        let _on = self.device.enter();
        let _step = cuda::step_scope();
        let norms = on_gpu.norms(&grads, &Ranks::one(1))?;
        let taken = on_gpu.verdict(&norms, 0..norms.len(), None)?;
        on_gpu.apply(groups, weights, &grads, &norms, &taken, true)
    }

    /// How the optimizer treats every parameter, in the order of the layout.
    pub fn rules(&self) -> &[ParamRule] {
        &self.groups.rules
    }

    /// The weights after the last update.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }
}
