//! A step on several ranks is the step of one, to the bit; a run on several is the run of one, stopped and resumed on any number.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use dinolab_core::comm::{threads, Comm, Ranks};
use dinolab_core::contract::{ImageContext, ImageDraws, Loss, LossValue, Needs, Outputs, StepContext};
use dinolab_core::data::Pipeline;
use dinolab_core::params::Params;
use dinolab_core::recipe::{Overrides, RawRecipe};
use dinolab_core::resolved::Resolved;
use dinolab_core::step::{Learner, Peers, Report};
use dinolab_core::train::{self, Lead, Outcome, RunOptions, Silent};
use dinolab_core::{plugin, Error, Result};
use dinolab_plugins as _;
use dinolab_tests::recipes::LOSSES_OF_PARTS;
use serde::{Deserialize, Serialize};

/// Not finite at one step, for one image.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
struct Breaks {
    /// When.
    step: u64,
}

impl Loss for Breaks {
    fn needs(&self) -> Needs {
        Needs { teacher: false, min_batch: 1, ..Needs::default() }
    }

    fn draw_image(&self, context: &mut ImageContext<'_>) -> ImageDraws {
        ImageDraws { numbers: vec![f64::from(u8::from(context.image.place == 5))], tiles: Vec::new() }
    }

    fn compute(&self, _: &Params<'_>, out: &Outputs<'_>, context: &StepContext<'_>) -> Result<LossValue> {
        let loss = out.student.cls.square()?.mean()?;
        let here = out.image_draws.is_some_and(|draws| draws.to_f64_vec().contains(&1.0));
        let scale = if here && context.at.step == self.step { f64::INFINITY } else { 1.0 };
        loss.scale(scale).map(LossValue::of)
    }
}

plugin!(Loss, "breaks", Breaks);

const BASE: &str = r#"
name = "ranks"
steps = 6
device = "cpu"
[backbone]
plugin = "vit"
dim = 16
depth = 2
heads = 2
registers = 1
layer_scale = 1.0
drop_path = 0.25
patch_size = 4
[data]
plugin = "scenes"
size = 32
count = 24
classes = 4
[batch]
size = 16
micro_batches = 8
shards = 4
[crops]
global_size = 16
local_size = 8
local_count = 2
[teacher]
plugin = "ema"
momentum = 0.9
[optimizer]
lr = 1e-2
"#;
/// All that DINOv3 has, with both ways to centre, a teacher that is refreshed, and a step that is not taken.
const DINO: &str = r#"
[losses.dino]
head = { hidden = 24, bottleneck = 16, prototypes = 32, prototype_std = 0.1 }
[losses.ibot]
head = { hidden = 24, bottleneck = 16, prototypes = 32, prototype_std = 0.1 }
centering = "softmax"
[losses.koleo]
[losses.gram]
[losses.breaks]
step = 4
[teachers.gram]
plugin = "gram_anchor"
first_step = 1
refresh = { every = 2 }
crop_size = 24
"#;
/// Beside [`LOSSES_OF_PARTS`]: what hides patches.
const IBOT: &str = r#"
[losses.ibot]
head = { hidden = 24, bottleneck = 16, prototypes = 32, prototype_std = 0.1 }
"#;

fn resolve(tables: &str, sets: &[&str]) -> Result<Resolved> {
    let overrides = Overrides { sets: sets.iter().map(ToString::to_string).collect(), env: false };
    Resolved::of(RawRecipe::from_text(&format!("{BASE}\n{tables}"))?.with(&overrides)?)
}

/// What each of `world` ranks gives.
fn on_ranks<R: Send>(world: usize, work: impl Fn(Arc<dyn Comm>) -> R + Sync) -> Vec<R> {
    std::thread::scope(|scope| {
        let work = &work;
        let started: Vec<_> =
            threads(world).into_iter().map(|comm| scope.spawn(move || work(Arc::new(comm)))).collect();
        started.into_iter().map(|rank| rank.join().expect("a rank")).collect()
    })
}

