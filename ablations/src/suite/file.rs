//! The suite file: what it may say, the checks that need no recipe, and the expansion of a grid into arms.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use dinolab_core::problem::plain_words;
use dinolab_core::recipe::{read_text, Spread, MOST_RUNS as MOST_MEASURED};
use dinolab_core::text::printable;
use dinolab_core::{Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use toml::Value;

use super::grid_names::{mark, short_key, short_values, MARK};
use super::retry::OnOutOfMemory;
use super::rules::DropRule;
use super::trunk::{Trunk, TrunkEntry, TRUNK};

/// Changes to a recipe: dotted key to value, as `--set` takes them.
pub type Overrides = BTreeMap<String, Value>;

/// An ablation as its file says it.
///
/// ```toml
/// name = "gram_on_off"
/// base = "../recipes/tiny.toml"
/// seeds = [0, 1, 2]
/// metrics = ["probe/linear_segmentation/miou"]
/// baseline = "gram_off"
///
/// [[arm]]
/// name = "gram_off"
/// set = { "losses.gram.enabled" = false }
///
/// [[arm]]
/// name = "gram_on"
/// set = { "losses.gram.enabled" = true }
/// ```
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SuiteFile {
    /// Short name, used for the folder under `runs/`.
    pub name: String,
    /// What is asked, in a sentence or two; opens the report.
    #[serde(default)]
    pub description: String,
    /// The recipe that every arm starts from, relative to this file.
    pub base: PathBuf,
    /// Seeds; every arm runs with each, and arms are compared within a seed.
    pub seeds: Vec<u64>,
    /// Names in `metrics.jsonl` that decide. The first is the headline.
    pub metrics: Vec<MetricEntry>,
    /// The arm that the others are compared with.
    pub baseline: String,
    /// Keys that may differ between arms although no arm sets them, because they follow from one that is set: the widths
    /// that come with `backbone.preset`. A table stands for all its keys.
    #[serde(default)]
    pub follows: Vec<String>,
    /// The smallest difference to the baseline that is worth finding, by metric: `effect = { "probe/knn/top1" = 0.01 }`. The
    /// dry run and the report say how many seeds that takes.
    #[serde(default)]
    pub effect: BTreeMap<String, f64>,
    /// Rules by which a run ends before its steps are done.
    #[serde(default)]
    pub drop: Vec<DropRule>,
    /// What the suite gave: whoever runs it again is told how that compares.
    #[serde(default)]
    pub measured: Option<SuiteMeasured>,
    /// How often a run that fails is tried again, from its newest checkpoint.
    #[serde(default)]
    pub retries: u32,
    /// What becomes of a run that does not fit into memory: `fail`, or `more_micro_batches`.
    #[serde(default)]
    pub on_out_of_memory: OnOutOfMemory,
    /// Changes to the recipe that all arms share.
    #[serde(default)]
    #[schemars(with = "BTreeMap<String, serde_json::Value>")]
    pub set: toml::Table,
    /// What all arms have in common before they part: trained once a seed.
    #[serde(default)]
    pub trunk: Option<TrunkEntry>,
    /// Named arms, each with its changes to the recipe.
    #[serde(default)]
    pub arm: Vec<ArmEntry>,
    /// In place of `[[arm]]`: a list of values for each key; every combination is an arm.
    #[serde(default)]
    #[schemars(with = "BTreeMap<String, Vec<serde_json::Value>>")]
    pub grid: BTreeMap<String, Vec<Value>>,
}

/// A metric: its name, or a table that also says which way is better.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(
    untagged,
    expecting = "expected the name of a metric, or a table { name = \"...\", better = \"higher\" or \"lower\" }"
)]
pub enum MetricEntry {
    /// The name alone: higher is better, except for `loss/...`.
    Name(String),
    /// The name and which way is better.
    Full(Metric),
}

/// A metric that decides.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Metric {
    /// Its name in `metrics.jsonl`, such as `probe/knn/top1`.
    pub name: String,
    /// Which way is better.
    pub better: Better,
}

/// Which way a metric is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Better {
    /// More is better: accuracy, mIoU.
    Higher,
    /// Less is better: a loss.
    Lower,
}

/// One arm as the file says it.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ArmEntry {
    /// Name: letters, digits and `._=+-`.
    pub name: String,
    /// Changes to the recipe: quoted dotted keys or nested tables. A table with a `plugin` key is one value.
    #[serde(default)]
    #[schemars(with = "BTreeMap<String, serde_json::Value>")]
    pub set: toml::Table,
}

