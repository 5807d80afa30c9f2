//! What `recipe check` accepts, trains; what it refuses, it refuses in words: recipes made at random from the schema.
//!
//! A run of this test is short. A long one: `DINOLAB_FUZZ=100000,2000,7 cargo test --release -p dinolab-tests --test cli
//! fuzz_recipes -- --nocapture` checks 100,000 recipes and trains 2,000 for three steps, from seed 7. What fails is printed
//! as the `--set`s that do it again, on top of `cases.rs`'s recipe.

mod cases;

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::channel;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cases::{Case, Cases, Mood};
use dinolab_core::contract::DataContext;
use dinolab_core::resolved::cost::cost_on;
use dinolab_core::resolved::Resolved;
use dinolab_core::train::{self, Outcome, RunOptions, Silent};
use dinolab_core::{Device, Error};
use rayon::prelude::*;

// The plugins register themselves when they are linked in.
use dinolab_plugins as _;

/// Longer than any check takes, on a machine with other work too.
const LONGEST_CHECK: Duration = Duration::from_secs(20);
/// Longer than three steps of a run within the budget take.
const LONGEST_RUN: Duration = Duration::from_secs(180);
/// Runs that are estimated to take more memory (bytes) or work (operations a step) are left out.
const MOST_MEMORY: f64 = 4e8;
const MOST_WORK: f64 = 2e9;

/// Recipes to check, runs to train, and the seed.
fn plan() -> (u64, u64, u64) {
    let Ok(text) = std::env::var("DINOLAB_FUZZ") else { return (1000, 12, 1) };
    let numbers: Vec<u64> = text.split(',').map(|n| n.trim().parse().expect("DINOLAB_FUZZ=checks,runs,seed")).collect();
    let [checks, runs, seed] = numbers[..] else { panic!("DINOLAB_FUZZ=checks,runs,seed") };
    (checks, runs, seed)
}

