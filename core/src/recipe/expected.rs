//! What runs of a recipe gave, as its own table `[measured]` says it. Whoever runs it again is told how that compares.
//!
//! The table is no part of the recipe: it changes no number and no hash, and a recipe that extends another does not inherit
//! it, since another recipe gives other numbers.

use std::collections::BTreeMap;

use figment::value::Value;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::problem::Nested;
use crate::problem::Problem;

/// The table of a recipe.
pub(super) const KEY: &str = "measured";

/// What runs gave: the table `[measured]` of a recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Expected {
    /// What they ran on, in words.
    pub on: String,
    /// How many they were, each with a seed of its own.
    pub n: usize,
    /// Seconds of a run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1e12))]
    pub seconds: Option<f64>,
    /// Hash of the data that they saw, of a dataset that has one: `data` of their `run.json`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<String>,
    /// Final values by name: `"probe/knn/top1" = { mean = 0.298, sd = 0.041 }`.
    #[serde(default)]
    pub metrics: BTreeMap<String, Spread>,
    /// Values over steps by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub curves: BTreeMap<String, Curve>,
}

/// A value over seeds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Spread {
    /// Mean.
    #[schemars(range(min = -1e30, max = 1e30))]
    pub mean: f64,
    /// Sample standard deviation.
    #[schemars(range(min = 0, max = 1e30))]
    pub sd: f64,
}

/// A value over steps and seeds: lists of equal length.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Curve {
    /// Steps done, ascending.
    pub steps: Vec<u64>,
    /// Mean at each.
    #[schemars(inner(range(min = -1e30, max = 1e30)))]
    pub mean: Vec<f64>,
    /// Sample standard deviation at each.
    #[schemars(inner(range(min = 0, max = 1e30)))]
    pub sd: Vec<f64>,
}

/// More runs than anyone has of one recipe.
pub const MOST_RUNS: usize = 10_000;

impl Spread {
    /// Whether it is of numbers.
    pub fn is_sound(&self) -> bool {
        self.mean.is_finite() && self.sd.is_finite() && self.sd >= 0.0
    }
}

impl Expected {
    /// The table as it was written.
    pub(super) fn of(value: Value) -> Result<Self, Problem> {
        let read: Self = value.deserialize().map_err(|e: figment::Error| {
            let mut problem = Problem::of(&Nested::of(&e));
            problem.key = if problem.key.is_empty() { KEY.into() } else { format!("{KEY}.{}", problem.key) };
            problem
        })?;
        let bad = |key: String, message: &str| Err(Problem::error(&key, message));
        if !(1..=MOST_RUNS).contains(&read.n) {
            return bad(format!("{KEY}.n"), &format!("expected the number of runs, 1 to {MOST_RUNS}"));
        }
        for (name, spread) in &read.metrics {
            if !spread.is_sound() {
                return bad(format!("{KEY}.metrics"), &format!("{name}: expected a number and a spread of 0 or more"));
            }
        }
        for (name, curve) in &read.curves {
            if curve.steps.len() != curve.mean.len() || curve.steps.len() != curve.sd.len() || !curve.steps.is_sorted()
            {
                return bad(
                    format!("{KEY}.curves"),
                    &format!("{name}: expected lists of equal length, steps ascending"),
                );
            }
        }
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Overrides, RawRecipe};
    use crate::recipe::test_plugins::RECIPE;
    use crate::resolved::Resolved;

    #[test]
    fn what_was_measured_is_no_part_of_a_recipe() {
        let table = "\n[measured]\non = \"a laptop\"\nn = 3\nmetrics = { \"loss/total\" = { mean = 1.0, sd = 0.1 } }\n";
        let with = RawRecipe::from_text(&format!("{RECIPE}{table}")).unwrap();
        assert_eq!(with.expected().unwrap().metrics["loss/total"].mean, 1.0);
        let plain = RawRecipe::from_text(RECIPE).unwrap();
        assert!(plain.expected().is_none());
        let hash = |raw: RawRecipe| Resolved::of(raw.with(&Overrides::default()).unwrap()).unwrap().hash;
        assert_eq!(hash(with), hash(plain));
    }

    #[test]
    fn a_wrong_table_is_an_error_with_its_key() {
        for (table, said) in [
            ("n = 3", "on"),
            ("on = \"x\"\nn = 0", "1 to 10000"),
            ("on = \"x\"\nn = 2\nmetrics = { a = { mean = 1.0, sd = -1.0 } }", "a: expected a number and a spread"),
            ("on = \"x\"\nn = 2\ncurves = { a = { steps = [1, 2], mean = [1.0], sd = [1.0] } }", "equal length"),
        ] {
            let error = RawRecipe::from_text(&format!("{RECIPE}\n[measured]\n{table}\n")).unwrap_err().to_string();
            assert!(error.contains("measured") && error.contains(said), "{error}");
        }
    }
}
