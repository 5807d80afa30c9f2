//! `dinolab check`: every operation and loss on random cases.

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestError, TestRng, TestRunner};

use super::case::Case;
use super::loss_oracle::{self, LossOracle};
use super::op_oracle::OpOracle;
use crate::contract::Loss;
use crate::{registry, Device, Error, Result};

/// How a check of one operation or loss ended.
#[derive(Debug)]
pub struct Outcome {
    /// `op` or `loss`.
    pub kind: &'static str,
    /// Its name.
    pub name: &'static str,
    /// What it was held to.
    pub against: &'static str,
    /// Cases that said something.
    pub cases: u32,
    /// The smallest case that fails.
    pub failure: Option<Failure>,
}

/// A case that fails.
#[derive(Debug)]
pub struct Failure {
    /// What does not hold.
    pub reason: String,
    /// A test that fails in the same way.
    pub code: String,
}

/// Everything that can be checked: (kind, name), operations first.
pub fn names() -> Vec<(&'static str, &'static str)> {
    let mut ops: Vec<_> = OpOracle::all().iter().map(|o| ("op", o.name)).collect();
    ops.extend(registry::plugins::<dyn Loss>().iter().map(|entry| ("loss", entry.name)));
    ops
}

/// Checks the named operations and losses (all if none is named) on `cases` random cases each, which are a function of
/// `seed` and the name. [On a GPU](Device::with) each is also held, in f32 and bf16, to the CPU.
///
/// # Errors
/// If a name is not known.
pub fn check(wanted: &[String], cases: u32, seed: u64) -> Result<Vec<Outcome>> {
    let device = Device::current();
    let all = names();
    if let Some(unknown) = wanted.iter().find(|w| !all.iter().any(|(_, name)| name == w)) {
        let nearest = crate::problem::nearest(unknown, all.iter().map(|(_, name)| *name));
        let meant = nearest.map(|n| format!("did you mean `{n}`? ")).unwrap_or_default();
        let known: Vec<&str> = all.iter().map(|(_, name)| *name).collect();
        return Err(Error::user(
            format!("there is no operation or loss `{unknown}` to check"),
            format!("{meant}known: {}", known.join(", ")),
        ));
    }
    let chosen = all.into_iter().filter(|(_, name)| wanted.is_empty() || wanted.iter().any(|w| w == name));
    Device::Cpu.with(|| chosen.map(|(kind, name)| one(kind, name, cases, seed, device)).collect())
}

fn one(kind: &'static str, name: &'static str, cases: u32, seed: u64, device: Device) -> Result<Outcome> {
    let (strategy, against) = match kind {
        "op" => ((op(name).cases)().random(), "dfdx, differences"),
        _ => {
            let oracle: Option<&LossOracle> = loss_oracle::find(name);
            let options = oracle.map_or_else(loss_oracle::no_options, |o| (o.options)());
            let against = if oracle.is_some() { "dfdx, differences, laws" } else { "differences, laws" };
            (loss_oracle::loss_cases(name, options)?, against)
        }
    };
    let config = Config { cases, max_global_rejects: 20 * cases + 100, max_shrink_iters: 4000, ..quiet() };
    let bytes = blake3::hash(format!("{seed} {kind} {name}").as_bytes());
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, bytes.as_bytes()));
    let mut outcome = Outcome { kind, name, against, cases, failure: None };
    let held = runner.run(&strategy, |case| match attempt(kind, name, &case, device) {
        Ok(true) => Ok(()),
        Ok(false) => Err(TestCaseError::reject("says nothing")),
        Err(reason) => Err(TestCaseError::fail(reason)),
    });
    match held {
        Ok(()) => {}
        Err(TestError::Fail(reason, case)) => {
            outcome.failure = Some(Failure { reason: reason.to_string(), code: case.code(kind, name) });
        }
        Err(TestError::Abort(reason)) => {
            let reason = format!("too few of the random cases say something: {reason}");
            outcome.failure = Some(Failure { reason, code: String::new() });
        }
    }
    Ok(outcome)
}

/// Without files beside the sources and without a line for every failing case.
fn quiet() -> Config {
    Config { failure_persistence: None, verbose: 0, ..Config::default() }
}

fn op(name: &str) -> &'static OpOracle {
    inventory::iter::<OpOracle>.into_iter().find(|o| o.name == name).expect("`names` has it from here")
}

fn attempt(kind: &str, name: &str, case: &Case, device: Device) -> Result<bool, String> {
    match kind {
        "op" => op(name).hold(case, device),
        _ => loss_oracle::hold(name, case, device).map(|()| true),
    }
}

/// Holds one operation (`kind` is `op`) or loss (`loss`) to one case: what a failure of [`check`] prints.
///
/// # Errors
/// What does not hold.
///
/// # Panics
/// If there is no such operation or loss.
pub fn hold(kind: &str, name: &str, case: &Case) -> Result<(), String> {
    let device = Device::current();
    Device::Cpu.with(|| attempt(kind, name, case, device)).map(|_| ())
}
