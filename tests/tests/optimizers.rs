//! Optimizers against their statements in PyTorch (`tests/optimizers.py`: `torch.optim.AdamW`, `torch.optim.SGD`, and Muon,
//! which is held to `torch.optim.Muon` there), over several updates; the CPU against the GPU; what holds for each of them.
//!
//! The statements need a Python with `torch`: that of `DINOLAB_PYTHON`, of `target/python`, or `python3`. Without, that test
//! says so and passes.

#[allow(dead_code)]
mod program;

use std::sync::Arc;

use dinolab_core::checkpoint;
use dinolab_core::contract::{At, Optimizer};
use dinolab_core::data::Pipeline;
use dinolab_core::params::Layout;
use dinolab_core::recipe::{cost, OptimizerEntry, Resolved};
use dinolab_core::registry;
use dinolab_core::step::{Learner, Updates};
use dinolab_core::testing::{contracts, normal};
use dinolab_core::{train, DType, Device, Tensor};
use dinolab_plugins as _;
use dinolab_tests::gpu_test;
use serde_json::json;

/// Each optimizer with its own keys.
const TABLES: [&str; 6] = [
    "plugin = \"adamw\"\nbetas = [0.8, 0.95]\neps = 1e-3",
    "plugin = \"sgd\"",
    "plugin = \"sgd\"\nmomentum = 0.7\nnesterov = true",
    "plugin = \"sgd\"\nmomentum = 0.0",
    "plugin = \"muon\"",
    "plugin = \"muon\"\nmomentum = 0.8\nnesterov = false\nns_steps = 3\nbetas = [0.8, 0.95]\neps = 1e-3",
];
/// Rates that differ from layer to layer, decay and clipping.
const COMMON: &str = "lr = 0.05\nweight_decay = 0.3\nclip_grad = 2.5\nlayerwise_decay = 0.7\n";
const STEPS: u64 = 6;
const DEPTH: usize = 1;

fn entry(table: &str) -> OptimizerEntry {
    toml::from_str(&format!("{COMMON}{table}")).unwrap_or_else(|e| panic!("{table}: {e}"))
}

fn updates(table: &str, layout: &Arc<Layout>, device: Device, dtype: DType) -> Updates {
    Updates::new(&entry(table), layout, DEPTH, STEPS, (device, dtype)).unwrap_or_else(|e| panic!("{table}: {e}"))
}

/// The gradients of a step: zero between parameters.
fn gradients(layout: &Layout, step: u64) -> Vec<f64> {
    let drawn = normal(11, step, &[layout.len()]).to_f64_vec();
    let mut gradients = vec![0.0; layout.len()];
    layout.specs().iter().for_each(|s| gradients[s.range()].copy_from_slice(&drawn[s.range()]));
    gradients
}

/// Student, teacher and moments after all steps.
fn run(table: &str, device: Device, dtype: DType) -> Vec<Vec<f64>> {
    let layout = contracts::parameters();
    let mut run = updates(table, &layout, device, dtype);
    (0..STEPS).for_each(|step| run.update(step, &gradients(&layout, step), 0.6).unwrap_or_else(|e| panic!("{e}")));
    let weights = run.weights();
    [&weights.student, weights.teacher.as_ref().unwrap()]
        .into_iter()
        .chain(&weights.moments)
        .map(Tensor::to_f64_vec)
        .collect()
}

/// ||a - b|| / ||b||.
fn distance(a: &[f64], b: &[f64]) -> f64 {
    let length = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    length(&mut a.iter().zip(b).map(|(a, b)| a - b)) / length(&mut b.iter().copied()).max(1e-9)
}

