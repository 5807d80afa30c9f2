//! `dinolab recipe diff A B`: changed keys with both values.

use std::collections::BTreeSet;
use std::path::Path;

use dinolab_core::recipe::{toml_value, Overrides, Resolved};
use dinolab_core::Result;
use serde_json::{Map, Value as Json};

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
    let mut rows = Vec::new();
    compare("", Some(a), Some(b), &mut rows);
    (!rows.is_empty()).then(|| style::table(rows))
}

fn compare(path: &str, a: Option<&Json>, b: Option<&Json>, rows: &mut Vec<Vec<String>>) {
    let table = |value: Option<&Json>| value.map_or(Some(Map::new()), |v| v.as_object().cloned());
    match (table(a), table(b)) {
        // Tables are compared key by key, also with one that is not there.
        (Some(a), Some(b)) => {
            let keys: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
            for key in keys {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                compare(&path, a.get(key), b.get(key), rows);
            }
        }
        _ if a.filter(|v| !v.is_null()) == b.filter(|v| !v.is_null()) => {}
        _ => {
            let show = |value: Option<&Json>| value.map_or("none".into(), toml_value);
            rows.push(vec![style::out().bold(path), format!("{} -> {}", show(a), show(b))]);
        }
    }
}
