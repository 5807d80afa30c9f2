//! What weights are measured on: the data and the probes of a recipe, or of a file that has nothing else.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use super::Resolved;
use crate::contract::Dataset;
use crate::problem::{Nested, Problem};
use crate::recipe::{check_tables, Overrides, Probes, RawRecipe};
use crate::registry::Chosen;
use crate::text::printable;
use crate::{Error, Result};

/// The keys of a recipe that say what is measured on what.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measured {
    /// Which samples are drawn.
    #[serde(default)]
    pub seed: u64,
    /// Where images come from.
    pub data: Chosen<dyn Dataset>,
    /// What is measured; it may be empty.
    #[serde(default)]
    pub probes: Probes,
}

impl Measured {
    /// Of a recipe, a run, or a TOML file with the tables `[data]` and perhaps `[probes]`.
    ///
    /// # Errors
    /// All that is wrong with it.
    pub fn load(path: &Path, overrides: &Overrides) -> Result<Self> {
        if path.is_dir() && !path.join("recipe.toml").exists() {
            let help = format!(
                "name a recipe, a run, or a TOML file that says what the data are:\n    [data]\n    plugin = \"image_folder\"\n    path = {:?}",
                printable(path)
            );
            return Err(Error::content(path, "this is a folder without a recipe.toml", help));
        }
        let raw = RawRecipe::load(path)?.with(overrides)?;
        if ["backbone", "losses", "steps"].iter().any(|key| raw.get(key).is_some()) {
            let key = |set: &String| set.split(['.', '=']).next().unwrap_or_default().trim().to_string();
            if let Some(other) =
                overrides.sets.iter().find(|set| !["data", "probes", "seed"].contains(&key(set).as_str()))
            {
                let problem = format!("--set {other}: of a recipe, its data, probes and seed are read here");
                let help = "leave it out; what pixels weights were trained on is in their own recipe or weights.toml";
                return Err(Error::user(problem, help));
            }
            let recipe = Resolved::of(raw)?.recipe;
            return Ok(Self { seed: recipe.seed, data: recipe.data, probes: recipe.probes });
        }
        let mut value = raw.value().clone();
        value.remove("name");
        let measured: Self = figment::value::Value::from(value)
            .deserialize()
            .map_err(|e: figment::Error| raw.place(Problem::of(&Nested::of(&e))))?;
        match check_tables(&measured.value()) {
            Some(problem) => Err(raw.place(problem).into()),
            None => Ok(measured),
        }
    }

    /// As plain data, every default filled in.
    pub fn value(&self) -> Json {
        serde_json::to_value(self).expect("tables of a recipe are plain data")
    }
}