/// The learner of a rank after all steps, and their reports.
fn trained(resolved: &Resolved, comm: Arc<dyn Comm>) -> Result<(Learner, Vec<Report>)> {
    let recipe = &resolved.recipe;
    let mut learner = Learner::new_with(recipe, Peers::of(comm.as_ref()))?;
    learner.join(comm)?;
    let pipeline = Pipeline::new(train::datasets(recipe)?.0, train::loader_spec(recipe, &learner, 0))?;
    let reports = (0..recipe.steps)
        .map(|step| learner.step(step, &pipeline.step(step)?.batches, false))
        .collect::<Result<_>>()?;
    Ok((learner, reports))
}

/// Every number of a learner and its reports, as bits.
fn bits((learner, reports): &(Learner, Vec<Report>)) -> Vec<(String, Vec<u64>)> {
    let content = learner.content(0).expect("host memory");
    let tensors = content.model.iter().chain(&content.optimizer);
    let mut all: Vec<(String, Vec<u64>)> = tensors
        .map(|(name, tensor)| (name.clone(), tensor.to_f64_vec().into_iter().map(f64::to_bits).collect()))
        .collect();
    for report in reports {
        let values = report.losses.iter().chain(&report.grad_norms).map(|(name, x)| (name.clone(), vec![x.to_bits()]));
        all.extend(values);
    }
    all.push(("skipped".into(), vec![learner.skipped()]));
    all.push((
        "gradients".into(),
        learner.gradients().expect("all ask").to_f64_vec().into_iter().map(f64::to_bits).collect(),
    ));
    all
}

#[test]
fn a_step_on_ranks_is_that_of_one_process_to_the_bit() {
    let methods = format!("{IBOT}{LOSSES_OF_PARTS}");
    // An image a micro-batch, of which only some have masked patches.
    const FEW: [&str; 4] =
        ["batch.size=8", "batch.micro_batches=8", "masking.probability=0.125", "losses.koleo.enabled=false"];
    // Teachers of which each rank has a part.
    const SHARD: &str = "optimizer.shard_teachers=true";
    const SINKHORN: &str = "losses.ibot.centering=\"sinkhorn_knopp\"";
    for (tables, precision, sets) in [
        (DINO, "f32", &[][..]),
        (DINO, "f32", &FEW),
        (DINO, "f32", &[FEW[0], FEW[1], FEW[2], FEW[3], SINKHORN, SHARD]),
        (DINO, "f64", &["batch.micro_batches=4", SHARD]),
        (&methods, "f32", &["optimizer.plugin=\"muon\""]),
        // Position encodings whose parameters all blocks share, and a teacher that nobody asks.
        (
            "[losses.koleo]\n[losses.breaks]\nstep = 4",
            "f32",
            &["backbone.pos_encoding={ plugin = \"relative_bias_box\" }", SHARD],
        ),
        // One micro-batch a rank, so that gradients are summed layer by layer: some blocks are computed again.
        (
            &methods,
            "f32",
            &["optimizer.plugin=\"muon\"", "batch.micro_batches=4", "backbone.checkpointing=\"full\"", SHARD],
        ),
        // So many numbers that they are moved in several pieces, all at the end and layer by layer.
        (DINO, "f32", &["losses.dino.head.prototypes=70000", "steps=3", "losses.breaks.step=1"]),
        (
            DINO,
            "f32",
            &[
                "losses.dino.head.prototypes=70000",
                "steps=3",
                "losses.breaks.step=1",
                "batch.micro_batches=2",
                "batch.shards=2",
                SHARD,
            ],
        ),
        (
            DINO,
            "f32",
            &[
                "optimizer.moments=\"8bit\"",
                "backbone.dim=64",
                "batch.micro_batches=4",
                "teachers.gram={ plugin = \"ema\" }",
                SHARD,
            ],
        ),
    ] {
        let precision = format!("precision=\"{precision}\"");
        let resolved = resolve(tables, &[sets, &[&precision]].concat()).unwrap_or_else(|e| panic!("{e}"));
        let one = trained(&resolved, Arc::new(dinolab_core::comm::Single)).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(one.0.skipped(), u64::from(tables.contains("breaks")), "the step that breaks is not taken");
        let expected = bits(&one);
        for world in [2, 4].into_iter().filter(|world| *world <= resolved.recipe.batch.shards) {
            let by_layer = resolved.recipe.batch.micro_batches == world;
            let all = on_ranks(world, |comm| {
                trained(&resolved, comm).map(|run| {
                    let (weights, len) = (run.0.weights(), run.0.model().layout.len());
                    let teachers = weights.teacher.iter().chain(weights.named.iter().map(|(_, flat)| flat));
                    teachers.for_each(|flat| assert_eq!(flat.is_sharded(), sets.contains(&SHARD)));
                    let held = weights.teacher.as_ref().expect("there is one").held().len();
                    assert!(if sets.contains(&SHARD) { held < len } else { held == len }, "{held} of {len}");
                    (bits(&run), (weights.moments[0].len(), weights.grads().len() < len))
                })
            });
            let (all, kept): (Vec<_>, Vec<_>) =
                all.into_iter().map(|run| run.unwrap_or_else(|e| panic!("{e}"))).unzip();
            let whole = one.0.weights().moments[0].len();
            assert!(kept.iter().all(|(moments, _)| *moments < whole), "each has its part of {whole}: {kept:?}");
            // Beside its part a rank has gradients of a block, which is more than the rest of a small model.
            assert_eq!(kept[world - 1].1, by_layer, "{kept:?}");
            for (rank, found) in all.into_iter().enumerate() {
                let different = found.iter().zip(&expected).find(|(a, b)| a != b).map(|(a, _)| a.0.clone());
                assert_eq!((different, found.len()), (None, expected.len()), "rank {rank} of {world}");
            }
        }
    }
}

