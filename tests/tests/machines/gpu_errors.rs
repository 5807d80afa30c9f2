//! What goes wrong on a GPU is said in words: which kernel, how much memory, what to do.

use dinolab_core::cuda::args;
use dinolab_core::resolved::Resolved;
use dinolab_core::step::Learner;
use dinolab_core::{cuda_source, Device, Result, Tensor};
use dinolab_plugins as _;
use dinolab_tests::emulator::{emulate, has_gpu, is_emulated, passed, run_emulated};
use dinolab_tests::gpu_test;

cuda_source! { static STRAY = "stray" {
    r#"
    extern "C" __global__ void stray_f32(float* y, size_t far) { y[far] = 1.0f; }
    "#
} }

cuda_source! { static BOTH_KINDS = "both_kinds" {
    r#"
    extern "C" __global__ void both_kinds_f32(float* y) {
        __shared__ float own[256];
        DYNAMIC_SHARED(float, given);
        own[threadIdx.x] = given[threadIdx.x] = (float)threadIdx.x;
        __syncthreads();
        if (threadIdx.x == 0) *y = (own[31] + given[31]) / 2.0f;
    }
    "#
} }

/// Runs `body` on the emulator with more environment; not on a real GPU, which it would disturb.
fn emulated(test: &str, environment: &[(&str, &str)], body: impl FnOnce()) {
    if is_emulated() {
        body();
    } else if has_gpu() {
        println!("skipped: a real GPU is not made to fail");
    } else if let Some(ended) = run_emulated(&format!("machines::gpu_errors::{test}"), environment) {
        assert!(passed(&ended), "failed on the emulator");
    }
}

fn resolve(more: &str) -> Result<Resolved> {
    let text = include_str!("../../../recipes/tiny.toml");
    Resolved::from_text(&format!("{more}\n{text}"))
}

/// Why a recipe with `more` is refused.
fn refused(more: &str) -> String {
    resolve(more).map(drop).unwrap_err().to_string()
}

fn recipe(more: &str) -> Resolved {
    resolve(more).unwrap_or_else(|e| panic!("{e}"))
}

#[test]
fn a_kernel_that_strays_is_named() {
    emulated("a_kernel_that_strays_is_named", &[("DINOLAB_CUDA_SYNC", "1")], || {
        let device: Device = "cuda".parse().unwrap();
        let stray = || -> Result<()> {
            let mut y = device.with(|| Tensor::zeros(&[4], dinolab_core::DType::F32));
            let gpu = y.gpu().expect("made on a GPU");
            gpu.kernel(&STRAY, "stray", y.dtype())?.grid(1, 1).launch(args![&mut y, 1usize << 40])?;
            gpu.synchronize()
        };
        let message = stray().unwrap_err().to_string();
        assert!(message.contains("stray") && message.contains("illegal"), "{message}");
    });
}

/// What the first step of `images` images, with hidden layers of that ratio, says on a device that is too small for them.
fn message_of_a_full_device(images: usize, ffn_ratio: f64) -> String {
    let run = || -> Result<()> {
        let (mut learner, mut loader) = learner(images, ffn_ratio)?;
        let made = loader.next().expect("a step")?;
        learner.step(0, &made.batches, false).map(drop)
    };
    run().unwrap_err().to_string()
}

#[test]
fn a_device_that_is_full_says_what_was_asked_by_whom_and_what_to_do() {
    let test = "a_device_that_is_full_says_what_was_asked_by_whom_and_what_to_do";
    emulated(test, &[("CUDA_EMULATOR_MEMORY", "192")], || {
        let message = message_of_a_full_device(24, 32.0);
        for part in ["GPU 0 is full", "GiB were asked for student.blocks", "micro_batches"] {
            assert!(message.contains(part), "{message}");
        }
    });
}

