//! Suites: what a suite file may not say, and how a suite is run, continued and reported.
//!
//! A fake trainer stands in for the real one: its scores are a fixed function of recipe and seed, and it leaves the same
//! files in a run's folder.

use std::cell::RefCell;
use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use dinolab::pictures::PatchView;
use dinolab::report::{self, Provenance, Verdict};
use dinolab::suite::{execute, Event, ExecuteOptions, Job, Outcome, Overrides, Plan, Prepared, Progress, Suite, Tally};
use dinolab_core::rng::{Rng, Stream};
use dinolab_core::{Error, Result};
use serde_json::json;

const HEADER: &str = r#"
name = "gram"
description = "Does Gram anchoring keep patch features local?"
base = "recipe.toml"
seeds = [0, 1, 2]
metrics = ["probe/seg/miou", { name = "loss/total", better = "lower" }]
baseline = "off"
"#;

const ARMS: &str = r#"
[[arm]]
name = "off"
set = { "losses.gram.enabled" = false }

[[arm]]
name = "on"
set.losses.gram.enabled = true
"#;

const RECIPE: &str = r#"
seed = 0
steps = 40
batch = { size = 12, micro_batches = 1 }
losses.gram = { enabled = true, weight = 1.0 }
probes.seg = { every = 0 }
"#;

/// What the fake trainer did, and what it is to do.
#[derive(Default)]
struct Trainer {
    /// Runs that trained, as "arm seed from step to steps".
    log: RefCell<Vec<String>>,
    /// The arm and seed whose run stops itself half-way, once.
    stop_at: RefCell<Option<String>>,
    /// The arm and seed whose run fails.
    fail_at: RefCell<Option<String>>,
    /// How often it fails before it succeeds; 0: always.
    fails: RefCell<u32>,
    /// Images that fit into a micro-batch; 0: any number.
    fits: i64,
}

struct Fake {
    recipe: toml::Table,
    hash: String,
    trainer: Rc<Trainer>,
}

/// Merges overrides into the recipe file, as the real one would.
fn prepare(trainer: &Rc<Trainer>, base: &Path, overrides: &Overrides) -> Result<Box<dyn Prepared>> {
    let text = fs::read_to_string(base).map_err(Error::io("read", base))?;
    let mut recipe: toml::Table = text.parse().expect("the recipe of these tests is TOML");
    for (key, value) in overrides {
        let mut table = &mut recipe;
        let mut parts: Vec<&str> = key.split('.').collect();
        let last = parts.pop().expect("a key has a part");
        for part in parts {
            let inner = table.get_mut(part).and_then(|t| t.as_table_mut());
            table = inner.ok_or_else(|| Error::user(format!("unknown key {key}"), "correct it"))?;
        }
        table.insert(last.into(), value.clone());
    }
    let hash = recipe.to_string();
    Ok(Box::new(Fake { recipe, hash, trainer: trainer.clone() }))
}

impl Prepared for Fake {
    fn recipe(&self) -> &toml::Table {
        &self.recipe
    }

    fn hash(&self) -> &str {
        &self.hash
    }

    fn warnings(&self) -> Vec<String> {
        Vec::new()
    }

    fn run(&self, job: Job<'_>) -> Result<Outcome> {
        let steps = self.recipe["steps"].as_integer().expect("steps are an integer") as u64;
        let seed = self.recipe["seed"].as_integer().expect("a seed is an integer") as u64;
        let gram = self.recipe["losses"]["gram"]["enabled"].as_bool().expect("a flag");
        let id = format!("{} {seed}", if gram { "on" } else { "off" });
        let write = |name: &str, text: String| fs::write(job.out.join(name), text).expect("a temporary folder");
        let checkpoint = job.out.join("checkpoint");
        let start = match fs::read_to_string(&checkpoint) {
            Ok(step) if job.resume => step.parse().expect("a step"),
            _ => 0u64,
        };
        self.trainer.log.borrow_mut().push(format!("{id} from {start} to {steps}"));
        write("recipe.toml", self.recipe.to_string());
        if self.trainer.fail_at.borrow().as_deref() == Some(&id) {
            let mut left = self.trainer.fails.borrow_mut();
            if *left == 1 {
                self.trainer.fail_at.borrow_mut().take();
            }
            *left = left.saturating_sub(1);
            return Err(Error::user("the loss is not finite", "lower the learning rate"));
        }
        let batch = |key: &str| self.recipe["batch"][key].as_integer().expect("an integer");
        if self.trainer.fits > 0 && batch("size") / batch("micro_batches") > self.trainer.fits {
            return Err(Error::user("the GPU failed: cuMemCreate: no memory (CUDA_ERROR_OUT_OF_MEMORY)", "lower it"));
        }
        let mut lines = String::new();
        let mut noise = Rng::new(seed, Stream::Plugin, 0, 0);
        for step in (1..=steps).filter(|s| s % 4 == 0) {
            let t = step as f64 / steps as f64;
            let total = 8.0 * (-2.0 * t).exp() + 0.2 * noise.normal();
            let miou = 0.2 + 0.3 * t + if gram { 0.05 * t } else { 0.0 } + 0.01 * noise.normal();
            let line = json!({"step": step, "loss/total": total, "probe/seg/miou": miou, "lr": 1e-3});
            lines += &format!("{line}\n");
        }
        write("metrics.jsonl", lines);
        let values = [("loss/total".to_string(), if gram { 9.5 } else { 1.0 })].into();
        (job.watch)(Event::Step { step: start, steps, text: "training", values: &values });
        if job.stop.load(Ordering::Relaxed) {
            return Ok(Outcome::Interrupted { step: start });
        }
        let halfway = self.trainer.stop_at.borrow_mut().take_if(|stop| *stop == id && steps > 2);
        if halfway.is_some() {
            fs::write(&checkpoint, (steps / 2).to_string()).expect("a temporary folder");
            job.stop.store(true, Ordering::Relaxed);
            return Ok(Outcome::Interrupted { step: steps / 2 });
        }
        // What pairs have in common, and a little of their own.
        let miou = 0.5 + 0.02 * noise.normal() + if gram { 0.05 + 1e-7 * seed as f64 } else { 0.0 };
        let metrics = json!({"probe/seg/miou": miou, "loss/total": 1.0 + 0.01 * seed as f64});
        write("result.json", json!({"steps": steps, "seconds": 40.0, "skipped": 0, "metrics": metrics}).to_string());
        Ok(Outcome::Finished)
    }
}

