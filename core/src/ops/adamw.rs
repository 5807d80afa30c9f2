//! AdamW and EMA over flat parameters: one pass over memory.
//!
//! Loshchilov and Hutter, arXiv:1711.05101, as PyTorch's `AdamW` computes it. These work in place on the flat buffers of
//! a [`Layout`](crate::params::Layout), not on the tape.

use std::ops::Range;

use crate::cuda::args;
use crate::tensor::blocks::*;
use crate::tensor::parallel::{zip_mut, BLOCK};
use crate::tensor::{Element, Real};
use crate::{cuda_source, dispatch_real, simd, Error, Result, Tensor};

cuda_source! { pub(crate) static ADAMW = "adamw" { include_str!("adamw.cu") } }

/// What all parameters share in [`adamw_step`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Decay of the mean of gradients.
    pub beta1: f64,
    /// Decay of the mean of squared gradients.
    pub beta2: f64,
    /// Added to the (bias-corrected) root.
    pub eps: f64,
}

impl AdamW {
    /// The kernel's `AdamW` at step `step`, from 1.
    pub(crate) fn on_gpu(self, step: u64) -> [f32; 7] {
        let Self { beta1, beta2, eps } = self;
        let correction = |beta: f64| 1.0 - beta.powf(step as f64);
        let [first, second] = [1.0 / correction(beta1), 1.0 / correction(beta2).sqrt()];
        [beta1, 1.0 - beta1, beta2, 1.0 - beta2, eps, first, second].map(|x| x as f32)
    }
}

/// Neighbouring parameters that are updated alike.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    /// Their elements in the flat buffers.
    pub range: Range<usize>,
    /// Learning rate. With 0 the parameters stay, but moments and the EMA advance.
    pub lr: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Factor of the gradient: the clipping coefficient `min(1, max_norm / (norm + 1e-6))`, 1 without clipping.
    pub clip: f64,
}

/// Running means of gradients and of their squares, in the layout of the parameters; they start at zero.
pub struct Moments<'a> {
    /// First moment `m`.
    pub mean: &'a mut Tensor,
    /// Second moment `v`.
    pub square: &'a mut Tensor,
}

/// A buffer of the parameters' layout from an element on.
#[derive(Clone, Copy)]
pub(crate) struct FromElement<'a> {
    pub(crate) tensor: &'a Tensor,
    pub(crate) start: usize,
}

impl FromElement<'_> {
    /// These elements of the layout.
    pub(super) fn slice<T: Element>(&self, range: Range<usize>) -> &[T] {
        &self.tensor.as_slice::<T>()[range.start - self.start..range.end - self.start]
    }
}

/// Moments of a part of the parameters.
pub(crate) struct PartMoments<'a> {
    pub(crate) moments: Moments<'a>,
    /// The element of the parameters that the first of both is of.
    pub(crate) start: usize,
}

/// The EMA teacher that follows in the same pass.
pub struct Ema<'a> {
    /// Its parameters, in the student's layout, or a part of them.
    pub params: &'a mut Tensor,
    /// The element of the student's parameters that its first is of.
    pub start: usize,
    /// How much of the old value stays.
    pub momentum: f64,
}

impl Ema<'_> {
    /// These elements of the student's layout.
    ///
    /// # Errors
    /// If it has other ones, or of another type.
    pub(super) fn slice<T: Element>(&mut self, range: Range<usize>) -> Result<&mut [T]> {
        let held = self.start..self.start + self.params.len();
        if self.params.dtype() != T::DTYPE || !(range.is_empty() || held.start <= range.start && range.end <= held.end)
        {
            let problem =
                format!("a teacher with elements {held:?} {:?} in an update of {range:?}", self.params.dtype());
            return Err(Error::shape("ema", problem));
        }
        let from = range.start.max(held.start) - held.start;
        Ok(&mut self.params.as_mut_slice::<T>()[from..from + range.len()])
    }
}