/// What runs of a suite gave: the table `[measured]`.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SuiteMeasured {
    /// What they ran on, in words.
    pub on: String,
    /// Seeds of each arm.
    pub n: usize,
    /// Seconds of a run.
    #[serde(default)]
    pub seconds: Option<f64>,
    /// Final values by arm and metric: `[measured.arms.off]`, `"probe/knn/top1" = { mean = 0.3, sd = 0.04 }`.
    #[serde(default)]
    pub arms: BTreeMap<String, BTreeMap<String, Spread>>,
}

/// An arm: a name and its changes to the recipe.
#[derive(Clone, Debug, PartialEq)]
pub struct Arm {
    /// Unique in the suite and fit for a folder.
    pub name: String,
    /// Changes to the recipe.
    pub set: Overrides,
}

/// A suite that passed its checks, with its grid expanded.
#[derive(Clone, Debug)]
pub struct Suite {
    /// Short name.
    pub name: String,
    /// What is asked.
    pub description: String,
    /// The file it came from.
    pub path: PathBuf,
    /// The base recipe.
    pub base: PathBuf,
    /// Seeds, without repeats.
    pub seeds: Vec<u64>,
    /// Metrics that decide, the headline first.
    pub metrics: Vec<Metric>,
    /// Name of the arm that the others are compared with.
    pub baseline: String,
    /// Keys that may differ although no arm sets them.
    pub follows: Vec<String>,
    /// The smallest difference that is worth finding, by metric.
    pub effect: BTreeMap<String, f64>,
    /// Rules by which a run ends before its steps are done.
    pub drop: Vec<DropRule>,
    /// What the suite gave.
    pub measured: Option<SuiteMeasured>,
    /// How often a run that fails is tried again.
    pub retries: u32,
    /// What becomes of a run that does not fit into memory.
    pub on_out_of_memory: OnOutOfMemory,
    /// Changes that all arms share, and the trunk with them.
    pub common: Overrides,
    /// What arms go on from, if they do.
    pub trunk: Option<Trunk>,
    /// At least two, with different names.
    pub arms: Vec<Arm>,
}

impl Suite {
    /// Reads and checks a suite file.
    ///
    /// # Errors
    /// If the file cannot be read, has an unknown key or a wrong type, repeats a seed or an arm name, has fewer than
    /// two arms, or names a baseline that is no arm.
    pub fn load(path: &Path) -> Result<Self> {
        if path.is_dir() {
            let help =
                "name the suite's file, such as ablations/gram_on_off.toml; --out names the folder of its results";
            return Err(Error::content(path, "this is a folder, no suite", help));
        }
        let text = read_text(path).map_err(|e| e.error(path))?;
        // A recipe says what a model is, which no suite does.
        if text.parse::<toml::Table>().is_ok_and(|table| table.contains_key("backbone") && !table.contains_key("base"))
        {
            let help = "train it with `dinolab train`, or name it as the `base` of a suite";
            return Err(Error::content(path, "this is a recipe, no suite", help));
        }
        let file: SuiteFile = toml::from_str(&text).map_err(|e| {
            let help = match e.to_string().contains("expected a sequence") && text.contains("[grid]") {
                true => "a key of [grid] is one word: quote it where it has dots, \"optimizer.lr\" = [1e-3, 1e-4]",
                false => "`dinolab recipe schema suite` prints every key that a suite may have",
            };
            Error::content(path, plain_words(e.to_string().trim_end()), help)
        })?;
        Self::check(file, path).map_err(|(problem, help)| Error::content(path, problem, help))
    }

