//! Whether a run may go on under another recipe than it was started with: which keys differ, and which of them matter.

use std::fmt;
use std::path::Path;

use figment::value::Value;
use serde_json::Value as Json;

use super::Resolved;
use crate::recipe::describe::Guide;
use crate::recipe::{is_within, toml_value};
use crate::{Error, Result};

/// Keys, and tables of keys, that change no number of a run: its name, where it runs (arithmetic is told apart by the
/// device itself), how data are read ahead, where weights are kept, what is written, kept and measured, and when it may end before its
/// time.
const NO_NUMBERS: [&str; 13] = [
    "name",
    "device",
    "batch.loader_threads",
    "batch.prefetch",
    "batch.max_broken_share",
    "log",
    "checkpoint",
    "probes",
    "stop",
    "on_non_finite",
    "optimizer.offload",
    "optimizer.offload_moments",
    "optimizer.shard_teachers",
];

/// A key in which two recipes differ.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// The dotted key.
    pub key: String,
    /// Its value in the first recipe, if it has one.
    pub before: Option<Json>,
    /// Its value in the second.
    pub after: Option<Json>,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let show = |value: &Option<Json>| value.as_ref().map_or("nothing".into(), toml_value);
        write!(f, "{}: was {}, is {}", self.key, show(&self.before), show(&self.after))
    }
}

/// The keys in which two resolved recipes differ, in the order of the first.
pub fn changes(before: &Json, after: &Json) -> Vec<Change> {
    let mut found = Vec::new();
    compare("", Some(before), Some(after), &mut found);
    found
}

fn compare(key: &str, before: Option<&Json>, after: Option<&Json>, found: &mut Vec<Change>) {
    let tables = [before, after].map(|value| value.filter(|v| !v.is_null()).and_then(Json::as_object));
    if let [Some(a), Some(b)] = tables {
        let added = b.keys().filter(|k| !a.contains_key(*k));
        for name in a.keys().chain(added) {
            let inner = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
            compare(&inner, a.get(name), b.get(name), found);
        }
    } else if before != after {
        found.push(Change { key: key.into(), before: before.cloned(), after: after.cloned() });
    }
}

impl Resolved {
    /// Whether `key` changes the numbers of a run. Paths of data do not: a run knows its data by their content. Nor does what is
    /// said of a loss or probe that is off, but that it is.
    pub fn matters(&self, key: &str) -> bool {
        let place_of_data = || key.starts_with("data.") && self.is_path(key);
        let of_idle = || {
            let mut parts = key.splitn(3, '.');
            let (table, name, own) = (parts.next()?, parts.next()?, parts.next()?);
            let entry = ["losses", "probes"].contains(&table).then(|| self.value.get(table)?.get(name))??;
            Some(entry["enabled"] == false && own != "enabled")
        };
        !(NO_NUMBERS.iter().any(|table| is_within(key, table)) || place_of_data() || of_idle().unwrap_or(false))
    }

    /// Whether the value of `key` is a path.
    pub fn is_path(&self, key: &str) -> bool {
        Guide::default().key(&self.dict(), key).is_some_and(|k| k.is_path)
    }

    /// The same recipe with every path made absolute, so that it means the same in any working directory.
    ///
    /// # Errors
    /// If the working directory is gone, or its name is no UTF-8.
    pub fn absolute(self) -> Result<Self> {
        let guide = Guide::default();
        let dict = self.dict();
        let mut todo: Vec<(String, &Value)> = dict.iter().map(|(k, v)| (k.clone(), v)).collect();
        let mut raw = self.raw.clone();
        let mut changed = false;
        while let Some((key, value)) = todo.pop() {
            match value {
                Value::Dict(_, table) => todo.extend(table.iter().map(|(k, v)| (format!("{key}.{k}"), v))),
                Value::String(_, path) if guide.key(&dict, &key).is_some_and(|k| k.is_path) => {
                    let absolute = absolute(path)?;
                    if absolute != *path {
                        let origin = raw.set_by(&key);
                        raw.set(&key, Value::from(absolute), origin)?;
                        changed = true;
                    }
                }
                _ => {}
            }
        }
        // What was warned of stays as it is.
        Ok(if changed { Self { warnings: self.warnings, ..Self::of(raw)? } } else { self })
    }
}

fn absolute(path: &str) -> Result<String> {
    if path.is_empty() {
        return Ok(String::new());
    }
    let absolute = std::path::absolute(Path::new(path)).map_err(Error::io("find", path))?;
    absolute.into_os_string().into_string().map_err(|name| {
        let problem = format!("the working directory's name is no UTF-8: {}", name.to_string_lossy());
        Error::user(problem, "run it in another folder, or give absolute paths")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::test_plugins::RECIPE;
    use crate::recipe::{Overrides, RawRecipe};

    fn resolved(set: &str) -> Resolved {
        let overrides = Overrides { sets: vec![set.into()], env: false };
        Resolved::of(RawRecipe::from_text(RECIPE).unwrap().with(&overrides).unwrap()).unwrap()
    }

    #[test]
    fn a_change_is_named_with_both_values() {
        let (a, b) = (resolved("seed=1"), resolved("optimizer.eps=1e-7"));
        let text: Vec<String> = changes(&a.value, &b.value).iter().map(ToString::to_string).collect();
        assert_eq!(text, ["seed: was 1, is 0", "optimizer.eps: was 1e-8, is 1e-7"]);
    }

    #[test]
    fn keys_that_change_no_number_are_keys_of_recipes() {
        let recipe = resolved("seed=0");
        let guide = Guide::default();
        for key in NO_NUMBERS {
            assert!(guide.key(&recipe.dict(), key).is_some(), "{key}");
            assert!(!recipe.matters(key) && !recipe.matters(&format!("{key}.every")), "{key}");
        }
        for key in ["seed", "steps", "batch.size", "batch.prefetching", "precision", "crops.global_size"] {
            assert!(recipe.matters(key), "{key}");
        }
    }

    #[test]
    fn paths_are_made_absolute_and_nothing_else() {
        let recipe = resolved("init_from='runs/first'");
        let absolute = recipe.clone().absolute().unwrap();
        let here = std::env::current_dir().unwrap().join("runs/first");
        assert_eq!(absolute.recipe.init_from.as_deref(), Some(here.as_path()));
        let keys: Vec<String> = changes(&recipe.value, &absolute.value).into_iter().map(|c| c.key).collect();
        assert_eq!(keys, ["init_from"]);
        assert_eq!(absolute.clone().absolute().unwrap().hash, absolute.hash);
    }
}