/// Step `step` (from 1) of AdamW, then of the EMA with the parameters just updated:
///
/// g = clip * g; p -= lr wd p; m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2;
/// p -= lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps); ema = momentum ema + (1 - momentum) p.
///
/// Groups are in ascending order and do not overlap; elements in no group (the padding between parameters) are not
/// touched.
///
/// # Errors
/// If buffers differ in type or length, `step` is 0, or groups are out of order or out of bounds.
pub fn adamw_step(
    params: &mut Tensor,
    grads: &Tensor,
    moments: Moments<'_>,
    ema: Option<Ema<'_>>,
    groups: &[Group],
    config: AdamW,
    step: u64,
) -> Result<()> {
    same_layout("adamw", params, moments.mean)?;
    same_layout("adamw", params, grads)?;
    let grads = FromElement { tensor: grads, start: 0 };
    adamw_part(params, grads, PartMoments { moments, start: 0 }, ema, groups, config, step)
}

/// The same of a part of the parameters, in which all groups are.
pub(crate) fn adamw_part(
    params: &mut Tensor,
    grads: FromElement<'_>,
    PartMoments { moments, start: from }: PartMoments<'_>,
    mut ema: Option<Ema<'_>>,
    groups: &[Group],
    config: AdamW,
    step: u64,
) -> Result<()> {
    same_layout("adamw", moments.mean, moments.square)?;
    let part = from..from + moments.mean.len();
    let ends = [from].into_iter().chain(groups.iter().map(|g| g.range.end));
    let ordered = groups.iter().zip(ends).all(|(g, end)| end <= g.range.start && g.range.start <= g.range.end);
    let inside = part.end <= params.len() && groups.last().is_none_or(|g| g.range.end <= part.end);
    if step == 0 || !ordered || !inside || [moments.mean.dtype(), grads.tensor.dtype()] != [params.dtype(); 2] {
        let problem = format!(
            "step {step}, {} groups over {part:?} of {} elements: steps count from 1, groups ascend",
            groups.len(),
            params.len()
        );
        return Err(Error::shape("adamw", problem));
    }
    dispatch_real!("adamw", params.dtype(), T => {
        let updates: Vec<Update<T>> = groups.iter().map(|g| Update::new(g, config, ema.as_ref(), step)).collect();
        let mut ema: Vec<&mut [T]> = match &mut ema {
            Some(ema) => ema.slice::<T>(part.clone())?.chunks_mut(BLOCK).collect(),
            None => (0..part.len().div_ceil(BLOCK)).map(|_| <&mut [T]>::default()).collect(),
        };
        let (m, v) = (moments.mean.as_mut_slice::<T>(), moments.square.as_mut_slice::<T>());
        let params = params.as_mut_slice::<T>()[part.clone()].par_chunks_mut(BLOCK);
        let blocks = params.zip(grads.slice::<T>(part).par_chunks(BLOCK));
        let blocks = blocks.zip(m.par_chunks_mut(BLOCK).zip(v.par_chunks_mut(BLOCK))).zip(ema.par_iter_mut());
        blocks.enumerate().for_each(|(block, (((p, g), (m, v)), ema))| {
            let (start, end) = (from + block * BLOCK, from + block * BLOCK + p.len());
            let first = groups.partition_point(|g| g.range.end <= start);
            let inside = groups[first..].iter().zip(&updates[first..]).take_while(|(g, _)| g.range.start < end);
            for (group, update) in inside {
                let part = group.range.start.max(start) - start..group.range.end.min(end) - start;
                let ema = if ema.is_empty() { &mut [] } else { &mut ema[part.clone()] };
                simd!(T, update.run(&mut p[part.clone()], &g[part.clone()], &mut m[part.clone()], &mut v[part], ema));
            }
        });
        Ok(())
    })
}

/// The factors of one group's update.
pub(super) struct Update<T> {
    clip: T,
    keep: T,
    step_size: T,
    beta1: T,
    beta2: T,
    rest1: T,
    rest2: T,
    inverse_root: T,
    eps: T,
    ema_keep: T,
    ema_rest: T,
}

