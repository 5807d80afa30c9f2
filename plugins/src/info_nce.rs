//! InfoNCE as SimCLR uses it: the other crop of the same image is found among all crops of the batch.

use dinolab_core::contract::{Loss, LossContext, LossCost, LossRows, LossValue, Needs, Outputs, StepContext};
use dinolab_core::params::Params;
use dinolab_core::{plugin, Result, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::projector::{Projector, ProjectorConfig};

plugin!(Loss, "info_nce", InfoNce, InfoNceLoss::build);

/// Contrastive loss between the projections of two global crops (NT-Xent). There is no teacher.
///
/// With projections z of length 1 of all 2 N crops, and p(i) the other crop of the same image:
///
/// ```text
/// loss = -mean_i log [exp(z_i.z_p(i) / temperature) / sum_(k != i) exp(z_i.z_k / temperature)]
/// ```
///
/// (Chen et al., arXiv:2002.05709, equation 1; van den Oord et al., arXiv:1807.03748).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct InfoNce {
    /// The projector.
    pub projector: ProjectorConfig,
    /// Temperature of the softmax.
    #[schemars(range(min = 0.001, max = 100))]
    pub temperature: f64,
}

impl Default for InfoNce {
    fn default() -> Self {
        Self { projector: ProjectorConfig { hidden: 2048, output: 128, layers: 2 }, temperature: 0.1 }
    }
}

#[derive(Debug)]
struct InfoNceLoss {
    config: InfoNce,
    projector: Projector,
    /// Of a batch.
    images: usize,
}

impl InfoNceLoss {
    fn build(config: InfoNce, context: &mut LossContext<'_>) -> Result<Box<dyn Loss>> {
        let projector = Projector::declare(context.params, "projector", context.dim, &config.projector);
        Ok(Box::new(Self { config, projector, images: context.images }))
    }
}

impl Loss for InfoNceLoss {
    fn needs(&self) -> Needs {
        Needs { locals: false, teacher: false, whole_batch: true, min_batch: 2, ..Needs::default() }
    }

    fn compute(&self, params: &Params<'_>, out: &Outputs<'_>, context: &StepContext<'_>) -> Result<LossValue> {
        let z = self.projector.forward(params, out.student.cls)?.cast(context.dtype)?.l2_normalize(1e-12)?;
        let (b, n) = (out.images, z.dim(0));
        let matrix = |f: &dyn Fn(usize, usize) -> f64| {
            let values: Vec<f64> = (0..n * n).map(|i| f(i / n, i % n)).collect();
            Tensor::from_f64(&values, &[n, n], context.dtype)
        };
        // A crop's similarity to itself becomes less than any other by 60 temperatures: its part in a sum is below 1e-26.
        let none = -2.0 - 60.0 * self.config.temperature;
        let itself = matrix(&|i, j| if i == j { none } else { 0.0 })?;
        let partner = matrix(&|i, j| f64::from(u8::from(j == (i + b) % n)))?;
        let rows: Vec<u32> = (0..n as u32).collect();
        let rows = Tensor::from_slice(&rows, &[n])?;
        let weights = Tensor::full(&[n], context.dtype, 1.0 / n as f64)?;
        let logits = z.matmul_t(&z)?.add(&itself)?;
        logits.soft_cross_entropy(&partner, &rows, &rows, &weights, self.config.temperature).map(LossValue::of)
    }

    fn cost(&self, rows: &LossRows) -> LossCost {
        let (all, output) = (rows.globals * self.images as f64, self.config.projector.output as f64);
        let of_projector = self.projector.cost(rows.globals, 0.0);
        let forward_flops = of_projector.forward_flops + 2.0 * rows.globals * all * output;
        // Similarities, and who is whose partner.
        LossCost { forward_flops, of_batch: 2.0 * all.powi(2), ..of_projector }
    }
}
