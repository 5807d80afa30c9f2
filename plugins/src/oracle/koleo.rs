//! KoLeo: `-log |x_i - x_nn(i)|` of every class token, summed over the global crops.

use dfdx::prelude::{Axis, MeanTo as _, SumTo as _, Trace as _, TryMatMul as _, WithEmptyTape as _};
use dinolab_core::contract::StepContext;
use dinolab_core::dfdx_loss::{picking, unit_rows, DfdxLoss, DfdxOutputs, Scalar};
use dinolab_core::proptest::prelude::*;
use dinolab_core::{dfdx, loss_oracle, serde_json::json, Result};

use crate::koleo::KoLeo;

loss_oracle!("koleo", KoLeo, || (1usize..4).prop_map(|topk| json!({ "topk": topk })).boxed());

impl DfdxLoss for KoLeo {
    fn loss(&self, out: &DfdxOutputs<'_>, _: &StepContext<'_>) -> Result<Scalar> {
        let (images, all) = (out.step.images, out.step.images * out.step.globals);
        let group = if self.group_size > 0 { self.group_size } else { images };
        let values = unit_rows(out.student_cls.leaky_trace()).as_vec();
        let d = values.len() / all;
        let cosine = |i: usize, j: usize| (0..d).map(|c| values[i * d + c] * values[j * d + c]).sum::<f64>();
        let mut loss: Option<Scalar> = None;
        for crop in 0..out.step.globals {
            let own: Vec<usize> = (crop * images..(crop + 1) * images).collect();
            let mates: Vec<usize> = own
                .iter()
                .flat_map(|&i| {
                    let first = crop * images + (i - crop * images) / group * group;
                    let mut others: Vec<usize> = (first..first + group).filter(|&j| j != i).collect();
                    others.sort_by(|&a, &b| cosine(i, b).total_cmp(&cosine(i, a)));
                    others.truncate(self.topk);
                    others
                })
                .collect();
            let repeated: Vec<usize> = own.iter().flat_map(|&i| vec![i; self.topk]).collect();
            let unit = unit_rows(out.student_cls.leaky_trace());
            let mates = picking(&mates, all).matmul(unit.with_empty_tape());
            let difference = picking(&repeated, all).matmul(unit) - mates + 1e-8;
            let distance = difference.square().sum::<(usize,), Axis<1>>().sqrt();
            let of_crop = -(distance + 1e-8).ln().mean::<(), _>();
            loss = Some(match loss {
                None => of_crop,
                Some(loss) => loss + of_crop,
            });
        }
        Ok(loss.expect("there is a global crop"))
    }
}
