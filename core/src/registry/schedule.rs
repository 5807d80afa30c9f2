//! How a [`Schedule`] is read: a number, or a table that names a scheduler.

use figment::value::Value;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

use super::{plugin_schema, Chosen};
use crate::contract::{Schedule, Scheduler};
use crate::problem::Nested;

impl<'de> Deserialize<'de> for Schedule {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let source = <Value as Deserialize>::deserialize(deserializer)?;
        if let Some(value) = source.to_num() {
            return Ok(Self::constant(
                value.to_f64().unwrap_or_else(|| value.to_i128().map_or(f64::NAN, |i| i as f64)),
            ));
        }
        of_table(&source).map_err(D::Error::custom)
    }
}

/// The scheduler of a table, and the table with defaults.
fn of_table(table: &Value) -> Result<Schedule, String> {
    if table.as_dict().is_none() {
        return Err(Nested::wrong_type(table, "a number, or a table that names a scheduler").encode());
    }
    let chosen = Chosen::<dyn Scheduler>::from_value(table, None).map_err(|e| e.encode())?;
    let scheduler = chosen.build(&mut ()).map_err(|e| e.to_string())?;
    let source = serde_json::to_value(&chosen).map_err(|e| e.to_string())?;
    Ok(Schedule::of(scheduler.into(), source))
}

impl schemars::JsonSchema for Schedule {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Schedule".into()
    }

    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        // Schedulers hold numbers only, so this does not recurse.
        let table = plugin_schema::<dyn Scheduler>(generator, &serde_json::Map::new(), None);
        let mut alternatives = vec![serde_json::json!({ "type": "number" })];
        if let Some(tables) = table.get("anyOf").and_then(|a| a.as_array()) {
            alternatives.extend(tables.iter().cloned());
        }
        schemars::json_schema!({
            "description": "A number (constant over time), or a table that names a scheduler.",
            // Read by `recipe::describe`: an object here is a scheduler.
            "x-schedule": true,
            "anyOf": alternatives,
        })
    }
}
