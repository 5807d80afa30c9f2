//! What two resolved recipes say differently, key by key.

use std::collections::BTreeMap;

use toml::Value;

/// A changed key with both values.
pub(super) fn said((key, was, is): &(String, Option<String>, Option<String>)) -> String {
    let show = |value: &Option<String>| value.clone().unwrap_or_else(|| "nothing".into());
    format!("{key}: was {}, is {}", show(was), show(is))
}

/// Every leaf of a recipe by its dotted key.
fn flatten(table: &toml::Table) -> BTreeMap<String, String> {
    fn walk(prefix: &str, table: &toml::Table, into: &mut BTreeMap<String, String>) {
        for (key, value) in table {
            let key = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
            match value {
                Value::Table(inner) => walk(&key, inner, into),
                _ => {
                    into.insert(key, value.to_string());
                }
            }
        }
    }
    let mut into = BTreeMap::new();
    walk("", table, &mut into);
    into
}

/// Keys whose values differ between two recipes: (key, value in `a`, value in `b`).
pub fn changed_keys(a: &toml::Table, b: &toml::Table) -> Vec<(String, Option<String>, Option<String>)> {
    let (a, b) = (flatten(a), flatten(b));
    let mut keys: Vec<&String> = a.keys().chain(b.keys()).collect();
    keys.sort();
    keys.dedup();
    keys.retain(|key| a.get(*key) != b.get(*key));
    keys.into_iter().map(|key| (key.clone(), a.get(key).cloned(), b.get(key).cloned())).collect()
}
