//! DINO and iBOT: cross-entropies between assignments to prototypes, over weighted pairs of rows.

use dfdx::prelude::{Axis, SumTo as _, Trace as _, TryMatMul as _};
use dinolab_core::contract::StepContext;
use dinolab_core::dfdx_loss::{constant, gelu, linear, picking, unit_rows, DfdxLoss, DfdxOutputs, Scalar, Taped};
use dinolab_core::{dfdx, loss_oracle, Result};

use crate::dino::Dino;
use crate::ibot::Ibot;

loss_oracle!("dino", Dino);
loss_oracle!("ibot", Ibot);

/// Logits of a projection head, from its parameters: linear layers with GELU between them, rows of length 1, prototypes.
fn logits(rows: Taped, out: &DfdxOutputs<'_>) -> Taped {
    let layers = out.params.keys().filter(|name| name.starts_with("mlp.") && name.ends_with("weight"));
    let mut layers: Vec<&str> = layers.map(|name| name.trim_end_matches("weight")).collect();
    layers.sort_by_key(|layer| layer.trim_matches(|c: char| !c.is_ascii_digit()).parse::<usize>().unwrap_or(0));
    let mut x = rows;
    for (i, layer) in layers.into_iter().enumerate() {
        x = linear(if i == 0 { x } else { gelu(x) }, &out.params, layer);
    }
    linear(unit_rows(x), &out.params, "last_layer.")
}

/// `sum of weight * CE(target row, student row)` over `(student row, target row, weight)`.
fn cross_entropy(logits: Taped, out: &DfdxOutputs<'_>, pairs: &[(usize, usize, f64)], temperature: f64) -> Scalar {
    let (rows, k) = *dfdx::prelude::HasShape::shape(&logits);
    let targets = out.targets.as_ref().expect("the loss has targets").as_vec();
    let mixed = |row: usize, column: usize| {
        let own = pairs.iter().filter(|(student, ..)| *student == row);
        own.map(|(_, target, weight)| weight * targets[target * k + column]).sum()
    };
    let log_probs = (logits / temperature).log_softmax::<Axis<1>>();
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
        let globals: Vec<usize> = (0..g * b).collect();
        let mut rows = picking_into(&globals, (g + l) * b, 0).matmul(out.student_cls.leaky_trace());
        if let Some(local) = &out.student_local_cls {
            let locals: Vec<usize> = (0..l * b).collect();
            rows = rows + picking_into(&locals, (g + l) * b, g * b).matmul(local.leaky_trace());
        }
        Ok(cross_entropy(logits(rows, out), out, &pairs, self.student_temp))
    }
}

/// The matrix that puts `rows` into a matrix of `n` rows, from row `first` on.
fn picking_into(rows: &[usize], n: usize, first: usize) -> Taped {
    constant(n, rows.len(), |i, j| f64::from(u8::from(i == first + j)))
}

impl DfdxLoss for Ibot {
    fn loss(&self, out: &DfdxOutputs<'_>, _: &StepContext<'_>) -> Result<Scalar> {
        let crops = (out.step.globals * out.step.images) as f64;
        let patches = out.step.grid.patches();
        let masked: Vec<usize> = out.step.student.mask_indices.as_slice::<u32>().iter().map(|&i| i as usize).collect();
        let in_crop = |crop: usize| masked.iter().filter(|&&i| i / patches == crop).count() as f64;
        let pairs: Vec<_> =
            masked.iter().enumerate().map(|(row, i)| (row, row, 1.0 / (in_crop(i / patches) * crops))).collect();
        let rows =
            picking(&masked, out.step.globals * out.step.images * patches).matmul(out.student_patches.leaky_trace());
        Ok(cross_entropy(logits(rows, out), out, &pairs, self.student_temp))
    }
}
