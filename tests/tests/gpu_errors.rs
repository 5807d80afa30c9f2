//! What goes wrong on a GPU is said in words: which kernel, how much memory, what to do.

use dinolab_core::cuda::args;
use dinolab_core::recipe::Resolved;
use dinolab_core::step::Learner;
use dinolab_core::{cuda_source, Device, Result, Tensor};
use dinolab_plugins as _;
use dinolab_tests::emulator::{has_gpu, is_emulated, passed, run_emulated};
use dinolab_tests::gpu_test;

cuda_source! { static STRAY = "stray" {
    r#"
    extern "C" __global__ void stray_f32(float* y, size_t far) { y[far] = 1.0f; }
    "#
} }

/// Runs `body` on the emulator with more environment; not on a real GPU, which it would disturb.
fn emulated(test: &str, environment: &[(&str, &str)], body: impl FnOnce()) {
    if is_emulated() {
        body();
    } else if has_gpu() {
        println!("skipped: a real GPU is not made to fail");
    } else if let Some(ended) = run_emulated(&format!("gpu_errors::{test}"), environment) {
        assert!(passed(&ended), "failed on the emulator");
    }
}

fn resolve(more: &str) -> Result<Resolved> {
    let text = include_str!("../../recipes/tiny.toml");
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
    let text = include_str!("../../recipes/tiny.toml").replace("size = 16\n", &format!("size = {images}\n"));
    let text = text.replace("layer_scale = 1.0", &format!("layer_scale = 1.0\nffn_ratio = {ffn_ratio:?}"));
    let recipe = Resolved::from_text(&format!("device = \"cuda\"\n{text}")).unwrap_or_else(|e| panic!("{e}")).recipe;
    let (data, _) = dinolab_core::train::datasets(&recipe).unwrap();
    let run = || -> Result<()> {
        let mut learner = Learner::new(&recipe)?;
        let spec = dinolab_core::train::loader_spec(&recipe, &learner, 0);
        let made = dinolab_core::data::Loader::new(data, spec)?.next().expect("a step")?;
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