/// A learner of `images` images a step, with hidden layers of that ratio, and its batches.
fn learner(images: usize, ffn_ratio: f64) -> Result<(Learner, dinolab_core::data::Loader)> {
    let text = include_str!("../../../recipes/tiny.toml").replace("size = 16\n", &format!("size = {images}\n"));
    let text = text.replace("layer_scale = 1.0", &format!("layer_scale = 1.0\nffn_ratio = {ffn_ratio:?}"));
    let recipe = Resolved::from_text(&format!("device = \"cuda\"\n{text}")).unwrap_or_else(|e| panic!("{e}")).recipe;
    let (data, _) = dinolab_core::train::datasets(&recipe).unwrap();
    let learner = Learner::new(&recipe)?;
    let spec = dinolab_core::train::loader_spec(&recipe, &learner, 0);
    Ok((learner, dinolab_core::data::Loader::new(data, spec)?))
}

#[test]
fn what_is_not_finite_is_found_and_features_are_made_in_the_memory_of_a_step() {
    let test = "what_is_not_finite_is_found_and_features_are_made_in_the_memory_of_a_step";
    emulated(test, &[("CUDA_EMULATOR_MEMORY", "512")], || {
        let (mut learner, mut loader) = learner(24, 32.0).unwrap();
        let mut next = || loader.next().unwrap().unwrap().batches;
        for step in 0..2 {
            assert_eq!(learner.step(step, &next(), false).unwrap().non_finite, None);
        }
        let [lasting, step] = memory();
        assert!(lasting + 2 * step > 512 << 20, "twice the memory of a step, {step} bytes, would fit");
        let mut batches = next();
        let nan = Tensor::full(batches[0].global.shape(), dinolab_core::DType::F32, f64::NAN).unwrap();
        batches[0].global = nan;
        let said = learner.step(2, &batches, false).unwrap().non_finite.expect("pixels are not finite");
        assert!(said.contains("(first: "), "{said}");
        learner.teacher_features(&Tensor::zeros(&[48, 3, 32, 32], dinolab_core::DType::F32)).unwrap();
        let [lasting_after, step_after] = memory();
        assert_eq!(step_after, step, "bytes of the step");
        // A second place for batches that come from the host.
        assert!(lasting_after <= lasting + (64 << 20), "{lasting} bytes became {lasting_after}");
        assert_eq!(learner.step(3, &next(), false).unwrap().non_finite, None);
    });
}

/// Bytes of memory that last, and of the step's.
fn memory() -> [usize; 2] {
    dinolab_core::cuda::Gpu::get(0).unwrap().memory().map(|arena| arena.mapped)
}

#[test]
fn a_driver_of_cuda_12_0_is_enough_for_the_doctor() {
    let mut doctor = std::process::Command::new(env!("CARGO_BIN_EXE_with_plugins"));
    let environment = [("CUDA_EMULATOR_DRIVER", "12.0"), ("CUDA_EMULATOR_LIBRARIES", "12.0")];
    let Some(doctor) = emulate(doctor.arg("doctor"), &environment) else { return };
    let ended = doctor.output().expect("the program starts");
    let said = String::from_utf8_lossy(&ended.stdout);
    assert!(ended.status.success(), "{said}\n{}", String::from_utf8_lossy(&ended.stderr));
    assert!(said.contains("CUDA 12.0") && said.contains("all is well"), "{said}");
}

#[test]
fn libraries_that_are_newer_than_the_driver_are_named() {
    let environment = [("CUDA_EMULATOR_DRIVER", "12.0"), ("CUDA_EMULATOR_LIBRARIES", "13.0")];
    emulated("libraries_that_are_newer_than_the_driver_are_named", &environment, || {
        let message = "cuda".parse::<Device>().unwrap_err().to_string();
        assert!(message.contains("CUDA 12.0") && message.contains("NVRTC is of 13.0"), "{message}");
    });
}

#[test]
fn a_driver_that_does_not_start_is_no_reason_to_take_the_cpu() {
    // System driver mismatch: the driver was updated and the machine not restarted.
    let test = "a_driver_that_does_not_start_is_no_reason_to_take_the_cpu";
    emulated(test, &[("CUDA_EMULATOR_INIT", "803")], || {
        let message = "auto".parse::<Device>().unwrap_err().to_string();
        assert!(message.contains("does not start") && message.contains("--device cpu"), "{message}");
    });
}

