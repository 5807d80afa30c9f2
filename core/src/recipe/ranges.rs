//! Holds every number of a recipe against the range that is stated with its key.
//!
//! A range is stated once, where a plugin states the key, and lives in the schema, so that the book, editors and
//! `recipe check` know it: `minimum`, `maximum`, `exclusiveMinimum`, `exclusiveMaximum`, `enum` (of numbers), `minItems` and
//! `maxItems` mean what they mean in JSON schema. On a key that takes a scheduler they hold for every step of the run. Three words are ours:
//!
//! - `x-ascending`: the numbers of a list may not fall, as in `[least, most]`;
//! - `x-help`: what to do about a number that is out of range;
//! - `x-with`: `{ "key": value }`, the value of a neighbouring key without which this one is not read; `null` is any value.

use figment::value::Value;
use serde_json::Value as Json;

use super::describe::{self, alternatives, table_schema, Guide};
use super::layers::RawRecipe;
use super::{toml_value, Precision, Recipe};
use crate::contract::{At, Schedule};
use crate::problem::Problem;

/// What is out of range in a resolved recipe, and the keys that were given although another keeps them from being read
/// (with what that would have to be). Numbers are looked at as they were written (`raw`), before a type has rounded them,
/// and in single precision, in which a step computes.
pub(super) fn check(recipe: &Recipe, value: &Json, raw: &RawRecipe) -> (Vec<Problem>, Vec<(String, String)>) {
    let guide = Guide::default();
    let wide = recipe.precision == Precision::F64;
    let mut walk = Walk { total: recipe.steps.max(1), wide, problems: Vec::new(), unread: Vec::new() };
    let given = Value::from(raw.value().clone());
    walk.value(&Place::default(), guide.root(), value, Some(&given));
    (walk.problems, walk.unread)
}

/// What is out of range in some tables of a recipe, such as those that weights bring with them.
pub(crate) fn check_tables(tables: &Json) -> Option<Problem> {
    let mut walk = Walk { total: 1, wide: false, problems: Vec::new(), unread: Vec::new() };
    walk.value(&Place::default(), Guide::default().root(), tables, None);
    walk.problems.into_iter().next()
}

/// The range of a number in words: "1 or more", "above 0, at most 1"; `None` if any will do.
pub(super) fn words(schema: &Json) -> Option<String> {
    let bound = |key: &str| schema.get(key).map(figure);
    let (least, above) = (bound("minimum"), bound("exclusiveMinimum"));
    let (most, below) = (bound("maximum"), bound("exclusiveMaximum"));
    if let (Some(least), Some(most), None) = (&least, &most, &above) {
        return Some(format!("{least} to {most}"));
    }
    let lower = above.map(|x| format!("above {x}")).or(least.map(|x| format!("{x} or more")));
    let upper = below.map(|x| format!("below {x}")).or(most.map(|x| format!("at most {x}")));
    let both: Vec<String> = lower.into_iter().chain(upper).collect();
    (!both.is_empty()).then(|| both.join(", "))
}

/// A bound as one writes it: 1000, 0.001, 1e-20.
fn figure(bound: &Json) -> String {
    match bound.as_f64() {
        Some(x) if x.fract() == 0.0 && x.abs() < 1e15 => format!("{x:.0}"),
        _ => toml_value(bound),
    }
}

/// Where in a recipe a value stands.
#[derive(Clone, Default)]
struct Place {
    /// The dotted key.
    key: String,
    /// The part of a list, in words: "number 2 ".
    part: String,
}

impl Place {
    fn at(&self, key: &str) -> Self {
        // Tables inside a list have no key of their own.
        match (self.part.is_empty(), self.key.is_empty()) {
            (false, _) => Self { key: self.key.clone(), part: format!("{}`{key}` ", self.part) },
            (true, true) => Self { key: key.into(), part: String::new() },
            (true, false) => Self { key: format!("{}.{key}", self.key), part: String::new() },
        }
    }

    fn item(&self, i: usize, item: &Json) -> Self {
        let what = if item.is_object() { "entry" } else { "number" };
        Self { key: self.key.clone(), part: format!("{}{what} {} ", self.part, i + 1) }
    }
}

struct Walk {
    /// Steps of the run.
    total: u64,
    /// Whether the run computes in 64 bits.
    wide: bool,
    problems: Vec<Problem>,
    /// Keys that were given and that another keeps from being read, and what would have them read.
    unread: Vec<(String, String)>,
}

