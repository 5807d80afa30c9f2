//! Optimizer `sgd`.

use dinolab_core::contract::{At, Direction, Optimizer, ParamUpdate, Reach, Schedule};
use dinolab_core::params::ParamSpec;
use dinolab_core::{plugin, Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

plugin!(Optimizer, "sgd", Sgd, Sgd::build);

/// Stochastic gradient descent with momentum, as `torch.optim.SGD` computes it with dampening 0.
///
/// The direction of a weight with gradient g:
///
/// ```text
/// m = momentum m + g
/// direction = m,   or with nesterov   g + momentum m
/// ```
///
/// (Sutskever et al., ICML 2013). Weight decay is decoupled, unlike PyTorch's: it takes `lr weight_decay` of the weight
/// and does not enter the momentum (SGDW; Loshchilov and Hutter, arXiv:1711.05101, algorithm 1). The moment is
/// `momentum_buffer`; without momentum there is none.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Sgd {
    /// Share of the last direction that stays.
    #[schemars(extend("minimum" = 0, "exclusiveMaximum" = 1))]
    pub momentum: Schedule,
    /// Whether to use Nesterov momentum.
    pub nesterov: bool,
}

impl Default for Sgd {
    fn default() -> Self {
        Self { momentum: Schedule::constant(0.9), nesterov: false }
    }
}

impl Sgd {
    fn build(self, _: &mut ()) -> Result<Box<dyn Optimizer>> {
        if self.nesterov && !self.remembers() {
            let problem = "nesterov looks ahead along a momentum, and momentum is 0";
            return Err(Error::user(problem, "set optimizer.nesterov = false, or optimizer.momentum = 0.9"));
        }
        Ok(Box::new(self))
    }

    /// Whether there is a momentum at all.
    fn remembers(&self) -> bool {
        self.momentum.as_constant() != Some(0.0)
    }
}

impl Optimizer for Sgd {
    fn moments(&self) -> &[&'static str] {
        if self.remembers() {
            &["momentum_buffer"]
        } else {
            &[]
        }
    }

    fn numbers(&self, at: At, _: u64) -> Vec<f64> {
        vec![self.momentum.at(at)]
    }

    fn direction(&self, param: &ParamUpdate<'_>) -> Result<Direction> {
        let (gradient, momentum) = (&param.gradient, &param.numbers[0]);
        let [last] = &param.moments[..] else {
            return Ok(Direction { direction: gradient.clone(), moments: Vec::new() });
        };
        let moment = last.mul(momentum)?.add(gradient)?;
        let direction = match self.nesterov {
            true => gradient.add(&moment.mul(momentum)?)?,
            false => moment.clone(),
        };
        Ok(Direction { direction, moments: vec![moment] })
    }

    fn reach(&self, _: &ParamSpec, at: At, _: u64) -> Reach {
        let momentum = self.momentum.at(at);
        let gain = if self.nesterov { 1.0 + momentum } else { 1.0 };
        Reach { memory: momentum, share: 1.0, gain, most: 0.0 }
    }
}
