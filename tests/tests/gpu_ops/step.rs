//! The whole training step on a GPU, held to the CPU's: eager, recorded and replayed.

use dinolab_core::data::Loader;
use dinolab_core::resolved::Resolved;
use dinolab_core::step::{Learner, Report};
use dinolab_core::{checkpoint, train, Tensor};
use dinolab_plugins as _;
use dinolab_tests::gpu_test;
use dinolab_tests::recipes::LOSSES_OF_PARTS;

pub const RECIPE: &str = r#"
name = "small"
steps = 40
[backbone]
plugin = "vit"
dim = 32
depth = 2
heads = 2
patch_size = 4
registers = 2
layer_scale = 0.5
drop_path = 0.3
pos_encoding = { plugin = "rope_box", rescale = 2.0, jitter = 1.1 }
[data]
plugin = "scenes"
size = 24
count = 16
[batch]
size = 4
[crops]
global_size = 16
local_size = 8
local_count = 2
[losses.dino]
head = { hidden = 24, bottleneck = 16, prototypes = 40, prototype_std = 0.1 }
[losses.ibot]
head = { hidden = 24, bottleneck = 16, prototypes = 32, prototype_std = 0.1 }
centering = "softmax"
[losses.koleo]
weight = 0.1
[losses.gram]
weight = { plugin = "linear_warmup", peak = 2.0, warmup_steps = 3 }
[teacher]
plugin = "ema"
momentum = 0.9
[teachers.gram]
plugin = "gram_anchor"
first_step = 1
refresh = { every = 2 }
crop_size = 24
[optimizer]
lr = { plugin = "linear_warmup", peak = 1e-3, warmup_steps = 4 }
freeze_last_layer_steps = 2
"#;

/// The shipped losses of whole batches: with [`LOSSES_OF_PARTS`] all but DINOv3's, in place of those.
const METHODS: &str = r#"
[losses.byol]
projector = { hidden = 16, output = 8, layers = 2 }
predictor_hidden = 16
[losses.vicreg]
projector = { hidden = 16, output = 8, layers = 2 }
[losses.barlow_twins]
projector = { hidden = 16, output = 8, layers = 2 }
[losses.info_nce]
projector = { hidden = 16, output = 8, layers = 2 }
[losses.sigreg]
projector = { hidden = 16, output = 8, layers = 2 }
directions = 8
"#;

/// [`RECIPE`] with [`METHODS`] and [`LOSSES_OF_PARTS`].
fn methods() -> String {
    let (before, rest) = RECIPE.split_once("[losses.dino]").expect("it has one");
    let (_, after) = rest.split_once("[teacher]").expect("it has one");
    format!("{before}{METHODS}{LOSSES_OF_PARTS}[teacher]\n{after}").replace("count = 16", "count = 16\nclasses = 4")
}

fn learner(device: &str, precision: &str, recipe: &str) -> (Learner, Loader) {
    let text = format!("device = \"{device}\"\nprecision = \"{precision}\"\n{recipe}");
    let resolved = Resolved::from_text(&text).unwrap_or_else(|e| panic!("{e}"));
    let learner = Learner::new(&resolved.recipe).unwrap();
    let (data, _) = train::datasets(&resolved.recipe).unwrap();
    let spec = train::loader_spec(&resolved.recipe, &learner, 0);
    (learner, Loader::new(data, spec).unwrap())
}

struct Run {
    reports: Vec<Report>,
    student: Tensor,
    teacher: Tensor,
    eager: Option<String>,
    nodes: Vec<usize>,
}

fn run(device: &str, precision: &str) -> Run {
    run_of(device, precision, RECIPE)
}

fn run_of(device: &str, precision: &str, recipe: &str) -> Run {
    let (mut learner, loader) = learner(device, precision, recipe);
    let reports =
        loader.take(6).enumerate().map(|(i, made)| learner.step(i as u64, &made.unwrap().batches, i == 4).unwrap());
    let reports = reports.collect();
    let weights = learner.weights();
    let (student, teacher) = (weights.student.to_host().unwrap(), weights.teacher.as_ref().unwrap().to_host().unwrap());
    Run { reports, student, teacher, eager: learner.eager_reason().map(String::from), nodes: learner.recorded_nodes() }
}