impl Walk {
    fn value(&mut self, at: &Place, schema: &Json, value: &Json, given: Option<&Value>) {
        if describe::schedule_of(schema).is_some() && value.is_object() {
            return self.schedule(at, schema, value, given);
        }
        let inner = fitting(schema, value);
        match value {
            Json::Object(table) => {
                self.table(at, table_for(schema, inner, table), table, given);
            }
            Json::Array(list) => self.list(at, inner, list, given),
            // What is too large for its type is resolved to nothing.
            Json::Number(_) | Json::Null => {
                let written = given.and_then(number);
                let Some(x) = written.or_else(|| value.as_f64()) else { return };
                if let Some(message) = self.fault(x, &[schema, inner]) {
                    self.problem(at, message, &[schema, inner]);
                }
            }
            Json::Bool(_) | Json::String(_) => {}
        }
    }

    fn table(&mut self, at: &Place, schema: &Json, table: &serde_json::Map<String, Json>, given: Option<&Value>) {
        let given = given.and_then(Value::as_dict);
        for (key, value) in table {
            let named = schema.get("properties").and_then(|p| p.get(key));
            let Some(inside) = named.or_else(|| schema.get("additionalProperties").filter(|s| s.is_object())) else {
                continue;
            };
            let (place, given) = (at.at(key), given.and_then(|g| g.get(key)));
            let with = inside.get("x-with").and_then(Json::as_object).into_iter().flatten();
            let unmet: Vec<String> = with
                .filter(|(other, needed)| match needed {
                    Json::Null => table.get(*other).is_none_or(Json::is_null),
                    needed => table.get(*other) != Some(needed),
                })
                .map(|(other, needed)| match needed {
                    Json::Null => other.clone(),
                    needed => format!("{other} = {}", toml_value(needed)),
                })
                .collect();
            if given.is_some() && !unmet.is_empty() {
                self.unread.push((place.key.clone(), unmet.join(" and ")));
            }
            self.value(&place, inside, value, given);
        }
    }

    fn list(&mut self, at: &Place, schema: &Json, list: &[Json], given: Option<&Value>) {
        let given = given.and_then(Value::as_array);
        // A type of fixed length takes what it needs and passes over the rest.
        let length = given.map_or(list.len(), <[Value]>::len) as u64;
        let bound = |key: &str| schema.get(key).and_then(Json::as_u64);
        let (least, most) = (bound("minItems").unwrap_or(0), bound("maxItems").unwrap_or(u64::MAX));
        if length < least || length > most {
            let expected = match (least, most) {
                (least, u64::MAX) => format!("at least {least} values"),
                (least, most) if least == most => format!("{least} values"),
                (least, most) => format!("{least} to {most} values"),
            };
            let message = format!("{}expected a list of {expected}, found {length}", at.part);
            return self.problems.push(Problem::error(&at.key, message));
        }
        let before = self.problems.len();
        let inside = schema.get("items").unwrap_or(&Json::Null);
        for (i, item) in list.iter().enumerate() {
            self.value(&at.item(i, item), inside, item, given.and_then(|g| g.get(i)));
        }
        // What is to be done about its numbers is said once, with the list.
        if let (Some(help), [problem, ..]) = (schema.get("x-help").and_then(Json::as_str), &mut self.problems[before..])
        {
            problem.help = Some(help.into());
        }
        let ascending = schema.get("x-ascending").is_some();
        let falls = list.windows(2).any(|pair| pair[0].as_f64() > pair[1].as_f64());
        if ascending && falls && self.problems.len() == before {
            let shown = toml_value(&Json::Array(list.to_vec()));
            let message = format!("{}has to be [least, most] with least <= most, not {shown}", at.part);
            self.problem(at, message, &[schema]);
        }
    }

    /// The scheduler's own keys, and then its value at every step where it may turn.
    fn schedule(&mut self, at: &Place, schema: &Json, value: &Json, given: Option<&Value>) {
        let Json::Object(table) = value else { return };
        let before = self.problems.len();
        self.table(at, table_for(schema, schema, table), table, given);
        let read = Value::serialize(value).and_then(|v| v.deserialize::<Schedule>());
        let (true, Ok(schedule)) = (self.problems.len() == before, read) else { return };
        let total = self.total;
        let fault = schedule.landmarks(total).into_iter().find_map(|step| {
            let x = schedule.at(At { step, total });
            // A rate that fades away is fine, one that may not be zero has a range that says so.
            let faded = x != 0.0 && x.abs() < TINY;
            let range = words(schema).map_or(String::new(), |range| format!(", and has to be {range}"));
            let range = if x.is_finite() { range } else { ", and has to be finite".into() };
            self.fault(if faded { 0.0 } else { x }, &[schema]).map(|_| format!("is {x:?} at step {step}{range}"))
        });
        if let Some(message) = fault {
            self.problem(at, message, &[schema]);
        }
    }

