//! The greatest number in size of a tensor, for diagnoses: a GPU gives one number to the host, not the tensor.

use crate::cuda::args;
use crate::tensor::blocks::*;
use crate::tensor::Real;
use crate::{cuda_source, dispatch_real, DType, Device, Result, Tensor};

cuda_source! { static GREATEST = "greatest" { include_str!("greatest.cu") } }

/// Elements that a thread of the CPU looks at in one go.
const CHUNK: usize = 1 << 16;
/// Blocks of `greatest.cu` at most; each goes over the tensor in strides of all of them.
const MOST_BLOCKS: usize = 1024;

/// `max |x|`; NaN if there is one, 0 if there is nothing.
pub(crate) fn greatest(x: &Tensor) -> Result<f64> {
    if let (Some(gpu), DType::F32 | DType::BF16) = (x.gpu(), x.dtype()) {
        let mut bits = x.device().with(|| Tensor::zeros(&[1], DType::U32));
        let launch =
            gpu.kernel(&GREATEST, "greatest", x.dtype())?.grid(x.len().div_ceil(256).clamp(1, MOST_BLOCKS), 256);
        launch.launch(args![&mut bits, x, x.len()])?;
        return Ok(f64::from(f32::from_bits(bits.to(Device::Cpu).as_slice::<u32>()[0])));
    }
    let x = &x.to(Device::Cpu);
    // A NaN stays.
    let max = |a: f64, b: f64| if a.is_nan() || b <= a { a } else { b };
    match x.dtype() {
        DType::BF16 => return Ok(x.as_slice::<half::bf16>().iter().map(|x| x.to_f64().abs()).fold(0.0, max)),
        DType::U32 => return Ok(x.as_slice::<u32>().iter().copied().max().map_or(0.0, f64::from)),
        DType::F32 | DType::F64 => {}
    }
    dispatch_real!("greatest", x.dtype(), T => {
        let of = |chunk: &[T]| chunk.iter().fold(0.0f64, |most, x| max(most, x.f64().abs()));
        Ok(x.as_slice::<T>().par_chunks(CHUNK).map_to_vec(of).into_iter().fold(0.0, max))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_greatest_number_is_found_and_nan_is_greater_than_all() {
        let mut values = vec![0.5f64; 3 * CHUNK];
        let of = |values: &[f64]| {
            let of = |dtype| greatest(&Tensor::from_f64(values, &[values.len()], dtype).unwrap()).unwrap();
            [of(DType::F32), of(DType::F64)]
        };
        values[2 * CHUNK + 5] = -8.0;
        assert_eq!(of(&values), [8.0; 2]);
        values[7] = f64::NEG_INFINITY;
        assert_eq!(of(&values), [f64::INFINITY; 2]);
        values[CHUNK] = f64::NAN;
        assert!(of(&values).iter().all(|x| x.is_nan()));
        assert_eq!(of(&[]), [0.0; 2]);
    }
}
