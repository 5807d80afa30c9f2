//! The linear layer, alone or with what surrounds it in a transformer: a norm or an activation before it, LayerScale
//! (Touvron et al., arXiv:2103.17239) and a residual connection behind it.

use crate::cuda::{Matrix, Product};
use crate::ops::matmul::{multiply, product, Factor, Mat, Threads};
use crate::ops::same_dtype;
use crate::tensor::blocks::*;
use crate::tensor::columns::{RowSums, COLUMN_SUMS};
use crate::tensor::parallel::with_scratch;
use crate::tensor::{GradMut, Grads, Op, Real};
use crate::{cuda_source, dispatch_real, simd, Error, Result, Tensor};

mod before;
mod scale;

use before::{Before, Kept};

cuda_source! { static LINEAR = "linear" { COLUMN_SUMS, include_str!("linear/linear.cu") } }

impl Tensor {
    /// `x W^T + b` over the last axis: `[.., I]`, `W [O, I]`, `b [O]` to `[.., O]`. [`Linear`] is
    /// the same with more around it.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn linear(&self, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        Linear::new(weight, bias).of(self)
    }
}

/// A linear layer with what surrounds it: `y = [onto +] scale (f(x) W^T + b)` over the last axis, where f is nothing, a
/// norm or an activation.
///
/// With `W' = scale W` (by rows) and `b' = scale b` this is `onto + f(x) W'^T + b'`, so the residual connection costs no
/// pass of its own, and
/// `df = dy W', dW' = dy^T f(x), db' = sum of the rows of dy, donto = dy,`
/// `dW = scale dW', db = scale db', dscale = sum over I of W dW' + b db'`.
/// Neither `f(x)` nor the term added to `onto` is saved for the backward pass: `f(x)` is recomputed when dx is computed.
///
/// ```
/// use dinolab_core::ops::Linear;
/// use dinolab_core::Tensor;
///
/// let x = Tensor::from_slice(&[1.0, -1.0, 2.0, 0.5], &[2, 2])?;
/// let weight = Tensor::from_slice(&[0.5, 1.0, -1.0, 2.0], &[2, 2])?;
/// let gamma = Tensor::from_slice(&[0.1, 0.2], &[2])?;
/// let fused = Linear::new(&weight, None).after_gelu().scale(&gamma).onto(&x).of(&x)?;
/// let composed = x.add(&x.gelu()?.linear(&weight, None)?.mul_row(&gamma)?)?;
/// assert!(fused.sub(&composed)?.square()?.sum()?.item() < 1e-30);
/// # Ok::<(), dinolab_core::Error>(())
/// ```
#[derive(Clone, Copy)]
#[must_use = "a layer does nothing until it is given its input by `of`"]
pub struct Linear<'a> {
    weight: &'a Tensor,
    bias: Option<&'a Tensor>,
    before: Before<&'a Tensor>,
    scale: Option<&'a Tensor>,
    onto: Option<&'a Tensor>,
}

impl<'a> Linear<'a> {
    /// `x W^T + b`: weight `[O, I]`, bias `[O]`.
    pub fn new(weight: &'a Tensor, bias: Option<&'a Tensor>) -> Self {
        Self { weight, bias, before: Before::Nothing, scale: None, onto: None }
    }

    /// Of x normalised as by [`Tensor::layer_norm`]: weight and bias `[I]`.
    pub fn after_layer_norm(self, weight: &'a Tensor, bias: &'a Tensor, eps: f64) -> Self {
        Self { before: Before::norm(true, weight, Some(bias), eps), ..self }
    }

    /// Of x normalised as by [`Tensor::rms_norm`]: weight `[I]`.
    pub fn after_rms_norm(self, weight: &'a Tensor, eps: f64) -> Self {
        Self { before: Before::norm(false, weight, None, eps), ..self }
    }

    /// Of `gelu(x)`.
    pub fn after_gelu(self) -> Self {
        Self { before: Before::Gelu, ..self }
    }

    /// Of `silu(x) up` as by [`Tensor::swiglu`]; `up` has the shape of x.
    pub fn after_swiglu(self, up: &'a Tensor) -> Self {
        Self { before: Before::Swiglu { up }, ..self }
    }

    /// Every output times a number of its own, `[O]`, if there is one.
    pub fn scale(self, scale: impl Into<Option<&'a Tensor>>) -> Self {
        Self { scale: scale.into(), ..self }
    }

    /// Added to `onto`, which has the shape of the result, if there is one.
    pub fn onto(self, onto: impl Into<Option<&'a Tensor>>) -> Self {
        Self { onto: onto.into(), ..self }
    }

