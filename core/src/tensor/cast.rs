//! Another type of the same values.

use half::bf16;

use super::kernels::convert;
use super::{DType, Grads, Op, Tensor};
use crate::{Error, Result};

impl Tensor {
    /// The same values in another type. Gradients pass through between real types.
    pub fn cast(&self, dtype: DType) -> Result<Tensor> {
        if dtype == self.dtype() {
            return Ok(self.clone());
        }
        Cast { from: self.dtype(), to: dtype }.apply(&[self])
    }
}

struct Cast {
    from: DType,
    to: DType,
}

impl Op for Cast {
    fn name(&self) -> &'static str {
        "cast"
    }

    fn cuda(&self) -> bool {
        true
    }

    fn forward(&mut self, inputs: &[&Tensor], _: bool) -> Result<Tensor> {
        let x = inputs[0];
        if x.gpu().is_some() {
            return convert(x, self.to);
        }
        let mut out = Tensor::uninit(x.shape(), self.to);
        macro_rules! convert {
            ($from:ty, $to:ty, $f:expr) => {
                for (y, &x) in out.as_mut_slice::<$to>().iter_mut().zip(x.as_slice::<$from>()) {
                    *y = $f(x);
                }
            };
        }
        match (self.from, self.to) {
            (DType::F32, DType::F64) => convert!(f32, f64, f64::from),
            (DType::F64, DType::F32) => convert!(f64, f32, |x| x as f32),
            (DType::F32, DType::BF16) => convert!(f32, bf16, bf16::from_f32),
            (DType::BF16, DType::F32) => convert!(bf16, f32, bf16::to_f32),
            (DType::F64, DType::BF16) => convert!(f64, bf16, bf16::from_f64),
            (DType::BF16, DType::F64) => convert!(bf16, f64, bf16::to_f64),
            (DType::U32, DType::F32) => convert!(u32, f32, |x| x as f32),
            (DType::U32, DType::F64) => convert!(u32, f64, f64::from),
            (from, to) => return Err(Error::shape("cast", format!("{from:?} to {to:?}"))),
        }
        Ok(out)
    }

    fn backward(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        grads.add(0, dy.cast(self.from)?)
    }
}