/// What was thrown, as text.
fn thrown(payload: &(dyn std::any::Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().map(String::as_str).or(payload.downcast_ref::<&str>().copied());
    text.unwrap_or("something without a text").to_string()
}

/// The resolved recipe, or what was said; a fault of the program is an outer error.
fn checked(case: &Case) -> Result<Result<Resolved, String>, String> {
    let begin = Instant::now();
    let result = catch_unwind(AssertUnwindSafe(|| case.resolve()));
    let result = result.map_err(|payload| format!("panic: {}", thrown(payload.as_ref())))?;
    if begin.elapsed() > LONGEST_CHECK {
        return Err(format!("took {:?}", begin.elapsed()));
    }
    let error = match result {
        Ok(resolved) => return Ok(Ok(resolved)),
        Err(error) => error,
    };
    let text = error.to_string();
    let inner = [
        "nested:",
        "panicked",
        "unwrap",
        "figment",
        "serde",
        "overflow",
        "shape",
        "invalid type",
        "data did not match",
    ];
    match inner.iter().find(|word| text.contains(**word)) {
        Some(word) => Err(format!("`{word}` in the message:\n{text}")),
        None if !matches!(error, Error::Recipe(_)) => Err(format!("no problem of a recipe:\n{text}")),
        None => Ok(Err(text)),
    }
}

#[test]
fn what_check_says_of_any_recipe_is_said_in_words() {
    let (checks, _, seed) = plan();
    let cases = Cases::new(seed);
    let begin = Instant::now();
    let check = |i| {
        let case = cases.case(i, if i % 4 == 0 { Mood::Sound } else { Mood::Wild });
        let result = checked(&case).map(|result| result.is_ok());
        (case, result)
    };
    // Threads of their own: the runs of the other test would wait for the last of these in a pool that they share.
    let pool = rayon::ThreadPoolBuilder::new().build().expect("threads start");
    let results: Vec<(Case, Result<bool, String>)> = pool.install(|| (0..checks).into_par_iter().map(check).collect());
    let accepted = results.iter().filter(|(_, r)| *r == Ok(true)).count();
    let failed: Vec<String> =
        results.iter().filter_map(|(case, r)| Some(format!("{}\n    {}", case.command(), r.as_ref().err()?))).collect();
    println!(
        "{checks} recipes over {} keys: {accepted} accepted, {} refused, {} failed, in {:.0?}",
        cases.keys(),
        results.len() - accepted - failed.len(),
        failed.len(),
        begin.elapsed()
    );
    assert!(failed.is_empty(), "{} fail:\n{}", failed.len(), failed[..failed.len().min(20)].join("\n"));
    assert!(accepted as u64 > checks / 50, "the cases are so wild that hardly any is accepted");
}

/// How three steps went.
#[derive(Debug)]
enum Went {
    Trained,
    /// A loss or gradient was not finite, and the run said so.
    Diverged(String),
    Failed(String),
}

fn trained(resolved: Resolved) -> Went {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (send, receive) = channel();
    let out = folder.path().join("run");
    let stop = Arc::new(AtomicBool::new(false));
    std::thread::spawn(move || {
        let options = RunOptions { out, resume: false, stop, revision: "fuzz".into(), save_within: None };
        let went = match catch_unwind(AssertUnwindSafe(|| train::run(&resolved, &options, &mut Silent))) {
            Err(payload) => Went::Failed(format!("panic: {}", thrown(payload.as_ref()))),
            Ok(Ok(Outcome::Finished(result))) if result.metrics.contains_key("loss/total") => Went::Trained,
            Ok(Ok(other)) => Went::Failed(format!("{other:?}")),
            Ok(Err(error @ Error::NonFinite { .. })) => Went::Diverged(error.to_string()),
            Ok(Err(error)) => Went::Failed(error.to_string()),
        };
        // Nobody listens to a run that took too long.
        let _ = send.send(went);
    });
    receive.recv_timeout(LONGEST_RUN).unwrap_or_else(|_| Went::Failed(format!("hangs: more than {LONGEST_RUN:?}")))
}

/// Whether a run is within the budget of time and memory; of what the formula does not count, that it is small.
fn is_small(resolved: &Resolved) -> bool {
    let value = |pointer: &str| resolved.value.pointer(pointer).and_then(serde_json::Value::as_f64).unwrap_or(0.0);
    let of_probes =
        resolved.recipe.probes.0.keys().flat_map(|name| ["size", "sizes"].map(|key| format!("/probes/{name}/{key}")));
    let sizes = of_probes.chain(["/data/size".into()]).filter_map(|pointer| resolved.value.pointer(&pointer));
    let sides = sizes.flat_map(|s| s.as_array().cloned().unwrap_or(vec![s.clone()]));
    let probed = resolved.recipe.probes.0.keys().flat_map(|name| {
        ["samples", "train_samples", "test_samples", "iterations"].map(|key| format!("/probes/{name}/{key}"))
    });
    let Ok(cost) = cost_on(&resolved.recipe, Device::Cpu) else { return true };
    cost.total_memory() < MOST_MEMORY
        && cost.flops_per_image * value("/batch/size") < MOST_WORK
        && sides.into_iter().all(|side| side.as_f64().unwrap_or(0.0) <= 256.0)
        && probed.into_iter().all(|pointer| value(&pointer) <= 64.0)
        && value("/batch/prefetch") * cost.total_memory() < 10.0 * MOST_MEMORY
        && resolved.recipe.steps <= 20
}

/// Whether `recipe check` finds in the data what the recipe asks of it.
fn fits_its_data(resolved: &Resolved) -> bool {
    let data = resolved.recipe.data.build(&mut DataContext { seed: resolved.recipe.seed });
    data.map_or(true, |data| resolved.check_data(data.as_ref()).is_ok())
}

/// Whether nothing but the machine or files that are not there keep it from running.
fn is_for_here(resolved: &Resolved) -> bool {
    resolved.recipe.device().is_ok_and(|device| device == Device::Cpu)
        && resolved.value.pointer("/data/path").is_none()
        && resolved.value.pointer("/continue_from").is_none()
        && resolved.value.pointer("/teacher/checkpoint").is_none()
        && resolved.value.pointer("/teachers/gram/source/checkpoint").is_none()
}

#[test]
fn what_check_accepts_trains() {
    let (_, runs, seed) = plan();
    let cases = Cases::new(seed.wrapping_add(1 << 32));
    let begin = Instant::now();
    let (mut trained_runs, mut too_large, mut refused, mut elsewhere) = (0, 0, 0, 0);
    let (mut diverged, mut failed) = (Vec::new(), Vec::new());
    for i in 0.. {
        if trained_runs + diverged.len() as u64 + failed.len() as u64 >= runs || failed.len() >= 40 {
            break;
        }
        let case = cases.case(i, Mood::Sound);
        let Some(resolved) = checked(&case).ok().and_then(Result::ok).filter(fits_its_data) else {
            refused += 1;
            continue;
        };
        if !is_for_here(&resolved) {
            elsewhere += 1;
            continue;
        }
        if !is_small(&resolved) {
            too_large += 1;
            continue;
        }
        match trained(resolved) {
            Went::Trained => trained_runs += 1,
            Went::Diverged(what) => diverged.push(format!("{}\n    {what}", case.command())),
            Went::Failed(what) => {
                println!("fails:{}\n    {what}", case.command());
                failed.push(case.command());
            }
        }
    }
    println!(
        "{trained_runs} runs of three steps trained, {} diverged and said so, {} failed; {refused} recipes were refused, \
         {too_large} left out as too large, {elsewhere} as for elsewhere, in {:.0?}",
        diverged.len(),
        failed.len(),
        begin.elapsed()
    );
    diverged.iter().for_each(|case| println!("diverges:{case}"));
    assert!(failed.is_empty(), "{} fail:\n{}", failed.len(), failed.join("\n"));
    // Ranges are such that numbers in them compute.
    assert!(diverged.len() as u64 * 50 <= runs, "{} of {runs} runs diverge", diverged.len());
}
