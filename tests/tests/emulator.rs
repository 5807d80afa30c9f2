//! The CUDA emulator, or a GPU: what the engine relies on, through cudarc alone.

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaFunction, CudaModule, CudaSlice, CudaStream, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::{compile_ptx_with_opts, CompileOptions};
use dinolab_tests::gpu_test;

/// What kernels of the engine start from.
const COMMON: &str = include_str!("../../core/src/cuda/common.cuh");

struct Gpu {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
}

impl Gpu {
    fn new() -> Self {
        let context = CudaContext::new(0).expect("a device");
        let stream = context.new_stream().expect("a stream");
        // SAFETY: every test uses one stream.
        unsafe { context.disable_event_tracking() };
        Self { context, stream }
    }

    fn module(&self, source: &str) -> Arc<CudaModule> {
        let options = CompileOptions { arch: Some("sm_80"), name: Some("test.cu".into()), ..Default::default() };
        let image = compile_ptx_with_opts(format!("{COMMON}\n#line 1 \"test.cu\"\n{source}"), options);
        self.context.load_module(image.unwrap_or_else(|e| panic!("{e}"))).expect("a module")
    }

    fn function(&self, source: &str, name: &str) -> CudaFunction {
        self.module(source).load_function(name).expect("a kernel")
    }

    fn upload<T: cudarc::driver::DeviceRepr>(&self, values: &[T]) -> CudaSlice<T> {
        self.stream.clone_htod(values).expect("memory")
    }

    fn download<T: cudarc::driver::DeviceRepr>(&self, values: &CudaSlice<T>) -> Vec<T> {
        self.stream.clone_dtoh(values).expect("a copy")
    }
}

fn one_block(threads: u32) -> LaunchConfig {
    LaunchConfig { grid_dim: (1, 1, 1), block_dim: (threads, 1, 1), shared_mem_bytes: 0 }
}

gpu_test!(vectors_are_added, {
    let gpu = Gpu::new();
    let add = gpu.function(
        r#"extern "C" __global__ void add(const float* a, const float* b, float* c, int n) {
            int i = blockIdx.x * blockDim.x + threadIdx.x;
            if (i < n) c[i] = a[i] + b[i];
        }"#,
        "add",
    );
    let n = 1000;
    let a: Vec<f32> = (0..n).map(|i| i as f32).collect();
    let (x, y) = (gpu.upload(&a), gpu.upload(&a));
    let mut z = gpu.upload(&vec![0f32; n]);
    let mut launch = gpu.stream.launch_builder(&add);
    let count = n as i32;
    launch.arg(&x).arg(&y).arg(&mut z).arg(&count);
    // SAFETY: the kernel stays within n elements.
    unsafe { launch.launch(LaunchConfig::for_num_elems(n as u32)) }.expect("a launch");
    assert_eq!(gpu.download(&z), a.iter().map(|v| 2.0 * v).collect::<Vec<_>>());
});

gpu_test!(a_block_sums_with_shuffles_and_barriers, {
    let gpu = Gpu::new();
    let sum = gpu.function(
        r#"extern "C" __global__ void sum(const float* x, float* y, int n) {
            float s = 0.0f;
            for (int i = threadIdx.x; i < n; i += blockDim.x) s += x[blockIdx.x * n + i];
            s = block_sum(s);
            if (threadIdx.x == 0) y[blockIdx.x] = s;
        }"#,
        "sum",
    );
    let (rows, n) = (5, 777);
    let x: Vec<f32> = (0..rows * n).map(|i| (i % 13) as f32).collect();
    let (input, mut output, count) = (gpu.upload(&x), gpu.upload(&vec![0f32; rows]), n as i32);
    let mut launch = gpu.stream.launch_builder(&sum);
    launch.arg(&input).arg(&mut output).arg(&count);
    // SAFETY: one block a row.
    unsafe { launch.launch(LaunchConfig { grid_dim: (rows as u32, 1, 1), ..one_block(256) }) }.expect("a launch");
    assert_eq!(gpu.download(&output), x.chunks(n).map(|row| row.iter().sum()).collect::<Vec<f32>>());
});
