//! Normalisation of the last axis: LayerNorm (Ba et al., arXiv:1607.06450) and RMSNorm (Zhang and Sennrich,
//! arXiv:1910.07467).
//!
//! With `h = (x - mean) rstd`, or `h = x rstd` for RMSNorm, and `g = weight dy`:
//! y = weight h + bias, dx = rstd (g - mean(g) - h mean(g h)), without `mean(g)` for RMSNorm;
//! dweight = sum of dy h and dbias = sum of dy over all rows.

use crate::cuda::{args, Arg};
use crate::ops::{same_dtype, with_grad};
use crate::tensor::blocks::*;
use crate::tensor::columns::{Partial, RowSums};
use crate::tensor::parallel::lane_sum;
use crate::tensor::{Grads, Op, Real};
use crate::{cuda_source, dispatch_real, simd, DType, Error, Result, Tensor};

cuda_source! { static NORM = "layer_norm" { include_str!("layer_norm.cu") } }

impl Tensor {
    /// `(x - mean) / sqrt(variance + eps) * weight + bias` over the last axis, with the biased variance:
    /// `[.., D]`, `weight [D]`, `bias [D]` to `[.., D]`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn layer_norm(&self, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
        NormOp { norm: Norm { centred: true, eps }, saved: None }.apply(&[self, weight, bias])
    }

    /// `x / sqrt(mean(x^2) + eps) * weight` over the last axis: `[.., D]`, `weight [D]` to `[.., D]`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn rms_norm(&self, weight: &Tensor, eps: f64) -> Result<Tensor> {
        NormOp { norm: Norm { centred: false, eps }, saved: None }.apply(&[self, weight])
    }
}

/// Which normalisation.
#[derive(Clone, Copy)]
pub(super) struct Norm {
    /// LayerNorm if true, RMSNorm if not.
    pub(super) centred: bool,
    pub(super) eps: f64,
}

/// What a normalisation keeps for its backward pass.
pub(super) struct Normed {
    norm: Norm,
    x: Tensor,
    weight: Tensor,
    bias: Option<Tensor>,
    /// `[rows, 2]`: mean (0 for RMSNorm) and reciprocal standard deviation.
    stats: Tensor,
}

/// Rows a task handles.
const ROWS: usize = 64;

/// Threads of a block on a GPU, and blocks of the backward pass that a multiprocessor holds.
const THREADS: usize = 128;
const BLOCKS: usize = 3;
/// Shared memory of the backward pass: two rows of x, dy and dx, in four packs of 16 bytes a thread. That is 48 KiB, which
/// together with the kernel's own must be asked for: a launch does so for all that is above.
const STAGED: usize = 2 * 3 * 4 * 16 * THREADS + 128;

/// Threads that have a row on a GPU: a power of two, with up to four packs of 16 bytes each; 0 if the row does not fit.
#[derive(Clone, Copy)]
struct Lanes(usize);

impl Lanes {
    fn of(d: usize, dtype: DType) -> Self {
        let bytes = d * dtype.size();
        let lanes = bytes.div_ceil(4 * 16).next_power_of_two();
        Self(if bytes.is_multiple_of(16) && lanes <= THREADS { lanes } else { 0 })
    }

    /// Rows of a block; of the plain path, each warp has one.
    fn rows(self) -> usize {
        THREADS / if self.0 > 0 { self.0 } else { 32 }
    }
}