impl<T: Real> Update<T> {
    pub(super) fn new(group: &Group, config: AdamW, ema: Option<&Ema<'_>>, step: u64) -> Self {
        let AdamW { beta1, beta2, eps } = config;
        let correction = |beta: f64| 1.0 - beta.powf(step as f64);
        let momentum = ema.map_or(0.0, |e| e.momentum);
        Self {
            clip: T::of(group.clip),
            keep: T::of(1.0 - group.lr * group.weight_decay),
            step_size: T::of(group.lr / correction(beta1)),
            beta1: T::of(beta1),
            beta2: T::of(beta2),
            rest1: T::of(1.0 - beta1),
            rest2: T::of(1.0 - beta2),
            inverse_root: T::of(1.0 / correction(beta2).sqrt()),
            eps: T::of(eps),
            ema_keep: T::of(momentum),
            ema_rest: T::of(1.0 - momentum),
        }
    }

    #[inline(always)]
    pub(super) fn run(&self, p: &mut [T], g: &[T], m: &mut [T], v: &mut [T], ema: &mut [T]) {
        for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
            let g = g * self.clip;
            *m = self.beta1 * *m + self.rest1 * g;
            *v = self.beta2 * *v + self.rest2 * (g * g);
            *p = *p * self.keep - self.step_size * *m / (v.sqrt() * self.inverse_root + self.eps);
        }
        // A second loop over what the cache still holds, so that both vectorise.
        for (ema, &p) in ema.iter_mut().zip(&*p) {
            *ema = self.ema_keep * *ema + self.ema_rest * p;
        }
    }
}

/// `ema = momentum ema + (1 - momentum) params`, in place: a teacher without an optimizer beside it, or a centre.
///
/// # Errors
/// If the two differ in type or length.
pub fn ema_update(ema: &mut Tensor, params: &Tensor, momentum: f64) -> Result<()> {
    same_layout("ema", ema, params)?;
    if let Some(gpu) = ema.gpu() {
        let n = ema.len();
        let launch = gpu.kernel(&ADAMW, "ema", ema.dtype())?.over(n.div_ceil(4));
        return launch.work(0.0, 12.0 * n as f64).launch(args![ema, params, momentum as f32, n]);
    }
    dispatch_real!("ema", ema.dtype(), T => {
        let (keep, rest) = (T::of(momentum), T::of(1.0 - momentum));
        zip_mut(ema.as_mut_slice::<T>(), params.as_slice::<T>(), |e, p| *e = keep * *e + rest * p);
        Ok(())
    })
}

/// Elements of the blocks of [`square_sums`] by which the norm of a gradient is summed.
pub(crate) const NORM_BLOCK: usize = BLOCK;

/// The sum of squares of each of these ranges of a flat buffer, in f64 in an order of its own.
///
/// # Errors
/// If the type is not real.
///
/// # Panics
/// If a range is out of bounds: it comes from the buffer's layout.
pub(crate) fn square_sums(flat: &Tensor, ranges: &[Range<usize>]) -> Result<Vec<f64>> {
    dispatch_real!("square_sums", flat.dtype(), T => {
        let flat = flat.as_slice::<T>();
        Ok(ranges.par_iter().map_to_vec(|range| simd!(T, {
            let mut lanes = [0.0; 16];
            let chunks = flat[range.clone()].chunks_exact(16);
            let rest: f64 = chunks.remainder().iter().map(|x| x.f64() * x.f64()).sum();
            for x in chunks {
                for i in 0..16 {
                    lanes[i] += x[i].f64() * x[i].f64();
                }
            }
            lanes.into_iter().sum::<f64>() + rest
        })))
    })
}

/// The Euclidean length of `range` of a flat buffer, summed in f64 in an order of its own: the gradient norm that
/// clipping looks at.
///
/// # Errors
/// If the type is not real.
///
/// # Panics
/// If the range is out of bounds: it comes from the buffer's layout.
pub fn l2_norm(flat: &Tensor, range: Range<usize>) -> Result<f64> {
    let end = range.end;
    let blocks: Vec<Range<usize>> = range.step_by(NORM_BLOCK).map(|start| start..end.min(start + NORM_BLOCK)).collect();
    Ok(square_sums(flat, &blocks)?.into_iter().sum::<f64>().sqrt())
}