/// A folder with a recipe and a suite, and a trainer.
struct Lab {
    folder: tempfile::TempDir,
    trainer: Rc<Trainer>,
}

impl Lab {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        fs::write(folder.path().join("recipe.toml"), RECIPE).expect("a temporary folder");
        Self { folder, trainer: Rc::default() }
    }

    fn out(&self) -> PathBuf {
        self.folder.path().join("out")
    }

    fn load(&self, text: &str) -> Result<Suite> {
        let path = self.folder.path().join("suite.toml");
        fs::write(&path, text).expect("a temporary folder");
        Suite::load(&path)
    }

    fn plan(&self, text: &str) -> Result<Plan> {
        let trainer = self.trainer.clone();
        Plan::new(self.load(text)?, self.out(), &Overrides::new(), &move |b, o| prepare(&trainer, b, o))
    }

    fn execute(&self, plan: &Plan, change: impl FnOnce(&mut ExecuteOptions)) -> Result<Tally> {
        let mut options = ExecuteOptions {
            arms: vec![],
            seeds: vec![],
            smoke_steps: 0,
            fail_fast: false,
            retry_failed: false,
            stop: Arc::new(AtomicBool::new(false)),
        };
        change(&mut options);
        self.trainer.log.borrow_mut().clear();
        execute(plan, &options, &|b, o| prepare(&self.trainer, b, o), &Progress::hidden())
    }

    fn log(&self) -> Vec<String> {
        self.trainer.log.borrow().clone()
    }
}

fn suite() -> String {
    format!("{HEADER}{ARMS}")
}

/// What the error of a suite file says.
#[track_caller]
fn refused(text: &str) -> String {
    let lab = Lab::new();
    lab.plan(text).map(|plan| plan.runs.len()).expect_err("this suite is wrong").to_string()
}

#[test]
fn repeated_seeds_are_refused() {
    let error = refused(&suite().replace("[0, 1, 2]", "[0, 1, 0]"));
    assert!(error.contains("seed 0 is repeated"), "{error}");
}

#[test]
fn repeated_arm_names_are_refused() {
    let error = refused(&suite().replace("\"on\"", "\"off\""));
    assert!(error.contains("arm name `off` is repeated"), "{error}");
}

#[test]
fn a_baseline_that_is_no_arm_is_refused_with_the_nearest_name() {
    let error = refused(&suite().replace("baseline = \"off\"", "baseline = \"of\""));
    assert!(error.contains("the baseline `of` is no arm") && error.contains("did you mean `off`"), "{error}");
}

#[test]
fn arms_that_resolve_to_the_same_recipe_are_refused() {
    let error = refused(&suite().replace("enabled\" = false", "enabled\" = true"));
    assert!(error.contains("`off` and `on` resolve to the same recipe"), "{error}");
}

#[test]
fn an_unknown_key_of_a_suite_is_named_with_its_line() {
    let error = refused(&suite().replace("seeds =", "seedz ="));
    assert!(error.contains("seedz") && error.contains("line 5"), "{error}");
}

#[test]
fn arms_cannot_set_the_seed() {
    let error = refused(&suite().replace("\"losses.gram.enabled\" = false", "seed = 3"));
    assert!(error.contains("sets `seed`"), "{error}");
}

#[test]
fn arm_names_that_are_no_folders_are_refused() {
    let error = refused(&suite().replace("name = \"on\"", "name = \"../on\""));
    assert!(error.contains("`../on` cannot be used"), "{error}");
}

