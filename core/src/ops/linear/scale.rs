//! The scale behind a linear layer, folded into its weight and bias, and what becomes of their gradients.

use super::LINEAR;
use crate::cuda::{args, Arg};
use crate::tensor::blocks::*;
use crate::tensor::parallel::lane_sum;
use crate::tensor::{Grads, Real};
use crate::{dispatch_real, simd, Result, Tensor};

/// `scale W` by rows, and `scale b`.
pub(super) fn fold(weight: &Tensor, bias: Option<&Tensor>, scale: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
    let (o, i) = (weight.dim(0), weight.dim(1));
    let mut w = Tensor::uninit(weight.shape(), weight.dtype());
    let mut b = bias.map(|b| Tensor::uninit(b.shape(), b.dtype()));
    if let Some(gpu) = weight.gpu() {
        let launch =
            gpu.kernel(&LINEAR, "fold_scale", weight.dtype())?.over((o * i).div_ceil(16 / weight.dtype().size()));
        let launch = launch.work(0.0, (2 * weight.len() * weight.dtype().size()) as f64);
        let b_place = b.as_mut().map_or(Arg::from(0u64), Arg::from);
        launch.launch(args![&mut w, &b_place, weight, bias, scale, o as i32, i as i32])?;
        return Ok((w, b));
    }
    dispatch_real!("linear", weight.dtype(), T => {
        let scale = scale.as_slice::<T>();
        let rows = w.as_mut_slice::<T>().par_chunks_mut(i).zip(weight.as_slice::<T>().par_chunks(i)).zip(scale.par_iter());
        rows.for_each(|((out, w), &s)| simd!(T, out.iter_mut().zip(w).for_each(|(out, &w)| *out = w * s)));
        if let (Some(out), Some(bias)) = (&mut b, bias) {
            let each = out.as_mut_slice::<T>().iter_mut().zip(bias.as_slice::<T>()).zip(scale);
            each.for_each(|((out, &b), &s)| *out = b * s);
        }
        Ok(())
    })?;
    Ok((w, b))
}

/// The parameters of a layer with a scale.
pub(super) struct Scaled<'a> {
    pub(super) weight: &'a Tensor,
    pub(super) bias: Option<&'a Tensor>,
    pub(super) scale: &'a Tensor,
}

impl Scaled<'_> {
    /// From the gradients of folded weight and bias those of weight, bias and scale, whose numbers among the inputs are
    /// given.
    pub(super) fn unfold(
        &self,
        dw: &Tensor,
        db: Option<&Tensor>,
        grads: &mut Grads<'_>,
        inputs: (usize, Option<usize>, Option<usize>),
    ) -> Result<()> {
        let &Self { weight, bias, scale } = self;
        let (o, i) = (weight.dim(0), weight.dim(1));
        if let Some(gpu) = weight.gpu() {
            let mut place = |input| Arg::gradient_of(grads, input);
            let places = [place(Some(inputs.0))?, place(inputs.1)?, place(inputs.2)?];
            let threads = (i / 8).next_multiple_of(32).clamp(32, 256) as u32;
            let launch = gpu.kernel(&LINEAR, "unfold_scale", weight.dtype())?.grid(o, threads);
            let launch = launch.work(0.0, (weight.len() * (12 + weight.dtype().size())) as f64);
            let [to_w, to_b, to_scale] = &places;
            return launch.launch(args![to_w, to_b, to_scale, dw, db, weight, bias, scale, i as i32]);
        }
        dispatch_real!("linear", weight.dtype(), T => {
            let (scale, folded) = (scale.as_slice::<T>(), dw.as_slice::<T>());
            let folded_bias = db.map(|db| db.as_slice::<T>());
            grads.accumulate(inputs.0, |mut place| {
                let add = place.add;
                let rows = place.as_mut_slice::<T>().par_chunks_mut(i).zip(folded.par_chunks(i)).zip(scale.par_iter());
                rows.for_each(|((out, g), &s)| simd!(T, {
                    out.iter_mut().zip(g).for_each(|(out, &g)| put(out, s * g, add));
                }));
                Ok(())
            })?;
            if let (Some(input), Some(folded_bias)) = (inputs.1, folded_bias) {
                grads.accumulate(input, |mut place| {
                    let add = place.add;
                    let each = place.as_mut_slice::<T>().iter_mut().zip(folded_bias).zip(scale);
                    each.for_each(|((out, &g), &s)| put(out, s * g, add));
                    Ok(())
                })?;
            }
            let Some(input) = inputs.2 else { return Ok(()) };
            grads.accumulate(input, |mut place| {
                let add = place.add;
                let rows = weight.as_slice::<T>().par_chunks(i).zip(folded.par_chunks(i));
                place.as_mut_slice::<T>().par_iter_mut().zip(rows).enumerate().for_each(|(o, (out, (w, g)))| {
                    let dot = simd!(T, lane_sum([w, g], |[w, g]| w * g));
                    let of_bias = bias.zip(folded_bias).map_or(T::ZERO, |(b, g)| b.as_slice::<T>()[o] * g[o]);
                    put(out, dot + of_bias, add);
                });
                Ok(())
            })
        })
    }
}

#[inline(always)]
fn put<T: Real>(place: &mut T, x: T, add: bool) {
    *place = if add { *place + x } else { x };
}
