//! Optimizers at work: updates alone, by gradients that are given, and runs of a small recipe.

use std::sync::Arc;

use dinolab_core::contract::{At, Direction, Optimizer, ParamUpdate, Reach};
use dinolab_core::data::Pipeline;
use dinolab_core::params::{Init, Layout, ParamBuilder, ParamRole, ParamSpec};
use dinolab_core::recipe::OptimizerEntry;
use dinolab_core::resolved::Resolved;
use dinolab_core::step::{Flat, Learner, Updates};
use dinolab_core::testing::{contracts, normal};
use dinolab_core::{checkpoint, ops, plugin, train, DType, Device, Result, Tensor};
use dinolab_plugins as _;

/// Gives back the tensors that it was handed: the weight as its direction, the last gradients as its moments.
#[derive(Debug, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
struct Echo {}

impl Optimizer for Echo {
    fn moments(&self) -> &[&'static str] {
        &["last", "before"]
    }
    fn direction(&self, param: &ParamUpdate<'_>) -> Result<Direction> {
        let moments = vec![param.gradient.clone(), param.moments[0].clone()];
        Ok(Direction { direction: param.weight.clone(), moments })
    }
    fn reach(&self, _: &ParamSpec, _: At, _: u64) -> Reach {
        Reach { memory: 0.0, share: 1.0, gain: 0.0, most: 1e3 }
    }
}

plugin!(Optimizer, "echo", Echo);

/// What is wrong with [`Faulty`].
#[derive(Debug, PartialEq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Fault {
    OneMoment,
    Shape,
    NoReach,
    TooFar,
    Restless,
}

/// An optimizer that breaks its contract.
#[derive(Debug, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
struct Faulty {
    /// How.
    fault: Fault,
}

impl Optimizer for Faulty {
    fn moments(&self) -> &[&'static str] {
        &["one"]
    }
    fn adamw(&self, _: &ParamSpec) -> Option<ops::AdamW> {
        (self.fault == Fault::OneMoment).then_some(ops::AdamW { beta1: 0.9, beta2: 0.9, eps: 1e-8 })
    }
    fn direction(&self, param: &ParamUpdate<'_>) -> Result<Direction> {
        let direction = match self.fault {
            Fault::Shape => param.gradient.sum()?,
            Fault::TooFar => param.gradient.scale(1e3)?,
            Fault::Restless => param.gradient.shift(0.1)?,
            _ => param.gradient.clone(),
        };
        Ok(Direction { direction, moments: vec![param.gradient.clone()] })
    }
    fn reach(&self, _: &ParamSpec, _: At, _: u64) -> Reach {
        let most = if self.fault == Fault::NoReach { f64::INFINITY } else { 0.1 };
        Reach { memory: 0.0, share: 1.0, gain: 1.0, most }
    }
}

plugin!(Optimizer, "faulty", Faulty);

/// Each optimizer with its own keys.
pub const TABLES: [&str; 6] = [
    "plugin = \"adamw\"\nbetas = [0.8, 0.95]\neps = 1e-3",
    "plugin = \"sgd\"",
    "plugin = \"sgd\"\nmomentum = 0.7\nnesterov = true",
    "plugin = \"sgd\"\nmomentum = 0.0",
    "plugin = \"muon\"",
    "plugin = \"muon\"\nmomentum = 0.8\nnesterov = false\nns_steps = 3\nbetas = [0.8, 0.95]\neps = 1e-3",
];
/// [`Echo`] without anything else that changes a number.
pub const ECHO: &str = "plugin = \"echo\"\nlr = 0.1\nweight_decay = 0.0\nclip_grad = 0.0\npatch_embed_lr_mult = 1.0\nlayerwise_decay = 1.0";
/// AdamW with moments in eight bits.
pub const EIGHT_BIT: &str = "plugin = \"adamw\"\neps = 1e-3\nmoments = \"8bit\"";
/// Rates that differ from layer to layer, decay and clipping.
pub const COMMON: &str = "lr = 0.05\nweight_decay = 0.3\nclip_grad = 2.5\nlayerwise_decay = 0.7\n";
pub const STEPS: u64 = 6;
pub const DEPTH: usize = 1;

pub fn entry(table: &str) -> OptimizerEntry {
    let common = if table == ECHO { "" } else { COMMON };
    toml::from_str(&format!("{common}{table}")).unwrap_or_else(|e| panic!("{table}: {e}"))
}

