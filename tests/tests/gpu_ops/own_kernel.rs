//! An operation with CUDA source in its own file, as `book/src/kernels.md` shows it.

use dinolab_core::tensor::Tape;
use dinolab_core::{DType, Device, Result, Tensor};
use dinolab_tests::gpu_test;

// ANCHOR: op
use dinolab_core::cuda::args;
use dinolab_core::tensor::{Grads, Op};
use dinolab_core::{cuda_source, dispatch_real, tensor::Real};

cuda_source! { static HUBER = "huber" {
    r#"
    // x^2 / 2 near zero, |x| - 1/2 further out.
    template <class T> __device__ void huber(T* y, const T* x, size_t n) {
        elements(y, n, [](size_t, float x) { return fabsf(x) < 1.0f ? 0.5f * x * x : fabsf(x) - 0.5f; }, x);
    }
    KERNEL(huber, (T* y, const T* x, size_t n), (y, x, n))

    template <class T> __device__ void huber_backward(T* dx, const T* x, const T* dy, size_t n) {
        elements(dx, n, [](size_t, float x, float dy) { return dy * fminf(fmaxf(x, -1.0f), 1.0f); }, x, dy);
    }
    KERNEL(huber_backward, (T* dx, const T* x, const T* dy, size_t n), (dx, x, dy, n))
    "#
} }

/// `x^2 / 2` where `|x| < 1`, `|x| - 1/2` elsewhere; dx = dy clamp(x, -1, 1).
#[derive(Default)]
struct Huber {
    x: Option<Tensor>,
}

fn huber(x: &Tensor) -> Result<Tensor> {
    Huber::default().apply(&[x])
}

impl Op for Huber {
    fn name(&self) -> &'static str {
        "huber"
    }

    fn cuda(&self) -> bool {
        true
    }

    fn forward(&mut self, inputs: &[&Tensor], save: bool) -> Result<Tensor> {
        let x = inputs[0];
        if save {
            self.x = Some(x.detach());
        }
        let mut y = Tensor::uninit(x.shape(), x.dtype());
        let n = x.len();
        if let Some(gpu) = x.gpu() {
            // `elements` gives a thread 16 bytes.
            let threads = (n * x.dtype().size()).div_ceil(16);
            gpu.kernel(&HUBER, "huber", x.dtype())?.over(threads).launch(args![&mut y, x, n])?;
            return Ok(y);
        }
        dispatch_real!("huber", x.dtype(), T => {
            for (y, &x) in y.as_mut_slice::<T>().iter_mut().zip(x.as_slice::<T>()) {
                *y = if x.abs() < T::ONE { T::of(0.5) * x * x } else { x.abs() - T::of(0.5) };
            }
            Ok(y)
        })
    }

    fn backward(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let x = self.x.expect("saved by forward");
        let mut dx = Tensor::uninit(x.shape(), x.dtype());
        let n = x.len();
        if let Some(gpu) = x.gpu() {
            let threads = (n * x.dtype().size()).div_ceil(16);
            let kernel = gpu.kernel(&HUBER, "huber_backward", x.dtype())?;
            kernel.over(threads).launch(args![&mut dx, &x, &dy, n])?;
            return grads.add(0, dx);
        }
        dispatch_real!("huber", x.dtype(), T => {
            let inputs = x.as_slice::<T>().iter().zip(dy.as_slice::<T>());
            for (dx, (&x, &dy)) in dx.as_mut_slice::<T>().iter_mut().zip(inputs) {
                *dx = dy * x.clamp(-T::ONE, T::ONE);
            }
            grads.add(0, dx)
        })
    }
}
// ANCHOR_END: op

/// Value and gradient of `sum(huber(x) w)`.
fn run(device: Device, dtype: DType) -> [Vec<f64>; 2] {
    let numbers = |k: f64| (0..77).map(|i| (k * f64::from(i)).sin() * 2.5).collect::<Vec<_>>();
    let here = |k| Tensor::from_f64(&numbers(k), &[7, 11], DType::BF16).unwrap().cast(dtype).unwrap().to(device);
    let tape = Tape::new();
    let x = tape.leaf(&here(0.7));
    let y = huber(&x).unwrap();
    let loss = y.mul(&here(0.3)).unwrap().sum().unwrap();
    let grads = tape.backward(&loss, 1.0, None).unwrap();
    [y.to_f64_vec(), grads.of(&x).unwrap().to_f64_vec()]
}

gpu_test!(an_operation_of_ones_own_gives_the_cpus_numbers, {
    let device: Device = "cuda".parse().unwrap();
    let exact = run(Device::Cpu, DType::F64);
    for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::BF16, 1e-2)] {
        for (got, want) in run(device, dtype).iter().flatten().zip(exact.iter().flatten()) {
            assert!((got - want).abs() <= tolerance * want.abs().max(1.0), "{dtype:?}: {got}, the CPU says {want}");
        }
    }
});

/// The same without its kernel: it runs on the host, and gives the same numbers.
struct WithoutKernel(Huber);

impl Op for WithoutKernel {
    fn name(&self) -> &'static str {
        "huber_without_kernel"
    }
    fn forward(&mut self, inputs: &[&Tensor], save: bool) -> Result<Tensor> {
        self.0.forward(inputs, save)
    }
    fn backward(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        Box::new(self.0).backward(dy, grads)
    }
}

gpu_test!(an_operation_without_a_kernel_runs_on_the_host, {
    let device: Device = "cuda".parse().unwrap();
    let x = Tensor::from_slice(&[0.5f32, -3.0, 2.0], &[3]).unwrap();
    for dtype in [DType::F32, DType::BF16] {
        let tape = Tape::new();
        let leaf = tape.leaf(&x.cast(dtype).unwrap().to(device));
        let y = WithoutKernel(Huber::default()).apply(&[&leaf]).unwrap();
        assert_eq!((y.device(), y.dtype()), (device, dtype));
        assert_eq!(y.to_f64_vec(), [0.125, 2.5, 1.5]);
        let grads = tape.backward(&y.sum().unwrap(), 1.0, None).unwrap();
        assert_eq!(grads.of(&leaf).unwrap().to_f64_vec(), [0.5, -1.0, 1.0]);
    }
});