    /// The layer's result for `x` `[.., I]`: `[.., O]`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn of(&self, x: &Tensor) -> Result<Tensor> {
        let mut inputs = vec![x, self.weight];
        let mut place = |input| {
            inputs.push(input);
            inputs.len() - 1
        };
        let before = self.before.map(&mut place);
        let [bias, scale, onto] = [self.bias, self.scale, self.onto].map(|input| input.map(&mut place));
        LinearOp { before, bias, scale, onto, saved: None }.apply(&inputs)
    }
}

/// [`Linear`] with numbers of inputs in place of tensors; x and the weight are the first two.
struct LinearOp {
    before: Before<usize>,
    bias: Option<usize>,
    scale: Option<usize>,
    onto: Option<usize>,
    saved: Option<Saved>,
}

struct Saved {
    kept: Kept,
    weight: Tensor,
    bias: Option<Tensor>,
    scale: Option<Tensor>,
}

/// Rows a task handles: what is computed of a block is still in the cache when the next pass goes over it.
const ROWS: usize = 128;

impl LinearOp {
    /// The tensors by role.
    fn operands<'a>(&self, inputs: &[&'a Tensor]) -> Linear<'a> {
        let [bias, scale, onto] = [self.bias, self.scale, self.onto].map(|i| i.map(|i| inputs[i]));
        Linear { weight: inputs[1], bias, before: self.before.map(|i| inputs[i]), scale, onto }
    }

    /// The shape of the result.
    fn check(&self, inputs: &[&Tensor]) -> Result<Vec<usize>> {
        same_dtype("linear", inputs)?;
        let (x, Linear { weight, bias, before, scale, onto }) = (inputs[0], self.operands(inputs));
        before.check(x)?;
        let (i, o) = (x.last_dim(), weight.shape().first().copied().unwrap_or(0));
        let row = |v: Option<&Tensor>| v.is_none_or(|v| v.shape() == [o]);
        let out_len = x.len() / i.max(1) * o;
        let added = onto.is_none_or(|t| t.len() == out_len && t.last_dim() == o);
        if weight.shape() != [o, i] || !row(bias) || !row(scale) || !added || x.rank() == 0 || i * o == 0 {
            let shape = |t: Option<&Tensor>| t.map_or("none".into(), |t| format!("{:?}", t.shape()));
            let (bias, scale, onto) = (shape(bias), shape(scale), shape(onto));
            let problem =
                format!("x {:?}, weight {:?}, bias {bias}, scale {scale}, onto {onto}", x.shape(), weight.shape());
            return Err(Error::shape("linear", problem));
        }
        let mut shape = x.shape().to_vec();
        shape[x.rank() - 1] = o;
        Ok(shape)
    }
}

impl Op for LinearOp {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cuda(&self) -> bool {
        true
    }

    fn forward(&mut self, inputs: &[&Tensor], save: bool) -> Result<Tensor> {
        let mut out = Tensor::uninit(&self.check(inputs)?, inputs[0].dtype());
        let (x, layer) = (inputs[0], self.operands(inputs));
        let kept = match x.gpu() {
            Some(_) => layer.forward_on_gpu(x, &out, save)?,
            None => dispatch_real!("linear", x.dtype(), T => Ok(layer.forward_on_cpu::<T>(x, &mut out, save)))?,
        };
        let [bias, scale] = [layer.bias, layer.scale].map(|t| t.map(Tensor::detach));
        self.saved = kept.map(|kept| Saved { kept, weight: layer.weight.detach(), bias, scale });
        Ok(out)
    }

    fn backward(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let Saved { kept, weight, bias, scale } = self.saved.expect("saved by forward");
        let (o, i) = (weight.dim(0), weight.dim(1));
        let rows = dy.len() / o;
        let parameters: Vec<usize> = [Some(1), self.bias, self.scale].into_iter().flatten().collect();
        let needed = parameters.into_iter().any(|p| grads.needs(p));
        let sums = match grads.row_sums_of_dy() {
            _ if bias.is_none() || !needed => None,
            None => Some(RowSums::of(&dy, o)?),
            known => known,
        };
        let folded = scale.as_ref().map(|s| scale::fold(&weight, None, s)).transpose()?;
        let dy_matrix = Factor::new(&dy, rows, o);
        let back = Factor::new(folded.as_ref().map_or(&weight, |(w, _)| w), o, i);
        let f = match kept {
            Kept::Input(x) => {
                grads.accumulate(0, |mut dx| multiply(&mut dx, dy_matrix, back))?;
                x
            }
            other => {
                let mut df = Tensor::uninit(&[rows, i], dy.dtype());
                multiply(&mut GradMut::of(&mut df), dy_matrix, back)?;
                other.backward(df, grads, &self.before)?
            }
        };
        drop(folded);
        let weight_gradient = |place: &mut GradMut<'_>| multiply(place, dy_matrix.t(), Factor::new(&f, rows, i));
        match scale {
            _ if !needed => {}
            None => {
                grads.accumulate(1, |mut dw| weight_gradient(&mut dw))?;
                if let (Some(input), Some(sums)) = (self.bias, sums) {
                    grads.accumulate(input, |mut db| sums.put(&mut db))?;
                }
            }
            Some(scale) => {
                let mut dw = Tensor::uninit(&[o, i], dy.dtype().wide());
                weight_gradient(&mut GradMut::of(&mut dw))?;
                let db = sums.map(|s| s.total()).transpose()?;
                let layer = scale::Scaled { weight: &weight, bias: bias.as_ref(), scale: &scale };
                layer.unfold(&dw, db.as_ref(), grads, (1, self.bias, self.scale))?;
            }
        }
        match self.onto {
            Some(onto) => grads.add(onto, dy),
            None => Ok(()),
        }
    }
}

