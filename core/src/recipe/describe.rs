//! The schema of recipes, and what it says about one key: type, default, documentation, who reads it.

use std::sync::OnceLock;

use figment::value::{Dict, Value};
use serde_json::Value as Json;

use super::{ranges, Recipe};
use crate::contract::Schedule;

/// Where a schema has what it says once and refers to.
pub(super) const DEFINITIONS: &str = "#/definitions/";

/// JSON schema (draft 07) of recipes, all registered plugins included. An editor completes and checks recipes with it.
pub fn schema() -> Json {
    let mut schema = schema_of::<Recipe>();
    let extends = "A recipe that this one changes: tables are merged, everything else is replaced. The path is \
        relative to this file.";
    let version =
        "Version of what the file says: files that dinolab writes have it, and one of a newer version is refused.";
    if let Some(properties) = schema.get_mut("properties").and_then(Json::as_object_mut) {
        properties.insert("extends".into(), serde_json::json!({ "type": "string", "description": extends }));
        properties.insert(
            "schema".into(),
            serde_json::json!({ "type": "integer", "const": super::SCHEMA, "description": version }),
        );
        properties.insert(super::expected::KEY.into(), schema_of::<super::Expected>());
    }
    schema
}

/// JSON schema (draft 07) of any file that is read with serde.
pub fn schema_of<T: schemars::JsonSchema>() -> Json {
    let settings = schemars::generate::SchemaSettings::draft07().with(|s| s.inline_subschemas = true);
    settings.into_generator().into_root_schema_for::<T>().to_value()
}

/// What is known about a key.
#[derive(Clone, Debug, PartialEq)]
pub struct Key {
    /// Its type and range in words: "whole number, 0 or more".
    pub kind: String,
    /// Its default, if it has one.
    pub default: Option<Json>,
    /// Its documentation.
    pub doc: Option<String>,
    /// Who reads it: "backbone plugin `vit`", "optimizer".
    pub reader: String,
    /// Whether it is a number that may change over time.
    pub is_schedule: bool,
    /// Whether it is a path: `format: path` in its schema.
    pub is_path: bool,
}

/// Answers questions about keys from the schema.
#[derive(Clone, Copy, Debug)]
pub struct Guide {
    schema: &'static Json,
}

impl Default for Guide {
    fn default() -> Self {
        // Plugins are registered before `main`, so there is one schema for the life of the program.
        static SCHEMA: OnceLock<Json> = OnceLock::new();
        Self { schema: SCHEMA.get_or_init(schema) }
    }
}

