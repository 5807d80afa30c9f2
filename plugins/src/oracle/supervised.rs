//! The losses whose targets are of the batch itself: labels and pixels.

use dfdx::prelude::{Axis, HasShape as _, SumTo as _, Trace as _, TryMatMul as _};
use dinolab_core::contract::StepContext;
use dinolab_core::dfdx_loss::{constant, linear, picking, DfdxLoss, DfdxOutputs, Scalar};
use dinolab_core::{dfdx, loss_oracle, Result};

use crate::inpainting::Inpainting;
use crate::online_linear::OnlineLinear;

loss_oracle!("online_linear", OnlineLinear);
loss_oracle!("inpainting", Inpainting);

impl DfdxLoss for OnlineLinear {
    fn loss(&self, out: &DfdxOutputs<'_>, _: &StepContext<'_>) -> Result<Scalar> {
        let values = out.student_cls.as_vec();
        let (n, d) = *out.student_cls.shape();
        let logits = linear(constant(n, d, |i, j| values[i * d + j]), &out.params, "classifier.");
        let labels = out.step.labels.expect("the loss needs labels").as_slice::<u32>();
        let own = constant(n, self.classes, |i, j| f64::from(u8::from(labels[i % out.step.images] as usize == j)));
        Ok(-(logits.log_softmax::<Axis<1>>() * own).sum::<(), _>() / n as f64)
    }

    fn stops_gradients(&self) -> bool {
        true
    }
}

impl DfdxLoss for Inpainting {
    fn loss(&self, out: &DfdxOutputs<'_>, _: &StepContext<'_>) -> Result<Scalar> {
        let pixels = out.step.pixels.expect("the loss needs pixels");
        let grid = out.step.grid;
        let (height, width) = (pixels.dim(2), pixels.dim(3));
        let (patch, values) = (height / grid.height, pixels.to_f64_vec());
        let masked: Vec<usize> = out.step.student.mask_indices.as_slice::<u32>().iter().map(|&i| i as usize).collect();
        let rows = picking(&masked, out.student_patches.shape().0).matmul(out.student_patches.leaky_trace());
        let predicted = linear(rows, &out.params, "decoder.");
        let (n, columns) = *predicted.shape();
        // A patch is channel by channel, row by row.
        let truth = constant(n, columns, |row, column| {
            let (crop, place) = (masked[row] / grid.patches(), masked[row] % grid.patches());
            let (channel, y, x) = (column / (patch * patch), column / patch % patch, column % patch);
            let (y, x) = (place / grid.width * patch + y, place % grid.width * patch + x);
            values[((crop * 3 + channel) * height + y) * width + x]
        });
        Ok((predicted - truth).abs().sum::<(), _>() / (n * columns) as f64)
    }
}