/// ||a - b|| / ||b||.
fn error(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (a.to_f64_vec(), b.to_f64_vec());
    let distance: f64 = a.iter().zip(&b).map(|(a, b)| (a - b).powi(2)).sum();
    (distance / b.iter().map(|b| b * b).sum::<f64>()).sqrt()
}

fn compare(gpu: &Run, cpu: &Run, losses: f64, weights: f64) {
    for (step, (a, b)) in gpu.reports.iter().zip(&cpu.reports).enumerate() {
        assert_eq!(a.non_finite, None, "step {step}");
        assert_eq!(a.losses.keys().collect::<Vec<_>>(), b.losses.keys().collect::<Vec<_>>());
        let pairs = a.losses.iter().chain(&a.grad_norms).zip(b.losses.iter().chain(&b.grad_norms));
        for ((name, a), (_, b)) in pairs {
            assert!((a - b).abs() <= losses * b.abs().max(0.1), "step {step}, {name}: {a} on the GPU, {b} on the CPU");
        }
    }
    for (what, a, b) in [("student", &gpu.student, &cpu.student), ("teacher", &gpu.teacher, &cpu.teacher)] {
        let error = error(a, b);
        assert!(error <= weights, "{what}: relative error {error:e}");
    }
}

gpu_test!(six_steps_in_f32_equal_the_cpu_and_are_recorded, {
    let (gpu, cpu) = (run("cuda", "f32"), run("cpu", "f32"));
    compare(&gpu, &cpu, 2e-4, 2e-4);
    let health = |run: &Run| run.reports[4].health.clone().expect("it is measured in this step");
    for ((loss, marginal, sharpness), (_, m, s)) in health(&gpu).targets.iter().zip(&health(&cpu).targets) {
        assert!((marginal - m).abs() < 1e-4 && (sharpness - s).abs() < 1e-4, "{loss}: {marginal} {m}, {sharpness} {s}");
    }
    assert_eq!((health(&gpu).targets.len(), gpu.eager), (2, None));
    // Before and after the Gram teacher begins are two kinds of step; the first comes only once.
    assert!(gpu.nodes.len() == 1 && gpu.nodes[0] > 100, "{:?}", gpu.nodes);
});

gpu_test!(steps_of_every_other_loss_equal_the_cpu_and_are_recorded, {
    let (gpu, cpu) = (run_of("cuda", "f32", &methods()), run_of("cpu", "f32", &methods()));
    for (name, b) in &cpu.reports[0].losses {
        let a = gpu.reports[0].losses[name];
        assert!((a - b).abs() <= 1e-4 * b.abs().max(0.1), "{name}: {a} on the GPU, {b} on the CPU");
    }
    // Batch norm over eight rows makes much of a rounding from step to step.
    compare(&gpu, &cpu, 5e-2, 5e-2);
    assert_eq!(gpu.eager, None);
    assert!(gpu.nodes.len() == 1 && gpu.nodes[0] > 100, "{:?}", gpu.nodes);
});

gpu_test!(steps_of_every_other_loss_in_bf16_stay_near_f32_and_are_recorded, {
    let (gpu, cpu) = (run_of("cuda", "bf16", &methods()), run_of("cpu", "f32", &methods()));
    for (name, b) in &cpu.reports[0].losses {
        let a = gpu.reports[0].losses[name];
        assert!((a - b).abs() <= 0.1 * b.abs().max(0.5), "{name}: {a} in bf16, {b} in f32");
    }
    assert_eq!(gpu.eager, None);
});

gpu_test!(six_steps_in_bf16_stay_near_f32_and_repeat_to_the_bit, {
    let gpu = run("cuda", "bf16");
    compare(&gpu, &run("cpu", "f32"), 0.1, 2e-2);
    let again = run("cuda", "bf16");
    assert_eq!(gpu.student.as_bytes(), again.student.as_bytes());
    assert_eq!(gpu.eager, None);
});

