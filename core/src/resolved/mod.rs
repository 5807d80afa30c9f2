//! Recipes that can be run: held against the model that they declare, and against the machine.
//!
//! A [`Resolved`] recipe is a [`RawRecipe`], checked, typed, with every default filled in, and fit to be saved beside its run.
//! What it [costs](cost), which keys of two [differ](changes) and what weights are [measured](Measured) on are said here too.
//! Nothing is allocated on the way, so a 7B recipe resolves in milliseconds.

mod changes;
mod check;
pub mod cost;
mod data;
mod length;
mod measured;
mod sizes;
mod unread;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;

use figment::value::{Dict, Value};
use serde_json::Value as Json;

use crate::contract::Dataset;
use crate::problem::{Origin, Problem, Severity};
use crate::recipe::{bare, toml_value, Overrides, RawRecipe, Recipe, Typed, SCHEMA};
use crate::step;
use crate::weights::{with_model_of_weights, Source};
use crate::Result;

pub use changes::{changes, Change};
pub use data::summary_of_data;
pub use length::Seam;
pub use measured::Measured;
pub use sizes::{fit, fit_students, Fit};

/// A recipe that can be run: typed, every default filled in, checked.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// The typed recipe.
    pub recipe: Recipe,
    /// The same as plain data, every default filled in.
    pub value: Json,
    /// What was written, and where.
    pub raw: RawRecipe,
    /// blake3 of everything but the name: two recipes with the same hash are the same run.
    pub hash: String,
    /// What probably does not mean what it says.
    pub warnings: Vec<Problem>,
    /// What a file says and the run does not use, since a loss or probe is off: it may wait for a suite that turns it on.
    pub notes: Vec<Problem>,
}

impl Resolved {
    /// Reads, merges and checks a recipe, or that of a run folder.
    ///
    /// # Errors
    /// All that is wrong with the recipe, together.
    pub fn load(path: impl AsRef<Path>, overrides: &Overrides) -> Result<Self> {
        Self::of(RawRecipe::load(path)?.with(overrides)?)
    }

    /// From TOML text, without environment.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn from_text(text: &str) -> Result<Self> {
        Self::of(RawRecipe::from_text(text)?)
    }

    /// That of a run or of a checkpoint, as it was saved with it.
    ///
    /// # Errors
    /// If there is none, or something is wrong with it.
    pub fn of_source(source: &Source) -> Result<Self> {
        Self::load(source.recipe_file()?, &Overrides::default())
    }

    /// Checks everything and fills in the defaults: of what is not written, and of the model if `backbone.weights` says it.
    ///
    /// # Errors
    /// All that is wrong with the recipe, together.
    pub fn of(raw: RawRecipe) -> Result<Self> {
        let raw = with_model_of_weights(raw)?;
        // Plugins are built from numbers that are in range.
        let Typed { recipe, value, idle } = raw.typed()?;
        let (errors, odd): (Vec<_>, Vec<_>) =
            check::check(&recipe).into_iter().partition(|p| p.severity == Severity::Error);
        raw.refuse_unfit(errors)?;
        let idle = unread::check(&recipe, &raw, idle);
        let odd = odd.into_iter().chain(idle).map(|p| raw.place(p));
        let (warnings, notes) =
            raw.warnings().iter().cloned().chain(odd).partition(|p| p.severity == Severity::Warning);
        let hash = hash(&value);
        Ok(Self { recipe, value, raw, hash, warnings, notes })
    }

    /// The resolved value as figment holds it: what [`Guide`](crate::recipe::describe::Guide) is asked with.
    pub fn dict(&self) -> Dict {
        match Value::serialize(&self.value) {
            Ok(Value::Dict(_, dict)) => dict,
            _ => unreachable!("a resolved recipe is a table"),
        }
    }

    /// Checks what the recipe asks of its data: image labels, pixel masks.
    ///
    /// # Errors
    /// If a probe needs something that `data` does not have.
    pub fn check_data(&self, data: &dyn Dataset) -> Result<()> {
        self.raw.refuse_unfit(data::check(&self.recipe, data))
    }

    /// Checks the weights that the recipe starts from; gives what there is to warn of.
    ///
    /// # Errors
    /// If weights that are there cannot be used (see [`check_sources`](crate::step::check_sources)).
    pub fn check_sources(&self) -> Result<Vec<Problem>> {
        let found = step::check_sources(&self.recipe)?.into_iter();
        let (errors, warnings): (Vec<_>, Vec<_>) = found.partition(|p| p.severity == Severity::Error);
        self.raw.refuse(errors)?;
        Ok(warnings.into_iter().map(|p| self.raw.place(p)).collect())
    }

    /// Checks what the recipe takes of a run of `parent` that will be in the folder `run`.
    ///
    /// # Errors
    /// If it does not fit the recipe's model.
    pub fn check_sources_of(&self, run: &Path, parent: &Resolved) -> Result<()> {
        self.raw.refuse(step::check_sources_of(&self.recipe, run, &parent.recipe)?)
    }

    /// The resolved recipe as TOML that loads again to the same recipe. Values that were set say where.
    pub fn to_toml(&self) -> String {
        let mut text = format!("# Resolved recipe {}: every default filled in.\nschema = {SCHEMA}\n", &self.hash[..16]);
        let table = self.value.as_object().expect("a recipe is a table");
        self.write_table(&mut text, "", table);
        text
    }

    fn write_table(&self, text: &mut String, path: &str, table: &serde_json::Map<String, Json>) {
        let join = |key: &str| if path.is_empty() { bare(key) } else { format!("{path}.{}", bare(key)) };
        for (key, value) in table.iter().filter(|(_, v)| !v.is_object() && !v.is_null()) {
            let line = format!("{} = {}", bare(key), toml_value(value));
            match self.raw.set_by(&join(key).replace('"', "")) {
                Origin::Default => writeln!(text, "{line}"),
                origin => writeln!(text, "{line:<40} # {}", origin.to_string().replace(char::is_control, " ")),
            }
            .expect("writing to a string");
        }
        for (key, value) in table {
            if let Some(inner) = value.as_object() {
                if inner.values().any(|v| !v.is_object()) {
                    writeln!(text, "\n[{}]", join(key)).expect("writing to a string");
                }
                self.write_table(text, &join(key), inner);
            }
        }
    }
}

/// blake3 of the value without its name, keys sorted.
fn hash(value: &Json) -> String {
    fn write(value: &Json, hasher: &mut blake3::Hasher) {
        match value {
            Json::Object(table) => {
                let keys: BTreeSet<&String> = table.keys().collect();
                for key in keys {
                    hasher.update(format!("{}:{key}={{", key.len()).as_bytes());
                    write(&table[key], hasher);
                    hasher.update(b"}");
                }
            }
            other => {
                hasher.update(other.to_string().as_bytes());
            }
        }
    }
    let mut value = value.clone();
    value.as_object_mut().expect("a recipe is a table").remove("name");
    let mut hasher = blake3::Hasher::new();
    write(&value, &mut hasher);
    hasher.finalize().to_hex().to_string()
}

#[cfg(test)]
#[path = "resolved_tests.rs"]
mod tests;
