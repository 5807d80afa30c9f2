//! What goes wrong is told: compile errors, memory that is full or not there, threads that do not meet.

use cudarc::driver::sys::CUresult;
use cudarc::driver::{DevicePtr, PushKernelArg};
use cudarc::nvrtc::CompileError;
use dinolab_tests::emulator::{is_emulated, passed, run_emulated};
use dinolab_tests::gpu_test;

use super::{blocks, compile, launch, Gpu};

/// What only the emulator can be asked for: runs the body in a process of its own, and returns what it printed.
fn on_emulator(test: &str, environment: &[(&str, &str)], body: impl FnOnce()) -> Option<String> {
    if is_emulated() {
        body();
        return None;
    }
    let ended = run_emulated(&format!("{}::{test}", module_path!()), environment)?;
    assert!(passed(&ended), "failed on the emulator");
    Some(String::from_utf8_lossy(&ended.stdout).into_owned() + &String::from_utf8_lossy(&ended.stderr))
}

gpu_test!(a_compile_error_names_file_and_line, {
    let CompileError::CompileError { log, .. } =
        compile("\nfloat f() { return missing; }").expect_err("a name is missing")
    else {
        panic!("another error");
    };
    let log = log.to_string_lossy();
    assert!(log.contains("missing") && (log.contains("test.cu:2") || log.contains("test.cu(2)")), "{log}");
});

gpu_test!(a_kernel_without_c_linkage_is_not_found, {
    let source = "__global__ void mangled(float* x) { x[0] = 1.0f; }";
    let gpu = Gpu::new();
    let found =
        compile(source).ok().map(|image| gpu.context.load_module(image).expect("a module").load_function("mangled"));
    assert!(found.is_none_or(|function| function.is_err()));
});

#[test]
fn memory_is_counted_and_runs_out() {
    on_emulator("memory_is_counted_and_runs_out", &[("CUDA_EMULATOR_MEMORY", "64")], || {
        let gpu = Gpu::new();
        let free = || gpu.context.mem_get_info().expect("memory").0;
        assert_eq!(free(), 64 << 20);
        let held = gpu.stream.alloc_zeros::<u8>(48 << 20).expect("memory");
        assert_eq!(free(), 16 << 20);
        let full = gpu.stream.alloc_zeros::<u8>(17 << 20).expect_err("no memory is left");
        assert_eq!(full.0, CUresult::CUDA_ERROR_OUT_OF_MEMORY);
        drop(held);
        gpu.stream.alloc_zeros::<u8>(17 << 20).expect("memory");
    });
}

#[test]
fn memory_that_nobody_wrote_is_nan() {
    on_emulator("memory_that_nobody_wrote_is_nan", &[], || {
        let gpu = Gpu::new();
        // SAFETY: floats have no invalid value.
        let memory = unsafe { gpu.stream.alloc::<f32>(100) }.expect("memory");
        assert!(gpu.download(&memory).iter().all(|v| v.is_nan()));
        let kernel = gpu.kernel(
            r#"extern "C" __global__ void shared(float* y) {
                __shared__ float fixed[32];
                DYNAMIC_SHARED(float, dynamic);
                y[blockIdx.x * 32 + threadIdx.x] = fixed[threadIdx.x] + dynamic[threadIdx.x];
                fixed[threadIdx.x] = dynamic[threadIdx.x] = 0.0f;
            }"#,
            "shared",
        );
        let mut y = gpu.upload(&[0f32; 320]);
        let shape = cudarc::driver::LaunchConfig { shared_mem_bytes: 128, ..blocks(10, 32) };
        launch(gpu.stream.launch_builder(&kernel).arg(&mut y), shape).expect("a launch");
        assert!(gpu.download(&y).iter().all(|v| v.is_nan()), "of an earlier block nothing is left");
    });
}

/// Launches a kernel on 64 floats, and returns how the next call fails.
fn fault(source: &str, threads: u32) -> CUresult {
    let gpu = Gpu::new();
    let kernel = gpu.kernel(source, "wrong");
    let mut x = gpu.upload(&[0f32; 64]);
    launch(gpu.stream.launch_builder(&kernel).arg(&mut x), blocks(2, threads)).expect("launches do not wait");
    let error = gpu.stream.synchronize().expect_err("the kernel faults").0;
    assert_eq!(gpu.stream.synchronize().expect_err("nothing works any more").0, error);
    std::mem::forget(x);
    error
}

