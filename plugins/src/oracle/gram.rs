//! Gram anchoring: `|X_S X_S^T - X_G X_G^T|^2`, image by image or over chosen patches of the batch.

use dfdx::prelude::{Axes2, PermuteTo as _, SumTo as _, Trace as _, TryMatMul as _};
use dinolab_core::contract::StepContext;
use dinolab_core::dfdx_loss::{picking, unit_rows, DfdxLoss, DfdxOutputs, Matrix, Scalar, Taped};
use dinolab_core::{dfdx, loss_oracle, Result};

use crate::gram::{Gram, RemoveNegative, Tokens};

loss_oracle!("gram", Gram);

impl DfdxLoss for Gram {
    fn loss(&self, out: &DfdxOutputs<'_>, _: &StepContext<'_>) -> Result<Scalar> {
        let (patches, crops) = (out.step.grid.patches(), out.step.globals * out.step.images);
        let rows = |indices: &dinolab_core::Tensor| indices.as_slice::<u32>().iter().map(|&i| i as usize).collect();
        // The groups of patches that are compared among themselves.
        let groups: Vec<Vec<usize>> = match (self.tokens, self.image_level) {
            (Tokens::All, true) => (0..crops).map(|c| (c * patches..(c + 1) * patches).collect()).collect(),
            (Tokens::All, false) => vec![(0..crops * patches).collect()],
            (Tokens::Masked, _) => vec![rows(out.step.student.mask_indices)],
            (Tokens::Unmasked, _) => vec![rows(out.step.unmasked_indices)],
        };
        let teacher = &out.more[&format!("teachers.{}.patches", self.teacher)];
        let entries: usize = groups.iter().map(|g| g.len() * g.len()).sum();
        let mut loss: Option<Scalar> = None;
        for group in groups.iter().filter(|g| !g.is_empty()) {
            let features = |x: &Matrix| {
                let rows = picking(group, crops * patches).matmul(x.leaky_trace());
                if self.normalize {
                    unit_rows(rows)
                } else {
                    rows
                }
            };
            let similarities = |x: &Matrix, remove: bool| -> Taped {
                // dfdx does not multiply a tensor with itself, so the factors are made one by one.
                let similarity = features(x).matmul(features(x).permute::<(usize, usize), Axes2<1, 0>>());
                if remove {
                    similarity.relu()
                } else {
                    similarity
                }
            };
            let difference = similarities(&out.student_patches, self.remove_negative == RemoveNegative::Both)
                - similarities(teacher, self.remove_negative != RemoveNegative::None);
            let squares = difference.square().sum::<(), _>();
            loss = Some(match loss {
                None => squares,
                Some(loss) => loss + squares,
            });
        }
        // No patch is chosen: no loss.
        let loss = loss.unwrap_or_else(|| (out.student_patches.leaky_trace() * 0.0).sum());
        Ok(loss / entries.max(1) as f64)
    }
}
