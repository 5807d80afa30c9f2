//! Peak memory on a GPU, against what `recipe check --cost` predicts. Alone in its program, as memory is counted by
//! process.

use dinolab_core::cuda::Gpu;
use dinolab_core::data::Loader;
use dinolab_core::resolved::{cost, Resolved};
use dinolab_core::step::Learner;
use dinolab_core::{train, DType, Device, Tensor};
use dinolab_plugins as _;
use dinolab_tests::gpu_test;

const RECIPE: &str = r#"
name = "memory"
steps = 40
device = "cuda"
[backbone]
plugin = "vit"
dim = 128
depth = 4
heads = 4
patch_size = 16
[data]
plugin = "scenes"
size = 96
count = 16
[batch]
size = 4
[crops]
global_size = 96
local_size = 48
local_count = 4
[losses.dino]
head = { hidden = 256, bottleneck = 64, prototypes = 512 }
[losses.ibot]
head = { hidden = 256, bottleneck = 64, prototypes = 512 }
[losses.gram]
enabled = false
[teacher]
plugin = "ema"
[teachers.gram]
plugin = "gram_anchor"
first_step = 0
refresh = { every = 50 }
crop_size = 144
"#;

/// The most bytes that two steps of a recipe hold, beside what the process holds already.
fn measured(resolved: &Resolved, gpu: &'static Gpu) -> f64 {
    let live = || gpu.memory().iter().map(|arena| arena.live).sum::<usize>();
    let before = live();
    gpu.reset_peaks();
    let mut learner = Learner::new(&resolved.recipe).unwrap();
    let (data, _) = train::datasets(&resolved.recipe).unwrap();
    let mut loader = Loader::new(data, train::loader_spec(&resolved.recipe, &learner, 0)).unwrap();
    // One step as it comes, one that is recorded.
    for step in 0..2 {
        learner.step(step, &loader.next().unwrap().unwrap().batches, false).unwrap();
    }
    let peak: usize = gpu.memory().iter().map(|arena| arena.peak).sum();
    (peak - before) as f64
}

gpu_test!(the_predicted_peak_is_within_a_twentieth_of_what_is_taken, {
    let gpu = Gpu::get(0).unwrap();
    // Matrix products take their workspace once.
    Device::Cuda(0).with(|| {
        let x = Tensor::zeros(&[8, 8], DType::F32);
        x.matmul(&x).unwrap();
    });
    for (what, from, to) in [
        ("as it is", "", ""),
        ("a gated feed-forward layer", "dim = 128", "dim = 128\nffn = \"swiglu\"\nffn_ratio = 6.0"),
        ("selective checkpointing", "dim = 128", "dim = 128\ncheckpointing = \"selective\""),
        ("full checkpointing", "dim = 128", "dim = 128\ncheckpointing = \"full\""),
        ("stochastic depth", "dim = 128", "dim = 128\ndrop_path = 0.4"),
        ("both", "dim = 128", "dim = 128\ncheckpointing = \"full\"\ndrop_path = 0.4"),
        ("a Gram teacher", "enabled = false", "enabled = true"),
        ("moments in eight bits", "[teachers.gram]", "[optimizer]\nmoments = \"8bit\"\n[teachers.gram]"),
        ("lower halves in host memory", "[teachers.gram]", "[optimizer]\noffload = true\n[teachers.gram]"),
        ("moments in host memory", "[teachers.gram]", "[optimizer]\noffload_moments = true\n[teachers.gram]"),
        ("an update in the backward pass", "[teachers.gram]", "[optimizer]\nupdate = \"fused\"\n[teachers.gram]"),
        (
            "two Gram teachers",
            "enabled = false",
            "[losses.early]\nplugin = \"gram\"\nteacher = \"early\"\n[teachers.early]\nplugin = \"gram_anchor\"",
        ),
        ("parts of a batch", "size = 4\n[crops]", "size = 4\nmicro_batches = 2\n[crops]"),
        ("many prototypes", "prototypes = 512", "prototypes = 8192"),
        ("f32", "device = \"cuda\"", "device = \"cuda\"\nprecision = \"f32\""),
    ] {
        hold(what, &RECIPE.replace(from, to), gpu);
    }
    let (before, rest) = RECIPE.split_once("[losses.dino]").expect("it has one");
    let (_, after) = rest.split_once("[losses.gram]").expect("it has one");
    let projector = "projector = { hidden = 512, output = 256, layers = 3 }";
    let wide = "projector = { hidden = 512, output = 4096, layers = 3 }";
    for loss in [
        "rotation]".to_string(),
        "jigsaw]\nhidden = 128".to_string(),
        "relative_location]".to_string(),
        "inpainting]".to_string(),
        format!("sigreg]\n{projector}"),
        format!("vicreg]\n{projector}"),
        format!("vicreg]\n{wide}"),
    ] {
        let recipe = format!("{before}[losses.{loss}\n[losses.gram]{after}");
        // None of them learns from a teacher.
        hold(&loss, &recipe.replace("plugin = \"ema\"", "plugin = \"none\""), gpu);
    }
    for loss in [
        "byol]".to_string(),
        "cka]".to_string(),
        format!("barlow_twins]\n{projector}"),
        format!("barlow_twins]\n{wide}"),
        "info_nce]".to_string(),
    ] {
        hold(&loss, &format!("{before}[losses.{loss}\n[losses.gram]{after}"), gpu);
    }
});

/// Holds what a recipe takes to what is predicted.
fn hold(what: &str, recipe: &str, gpu: &'static Gpu) {
    let resolved = Resolved::from_text(recipe).unwrap_or_else(|e| panic!("{what}: {e}"));
    let cost = cost::cost(&resolved.recipe).unwrap();
    let lasting = |name: &str| cost.memory.iter().filter(|(part, _)| *part == name).map(|(_, b)| b).sum::<f64>();
    let predicted = cost.total_memory() - lasting("workspace of matrix products");
    let measured = measured(&resolved, gpu);
    println!("{what}: {:.2} MiB predicted, {:.2} taken", predicted / 1048576.0, measured / 1048576.0);
    assert!((measured / predicted - 1.0).abs() < 0.05, "{what}: {predicted} bytes predicted, {measured} taken");
}
