//! Classification as a loss: of labels, and of what a pretext task did to an image.

use dinolab_core::contract::{LossValue, Outputs};
use dinolab_core::{DType, Result, Tensor};

/// Mean cross-entropy of logits `[N, K]` and targets `[N, K]`, one-hot rows; with its accuracy as a part. A row of zeros
/// counts with a loss and an accuracy of zero.
pub(crate) fn classify(logits: &Tensor, own: &Tensor) -> Result<LossValue> {
    let n = logits.dim(0);
    let rows: Vec<u32> = (0..n as u32).collect();
    let rows = Tensor::from_slice(&rows, &[n])?;
    let weights = Tensor::full(&[n], logits.dtype(), 1.0 / n as f64)?;
    let loss = logits.soft_cross_entropy(own, &rows, &rows, &weights, 1.0)?;
    let accuracy = accuracy(&logits.detach(), own)?;
    Ok(LossValue::of(loss).with_parts(vec![("accuracy", accuracy)]))
}

/// The share of rows whose own class has the greatest logit. One of k classes that share it, as logits in bf16 often do,
/// counts 1/k.
fn accuracy(logits: &Tensor, own: &Tensor) -> Result<Tensor> {
    // By how much the other logits are above the row's own.
    let of_own = logits.mul(own)?.sum_axis(1)?;
    let above = logits.sub(&Tensor::full(logits.shape(), logits.dtype(), 1.0)?.scale_rows(&of_own)?)?;
    // 1 where a number is 0, and 0 where it is not.
    let none = |x: &Tensor| x.scale(-1e6)?.shift(1.0)?.relu();
    let (more, less) = (above.relu()?, above.neg()?.relu()?);
    let equal = none(&more.add(&less)?)?.sum_axis(1)?;
    // A row without a class shares its logit with none.
    none(&more.sum_axis(1)?)?.mul(&own.sum_axis(1)?)?.div(&equal.clamp_min(1.0)?)?.mean()
}

/// One-hot rows `[N, K]` of labels `[N]`, u32; a row of zeros for K, an image without a label.
pub(crate) fn of_labels(labels: &Tensor, classes: usize, dtype: DType) -> Result<Tensor> {
    let numbers: Vec<f64> = (0..=classes).map(|class| class as f64).collect();
    let numbers = Tensor::from_f64(&numbers, &[classes + 1, 1], dtype)?;
    let own = Tensor::full(&[labels.len(), classes], dtype, 1.0)?.scale_rows(&numbers.gather_rows(labels)?)?;
    let apart = own.add_row(&numbers.narrow(0, classes)?.neg()?.reshape(&[classes])?)?.abs()?;
    apart.neg()?.shift(1.0)?.relu()
}

/// The classes of the crops of a view, drawn for each image: `[B, crops * K]` one-hot numbers, crop by crop, to
/// `[crops * B, K]` rows in the order of the view's features.
pub(crate) fn drawn_classes(out: &Outputs<'_>, classes: usize, dtype: DType) -> Result<Tensor> {
    let drawn = out.image_draws.expect("the loss draws classes").cast(dtype)?;
    let crops = drawn.dim(1) / classes;
    let of_crop = (0..crops).map(|crop| drawn.narrow_axis(1, crop * classes, classes));
    let of_crop: Vec<Tensor> = of_crop.collect::<Result<_>>()?;
    Tensor::cat(&of_crop.iter().collect::<Vec<_>>())
}

/// A one-hot row.
pub(crate) fn one_hot(class: usize, classes: usize) -> impl Iterator<Item = f64> {
    (0..classes).map(move |k| f64::from(u8::from(k == class)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_has_a_one_in_its_row_and_an_image_without_one_has_none() {
        let labels = Tensor::from_slice(&[2u32, 0, 3], &[3]).unwrap();
        for dtype in [DType::F32, DType::F64] {
            let rows = of_labels(&labels, 3, dtype).unwrap().to_f64_vec();
            assert_eq!(rows, [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        }
    }

    #[test]
    fn a_shared_greatest_logit_counts_its_share_and_a_row_without_a_class_nothing() {
        let logits = [[2.0f32, 1.0], [1.0, 2.0], [3.0, 3.0], [5.0, 4.0]];
        let own = [[1.0f32, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]];
        for dtype in [DType::F32, DType::F64] {
            let of =
                |rows: [[f32; 2]; 4]| Tensor::from_slice(rows.as_flattened(), &[4, 2]).unwrap().cast(dtype).unwrap();
            assert_eq!(accuracy(&of(logits), &of(own)).unwrap().to_f64_vec(), [1.5 / 4.0]);
        }
    }
}