gpu_test!(weights_in_halves_follow_the_formula_and_are_restored_to_the_bit_wherever_they_are, {
    let (before, after) = RECIPE.split_once("plugin = \"gram_anchor\"").expect("it has one");
    let after = after.replace("first_step = 1\nrefresh = { every = 2 }\ncrop_size = 24\n", "momentum = 0.75\n");
    let numbers = |learner: &Learner| {
        let weights = learner.weights();
        [&weights.student, weights.teacher.as_ref().expect("there is one"), &weights.named[0].1].map(|w| w.to_f64_vec())
    };
    let run = |offload: bool| {
        let recipe = format!("{before}plugin = \"ema\"{after}offload = {offload}\noffload_moments = {offload}\n");
        let (mut learner, mut loader) = learner("cuda", "bf16", &recipe);
        for step in 0..3 {
            let [.., old] = numbers(&learner);
            learner.step(step, &loader.next().unwrap().unwrap().batches, false).unwrap();
            let [_, teacher, new] = numbers(&learner);
            for ((new, old), teacher) in new.iter().zip(&old).zip(&teacher) {
                let want = 0.75 * old + 0.25 * teacher;
                assert!((new - want).abs() <= 1e-6 * old.abs().max(teacher.abs()), "{new}, and {want} by the formula");
            }
        }
        assert_eq!((learner.eager_reason(), learner.recorded_nodes().len()), (None, 1));
        let folder = tempfile::tempdir().unwrap();
        checkpoint::save(folder.path(), &learner.content(3).unwrap(), checkpoint::Keep::newest(1)).unwrap();
        let (checkpoint, _) = checkpoint::load_newest(folder.path()).unwrap().expect("one was saved");
        let text = format!("device = \"cuda\"\nprecision = \"bf16\"\n{recipe}");
        let restored = Learner::from_checkpoint(&Resolved::from_text(&text).unwrap().recipe, &checkpoint).unwrap();
        assert!(numbers(&restored) == numbers(&learner));
        let moments: Vec<Vec<f64>> =
            restored.content(3).unwrap().optimizer.iter().map(|(_, t)| t.to_f64_vec()).collect();
        let kept: Vec<Vec<f64>> = learner.content(3).unwrap().optimizer.iter().map(|(_, t)| t.to_f64_vec()).collect();
        assert!(moments == kept);
        (numbers(&learner), kept)
    };
    assert!(run(true) == run(false), "lower halves and moments in host memory have other bits");
});

/// The small recipe with moments and an update of these kinds, clipped at this norm.
fn updated(update: &str, moments: &str, clip: &str) -> String {
    let wide = RECIPE.replace("dim = 32", "dim = 64\ncheckpointing = \"full\"").replace("hidden = 24", "hidden = 256");
    // The last parameter of a layer does not fill its memory.
    let wide = wide.replace("prototypes = 40", "prototypes = 43").replace("prototypes = 32", "prototypes = 29");
    format!("{wide}update = \"{update}\"\nmoments = \"{moments}\"\nclip_grad = {clip}\n")
}

gpu_test!(layers_that_are_updated_in_the_backward_pass_have_the_bits_of_a_whole_update, {
    for (precision, moments) in [("f32", "f32"), ("bf16", "f32"), ("bf16", "8bit")] {
        let run = |update: &str| {
            let (mut learner, mut loader) = learner("cuda", precision, &updated(update, moments, "0.0"));
            let reports: Vec<Report> = (0..5)
                .map(|step| learner.step(step, &loader.next().unwrap().unwrap().batches, step == 3).unwrap())
                .collect();
            assert_eq!((learner.eager_reason(), learner.recorded_nodes().is_empty()), (None, false), "{update}");
            (reports, learner.content(5).unwrap())
        };
        let ((whole, kept), (fused, used)) = (run("whole"), run("fused"));
        for (a, b) in kept.model.iter().chain(&kept.optimizer).zip(used.model.iter().chain(&used.optimizer)) {
            assert!(a.0 == b.0 && a.1.as_bytes() == b.1.as_bytes(), "{precision}, {moments}: {} differs", a.0);
        }
        for (whole, fused) in whole.iter().zip(&fused) {
            assert_eq!(whole.losses, fused.losses);
            // Blocks of the sums lie otherwise.
            for (module, norm) in &whole.grad_norms {
                assert!((fused.grad_norms[module] / norm - 1.0).abs() < 1e-6, "{module}: {norm}, {fused:?}");
            }
        }
    }
});