#[test]
fn weights_after_several_updates_are_those_of_pytorch() {
    let Some(python) = program::python("torch") else { return };
    let layout = contracts::parameters();
    let steps: Vec<Vec<f64>> = (0..STEPS).map(|step| gradients(&layout, step)).collect();
    let clips: Vec<Vec<f64>> = steps
        .iter()
        .map(|all| {
            let of = |module: &String| {
                let range = layout.range_of(&format!("{module}."));
                let norm = all[range].iter().map(|g| g * g).sum::<f64>().sqrt();
                (2.5 / (norm + 1e-6)).min(1.0)
            };
            layout.modules().iter().map(of).collect()
        })
        .collect();
    let mut cases = Vec::new();
    for table in TABLES {
        let (own, fresh) = (entry(table), updates(table, &layout, Device::Cpu, DType::F64));
        let plugin: Box<dyn Optimizer> = own.plugin.build(&mut ()).unwrap();
        let start = fresh.weights().student.to_f64_vec();
        let params: Vec<_> = layout
            .specs()
            .iter()
            .zip(fresh.rules())
            .map(|(spec, rule)| {
                let module = layout.modules().iter().position(|m| m == spec.module()).unwrap();
                let clipped = steps
                    .iter()
                    .zip(&clips)
                    .map(|(all, clip)| all[spec.range()].iter().map(|g| g * clip[module]).collect::<Vec<f64>>());
                let split = if plugin.adamw(spec).is_none() && own.plugin.name() == "muon" { spec.stacked } else { 1 };
                json!({
                    "name": spec.name, "shape": spec.shape, "start": start[spec.range()], "stacked": split,
                    "lr": 0.05 * rule.lr_multiplier, "weight_decay": if rule.decays { 0.3 } else { 0.0 },
                    "hidden": plugin.adamw(spec).is_none(), "gradients": clipped.collect::<Vec<_>>(),
                })
            })
            .collect();
        cases.push(json!({ "plugin": own.plugin.name(), "config": own.plugin.config(), "params": params }));
    }
    let folder = program::Folder::new();
    folder.write("cases.json", &serde_json::to_string(&cases).unwrap());
    let text = program::script(&python, "optimizers.py", &[&folder.path("cases.json")]);
    let theirs: Vec<std::collections::BTreeMap<String, Vec<f64>>> = serde_json::from_str(&text).expect("JSON");
    for (table, theirs) in TABLES.iter().zip(theirs) {
        let ours = &run(table, Device::Cpu, DType::F64)[0];
        for spec in layout.specs() {
            let off = distance(&ours[spec.range()], &theirs[&spec.name]);
            assert!(off < 1e-9, "{table}: {} is {off:e} from PyTorch's", spec.name);
        }
    }
}

#[test]
fn muon_takes_hidden_matrices_and_nothing_else() {
    let plugin: Box<dyn Optimizer> = entry("plugin = \"muon\"").plugin.build(&mut ()).unwrap();
    let taken = |layout: &Layout| {
        let own = layout.specs().iter().filter(|spec| plugin.adamw(spec).is_none());
        own.map(|spec| spec.name.clone()).collect::<Vec<_>>()
    };
    let hidden = ["backbone.qkv", "backbone.wide", "backbone.tall", "head.mlp"];
    assert_eq!(taken(&contracts::parameters()), hidden);
    // Of real models, by their names.
    let model = Learner::new(&recipe("cpu", "f32", "plugin = \"muon\"").recipe).unwrap();
    let found = taken(&model.model().layout);
    let parts = ["attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"];
    let blocks = (0..2).flat_map(|i| parts.map(|part| format!("backbone.blocks.{i}.{part}")));
    let heads = ["dino_head", "ibot_head"].into_iter();
    let heads = heads.flat_map(|head| [0, 2, 4].map(|layer| format!("{head}.mlp.{layer}.weight")));
    assert_eq!(found, blocks.chain(heads).collect::<Vec<_>>());
    let qkv = model.model().layout.find("backbone.blocks.0.attn.qkv.weight").unwrap();
    assert_eq!(qkv.stacked, 3);
}

#[test]
fn a_direction_of_muon_is_near_an_orthogonal_matrix_of_the_size_of_adamws() {
    let layout = contracts::parameters();
    let spec = layout.find("backbone.wide").unwrap();
    let table = "plugin = \"muon\"\nlayerwise_decay = 1.0\nlr = 1.0\nweight_decay = 0.0";
    let entry: OptimizerEntry = toml::from_str(table).unwrap();
    let mut run = Updates::new(&entry, &layout, DEPTH, 1, (Device::Cpu, DType::F64)).unwrap();
    let matrix = |run: &Updates| run.weights().student.view(spec.offset, &spec.shape).to_owned();
    let before = matrix(&run);
    run.update(0, &gradients(&layout, 0), 0.0).unwrap();
    let step = matrix(&run).sub(&before).unwrap().scale(1.0 / (0.2 * 8f64.sqrt())).unwrap();
    let gram = step.matmul_t(&step).unwrap().to_f64_vec();
    for (i, x) in gram.into_iter().enumerate() {
        // Singular values come within a third of 1.
        assert!((x - f64::from(u8::from(i % 6 == 0))).abs() < 0.45, "{i}: {x}");
    }
}

