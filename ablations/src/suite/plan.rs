//! The plan: every run of a suite with its resolved recipe, and the guards that need recipes.
//!
//! The suite knows how to run nothing itself. It is given a [`Prepare`] function, which turns the base recipe and an
//! arm's overrides into something [`Prepared`] to run.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::Arc;
use std::time::Duration;

use dinolab_core::recipe::{is_within, Overrides as Sets, RawRecipe};
use dinolab_core::resolved::changes;
use dinolab_core::{Error, Result};
use toml::Value;

use super::changes::{changed_keys, said};
use super::file::{put_over, says, Overrides, Suite};
use super::places::explained;
use super::retry::{self, OnOutOfMemory, MICRO_BATCHES};
use super::trunk::{self, TRUNK};

/// The folder of a trunk that is tried, in the suite's.
pub const TRIAL_TRUNK: &str = ".trial-trunk";

/// Resolves a recipe file with overrides: every default filled in, every check of a recipe passed.
pub type Prepare<'a> = &'a dyn Fn(&Path, &Overrides) -> Result<Box<dyn Prepared>>;

/// A resolved recipe that can be run.
pub trait Prepared {
    /// The resolved recipe.
    fn recipe(&self) -> &toml::Table;

    /// Two recipes with the same hash are the same run.
    fn hash(&self) -> &str;

    /// Whether `key` changes the numbers of a run: one that was started with another value of it cannot go on.
    fn matters(&self, key: &str) -> bool {
        let _ = key;
        true
    }

    /// What in the recipe probably does not mean what it says.
    fn warnings(&self) -> Vec<String>;

    /// The keys that name weights, and what they name.
    fn sources(&self) -> Result<Vec<(String, PathBuf)>> {
        Ok(Vec::new())
    }

    /// Fails if what it takes of a run of the recipe `parent`, which will be in the folder `run`, does not fit its model.
    fn check_parent(&self, run: &Path, parent: &toml::Table) -> Result<()> {
        let _ = (run, parent);
        Ok(())
    }

    /// Runs it in `job.out`, where it leaves `recipe.toml` before step 0, `metrics.jsonl` on the way, and `result.json`
    /// at the end.
    fn run(&self, job: Job<'_>) -> Result<Outcome>;
}

/// How and where a run is to be done.
pub struct Job<'a> {
    /// The run's folder.
    pub out: &'a Path,
    /// Continue from the newest checkpoint in `out`, or from the beginning if there is none.
    pub resume: bool,
    /// Set by signals: finish the step, save, and return.
    pub stop: Arc<AtomicBool>,
    /// The most that its newest checkpoint ages, where that is less than its recipe says.
    pub save_within: Option<Duration>,
    /// Told what happens.
    pub watch: &'a mut dyn FnMut(Event<'_>),
}