#[test]
fn a_driver_without_a_device_leaves_the_cpu() {
    emulated("a_driver_without_a_device_leaves_the_cpu", &[("CUDA_EMULATOR_INIT", "100")], || {
        assert_eq!("auto".parse::<Device>().unwrap(), Device::Cpu);
    });
}

#[test]
fn on_a_device_that_nvrtc_does_not_know_the_driver_compiles() {
    let test = "on_a_device_that_nvrtc_does_not_know_the_driver_compiles";
    emulated(test, &[("CUDA_EMULATOR_ARCHITECTURE", "89")], || {
        let device: Device = "cuda".parse().unwrap();
        assert_eq!(dinolab_core::cuda::Gpu::get(0).unwrap().info().arch, "compute_89");
        let y = device.with(|| Tensor::full(&[3], dinolab_core::DType::F32, 2.0)).unwrap().square().unwrap();
        assert_eq!(y.to_f64_vec(), [4.0; 3]);
    });
}

#[test]
fn a_launch_between_32_and_48_kib_of_shared_memory_opts_in() {
    let test = "a_launch_between_32_and_48_kib_of_shared_memory_opts_in";
    emulated(test, &[], || {
        let device: Device = "cuda".parse().unwrap();
        let mut y = device.with(|| Tensor::zeros(&[1], dinolab_core::DType::F32));
        let gpu = y.gpu().expect("made on a GPU");
        let kernel = gpu.kernel(&BOTH_KINDS, "both_kinds", y.dtype()).unwrap();
        for bytes in [47 << 10, 45 << 10, 48 << 10, 33 << 10, 50 << 10] {
            kernel.grid(1, 32).shared(bytes).launch(args![&mut y]).unwrap();
        }
        assert_eq!(y.to_f64_vec(), [31.0]);
    });
}

#[test]
fn a_fault_is_an_error_whatever_call_comes_next() {
    emulated("a_fault_is_an_error_whatever_call_comes_next", &[], || {
        let device: Device = "cuda".parse().unwrap();
        let mut y = device.with(|| Tensor::zeros(&[4], dinolab_core::DType::F32));
        let gpu = y.gpu().expect("made on a GPU");
        let stray = gpu.kernel(&STRAY, "stray", y.dtype()).unwrap();
        stray.grid(1, 1).launch(args![&mut y, 1usize << 40]).unwrap();
        let error = dinolab_core::tensor::catch_out_of_memory(|| {
            y.fill_zero();
            Ok(())
        });
        assert!(error.unwrap_err().to_string().contains("illegal"));
    });
}

#[test]
fn a_device_that_is_full_before_the_step_says_so_too() {
    let test = "a_device_that_is_full_before_the_step_says_so_too";
    emulated(test, &[("CUDA_EMULATOR_MEMORY", "128")], || {
        let message = message_of_a_full_device(1024, 4.0);
        assert!(message.contains("GPU 0 is full") && message.contains("asked for augmentation"), "{message}");
    });
}

gpu_test!(double_precision_is_refused_before_anything_is_allocated, {
    let error = refused("device = \"cuda\"\nprecision = \"f64\"");
    assert!(error.contains("f64 is for checks on the CPU"), "{error}");
});

#[test]
fn without_a_driver_the_message_says_how_to_go_on() {
    if has_gpu() {
        println!("skipped: there is a GPU");
        return;
    }
    let error = recipe("device = \"cuda\"").recipe.device().unwrap_err().to_string();
    assert!(error.contains("no CUDA driver") && error.contains("--device cpu"), "{error}");
}

#[test]
fn a_precision_of_gpus_is_refused_on_the_cpu() {
    let error = refused("device = \"cpu\"\nprecision = \"bf16\"");
    assert!(error.contains("precision: it is for GPUs"), "{error}");
}
