//! A recipe with every default filled in, checked, and fit to be saved beside its run.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;

use figment::value::{Dict, Value};
use serde_json::Value as Json;

use super::describe::Guide;
use super::layers::{Overrides, RawRecipe, SCHEMA};
use super::{check, ranges, unread, Recipe};
use crate::problem::{Fault, Nested};
use crate::problem::{Origin, Problem, Severity};
use crate::Result;

/// Problems reported at once.
const MOST_PROBLEMS: usize = 20;

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
        RawRecipe::load(path)?.with(overrides)?.resolve()
    }

    /// From TOML text, without environment.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn from_text(text: &str) -> Result<Self> {
        RawRecipe::from_text(text)?.resolve()
    }

    pub(super) fn of(raw: RawRecipe) -> Result<Self> {
        let recipe = typed(&raw)?;
        let value = serde_json::to_value(&recipe).expect("a recipe is plain data");
        let unread = unread(raw.value(), &value, &mut Vec::new());
        if !unread.is_empty() {
            return Err(unread.into_iter().map(|p| place(&raw, p)).collect::<Vec<_>>().into());
        }
        let (outside, idle) = ranges::check(&recipe, &value, &raw);
        // Plugins are built from numbers that are in range.
        let problems = if outside.is_empty() { check::check(&recipe) } else { outside };
        let (errors, odd): (Vec<_>, Vec<_>) = problems.into_iter().partition(|p| p.severity == Severity::Error);
        if !errors.is_empty() {
            return Err(errors.into_iter().map(|p| place(&raw, p)).collect::<Vec<_>>().into());
        }
        let idle = unread::check(&recipe, &raw, idle);
        let odd = odd.into_iter().chain(idle).map(|p| place(&raw, p));
        let (warnings, notes) =
            raw.warnings().iter().cloned().chain(odd).partition(|p| p.severity == Severity::Warning);
        let hash = hash(&value);
        Ok(Self { recipe, value, raw, hash, warnings, notes })
    }

    /// The resolved value as figment holds it: what [`describe::Guide`](super::describe::Guide) is asked with.
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
    pub fn check_data(&self, data: &dyn crate::contract::Dataset) -> Result<()> {
        let problems: Vec<_> = check::check_data(&self.recipe, data);
        if problems.is_empty() {
            return Ok(());
        }
        Err(problems.into_iter().map(|p| place(&self.raw, p)).collect::<Vec<_>>().into())
    }

    /// Checks the weights that the recipe starts from; gives what there is to warn of.
    ///
    /// # Errors
    /// If weights that are there cannot be used (see [`check_sources`](crate::step::check_sources)).
    pub fn check_sources(&self) -> Result<Vec<Problem>> {
        let found = crate::step::check_sources(&self.recipe)?.into_iter().map(|p| place(&self.raw, p));
        let (errors, warnings): (Vec<_>, Vec<_>) = found.partition(|p| p.severity == Severity::Error);
        if errors.is_empty() {
            return Ok(warnings);
        }
        Err(errors.into())
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

/// A key as TOML writes it.
fn bare(key: &str) -> String {
    let plain = !key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_');
    if plain {
        key.into()
    } else {
        toml::Value::from(key).to_string()
    }
}

/// A value as TOML writes it, on one line. Floats are as short as can be read back: `1e-8`.
pub fn toml_value(value: &Json) -> String {
    match value {
        Json::Null => "none".into(),
        Json::Bool(b) => b.to_string(),
        Json::Number(n) => match n.as_f64() {
            Some(x) if n.is_f64() => format!("{x:?}"),
            _ => n.to_string(),
        },
        Json::String(s) => toml::Value::from(s.as_str()).to_string(),
        Json::Array(list) => format!("[{}]", list.iter().map(toml_value).collect::<Vec<_>>().join(", ")),
        Json::Object(table) => {
            let pairs = table.iter().filter(|(_, v)| !v.is_null());
            let pairs: Vec<String> = pairs.map(|(k, v)| format!("{} = {}", bare(k), toml_value(v))).collect();
            format!("{{ {} }}", pairs.join(", "))
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

pub(super) fn place(raw: &RawRecipe, problem: Problem) -> Problem {
    let origin = raw.origin(&problem.key);
    // A key that nobody set is a matter of the table around it: mark that.
    let at_value = problem.at_value && raw.set_by(&problem.key) != Origin::Default;
    Problem { at_value, ..problem.at(origin) }
}

/// The typed recipe, or everything that is wrong with types and names. serde stops at the first mistake, so what was
/// wrong is taken out and the rest is read again.
fn typed(raw: &RawRecipe) -> Result<Recipe, Vec<Problem>> {
    let mut value = Value::from(raw.value().clone());
    let mut problems: Vec<Problem> = Vec::new();
    let mut removed = BTreeSet::new();
    // Keys that are not there, and keys that a misspelt one was probably meant to be: those are not missing as well.
    let (mut missing, mut meant) = (BTreeSet::new(), BTreeSet::new());
    for key in non_finite(raw.value(), "") {
        remove(&mut value, &key.split('.').map(String::from).collect::<Vec<_>>());
        problems.push(place(raw, Problem::error(&key, "expected a finite number")));
        removed.insert(key);
    }
    let guide = Guide::default();
    for key in guide.required().filter(|key| raw.get(key).is_none()) {
        let doc = guide.key(raw.value(), key).and_then(|k| k.doc).unwrap_or_default();
        let message = format!("missing in {}", raw.path().display());
        problems.push(Problem::error(key, message).help(doc));
        removed.insert(key.to_string());
        missing.insert(key.to_string());
    }
    while problems.len() < MOST_PROBLEMS {
        let error: figment::Error = match value.deserialize::<Recipe>() {
            Ok(recipe) if problems.is_empty() => return Ok(recipe),
            Ok(_) => break,
            Err(error) => error,
        };
        let mut nested = Nested::of(&error);
        let key = nested.path.join(".");
        if let Some(kind) = guide.key(raw.value(), &key).map(|k| k.kind) {
            nested.say_kind(&kind);
        }
        if nested.fault == Fault::Missing && removed.contains(&key) {
            break;
        }
        match nested.fault {
            Fault::Missing => drop(missing.insert(key)),
            _ => meant.extend(nested.meant()),
        }
        problems.push(place(raw, Problem::of(&nested)));
        // Without its plugin or a key it needs, the table around says nothing more; a wrong list element, its list.
        let whole = nested.fault == Fault::Missing || nested.path.last().is_some_and(|k| k == "plugin");
        let mut path = nested.path.as_slice();
        if whole {
            path = &path[..path.len() - 1];
        }
        let Some(gone) = remove(&mut value, path) else { break };
        removed.insert(gone);
    }
    problems.retain(|p| !(missing.contains(&p.key) && meant.contains(&p.key)));
    problems.sort_by_key(|p| p.origin.line_column());
    Err(problems)
}

/// Takes a value out of nested tables: the innermost on `path` that is a key of a table. Gives its dotted key.
fn remove(value: &mut Value, path: &[String]) -> Option<String> {
    let (first, rest) = path.split_first()?;
    let Value::Dict(_, table) = value else { return None };
    match table.get_mut(first) {
        Some(inner @ Value::Dict(..)) if !rest.is_empty() => {
            let below = remove(inner, rest)?;
            Some(format!("{first}.{below}"))
        }
        _ => table.remove(first).map(|_| first.clone()),
    }
}

/// Keys whose value is infinite or not a number: neither could be saved with the run.
fn non_finite(table: &Dict, path: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (key, value) in table {
        let key = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        match value {
            Value::Dict(_, inner) => found.extend(non_finite(inner, &key)),
            Value::Num(_, n) if n.to_f64().is_some_and(|x| !x.is_finite()) => found.push(key),
            _ => {}
        }
    }
    found
}

/// Given keys that nothing read: those that the resolved recipe does not say again.
fn unread(given: &Dict, resolved: &Json, path: &mut Vec<String>) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (key, value) in given {
        path.push(key.clone());
        let dotted = path.join(".");
        match (value, resolved.get(key)) {
            (_, None) => {
                let mut problem = Problem::error(dotted, "nothing reads this key").help("remove it");
                problem.at_value = false;
                problems.push(problem);
            }
            (Value::Dict(_, inner), Some(table @ Json::Object(_))) => problems.extend(unread(inner, table, path)),
            _ => {}
        }
        path.pop();
    }
    problems
}

#[cfg(test)]
#[path = "resolved_tests.rs"]
mod tests;