#[test]
fn every_optimizer_keeps_its_contract() {
    for table in TABLES {
        contracts::optimizer(&format!("{COMMON}{table}")).unwrap_or_else(|e| panic!("{table}: {e}"));
    }
    for plugin in registry::all().iter().filter(|p| p.kind == "optimizer") {
        assert!(TABLES.iter().any(|t| t.contains(&format!("\"{}\"", plugin.name))), "{} is not tried", plugin.name);
        contracts::registered("optimizer", plugin.name).unwrap();
    }
}

#[test]
fn nesterov_without_a_momentum_is_refused() {
    let refused = "plugin = \"sgd\"\nmomentum = 0.0\nnesterov = true";
    let said = Resolved::from_text(&format!("{RECIPE}{refused}\n")).unwrap_err().to_string();
    assert!(said.contains("optimizer: nesterov") && said.contains("optimizer.momentum = 0.9"), "{said}");
}

gpu_test!(updates_on_a_gpu_are_those_of_the_cpu, {
    let device: Device = "cuda".parse().unwrap();
    for table in TABLES {
        let exact = run(table, Device::Cpu, DType::F64);
        // In bf16 the iteration of Muon rounds, and little else does.
        for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::BF16, if table.contains("muon") { 2e-2 } else { 1e-5 })]
        {
            for (i, (found, exact)) in run(table, device, dtype).iter().zip(&exact).enumerate() {
                let off = distance(found, exact);
                assert!(off < tolerance, "{table}: buffer {i} in {dtype:?} is {off:e} from the CPU's");
            }
        }
    }
});

const RECIPE: &str = r#"
name = "small"
steps = 40
[backbone]
plugin = "vit"
dim = 24
depth = 2
heads = 2
patch_size = 4
registers = 1
layer_scale = 0.5
pos_encoding = { plugin = "rope_box" }
[data]
plugin = "scenes"
size = 24
count = 32
[batch]
size = 8
[crops]
global_size = 16
local_size = 8
local_count = 2
[losses.dino]
head = { hidden = 24, bottleneck = 16, prototypes = 40, prototype_std = 0.1 }
[losses.ibot]
head = { hidden = 24, bottleneck = 16, prototypes = 32, prototype_std = 0.1 }
[teacher]
plugin = "ema"
momentum = 0.9
[optimizer]
freeze_last_layer_steps = 1
"#;

fn recipe(device: &str, precision: &str, table: &str) -> Resolved {
    let text = format!("device = \"{device}\"\nprecision = \"{precision}\"\n{RECIPE}{table}\n");
    Resolved::from_text(&text).unwrap_or_else(|e| panic!("{e}"))
}

fn start(resolved: &Resolved) -> (Learner, Pipeline) {
    let learner = Learner::new(&resolved.recipe).unwrap_or_else(|e| panic!("{e}"));
    let (data, _) = train::datasets(&resolved.recipe).unwrap();
    let spec = train::loader_spec(&resolved.recipe, &learner, 0);
    let spec = dinolab_core::data::LoaderSpec { device: Device::Cpu, dtype: DType::F32, ..spec };
    (learner, Pipeline::new(data, spec).unwrap())
}

fn steps(learner: &mut Learner, pipeline: &Pipeline, range: std::ops::Range<u64>) -> Vec<f64> {
    let step = |i| {
        let report = learner.step(i, &pipeline.step(i).unwrap().batches, false).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(report.non_finite, None, "step {i}");
        report.losses["loss/total"]
    };
    range.map(step).collect()
}

/// Everything that a checkpoint would hold, as bytes by name.
fn held(learner: &Learner) -> Vec<(String, Vec<u8>)> {
    let content = learner.content(0).unwrap();
    content.model.into_iter().chain(content.optimizer).map(|(name, t)| (name, t.as_bytes().to_vec())).collect()
}

