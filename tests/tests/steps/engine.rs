//! What whole steps hold to: losses keep their state, nothing that is not finite gets into the weights, parts of a batch
//! equal the whole, and nothing is computed that nobody asked for.

use std::sync::atomic::{AtomicUsize, Ordering};

use dinolab_core::checkpoint;
use dinolab_core::contract::{
    At, Backbone, BackboneContext, Cost, Crops, Features, Grid, Loss, LossValue, Mode, Needs, Outputs, Schedule,
    Scheduler, StateSpec, StepContext,
};
use dinolab_core::data::{Batch, Masks, Pipeline};
use dinolab_core::params::{Init, ParamId, Params};
use dinolab_core::recipe::{Overrides, RawRecipe};
use dinolab_core::resolved::Resolved;
use dinolab_core::step::{Learner, Report};
use dinolab_core::{plugin, train, DType, Device, Result, Tensor};
use dinolab_plugins as _;
use dinolab_tests::gpu_test;
use serde::{Deserialize, Serialize};

/// Distance of the CLS tokens from their running mean, which is the loss's state; it has no head.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
struct RunningMean {}

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
struct Once {
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
struct Size {
    /// The factor.
    #[serde(default = "one")]
    scale: Schedule,
}

fn one() -> Schedule {
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
struct SickState {
    /// The schedule.
    growth: Schedule,
}

impl Loss for SickState {
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

plugin!(Loss, "sick_state", SickState);

/// The mean square of the CLS tokens times a number of the host; at one step it makes other numbers there as well.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
struct Crowd {
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
static LOOKED: AtomicUsize = AtomicUsize::new(0);

/// One linear layer over patches that counts how often it is run as a teacher.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
struct Watched {}

#[derive(Debug)]
struct WatchedModel(ParamId);

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

const BASE: &str = r#"
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

const HEADS: &str = r#"
[losses.dino]
head = { hidden = 24, bottleneck = 16, prototypes = 40, prototype_std = 0.1 }
[losses.ibot]
head = { hidden = 24, bottleneck = 16, prototypes = 32, prototype_std = 0.1 }
"#;

/// A recipe with more tables, and keys that are set beside: `a.b=c`, one a line.
fn recipe(sets: &str, tables: &str) -> Resolved {
    resolve(&format!("{BASE}\n{tables}"), sets).unwrap_or_else(|e| panic!("{e}"))
}

fn resolve(text: &str, sets: &str) -> Result<Resolved> {
    let sets = sets.lines().map(|line| line.replacen(" = ", "=", 1)).filter(|line| !line.is_empty()).collect();
    Resolved::of(RawRecipe::from_text(text)?.with(&Overrides { sets, env: false })?)
}

/// A learner and what makes its batches.
fn start(resolved: &Resolved) -> (Learner, Pipeline) {
    let learner = Learner::new(&resolved.recipe).unwrap_or_else(|e| panic!("{e}"));
    let pipeline = pipeline(resolved, &learner);
    (learner, pipeline)
}

fn pipeline(resolved: &Resolved, learner: &Learner) -> Pipeline {
    let (data, _) = train::datasets(&resolved.recipe).unwrap();
    let spec = train::loader_spec(&resolved.recipe, learner, 0);
    Pipeline::new(data, dinolab_core::data::LoaderSpec { device: Device::Cpu, dtype: DType::F32, ..spec }).unwrap()
}

fn step(learner: &mut Learner, pipeline: &Pipeline, step: u64) -> Report {
    learner.step(step, &pipeline.step(step).unwrap().batches, false).unwrap_or_else(|e| panic!("{e}"))
}

/// Everything that a checkpoint would hold, as bytes by name.
fn held(learner: &Learner) -> Vec<(String, Vec<u8>)> {
    let content = learner.content(0).unwrap();
    content.model.into_iter().chain(content.optimizer).map(|(name, t)| (name, t.as_bytes().to_vec())).collect()
}

/// The learner of the checkpoint that one would write after `step` steps.
fn resumed(resolved: &Resolved, learner: &Learner, step: u64) -> Learner {
    let folder = tempfile::tempdir().unwrap();
    checkpoint::save(folder.path(), &learner.content(step).unwrap(), checkpoint::Keep::newest(1)).unwrap();
    let (checkpoint, _) = checkpoint::load_newest(folder.path()).unwrap().expect("one was saved");
    Learner::from_checkpoint(&resolved.recipe, &checkpoint).unwrap_or_else(|e| panic!("{e}"))
}

fn a_headless_loss_keeps_its_state(device: &str) {
    let first = format!("device = \"{device}\"\nprecision = \"f32\"");
    // A second loss with a state, and a head: buffers of one must not become those of the other.
    let losses = "[losses.running_mean]\n[losses.dino]\nhead = { hidden = 24, bottleneck = 16, prototypes = 24 }\n\
        centering = \"softmax\"";
    let resolved = recipe(&first, losses);
    let (mut whole, pipeline) = start(&resolved);
    let (mut first, _) = start(&resolved);
    for i in 0..5 {
        step(&mut whole, &pipeline, i);
    }
    for i in 0..3 {
        step(&mut first, &pipeline, i);
    }
    let state = |learner: &Learner, name: &str| -> Vec<f64> {
        let found = learner.content(0).unwrap().optimizer.into_iter().find(|(n, _)| n == name);
        found.unwrap_or_else(|| panic!("no {name}")).1.to_f64_vec()
    };
    assert_eq!(state(&first, "state.running_mean.calls"), [3.0]);
    assert!(state(&first, "state.running_mean.mean").iter().any(|x| *x != 0.0));
    assert!(state(&first, "state.dino.center") != state(&first, "state.running_mean.mean"));
    let mut second = resumed(&resolved, &first, 3);
    for i in 3..5 {
        step(&mut second, &pipeline, i);
    }
    assert!(held(&second) == held(&whole), "a resumed run has the bits of an uninterrupted one");
    assert_eq!(state(&second, "state.running_mean.calls"), [5.0]);
}

#[test]
fn a_loss_without_a_head_keeps_its_state_and_resumes_with_it() {
    a_headless_loss_keeps_its_state("cpu");
}

gpu_test!(a_loss_without_a_head_keeps_its_state_on_a_gpu, {
    a_headless_loss_keeps_its_state("cuda");
});

#[test]
fn every_part_of_a_batch_sees_the_state_that_the_one_before_left() {
    let resolved = recipe("device = \"cpu\"\nbatch.micro_batches = 4", "[losses.running_mean]");
    let (mut learner, pipeline) = start(&resolved);
    step(&mut learner, &pipeline, 0);
    let calls = learner.content(0).unwrap().optimizer.into_iter().find(|(name, _)| name == "state.running_mean.calls");
    assert_eq!(calls.expect("a state").1.to_f64_vec(), [4.0]);
}

/// Steps 0 to 2, of which the second is refused for `what`: nothing of it stays, and the third is taken.
fn the_second_step_is_refused(resolved: &Resolved, what: &str) {
    let (mut learner, pipeline) = start(resolved);
    assert_eq!(step(&mut learner, &pipeline, 0).non_finite, None);
    let before = held(&learner);
    let report = step(&mut learner, &pipeline, 1);
    let said = report.non_finite.unwrap_or_else(|| panic!("step 1 is taken: {:?}", report.grad_norms));
    assert!(said.contains(what), "{said}");
    assert!(held(&learner) == before, "a step that is refused changes nothing");
    assert_eq!(learner.skipped(), 1);
    for i in 2..5 {
        assert_eq!(step(&mut learner, &pipeline, i).non_finite, None, "step {i}");
    }
    assert!(held(&learner) != before);
    let finite = |(name, tensor): &(String, Tensor)| {
        let all = tensor.to_f64_vec().iter().all(|x| x.is_finite());
        assert!(all, "{name}");
    };
    let content = learner.content(5).unwrap();
    content.model.iter().chain(&content.optimizer).for_each(finite);
}

fn refusals(device: &str) {
    let first = format!("device = \"{device}\"\nprecision = \"f32\"\noptimizer.clip_grad = 0.0");
    let once = |value: f64| format!("{{ plugin = \"once\", at_step = 1, value = {value:e} }}");
    let jump = |value: f64| format!("[losses.size]\nscale = {}", once(value));
    the_second_step_is_refused(&recipe(&first, &jump(1e20)), "loss/size");
    // The gradient is a number, and its square is none.
    the_second_step_is_refused(&recipe(&first, &jump(3e12)), "update of the weights by a gradient of length");
    let state = format!("[losses.sick_state]\ngrowth = {}", once(1e20));
    the_second_step_is_refused(&recipe(&first, &state), "the state memory of sick_state");
}

#[test]
fn a_step_that_would_leave_the_finite_numbers_changes_nothing_and_the_next_is_taken() {
    refusals("cpu");
}

gpu_test!(a_step_that_would_leave_the_finite_numbers_changes_nothing_on_a_gpu, {
    refusals("cuda");
});

gpu_test!(a_recorded_step_keeps_the_numbers_of_the_host_that_it_reads, {
    let after = |count: usize| {
        let first = "device = \"cuda\"\nprecision = \"f32\"";
        let (mut learner, pipeline) = start(&recipe(first, &format!("[losses.crowd]\nat_step = 2\ncount = {count}")));
        for i in 0..6 {
            // The third runs eagerly, as its health is measured.
            learner.step(i, &pipeline.step(i).unwrap().batches, i == 2).unwrap_or_else(|e| panic!("{e}"));
        }
        assert_eq!((learner.eager_reason(), learner.recorded_nodes().len()), (None, 1));
        held(&learner)
    };
    // More than are kept on the device; then fewer, which the replays that come after must not write to.
    let (many, few) = (after(5000), after(3000));
    assert!(many == few, "numbers of another step came where those of the recorded one were");
    assert!(after(0) == few, "a replay wrote to numbers of the host");
});

fn moments_too_large_for_the_rates(device: &str) {
    let resolved = recipe(&format!("device = \"{device}\"\nprecision = \"f32\""), HEADS);
    let (mut learner, pipeline) = start(&resolved);
    let moments = Device::Cpu.with(|| Tensor::full(learner.weights().moments[0].shape(), DType::F32, 1e35)).unwrap();
    learner.weights_mut().moments[0].copy_from(&moments).unwrap();
    let before = held(&learner);
    let said = step(&mut learner, &pipeline, 0).non_finite.expect("1e35 / 1e-8 is not finite");
    assert!(said.contains("the update of the weights"), "{said}");
    assert!(held(&learner) == before);
}

#[test]
fn moments_that_are_too_large_for_the_rates_do_not_reach_the_weights() {
    moments_too_large_for_the_rates("cpu");
}

gpu_test!(moments_that_are_too_large_for_the_rates_do_not_reach_the_weights_on_a_gpu, {
    moments_too_large_for_the_rates("cuda");
});

#[test]
fn weights_that_are_not_finite_are_named_before_they_are_used() {
    let resolved = recipe("device = \"cpu\"", HEADS);
    let (mut learner, pipeline) = start(&resolved);
    let name = "backbone.blocks.1.norm1.weight";
    let at = learner.model().layout.find(name).expect("a parameter").offset;
    for (bad, role) in [(f32::NAN, "student"), (f32::INFINITY, "teacher")] {
        let weights = learner.weights_mut();
        let flat = if role == "student" { &mut weights.student } else { weights.teacher.as_mut().unwrap() };
        let put = |numbers: &mut Tensor, x| Ok(std::mem::replace(&mut numbers.as_mut_slice::<f32>()[at + 3], x));
        let good = flat.change(|numbers| put(numbers, bad)).unwrap();
        let folder = tempfile::tempdir().unwrap();
        checkpoint::save(folder.path(), &learner.content(1).unwrap(), checkpoint::Keep::newest(1)).unwrap();
        let error = learner.step(0, &pipeline.step(0).unwrap().batches, false).unwrap_err().to_string();
        assert!(error.contains(&format!("{role}.{name}")), "{error}");
        let (checkpoint, _) = checkpoint::load_newest(folder.path()).unwrap().expect("one was saved");
        let error = Learner::from_checkpoint(&resolved.recipe, &checkpoint).err().expect("a NaN in it").to_string();
        assert!(error.contains(&format!("{role}.{name}")), "{error}");
        let weights = learner.weights_mut();
        let flat = if role == "student" { &mut weights.student } else { weights.teacher.as_mut().unwrap() };
        flat.change(|numbers| put(numbers, good)).unwrap();
    }
}

#[test]
fn an_eps_that_is_nothing_in_the_types_of_the_step_is_refused_by_name() {
    for eps in ["1e-46", "0.0", "1e-39", "-1.0"] {
        let sets = format!("device = \"cpu\"\noptimizer.eps = {eps}");
        let error = match resolve(&format!("{BASE}\n{HEADS}"), &sets) {
            Ok(resolved) => Learner::new(&resolved.recipe).err().expect("refused").to_string(),
            Err(error) => error.to_string(),
        };
        assert!(error.contains("optimizer.eps"), "{error}");
    }
}

#[test]
fn a_step_without_a_masked_patch_says_which_key_to_raise() {
    let resolved = recipe("device = \"cpu\"", HEADS);
    let (mut learner, pipeline) = start(&resolved);
    let batches = pipeline.step(0).unwrap().batches;
    let bare = |batch: &Batch| Batch {
        masks: Masks::from_rows(&vec![vec![false; 16]; 16], DType::F32).unwrap(),
        ..batch.clone()
    };
    let bare: Vec<Batch> = batches.iter().map(bare).collect();
    let error = learner.step(0, &bare, false).unwrap_err().to_string();
    assert!(error.contains("masking.probability") && error.contains("`ibot`"), "{error}");
}

/// ||a - b|| / ||b||.
fn distance(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (a.to_f64_vec(), b.to_f64_vec());
    let distance: f64 = a.iter().zip(&b).map(|(a, b)| (a - b).powi(2)).sum();
    (distance / b.iter().map(|b| b * b).sum::<f64>()).sqrt()
}

#[test]
fn parts_of_a_batch_train_as_the_whole_batch_does() {
    for (precision, centering, tolerance) in
        [("f64", "sinkhorn_knopp", 1e-10), ("f64", "softmax", 1e-10), ("f32", "sinkhorn_knopp", 1e-4)]
    {
        let train = |parts: usize| {
            let first = format!("device = \"cpu\"\nprecision = \"{precision}\"\nbatch.micro_batches = {parts}");
            let heads = HEADS.replace("}\n", &format!("}}\ncentering = \"{centering}\"\n"));
            let resolved = recipe(&first, &heads);
            let (mut learner, pipeline) = start(&resolved);
            let mut losses = Vec::new();
            for i in 0..6 {
                let report = step(&mut learner, &pipeline, i);
                losses.push(["loss/dino", "loss/ibot"].map(|name| report.losses[name]));
            }
            (
                learner.weights().student.to_host().unwrap(),
                learner.weights().teacher.as_ref().unwrap().to_host().unwrap(),
                losses,
            )
        };
        let (student, teacher, losses) = train(1);
        for parts in [2, 4, 8] {
            let (s, t, l) = train(parts);
            let off = distance(&s, &student).max(distance(&t, &teacher));
            assert!(off < tolerance, "{precision}, {centering}: {parts} parts are {off:e} from the whole");
            for (own, whole) in l.iter().flatten().zip(losses.iter().flatten()) {
                assert!((own - whole).abs() < tolerance * 100.0 * whole.abs(), "{parts} parts: {own}, {whole}");
            }
        }
    }
}

/// Learning goes on with the bits of a run that knows nothing of jumps, but for the step that jumps.
fn a_jump_is_not_taken(device: &str) {
    let first = format!("device = \"{device}\"\nprecision = \"f32\"");
    let losses = "[losses.size]\nweight = { plugin = \"once\", at_step = 6, value = 50.0 }\n[on_spike]\nfactor = 2.0\nwindow = 4";
    let resolved = recipe(&first, losses);
    let (mut learner, pipeline) = start(&resolved);
    for i in 0..6 {
        let report = step(&mut learner, &pipeline, i);
        assert!(report.spike.is_none() && report.non_finite.is_none(), "step {i}");
    }
    let before: Vec<_> = held(&learner).into_iter().filter(|(name, _)| !name.starts_with("spike.")).collect();
    let mut again = resumed(&resolved, &learner, 6);
    let report = step(&mut learner, &pipeline, 6);
    let limit = report.spike.expect("fifty times the loss");
    assert!(report.losses["loss/total"] > limit, "{limit}");
    let after: Vec<_> = held(&learner).into_iter().filter(|(name, _)| !name.starts_with("spike.")).collect();
    assert!(after == before, "a step that is not taken changes nothing");
    assert_eq!((learner.skipped(), learner.spikes()), (1, 1));
    assert_eq!(step(&mut again, &pipeline, 6).spike, Some(limit), "a resumed run compares with the same losses");
    for i in 7..9 {
        assert_eq!(step(&mut learner, &pipeline, i).spike, None);
        step(&mut again, &pipeline, i);
    }
    assert!(held(&again) == held(&learner));
    let mut late = resumed(&resolved, &learner, 9);
    assert_eq!((late.skipped(), late.spikes()), (1, 1));
    step(&mut learner, &pipeline, 9);
    step(&mut late, &pipeline, 9);
    assert!(held(&late) == held(&learner));
}

#[test]
fn a_loss_that_jumps_is_not_learned_from_and_a_resumed_run_agrees() {
    a_jump_is_not_taken("cpu");
}

gpu_test!(a_loss_that_jumps_is_not_learned_from_on_a_gpu, {
    a_jump_is_not_taken("cuda");
});

#[test]
fn the_teacher_runs_only_when_something_asks_for_it() {
    let start_of = BASE.find("[backbone]").unwrap();
    let end_of = BASE.find("[data]").unwrap();
    let base = format!("{}[backbone]\nplugin = \"watched\"\n{}", &BASE[..start_of], &BASE[end_of..]);
    let looks = |losses: &str, health: bool| {
        let resolved = resolve(&format!("{base}\n{losses}"), "device = \"cpu\"").unwrap_or_else(|e| panic!("{e}"));
        let (mut learner, pipeline) = start(&resolved);
        let before = LOOKED.load(Ordering::Relaxed);
        learner.step(0, &pipeline.step(0).unwrap().batches, health).unwrap();
        LOOKED.load(Ordering::Relaxed) - before
    };
    assert_eq!(looks("[losses.koleo]", false), 0, "KoLeo looks at the student alone");
    assert_eq!(looks("[losses.koleo]", true), 1, "health is measured on the teacher");
    assert_eq!(looks("[losses.koleo]\n[losses.dino]\nhead = { hidden = 4, bottleneck = 4, prototypes = 8 }", false), 1);
    let gram = "[losses.gram]\n[teachers.gram]\nplugin = \"gram_anchor\"";
    assert_eq!(looks(gram, false), 1, "the Gram teacher, and no other");
}

#[test]
fn names_do_not_decide_how_the_optimizer_treats_a_parameter() {
    let rules = |name: &str| {
        let resolved = recipe(
            "device = \"cpu\"",
            &format!("[losses.{name}]\nplugin = \"dino\"\nhead = {{ hidden = 8, bottleneck = 8, prototypes = 8 }}"),
        );
        let learner = Learner::new(&resolved.recipe).unwrap();
        let heads = learner.param_rules().iter().filter(|rule| rule.name.starts_with(&format!("{name}_head.")));
        heads.map(|r| (r.lr_multiplier, r.decays, r.last_layer)).collect::<Vec<_>>()
    };
    let plain = rules("dino");
    assert!(plain.iter().any(|(_, decays, _)| *decays) && plain.iter().filter(|(.., last)| *last).count() == 1);
    for name in ["norm_matching", "gamma_bias", "patch_embed_loss", "last_layer"] {
        assert_eq!(rules(name), plain, "{name}");
    }
}

/// The reference's rule, which goes by names: right for its own.
#[test]
fn shipped_models_are_treated_as_the_reference_treats_them() {
    let backbones = [
        "plugin = \"vit\"\npreset = \"vit_tiny_test\"\nlayer_scale = 1.0\nuntie_cls_and_patch_norms = true",
        "plugin = \"vit\"\npreset = \"vit_tiny_test\"\nffn = \"swiglu\"\npos_encoding = { plugin = \"learned_absolute\" }",
        "plugin = \"vit\"\npreset = \"vit_tiny_test\"\nnorm = \"rms_norm\"\npos_encoding = { plugin = \"relative_bias_box\" }",
        "plugin = \"convnext\"\nlayer_scale = 1e-6",
    ];
    for backbone in backbones {
        let text = format!(
            "name = \"x\"\nsteps = 1\ndevice = \"cpu\"\n[backbone]\n{backbone}\n[data]\nplugin = \"scenes\"\n[crops]\n\
             global_size = 64\nlocal_size = 32\n[losses.dino]\nhead = {{ hidden = 8, bottleneck = 8, prototypes = 8 }}\n\
             [teacher]\nplugin = \"ema\"\n[optimizer]\nlayerwise_decay = 1.0"
        );
        let resolved = Resolved::from_text(&text).unwrap_or_else(|e| panic!("{backbone}: {e}"));
        let learner = Learner::new(&resolved.recipe).unwrap();
        for rule in learner.param_rules() {
            let name = &rule.name;
            let plain = name.ends_with("bias") || name.contains("norm") || name.contains("gamma");
            assert_eq!(rule.decays, !plain, "{name}");
            assert_eq!(rule.last_layer, name.contains("last_layer"), "{name}");
            assert_eq!(rule.lr_multiplier == 0.2, name.contains("patch_embed"), "{name}: {}", rule.lr_multiplier);
        }
    }
}

#[test]
fn a_head_may_have_no_bias_and_the_last_layers_a_rate_of_their_own() {
    let heads = "[losses.dino]\nhead = { hidden = 24, bottleneck = 16, prototypes = 40, bias = false }";
    let moved = |rate: &str| {
        let resolved = recipe(&format!("device = \"cpu\"\noptimizer.weight_decay = 0.0\n{rate}"), heads);
        let (mut learner, pipeline) = start(&resolved);
        let layout = learner.model().layout.clone();
        assert!(layout.specs().iter().all(|s| !s.name.starts_with("dino_head.mlp") || s.name.ends_with("weight")));
        let of = |learner: &Learner| {
            ["dino_head.last_layer.weight", "dino_head.mlp.0.weight"].map(|name| {
                let spec = layout.find(name).expect("a head's parameter");
                let values = learner.weights().student.view(spec.offset, &spec.shape).unwrap().to_f64_vec();
                Tensor::from_slice(&values, &spec.shape).unwrap()
            })
        };
        let before = of(&learner);
        step(&mut learner, &pipeline, 0);
        let after = of(&learner);
        [0, 1].map(|i| distance(&after[i], &before[i]))
    };
    let [last, first] = moved("");
    let [slow, same] = moved("optimizer.last_layer_lr = 1e-4");
    assert_eq!(first, same);
    assert!((last / slow - 10.0).abs() < 1e-2, "{last} and {slow}");
    let scheduled = "optimizer.last_layer_lr = { plugin = \"linear_warmup\", peak = 1e-3, warmup_steps = 10 }";
    assert!(moved(scheduled)[0] < last);
    assert_eq!(moved("optimizer.last_layer_lr = 1e-4\noptimizer.freeze_last_layer_steps = 1")[0], 0.0);
}

#[test]
fn turning_gram_on_changes_nothing_that_the_student_sees_or_learns_first() {
    let gram = "[losses.gram]\nenabled = ENABLED\n[teachers.gram]\nplugin = \"gram_anchor\"\ncrop_size = 24";
    for first in ["", "crops.teacher_without_distortion = true\n", "crops.local_from_global = true\n"] {
        let of = |enabled: &str| {
            let resolved = recipe(
                &format!("device = \"cpu\"\n{first}"),
                &format!("{HEADS}\n{}", gram.replace("ENABLED", enabled)),
            );
            let (mut learner, pipeline) = start(&resolved);
            let batch = pipeline.step(0).unwrap().batches.remove(0);
            assert_eq!(batch.teacher.is_some(), enabled == "true");
            let report = learner.step(0, std::slice::from_ref(&batch), false).unwrap();
            let pixels = [Some(&batch.global), batch.local.as_ref()].map(|t| t.expect("crops").as_bytes().to_vec());
            (pixels, report.losses["loss/dino"].to_bits(), report.losses["loss/ibot"].to_bits())
        };
        assert!(of("true") == of("false"), "{first}");
    }
}

fn without_a_teacher_none_is_kept(device: &str, precisions: [&str; 2]) {
    let bare = BASE.replace("[teacher]\nplugin = \"ema\"\nmomentum = 0.9\n", "");
    let alone = "[losses.koleo]\n[losses.vicreg]\nprojector = { hidden = 8, output = 4, layers = 1 }\n";
    for precision in precisions {
        let sets = &format!("device = \"{device}\"\nprecision = \"{precision}\"");
        let resolved = resolve(&format!("{bare}\n{alone}"), sets).unwrap_or_else(|e| panic!("{e}"));
        let (mut learner, pipeline) = start(&resolved);
        (0..3).for_each(|i| drop(step(&mut learner, &pipeline, i)));
        assert!(learner.weights().teacher.is_none());
        assert!(learner.content(3).unwrap().model.iter().all(|(name, _)| name.starts_with("student.")));
        // With a teacher that keeps nothing of itself it would be the same.
        let with = resolve(&format!("{bare}\n[teacher]\nplugin = \"ema\"\nmomentum = 0.0\n{alone}"), sets).unwrap();
        let (mut follows, pipeline) = start(&with);
        (0..3).for_each(|i| drop(step(&mut follows, &pipeline, i)));
        let pixels = pipeline.step(3).unwrap().batches[0].global.cast(learner.features_dtype()).unwrap();
        let [own, taught] = [&learner, &follows].map(|l| l.teacher_features(&pixels).unwrap().cls.to_f64_vec());
        assert_eq!(own, taught);
        let resumed = resumed(&resolved, &learner, 3);
        assert_eq!(held(&resumed), held(&learner));
    }
}

#[test]
fn without_a_teacher_the_student_is_evaluated() {
    without_a_teacher_none_is_kept("cpu", ["f32", "f64"]);
    let bare = BASE.replace("[teacher]\nplugin = \"ema\"\nmomentum = 0.9\n", "");
    let error = resolve(&format!("{bare}\n{HEADS}"), "device = \"cpu\"").expect_err("refused").to_string();
    for part in ["losses.dino", "losses.ibot", "learns from a teacher", "plugin = \"ema\""] {
        assert!(error.contains(part), "{part}: {error}");
    }
}

gpu_test!(without_a_teacher_the_student_is_evaluated_on_the_gpu, {
    without_a_teacher_none_is_kept("cuda", ["f32", "bf16"]);
});