impl Guide {
    /// The schema of a whole recipe.
    pub fn root(self) -> &'static Json {
        self.schema
    }

    /// The keys of a recipe that have no default.
    pub fn required(&self) -> impl Iterator<Item = &str> {
        self.schema.get("required").and_then(Json::as_array).into_iter().flatten().filter_map(Json::as_str)
    }

    /// What is known about the dotted `key` in a recipe that says `value` (the plugins that it names decide which keys
    /// there are); `None` if there is no such key.
    pub fn key(&self, value: &Dict, key: &str) -> Option<Key> {
        let steps = self.steps(value, key)?;
        let mut reader = trainer_part(key).to_string();
        for (part, table, _) in &steps {
            let own = table.get("x-own").and_then(Json::as_array);
            if let (Some(kind), Some(plugin)) = (text(table, "x-kind"), text(table, "title")) {
                if *part != "plugin" && !own.is_some_and(|own| own.iter().any(|k| k == part)) {
                    reader = format!("{kind} plugin `{plugin}`");
                }
            }
        }
        let (.., schema) = *steps.last()?;
        Some(Key {
            kind: kind(schema),
            default: schema.get("default").cloned(),
            doc: text(schema, "description").map(|d| d.replace('\n', " ")),
            reader,
            is_schedule: schedule_of(schema).is_some(),
            is_path: alternatives(schema).iter().any(|s| text(s, "format") == Some("path")),
        })
    }

    /// Part by part of the dotted `key`: the part, the schema of the table that it is in, and its own.
    fn steps<'k>(&self, value: &Dict, key: &'k str) -> Option<Vec<(&'k str, &'static Json, &'static Json)>> {
        let (mut schema, mut inside, mut name) = (self.schema, Some(value), "");
        let step = |part: &'k str| {
            let table = table_schema(schema, inside, name);
            let named = table.get("properties").and_then(|p| p.get(part));
            schema = named.or_else(|| table.get("additionalProperties").filter(|s| s.is_object()))?;
            inside = inside.and_then(|table| table.get(part)).and_then(Value::as_dict);
            name = part;
            Some((part, table, schema))
        };
        key.split('.').map(step).collect()
    }

    /// Whether the value of `key` is a table with one key, of several of which one is chosen: `{ every = 10 }` or `{ at = [5] }`.
    pub(super) fn is_choice(&self, value: &Dict, key: &str) -> bool {
        let Some((.., schema)) = self.steps(value, key).and_then(|steps| steps.last().copied()) else { return false };
        let one_key = |s: &&&Json| {
            let properties = s.get("properties").and_then(Json::as_object).map_or(0, serde_json::Map::len);
            let required = s.get("required").and_then(Json::as_array).map_or(0, Vec::len);
            (properties, required) == (1, 1)
        };
        alternatives(schema).iter().filter(one_key).count() > 1
    }

    /// The plugins that read `key`, which the one that its table names does not.
    pub(super) fn readers_of(&self, value: &Dict, key: &str) -> Vec<&'static str> {
        let Some((table, name)) = key.rsplit_once('.') else { return Vec::new() };
        let Some((.., schema)) = self.steps(value, table).and_then(|steps| steps.last().copied()) else {
            return Vec::new();
        };
        let reads =
            |s: &&&Json| s.get("x-kind").is_some() && s.get("properties").is_some_and(|p| p.get(name).is_some());
        alternatives(schema).iter().filter(reads).filter_map(|s| s.get("title")?.as_str()).collect()
    }

    /// The dotted keys that could stand where `key` does.
    pub fn siblings(&self, value: &Dict, key: &str) -> Vec<String> {
        let mut schema = self.schema;
        let mut inside = Some(value);
        let mut path = String::new();
        let mut name = "";
        for part in key.split('.') {
            schema = table_schema(schema, inside, name);
            let properties = schema.get("properties").and_then(Json::as_object);
            let Some(next) = properties.and_then(|p| p.get(part)) else {
                let known = properties.into_iter().flat_map(|p| p.keys());
                return known.map(|k| format!("{path}{k}")).collect();
            };
            schema = next;
            inside = inside.and_then(|table| table.get(part)).and_then(Value::as_dict);
            path = format!("{path}{part}.");
            name = part;
        }
        Vec::new()
    }
}

/// All numbers of a resolved recipe that may change over time, by dotted key.
pub fn schedules(resolved: &Json) -> Vec<(String, Schedule)> {
    let guide = Guide::default();
    let Ok(Value::Dict(_, root)) = Value::serialize(resolved) else { return Vec::new() };
    let mut found = Vec::new();
    let mut todo: Vec<(String, &Value)> = root.iter().map(|(k, v)| (k.clone(), v)).collect();
    while let Some((path, value)) = todo.pop() {
        if guide.key(&root, &path).is_some_and(|k| k.is_schedule) {
            found.extend(value.deserialize::<Schedule>().map(|s| (path, s)));
        } else if let Some(table) = value.as_dict() {
            todo.extend(table.iter().map(|(k, v)| (format!("{path}.{k}"), v)));
        }
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    found
}

fn text<'a>(schema: &'a Json, key: &str) -> Option<&'a str> {
    schema.get(key).and_then(Json::as_str)
}

/// The names of the types that a value may have.
pub(super) fn types(schema: &Json) -> impl Iterator<Item = &str> {
    let (one, several) = match schema.get("type") {
        Some(Json::Array(names)) => (None, names.as_slice()),
        one => (one, [].as_slice()),
    };
    one.into_iter().chain(several).filter_map(Json::as_str)
}

/// What a part of the schema of recipes is, which may be said elsewhere in it.
fn resolved(schema: &Json) -> &Json {
    let name = text(schema, "$ref").and_then(|reference| reference.strip_prefix(DEFINITIONS));
    let found = name.and_then(|name| Guide::default().root().get("definitions")?.get(name));
    found.unwrap_or(schema)
}