#[test]
fn a_grid_gives_every_combination_in_order() {
    let grid = "[grid]\n\"losses.gram.weight\" = [0.5, 2]\n\"steps\" = [10, 20]\n";
    let suite = format!("{HEADER}{grid}").replace("\"off\"", "\"gram.weight=0.5+steps=10\"");
    let names: Vec<String> = Lab::new().load(&suite).expect("a valid suite").arms.into_iter().map(|a| a.name).collect();
    let expected =
        ["gram.weight=0.5+steps=10", "gram.weight=0.5+steps=20", "gram.weight=2+steps=10", "gram.weight=2+steps=20"];
    assert_eq!(names, expected);
}

/// The names of a grid's arms, in order.
#[track_caller]
fn arms_of(grid: &str, baseline: &str) -> Vec<String> {
    let suite = format!("{HEADER}[grid]\n{grid}").replace("\"off\"", &format!("{baseline:?}"));
    Lab::new().load(&suite).expect("a valid suite").arms.into_iter().map(|a| a.name).collect()
}

#[test]
fn keys_of_a_grid_that_end_alike_are_told_apart() {
    let grid = "\"losses.dino.head.hidden\" = [1, 2]\n\"losses.ibot.head.hidden\" = [1, 2]\n";
    let names = arms_of(grid, "dino.head.hidden=1+ibot.head.hidden=1");
    assert_eq!(names[1], "dino.head.hidden=1+ibot.head.hidden=2");
}

#[test]
fn values_of_a_grid_that_look_alike_in_a_name_are_told_apart() {
    let grid = "\"data.path\" = [\"a/b\", \"a b\", \"c\"]\n";
    let names = arms_of(grid, "data.path=c");
    assert!(names[0].starts_with("data.path=a_b-") && names[1].starts_with("data.path=a_b-"), "{names:?}");
    assert_ne!(names[0], names[1]);
}

#[test]
fn long_names_of_a_grid_are_shortened_and_differ() {
    let value = |end: &str| format!("\"{}{end}\"", "x".repeat(300));
    let error = refused(&format!("{HEADER}[grid]\n\"data.path\" = [{}, {}]\n", value("a"), value("b")));
    let arms = error.split_once("the arms are ").expect("the baseline is none of them").1;
    let names: Vec<&str> = arms.split([',', ';']).take(2).map(str::trim).collect();
    assert!(names[0] != names[1] && names.iter().all(|name| name.len() == 200), "{names:?}");
}

#[test]
fn a_name_too_long_for_a_folder_is_refused_before_anything_runs() {
    let error = refused(&suite().replace("name = \"on\"", &format!("name = \"{}\"", "x".repeat(201))));
    assert!(error.contains("has 201 characters") && error.contains("at most 200"), "{error}");
}

#[test]
fn a_grid_of_more_runs_than_anyone_means_is_refused_at_once() {
    let list: Vec<String> = (0..1000).map(|i| i.to_string()).collect();
    let line = |key: &str| format!("\"losses.gram.{key}\" = [{}]\n", list.join(", "));
    let error = refused(&format!("{HEADER}[grid]\n{}{}{}", line("a"), line("b"), line("c")));
    assert!(error.contains("1000000000 combinations"), "{error}");
}

#[test]
fn a_key_that_differs_between_arms_without_being_named_is_refused_or_declared() {
    // The trainer's recipe has a key that follows from another.
    let text = suite().replace("set.losses.gram.enabled = true", "set.losses.gram.enabled = true\nset.steps = 80");
    let text = text.replace("\"losses.gram.enabled\" = false", "\"losses.gram.weight\" = 2.0");
    Lab::new().plan(&text).map(drop).expect("both keys are set by an arm");

    let lab = Lab::new();
    let trainer = lab.trainer.clone();
    let with_a_follower = move |base: &Path, overrides: &Overrides| {
        let mut overrides = overrides.clone();
        let on = overrides.get("losses.gram.enabled").and_then(toml::Value::as_bool);
        overrides.insert("probes.seg.every".into(), if on == Some(true) { 7 } else { 0 }.into());
        prepare(&trainer, base, &overrides)
    };
    let plan = |text: &str| Plan::new(lab.load(text)?, lab.out(), &Overrides::new(), &with_a_follower).map(drop);
    let error = plan(&suite()).expect_err("an arm changes a key that it does not set").to_string();
    for part in ["arm `on`", "probes.seg.every: was 0, is 7", "follows = [\"probes.seg.every\"]"] {
        assert!(error.contains(part), "no `{part}` in {error}");
    }
    for follows in ["probes.seg.every", "probes.seg", "probes"] {
        plan(&suite().replace("seeds =", &format!("follows = [{follows:?}]\nseeds ="))).expect("it is declared");
    }
}