#[test]
fn more_shards_are_the_same_sums_in_another_order() {
    let losses = |shards: usize| {
        let sets = [&format!("batch.shards={shards}"), "precision=\"f64\""];
        let resolved = resolve(DINO, &sets).unwrap();
        let (_, reports) = trained(&resolved, Arc::new(dinolab_core::comm::Single)).unwrap();
        reports.into_iter().flat_map(|report| report.losses).filter(|(_, x)| x.is_finite()).collect::<Vec<_>>()
    };
    let one = losses(1);
    for shards in [2, 8] {
        let more = losses(shards);
        assert!(more != one, "sums of {shards} shards have an order of their own");
        for ((name, a), (_, b)) in one.iter().zip(&more) {
            assert!((a - b).abs() < 1e-9 * (1.0 + a.abs()), "{name} of {shards} shards: {a} and {b}");
        }
    }
}

#[test]
fn a_mean_over_masked_patches_is_that_of_the_batch_however_it_is_divided() {
    let of = |parts: usize| {
        let sets =
            [&format!("batch.micro_batches={parts}"), "batch.shards=1", "precision=\"f64\"", "backbone.drop_path=0.0"];
        let resolved = resolve("[losses.inpainting]\n[losses.ibot]\nhead = { prototypes = 8 }", &sets).unwrap();
        let (_, reports) = trained(&resolved, Arc::new(dinolab_core::comm::Single)).unwrap();
        reports.into_iter().flat_map(|report| report.losses).collect::<Vec<_>>()
    };
    let whole = of(1);
    for parts in [2, 8, 16] {
        for ((name, a), (_, b)) in whole.iter().zip(&of(parts)) {
            assert!((a - b).abs() < 1e-9 * a.abs(), "{name} of {parts} parts: {a} and {b}");
        }
    }
}

#[test]
fn ranks_that_do_not_fit_together_are_an_error_that_says_why() {
    let message = |error: Error| error.to_string();
    let resolved = resolve("[losses.koleo]", &["batch.shards=2"]).unwrap();
    for error in on_ranks(4, |comm| trained(&resolved, comm).map(drop).map_err(message)) {
        let error = error.unwrap_err();
        assert!(error.contains("4 processes") && error.contains("start 1, 2 processes"), "{error}");
    }
    // A rank with other weights.
    let errors = on_ranks(2, |comm| {
        let seed = format!("seed={}", comm.rank());
        trained(&resolve("[losses.koleo]", &[&seed]).unwrap(), comm).map(drop).map_err(message)
    });
    assert!(errors
        .into_iter()
        .all(|e| e.unwrap_err().contains("the hash of the weights of rank 1 is not that of rank 0")));
    for (sets, named) in [("batch.shards=3", "3 is no power of two"), ("batch.shards=16", "16 is no power of two that")]
    {
        let error = resolve("[losses.koleo]", &[sets]).unwrap_err().to_string();
        assert!(error.contains(named) && error.contains("use 1, 2, 4, 8"), "{error}");
    }
}