#[test]
fn an_illegal_address_names_the_kernel() {
    let said = on_emulator("an_illegal_address_names_the_kernel", &[], || {
        let source =
            r#"extern "C" __global__ void wrong(float* x) { x[threadIdx.x + 64 * (threadIdx.x == 5)] = 1.0f; }"#;
        assert_eq!(fault(source, 32), CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    });
    assert!(said.is_none_or(|said| said.contains("kernel wrong, block") && said.contains("thread (5, 0, 0)")));
}

#[test]
fn a_misaligned_vector_names_the_line() {
    let said = on_emulator("a_misaligned_vector_names_the_line", &[], || {
        let source =
            "extern \"C\" __global__ void wrong(float* x) {\n  *(float4*)(x + 1) = make_float4(1, 2, 3, 4);\n}";
        assert_eq!(fault(source, 32), CUresult::CUDA_ERROR_MISALIGNED_ADDRESS);
    });
    assert!(said.is_none_or(|said| said.contains("test.cu:2: misaligned address")));
}

#[test]
fn an_index_outside_of_a_shared_array_names_the_line() {
    let said = on_emulator("an_index_outside_of_a_shared_array_names_the_line", &[], || {
        let source =
            "extern \"C\" __global__ void wrong(float* x) {\n  __shared__ float s[32];\n  s[threadIdx.x] = 1.0f;\n\
                      \n  x[0] = s[0];\n}";
        assert_eq!(fault(source, 64), CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    });
    assert!(said.is_none_or(|said| said.contains("test.cu:3: index outside of an array")));
}

#[test]
fn threads_that_never_meet_are_named() {
    let said = on_emulator("threads_that_never_meet_are_named", &[], || {
        let source = "extern \"C\" __global__ void wrong(float* x) {\n  if (threadIdx.x < 16) __syncthreads();\n\
                      \n  else x[0] = __shfl_sync(~0u, x[0], 0);\n}";
        assert_eq!(fault(source, 32), CUresult::CUDA_ERROR_LAUNCH_FAILED);
    });
    let named = |said: String| said.contains("__syncthreads at test.cu:2") && said.contains("__shfl_sync at test.cu:4");
    assert!(said.is_none_or(named));
}

#[test]
fn barriers_at_two_places_are_told() {
    let said = on_emulator("barriers_at_two_places_are_told", &[], || {
        let source = "extern \"C\" __global__ void wrong(float* x) {\n  if (threadIdx.x < 16) __syncthreads();\n\
                      \n  else __syncthreads();\n}";
        assert_eq!(fault(source, 32), CUresult::CUDA_ERROR_LAUNCH_FAILED);
    });
    assert!(said.is_none_or(|said| said.contains("test.cu:4") && said.contains("test.cu:2")));
}

/// Each warp reads what the next one wrote, without or with a barrier between.
fn neighbours(barrier: &str) -> Vec<f32> {
    let gpu = Gpu::new();
    let source = format!(
        r#"extern "C" __global__ void neighbours(float* y) {{
            __shared__ float s[128];
            s[threadIdx.x] = threadIdx.x;
            {barrier}
            y[threadIdx.x] = s[(threadIdx.x + 32) % 128];
        }}"#
    );
    let kernel = gpu.kernel(&source, "neighbours");
    let mut y = gpu.upload(&[0f32; 128]);
    launch(gpu.stream.launch_builder(&kernel).arg(&mut y), blocks(1, 128)).expect("a launch");
    gpu.download(&y)
}

#[test]
fn a_missing_barrier_shows_in_every_order() {
    for order in ["forward", "backward", "1", "2"] {
        on_emulator("a_missing_barrier_shows_in_every_order", &[("CUDA_EMULATOR_ORDER", order)], || {
            let expected: Vec<f32> = (0..128).map(|i| ((i + 32) % 128) as f32).collect();
            assert_eq!(neighbours("__syncthreads();"), expected);
            assert_ne!(neighbours(""), expected);
        });
    }
}

#[test]
fn a_missing_wait_for_a_copy_shows() {
    on_emulator("a_missing_wait_for_a_copy_shows", &[], || {
        let gpu = Gpu::new();
        let kernel = gpu.kernel(
            r#"extern "C" __global__ void hasty(float* y, const float* x) {
                __shared__ __align__(16) float s[4];
                copy_async16(s, x, 16);
                copy_commit();
                y[0] = s[0];
                copy_wait<0>();
                y[1] = s[0];
            }"#,
            "hasty",
        );
        let (mut y, x) = (gpu.upload(&[0f32; 2]), gpu.upload(&[7f32; 4]));
        launch(gpu.stream.launch_builder(&kernel).arg(&mut y).arg(&x), blocks(1, 1)).expect("a launch");
        let y = gpu.download(&y);
        assert!(y[0].is_nan() && y[1] == 7.0, "{y:?}");
    });
}

#[test]
fn copies_outside_of_memory_are_refused() {
    on_emulator("copies_outside_of_memory_are_refused", &[], || {
        let gpu = Gpu::new();
        let x = gpu.upload(&[1f32; 64]);
        let (address, _guard) = x.device_ptr(&gpu.stream);
        let mut host = [0f32; 65];
        // SAFETY: the driver checks the range.
        let refused = unsafe { cudarc::driver::result::memcpy_dtoh_sync(&mut host, address) };
        assert_eq!(refused.expect_err("one too many").0, CUresult::CUDA_ERROR_INVALID_VALUE);
    });
}
