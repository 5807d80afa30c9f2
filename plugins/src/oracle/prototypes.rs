//! DINO and iBOT: cross-entropies between assignments to prototypes, over weighted pairs of rows.

use dfdx::prelude::{Axis, SumTo as _, Trace as _};
use dinolab_core::contract::StepContext;
use dinolab_core::dfdx_loss::{constant, DfdxLoss, DfdxOutputs, Scalar};
use dinolab_core::{dfdx, loss_oracle, Result};

use crate::dino::Dino;
use crate::ibot::Ibot;

loss_oracle!("dino", Dino);
loss_oracle!("ibot", Ibot);

/// `sum of weight * CE(target row, student row)` over `(student row, target row, weight)`.
fn cross_entropy(out: &DfdxOutputs<'_>, pairs: &[(usize, usize, f64)], temperature: f64) -> Scalar {
    let logits = out.student_logits.as_ref().expect("the loss has a head");
    let (rows, k) = *dfdx::prelude::HasShape::shape(logits);
    let targets = out.targets.as_ref().expect("the loss has a head").as_vec();
    let mixed = |row: usize, column: usize| {
        let own = pairs.iter().filter(|(student, ..)| *student == row);
        own.map(|(_, target, weight)| weight * targets[target * k + column]).sum()
    };
    let log_probs = (logits.leaky_trace() / temperature).log_softmax::<Axis<1>>();
    -(log_probs * constant(rows, k, mixed)).sum::<(), _>()
}

impl DfdxLoss for Dino {
    fn loss(&self, out: &DfdxOutputs<'_>, context: &StepContext<'_>) -> Result<Scalar> {
        let (g, l, b) = (out.step.globals, out.step.locals, out.step.images);
        let diagonal = if self.ignore_diagonal { g } else { 0 };
        // Of each pair of crops the mean over images; all terms share one denominator, the local ones have a weight.
        let terms = (g * g - diagonal + g * l) as f64;
        let local_weight = self.local_weight.at(context.at);
        let mut pairs = Vec::new();
        for (student, teacher) in (0..g + l).flat_map(|s| (0..g).map(move |t| (s, t))) {
            if self.ignore_diagonal && student == teacher {
                continue;
            }
            let weight = if student < g { 1.0 } else { local_weight } / (terms * b as f64);
            pairs.extend((0..b).map(|image| (student * b + image, teacher * b + image, weight)));
        }
        Ok(cross_entropy(out, &pairs, self.student_temp))
    }
}

impl DfdxLoss for Ibot {
    fn loss(&self, out: &DfdxOutputs<'_>, _: &StepContext<'_>) -> Result<Scalar> {
        let crops = (out.step.globals * out.step.images) as f64;
        let patches = out.step.grid.patches();
        let masked: Vec<usize> = out.step.mask_indices.as_slice::<u32>().iter().map(|&i| i as usize).collect();
        let in_crop = |crop: usize| masked.iter().filter(|&&i| i / patches == crop).count() as f64;
        let pairs: Vec<_> =
            masked.iter().enumerate().map(|(row, i)| (row, row, 1.0 / (in_crop(i / patches) * crops))).collect();
        Ok(cross_entropy(out, &pairs, self.student_temp))
    }
}
