//! Inpainting: the pixels of masked patches from what the student makes of the rest.

use dinolab_core::contract::{Loss, LossContext, LossCost, LossRows, LossValue, Needs, Outputs, StepContext};
use dinolab_core::nn::Linear;
use dinolab_core::params::{ParamRole, Params};
use dinolab_core::{plugin, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

plugin!(Loss, "inpainting", Inpainting, InpaintingLoss::build);

/// Mean absolute difference between the pixels of masked patches and a linear map of the student's features there. There
/// is no teacher.
///
/// With masked patches i of M, pixels x_i and features h_i, `loss = 1 / (C p^2 M) sum_i |W h_i + b - x_i|_1` for patches of p
/// pixels a side and C channels (Xie et al., "SimMIM", arXiv:2111.09886, section 3; the idea of Pathak et al., arXiv:1604.07379). Pixels are
/// normalised by channel as the model sees them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Inpainting {}

#[derive(Debug)]
struct InpaintingLoss {
    decoder: Linear,
    patch: usize,
}

impl InpaintingLoss {
    fn build(_: Inpainting, context: &mut LossContext<'_>) -> Result<Box<dyn Loss>> {
        let (dim, patch, channels) = (context.dim, context.patch_size, context.channels);
        let decoder = context.params.role(ParamRole::Output, |p| {
            p.scope("decoder", |p| Linear::declare(p, dim, channels * patch * patch, true))
        });
        Ok(Box::new(Self { decoder, patch }))
    }
}

impl Loss for InpaintingLoss {
    fn needs(&self) -> Needs {
        Needs { locals: false, teacher: false, masks: true, pixels: true, min_batch: 1, ..Needs::default() }
    }

    fn compute(&self, params: &Params<'_>, out: &Outputs<'_>, context: &StepContext<'_>) -> Result<LossValue> {
        let predicted = self.decoder.forward(params, &out.student.masked_patches()?)?.cast(context.dtype)?;
        let pixels = out.pixels.expect("`needs` asks for pixels").patchify(self.patch)?;
        let rows = pixels.reshape(&[pixels.len() / predicted.last_dim(), predicted.last_dim()])?;
        let rows = rows.gather_rows(out.student.mask_indices)?.cast(context.dtype)?;
        let masked = if out.mask_share > 0.0 { out.mask_share } else { 1.0 };
        let numbers = masked * predicted.last_dim() as f64;
        predicted.sub(&rows)?.abs()?.sum()?.scale(1.0 / numbers).map(LossValue::of)
    }

    fn cost(&self, rows: &LossRows) -> LossCost {
        let (from, to) = (self.decoder.from as f64, self.decoder.to as f64);
        let outputs = rows.masked * to;
        let forward_flops = 2.0 * rows.masked * self.decoder.parameters();
        let activations = rows.masked * from + 2.0 * outputs + rows.patches * to;
        LossCost { forward_flops, activations, outputs, ..LossCost::default() }
    }
}