pub(super) fn same_layout(op: &'static str, a: &Tensor, b: &Tensor) -> Result<()> {
    if a.dtype() != b.dtype() || a.len() != b.len() {
        let problem = format!("buffers {:?} {:?} and {:?} {:?}", a.shape(), a.dtype(), b.shape(), b.dtype());
        return Err(Error::shape(op, problem));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;

    const CONFIG: AdamW = AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8 };

    struct Run {
        params: Tensor,
        mean: Tensor,
        square: Tensor,
        ema: Tensor,
    }

    fn run(len: usize, groups: &[Group], steps: u64) -> Run {
        let mut r = Run {
            params: Tensor::full(&[len], DType::F64, 2.0).unwrap(),
            mean: Tensor::zeros(&[len], DType::F64),
            square: Tensor::zeros(&[len], DType::F64),
            ema: Tensor::zeros(&[len], DType::F64),
        };
        let grads = Tensor::full(&[len], DType::F64, 0.5).unwrap();
        for step in 1..=steps {
            let moments = Moments { mean: &mut r.mean, square: &mut r.square };
            let ema = Some(Ema { params: &mut r.ema, start: 0, momentum: 0.9 });
            adamw_step(&mut r.params, &grads, moments, ema, groups, CONFIG, step).unwrap();
        }
        r
    }

    #[test]
    fn the_first_step_has_the_size_of_the_learning_rate() {
        let r = run(3, &[Group { range: 0..3, lr: 0.1, weight_decay: 0.5, clip: 0.2 }], 1);
        let p = r.params.to_f64_vec()[0];
        assert!((p - (2.0 * 0.95 - 0.1)).abs() < 1e-7, "{p}");
        assert!((r.ema.to_f64_vec()[0] - 0.1 * p).abs() < 1e-15, "the EMA follows the updated parameter");
    }

    #[test]
    fn a_group_with_learning_rate_zero_stays_but_its_moments_and_ema_advance() {
        let r = run(2, &[Group { range: 0..2, lr: 0.0, weight_decay: 0.5, clip: 1.0 }], 2);
        assert_eq!(r.params.to_f64_vec(), [2.0; 2]);
        assert!((r.mean.to_f64_vec()[0] - 0.19 * 0.5).abs() < 1e-15);
        assert!((r.ema.to_f64_vec()[0] - 0.19 * 2.0).abs() < 1e-15);
    }

    #[test]
    fn groups_are_found_across_blocks_and_the_padding_between_them_is_not_touched() {
        let len = 3 * BLOCK + 11;
        let group = |range: Range<usize>, lr| Group { range, lr, weight_decay: 0.0, clip: 1.0 };
        let groups = [group(5..BLOCK + 7, 0.1), group(BLOCK + 9..BLOCK + 10, 0.2), group(2 * BLOCK..len - 1, 0.3)];
        let r = run(len, &groups, 1);
        for (i, p) in r.params.to_f64_vec().into_iter().enumerate() {
            let lr = groups.iter().find(|g| g.range.contains(&i)).map_or(0.0, |g| g.lr);
            assert!((p - (2.0 - lr)).abs() < 1e-7, "element {i}: {p}, learning rate {lr}");
        }
        assert_eq!(r.ema.to_f64_vec()[4], 0.0);
    }

    #[test]
    fn groups_out_of_order_are_an_error() {
        let mut x = [(); 3].map(|()| Tensor::zeros(&[8], DType::F32));
        let [p, m, v] = &mut x;
        let group = |range| Group { range, lr: 0.1, weight_decay: 0.0, clip: 1.0 };
        let grads = Tensor::zeros(&[8], DType::F32);
        for groups in [[group(4..8), group(0..4)], [group(0..4), group(4..9)]] {
            let moments = Moments { mean: m, square: v };
            assert!(adamw_step(p, &grads, moments, None, &groups, CONFIG, 1).is_err());
        }
    }

    #[test]
    fn the_norm_of_a_large_f32_buffer_is_exact() {
        let x = Tensor::full(&[1 << 20], DType::F32, 1e30).unwrap();
        assert!((l2_norm(&x, 0..1 << 20).unwrap() / (f64::from(1e30f32) * 1024.0) - 1.0).abs() < 1e-12);
    }
}