#[test]
fn a_trial_that_was_killed_leaves_nothing_behind() {
    let lab = Lab::new();
    let plan = lab.plan(&suite()).expect("a valid suite");
    fs::create_dir_all(lab.out().join(".trial-on/checkpoints")).expect("a temporary folder");
    lab.execute(&plan, |o| o.smoke_steps = 2).expect("it ran");
    assert!(!lab.out().join(".trial-on").exists());
}

#[test]
fn a_table_that_names_a_plugin_is_one_value() {
    let set = "set = { optimizer.lr = { plugin = \"cosine\", peak = 1.0 }, losses.gram.enabled = false }";
    let suite = suite().replace("set.losses.gram.enabled = true", set);
    let suite = Lab::new().load(&suite).expect("a valid suite");
    let keys: Vec<&String> = suite.arms[1].set.keys().collect();
    assert_eq!(keys, ["losses.gram.enabled", "optimizer.lr"]);
}

#[test]
fn runs_are_ordered_so_that_pairs_complete_early() {
    let plan = Lab::new().plan(&suite()).expect("a valid suite");
    let order: Vec<(u64, &str)> = plan.runs.iter().map(|r| (r.seed, r.arm.as_str())).collect();
    assert_eq!(order, [(0, "off"), (0, "on"), (1, "off"), (1, "on"), (2, "off"), (2, "on")]);
}

#[test]
fn a_metric_of_no_enabled_probe_or_loss_is_warned_of() {
    let plan = Lab::new().plan(&suite().replace("probe/seg/miou", "loss/gram")).expect("a valid suite");
    assert_eq!(plan.warnings, ["metric `loss/gram` is not measured by off"]);
}

#[test]
fn an_interrupted_suite_continues_without_repeating_finished_runs() {
    let lab = Lab::new();
    let plan = lab.plan(&suite()).expect("a valid suite");
    *lab.trainer.stop_at.borrow_mut() = Some("on 0".into());
    let first = lab.execute(&plan, |_| ()).expect("it ran");
    assert_eq!(first.interrupted, Some(("on seed 0".into(), 20)));
    assert_eq!(lab.log(), ["off 0 from 0 to 40", "on 0 from 0 to 40"]);
    let before = fs::read(lab.out().join("arms/off/seed-0/result.json")).expect("it was finished");

    let second = lab.execute(&plan, |_| ()).expect("it ran");
    assert_eq!(lab.log()[0], "on 0 from 20 to 40");
    assert_eq!((lab.log().len(), second.finished, second.skipped), (5, 5, 1));
    assert_eq!(fs::read(lab.out().join("arms/off/seed-0/result.json")).expect("it is still there"), before);

    let third = lab.execute(&plan, |_| ()).expect("it ran");
    assert_eq!((lab.log().len(), third.skipped), (0, 6));
}

#[test]
fn a_changed_suite_does_not_mix_with_finished_runs() {
    let lab = Lab::new();
    lab.execute(&lab.plan(&suite()).expect("a valid suite"), |_| ()).expect("it ran");
    let changed = lab.plan(&format!("{}\n[set]\nsteps = 80\n", suite())).expect("a valid suite");
    let error = lab.execute(&changed, |_| ()).expect_err("the recipe changed").to_string();
    assert!(error.contains("steps: was 40, is 80"), "{error}");
    assert!(lab.log().is_empty(), "nothing may run");
}

#[test]
fn seeds_can_be_added_to_a_finished_suite() {
    let lab = Lab::new();
    lab.execute(&lab.plan(&suite()).expect("a valid suite"), |_| ()).expect("it ran");
    let more = lab.plan(&suite().replace("[0, 1, 2]", "[0, 1, 2, 3]")).expect("a valid suite");
    lab.execute(&more, |_| ()).expect("it ran");
    assert_eq!(lab.log(), ["off 3 from 0 to 40", "on 3 from 0 to 40"]);
}

#[test]
fn a_failed_run_is_recorded_and_the_others_go_on() {
    let lab = Lab::new();
    let plan = lab.plan(&suite()).expect("a valid suite");
    *lab.trainer.fail_at.borrow_mut() = Some("on 1".into());
    let tally = lab.execute(&plan, |_| ()).expect("it ran");
    assert_eq!((tally.finished, tally.failed.len()), (5, 1));
    *lab.trainer.fail_at.borrow_mut() = None;
    assert_eq!(lab.execute(&plan, |_| ()).expect("it ran").failed.len(), 1, "it stays failed");
    assert!(lab.log().is_empty());
    let retried = lab.execute(&plan, |o| o.retry_failed = true).expect("it ran");
    assert_eq!((retried.finished, retried.failed.len()), (1, 0));
}

#[test]
fn fail_fast_ends_at_the_first_failure() {
    let lab = Lab::new();
    let plan = lab.plan(&suite()).expect("a valid suite");
    *lab.trainer.fail_at.borrow_mut() = Some("on 0".into());
    lab.execute(&plan, |o| o.fail_fast = true).expect("it ran");
    assert_eq!(lab.log().len(), 2);
}

