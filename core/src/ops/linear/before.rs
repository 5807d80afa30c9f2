//! What the input of a linear layer goes through first, and how that is undone.

use super::LINEAR;
use crate::cuda::args;
use crate::ops::elementwise::{gelu, gelu_and_slope, sigmoid, unary_on_gpu};
use crate::ops::layer_norm::{Norm, Normed};
use crate::ops::swiglu::swiglu_on_gpu;
use crate::tensor::blocks::*;
use crate::tensor::columns::{Partial, RowSums};
use crate::tensor::{Grads, Real, Slot};
use crate::{dispatch_real, simd, Error, Result, Tensor};

/// f of `f(x) W^T + b`; `T` is an operand beside x: a tensor, or its number among the inputs.
#[derive(Clone, Copy)]
pub(super) enum Before<T> {
    Nothing,
    Norm { norm: Norm, weight: T, bias: Option<T> },
    Gelu,
    Swiglu { up: T },
}

impl<T: Copy> Before<T> {
    pub(super) fn norm(centred: bool, weight: T, bias: Option<T>, eps: f64) -> Self {
        Self::Norm { norm: Norm { centred, eps }, weight, bias }
    }

    pub(super) fn map<U>(self, mut f: impl FnMut(T) -> U) -> Before<U> {
        match self {
            Self::Nothing => Before::Nothing,
            Self::Norm { norm, weight, bias } => Before::Norm { norm, weight: f(weight), bias: bias.map(f) },
            Self::Gelu => Before::Gelu,
            Self::Swiglu { up } => Before::Swiglu { up: f(up) },
        }
    }

    /// Whether two numbers of every row are kept.
    pub(super) fn has_stats(self) -> bool {
        matches!(self, Self::Norm { .. })
    }
}

/// What is kept of the input for the backward pass: x, and what f needs to be computed again.
pub(super) enum Kept {
    Input(Tensor),
    Normed(Normed),
    Gelu(Tensor),
    Swiglu { gate: Tensor, up: Tensor },
}

/// Rows a task handles.
const ROWS: usize = 64;

impl Before<&Tensor> {
    pub(super) fn check(self, x: &Tensor) -> Result<()> {
        match self {
            Self::Norm { norm, weight, bias } => norm.check(x, weight, bias),
            Self::Swiglu { up } if up.shape() != x.shape() => {
                Err(Error::shape("linear", format!("gate {:?}, up {:?}", x.shape(), up.shape())))
            }
            _ => Ok(()),
        }
    }

    /// `f(x)` on a GPU, and what is kept if `save`.
    pub(super) fn on_gpu(self, x: &Tensor, save: bool) -> Result<(Tensor, Option<Kept>)> {
        let f = match self {
            Self::Nothing => x.detach(),
            Self::Norm { norm, weight, bias } => {
                let (f, normed) = norm.on_gpu(x, weight, bias, save)?;
                return Ok((f, normed.map(Kept::Normed)));
            }
            Self::Gelu => unary_on_gpu("unary_gelu", x)?,
            Self::Swiglu { up } => swiglu_on_gpu(x, up)?,
        };
        // There are no statistics but a norm's.
        Ok((f, save.then(|| self.keep(x, Tensor::uninit(&[0], x.dtype())))))
    }

    /// `f(x)` of some rows on the CPU, of which the first is row `first` of all; `stats` gets a norm's.
    pub(super) fn rows<T: Real>(self, f: &mut [T], x: &[T], first: usize, stats: &mut [T]) {
        match self {
            Self::Nothing => f.copy_from_slice(x),
            Self::Norm { norm, weight, bias } => {
                let (weight, bias) = (weight.as_slice(), bias.map(|b| b.as_slice()));
                simd!(T, norm.rows(f, x, stats, weight, bias));
            }
            Self::Gelu => simd!(
                T,
                for (f, &x) in f.iter_mut().zip(x) {
                    *f = gelu(x)
                }
            ),
            Self::Swiglu { up } => {
                let up = &up.as_slice::<T>()[first * up.last_dim()..];
                simd!(
                    T,
                    for ((f, &gate), &up) in f.iter_mut().zip(x).zip(up) {
                        *f = gate * sigmoid(gate) * up
                    }
                );
            }
        }
    }

    pub(super) fn keep(self, x: &Tensor, stats: Tensor) -> Kept {
        match self {
            Self::Nothing => Kept::Input(x.detach()),
            Self::Norm { norm, weight, bias } => Kept::Normed(norm.keep(x, weight, bias, stats)),
            Self::Gelu => Kept::Gelu(x.detach()),
            Self::Swiglu { up } => Kept::Swiglu { gate: x.detach(), up: up.detach() },
        }
    }
}

impl Kept {
    /// From `df` `[rows, I]` the gradients of x and of the operands of f; `f(x)` again.
    pub(super) fn backward(self, mut df: Tensor, grads: &mut Grads<'_>, inputs: &Before<usize>) -> Result<Tensor> {
        match (self, *inputs) {
            (Self::Normed(normed), Before::Norm { weight, bias, .. }) => {
                let again = normed.backward(&df, grads, (0, weight, bias), true)?;
                Ok(again.expect("asked for"))
            }
            (Self::Gelu(x), _) => {
                let (f, sums) = undo_gelu(&x, &mut df)?;
                grads.add_slot(0, Slot { grad: df, row_sums: Some(sums) })?;
                Ok(f)
            }
            (Self::Swiglu { gate, up }, Before::Swiglu { up: up_input }) => {
                let (f, dgate, [gate_sums, up_sums]) = undo_swiglu(&gate, &up, &mut df)?;
                grads.add_slot(0, Slot { grad: dgate, row_sums: Some(gate_sums) })?;
                grads.add_slot(up_input, Slot { grad: df, row_sums: Some(up_sums) })?;
                Ok(f)
            }
            // An input that goes in as it is has no more to undo.
            _ => unreachable!("kept by the same operation, with something before it"),
        }
    }
}

