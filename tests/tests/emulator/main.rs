//! What the engine relies on in a GPU, through cudarc alone: on a real one it holds the emulator's claims against NVIDIA's
//! driver, elsewhere it tests the emulator.

mod errors;
mod graphs;
mod kernels;
mod products;

use std::sync::Arc;

use cudarc::driver::{
    CudaContext, CudaFunction, CudaSlice, CudaStream, DeviceRepr, DriverError, LaunchArgs, LaunchConfig,
};
use cudarc::nvrtc::{compile_ptx_with_opts, CompileError, CompileOptions, Ptx};

/// What kernels of the engine start from.
const COMMON: &str = include_str!("../../../core/src/cuda/common.cuh");

struct Gpu {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
}

impl Gpu {
    fn new() -> Self {
        let context = CudaContext::new(0).expect("a device");
        // SAFETY: every test uses one stream, or events of its own.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().expect("a stream");
        Self { context, stream }
    }

    /// One kernel of a source, which begins with line 1 after the common header.
    fn kernel(&self, source: &str, name: &str) -> CudaFunction {
        let image = compile(source).unwrap_or_else(|e| panic!("{e}"));
        self.context.load_module(image).expect("a module").load_function(name).expect("a kernel")
    }

    fn upload<T: DeviceRepr>(&self, values: &[T]) -> CudaSlice<T> {
        self.stream.clone_htod(values).expect("memory")
    }

    fn download<T: DeviceRepr>(&self, values: &CudaSlice<T>) -> Vec<T> {
        self.stream.clone_dtoh(values).expect("a copy")
    }
}

fn compile(source: &str) -> Result<Ptx, CompileError> {
    let options = CompileOptions { arch: Some("sm_80"), name: Some("test.cu".into()), ..Default::default() };
    compile_ptx_with_opts(format!("{COMMON}\n#line 1 \"test.cu\"\n{source}"), options)
}

fn blocks(blocks: u32, threads: u32) -> LaunchConfig {
    LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (threads, 1, 1), shared_mem_bytes: 0 }
}

/// Launches a test's own kernel.
fn launch(arguments: &mut LaunchArgs<'_>, shape: LaunchConfig) -> Result<(), DriverError> {
    // SAFETY: the tests' kernels stay within the memory that they are given, or are there to show what happens otherwise.
    unsafe { arguments.launch(shape) }.map(|_| ())
}
