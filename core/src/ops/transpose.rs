//! The last two axes exchanged.

use crate::cuda::args;
use crate::ops::shape::SHAPE;
use crate::tensor::blocks::*;
use crate::tensor::{Element, Grads, Op};
use crate::{dispatch_real, Error, Result, Tensor};

impl Tensor {
    /// `[.., m, n]` to `[.., n, m]`; the gradient is transposed back.
    ///
    /// # Errors
    /// If there are fewer than two axes.
    pub fn transpose(&self) -> Result<Tensor> {
        Transpose.apply(&[self])
    }
}

struct Transpose;

/// Side of the squares that are read and written together.
const TILE: usize = 32;

/// `out` (`n x m`) becomes the transpose of `x` (`m x n`).
fn transpose<T: Element>(out: &mut [T], x: &[T], m: usize, n: usize) {
    out.par_chunks_mut(TILE * m).enumerate().for_each(|(block, out)| {
        for from in (0..m).step_by(TILE) {
            for (j, out) in out.chunks_exact_mut(m).enumerate() {
                let column = block * TILE + j;
                for (i, out) in out[from..].iter_mut().take(TILE).enumerate() {
                    *out = x[(from + i) * n + column];
                }
            }
        }
    });
}

fn transposed(x: &Tensor) -> Result<Tensor> {
    let [leading @ .., m, n] = x.shape() else {
        return Err(Error::shape("transpose", format!("{:?} has no two last axes", x.shape())));
    };
    let shape: Vec<usize> = leading.iter().chain([n, m]).copied().collect();
    let mut out = Tensor::uninit(&shape, x.dtype());
    if x.is_empty() {
        return Ok(out);
    }
    if let Some(gpu) = x.gpu() {
        let grid = (n.div_ceil(TILE), m.div_ceil(TILE), x.len() / (m * n));
        let launch = gpu.kernel(&SHAPE, "transpose", x.dtype())?.grid(grid, 256);
        let bytes = (2 * x.len() * x.dtype().size()) as f64;
        launch.work(0.0, bytes).launch(args![&mut out, x, *m as i32, *n as i32])?;
        return Ok(out);
    }
    dispatch_real!("transpose", x.dtype(), T => {
        let matrices = out.as_mut_slice::<T>().par_chunks_mut(m * n).zip(x.as_slice::<T>().par_chunks(m * n));
        matrices.for_each(|(out, x)| transpose(out, x, *m, *n));
        Ok(out)
    })
}

impl Op for Transpose {
    fn name(&self) -> &'static str {
        "transpose"
    }

    fn cuda(&self) -> bool {
        true
    }

    fn forward(&mut self, inputs: &[&Tensor], _: bool) -> Result<Tensor> {
        transposed(inputs[0])
    }

    fn backward(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        grads.add(0, transposed(&dy)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transposing_exchanges_rows_and_columns_of_every_matrix() {
        let (m, n) = (35, 67);
        let x: Vec<f32> = (0..2 * m * n).map(|i| i as f32).collect();
        let x = Tensor::from_slice(&x, &[2, m, n]).unwrap();
        let y = x.transpose().unwrap();
        assert_eq!(y.shape(), [2, n, m]);
        let (a, b) = (x.as_slice::<f32>(), y.as_slice::<f32>());
        for (batch, i, j) in (0..2).flat_map(|b| (0..m).flat_map(move |i| (0..n).map(move |j| (b, i, j)))) {
            assert_eq!(a[(batch * m + i) * n + j], b[(batch * n + j) * m + i]);
        }
        assert_eq!(y.transpose().unwrap().as_slice::<f32>(), a);
    }
}