    fn check(file: SuiteFile, path: &Path) -> Result<Self, (String, String)> {
        check_name("name", &file.name)?;
        if file.seeds.is_empty() {
            return Err(problem("`seeds` is empty", "name at least one; three or more give an interval"));
        }
        if let Some(seed) = first_repeat(&file.seeds) {
            let help = "a seed that runs twice is the same run twice and would fake certainty: keep one";
            return Err(problem(format!("seed {seed} is repeated in `seeds`"), help));
        }
        let metrics: Vec<Metric> = file.metrics.into_iter().map(Metric::from).collect();
        if metrics.is_empty() {
            return Err(problem("`metrics` is empty", "name at least one, such as \"probe/knn/top1\""));
        }
        let names: Vec<&String> = metrics.iter().map(|m| &m.name).collect();
        if let Some(name) = first_repeat(&names) {
            return Err(problem(format!("metric `{name}` is repeated in `metrics`"), "keep one"));
        }
        let arms = match (file.arm.is_empty(), file.grid.is_empty()) {
            (false, true) => named_arms(&file.arm)?,
            (true, false) => grid_arms(&file.grid)?,
            (true, true) => {
                return Err(problem("there are no arms", "add two or more `[[arm]]` tables, or a `[grid]`"))
            }
            (false, false) => {
                let help = "write the combinations as `[[arm]]` tables, or all of them as a `[grid]`";
                return Err(problem("both `[[arm]]` and `[grid]` are given", help));
            }
        };
        if arms.len() < 2 {
            return Err(problem("there is one arm only", "an ablation compares: add the arm to compare it with"));
        }
        let common = overrides(&file.set);
        for (place, set) in arms.iter().map(|a| (a.name.as_str(), &a.set)).chain([("the common `set`", &common)]) {
            if set.contains_key("seed") {
                let help = "list it in `seeds`: arms are compared within a seed";
                return Err(problem(format!("{place} sets `seed`"), help));
            }
        }
        if !arms.iter().any(|a| a.name == file.baseline) {
            let known: Vec<&str> = arms.iter().map(|a| a.name.as_str()).collect();
            let nearest = nearest(&file.baseline, &known);
            let help = format!("the arms are {}; did you mean `{nearest}`?", known.join(", "));
            return Err(problem(format!("the baseline `{}` is no arm", file.baseline), help));
        }
        let base = beside(path, &file.base);
        let trunk = file.trunk.map(|entry| trunk(entry, path, &base, &arms, &common)).transpose()?;
        let runs = arms.len().saturating_mul(file.seeds.len());
        if runs > MOST_RUNS {
            let help = format!("{MOST_RUNS} are the most; split the question into several suites");
            return Err(problem(format!("{} arms with {} seeds are {runs} runs", arms.len(), file.seeds.len()), help));
        }
        let (name, description, seeds, baseline) = (file.name, file.description, file.seeds, file.baseline);
        let (path, follows) = (path.to_path_buf(), file.follows);
        for (name, size) in &file.effect {
            if !metrics.iter().any(|metric| metric.name == *name) {
                let known: Vec<&str> = metrics.iter().map(|metric| metric.name.as_str()).collect();
                let help = format!("its metrics are {}; did you mean `{}`?", known.join(", "), nearest(name, &known));
                return Err(problem(format!("`effect` names `{name}`, which is no metric of the suite"), help));
            }
            if !(size.is_finite() && *size > 0.0) {
                return Err(problem(format!("the effect of `{name}` is {size}"), "name a difference above zero"));
            }
        }
        if let Some(measured) = &file.measured {
            let known: Vec<&str> = arms.iter().map(|a| a.name.as_str()).collect();
            if let Some(name) = measured.arms.keys().find(|name| !known.contains(&name.as_str())) {
                let help = format!("its arms are {}; did you mean `{}`?", known.join(", "), nearest(name, &known));
                return Err(problem(format!("[measured] has an arm `{name}`, which the suite has not"), help));
            }
            if !(1..=MOST_MEASURED).contains(&measured.n) {
                let what = format!("measured.n = {}, which is no number of seeds", measured.n);
                return Err(problem(what, format!("write how many each arm had, 1 to {MOST_MEASURED}")));
            }
            if let Some(seconds) = measured.seconds.filter(|seconds| !(seconds.is_finite() && *seconds >= 0.0)) {
                return Err(problem(format!("measured.seconds = {seconds}"), "write the seconds of a run"));
            }
            let spreads =
                measured.arms.iter().flat_map(|(arm, of)| of.iter().map(move |(name, spread)| (arm, name, spread)));
            for (arm, name, spread) in spreads {
                if !metrics.iter().any(|metric| metric.name == *name) {
                    let known: Vec<&str> = metrics.iter().map(|metric| metric.name.as_str()).collect();
                    let help =
                        format!("its metrics are {}; did you mean `{}`?", known.join(", "), nearest(name, &known));
                    return Err(problem(format!("[measured] has `{name}` of `{arm}`, no metric of the suite"), help));
                }
                if !spread.is_sound() {
                    let what =
                        format!("[measured] says that `{name}` of `{arm}` is {} with {}", spread.mean, spread.sd);
                    return Err(problem(what, "write numbers, the spread 0 or more"));
                }
            }
        }
        for rule in &file.drop {
            rule.check().map_err(|(what, help)| problem(what, help))?;
        }
        let (retries, on_out_of_memory) = (file.retries, file.on_out_of_memory);
        let (effect, drop, measured) = (file.effect, file.drop, file.measured);
        Ok(Self {
            name,
            description,
            path,
            base,
            seeds,
            metrics,
            baseline,
            follows,
            effect,
            drop,
            measured,
            retries,
            on_out_of_memory,
            common,
            trunk,
            arms,
        })
    }

