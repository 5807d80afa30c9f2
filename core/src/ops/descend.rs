//! One parameter of a flat buffer along a direction, with decoupled weight decay and the EMA that follows.

use std::ops::Range;

use super::adamw::{Ema, Group};
use crate::tensor::blocks::*;
use crate::tensor::parallel::BLOCK;
use crate::tensor::Real;
use crate::{dispatch_real, Error, Result, Tensor};

/// `p -= lr wd p + lr direction; ema = momentum ema + (1 - momentum) p`, in the range of `group`, in host memory. The
/// kernel `descend` of `adamw.cu` is the same on a GPU.
///
/// # Errors
/// If types or lengths differ.
pub(crate) fn descend(params: &mut Tensor, direction: &Tensor, ema: Option<Ema<'_>>, group: &Group) -> Result<()> {
    fits("descend", params, direction, &group.range)?;
    let Group { range, lr, weight_decay, .. } = group.clone();
    dispatch_real!("descend", params.dtype(), T => {
        let (keep, lr) = (T::of(1.0 - lr * weight_decay), T::of(lr));
        let places = params.as_mut_slice::<T>()[range.clone()].par_chunks_mut(BLOCK);
        let places = places.zip(direction.as_slice::<T>().par_chunks(BLOCK));
        let step = |(p, d): (&mut [T], &[T])| {
            p.iter_mut().zip(d).for_each(|(p, &d)| *p = *p * keep - lr * d);
        };
        let Some(mut ema) = ema else {
            places.for_each(step);
            return Ok(());
        };
        let (stays, comes) = (T::of(ema.momentum), T::of(1.0 - ema.momentum));
        places.zip(ema.slice::<T>(range)?.par_chunks_mut(BLOCK)).for_each(|((p, d), ema)| {
            step((&mut *p, d));
            ema.iter_mut().zip(p).for_each(|(e, p)| *e = stays * *e + comes * *p);
        });
        Ok(())
    })
}

/// Writes a tensor to its place in a flat buffer in host memory.
///
/// # Errors
/// If types differ, or it does not fit.
pub(crate) fn write_range(flat: &mut Tensor, range: Range<usize>, values: &Tensor) -> Result<()> {
    fits("write_range", flat, values, &range)?;
    dispatch_real!("write_range", flat.dtype(), T => {
        flat.as_mut_slice::<T>()[range].copy_from_slice(values.as_slice::<T>());
        Ok(())
    })
}

fn fits(op: &'static str, flat: &Tensor, values: &Tensor, range: &Range<usize>) -> Result<()> {
    if values.dtype() == flat.dtype() && values.len() == range.len() && range.end <= flat.len() {
        return Ok(());
    }
    let problem =
        format!("{:?} {:?} for {range:?} of {:?} {:?}", values.shape(), values.dtype(), flat.len(), flat.dtype());
    Err(Error::shape(op, problem))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;

    #[test]
    fn a_step_along_a_direction_touches_its_own_range_alone() {
        let len = BLOCK + 9;
        let full = |len: usize, x: f64| Tensor::full(&[len], DType::F64, x).unwrap();
        let (mut p, mut e, d) = (full(len + 5, 2.0), full(len + 5, 1.0), full(len, 3.0));
        let group = Group { range: 2..len + 2, lr: 0.1, weight_decay: 0.5, clip: 1.0 };
        descend(&mut p, &d, Some(Ema { params: &mut e, start: 0, momentum: 0.75 }), &group).unwrap();
        let after = 2.0 * 0.95 - 0.1 * 3.0;
        for (i, (p, e)) in p.to_f64_vec().into_iter().zip(e.to_f64_vec()).enumerate() {
            let (want, follows) = if group.range.contains(&i) { (after, 0.75 + 0.25 * after) } else { (2.0, 1.0) };
            assert!((p - want).abs() < 1e-15 && (e - follows).abs() < 1e-15, "{i}: {p}, {e}");
        }
        assert!(descend(&mut p, &full(3, 0.0), None, &group).is_err());
    }
}