#[test]
fn a_run_that_another_process_holds_is_left_alone() {
    let lab = Lab::new();
    let plan = lab.plan(&suite()).expect("a valid suite");
    fs::create_dir_all(lab.out().join("locks")).expect("a temporary folder");
    let held = fs::File::create(lab.out().join("locks/off-seed-1.lock")).expect("a temporary folder");
    fs4::FileExt::lock(&held).expect("nobody else holds it");
    let tally = lab.execute(&plan, |_| ()).expect("it ran");
    assert_eq!((tally.finished, tally.elsewhere), (5, vec!["off seed 1".to_string()]));
}

#[test]
fn a_trial_of_every_arm_comes_before_any_run() {
    let lab = Lab::new();
    let plan = lab.plan(&suite()).expect("a valid suite");
    *lab.trainer.fail_at.borrow_mut() = Some("on 0".into());
    let error = lab.execute(&plan, |o| o.smoke_steps = 2).expect_err("an arm is broken").to_string();
    assert!(error.contains("on: the loss is not finite"), "{error}");
    assert_eq!(lab.log(), ["off 0 from 0 to 2", "on 0 from 0 to 2"], "only trials");
    assert!(!lab.out().join("arms").exists());
}

#[test]
fn a_run_that_fails_is_tried_again_as_often_as_the_suite_says() {
    let lab = Lab::new();
    let plan = lab.plan(&format!("retries = 2\n{}", suite())).expect("a valid suite");
    *lab.trainer.fail_at.borrow_mut() = Some("on 1".into());
    *lab.trainer.fails.borrow_mut() = 2;
    let tally = lab.execute(&plan, |_| ()).expect("it ran");
    assert_eq!((tally.finished, tally.failed.len()), (6, 0));
    assert_eq!(lab.log().iter().filter(|run| run.starts_with("on 1")).count(), 3);
    let (summary, _) = report::write(&plan, provenance(), &look).expect("it was written");
    let again =
        summary.warnings.iter().filter(|w| w.contains("on seed 1 was tried again after: the loss is not finite"));
    assert_eq!(again.count(), 2, "{:?}", summary.warnings);

    // What was used up stays used up, until the user asks for more.
    let lab = Lab::new();
    let plan = lab.plan(&format!("retries = 1\n{}", suite())).expect("a valid suite");
    *lab.trainer.fail_at.borrow_mut() = Some("on 1".into());
    let tries = |change: fn(&mut ExecuteOptions)| {
        assert_eq!(lab.execute(&plan, change).expect("it ran").failed.len(), 1);
        lab.log().iter().filter(|run| run.starts_with("on 1")).count()
    };
    assert_eq!([tries(|_| ()), tries(|_| ()), tries(|o| o.retry_failed = true)], [2, 0, 2]);
}

#[test]
fn what_does_not_fit_is_begun_anew_with_more_micro_batches_if_the_suite_says_so() {
    let lab = Lab { trainer: Rc::new(Trainer { fits: 4, ..Trainer::default() }), ..Lab::new() };
    let plan = lab.plan(&suite()).expect("a valid suite");
    assert_eq!(lab.execute(&plan, |_| ()).expect("it ran").failed.len(), 6);

    let lab = Lab { trainer: Rc::new(Trainer { fits: 4, ..Trainer::default() }), ..Lab::new() };
    let text = format!("on_out_of_memory = \"more_micro_batches\"\n{}", suite());
    let plan = lab.plan(&text).expect("a valid suite");
    let tally = lab.execute(&plan, |o| o.smoke_steps = 2).expect("a trial that does not fit is no broken arm");
    assert_eq!((tally.finished, tally.failed.len()), (6, 0));
    let recipe = fs::read_to_string(lab.out().join("arms/on/seed-1/recipe.toml")).expect("it was run");
    // 12 images in 1, 2, 4 parts.
    assert!(recipe.contains("micro_batches = 4"), "{recipe}");
    // The same command knows it, and does nothing twice.
    let plan = lab.plan(&text).expect("arms may differ in what made them fit");
    assert_eq!(lab.execute(&plan, |_| ()).expect("it ran").skipped, 6);
    let (summary, _) = report::write(&plan, provenance(), &look).expect("it was written");
    let said = summary.warnings.join("\n");
    assert!(said.contains("off seed 0 did not fit and was begun anew with batch.micro_batches = 4"), "{said}");
}

