//! Barlow Twins: the cross-correlation of two crops' projections is the identity.

use dinolab_core::contract::{Loss, LossContext, LossCost, LossRows, LossValue, Needs, Outputs, StepContext};
use dinolab_core::nn::BatchNorm;
use dinolab_core::params::Params;
use dinolab_core::{plugin, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::projector::{Projector, ProjectorConfig};

plugin!(Loss, "barlow_twins", BarlowTwins, BarlowTwinsLoss::build);

/// Redundancy reduction between the projections of two global crops. There is no teacher.
///
/// With projections z and z' of the crops, normalised over the batch, and `C = z^T z' / N`:
///
/// ```text
/// loss = sum_i (1 - C_ii)^2 + off_diagonal_weight sum_(i != j) C_ij^2
/// ```
///
/// (Zbontar et al., arXiv:2103.03230, equation 1).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BarlowTwins {
    /// The projector.
    pub projector: ProjectorConfig,
    /// Weight of the redundancy term (the paper's lambda).
    #[schemars(range(min = 0, max = 1_000_000))]
    pub off_diagonal_weight: f64,
}

impl Default for BarlowTwins {
    fn default() -> Self {
        let projector = ProjectorConfig { hidden: 2048, output: 2048, layers: 3 };
        Self { projector, off_diagonal_weight: 0.0051 }
    }
}

#[derive(Debug)]
struct BarlowTwinsLoss {
    config: BarlowTwins,
    projector: Projector,
    norm: BatchNorm,
}

impl BarlowTwinsLoss {
    fn build(config: BarlowTwins, context: &mut LossContext<'_>) -> Result<Box<dyn Loss>> {
        let projector = Projector::declare(context.params, "projector", context.dim, &config.projector);
        let norm = BatchNorm::declare(context.params, config.projector.output, false);
        Ok(Box::new(Self { config, projector, norm }))
    }
}

impl Loss for BarlowTwinsLoss {
    fn needs(&self) -> Needs {
        Needs { locals: false, teacher: false, whole_batch: true, min_batch: 2, ..Needs::default() }
    }

    fn compute(&self, params: &Params<'_>, out: &Outputs<'_>, context: &StepContext<'_>) -> Result<LossValue> {
        let z = self.projector.forward(params, out.student.cls)?.cast(context.dtype)?;
        let normalised = |crop: usize| self.norm.forward(params, &z.narrow(crop * out.images, out.images)?);
        let (one, two) = (normalised(0)?, normalised(1)?);
        let correlation = one.transpose()?.matmul(&two)?.scale(1.0 / out.images as f64)?;
        let diagonal = one.mul(&two)?.sum_axis(0)?.scale(1.0 / out.images as f64)?;
        let on = diagonal.neg()?.shift(1.0)?.square()?.sum()?;
        let off = correlation.square()?.sum()?.sub(&diagonal.square()?.sum()?)?;
        let parts = vec![("on_diagonal", on.detach()), ("off_diagonal", off.detach())];
        let loss = on.add(&off.scale(self.config.off_diagonal_weight)?)?;
        Ok(LossValue::of(loss).with_parts(parts))
    }

    fn cost(&self, rows: &LossRows) -> LossCost {
        let correlation = (self.config.projector.output as f64).powi(2);
        let of_projector = self.projector.cost(rows.globals, 0.0);
        let forward_flops = of_projector.forward_flops + rows.globals * correlation;
        // As a product, and over the images.
        LossCost { forward_flops, of_batch: 2.0 * correlation, ..of_projector }
    }
}