/// `df` becomes dx; `gelu(x)`, and the sums of the rows of dx.
fn undo_gelu(x: &Tensor, df: &mut Tensor) -> Result<(Tensor, RowSums)> {
    let (rows, d) = (df.dim(0), df.dim(1));
    let mut f = Tensor::uninit(df.shape(), df.dtype());
    if let Some(gpu) = x.gpu() {
        let mut sums = Partial::new(rows, 1, d);
        let launch = sums.launch(gpu.kernel(&LINEAR, "undo_gelu", x.dtype())?, x.dtype());
        let launch = launch.work(0.0, (4 * x.len() * x.dtype().size()) as f64);
        launch.launch(args![sums.buffer(), df, &mut f, x, rows as i32, d as i32])?;
        return Ok((f, sums.sum(0)));
    }
    let mut sums = Tensor::uninit(&[rows.div_ceil(ROWS), d], x.dtype());
    dispatch_real!("linear", x.dtype(), T => {
        let outputs = df.as_mut_slice::<T>().par_chunks_mut(ROWS * d).zip(f.as_mut_slice::<T>().par_chunks_mut(ROWS * d));
        let blocks = outputs.zip(x.as_slice::<T>().par_chunks(ROWS * d)).zip(sums.as_mut_slice::<T>().par_chunks_mut(d));
        blocks.for_each(|(((df, f), x), sums)| simd!(T, {
            sums.fill(T::ZERO);
            for ((df, f), x) in df.chunks_exact_mut(d).zip(f.chunks_exact_mut(d)).zip(x.chunks_exact(d)) {
                for (((df, f), &x), sum) in df.iter_mut().zip(f).zip(x).zip(sums.iter_mut()) {
                    let (y, slope) = gelu_and_slope(x);
                    *f = y;
                    *df *= slope;
                    *sum += *df;
                }
            }
        }));
        Ok(())
    })?;
    Ok((f, RowSums::of_blocks(sums)))
}

/// `df` becomes dup; `silu(gate) up`, dgate, and the sums of the rows of dgate and dup.
fn undo_swiglu(gate: &Tensor, up: &Tensor, df: &mut Tensor) -> Result<(Tensor, Tensor, [RowSums; 2])> {
    let (rows, d) = (df.dim(0), df.dim(1));
    let [mut f, mut dgate] = [(); 2].map(|()| Tensor::uninit(df.shape(), df.dtype()));
    if let Some(gpu) = gate.gpu() {
        let mut sums = Partial::new(rows, 2, d);
        let launch = sums.launch(gpu.kernel(&LINEAR, "undo_swiglu", gate.dtype())?, gate.dtype());
        let launch = launch.work(0.0, (6 * gate.len() * gate.dtype().size()) as f64);
        launch.launch(args![sums.buffer(), &mut dgate, df, &mut f, gate, up, rows as i32, d as i32])?;
        return Ok((f, dgate, [sums.sum(0), sums.sum(1)]));
    }
    let mut sums = [(); 2].map(|()| Tensor::uninit(&[rows.div_ceil(ROWS), d], gate.dtype()));
    dispatch_real!("linear", gate.dtype(), T => {
        let [gate_sums, up_sums] = sums.each_mut().map(|s| s.as_mut_slice::<T>().par_chunks_mut(d));
        let [df, f, dgate] = [df, &mut f, &mut dgate].map(|t| t.as_mut_slice::<T>().par_chunks_mut(ROWS * d));
        let [gate, up] = [gate, up].map(|t| t.as_slice::<T>().par_chunks(ROWS * d));
        let blocks = df.zip(f).zip(dgate).zip(gate.zip(up)).zip(gate_sums.zip(up_sums));
        blocks.for_each(|((((df, f), dgate), (gate, up)), (gate_sums, up_sums))| simd!(T, {
            gate_sums.fill(T::ZERO);
            up_sums.fill(T::ZERO);
            for row in (0..df.len()).step_by(d) {
                let out = df[row..][..d].iter_mut().zip(&mut f[row..][..d]).zip(&mut dgate[row..][..d]);
                let sums = gate_sums.iter_mut().zip(up_sums.iter_mut());
                for ((((df, f), dgate), (&gate, &up)), (gate_sum, up_sum)) in
                    out.zip(gate[row..][..d].iter().zip(&up[row..][..d])).zip(sums)
                {
                    let s = sigmoid(gate);
                    let silu = gate * s;
                    *f = silu * up;
                    *dgate = *df * up * s * (T::ONE + gate * (T::ONE - s));
                    *df *= silu;
                    *gate_sum += *dgate;
                    *up_sum += *df;
                }
            }
        }));
        Ok(())
    })?;
    Ok((f, dgate, sums.map(RowSums::of_blocks)))
}
