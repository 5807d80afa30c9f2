//! Keys and values as TOML writes them.

use serde_json::Value as Json;

/// A key as TOML writes it.
pub(crate) fn bare(key: &str) -> String {
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