/// A loss that hands on a state from one micro-batch to the next.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
struct HandsOn {}

impl Loss for HandsOn {
    fn needs(&self) -> Needs {
        Needs { teacher: false, min_batch: 1, ..Needs::default() }
    }
    fn state(&self) -> Vec<dinolab_core::contract::StateSpec> {
        vec![dinolab_core::contract::StateSpec { name: "seen", shape: Vec::new() }]
    }
    fn compute(&self, _: &Params<'_>, out: &Outputs<'_>, context: &StepContext<'_>) -> Result<LossValue> {
        let loss = out.student.cls.square()?.mean()?;
        let seen = context.state("seen")?.add(&loss.detach())?;
        Ok(LossValue::of(loss).with_state(vec![("seen", seen)]))
    }
}

plugin!(Loss, "hands_on", HandsOn);

#[test]
fn a_state_that_micro_batches_hand_on_has_no_shards() {
    let error =
        |shards: &str| trained(&resolve("[losses.hands_on]", &[shards]).unwrap(), Arc::new(dinolab_core::comm::Single));
    let text = error("batch.shards=2").map(drop).unwrap_err().to_string();
    assert!(text.contains("hands_on") && text.contains("batch.shards = 1"), "{text}");
    error("batch.shards=1").map(drop).unwrap();
}

/// A run of `tables` in `folder` on so many ranks; `stop` is that of the rank of this number.
fn run(resolved: &Resolved, folder: &Path, world: usize, stop: Option<usize>) -> Outcome {
    let mut ended = on_ranks(world, |comm| {
        let flag = Arc::new(AtomicBool::new(stop == Some(comm.rank())));
        if comm.rank() > 0 {
            let code = train::follow(&comm, &|| Ok(resolved.clone()), &flag).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(code, 7, "the code that rank 0 ends with");
            return None;
        }
        let lead = Lead::new(comm);
        let options =
            RunOptions { out: folder.into(), resume: true, stop: flag, revision: String::new(), save_within: None };
        let ended = train::lead(resolved, &options, &lead, &mut Silent).unwrap_or_else(|e| panic!("{e}"));
        lead.end(7);
        Some(ended)
    });
    ended.swap_remove(0).expect("rank 0 gives it")
}

/// Files of the last checkpoint.
fn saved(folder: &Path) -> Vec<Vec<u8>> {
    let newest: PathBuf = folder.join("checkpoints").join("step-00000006");
    ["model.safetensors", "optimizer.safetensors"].map(|file| std::fs::read(newest.join(file)).unwrap()).to_vec()
}

/// The losses of every logged step.
fn logged(folder: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let names = ["step", "loss/total", "grad_norm/backbone", "probe/cls_patch_cosine/mean"];
    lines.map(|line| names.map(|name| line[name].to_string()).join(" ")).collect()
}

