//! A recipe as a type: keys are known, values of the right types and in their ranges, every default is filled in.
//!
//! How the values go together is not looked at: a recipe that is to be run is [resolved](crate::resolved::Resolved), and so held
//! against the model that it declares too.

use std::collections::BTreeSet;

use figment::value::{Dict, Value};
use serde_json::Value as Json;

use super::describe::Guide;
use super::layers::RawRecipe;
use super::{ranges, Recipe};
use crate::problem::{Fault, Nested, Origin, Problem};
use crate::Result;

/// Problems reported at once.
const MOST_PROBLEMS: usize = 20;

/// A typed recipe, and what was found on the way to it.
pub(crate) struct Typed {
    /// The recipe.
    pub(crate) recipe: Recipe,
    /// The same as plain data.
    pub(crate) value: Json,
    /// Keys that were given beside a key that makes them idle, and what that would have to be.
    pub(crate) idle: Vec<(String, String)>,
}

/// Keys of later layers that are named with a problem.
const MOST_LATER: usize = 6;

impl RawRecipe {
    /// Reads it as a type, with every default filled in.
    ///
    /// # Errors
    /// All that is wrong with keys, types and ranges, together.
    pub(crate) fn typed(&self) -> Result<Typed> {
        let recipe = read(self)?;
        let value = serde_json::to_value(&recipe).expect("a recipe is plain data");
        self.refuse(unread(self.value(), &value, &mut Vec::new()))?;
        let (outside, idle) = ranges::check(&recipe, &value, self);
        self.refuse(outside)?;
        Ok(Typed { recipe, value, idle })
    }

    /// Refuses the recipe if there is any problem.
    ///
    /// # Errors
    /// All of them, each with the place where its key was set.
    pub(crate) fn refuse(&self, problems: Vec<Problem>) -> Result<()> {
        match problems.is_empty() {
            true => Ok(()),
            false => Err(problems.into_iter().map(|p| self.place(p)).collect::<Vec<_>>().into()),
        }
    }

    /// Refuses the recipe if keys do not fit each other: a problem is at one of them, and another may have been set over it.
    ///
    /// # Errors
    /// As [`refuse`](Self::refuse), each with what later layers set.
    pub(crate) fn refuse_unfit(&self, problems: Vec<Problem>) -> Result<()> {
        let with_later = |problem: Problem| {
            let later = self.set_over(&problem.key);
            if later.is_empty() {
                return problem;
            }
            let more = later.len().saturating_sub(MOST_LATER);
            let more = if more > 0 { format!(", and {more} more") } else { String::new() };
            problem.further_help(format!("set over it: {}{more}", later[..later.len().min(MOST_LATER)].join(", ")))
        };
        self.refuse(problems.into_iter().map(with_later).collect())
    }

    /// With the place where its key was set.
    pub(crate) fn place(&self, problem: Problem) -> Problem {
        let origin = self.origin(&problem.key);
        // A key that nobody set is a matter of the table around it: mark that.
        let at_value = problem.at_value && self.set_by(&problem.key) != Origin::Default;
        Problem { at_value, ..problem.at(origin) }
    }
}

/// The typed recipe, or everything that is wrong with types and names. serde stops at the first mistake, so what was
/// wrong is taken out and the rest is read again.
fn read(raw: &RawRecipe) -> Result<Recipe, Vec<Problem>> {
    let mut value = Value::from(raw.value().clone());
    let mut problems: Vec<Problem> = Vec::new();
    let mut removed = BTreeSet::new();
    // Keys that are not there, and keys that a misspelt one was probably meant to be: those are not missing as well.
    let (mut missing, mut meant) = (BTreeSet::new(), BTreeSet::new());
    for key in non_finite(raw.value(), "") {
        remove(&mut value, &key.split('.').map(String::from).collect::<Vec<_>>());
        problems.push(raw.place(Problem::error(&key, "expected a finite number")));
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
        let mut problem = Problem::of(&nested);
        if nested.fault == Fault::UnknownKey && nested.nearest().is_none() {
            let readers = guide.readers_of(raw.value(), &problem.key).join(", ");
            if let Some((table, name)) = problem.key.rsplit_once('.').filter(|_| !readers.is_empty()) {
                let line = format!("`{name}` is a key of other choices of {table}.plugin: {readers}");
                problem = problem.further_help(line);
            }
        }
        problems.push(raw.place(problem));
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
            (Value::Array(_, list), None) if list.is_empty() => {
                problems
                    .push(Problem::error(dotted, "the list is empty").help("name something in it, or remove the key"));
            }
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