impl Norm {
    fn name(self) -> &'static str {
        if self.centred {
            "layer_norm"
        } else {
            "rms_norm"
        }
    }

    pub(super) fn check(self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<()> {
        let d = x.last_dim();
        if x.rank() == 0 || d == 0 || weight.shape() != [d] || bias.is_some_and(|b| b.shape() != [d]) {
            let (weight, bias) = (weight.shape(), bias.map(|b| b.shape()));
            let problem = format!("x {:?}, weight {weight:?}, bias {bias:?}", x.shape());
            return Err(Error::shape(self.name(), problem));
        }
        Ok(())
    }

    /// Normalises rows on a GPU, and if `save` says what is kept.
    pub(super) fn on_gpu(
        self,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        save: bool,
    ) -> Result<(Tensor, Option<Normed>)> {
        let (gpu, d) = (x.gpu().expect("called for a tensor on a GPU"), x.last_dim());
        let rows = x.len() / d;
        let mut out = Tensor::uninit(x.shape(), x.dtype());
        let mut stats = save.then(|| Tensor::uninit(&[rows, 2], DType::F32));
        let at = stats.as_mut().map_or(Arg::from(0u64), Arg::from);
        let (eps, centred) = (self.eps as f32, i32::from(self.centred));
        let lanes = Lanes::of(d, x.dtype());
        let launch = gpu.kernel(&NORM, "norm", x.dtype())?.grid(rows.div_ceil(lanes.rows()), THREADS as u32);
        let launch = launch.work(0.0, (2 * x.len() * x.dtype().size()) as f64);
        launch.launch(args![&mut out, &at, x, weight, bias, eps, centred, rows as i32, d as i32, lanes.0 as i32])?;
        Ok((out, stats.map(|stats| self.keep(x, weight, bias, stats))))
    }

    pub(super) fn keep(self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, stats: Tensor) -> Normed {
        Normed { norm: self, x: x.detach(), weight: weight.detach(), bias: bias.map(Tensor::detach), stats }
    }

    /// Normalises some rows on the CPU; `stats` gets two numbers a row.
    #[inline(always)]
    pub(super) fn rows<T: Real>(self, y: &mut [T], x: &[T], stats: &mut [T], weight: &[T], bias: Option<&[T]>) {
        let d = weight.len();
        let (eps, n) = (T::of(self.eps), T::of(d as f64));
        for (row, y) in y.chunks_exact_mut(d).enumerate() {
            let x = &x[row * d..][..d];
            let mean = if self.centred { lane_sum([x], |[x]| x) / n } else { T::ZERO };
            let variance = lane_sum([x], |[x]| (x - mean) * (x - mean)) / n;
            let rstd = T::ONE / (variance + eps).sqrt();
            (stats[2 * row], stats[2 * row + 1]) = (mean, rstd);
            normalize(y, x, [mean, rstd], weight, bias);
        }
    }
}

/// `(x - mean) rstd weight + bias`, one row.
#[inline(always)]
fn normalize<T: Real>(y: &mut [T], x: &[T], [mean, rstd]: [T; 2], weight: &[T], bias: Option<&[T]>) {
    let (d, x, weight) = (y.len(), &x[..y.len()], &weight[..y.len()]);
    for i in 0..d {
        y[i] = (x[i] - mean) * rstd * weight[i];
    }
    if let Some(bias) = bias.map(|bias| &bias[..d]) {
        for i in 0..d {
            y[i] += bias[i];
        }
    }
}

impl Normed {
    /// The gradients of x, weight and bias, whose numbers among the inputs are given; the result of the normalisation
    /// again, if asked for.
    pub(super) fn backward(
        &self,
        dy: &Tensor,
        grads: &mut Grads<'_>,
        inputs: (usize, usize, Option<usize>),
        again: bool,
    ) -> Result<Option<Tensor>> {
        let mut again = again.then(|| Tensor::uninit(self.x.shape(), self.x.dtype()));
        if dy.gpu().is_some() {
            self.backward_on_gpu(dy, grads, inputs, again.as_mut())?;
            return Ok(again);
        }
        let [dweight, dbias, dx] = self.backward_on_cpu(dy, grads, inputs.0, again.as_mut())?;
        if grads.needs(inputs.0) {
            grads.leave_row_sums(inputs.0, dx);
        }
        grads.accumulate(inputs.1, |mut place| dweight.put(&mut place))?;
        if let Some(bias) = inputs.2 {
            grads.accumulate(bias, |mut place| dbias.put(&mut place))?;
        }
        Ok(again)
    }