fn a_resumed_run_has_the_bits_of_one_that_was_not_stopped(device: &str) {
    for table in ["", TABLES[2], TABLES[3], TABLES[4]] {
        let resolved = recipe(device, "auto", table);
        let (mut whole, pipeline) = start(&resolved);
        steps(&mut whole, &pipeline, 0..5);
        let (mut first, _) = start(&resolved);
        steps(&mut first, &pipeline, 0..3);
        let folder = tempfile::tempdir().unwrap();
        checkpoint::save(folder.path(), &first.content(3).unwrap(), 1).unwrap();
        let (checkpoint, _) = checkpoint::load_newest(folder.path()).unwrap().expect("one was saved");
        let names: Vec<&str> = checkpoint.optimizer.names().filter(|n| !n.starts_with("state.")).collect();
        let moments = resolved.recipe.optimizer.plugin.build(&mut ()).unwrap();
        let parameters = first.model().layout.specs().len();
        assert_eq!(names.len(), moments.moments().len() * parameters, "{table}: {names:?}");
        let mut second = Learner::from_checkpoint(&resolved.recipe, &checkpoint).unwrap_or_else(|e| panic!("{e}"));
        steps(&mut second, &pipeline, 3..5);
        assert!(held(&second) == held(&whole), "{table}");
    }
}

#[test]
fn a_run_with_any_optimizer_resumes_to_the_bit() {
    a_resumed_run_has_the_bits_of_one_that_was_not_stopped("cpu");
}

gpu_test!(a_run_with_any_optimizer_resumes_to_the_bit_on_a_gpu, {
    a_resumed_run_has_the_bits_of_one_that_was_not_stopped("cuda");
});

gpu_test!(steps_with_any_optimizer_are_recorded_and_equal_the_cpu, {
    for table in [TABLES[2], TABLES[3], TABLES[4]] {
        let of = |device: &str| {
            let (mut learner, pipeline) = start(&recipe(device, "f32", table));
            let losses = steps(&mut learner, &pipeline, 0..5);
            let recorded = (learner.eager_reason().map(String::from), learner.recorded_nodes().len());
            (losses, learner.weights().student.to_f64_vec(), recorded)
        };
        let ((gpu, student, recorded), (cpu, exact, _)) = (of("cuda"), of("cpu"));
        assert_eq!(recorded, (None, 1), "{table}");
        for (a, b) in gpu.iter().zip(&cpu) {
            assert!((a - b).abs() < 1e-3 * b.abs(), "{table}: {gpu:?}, {cpu:?}");
        }
        assert!(distance(&student, &exact) < 1e-3, "{table}: {:e}", distance(&student, &exact));
    }
});

#[test]
fn a_run_counts_the_moments_that_its_optimizer_keeps() {
    let memory = |table: &str| {
        let cost = cost::cost(&recipe("cpu", "f32", table).recipe).unwrap();
        let of = |name: &str| cost.memory.iter().find(|(part, _)| part.starts_with(name)).map_or(0.0, |(_, b)| *b);
        of("optimizer") / of("student")
    };
    assert_eq!([TABLES[0], TABLES[1], TABLES[3], TABLES[4]].map(memory), [2.0, 1.0, 0.0, 2.0]);
}

#[test]
fn gradients_beyond_an_optimizers_reach_are_not_taken() {
    let resolved = recipe("cpu", "f32", "plugin = \"sgd\"\nclip_grad = 0.0");
    let (mut learner, pipeline) = start(&resolved);
    steps(&mut learner, &pipeline, 0..1);
    let moment = Device::Cpu.with(|| Tensor::full(learner.weights().student.shape(), DType::F32, 3e38)).unwrap();
    learner.weights_mut().moments[0].copy_from(&moment).unwrap();
    let before = held(&learner);
    let report = learner.step(1, &pipeline.step(1).unwrap().batches, false).unwrap();
    assert!(report.non_finite.expect("3e38 is near the end").contains("the update of the weights"));
    assert!(held(&learner) == before);
}

#[test]
fn a_momentum_may_be_a_schedule() {
    let table = "plugin = \"sgd\"\nmomentum = { plugin = \"linear_warmup\", peak = 0.8, warmup_steps = 4 }";
    let plugin = entry(table).plugin.build(&mut ()).unwrap();
    let at = |step| plugin.numbers(At { step, total: 10 }, 1)[0];
    assert_eq!((at(0), at(2), at(9)), (0.0, 0.4, 0.8));
    assert_eq!(plugin.moments(), ["momentum_buffer"]);
}