#[test]
fn a_rule_drops_a_run_or_its_arm_and_says_so() {
    let rule = |more: &str| format!("{}\n[[drop]]\nabove = 9.0\n{more}\n", suite());
    let lab = Lab::new();
    let plan = lab.plan(&rule("after = 50")).expect("a valid suite");
    assert_eq!(lab.execute(&plan, |_| ()).expect("it ran").finished, 6, "the rule holds from step 50 on");

    let lab = Lab::new();
    let plan = lab.plan(&rule("")).expect("a valid suite");
    let tally = lab.execute(&plan, |_| ()).expect("it ran");
    assert_eq!((tally.finished, tally.failed.len(), tally.interrupted), (3, 3, None));
    assert_eq!(lab.log().len(), 6, "every seed is tried");
    assert!(tally.failed[0].1.contains("dropped after step 0: loss/total = 9.5000 is above 9"), "{:?}", tally.failed);
    let (summary, _) = report::write(&plan, provenance(), &look).expect("it was written");
    let said = summary.warnings.join("\n");
    assert!(said.contains("on seed 2 was dropped after step 0") && said.contains("looks better than it is"), "{said}");

    let lab = Lab::new();
    let plan = lab.plan(&rule("arm = true")).expect("a valid suite");
    let tally = lab.execute(&plan, |_| ()).expect("it ran");
    assert_eq!(lab.log().iter().filter(|run| run.starts_with("on")).count(), 1, "one seed drops the arm");
    assert!(tally.failed[2].1.contains("dropped with its arm: see on seed 0"), "{:?}", tally.failed);

    for (bounds, said) in [("above = nan", "by NaN"), ("above = 1.0\nbelow = 2.0", "let `below` be at most")] {
        let error = refused(&format!("{}\n[[drop]]\n{bounds}\n", suite()));
        assert!(error.contains(said), "{error}");
    }
    let lab = Lab::new();
    let plan = lab.plan(&rule("metric = \"loss/dinoo\"")).expect("a valid suite");
    let error = lab.execute(&plan, |o| o.smoke_steps = 2).expect_err("a rule is misspelt").to_string();
    assert!(error.contains("the rule's metric `loss/dinoo` is not measured"), "{error}");

    // A signal reaches a run that is under rules.
    let lab = Lab::new();
    let plan = lab.plan(&rule("metric = \"loss/dino\"")).expect("a valid suite");
    *lab.trainer.stop_at.borrow_mut() = Some("on 0".into());
    assert!(lab.execute(&plan, |_| ()).expect("it ran").interrupted.is_some());
}

#[test]
fn an_effect_that_is_worth_finding_says_what_it_takes() {
    let error = refused(&format!("effect = {{ \"probe/seg/mio\" = 0.01 }}\n{}", suite()));
    assert!(error.contains("no metric of the suite") && error.contains("did you mean `probe/seg/miou`"), "{error}");
    let error = refused(&format!("effect = {{ \"loss/total\" = 0.0 }}\n{}", suite()));
    assert!(error.contains("a difference above zero"), "{error}");

    let lab = Lab::new();
    let plan = lab.plan(&format!("effect = {{ \"loss/total\" = 0.01 }}\n{}", suite())).expect("a valid suite");
    lab.execute(&plan, |_| ()).expect("it ran");
    // Differences of -0.02, 0.01 and 0.04: a standard deviation of 0.03, three times the effect.
    for (seed, total) in [(0, 0.98), (1, 1.02), (2, 1.06)] {
        let path = lab.out().join(format!("arms/on/seed-{seed}/result.json"));
        let metrics = json!({ "probe/seg/miou": 0.5, "loss/total": total });
        fs::write(path, json!({ "steps": 40, "seconds": 40.0, "metrics": metrics }).to_string()).expect("it is there");
    }
    let (summary, _) = report::write(&plan, provenance(), &look).expect("it was written");
    let loss = summary.comparisons.iter().find(|c| c.metric == "loss/total").expect("it was compared");
    let seeds = loss.seeds_for_effect.expect("it is in reach");
    // 2 + (1.96 + 0.84)² · 9 = 73 by the normal approximation.
    assert!((71..=75).contains(&seeds), "{seeds}");
    assert!(loss.sentence.contains(&format!("To find a difference of 0.01 four times in five takes {seeds} seeds")));
}

/// The suite with a head that says what it gave.
fn with_head(miou: f64) -> String {
    format!(
        "{}\n[measured]\non = \"a fake\"\nn = 3\nseconds = 40.0\n[measured.arms.on]\n\"probe/seg/miou\" = {{ mean = {miou}, sd = 0.01 }}\n",
        suite()
    )
}

#[test]
fn a_suite_says_whether_it_gave_what_its_head_says() {
    // The fake gives 0.55 and noise of 0.02.
    for (said, agrees) in [(0.55, true), (0.9, false)] {
        let lab = Lab::new();
        let plan = lab.plan(&with_head(said)).expect("a valid suite");
        lab.execute(&plan, |_| ()).expect("it ran");
        let (summary, _) = report::write(&plan, provenance(), &look).expect("it was written");
        assert_eq!(summary.reproduction.len(), 1);
        assert_eq!(summary.reproduction[0].agrees, Some(agrees), "{:?}", summary.reproduction);
        let page = fs::read_to_string(lab.out().join("report.html")).expect("it was written");
        assert!(page.contains(if agrees { "as said" } else { "other than said" }));
        let text = fs::read_to_string(lab.out().join("summary.md")).expect("it was written");
        assert!(text.contains("## Beside what the suite's file says"), "{text}");
    }
    let error = refused(&with_head(0.5).replace("arms.on", "arms.onn"));
    assert!(error.contains("[measured] has an arm `onn`") && error.contains("did you mean `on`"), "{error}");
    for (was, is, said) in [
        ("n = 3", "n = 18446744073709551615", "no number of seeds"),
        ("n = 3", "n = 0", "no number of seeds"),
        ("\"probe/seg/miou\" = {", "\"probe/seg/miuo\" = {", "did you mean `probe/seg/miou`"),
        ("sd = 0.01", "sd = -1.0", "the spread 0 or more"),
    ] {
        let error = refused(&with_head(0.5).replacen(was, is, 1));
        assert!(error.contains(said), "{said}: {error}");
    }
}

