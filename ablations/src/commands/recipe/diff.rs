//! `dinolab recipe diff A B`: changed keys with both values.

use std::collections::BTreeMap;
use std::path::Path;

use dinolab_core::recipe::{toml_value, Overrides, Resolved};
use dinolab_core::Result;
use serde_json::Value as Json;

use crate::style;

/// Runs the command.
pub(super) fn run(a: &Path, b: &Path) -> Result<()> {
    let none = Overrides::default();
    let (a, b) = (Resolved::load(a, &none)?, Resolved::load(b, &none)?);
    style::print(&changes(&a.value, &b.value).unwrap_or_else(|| "no difference\n".into()));
    Ok(())
}

/// One line a key that differs: `key  a -> b`; `none` where a side does not have it.
pub(super) fn changes(a: &Json, b: &Json) -> Option<String> {
    let (a, b) = (leaves(a), leaves(b));
    let keys: std::collections::BTreeSet<&String> = a.keys().chain(b.keys()).collect();
    let show = |value: Option<&Json>| value.map_or("none".into(), toml_value);
    let rows: Vec<Vec<String>> = keys
        .into_iter()
        .filter(|key| a.get(*key) != b.get(*key))
        .map(|key| {
            let (a, b) = (show(a.get(key)), show(b.get(key)));
            vec![style::out().bold(key), format!("{a} -> {b}")]
        })
        .collect();
    (!rows.is_empty()).then(|| style::table(rows))
}

/// Everything that is not a table, by dotted key.
fn leaves(value: &Json) -> BTreeMap<String, Json> {
    let mut found = BTreeMap::new();
    let mut todo = vec![(String::new(), value)];
    while let Some((path, value)) = todo.pop() {
        match value {
            Json::Object(table) => {
                let key = |k: &String| if path.is_empty() { k.clone() } else { format!("{path}.{k}") };
                todo.extend(table.iter().map(|(k, v)| (key(k), v)));
            }
            Json::Null => {}
            leaf => {
                found.insert(path, leaf.clone());
            }
        }
    }
    found
}