impl Linear<'_> {
    fn forward_on_gpu(&self, x: &Tensor, out: &Tensor, save: bool) -> Result<Option<Kept>> {
        let (i, o) = (self.weight.dim(1), self.weight.dim(0));
        let rows = x.len() / i;
        let (f, kept) = self.before.on_gpu(x, save)?;
        let folded = self.scale.map(|s| scale::fold(self.weight, self.bias, s)).transpose()?;
        let (weight, bias) = folded.as_ref().map_or((self.weight, self.bias), |(w, b)| (w, b.as_ref()));
        let (a, b) = (Matrix::of(&f, rows, i), Matrix::of(weight, o, i).t());
        let (bias, onto) = (bias.map(Tensor::device_address), self.onto.map(Tensor::device_address));
        let product = Product { bias, onto, ..Product::new(a, b, Matrix::of(out, rows, o)) };
        x.gpu().expect("called for a tensor on a GPU").matmul(&product)?;
        Ok(kept)
    }

    fn forward_on_cpu<T: Real>(&self, x: &Tensor, out: &mut Tensor, save: bool) -> Option<Kept> {
        let (i, o) = (self.weight.dim(1), self.weight.dim(0));
        let rows = x.len() / i;
        let mut stats = Tensor::uninit(&[if self.before.has_stats() { rows } else { 0 }, 2], x.dtype());
        // Every block of rows would gather the columns of W^T one number at a time: several have it gathered once.
        let transposed = (rows > ROWS).then(|| self.weight.detach().transpose().expect("a weight is a matrix"));
        let weight = match &transposed {
            Some(transposed) => Mat::new(transposed.as_slice::<T>(), i, o),
            None => Mat::new(self.weight.as_slice::<T>(), o, i).t(),
        };
        let input = x.as_slice::<T>();
        let [bias, scale, onto] = [self.bias, self.scale, self.onto].map(|t| t.map(|t| t.as_slice::<T>()));
        // A block without statistics gets an empty part of them.
        let parts = stats.as_mut_slice::<T>().chunks_mut(2 * ROWS).map(Some).chain(std::iter::repeat_with(|| None));
        let mut parts: Vec<_> = parts.take(rows.div_ceil(ROWS)).collect();
        out.as_mut_slice::<T>().par_chunks_mut(ROWS * o).zip(parts.par_iter_mut()).enumerate().for_each(
            |(block, (y, stats))| {
                let (first, rows) = (block * ROWS, y.len() / o);
                let x = &input[first * i..][..rows * i];
                let times_weight = |y: &mut [T], f: &[T]| {
                    product(y, o, false, T::ONE, Mat::new(f, rows, i), weight, Threads::One);
                };
                match self.before {
                    Before::Nothing => times_weight(y, x),
                    before => with_scratch(rows * i, |f| {
                        before.rows(f, x, first, stats.take().unwrap_or_default());
                        times_weight(y, f);
                    }),
                }
                simd!(T, {
                    for (r, y) in y.chunks_exact_mut(o).enumerate() {
                        if let Some(bias) = bias {
                            y.iter_mut().zip(bias).for_each(|(y, &b)| *y += b);
                        }
                        if let Some(scale) = scale {
                            y.iter_mut().zip(scale).for_each(|(y, &s)| *y *= s);
                        }
                        if let Some(onto) = onto {
                            y.iter_mut().zip(&onto[(first + r) * o..]).for_each(|(y, &x)| *y += x);
                        }
                    }
                });
            },
        );
        save.then(|| self.before.keep(x, stats))
    }
}