    /// What is wrong with a number.
    fn fault(&self, x: f64, schemas: &[&Json]) -> Option<String> {
        if !x.is_finite() {
            return Some("expected a finite number".into());
        }
        if let Some(choices) = schemas.iter().find_map(|s| numbers(s)).filter(|choices| !choices.contains(&x)) {
            let choices: Vec<String> = choices.iter().map(|choice| format!("{choice}")).collect();
            return Some(format!("has to be {}, not {x}", choices.join(" or ")));
        }
        let shown = if x.fract() == 0.0 && x.abs() < 1e18 { format!("{x:.0}") } else { format!("{x:?}") };
        let single = x as f32;
        let in_range = |schema: &&&Json| {
            let bound = |key: &str| schema.get(key).and_then(Json::as_f64);
            let holds = |key: &str, test: &dyn Fn(f64) -> bool| bound(key).is_none_or(test);
            // 0.99999999 is below 1, but not in single precision.
            let narrow = |test: &dyn Fn(f32) -> bool| self.wide || is_integer(schema) || test(single);
            holds("minimum", &|least| x >= least)
                && holds("maximum", &|most| x <= most)
                && holds("exclusiveMinimum", &|least| x > least && narrow(&|x| x > least as f32))
                && holds("exclusiveMaximum", &|most| x < most && narrow(&|x| x < most as f32))
        };
        if let Some(schema) = schemas.iter().find(|s| !in_range(s)) {
            return Some(format!("has to be {}, not {shown}", words(schema).unwrap_or_default()));
        }
        if self.wide || schemas.iter().any(|s| is_integer(s)) {
            return None;
        }
        if single.is_infinite() {
            return Some(format!("{shown} is infinite in single precision, in which it is used"));
        }
        (x != 0.0 && x.abs() < TINY).then(|| format!("{shown} is zero in single precision, in which it is used"))
    }

    fn problem(&mut self, at: &Place, message: String, schemas: &[&Json]) {
        let help = schemas.iter().find_map(|s| s.get("x-help")).and_then(Json::as_str);
        let problem = Problem::error(&at.key, format!("{}{message}", at.part));
        self.problems.push(help.into_iter().fold(problem, Problem::help));
    }
}

/// Smaller numbers than this have no full precision in 32 bits; a GPU takes them for zero.
const TINY: f64 = f32::MIN_POSITIVE as f64;

fn number(value: &Value) -> Option<f64> {
    let number = value.to_num()?;
    number.to_f64().or_else(|| number.to_i128().map(|i| i as f64)).or_else(|| number.to_u128().map(|i| i as f64))
}

/// The numbers of which one has to be chosen.
fn numbers(schema: &Json) -> Option<Vec<f64>> {
    schema.get("enum")?.as_array()?.iter().map(Json::as_f64).collect()
}

fn is_integer(schema: &Json) -> bool {
    describe::types(schema).any(|t| t == "integer")
}

/// Of several alternatives the one whose type the value has.
fn fitting<'a>(schema: &'a Json, value: &Json) -> &'a Json {
    let wanted: &[&str] = match value {
        Json::Null | Json::Number(_) => &["integer", "number"],
        Json::Array(_) => &["array"],
        Json::Object(_) => &["object"],
        Json::Bool(_) => &["boolean"],
        Json::String(_) => &["string"],
    };
    let all = alternatives(schema);
    let fits = |s: &&&Json| describe::types(s).any(|t| wanted.contains(&t));
    all.iter().find(fits).copied().unwrap_or(schema)
}

/// Of several alternatives the table that has these keys.
fn table_for<'a>(schema: &'a Json, otherwise: &'a Json, table: &serde_json::Map<String, Json>) -> &'a Json {
    if let Some(plugin) = table.get("plugin").and_then(Json::as_str) {
        let named = table_schema(schema, None, plugin);
        if named.get("x-kind").is_some() {
            return named;
        }
    }
    let knows = |s: &&Json| s.get("properties").is_some_and(|p| table.keys().all(|key| p.get(key).is_some()));
    alternatives(schema).into_iter().find(knows).unwrap_or(otherwise)
}

#[cfg(test)]
#[path = "ranges_tests.rs"]
mod tests;
