//! VICReg: two crops agree, every dimension varies, and no two dimensions say the same.

use dinolab_core::contract::{Loss, LossContext, LossCost, LossRows, LossValue, Needs, Outputs, StepContext};
use dinolab_core::params::Params;
use dinolab_core::{plugin, Result, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::projector::{Projector, ProjectorConfig};

plugin!(Loss, "vicreg", VicReg, VicRegLoss::build);

/// Variance, invariance and covariance of the projections of two global crops. There is no teacher.
///
/// With projections z of crop 0 and z' of crop 1, `[N, D]`, and their covariance matrices C and C' (unbiased):
///
/// ```text
/// invariance = mean over N and D of (z - z')^2
/// variance   = 1/2 [mean_j max(0, 1 - sqrt(C_jj + 1e-4)) + the same of C']
/// covariance = 1/D [sum_(i != j) C_ij^2 + the same of C']
/// loss       = invariance_weight invariance + variance_weight variance + covariance_weight covariance
/// ```
///
/// (Bardes et al., arXiv:2105.04906, section 4.1, with the scaling of the authors' code, which halves the variance and takes
/// the mean over D in the invariance).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct VicReg {
    /// The projector (the paper's expander).
    pub projector: ProjectorConfig,
    /// Weight of the invariance.
    #[schemars(range(min = 0, max = 1_000_000))]
    pub invariance_weight: f64,
    /// Weight of the variance.
    #[schemars(range(min = 0, max = 1_000_000))]
    pub variance_weight: f64,
    /// Weight of the covariance.
    #[schemars(range(min = 0, max = 1_000_000))]
    pub covariance_weight: f64,
}

impl Default for VicReg {
    fn default() -> Self {
        Self {
            projector: ProjectorConfig { hidden: 2048, output: 2048, layers: 3 },
            invariance_weight: 25.0,
            variance_weight: 25.0,
            covariance_weight: 1.0,
        }
    }
}

#[derive(Debug)]
struct VicRegLoss {
    config: VicReg,
    projector: Projector,
}

impl VicRegLoss {
    fn build(config: VicReg, context: &mut LossContext<'_>) -> Result<Box<dyn Loss>> {
        let projector = Projector::declare(context.params, "projector", context.dim, &config.projector);
        Ok(Box::new(Self { config, projector }))
    }
}

/// What keeps the root's derivative finite.
const EPS: f64 = 1e-4;

/// The variance and covariance terms of one crop, `[N, D]`.
fn spread(z: &Tensor) -> Result<(Tensor, Tensor)> {
    let (n, d) = (z.dim(0) as f64, z.dim(1) as f64);
    let centred = z.add_row(&z.mean_axis(0)?.neg()?)?;
    let columns = centred.transpose()?;
    let covariance = columns.matmul_t(&columns)?.scale(1.0 / (n - 1.0))?;
    let variances = centred.square()?.sum_axis(0)?.scale(1.0 / (n - 1.0))?;
    let hinge = variances.shift(EPS)?.sqrt()?.neg()?.shift(1.0)?.relu()?.mean()?;
    let off_diagonal = covariance.square()?.sum()?.sub(&variances.square()?.sum()?)?;
    Ok((hinge, off_diagonal.scale(1.0 / d)?))
}

impl Loss for VicRegLoss {
    fn needs(&self) -> Needs {
        Needs { locals: false, teacher: false, whole_batch: true, min_batch: 2, ..Needs::default() }
    }

    fn compute(&self, params: &Params<'_>, out: &Outputs<'_>, context: &StepContext<'_>) -> Result<LossValue> {
        let z = self.projector.forward(params, out.student.cls)?.cast(context.dtype)?;
        let (one, two) = (z.narrow(0, out.images)?, z.narrow(out.images, out.images)?);
        let invariance = one.sub(&two)?.square()?.mean()?;
        let ((hinge_one, covariance_one), (hinge_two, covariance_two)) = (spread(&one)?, spread(&two)?);
        let variance = hinge_one.add(&hinge_two)?.scale(0.5)?;
        let covariance = covariance_one.add(&covariance_two)?;
        let parts = vec![
            ("invariance", invariance.detach()),
            ("variance", variance.detach()),
            ("covariance", covariance.detach()),
        ];
        let loss = invariance.scale(self.config.invariance_weight)?;
        let loss = loss.add(&variance.scale(self.config.variance_weight)?)?;
        let loss = loss.add(&covariance.scale(self.config.covariance_weight)?)?;
        Ok(LossValue::of(loss).with_parts(parts))
    }

    fn cost(&self, rows: &LossRows) -> LossCost {
        let covariance = (self.config.projector.output as f64).powi(2);
        let of_projector = self.projector.cost(rows.globals, 0.0);
        let forward_flops = of_projector.forward_flops + 2.0 * rows.globals * covariance;
        // Each crop's as a product and over the images: four, of which two have a gradient at a time.
        LossCost { forward_flops, of_batch: 3.0 * covariance, ..of_projector }
    }
}
