//! A folder with a suite, and a fake trainer.
//!
//! The trainer stands in for the real one: its scores are a fixed function of recipe and seed, and it leaves the same
//! files in a run's folder.

use std::cell::RefCell;
use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use dinolab::pictures::PatchView;
use dinolab::report::Provenance;
use dinolab::suite::{execute, Event, ExecuteOptions, Job, Outcome, Overrides, Plan, Prepared, Progress, Suite, Tally};
use dinolab_core::rng::{Rng, Stream};
use dinolab_core::{Error, Result};
use serde_json::json;

pub(crate) const HEADER: &str = r#"
name = "gram"
description = "Does Gram anchoring keep patch features local?"
base = "recipe.toml"
seeds = [0, 1, 2]
metrics = ["probe/seg/miou", { name = "loss/total", better = "lower" }]
baseline = "off"
"#;

pub(crate) const ARMS: &str = r#"
[[arm]]
name = "off"
set = { "losses.gram.enabled" = false }

[[arm]]
name = "on"
set.losses.gram.enabled = true
"#;

pub(crate) const RECIPE: &str = r#"
seed = 0
steps = 40
batch = { size = 12, micro_batches = 1 }
losses.gram = { enabled = true, weight = 1.0 }
probes.seg = { every = 0 }
"#;

/// What the fake trainer did, and what it is to do.
#[derive(Default)]
pub(crate) struct Trainer {
    /// Runs that trained, as "arm seed from step to steps".
    pub(crate) log: RefCell<Vec<String>>,
    /// The arm and seed whose run stops itself half-way, once.
    pub(crate) stop_at: RefCell<Option<String>>,
    /// The arm and seed whose run fails.
    pub(crate) fail_at: RefCell<Option<String>>,
    /// How often it fails before it succeeds; 0: always.
    pub(crate) fails: RefCell<u32>,
    /// Images that fit into a micro-batch; 0: any number.
    pub(crate) fits: i64,
}

pub(crate) struct Fake {
    pub(crate) recipe: toml::Table,
    pub(crate) hash: String,
    pub(crate) trainer: Rc<Trainer>,
}

/// Merges overrides into the recipe file, as the real one would.
pub(crate) fn prepare(trainer: &Rc<Trainer>, base: &Path, overrides: &Overrides) -> Result<Box<dyn Prepared>> {
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
pub(crate) struct Lab {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) trainer: Rc<Trainer>,
}

impl Lab {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        fs::write(folder.path().join("recipe.toml"), RECIPE).expect("a temporary folder");
        Self { folder, trainer: Rc::default() }
    }

    pub(crate) fn out(&self) -> PathBuf {
        self.folder.path().join("out")
    }

    pub(crate) fn load(&self, text: &str) -> Result<Suite> {
        let path = self.folder.path().join("suite.toml");
        fs::write(&path, text).expect("a temporary folder");
        Suite::load(&path)
    }

    pub(crate) fn plan(&self, text: &str) -> Result<Plan> {
        let trainer = self.trainer.clone();
        Plan::new(self.load(text)?, self.out(), &Overrides::new(), &move |b, o| prepare(&trainer, b, o))
    }

    pub(crate) fn execute(&self, plan: &Plan, change: impl FnOnce(&mut ExecuteOptions)) -> Result<Tally> {
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

    pub(crate) fn log(&self) -> Vec<String> {
        self.trainer.log.borrow().clone()
    }
}

pub(crate) fn suite() -> String {
    format!("{HEADER}{ARMS}")
}

/// What the error of a suite file says.
#[track_caller]
pub(crate) fn refused(text: &str) -> String {
    let lab = Lab::new();
    lab.plan(text).map(|plan| plan.runs.len()).expect_err("this suite is wrong").to_string()
}

/// Patch features of a fake model: a smooth field of 16 channels, with a large common part for the baseline.
pub(crate) fn look(run: &Path) -> Result<Vec<PatchView>> {
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

pub(crate) fn provenance() -> Provenance {
    Provenance { version: "0.1.0".into(), command: "dinolab ablate gram.toml".into(), ..Provenance::default() }
}