    fn backward_on_gpu(
        &self,
        dy: &Tensor,
        grads: &mut Grads<'_>,
        (x_input, weight_input, bias_input): (usize, usize, Option<usize>),
        again: Option<&mut Tensor>,
    ) -> Result<()> {
        let Self { norm, x, weight, bias, stats } = self;
        let (gpu, rows, d) = (dy.gpu().expect("called for a tensor on a GPU"), stats.dim(0), x.last_dim());
        let lanes = Lanes::of(d, dy.dtype());
        // All blocks run at once, and rows are dealt to them: as many sums are left as there are blocks.
        let blocks = rows.div_ceil(lanes.rows()).min(BLOCKS * gpu.info().multiprocessors as usize);
        let mut sums = Partial::of_blocks(blocks, 3, d);
        let dx = Arg::gradient_of(grads, x_input)?;
        let launch = gpu.kernel(&NORM, "norm_backward", dy.dtype())?.grid(blocks, THREADS as u32).shared(STAGED);
        let tensors = 2 + usize::from(grads.needs(x_input)) + usize::from(again.is_some());
        let launch = launch.work(0.0, (tensors * dy.len() * dy.dtype().size()) as f64);
        let again = again.map_or(Arg::from(0u64), Arg::from);
        let (bias, centred) = (bias.as_ref(), i32::from(norm.centred));
        let (rows, width, lanes) = (rows as i32, d as i32, lanes.0 as i32);
        launch.launch(args![&dx, &again, sums.buffer(), x, weight, bias, stats, dy, centred, rows, width, lanes])?;
        let mut dx_sum = Tensor::uninit(&[d], DType::F32);
        let [dweight, dbias] = [Some(weight_input), bias_input].map(|input| Arg::gradient_of(grads, input));
        sums.put([dweight?, dbias?, Arg::gradient(&mut dx_sum)])?;
        grads.leave_row_sums(x_input, RowSums::complete(&dx_sum));
        Ok(())
    }

    /// dx, and the sums over rows that are dweight and dbias, and of what dx is afterwards.
    fn backward_on_cpu(
        &self,
        dy: &Tensor,
        grads: &mut Grads<'_>,
        x_input: usize,
        mut again: Option<&mut Tensor>,
    ) -> Result<[RowSums; 3]> {
        let (d, blocks) = (self.x.last_dim(), self.stats.dim(0).div_ceil(ROWS));
        let mut sums = [(); 3].map(|()| Tensor::uninit(&[blocks, d], dy.dtype()));
        dispatch_real!(self.norm.name(), dy.dtype(), T => {
            let again = again.as_mut().map(|y| y.as_mut_slice::<T>());
            let of_blocks = sums.each_mut().map(|s| s.as_mut_slice::<T>());
            with_grad::<T>(grads, x_input, dy.len(), |dx, add| {
                self.rows(dy.as_slice::<T>(), dx, add, again, of_blocks);
            })
        })?;
        Ok(sums.map(RowSums::of_blocks))
    }

    /// dx of every row, the result again, and for every block of rows the sums.
    fn rows<T: Real>(&self, dy: &[T], dx: &mut [T], add: bool, again: Option<&mut [T]>, sums: [&mut [T]; 3]) {
        let (weight, bias) = (self.weight.as_slice::<T>(), self.bias.as_ref().map(|b| b.as_slice::<T>()));
        let d = weight.len();
        let n = T::of(d as f64);
        let (x, stats) = (self.x.as_slice::<T>(), self.stats.as_slice::<T>());
        let [dweight, dbias, dx_sum] = sums.map(|s| s.par_chunks_mut(d));
        // An empty part for every block stands for "not asked for".
        let mut again: Vec<&mut [T]> = match again {
            Some(y) => y.chunks_mut(ROWS * d).collect(),
            None => (0..dy.len().div_ceil(ROWS * d)).map(|_| &mut [][..]).collect(),
        };
        let blocks = dx.par_chunks_mut(ROWS * d).zip(x.par_chunks(ROWS * d)).zip(dy.par_chunks(ROWS * d));
        let blocks = blocks.zip(again.par_iter_mut());
        let partial = dweight.zip(dbias).zip(dx_sum).zip(stats.par_chunks(ROWS * 2));
        blocks.zip(partial).for_each(|((((dx, x), dy), again), (((dweight, dbias), dx_sum), stats))| {
            simd!(T, {
                dweight.fill(T::ZERO);
                dbias.fill(T::ZERO);
                dx_sum.fill(T::ZERO);
                let (dweight, dbias, dx_sum) = (&mut dweight[..d], &mut dbias[..d], &mut dx_sum[..d]);
                let mut again = again.chunks_exact_mut(d);
                for (row, dx) in dx.chunks_exact_mut(d).enumerate() {
                    let (x, dy) = (&x[row * d..][..d], &dy[row * d..][..d]);
                    let (mean, rstd) = (stats[2 * row], stats[2 * row + 1]);
                    let g = if self.norm.centred { lane_sum([dy, weight], |[dy, w]| dy * w) / n } else { T::ZERO };
                    let gh = lane_sum([dy, weight, x], |[dy, w, x]| dy * w * (x - mean)) * rstd / n;
                    for i in 0..d {
                        let h = (x[i] - mean) * rstd;
                        dx[i] = (dy[i] * weight[i] - g - h * gh) * rstd + if add { dx[i] } else { T::ZERO };
                        dweight[i] += dy[i] * h;
                        dbias[i] += dy[i];
                        dx_sum[i] += dx[i];
                    }
                    if let Some(y) = again.next() {
                        normalize(y, x, [mean, rstd], weight, bias);
                    }
                }
            });
        });
    }
}

