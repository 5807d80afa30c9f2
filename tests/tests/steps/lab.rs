//! What the tests of whole steps are made of: losses and a backbone that show what is done with them, recipes, and learners.

use std::sync::atomic::{AtomicUsize, Ordering};

use dinolab_core::checkpoint;
use dinolab_core::contract::{
    At, Backbone, BackboneContext, Cost, Crops, Features, Grid, Loss, LossValue, Mode, Needs, Outputs, Schedule,
    Scheduler, StateSpec, StepContext,
};
use dinolab_core::data::Pipeline;
use dinolab_core::params::{Init, ParamId, Params};
use dinolab_core::recipe::{Overrides, RawRecipe};
use dinolab_core::resolved::Resolved;
use dinolab_core::step::{Learner, Report};
use dinolab_core::{plugin, train, DType, Device, Result, Tensor};
use dinolab_plugins as _;
use serde::{Deserialize, Serialize};

/// Distance of the CLS tokens from their running mean, which is the loss's state; it has no head.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct RunningMean {}

impl Loss for RunningMean {
    fn needs(&self) -> Needs {
        Needs { teacher: false, min_batch: 1, ..Needs::default() }
    }

    fn state(&self) -> Vec<StateSpec> {
        vec![StateSpec { name: "mean", shape: vec![24] }, StateSpec { name: "calls", shape: vec![] }]
    }

    fn compute(&self, _: &Params<'_>, out: &Outputs<'_>, context: &StepContext<'_>) -> Result<LossValue> {
        let (mean, calls) = (context.state("mean")?, context.state("calls")?);
        let own = out.student.cls.detach().mean_axis(0)?;
        let mean = mean.scale(0.5)?.add(&own.cast(mean.dtype())?.scale(0.5)?)?;
        let far = out.student.cls.add_row(&mean.scale(-1.0)?.cast(out.student.cls.dtype())?)?;
        let loss = far.square()?.mean()?;
        Ok(LossValue::of(loss).with_state(vec![("calls", calls.shift(1.0)?), ("mean", mean)]))
    }
}

plugin!(Loss, "running_mean", RunningMean);

/// One, and another number at one step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Once {
    /// The step.
    at_step: u64,
    /// The number.
    value: f64,
}

impl Scheduler for Once {
    fn value(&self, at: At) -> f64 {
        if at.step == self.at_step {
            self.value
        } else {
            1.0
        }
    }
}

plugin!(Scheduler, "once", Once);

/// The mean square of the CLS tokens, which are scaled first.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Size {
    /// The factor.
    #[serde(default = "one")]
    scale: Schedule,
}

pub(super) fn one() -> Schedule {
    Schedule::constant(1.0)
}

impl Loss for Size {
    fn needs(&self) -> Needs {
        Needs { teacher: false, min_batch: 1, ..Needs::default() }
    }

    fn compute(&self, _: &Params<'_>, out: &Outputs<'_>, context: &StepContext<'_>) -> Result<LossValue> {
        let scale = context.scalar(&self.scale);
        out.student.cls.square()?.mean()?.mul(&scale)?.mul(&scale).map(LossValue::of)
    }
}

plugin!(Loss, "size", Size);

/// Keeps a number that grows by the cube of a schedule, which its loss does not show.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct GrowingState {
    /// The schedule.
    growth: Schedule,
}

impl Loss for GrowingState {
    fn needs(&self) -> Needs {
        Needs { teacher: false, min_batch: 1, ..Needs::default() }
    }

    fn state(&self) -> Vec<StateSpec> {
        vec![StateSpec { name: "memory", shape: vec![3] }]
    }

    fn compute(&self, _: &Params<'_>, out: &Outputs<'_>, context: &StepContext<'_>) -> Result<LossValue> {
        let growth = context.scalar(&self.growth);
        let memory = context.state("memory")?.shift(1.0)?.mul(&growth)?.mul(&growth)?.mul(&growth)?;
        Ok(LossValue::of(out.student.cls.square()?.mean()?).with_state(vec![("memory", memory)]))
    }
}

plugin!(Loss, "growing_state", GrowingState);

/// The mean square of the CLS tokens times a number of the host; at one step it makes other numbers there as well.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Crowd {
    /// The step.
    at_step: u64,
    /// How many.
    count: usize,
}

impl Loss for Crowd {
    fn needs(&self) -> Needs {
        Needs { teacher: false, min_batch: 1, ..Needs::default() }
    }

    fn compute(&self, _: &Params<'_>, out: &Outputs<'_>, context: &StepContext<'_>) -> Result<LossValue> {
        if context.at.step == self.at_step {
            (0..self.count).try_for_each(|i| Tensor::from_slice(&[i as f32], &[1]).map(drop))?;
        }
        let factor = Tensor::from_slice(&[0.75f32], &[])?;
        out.student.cls.square()?.mean()?.mul(&factor).map(LossValue::of)
    }
}

plugin!(Loss, "crowd", Crowd);

/// Forwards in evaluation of the backbone below.
pub(super) static LOOKED: AtomicUsize = AtomicUsize::new(0);

