//! A run that goes back from numbers that are not finite: past the bad data, to the same end however often it was stopped.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use dinolab_core::contract::{Dataset, Loss, LossValue, Needs, Outputs, Sample, StepContext};
use dinolab_core::params::Params;
use dinolab_core::resolved::Resolved;
use dinolab_core::train::{self, Observer, Outcome, Progress, RunOptions};
use dinolab_core::{plugin, Result};
use dinolab_plugins as _;
use serde::{Deserialize, Serialize};

/// Black pictures, and white ones that the loss below cannot bear.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
struct Poisoned {
    /// Which are white.
    white: Vec<usize>,
}

impl Dataset for Poisoned {
    fn len(&self) -> usize {
        64
    }

    fn get(&self, index: usize) -> Result<Sample> {
        let value = if self.white.contains(&index) { 255u8 } else { 0 };
        Ok(Sample { width: 16, height: 16, pixels: vec![value; 3 * 256].into(), ..Sample::default() })
    }

    fn describe(&self, index: usize) -> String {
        index.to_string()
    }
}

plugin!(Dataset, "poisoned", Poisoned);

/// Infinite when pictures differ.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
struct Squeamish {}

impl Loss for Squeamish {
    fn needs(&self) -> Needs {
        Needs::default()
    }

    fn compute(&self, _: &Params<'_>, out: &Outputs<'_>, _: &StepContext<'_>) -> Result<LossValue> {
        let patches = out.teacher.patches.to_f64_vec();
        let d = out.teacher.patches.dim(2);
        let differ = patches.chunks(d).any(|patch| patch.iter().zip(&patches).any(|(a, b)| (a - b).abs() > 1e-3));
        let value = out.student.cls.square()?.mean()?;
        value.scale(if differ { f64::INFINITY } else { 1.0 }).map(LossValue::of)
    }
}

plugin!(Loss, "squeamish", Squeamish);

fn recipe(white: &str, policy: &str) -> Resolved {
    let text = format!(
        r#"
name = "small"
steps = 14
device = "cpu"
on_non_finite = {policy}
[backbone]
plugin = "vit"
dim = 8
depth = 1
heads = 1
patch_size = 4
pos_encoding = {{ plugin = "none" }}
[data]
plugin = "poisoned"
white = {white}
[batch]
size = 4
[crops]
global_size = 8
local_size = 4
local_count = 1
blur = [0.0, 0.0, 0.0]
[losses.squeamish]
[losses.dino]
head = {{ hidden = 8, bottleneck = 4, prototypes = 8, prototype_std = 0.1 }}
[teacher]
plugin = "ema"
[log]
every = 1
tensorboard = false
[checkpoint]
every = 3
keep = 1
"#
    );
    Resolved::from_text(&text).unwrap_or_else(|e| panic!("{e}"))
}

/// Stops a run after a step.
struct StopsAfter {
    step: Option<u64>,
    stop: Arc<AtomicBool>,
    said: Vec<String>,
}

impl Observer for StopsAfter {
    fn step(&mut self, progress: &Progress<'_>) {
        if self.step == Some(progress.step) {
            self.stop.store(true, Ordering::Relaxed);
        }
    }

    fn warning(&mut self, text: &str) {
        self.said.push(text.into());
    }
}

/// Runs until `stop_after` steps are done, if it is not at its end before; gives what was said.
fn run(resolved: &Resolved, out: &Path, stop_after: Option<u64>) -> Result<(Outcome, Vec<String>)> {
    let stop = Arc::new(AtomicBool::new(false));
    let options =
        RunOptions { out: out.into(), resume: true, stop: stop.clone(), revision: String::new(), save_within: None };
    let mut observer = StopsAfter { step: stop_after, stop, said: Vec::new() };
    train::run(resolved, &options, &mut observer).map(|outcome| (outcome, observer.said))
}

/// What a run ends with: its last checkpoint, and the losses of every step.
fn end(out: &Path) -> (Vec<u8>, Vec<u8>, BTreeMap<u64, String>) {
    let folder = out.join("checkpoints/step-00000014");
    let [model, optimizer] =
        ["model.safetensors", "optimizer.safetensors"].map(|name| fs::read(folder.join(name)).unwrap());
    let metrics = fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let losses = metrics.lines().map(|line| {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        (line["step"].as_u64().unwrap(), line["loss/total"].to_string())
    });
    let losses: Vec<_> = losses.collect();
    assert!(losses.windows(2).all(|w| w[0].0 < w[1].0), "steps ascend: {losses:?}");
    (model, optimizer, losses.into_iter().collect())
}

#[test]
fn a_run_goes_back_past_bad_data_and_ends_the_same_however_it_was_stopped() {
    let folder = tempfile::tempdir().unwrap();
    let resolved = recipe("[5, 40]", "{ rewind = 6 }");
    let whole = folder.path().join("whole");
    let (outcome, said) = run(&resolved, &whole, None).unwrap_or_else(|e| panic!("{e}"));
    assert!(matches!(outcome, Outcome::Finished(_)));
    let went: Vec<&String> = said.iter().filter(|text| text.contains("goes back to step")).collect();
    assert!(!went.is_empty() && went.iter().all(|text| text.contains("loss/squeamish")), "{said:?}");
    // Each step that failed can be seen, whatever failed at that step before.
    let captured = |text: &&String| fs::exists(text.split_once("captured in ").unwrap().1).unwrap();
    assert!(went.iter().all(captured), "{said:?}");
    assert_eq!(fs::read_dir(whole.join("captures")).unwrap().count(), went.len());
    let expected = end(&whole);
    assert_eq!(expected.2.len(), 14);
    assert!(expected.2.values().all(|loss| loss != "null"), "{:?}", expected.2);
    let again = folder.path().join("again");
    run(&resolved, &again, None).unwrap();
    assert!(end(&again) == expected, "a run again gives the same");
    for stops in [vec![1, 5, 7], vec![4, 8, 10], vec![2, 11, 13]] {
        let out = folder.path().join(format!("stopped-{}", stops[0]));
        for stop in stops {
            run(&resolved, &out, Some(stop)).unwrap();
        }
        run(&resolved, &out, None).unwrap();
        assert!(end(&out) == expected, "{}", out.display());
    }
}

#[test]
fn a_run_that_goes_back_too_often_stops() {
    let folder = tempfile::tempdir().unwrap();
    let all: Vec<String> = (0..64).step_by(2).map(|i| i.to_string()).collect();
    let resolved = recipe(&format!("[{}]", all.join(", ")), "{ rewind = 2 }");
    let error = run(&resolved, &folder.path().join("run"), None).unwrap_err().to_string();
    assert!(error.contains("loss/squeamish") && error.contains("not updated"), "{error}");
}