struct NormOp {
    norm: Norm,
    saved: Option<Normed>,
}

impl Op for NormOp {
    fn name(&self) -> &'static str {
        self.norm.name()
    }

    fn cuda(&self) -> bool {
        true
    }

    fn forward(&mut self, inputs: &[&Tensor], save: bool) -> Result<Tensor> {
        let (x, weight, bias) = (inputs[0], inputs[1], inputs.get(2).copied());
        same_dtype(self.name(), inputs)?;
        self.norm.check(x, weight, bias)?;
        if x.gpu().is_some() {
            let (out, saved) = self.norm.on_gpu(x, weight, bias, save)?;
            self.saved = saved;
            return Ok(out);
        }
        let d = x.last_dim();
        let mut out = Tensor::uninit(x.shape(), x.dtype());
        let mut stats = Tensor::uninit(&[x.len() / d, 2], x.dtype());
        dispatch_real!(self.name(), x.dtype(), T => {
            let (weight, bias) = (weight.as_slice::<T>(), bias.map(|b| b.as_slice::<T>()));
            let blocks = out.as_mut_slice::<T>().par_chunks_mut(ROWS * d).zip(x.as_slice::<T>().par_chunks(ROWS * d));
            blocks.zip(stats.as_mut_slice::<T>().par_chunks_mut(ROWS * 2)).for_each(|((y, x), stats)| {
                simd!(T, self.norm.rows(y, x, stats, weight, bias));
            });
            Ok(())
        })?;
        self.saved = save.then(|| self.norm.keep(x, weight, bias, stats));
        Ok(out)
    }

    fn backward(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let bias = (grads.inputs() > 2).then_some(2);
        self.saved.expect("saved by forward").backward(&dy, grads, (0, 1, bias), false)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crate::Tensor;

    #[test]
    fn layer_norm_rows_have_mean_zero_and_variance_one() {
        let x: Vec<f64> = (0..40).map(|i| ((i * i) as f64 * 0.37).sin() + 3.0).collect();
        let (one, zero) =
            (Tensor::from_slice(&[1.0; 20], &[20]).unwrap(), Tensor::from_slice(&[0.0; 20], &[20]).unwrap());
        let y = Tensor::from_slice(&x, &[2, 20]).unwrap().layer_norm(&one, &zero, 0.0).unwrap();
        for row in y.as_slice::<f64>().chunks(20) {
            assert!(row.iter().sum::<f64>().abs() < 1e-12);
            assert!((row.iter().map(|y| y * y).sum::<f64>() / 20.0 - 1.0).abs() < 1e-12);
        }
    }

    #[test]
    fn rms_norm_keeps_the_mean_and_sets_the_root_mean_square() {
        let x = Tensor::from_slice(&[3.0f64, 4.0], &[1, 2]).unwrap();
        let y = x.rms_norm(&Tensor::from_slice(&[1.0f64, 2.0], &[2]).unwrap(), 0.0).unwrap();
        let rms = 12.5f64.sqrt();
        let want = [3.0 / rms, 8.0 / rms];
        assert!(y.as_slice::<f64>().iter().zip(want).all(|(y, w)| (y - w).abs() < 1e-15), "{y:?}");
    }

    #[test]
    fn a_weight_of_another_width_is_an_error_that_shows_the_shapes() {
        let x = Tensor::zeros(&[2, 3], crate::DType::F32);
        let w = Tensor::zeros(&[4], crate::DType::F32);
        let message = x.rms_norm(&w, 1e-5).unwrap_err().to_string();
        assert!(message.contains("rms_norm") && message.contains("[2, 3]") && message.contains("[4]"), "{message}");
    }
}