    /// The arm of that name.
    pub fn arm(&self, name: &str) -> Option<&Arm> {
        self.arms.iter().find(|a| a.name == name)
    }
}

impl From<MetricEntry> for Metric {
    fn from(entry: MetricEntry) -> Self {
        match entry {
            MetricEntry::Full(metric) => metric,
            MetricEntry::Name(name) => {
                let better = if name.starts_with("loss/") { Better::Lower } else { Better::Higher };
                Self { name, better }
            }
        }
    }
}

/// The known name that is most like `name`.
pub fn nearest<'a>(name: &str, known: &[&'a str]) -> &'a str {
    let closeness = |k: &&&str| (strsim::jaro_winkler(name, k) * 1e9) as u64;
    known.iter().max_by_key(closeness).copied().unwrap_or_default()
}

/// Nested tables as dotted keys. A table that names a plugin is one value, since a plugin's keys mean nothing to
/// another: it replaces what was there instead of being merged into it.
pub fn overrides(table: &toml::Table) -> Overrides {
    fn walk(prefix: &str, table: &toml::Table, into: &mut Overrides) {
        for (key, value) in table {
            let key = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
            match value {
                Value::Table(inner) if !inner.contains_key("plugin") && !inner.is_empty() => walk(&key, inner, into),
                _ => {
                    into.insert(key, value.clone());
                }
            }
        }
    }
    let mut into = Overrides::new();
    walk("", table, &mut into);
    into
}

/// Puts `upper` over `lower`: a value replaces what keys inside it said before, as far as it says something else.
pub fn put_over(lower: &mut Overrides, upper: &Overrides) {
    lower.retain(|key, _| !says(upper, key));
    lower.extend(upper.clone());
}

/// Whether overrides give a key its value: by its name, or by a table around it that has it.
pub fn says(set: &Overrides, key: &str) -> bool {
    fn has(value: &Value, path: &str) -> bool {
        let (first, rest) = path.split_once('.').unwrap_or((path, ""));
        match value {
            Value::Table(table) => table.get(first).is_some_and(|inner| rest.is_empty() || has(inner, rest)),
            _ => true,
        }
    }
    let inside = |table: &str| key.strip_prefix(table)?.strip_prefix('.');
    set.iter().any(|(name, value)| name == key || inside(name).is_some_and(|path| has(value, path)))
}

/// `base` relative to the folder of `path`, without `folder/..` in it, since people read it in messages.
pub(crate) fn beside(path: &Path, base: &Path) -> PathBuf {
    let mut joined = path.parent().unwrap_or(Path::new("")).to_path_buf();
    for part in base.components() {
        let inside = matches!(joined.components().next_back(), Some(Component::Normal(_)));
        match part {
            // A link may lead elsewhere than its name says; then the long form is the right one.
            Component::ParentDir if inside && !joined.is_symlink() => drop(joined.pop()),
            _ => joined.push(part),
        }
    }
    joined
}

fn problem(what: impl Into<String>, help: impl Into<String>) -> (String, String) {
    (what.into(), help.into())
}

fn first_repeat<T: Ord>(items: &[T]) -> Option<&T> {
    let mut seen = BTreeSet::new();
    items.iter().find(|item| !seen.insert(*item))
}