gpu_test!(gradients_of_layers_are_clipped_by_the_last_norm_and_a_resumed_run_goes_on_with_it, {
    let recipe = updated("fused", "f32", "0.05");
    let compare_with = |precision: &str, tolerance: f64| {
        let run = |device: &str| {
            let (mut learner, mut loader) = learner(device, precision, &recipe);
            for step in 0..4 {
                learner.step(step, &loader.next().unwrap().unwrap().batches, false).unwrap();
            }
            learner.weights().student.to_f64_vec()
        };
        let (gpu, cpu) = (run("cuda"), run("cpu"));
        let far = gpu.iter().zip(&cpu).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(far < tolerance, "{far}");
    };
    compare_with("f32", 1e-4);
    let text = format!("device = \"cuda\"\nprecision = \"f32\"\n{recipe}");
    let resolved = Resolved::from_text(&text).unwrap();
    let (mut learner, mut loader) = learner("cuda", "f32", &recipe);
    let batches: Vec<_> = (0..4).map(|_| loader.next().unwrap().unwrap().batches).collect();
    for (step, batches) in (0..2).zip(&batches) {
        learner.step(step, batches, false).unwrap();
    }
    let folder = tempfile::tempdir().unwrap();
    checkpoint::save(folder.path(), &learner.content(2).unwrap(), checkpoint::Keep::newest(1)).unwrap();
    let (saved, _) = checkpoint::load_newest(folder.path()).unwrap().expect("one was saved");
    let mut resumed = Learner::from_checkpoint(&resolved.recipe, &saved).unwrap();
    for (step, batches) in (2..4).zip(&batches[2..]) {
        let clipped = learner.step(step, batches, false).unwrap();
        assert!(clipped.grad_norms["backbone"] > 0.05, "nothing is clipped: {clipped:?}");
        resumed.step(step, batches, false).unwrap();
    }
    assert!(learner.weights().student.to_f64_vec() == resumed.weights().student.to_f64_vec());
});

gpu_test!(a_fused_update_is_not_taken_for_its_losses_and_ends_the_run_for_its_gradients, {
    let (mut learner, mut loader) = learner("cuda", "f32", &updated("fused", "f32", "3.0"));
    let mut batches = loader.next().unwrap().unwrap().batches;
    learner.step(0, &batches, false).unwrap();
    let before = learner.weights().student.to_f64_vec();
    let good = batches[0].global.clone();
    batches[0].global = good.scale(f64::NAN).unwrap();
    let report = learner.step(1, &batches, false).unwrap();
    assert!(report.non_finite.is_some_and(|what| what.contains("first:")), "the operation is named");
    assert!(learner.weights().student.to_f64_vec() == before, "a step that is not taken changes nothing");
    batches[0].global = good;
    learner.step(2, &batches, false).unwrap();
});

#[test]
fn checkpointing_changes_no_bit() {
    for drop_path in ["0.3", "0.0"] {
        checkpointing_changes_no_bit_at(drop_path);
    }
}

fn checkpointing_changes_no_bit_at(drop_path: &str) {
    let step = |how: &str| {
        let checkpointing = format!("drop_path = {drop_path}\ncheckpointing = \"{how}\"");
        let text = RECIPE.replace("drop_path = 0.3", &checkpointing);
        let resolved = Resolved::from_text(&format!("device = \"cpu\"\n{text}")).unwrap_or_else(|e| panic!("{e}"));
        let mut learner = Learner::new(&resolved.recipe).unwrap();
        let (data, _) = train::datasets(&resolved.recipe).unwrap();
        let mut loader = Loader::new(data, train::loader_spec(&resolved.recipe, &learner, 0)).unwrap();
        for i in 0..3 {
            let report = learner.step(i, &loader.next().unwrap().unwrap().batches, false).unwrap();
            assert_eq!(report.non_finite, None);
        }
        learner.weights().student.to_host().unwrap()
    };
    let whole = step("none");
    for how in ["selective", "full"] {
        assert_eq!(step(how).as_bytes(), whole.as_bytes(), "{how}");
    }
}