pub fn updates(table: &str, layout: &Arc<Layout>, device: Device, dtype: DType) -> Updates {
    Updates::new(&entry(table), layout, DEPTH, STEPS, (device, dtype)).unwrap_or_else(|e| panic!("{table}: {e}"))
}

/// The gradients of a step: zero between parameters.
pub fn gradients(layout: &Layout, step: u64) -> Vec<f64> {
    let drawn = normal(11, step, &[layout.len()]).to_f64_vec();
    let mut gradients = vec![0.0; layout.len()];
    layout.specs().iter().for_each(|s| gradients[s.range()].copy_from_slice(&drawn[s.range()]));
    gradients
}

/// A matrix that is large enough for moments in eight bits and ends inside a block, between one that is not, a vector and
/// prototypes.
pub fn large() -> Arc<Layout> {
    let mut p = ParamBuilder::new();
    let normal = Init::Normal(0.3);
    p.scope("backbone", |p| {
        p.add("small", &[8, 9], normal);
        p.add("large", &[67, 65], normal);
        p.add_plain("bias", &[4097], normal);
        p.add("larger", &[80, 90], normal);
    });
    p.scope("head", |p| p.role(ParamRole::LastLayer, |p| p.add("last", &[70, 65], normal)));
    p.finish()
}

/// Student and teacher after all steps on [`large`], and the run.
pub fn run_large(table: &str, device: Device, dtype: DType) -> ([Vec<f64>; 2], Updates) {
    let layout = large();
    let mut run = updates(table, &layout, device, dtype);
    (0..STEPS).for_each(|step| run.update(step, &gradients(&layout, step), 0.6).unwrap_or_else(|e| panic!("{e}")));
    let weights = run.weights();
    ([&weights.student, weights.teacher.as_ref().unwrap()].map(Flat::to_f64_vec), run)
}

/// Student, teacher and moments after all steps.
pub fn run(table: &str, device: Device, dtype: DType) -> Vec<Vec<f64>> {
    let layout = contracts::parameters();
    let mut run = updates(table, &layout, device, dtype);
    (0..STEPS).for_each(|step| run.update(step, &gradients(&layout, step), 0.6).unwrap_or_else(|e| panic!("{e}")));
    let weights = run.weights();
    let models = [&weights.student, weights.teacher.as_ref().unwrap()].map(Flat::to_f64_vec);
    models.into_iter().chain(weights.moments.iter().map(Tensor::to_f64_vec)).collect()
}

/// ||a - b|| / ||b||.
pub fn distance(a: &[f64], b: &[f64]) -> f64 {
    let length = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    length(&mut a.iter().zip(b).map(|(a, b)| a - b)) / length(&mut b.iter().copied()).max(1e-9)
}

pub const RECIPE: &str = r#"
name = "small"
steps = 40
[backbone]
plugin = "vit"
dim = 32
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

pub fn recipe(device: &str, precision: &str, table: &str) -> Resolved {
    let text = format!("device = \"{device}\"\nprecision = \"{precision}\"\n{RECIPE}{table}\n");
    Resolved::from_text(&text).unwrap_or_else(|e| panic!("{e}"))
}

pub fn start(resolved: &Resolved) -> (Learner, Pipeline) {
    let learner = Learner::new(&resolved.recipe).unwrap_or_else(|e| panic!("{e}"));
    let (data, _) = train::datasets(&resolved.recipe).unwrap();
    let spec = train::loader_spec(&resolved.recipe, &learner, 0);
    let spec = dinolab_core::data::LoaderSpec { device: Device::Cpu, dtype: DType::F32, ..spec };
    (learner, Pipeline::new(data, spec).unwrap())
}

pub fn steps(learner: &mut Learner, pipeline: &Pipeline, range: std::ops::Range<u64>) -> Vec<f64> {
    let step = |i| {
        let report = learner.step(i, &pipeline.step(i).unwrap().batches, false).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(report.non_finite, None, "step {i}");
        report.losses["loss/total"]
    };
    range.map(step).collect()
}

/// Everything that a checkpoint would hold, as bytes by name.
pub fn held(learner: &Learner) -> Vec<(String, Vec<u8>)> {
    let content = learner.content(0).unwrap();
    content.model.into_iter().chain(content.optimizer).map(|(name, t)| (name, t.as_bytes().to_vec())).collect()
}