#[test]
fn a_run_on_ranks_writes_the_files_of_one_process_and_goes_on_on_any_number() {
    let sets = ["log.every=1", "checkpoint.every=2", "on_non_finite={ skip = 2 }"];
    let probe = "[probes.cls_patch_cosine]\nevery = 2";
    let resolved = resolve(&format!("{DINO}{probe}"), &sets).unwrap();
    // Probes see a teacher that each rank has a part of; which ones have it may change from one start to the next.
    let sharded =
        resolve(&format!("{DINO}{probe}"), &[&sets[..], &["optimizer.shard_teachers=true"]].concat()).unwrap();
    let temp = tempfile::tempdir().unwrap();
    let folder = |name: &str| temp.path().join(name);
    run(&resolved, &folder("one"), 1, None);
    run(&resolved, &folder("four"), 4, None);
    run(&sharded, &folder("sharded"), 4, None);
    assert!(saved(&folder("one")) == saved(&folder("sharded")));
    assert_eq!(logged(&folder("one")), logged(&folder("sharded")));
    assert!(saved(&folder("one")) == saved(&folder("four")));
    assert_eq!(logged(&folder("one")), logged(&folder("four")));
    // A signal to a rank that follows stops all after the first step; two go on, are stopped, and one ends it.
    for (world, stop) in [(4, Some(3)), (2, Some(1)), (1, None)] {
        let resolved = if world == 2 { &sharded } else { &resolved };
        match run(resolved, &folder("moved"), world, stop) {
            Outcome::Interrupted { step } => assert_eq!(step, if world == 4 { 1 } else { 2 }),
            Outcome::Finished(result) => assert_eq!((result.steps, world), (6, 1)),
        }
    }
    assert!(saved(&folder("one")) == saved(&folder("moved")));
    // The Gram teacher copies the EMA teacher after step 4, which is skipped: that of the four steps before.
    let of = |step: &str, role: &str| -> Vec<(String, Vec<f64>)> {
        let file = folder("four").join("checkpoints").join(step).join("model.safetensors");
        let tensors = dinolab_core::files::read_tensors(&file).unwrap_or_else(|e| panic!("{e}")).with_prefix(role);
        tensors.into_iter().map(|(name, tensor)| (name, tensor.to_f64_vec())).collect()
    };
    let (copy, mut teacher) = (of("step-00000006", "gram_teacher."), of("step-00000004", "teacher."));
    teacher.retain(|(name, _)| name.starts_with("backbone."));
    assert!(!copy.is_empty() && copy == teacher);
    // The step that was not finite is captured with the images of all ranks, and can be done again by one process.
    let capture = folder("four").join("captures").join("step-00000005.safetensors");
    let (_, step, report) = train::replay(&capture, &Overrides::default()).unwrap_or_else(|e| panic!("{e}"));
    let what = report.non_finite.expect("it breaks again");
    assert!(step == 5 && what.starts_with("loss/breaks"), "{step} {what}");
}

#[test]
fn a_run_that_goes_back_does_so_on_all_ranks() {
    let sets = ["log.every=1", "checkpoint.every=2", "on_non_finite={ rewind = 1 }", "losses.breaks.step=3"];
    let resolved = resolve(DINO, &sets).unwrap();
    let temp = tempfile::tempdir().unwrap();
    // It breaks again at the same step, with other data, so that the run ends there: on both in the same way.
    let ended = |world: usize| {
        let all = on_ranks(world, |comm| {
            let flag = Arc::new(AtomicBool::new(false));
            if comm.rank() > 0 {
                return train::follow(&comm, &|| Ok(resolved.clone()), &flag).map(|code| code.to_string());
            }
            let lead = Lead::new(comm);
            let out = temp.path().join(world.to_string());
            let options = RunOptions { out, resume: true, stop: flag, revision: String::new(), save_within: None };
            let ended = train::lead(&resolved, &options, &lead, &mut Silent).map(|_| String::new());
            lead.end(1);
            ended
        });
        all.into_iter()
            .map(|ended| ended.unwrap_or_else(|e| e.to_string().lines().next().unwrap_or_default().into()))
            .collect::<Vec<String>>()
    };
    let (one, two) = (ended(1), ended(2));
    assert!(one[0].contains("step 4: ") && one[0].contains("not finite"), "{one:?}");
    assert_eq!(two[1], "1");
    assert_eq!(one[0].split(" (captured").next(), two[0].split(" (captured").next());
}

#[test]
fn a_rank_that_fails_ends_all() {
    let ended = AtomicBool::new(false);
    let all = on_ranks(2, |comm| {
        if comm.rank() == 1 {
            comm.abort();
            return Ok(());
        }
        let waited = Ranks::new(comm.clone(), 2).and_then(|_| comm.all_gather(&[1], &mut [0, 0]));
        ended.store(true, Ordering::Relaxed);
        waited
    });
    assert!(all[0].is_err() && ended.load(Ordering::Relaxed));
}
