//! The KoLeo regulariser: class tokens keep their distance from their nearest neighbour.

use dinolab_core::contract::{Loss, LossContext, LossValue, Needs, Outputs, StepContext};
use dinolab_core::ops::neighbour_group;
use dinolab_core::params::Params;
use dinolab_core::{plugin, Error, Result, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

plugin!(Loss, "koleo", KoLeo, KoLeo::build);

/// Kozachenko-Leonenko entropy: `-mean log |x_i - x_nn(i)|` over L2-normalised class tokens.
///
/// Computed for each global crop apart and summed over them, as the reference does in effect; the gradient reaches the
/// neighbour too (Sablayrolles et al., arXiv:1806.03198).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct KoLeo {
    /// Nearest neighbours to keep away from.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub topk: usize,
    /// Look for neighbours inside consecutive groups of this many images; 0: in the whole micro-batch.
    #[schemars(range(max = 1_000_000_000))]
    pub group_size: usize,
}

impl Default for KoLeo {
    fn default() -> Self {
        Self { topk: 1, group_size: 0 }
    }
}

impl KoLeo {
    fn build(self, context: &mut LossContext<'_>) -> Result<Box<dyn Loss>> {
        // Too few images are what `needs` says.
        if context.images > self.topk {
            neighbour_group(context.images, self.topk, self.group()).map_err(|problem| {
                let help =
                    "rows are the images of a micro-batch: change batch.size, batch.micro_batches, topk or group_size";
                Error::user(format!("loss `koleo`: {problem}"), help)
            })?;
        }
        Ok(Box::new(self))
    }

    fn group(&self) -> Option<usize> {
        (self.group_size > 0).then_some(self.group_size)
    }
}

impl Loss for KoLeo {
    fn needs(&self) -> Needs {
        Needs { locals: false, teacher: false, min_batch: self.topk + 1, ..Needs::default() }
    }

    fn compute(&self, _: &Params<'_>, out: &Outputs<'_>, _: &StepContext<'_>) -> Result<LossValue> {
        let of_crop = |crop: usize| -> Result<Tensor> {
            let own = out.student.cls.narrow(crop * out.images, out.images)?;
            own.neighbour_distance(self.topk, self.group())?.mean()
        };
        let mut loss = of_crop(0)?;
        for crop in 1..out.globals {
            loss = loss.add(&of_crop(crop)?)?;
        }
        let per_crop = loss.detach().scale(1.0 / out.globals as f64)?;
        Ok(LossValue::of(loss).with_parts(vec![("per_crop", per_crop)]))
    }
}