/// One linear layer over patches that counts how often it is run as a teacher.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Watched {}

#[derive(Debug)]
pub(super) struct WatchedModel(ParamId);

impl Watched {
    fn build(self, context: &mut BackboneContext<'_>) -> Result<Box<dyn Backbone>> {
        Ok(Box::new(WatchedModel(context.params.add("weight", &[8, 48], Init::TruncatedNormal(0.1)))))
    }
}

impl Backbone for WatchedModel {
    fn dim(&self) -> usize {
        8
    }

    fn patch_size(&self) -> usize {
        4
    }

    fn forward(&self, params: &Params<'_>, crops: &[Crops], mode: Mode<'_>) -> Result<Vec<Features>> {
        if matches!(mode, Mode::Eval) {
            LOOKED.fetch_add(1, Ordering::Relaxed);
        }
        let of = |c: &Crops| {
            let (b, h, w) = (c.pixels.dim(0), c.pixels.dim(2) / 4, c.pixels.dim(3) / 4);
            let rows = c.pixels.patchify(4)?.cast(params.dtype())?;
            let patches = rows.linear(&params.get(self.0), None)?.reshape(&[b, h * w, 8])?;
            let (cls, registers) = (patches.mean_axis(1)?, Tensor::zeros(&[b, 0, 8], params.dtype()));
            Ok(Features {
                cls,
                registers,
                prenorm: patches.clone(),
                patches,
                layers: vec![],
                grid: Grid { height: h, width: w },
            })
        };
        crops.iter().map(of).collect()
    }

    fn cost(&self, _: &[(usize, Grid)]) -> Cost {
        Cost::default()
    }
}

plugin!(Backbone, "watched", Watched, Watched::build);

pub(super) const BASE: &str = r#"
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
pos_encoding = { plugin = "rope_box", rescale = 2.0, jitter = 1.1 }
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
[teacher]
plugin = "ema"
momentum = 0.9
[optimizer]
lr = 1e-3
"#;

pub(super) const HEADS: &str = r#"
[losses.dino]
head = { hidden = 24, bottleneck = 16, prototypes = 40, prototype_std = 0.1 }
[losses.ibot]
head = { hidden = 24, bottleneck = 16, prototypes = 32, prototype_std = 0.1 }
"#;

/// A recipe with more tables, and keys that are set beside: `a.b=c`, one a line.
pub(super) fn recipe(sets: &str, tables: &str) -> Resolved {
    resolve(&format!("{BASE}\n{tables}"), sets).unwrap_or_else(|e| panic!("{e}"))
}

pub(super) fn resolve(text: &str, sets: &str) -> Result<Resolved> {
    let sets = sets.lines().map(|line| line.replacen(" = ", "=", 1)).filter(|line| !line.is_empty()).collect();
    Resolved::of(RawRecipe::from_text(text)?.with(&Overrides { sets, env: false })?)
}

/// A learner and what makes its batches.
pub(super) fn start(resolved: &Resolved) -> (Learner, Pipeline) {
    let learner = Learner::new(&resolved.recipe).unwrap_or_else(|e| panic!("{e}"));
    let pipeline = pipeline(resolved, &learner);
    (learner, pipeline)
}

pub(super) fn pipeline(resolved: &Resolved, learner: &Learner) -> Pipeline {
    let (data, _) = train::datasets(&resolved.recipe).unwrap();
    let spec = train::loader_spec(&resolved.recipe, learner, 0);
    Pipeline::new(data, dinolab_core::data::LoaderSpec { device: Device::Cpu, dtype: DType::F32, ..spec }).unwrap()
}

pub(super) fn step(learner: &mut Learner, pipeline: &Pipeline, step: u64) -> Report {
    learner.step(step, &pipeline.step(step).unwrap().batches, false).unwrap_or_else(|e| panic!("{e}"))
}

/// Everything that a checkpoint would hold, as bytes by name.
pub(super) fn held(learner: &Learner) -> Vec<(String, Vec<u8>)> {
    let content = learner.content(0).unwrap();
    content.model.into_iter().chain(content.optimizer).map(|(name, t)| (name, t.as_bytes().to_vec())).collect()
}

/// The learner of the checkpoint that one would write after `step` steps.
pub(super) fn resumed(resolved: &Resolved, learner: &Learner, step: u64) -> Learner {
    let folder = tempfile::tempdir().unwrap();
    checkpoint::save(folder.path(), &learner.content(step).unwrap(), checkpoint::Keep::newest(1)).unwrap();
    let (checkpoint, _) = checkpoint::load_newest(folder.path()).unwrap().expect("one was saved");
    Learner::from_checkpoint(&resolved.recipe, &checkpoint).unwrap_or_else(|e| panic!("{e}"))
}

/// ||a - b|| / ||b||.
pub(super) fn distance(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (a.to_f64_vec(), b.to_f64_vec());
    let distance: f64 = a.iter().zip(&b).map(|(a, b)| (a - b).powi(2)).sum();
    (distance / b.iter().map(|b| b * b).sum::<f64>()).sqrt()
}