/// The trunk, if its arms leave it alone.
fn trunk(
    entry: TrunkEntry,
    path: &Path,
    base: &Path,
    arms: &[Arm],
    common: &Overrides,
) -> Result<Trunk, (String, String)> {
    if arms.iter().any(|arm| arm.name == TRUNK) {
        return Err(problem("an arm has the name `trunk`, which is the trunk's", "give it another"));
    }
    let set = overrides(&entry.set);
    let own = |key: &&String| ["seed", "steps"].contains(&key.as_str());
    if let Some(key) = set.keys().find(own) {
        let help = "seeds are the suite's, and steps are a key of [trunk] itself";
        return Err(problem(format!("[trunk] sets `{key}` of its recipe"), help));
    }
    let all = arms.iter().map(|arm| &arm.set).chain([common, &set]);
    if all.flat_map(Overrides::keys).any(|key| key == "continue_from" || key.starts_with("continue_from.")) {
        return Err(problem("`continue_from` is set, and there is a [trunk]", "arms go on from the trunk: remove one"));
    }
    let steps = entry.steps;
    let fork = entry.fork.unwrap_or(steps);
    if steps == 0 || fork == 0 || fork > steps {
        let help = "`fork` is a step of the trunk, at least 1 and at most its `steps`";
        return Err(problem(format!("arms go on from step {fork} of a trunk of {steps} steps"), help));
    }
    let base = entry.recipe.map_or(base.to_path_buf(), |recipe| beside(path, &recipe));
    Ok(Trunk { base, set, steps, fork })
}

/// The most runs of a suite: more are a slip of a grid.
const MOST_RUNS: usize = 10_000;
/// The most characters of a name: it is part of file names, which end at 255 bytes.
const LONGEST_NAME: usize = 200;

/// Names become folders, so they are kept to characters that every file system and shell takes as they are.
pub(crate) fn check_name(what: &str, name: &str) -> Result<(), (String, String)> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "._=+-".contains(c);
    if name.is_empty() || name.starts_with('.') || !name.chars().all(fits) {
        let help = "it becomes a folder: use letters, digits and ._=+- and do not begin with a dot";
        return Err(problem(format!("{what} `{}` cannot be used", printable(name)), help));
    }
    if name.len() > LONGEST_NAME {
        let help = format!("it becomes a folder: use at most {LONGEST_NAME}");
        return Err(problem(format!("{what} `{}...` has {} characters", &name[..40], name.len()), help));
    }
    Ok(())
}

fn named_arms(entries: &[ArmEntry]) -> Result<Vec<Arm>, (String, String)> {
    for entry in entries {
        check_name("arm name", &entry.name)?;
    }
    let names: Vec<&String> = entries.iter().map(|a| &a.name).collect();
    if let Some(name) = first_repeat(&names) {
        return Err(problem(format!("arm name `{name}` is repeated"), "give every arm a name of its own"));
    }
    Ok(entries.iter().map(|a| Arm { name: a.name.clone(), set: overrides(&a.set) }).collect())
}

/// Every combination of the grid's values; the last key varies fastest.
fn grid_arms(grid: &BTreeMap<String, Vec<Value>>) -> Result<Vec<Arm>, (String, String)> {
    let mut count: usize = 1;
    for (key, values) in grid {
        if values.is_empty() {
            return Err(problem(format!("grid key `{key}` has no values"), "list them, or remove the key"));
        }
        let written: Vec<String> = values.iter().map(Value::to_string).collect();
        if let Some(value) = first_repeat(&written) {
            return Err(problem(format!("grid key `{key}` has the value {value} twice"), "list every value once"));
        }
        count = count.saturating_mul(values.len());
    }
    if count > MOST_RUNS {
        let help =
            format!("{MOST_RUNS} runs are the most; list fewer values, or split the question into several suites");
        return Err(problem(format!("the grid has {count} combinations"), help));
    }
    let keys: Vec<&str> = grid.keys().map(String::as_str).collect();
    let mut arms = vec![Arm { name: String::new(), set: Overrides::new() }];
    for (key, values) in grid {
        let (key_name, value_names) = (short_key(key, &keys), short_values(values));
        let extend = |arm: &Arm, (value, name): (&Value, &String)| {
            let plus = if arm.name.is_empty() { "" } else { "+" };
            let mut set = arm.set.clone();
            set.insert(key.clone(), value.clone());
            Arm { name: format!("{}{plus}{key_name}={name}", arm.name), set }
        };
        arms = arms.iter().flat_map(|arm| values.iter().zip(&value_names).map(move |v| extend(arm, v))).collect();
    }
    for arm in &mut arms {
        if arm.name.len() > LONGEST_NAME {
            let cut = LONGEST_NAME - MARK - 1;
            arm.name = format!("{}-{}", &arm.name[..cut], mark(&arm.name));
        }
        check_name("arm name", &arm.name)?;
    }
    let names: Vec<&String> = arms.iter().map(|a| &a.name).collect();
    if let Some(name) = first_repeat(&names) {
        return Err(problem(format!("the grid gives two arms of the name `{name}`"), "write it as `[[arm]]` tables"));
    }
    Ok(arms)
}
