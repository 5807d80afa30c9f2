//! The trunk of a suite: what all arms have in common before they part, trained once a seed.

use std::path::{Path, PathBuf};

use dinolab_core::{Error, Result};
use schemars::JsonSchema;
use serde::Deserialize;
use toml::Value;

use super::file::Overrides;

/// The name of the trunk where arms have theirs, and of its folder.
pub const TRUNK: &str = "trunk";
/// What stands for the folder of the seed's trunk in the values of arms.
const PLACE: &str = "{trunk}";

/// The trunk as the file says it: one run a seed, under the suite's `set`, from which every arm goes on with weights,
/// moments, state and step (`continue_from`). Arms count their `steps` from the start of the trunk.
///
/// In the values of arms `{trunk}` is the folder of the seed's trunk and `{trunk}@100` its checkpoint of step 100:
/// `"teachers.gram.source" = { checkpoint = "{trunk}@100" }`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TrunkEntry {
    /// Its recipe, relative to this file; by default `base`.
    #[serde(default)]
    pub recipe: Option<PathBuf>,
    /// Its steps.
    pub steps: u64,
    /// The step that arms go on from; by default the last. `checkpoint.keep_every` has to keep it.
    #[serde(default)]
    pub fork: Option<u64>,
    /// Changes to its recipe.
    #[serde(default)]
    #[schemars(with = "std::collections::BTreeMap<String, serde_json::Value>")]
    pub set: toml::Table,
}

/// A trunk that passed its checks.
#[derive(Clone, Debug, PartialEq)]
pub struct Trunk {
    /// Its recipe.
    pub base: PathBuf,
    /// Changes to its recipe.
    pub set: Overrides,
    /// Its steps.
    pub steps: u64,
    /// The step that arms go on from.
    pub fork: u64,
}

impl Trunk {
    /// Takes what the command line says of the trunk: `trunk.steps`, `trunk.fork`, and keys of its recipe under `trunk.`.
    ///
    /// # Errors
    /// If a number is none, or the fork lies behind the trunk.
    pub fn with(mut self, extra: &Overrides) -> Result<Self> {
        let number = |key: &str, value: &Value| {
            let number = value.as_integer().and_then(|n| u64::try_from(n).ok()).filter(|n| *n > 0);
            number.ok_or_else(|| {
                Error::user(format!("trunk.{key} = {value} is no number of steps"), "give a whole number")
            })
        };
        let said = extra.iter().filter_map(|(key, value)| Some((key.strip_prefix("trunk.")?, value)));
        let mut fork = (self.fork != self.steps).then_some(self.fork);
        for (key, value) in said {
            match key {
                "steps" => self.steps = number(key, value)?,
                "fork" => fork = Some(number(key, value)?),
                _ => drop(self.set.insert(key.into(), value.clone())),
            }
        }
        self.fork = fork.unwrap_or(self.steps);
        if self.fork > self.steps {
            let problem = format!("arms go on from step {} of a trunk of {} steps", self.fork, self.steps);
            return Err(Error::user(problem, "lower `fork` of [trunk], or raise its `steps`"));
        }
        Ok(self)
    }
}

/// Whether a run of so many steps whose resolved recipe is this one keeps a checkpoint of `step` for certain: it is the last,
/// or one that is kept for ever. Of others an interruption may decide.
pub fn keeps(recipe: &toml::Table, steps: u64, step: u64) -> bool {
    let every = recipe.get("checkpoint").and_then(|table| table.get("keep_every")).and_then(Value::as_integer);
    let every = every.and_then(|n| u64::try_from(n).ok()).unwrap_or(0);
    step == steps || step < steps && every > 0 && step.is_multiple_of(every)
}

/// The folder of a trunk of this seed, relative to the suite's.
pub fn folder(seed: u64) -> PathBuf {
    Path::new(TRUNK).join(format!("seed-{seed}"))
}

/// Whether two values of a key are one place in a trunk, wherever the suite's folder lies.
pub fn are_same_place(one: &Option<String>, other: &Option<String>) -> bool {
    let inside = |value: &Option<String>| {
        let value = value.as_ref()?;
        value.rfind(&format!("/{TRUNK}/seed-")).map(|at| value[at..].to_string())
    };
    inside(one).is_some_and(|place| inside(other) == Some(place))
}