pub fn a_resumed_run_has_the_bits_of_one_that_was_not_stopped(device: &str, tables: &[&str]) {
    for table in tables {
        let resolved = recipe(device, "auto", table);
        let (mut whole, pipeline) = start(&resolved);
        steps(&mut whole, &pipeline, 0..5);
        let (mut first, _) = start(&resolved);
        steps(&mut first, &pipeline, 0..3);
        let (_folder, checkpoint) = saved(&first, 3);
        let names: Vec<&str> = checkpoint.optimizer.names().filter(|n| !n.starts_with("state.")).collect();
        let moments = resolved.recipe.optimizer.plugin.build(&mut ()).unwrap();
        let parameters = first.model().layout.specs().len();
        assert_eq!(names.len(), moments.moments().len() * parameters, "{table}: {names:?}");
        let mut second = Learner::from_checkpoint(&resolved.recipe, &checkpoint).unwrap_or_else(|e| panic!("{e}"));
        steps(&mut second, &pipeline, 3..5);
        assert!(held(&second) == held(&whole), "{table}");
        // And so has another run that goes on from it.
        let (mut fork, new) = Learner::continued(&resolved.recipe, &checkpoint, &resolved.recipe).unwrap();
        assert!(new.is_empty(), "{table}: {new:?}");
        steps(&mut fork, &pipeline, 3..5);
        assert!(held(&fork) == held(&whole), "{table}");
    }
}

/// The learner's state after `step` steps as a checkpoint.
fn saved(learner: &Learner, step: u64) -> (tempfile::TempDir, checkpoint::Checkpoint) {
    let folder = tempfile::tempdir().unwrap();
    checkpoint::save(folder.path(), &learner.content(step).unwrap(), checkpoint::Keep::newest(1)).unwrap();
    let (checkpoint, _) = checkpoint::load_newest(folder.path()).unwrap().expect("one was saved");
    (folder, checkpoint)
}

pub fn moments_that_begin_in_a_fork_count_updates_from_there(device: &str) {
    const LR: f64 = 1e-3;
    let all = "lr = 1e-3\nweight_decay = 0.0\nclip_grad = 0.0";
    let adamw = recipe(device, "auto", &format!("plugin = \"adamw\"\n{all}"));
    let sgd = recipe(device, "auto", &format!("plugin = \"sgd\"\n{all}"));
    let muon = recipe(device, "auto", &format!("plugin = \"muon\"\n{all}"));
    let text = RECIPE.replace("[losses.ibot]", "[losses.ibot]\nenabled = false");
    let without_ibot = format!("device = \"{device}\"\n{text}plugin = \"adamw\"\n{all}\n");
    let without_ibot = Resolved::from_text(&without_ibot).unwrap_or_else(|e| panic!("{e}"));
    for (parent, own, new) in [(&without_ibot, &adamw, "ibot"), (&sgd, &adamw, ""), (&muon, &adamw, "")] {
        let (mut first, pipeline) = start(parent);
        steps(&mut first, &pipeline, 0..8);
        let (_folder, from) = saved(&first, 8);
        let (mut fork, notes) = Learner::continued(&own.recipe, &from, &parent.recipe).unwrap();
        assert_eq!(notes.len(), 1, "{notes:?}");
        let (_, pipeline) = start(own);
        let before = fork.weights().student.to_f64_vec();
        steps(&mut fork, &pipeline, 8..9);
        let after = fork.weights().student.to_f64_vec();
        // The first update of AdamW moves a weight by the learning rate. Corrected as if there had been eight before, it is
        // half of that; after a thousand it is three times as much.
        let specs = fork.model().layout.specs();
        let moved = specs.iter().filter(|s| s.name.starts_with(new));
        let most = moved.flat_map(|s| s.range()).map(|i| (after[i] - before[i]).abs()).fold(0.0, f64::max);
        assert!((0.99 * LR..1.01 * LR).contains(&most), "{new}: {most}");
        // The count is kept: by a resumed run, and by a fork of the fork.
        let (_folder, at_9) = saved(&fork, 9);
        let mut resumed = Learner::from_checkpoint(&own.recipe, &at_9).unwrap();
        let (mut again, notes) = Learner::continued(&own.recipe, &at_9, &own.recipe).unwrap();
        assert!(notes.is_empty(), "{notes:?}");
        for learner in [&mut fork, &mut resumed, &mut again] {
            steps(learner, &pipeline, 9..11);
        }
        assert!(held(&resumed) == held(&fork) && held(&again) == held(&fork), "{new}");
    }
}
