//! Elements as they are written on a GPU: one value everywhere, a gradient to its place, another type.

use crate::cuda::args;
use crate::tensor::GradMut;
use crate::{cuda_source, DType, Error, Result, Tensor};

cuda_source! { static WRITE = "write" { include_str!("write.cu") } }

/// Sets all elements of a tensor on a GPU.
pub(crate) fn fill(out: &mut Tensor, value: f64) -> Result<()> {
    let (n, dtype) = (out.len(), out.dtype());
    let gpu = out.gpu().expect("called for a tensor on a GPU");
    let kernel = gpu.kernel(&WRITE, "fill", dtype)?;
    match dtype {
        DType::U32 => kernel.over(n).launch(args![out, value as u32, n]),
        _ => kernel.over((n * dtype.size()).div_ceil(16)).launch(args![out, value as f32, n]),
    }
}

/// Writes, or adds, a gradient on a GPU to its place, whatever their types.
pub(crate) fn accumulate(place: &mut GradMut<'_>, grad: &Tensor) -> Result<()> {
    let (n, gpu) = (grad.len(), grad.gpu().expect("called for a tensor on a GPU"));
    let bytes = (n * (grad.dtype().size() + 8)) as f64;
    gpu.kernel(&WRITE, "accumulate", grad.dtype())?.over(n).work(0.0, bytes).launch(args![place, grad, n])
}

/// Between f32 and bf16 on a GPU, or from f64 to them.
pub(crate) fn convert(x: &Tensor, to: DType) -> Result<Tensor> {
    let mut out = Tensor::uninit(x.shape(), to);
    let (n, gpu) = (x.len(), x.gpu().expect("called for a tensor on a GPU"));
    let (name, kind, bytes) = match (x.dtype(), out.dtype()) {
        (DType::F32, DType::BF16) => ("narrow", DType::F32, 2),
        (DType::BF16, DType::F32) => ("widen", DType::BF16, 4),
        (DType::F64, to @ (DType::F32 | DType::BF16)) => ("from_double", to, to.size()),
        (from, to) => return Err(Error::shape("cast", format!("{from:?} to {to:?} on a GPU"))),
    };
    let kernel = gpu.kernel(&WRITE, name, kind)?;
    kernel.over((n * bytes).div_ceil(16)).work(0.0, 6.0 * n as f64).launch(args![&mut out, x, n])?;
    Ok(out)
}