/// The schemas one of which a value has to fit: itself, if it says nothing of others.
pub fn alternatives(schema: &Json) -> Vec<&Json> {
    let schema = resolved(schema);
    match ["anyOf", "oneOf"].iter().find_map(|k| schema.get(k)).and_then(Json::as_array) {
        Some(list) => list.iter().flat_map(alternatives).collect(),
        None => vec![schema],
    }
}

/// The schedule that a key takes, if it takes one; it may be one that need not be given.
pub(super) fn schedule_of(schema: &Json) -> Option<&Json> {
    let is = |s: &&Json| s.get("x-schedule").is_some();
    let inside = || schema.get("anyOf").and_then(Json::as_array).and_then(|all| all.iter().find(is));
    Some(schema).filter(is).or_else(inside)
}

/// Of several alternatives the one for the plugin that the table names; `[losses.x]` names x if it says nothing, other
/// tables the default of their kind.
pub(super) fn table_schema<'a>(schema: &'a Json, table: Option<&Dict>, name: &str) -> &'a Json {
    let plugin = table.and_then(|t| t.get("plugin")).and_then(Value::as_str).unwrap_or(name);
    let all = alternatives(schema);
    let named = all.iter().find(|s| s.get("x-kind").is_some() && text(s, "title") == Some(plugin));
    let default = || all.iter().find(|s| s.get("x-default").is_some());
    named.or_else(default).or_else(|| all.iter().find(|s| s.get("properties").is_some())).copied().unwrap_or(schema)
}

/// Which part of the program reads a key that is no plugin's.
fn trainer_part(key: &str) -> &'static str {
    match key.split('.').next().unwrap_or_default() {
        "name" | "seed" | "steps" | "device" | "precision" | "init_from" | "init_role" | "continue_from" | "stop"
        | "on_non_finite" | "on_spike" => "trainer",
        "crops" => "augmentation",
        "batch" => "data loader",
        "optimizer" => "optimizer",
        "log" => "logger",
        "checkpoint" => "checkpoints",
        "extends" | "schema" | "measured" => "recipe reader",
        "losses" => "training step",
        "probes" => "probe runner",
        _ => "registry (it chooses the plugin)",
    }
}

/// The type and range of a key in words.
pub fn kind(schema: &Json) -> String {
    let ranged = |kind: &str| match ranges::words(schema) {
        Some(range) => format!("{kind}, {range}"),
        None => kind.to_string(),
    };
    if schedule_of(schema).is_some() {
        return ranged("number or scheduler");
    }
    let options = alternatives(schema);
    if options.len() > 1 {
        let mut words: Vec<String> = Vec::new();
        // What may be left out is said by the default.
        let given = options.into_iter().filter(|option| text(option, "type") != Some("null"));
        for word in given.map(kind) {
            if !words.contains(&word) {
                words.push(word);
            }
        }
        return words.join(" or ");
    }
    let choice = |c: &Json| c.as_str().map_or(c.to_string(), |s| format!("\"{s}\""));
    if let Some(kind) = text(schema, "x-kind") {
        return format!("{kind} `{}`", text(schema, "title").unwrap_or_default());
    }
    if let Some(only) = schema.get("const") {
        return choice(only);
    }
    if let Some(choices) = schema.get("enum").and_then(Json::as_array) {
        return choices.iter().map(choice).collect::<Vec<_>>().join(" or ");
    }
    let one = |name: &str| match name {
        "integer" => ranged("whole number"),
        "number" => ranged("number"),
        "string" => "text".into(),
        "boolean" => "true or false".into(),
        "array" => match (schema.get("maxItems"), schema.get("items")) {
            (Some(n), Some(items)) => {
                let order = if schema.get("x-ascending").is_some() { ", least first" } else { "" };
                format!("list of {n}{order} ({})", kind(items))
            }
            (None, Some(items)) => format!("list ({})", kind(items)),
            _ => "list".into(),
        },
        "object" => "table".into(),
        "null" => "none".into(),
        other => other.into(),
    };
    let words: Vec<String> = types(schema).filter(|name| *name != "null").map(one).collect();
    match words.is_empty() {
        true => "anything".into(),
        false => words.join(" or "),
    }
}