/// Something that happens in a run.
pub enum Event<'a> {
    /// A step is done.
    Step {
        /// Steps done.
        step: u64,
        /// Steps of the run.
        steps: u64,
        /// What is worth reading beside the bar: losses, images a second.
        text: &'a str,
        /// What the step gave, by name.
        values: &'a BTreeMap<String, f64>,
    },
    /// Probes were taken.
    Probed {
        /// Steps done.
        step: u64,
        /// Their scores, by name.
        values: &'a BTreeMap<String, f64>,
    },
    /// A run starts: on what, with what, line by line. What all runs share need not be said of each.
    Started(&'a str),
    /// Something to tell the user.
    Message(&'a str),
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It did all its steps.
    Finished,
    /// It was asked to stop and saved itself.
    Interrupted {
        /// Steps done.
        step: u64,
    },
}

/// One run of a plan.
pub struct PlannedRun {
    /// Name of the arm.
    pub arm: String,
    /// The seed.
    pub seed: u64,
    /// Its folder, relative to the suite's: `arms/<arm>/seed-<n>`, or `trunk/seed-<n>`.
    pub dir: PathBuf,
    /// The recipe that is changed.
    pub base: PathBuf,
    /// What was changed in it: common overrides, then the arm's, then the seed, and the checkpoint of the trunk.
    pub overrides: Overrides,
    /// The same for a trial, which goes on from a trunk that was tried.
    pub trial: Overrides,
    /// What to run.
    pub prepared: Box<dyn Prepared>,
    /// Hash of its resolved recipe; that of an arm that goes on from a trunk says the same wherever the suite's folder lies.
    pub hash: String,
}

impl PlannedRun {
    /// What it is called where a person reads it: `on seed 1`.
    pub fn label(&self) -> String {
        format!("{} seed {}", self.arm, self.seed)
    }
}

/// Every run of a suite, seed by seed, so that complete pairs come early.
pub struct Plan {
    /// The suite.
    pub suite: Suite,
    /// The suite's folder.
    pub out: PathBuf,
    /// What the command line changed in the recipe of all arms.
    pub set: Overrides,
    /// `seeds × arms` runs.
    pub runs: Vec<PlannedRun>,
    /// One run a seed that its arms go on from, if the suite has a trunk.
    pub trunks: Vec<PlannedRun>,
    /// What a reader of the report must know: metrics that not every arm measures, or not alike, keys that change nothing.
    pub warnings: Vec<String>,
    /// What in the arms' recipes probably does not mean what it says, with the arms it is true of.
    pub recipe_warnings: Vec<String>,
}

impl Plan {
    /// Resolves every run of `suite`, with `extra` overrides from the command line on top of the common ones.
    ///
    /// # Errors
    /// If a recipe cannot be resolved, two arms resolve to the same recipe, or an arm differs from the baseline in a key
    /// that the suite does not name.
    pub fn new(suite: Suite, out: PathBuf, extra: &Overrides, prepare: Prepare<'_>) -> Result<Self> {
        let (mut suite, set) = (suite, extra.clone());
        suite.trunk = suite.trunk.take().map(|trunk| trunk.with(extra)).transpose()?;
        let extra: Overrides = match suite.trunk {
            Some(_) => extra.clone().into_iter().filter(|(key, _)| !key.starts_with("trunk.")).collect(),
            None => extra.clone(),
        };
        let from_trunk = |mut overrides: Overrides, run: &Path, trial: bool| {
            if let Some(trunk) = &suite.trunk {
                let step = (!trial).then_some(trunk.fork);
                overrides.insert("continue_from".into(), trunk::continue_from(run, step));
                trunk::place(&mut overrides, run, trial);
            }
            overrides
        };
        if extra.contains_key("seed") {
            let help = "every run has one of the suite's `seeds`: change them there, or choose some with --seeds";
            return Err(Error::user("a suite's runs have no seed of the command line", help));
        }
        let here = std::path::absolute(&out).map_err(Error::io("find", &out))?;
        let (mut runs, mut trunks) = (Vec::new(), Vec::new());
        // What is wrong with one arm is no reason to hide what is wrong with the next.
        let mut refused = Vec::new();
        for &seed in &suite.seeds {
            let number = i64::try_from(seed).map_err(|_| {
                Error::content(&suite.path, format!("seed {seed} is too large"), "TOML integers end at 2^63 - 1")
            })?;
            let with = |set: &Overrides| {
                let mut overrides = suite.common.clone();
                put_over(&mut overrides, &extra);
                put_over(&mut overrides, set);
                overrides.insert("seed".into(), Value::Integer(number));
                overrides
            };
            if let Some(trunk) = &suite.trunk {
                let mut overrides = with(&trunk.set);
                overrides.insert("steps".into(), Value::Integer(trunk.steps as i64));
                let (arm, dir, base) = (TRUNK.to_string(), trunk::folder(seed), trunk.base.clone());
                let trial = overrides.clone();
                match fitted(&suite, &out.join(&dir), &base, &mut overrides, &|p| p.hash().into(), prepare) {
                    Ok((prepared, hash)) => {
                        trunks.push(PlannedRun { arm, seed, dir, base, overrides, trial, prepared, hash });
                    }
                    Err(error) => refused.push((TRUNK, error)),
                }
            }
            for arm in &suite.arms {
                let mut overrides = from_trunk(with(&arm.set), &out.join(trunk::folder(seed)), false);
                let trial = from_trunk(with(&arm.set), &out.join(TRIAL_TRUNK), true);
                let dir = Path::new("arms").join(&arm.name).join(format!("seed-{seed}"));
                let (name, base) = (arm.name.as_str(), suite.base.clone());
                let hash = |prepared: &dyn Prepared| match suite.trunk {
                    None => prepared.hash().to_string(),
                    Some(_) => hash_anywhere(prepared.recipe(), &here),
                };
                match fitted(&suite, &out.join(&dir), &base, &mut overrides, &hash, prepare) {
                    Ok((prepared, hash)) => {
                        runs.push(PlannedRun { arm: name.into(), seed, dir, base, overrides, trial, prepared, hash });
                    }
                    Err(error) => refused.push((name, error)),
                }
            }
            if !refused.is_empty() {
                return Err(explained(&suite, &set, refused));
            }
        }
        let mut plan = Self { suite, out, set, runs, trunks, warnings: Vec::new(), recipe_warnings: Vec::new() };
        plan.check_trunk()?;
        plan.check_arms()?;
        plan.check_declared()?;
        plan.warnings = plan.doubts();
        let keys = plan.of_environment();
        if !keys.is_empty() {
            let keys = keys.join(", ");
            plan.warnings.push(format!("variables of the environment change the recipe of all arms, in {keys}"));
        }
        plan.recipe_warnings = plan.gather_recipe_warnings();
        let idle = plan.set.keys().filter_map(|key| {
            let sets = plan.suite.arms.iter().filter(|arm| says(&arm.set, key));
            let arms: Vec<&str> = sets.map(|arm| arm.name.as_str()).collect();
            match arms.len() {
                0 => None,
                n if n == plan.suite.arms.len() => Some(format!("--set {key} changes nothing: every arm sets it")),
                _ => Some(format!("--set {key} changes nothing in {}: the suite sets it there", arms.join(", "))),
            }
        });
        plan.recipe_warnings.extend(idle.collect::<Vec<_>>());
        Ok(plan)
    }

    /// Whether the command line or the environment changed what changes numbers: then the runs are not those that the suite's
    /// file tells of.
    pub fn is_changed(&self) -> bool {
        let matters =
            |key: &str| key == "steps" || self.first_of_each_arm().iter().any(|run| run.prepared.matters(key));
        self.set.keys().any(|key| matters(key)) || self.of_environment().iter().any(|key| matters(key))
    }

    /// Keys that variables of the environment change in the recipe that all arms share.
    fn of_environment(&self) -> Vec<String> {
        let written = |env: bool| {
            let raw = RawRecipe::load(&self.suite.base).and_then(|raw| raw.with(&Sets { sets: Vec::new(), env }));
            raw.ok().and_then(|raw| serde_json::to_value(raw.value()).ok()).unwrap_or_default()
        };
        changes(&written(false), &written(true)).into_iter().map(|change| change.key).collect()
    }

    /// The step that runs of an arm begin at: the fork, in a suite with a trunk.
    pub fn start(&self, arm: &str) -> u64 {
        self.suite.trunk.as_ref().filter(|_| arm != TRUNK).map_or(0, |trunk| trunk.fork)
    }

    /// Every run: each trunk before the arms that go on from it.
    pub fn all_runs(&self) -> impl Iterator<Item = &PlannedRun> {
        let of_seed = |seed: u64| move |run: &&PlannedRun| run.seed == seed;
        self.suite.seeds.iter().flat_map(move |&seed| {
            self.trunks.iter().filter(of_seed(seed)).chain(self.runs.iter().filter(of_seed(seed)))
        })
    }

    /// The overrides of a run as it is tried: so many steps, on from a trunk that was tried, if there is one.
    pub fn trial_of(&self, run: &PlannedRun, steps: u64) -> Overrides {
        let steps = if self.suite.trunk.is_some() && run.arm != TRUNK { 2 * steps } else { steps };
        let mut overrides = run.trial.clone();
        overrides.insert("steps".into(), Value::Integer(i64::try_from(steps).expect("nobody tries 2^62 steps")));
        overrides
    }

    /// Arms have steps left after the fork, and every step of the trunk that they name is kept.
    fn check_trunk(&self) -> Result<()> {
        let (Some(trunk), Some(first)) = (&self.suite.trunk, self.trunks.first()) else { return Ok(()) };
        let refuse = |problem: String, help: String| Err(Error::content(&self.suite.path, problem, help));
        for run in self.first_of_each_arm() {
            let steps = run.prepared.recipe().get("steps").and_then(Value::as_integer).unwrap_or(0);
            if u64::try_from(steps).is_ok_and(|steps| steps <= trunk.fork) {
                let problem =
                    format!("arm `{}` has {steps} steps, all done at the fork of step {}", run.arm, trunk.fork);
                let help = "steps of arms are counted from the start of the trunk: name more, or shorten the trunk \
                    (--set trunk.steps=...)";
                return refuse(problem, help.into());
            }
        }
        let named = self.suite.arms.iter().flat_map(|arm| trunk::named_steps(&arm.set, TRUNK));
        let named = named.chain(trunk::named_steps(&self.suite.common, TRUNK)).chain([trunk.fork]);
        match named.into_iter().find(|step| !trunk::keeps(first.prepared.recipe(), trunk.steps, *step)) {
            Some(step) => refuse(
                format!("step {step} of the trunk is needed, and its checkpoint would not be kept"),
                format!("set `checkpoint.keep_every` of [trunk] to a divisor of {step}, which is at most its steps"),
            ),
            None => Ok(()),
        }
    }

    /// The runs of the first seed: one of each arm.
    pub fn first_of_each_arm(&self) -> &[PlannedRun] {
        &self.runs[..self.suite.arms.len()]
    }

    /// What an arm's resolved recipe says otherwise than the baseline's, key by key.
    pub fn differences(&self, arm: &str) -> Vec<(String, Option<String>, Option<String>)> {
        changed_keys(self.recipe_of(&self.suite.baseline), self.recipe_of(arm))
    }

    /// The resolved recipe of an arm with the first seed.
    pub(super) fn recipe_of(&self, arm: &str) -> &toml::Table {
        let run = self.first_of_each_arm().iter().find(|run| run.arm == arm);
        run.expect("every arm has a run with the first seed").prepared.recipe()
    }

    /// Two arms that resolve to the same recipe are one arm: their difference would be zero by construction.
    fn check_arms(&self) -> Result<()> {
        let mut seen = BTreeMap::<String, &str>::new();
        for run in self.first_of_each_arm() {
            if let Some(other) = seen.insert(run.prepared.hash().to_string(), &run.arm) {
                let problem = format!("arms `{other}` and `{}` resolve to the same recipe", run.arm);
                let help = "one of them has to set something else: correct a value, or remove an arm";
                return Err(Error::content(&self.suite.path, problem, help));
            }
        }
        Ok(())
    }

    /// Keys in which an arm differs from the baseline although neither sets them, nor a table or plugin around them.
    pub fn undeclared(&self, arm: &str) -> Vec<String> {
        let sets =
            [arm, &self.suite.baseline].map(|name| &self.suite.arm(name).expect("it is an arm of the suite").set);
        let declared = |key: &str| {
            sets.iter().flat_map(|set| set.keys()).chain(&self.suite.follows).any(|set| {
                // The keys of a plugin come and go with it. An override may go inside what was a bare number.
                is_within(key, set.strip_suffix(".plugin").unwrap_or(set)) || is_within(set, key)
            })
        };
        let keys = self.differences(arm).into_iter().map(|(key, ..)| key);
        // A run that did not fit has other micro-batches, if the suite says so; the report tells it.
        let fitted = |key: &String| key == MICRO_BATCHES && self.suite.on_out_of_memory != OnOutOfMemory::Fail;
        keys.filter(|key| !declared(key) && !fitted(key)).collect()
    }

    /// What differs between arms has to be what the suite says: else the comparison is another than the one it names.
    fn check_declared(&self) -> Result<()> {
        for run in self.first_of_each_arm().iter().filter(|run| run.arm != self.suite.baseline) {
            let keys = self.undeclared(&run.arm);
            if !keys.is_empty() {
                let values = self.differences(&run.arm);
                let list =
                    values.iter().filter(|(key, ..)| keys.contains(key)).map(|change| format!("\n  {}", said(change)));
                let problem = format!(
                    "arm `{}` differs from the baseline `{}` in keys that neither sets:{}",
                    run.arm,
                    self.suite.baseline,
                    list.collect::<String>()
                );
                let quoted: Vec<String> = keys.iter().map(|key| format!("{key:?}")).collect();
                let help = format!(
                    "set them in both arms; or, if they belong to the comparison, say so: follows = [{}]",
                    quoted.join(", ")
                );
                return Err(Error::content(&self.suite.path, problem, help));
            }
        }
        Ok(())
    }

    /// Each warning once, however many arms have it.
    fn gather_recipe_warnings(&self) -> Vec<String> {
        let mut arms = BTreeMap::<String, Vec<&str>>::new();
        for run in self.first_of_each_arm() {
            for warning in run.prepared.warnings() {
                arms.entry(warning).or_default().push(&run.arm);
            }
        }
        let say = |(warning, arms): (String, Vec<&str>)| {
            let all = arms.len() == self.suite.arms.len();
            if all {
                warning
            } else {
                format!("{}: {warning}", arms.join(", "))
            }
        };
        arms.into_iter().map(say).collect()
    }
}

/// A run's recipe with its hash; and then with what was found to make it fit into memory, which is no change of the suite.
fn fitted(
    suite: &Suite,
    dir: &Path,
    base: &Path,
    overrides: &mut Overrides,
    hash: &dyn Fn(&dyn Prepared) -> String,
    prepare: Prepare<'_>,
) -> Result<(Box<dyn Prepared>, String)> {
    let planned = prepare(base, overrides)?;
    let (hash, changed) = (hash(planned.as_ref()), retry::changed(suite, dir)?);
    if changed.is_empty() {
        return Ok((planned, hash));
    }
    overrides.extend(changed);
    Ok((prepare(base, overrides)?, hash))
}

/// A hash of a recipe that is the same wherever the suite's folder, in which its trunk is, lies.
fn hash_anywhere(recipe: &toml::Table, folder: &Path) -> String {
    let text = recipe.to_string().replace(&*folder.to_string_lossy(), "{suite}");
    blake3::hash(text.as_bytes()).to_hex().to_string()
}