/// The checkpoint that an arm goes on from, as a value of `continue_from`.
pub fn continue_from(run: &Path, step: Option<u64>) -> Value {
    let mut table = toml::Table::new();
    table.insert("run".into(), run.to_string_lossy().into_owned().into());
    table.extend(step.map(|step| ("step".to_string(), Value::Integer(step as i64))));
    table.into()
}

/// Puts a folder in the place of `{trunk}`. A `trial`, whose trunk has a few steps, is at its newest checkpoint whatever
/// step is named.
pub fn place(set: &mut Overrides, run: &Path, trial: bool) {
    set.values_mut().for_each(|value| {
        walk(value, &mut |text| {
            let Some(at) = text.find(PLACE) else { return };
            let rest = &text[at + PLACE.len()..];
            let step = rest.strip_prefix('@').map_or(0, |rest| 1 + rest.bytes().take_while(u8::is_ascii_digit).count());
            let kept = if trial { &rest[step..] } else { rest };
            *text = format!("{}{}{kept}", &text[..at], run.display());
        })
    });
}

/// The steps of a run that values name: `{trunk}@20` of the one that is called `trunk`.
pub fn named_steps(set: &Overrides, run: &str) -> Vec<u64> {
    let place = format!("{{{run}}}@");
    let mut steps = Vec::new();
    for value in set.values() {
        walk(&mut value.clone(), &mut |text| {
            let digits = text.split_once(&place).map(|(_, rest)| rest.split(|c: char| !c.is_ascii_digit()).next());
            steps.extend(digits.flatten().and_then(|digits| digits.parse::<u64>().ok()));
        });
    }
    steps
}

/// Shows every text in a value.
pub fn walk(value: &mut Value, see: &mut dyn FnMut(&mut String)) {
    match value {
        Value::String(text) => see(text),
        Value::Array(list) => list.iter_mut().for_each(|inner| walk(inner, see)),
        Value::Table(table) => table.iter_mut().for_each(|(_, inner)| walk(inner, see)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(text: &str) -> Overrides {
        super::super::file::overrides(&text.parse().expect("TOML"))
    }

    #[test]
    fn the_place_of_the_trunk_is_filled_in_wherever_it_stands() {
        let arm =
            set("teachers.gram = { plugin = \"x\", source = { checkpoint = \"{trunk}@20\" } }\nname = \"{trunk}\"");
        assert_eq!(named_steps(&arm, TRUNK), [20]);
        let (mut real, mut trial) = (arm.clone(), arm);
        place(&mut real, Path::new("out/trunk/seed-1"), false);
        place(&mut trial, Path::new("try"), true);
        let source = |set: &Overrides| set["teachers.gram"]["source"]["checkpoint"].as_str().unwrap().to_string();
        assert_eq!((source(&real), source(&trial)), ("out/trunk/seed-1@20".into(), "try".into()));
        assert_eq!(real["name"].as_str(), Some("out/trunk/seed-1"));
    }

    #[test]
    fn the_command_line_shortens_a_trunk_and_its_fork_with_it() {
        let trunk = Trunk { base: "a.toml".into(), set: Overrides::new(), steps: 400, fork: 400 };
        let short = trunk.clone().with(&set("trunk.steps = 6\ntrunk.checkpoint.keep_every = 3\nlr = 1")).unwrap();
        assert_eq!((short.steps, short.fork, short.set.len()), (6, 6, 1));
        assert!(trunk.clone().with(&set("trunk.fork = 500")).is_err() && trunk.with(&set("trunk.steps = -1")).is_err());
        let recipe = |text: &str| text.parse::<toml::Table>().unwrap();
        let kept = |step| keeps(&recipe("checkpoint = { keep_every = 3 }"), short.steps, step);
        assert!(kept(6) && kept(3) && !kept(4) && !kept(9));
        assert!(!keeps(&recipe("checkpoint = { keep_every = 0 }"), short.steps, 3));
        // An interruption at step 6 would take the place of the one of step 4.
        let newest = |step| keeps(&recipe("checkpoint = { every = 2, keep = 2 }"), 7, step);
        assert!(newest(7) && !newest(6) && !newest(4));
    }
}
