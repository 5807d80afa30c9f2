//! The names of a grid's arms: short, fit for folders, and told apart.

use toml::Value;

/// The end of a grid's key that tells it from the others: two parts, `koleo.weight` of `losses.koleo.weight`, or more where
/// keys end alike.
pub(super) fn short_key(key: &str, all: &[&str]) -> String {
    let end = |parts: usize| key.rmatch_indices('.').nth(parts - 1).map_or(key, |(at, _)| &key[at + 1..]);
    let alone = |end: &&str| all.iter().filter(|k| **k == *end || k.ends_with(&format!(".{end}"))).count() == 1;
    let shortest = (2..).map(end).find(|e| alone(e) || *e == key).unwrap_or(key);
    folder_part(shortest)
}

/// The values of a key as parts of names. Those that would look alike get a mark of their own.
pub(super) fn short_values(values: &[Value]) -> Vec<String> {
    let short: Vec<String> = values.iter().map(short_value).collect();
    let alike = |name: &String| short.iter().filter(|other| *other == name).count() > 1;
    let name = |(value, name): (&Value, &String)| match alike(name) {
        true => format!("{name}-{}", mark(&value.to_string())),
        false => name.clone(),
    };
    values.iter().zip(&short).map(name).collect()
}

fn short_value(value: &Value) -> String {
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Table(table) => match table.get("plugin") {
            Some(Value::String(plugin)) => plugin.clone(),
            _ => value.to_string(),
        },
        _ => value.to_string(),
    };
    folder_part(&text)
}

fn folder_part(text: &str) -> String {
    let fits = |c: char| c.is_ascii_alphanumeric() || "._+-".contains(c);
    text.chars().map(|c| if fits(c) { c } else { '_' }).collect()
}

/// Characters of a mark.
pub(super) const MARK: usize = 8;

/// A few characters that differ where texts do.
pub(super) fn mark(text: &str) -> String {
    blake3::hash(text.as_bytes()).to_hex()[..MARK].to_string()
}
