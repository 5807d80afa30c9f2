//! AdamW over flat memory with the reference's parameter groups, clipping by sub-model, and EMA in the same pass.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::contract::At;
use crate::ops::{adamw_step, l2_norm, AdamW as Config, Ema, Group, Moments};
use crate::params::{ParamRole, ParamSpec};
use crate::recipe::OptimizerConfig;
use crate::{DType, Error, Result, Tensor};

use super::bounds::Reach;
use super::{Declared, Weights};

/// Added to a gradient's norm before it divides, as in `torch.nn.utils.clip_grad_norm_`.
const CLIP_EPS: f64 = 1e-6;

/// AdamW and its groups.
pub(super) struct AdamW {
    config: OptimizerConfig,
    pub(super) rules: Vec<ParamRule>,
    modules: Vec<(String, Range<usize>)>,
}

/// How the optimizer treats one parameter.
#[derive(Clone, Debug)]
pub struct ParamRule {
    /// Its full name.
    pub name: String,
    /// What the learning rate is multiplied by.
    pub lr_multiplier: f64,
    /// Whether weight decay acts on it.
    pub decays: bool,
    /// Whether it is held still for `freeze_last_layer_steps`.
    pub last_layer: bool,
    pub(super) range: Range<usize>,
    /// Index of its sub-model.
    pub(super) module: usize,
}

/// Learning-rate multiplier of the reference: `decay^(depth + 1 - layer)`, and the patch embedding's own.
fn lr_multiplier(spec: &ParamSpec, depth: usize, config: &OptimizerConfig) -> f64 {
    let decay = spec.layer.map_or(1.0, |layer| config.layerwise_decay.powi((depth + 1 - layer) as i32));
    let embed = if spec.role == Some(ParamRole::PatchEmbed) { config.patch_embed_lr_mult } else { 1.0 };
    decay * embed
}

impl AdamW {
    /// For weights of type `dtype`.
    ///
    /// # Errors
    /// If `eps` is nothing in that type: where gradients were zero, zero would be divided by zero.
    pub(super) fn new(config: &OptimizerConfig, model: &Declared, dtype: DType) -> Result<Self> {
        let least = if dtype == DType::F64 { f64::MIN_POSITIVE } else { f64::from(f32::MIN_POSITIVE) };
        if config.eps.is_nan() || config.eps < least {
            let problem =
                format!("optimizer.eps = {:e} is less than {least:e}, the least {dtype:?} number", config.eps);
            return Err(Error::user(problem, "1e-8 is usual"));
        }
        let layout = &model.layout;
        let names = layout.modules();
        let modules: Vec<_> = names.iter().map(|m| (m.clone(), layout.range_of(&format!("{m}.")))).collect();
        let depth = model.backbone.depth();
        let rule = |spec: &ParamSpec| ParamRule {
            name: spec.name.clone(),
            lr_multiplier: lr_multiplier(spec, depth, config),
            decays: spec.decays,
            last_layer: spec.role == Some(ParamRole::LastLayer),
            range: spec.range(),
            module: modules.iter().position(|(m, _)| m == spec.module()).expect("a parameter is in a module"),
        };
        Ok(Self { config: config.clone(), rules: layout.specs().iter().map(rule).collect(), modules })
    }

    /// The recipe's table.
    pub(super) fn config(&self) -> &OptimizerConfig {
        &self.config
    }

    /// The names of the sub-models.
    pub(super) fn modules(&self) -> impl Iterator<Item = &str> {
        self.modules.iter().map(|(name, _)| name.as_str())
    }

    /// The sub-models' ranges in the flat buffers.
    pub(super) fn module_ranges(&self) -> impl Iterator<Item = &Range<usize>> {
        self.modules.iter().map(|(_, range)| range)
    }

    pub(super) fn lr(&self, at: At) -> f64 {
        self.config.lr.at(at)
    }

    /// That of the last layers, which stay where they are at first.
    pub(super) fn last_layer_lr(&self, at: At) -> f64 {
        match at.step < self.config.freeze_last_layer_steps {
            true => 0.0,
            false => self.config.last_layer_lr.as_ref().unwrap_or(&self.config.lr).at(at),
        }
    }

    pub(super) fn weight_decay(&self, at: At) -> f64 {
        self.config.weight_decay.at(at)
    }

    /// What the gradient of a sub-model is multiplied by, given its length.
    pub(super) fn clip(&self, norm: f64) -> f64 {
        match self.config.clip_grad {
            most if most > 0.0 => (most / (norm + CLIP_EPS)).min(1.0),
            _ => 1.0,
        }
    }

    /// What the update at `at` does to a number, at most. Moments begin at zero, so their corrections count `updates`, not
    /// steps.
    pub(super) fn reach(&self, at: At, updates: u64) -> Reach {
        let of = |last: bool| self.rules.iter().filter(move |r| r.last_layer == last).map(|r| r.lr_multiplier);
        let [most, most_last] = [false, true].map(|last| of(last).fold(0.0, f64::max));
        let lr = (self.lr(at) * most).max(self.last_layer_lr(at) * most_last);
        let [beta1, _] = self.config.betas;
        Reach {
            keep: (1.0 - lr * self.weight_decay(at)).abs(),
            step_size: lr / (1.0 - beta1.powf(updates as f64)),
            eps: self.config.eps.min(1.0),
        }
    }

    /// L2 norm of every sub-model's gradient.
    pub(super) fn grad_norms(&self, grads: &Tensor) -> Result<BTreeMap<String, f64>> {
        let norm = |(name, range): &(String, Range<usize>)| Ok((name.clone(), l2_norm(grads, range.clone())?));
        self.modules.iter().map(norm).collect()
    }

    /// One update of all weights; with `momentum`, the teacher follows the updated student in the same pass.
    pub(super) fn update(
        &self,
        at: At,
        weights: &mut Weights,
        norms: &BTreeMap<String, f64>,
        momentum: Option<f64>,
    ) -> Result<()> {
        let (lr, last_layer_lr, weight_decay) = (self.lr(at), self.last_layer_lr(at), self.weight_decay(at));
        let clip: Vec<f64> = self.modules.iter().map(|(name, _)| self.clip(norms[name])).collect();
        let group = |rule: &ParamRule| Group {
            range: rule.range.clone(),
            lr: if rule.last_layer { last_layer_lr } else { lr } * rule.lr_multiplier,
            weight_decay: if rule.decays { weight_decay } else { 0.0 },
            clip: clip[rule.module],
        };
        let groups: Vec<Group> = self.rules.iter().map(group).collect();
        let updates = weights.updates(at);
        let Weights { student, teacher, exp_avg, exp_avg_sq, grads, .. } = weights;
        let moments = Moments { mean: exp_avg, square: exp_avg_sq };
        let ema = momentum.map(|momentum| Ema { params: teacher, momentum });
        let [beta1, beta2] = self.config.betas;
        let config = Config { beta1, beta2, eps: self.config.eps };
        adamw_step(student, grads, moments, ema, &groups, config, updates)
    }
}