#[test]
fn the_summary_has_drawings_and_hours() {
    let lab = Lab::new();
    let plan = lab.plan(&suite()).expect("a valid suite");
    lab.execute(&plan, |_| ()).expect("it ran");
    for (arm, device) in [("on", "cuda:0 (a GPU)"), ("off", "cpu")] {
        for seed in 0..3 {
            let path = lab.out().join(format!("arms/{arm}/seed-{seed}/run.json"));
            fs::write(path, json!({ "device": device, "threads": 9 }).to_string()).expect("it is there");
        }
    }
    let (summary, _) = report::write(&plan, provenance(), &look).expect("it was written");
    // Three runs of 40 s each: on one GPU, and on nine threads.
    assert!((summary.compute.gpu_hours - 120.0 / 3600.0).abs() < 1e-12);
    assert!((summary.compute.core_hours - 9.0 * 120.0 / 3600.0).abs() < 1e-12);
    let text = fs::read_to_string(lab.out().join("summary.md")).expect("it was written");
    assert!(text.contains("0.03333 GPU hours and 0.3 core hours"), "{text}");
    for line in text.lines().filter(|line| line.starts_with("![")) {
        let path = line.rsplit_once('(').expect("a picture has a path").1.trim_end_matches(')');
        assert!(fs::read_to_string(lab.out().join(path)).expect("it was drawn").starts_with("<svg"));
    }
    // Differences and a curve of each of the two metrics.
    assert_eq!(text.matches("](summary/").count(), 4, "{text}");
}

#[test]
fn runs_that_were_made_of_other_data_or_weights_are_told() {
    let lab = Lab::new();
    let recipe = lab.folder.path().join("recipe.toml");
    let text = fs::read_to_string(&recipe).expect("it is there");
    fs::write(&recipe, format!("{text}data = {{ path = \"x\" }}\nteacher = {{ checkpoint = \"t\" }}\n"))
        .expect("a folder");
    let plan = lab.plan(&suite()).expect("a valid suite");
    lab.execute(&plan, |_| ()).expect("it ran");
    for (arm, revision, teacher) in [("off", "1", "t"), ("on", "2", "u")] {
        let info = json!({ "data": "a", "revision": revision, "parents": { "teacher.checkpoint": teacher } });
        let path = lab.out().join(format!("arms/{arm}/seed-0/run.json"));
        fs::write(path, info.to_string()).expect("it is there");
    }
    let (summary, _) = report::write(&plan, provenance(), &look).expect("it was written");
    let said = summary.warnings.join("\n");
    assert!(said.contains("on seed 0 was made of other weights than off seed 0"), "{said}");
    assert!(said.contains("`teacher.checkpoint`") && !said.contains("other data"), "{said}");
    assert!(said.contains("different builds of dinolab: 1 (off seed 0), 2 (on seed 0)"), "{said}");
}

#[test]
fn a_trial_finds_a_metric_that_nothing_measures() {
    let lab = Lab::new();
    let plan = lab.plan(&suite().replace("seg/miou", "seg/miuo")).expect("a valid suite");
    let error = lab.execute(&plan, |o| o.smoke_steps = 2).expect_err("a metric is misspelt").to_string();
    assert!(error.contains("`probe/seg/miuo` is not measured; did you mean `probe/seg/miou`"), "{error}");
    let lab = Lab::new();
    let plan = lab.plan(&suite().replace("loss/total", "loss/none")).expect("a valid suite");
    let error = lab.execute(&plan, |o| o.smoke_steps = 2).expect_err("no arm has that loss").to_string();
    assert!(error.contains("`loss/none` is not measured"), "{error}");
}

#[test]
fn a_selection_runs_only_what_was_asked_for() {
    let lab = Lab::new();
    let plan = lab.plan(&suite()).expect("a valid suite");
    lab.execute(&plan, |o| (o.arms, o.seeds) = (vec!["on".into()], vec![2])).expect("it ran");
    assert_eq!(lab.log(), ["on 2 from 0 to 40"]);
    let error = lab.execute(&plan, |o| o.arms = vec!["onn".into()]).expect_err("no such arm").to_string();
    assert!(error.contains("did you mean `on`"), "{error}");
}

