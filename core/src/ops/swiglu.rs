//! The gate of SwiGLU feed-forward layers (Shazeer, arXiv:2002.05202).

use crate::cuda::args;
use crate::ops::elementwise::sigmoid;
use crate::ops::same_dtype;
use crate::tensor::blocks::*;
use crate::tensor::parallel::{map2, BLOCK};
use crate::tensor::{Grads, Op, Real};
use crate::{cuda_source, dispatch_real, simd, Error, Result, Tensor};

cuda_source! { static SWIGLU = "swiglu" { include_str!("swiglu.cu") } }

impl Tensor {
    /// `silu(self) * up` with `silu(x) = x sigmoid(x)`; both have the same shape.
    ///
    /// With s = sigmoid(gate): dgate = dy up s (1 + gate (1 - s)), dup = dy gate s.
    ///
    /// # Errors
    /// If the shapes differ.
    pub fn swiglu(&self, up: &Tensor) -> Result<Tensor> {
        Swiglu::default().apply(&[self, up])
    }
}

/// The gate on a GPU.
pub(super) fn swiglu_on_gpu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let gpu = gate.gpu().expect("called for a tensor on a GPU");
    let (n, bytes) = (gate.len(), gate.len() * gate.dtype().size());
    let mut y = Tensor::uninit(gate.shape(), gate.dtype());
    let launch = gpu.kernel(&SWIGLU, "swiglu", gate.dtype())?.over(bytes.div_ceil(16));
    launch.work(0.0, 3.0 * bytes as f64).launch(args![&mut y, gate, up, n])?;
    Ok(y)
}

#[derive(Default)]
struct Swiglu(Option<(Tensor, Tensor)>);

impl Op for Swiglu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cuda(&self) -> bool {
        true
    }

    fn forward(&mut self, inputs: &[&Tensor], save: bool) -> Result<Tensor> {
        let (gate, up) = (inputs[0], inputs[1]);
        same_dtype("swiglu", inputs)?;
        if gate.shape() != up.shape() {
            return Err(Error::shape("swiglu", format!("gate {:?}, up {:?}", gate.shape(), up.shape())));
        }
        if save {
            self.0 = Some((gate.detach(), up.detach()));
        }
        if gate.gpu().is_some() {
            return swiglu_on_gpu(gate, up);
        }
        dispatch_real!("swiglu", gate.dtype(), T => map2(gate, up, #[inline(always)] |gate: T, up: T| gate * sigmoid(gate) * up))
    }

    fn backward(self: Box<Self>, mut dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let (gate, up) = self.0.expect("saved by forward");
        let mut dgate = Tensor::uninit(gate.shape(), gate.dtype());
        if !dy.is_unique() {
            dy = dy.to_owned();
        }
        if let Some(gpu) = gate.gpu() {
            let (n, bytes) = (gate.len(), gate.len() * gate.dtype().size());
            let launch = gpu.kernel(&SWIGLU, "swiglu_backward", gate.dtype())?.over(bytes.div_ceil(16));
            launch.work(0.0, 5.0 * bytes as f64).launch(args![&mut dgate, &mut dy, &gate, &up, n])?;
            grads.add(0, dgate)?;
            return grads.add(1, dy);
        }
        dispatch_real!("swiglu", gate.dtype(), T => {
            // dy becomes dup.
            let outputs = dgate.as_mut_slice::<T>().par_chunks_mut(BLOCK).zip(dy.as_mut_slice::<T>().par_chunks_mut(BLOCK));
            let inputs = gate.as_slice::<T>().par_chunks(BLOCK).zip(up.as_slice::<T>().par_chunks(BLOCK));
            outputs.zip(inputs).for_each(|((dgate, dy), (gate, up))| simd!(T, {
                for (((dgate, dy), &gate), &up) in dgate.iter_mut().zip(dy).zip(gate).zip(up) {
                    let s = sigmoid(gate);
                    *dgate = *dy * up * s * (T::ONE + gate * (T::ONE - s));
                    *dy *= gate * s;
                }
            }));
            Ok(())
        })?;
        grads.add(0, dgate)?;
        grads.add(1, dy)
    }
}

#[cfg(test)]
mod tests {
    use crate::Tensor;

    #[test]
    fn a_wide_open_gate_multiplies_and_a_closed_one_stops() {
        let gate = Tensor::from_slice(&[40.0f32, -40.0, 0.0], &[3]).unwrap();
        let up = Tensor::from_slice(&[0.5f32, 3.0, 3.0], &[3]).unwrap();
        let y = gate.swiglu(&up).unwrap();
        assert_eq!(y.as_slice::<f32>()[0], 20.0);
        assert!(y.as_slice::<f32>()[1].abs() < 1e-14);
        assert_eq!(y.as_slice::<f32>()[2], 0.0);
    }
}