/// Patch features of a fake model: a smooth field of 16 channels, with a large common part for the baseline.
fn look(run: &Path) -> Result<Vec<PatchView>> {
    let common = if run.to_string_lossy().contains("/off/") { 1.0 } else { 0.25 };
    let (height, width) = (14, 14);
    let view = |index: u64| {
        let mut rng = Rng::new(index, Stream::Plugin, 0, 0);
        let mut wave = || [rng.uniform(-0.6, 0.6), rng.uniform(-0.6, 0.6), rng.uniform(0.0, 6.0)];
        let waves: Vec<[f64; 3]> = (0..16).map(|_| wave()).collect();
        let value =
            |p: usize, w: &[f64; 3]| common + (w[0] * (p / width) as f64 + w[1] * (p % width) as f64 + w[2]).sin();
        let features = (0..height * width).flat_map(|p| waves.iter().map(move |w| value(p, w))).collect();
        let image = image::RgbImage::from_fn(112, 112, |x, y| image::Rgb([x as u8 * 2, y as u8 * 2, 40 * index as u8]));
        PatchView { image, height, width, features, foreground: None }
    };
    Ok((0..3).map(view).collect())
}

fn provenance() -> Provenance {
    Provenance { version: "0.1.0".into(), command: "dinolab ablate gram.toml".into(), ..Provenance::default() }
}

#[test]
fn summary_json_has_the_documented_shape() {
    let lab = Lab::new();
    let plan = lab.plan(&suite()).expect("a valid suite");
    lab.execute(&plan, |_| ()).expect("it ran");
    report::write(&plan, provenance(), &look).expect("it was written");
    let text = fs::read_to_string(lab.out().join("summary.json")).expect("it was written");
    let summary: serde_json::Value = serde_json::from_str(&text).expect("it is JSON");
    assert_eq!((&summary["suite"], &summary["baseline"]), (&json!("gram"), &json!("off")));
    assert_eq!(summary["metrics"], json!(["probe/seg/miou", "loss/total"]));
    let on = &summary["arms"][1];
    assert_eq!((&on["name"], &on["overrides"]), (&json!("on"), &json!({"losses.gram.enabled": true})));
    assert_eq!((&on["runs"][2]["seed"], &on["runs"][2]["dir"]), (&json!(2), &json!("arms/on/seed-2")));
    assert_eq!(on["runs"][2]["metrics"]["loss/total"], 1.02);
    let total = &on["metrics"]["loss/total"];
    assert!((total["mean"].as_f64().expect("a number") - 1.01).abs() < 1e-12, "{total}");
    assert!((total["std"].as_f64().expect("a number") - 0.01).abs() < 1e-12, "{total}");
    assert_eq!((total["ci95"].as_array().expect("an interval").len(), &total["n"]), (2, &json!(3)));
    let comparison = &summary["comparisons"][0];
    assert_eq!((&comparison["arm"], &comparison["baseline"]), (&json!("on"), &json!("off")));
    assert_eq!((&comparison["metric"], &comparison["n"]), (&json!("probe/seg/miou"), &json!(3)));
    // Nearly all of the fake's noise depends on the seed alone, so pairing takes it away.
    assert!((comparison["difference"].as_f64().expect("a number") - 0.05).abs() < 1e-6);
    assert!(comparison["p_value"].as_f64().expect("a number") < 1e-9);
    assert_eq!(comparison["verdict"], json!("higher"));
}

#[test]
fn missing_and_failed_runs_are_said_and_their_pairs_left_out() {
    let lab = Lab::new();
    let plan = lab.plan(&suite()).expect("a valid suite");
    *lab.trainer.fail_at.borrow_mut() = Some("on 1".into());
    lab.execute(&plan, |o| o.seeds = vec![0, 1]).expect("it ran");
    let (summary, _) = report::write(&plan, provenance(), &look).expect("it was written");
    assert_eq!(summary.comparisons[0].paired.n, 1);
    assert_eq!(summary.comparisons[0].verdict, Verdict::NoInterval);
    let said = summary.warnings.join("\n");
    assert!(said.contains("on seed 1 failed") && said.contains("off seed 2 is pending"), "{said}");
}

#[test]
fn the_report_is_one_file_without_scripts_or_requests() {
    let lab = Lab::new();
    let plan = lab.plan(&suite()).expect("a valid suite");
    lab.execute(&plan, |_| ()).expect("it ran");
    let (_, path) = report::write(&plan, provenance(), &look).expect("it was written");
    let page = fs::read_to_string(path).expect("it was written");
    for outside in ["<script", "src=\"http", "href=\"http", "@import", "url(http", "<link rel=\"stylesheet"] {
        assert!(!page.contains(outside), "the page has {outside}");
    }
    for part in ["higher than off in probe", "data:image/png;base64,", "<svg", "losses.gram.enabled"] {
        assert!(page.contains(part), "the page lacks {part}");
    }
}
