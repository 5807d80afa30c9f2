//! JSON files that others wrote: nothing in them is passed over.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

use figment::value::Value;
use serde::de::DeserializeOwned;
use serde_json::Value as Json;

use crate::files::{twice, Really};
use crate::problem::{nearest, Nested};
use crate::text::printable;
use crate::{Error, Result};

/// Most bytes of a file that are read: configurations have a few thousand, the index of the largest models a megabyte.
const LARGEST: u64 = 64 << 20;

/// A table of a JSON file, each key of which has to be asked for: what nobody asked for is refused by name, so that no
/// setting is passed over, be it new, misspelt or of another program.
#[derive(Debug)]
pub struct JsonTable {
    file: PathBuf,
    /// Where the table is in the file: empty, or `rope_parameters.`.
    prefix: String,
    left: serde_json::Map<String, Json>,
    known: BTreeSet<&'static str>,
}

impl JsonTable {
    /// Reads a file.
    ///
    /// # Errors
    /// If it cannot be read, is not a JSON table, or has a key twice.
    pub fn read(file: &Path) -> Result<Self> {
        let about = std::fs::metadata(file).map_err(Error::io("read", file))?;
        if !about.is_file() {
            return Err(Error::content(file, "this is not a file", "name the folder of a download"));
        }
        let size = about.len();
        if size > LARGEST {
            let problem = format!("{size} bytes are too many for a configuration");
            return Err(Error::content(file, problem, "it has a wrong name, or is damaged: download it again"));
        }
        let bytes = std::fs::read(file).map_err(Error::io("read", file))?;
        let wrong = |problem: String| Error::content(file, problem, "download it again");
        let value: Json = serde_json::from_slice(&bytes).map_err(|e| match Really::of(&bytes) {
            Some(other) if !other.what.starts_with("a JSON") && !other.what.starts_with("a text") => {
                other.error(file, "a JSON file")
            }
            _ => wrong(format!("not JSON: {e}")),
        })?;
        if let Some(key) = twice(&bytes) {
            return Err(wrong(format!("`{}` is there twice", printable(key))));
        }
        match value {
            Json::Object(left) => Ok(Self { file: file.into(), prefix: String::new(), left, known: BTreeSet::new() }),
            other => Err(wrong(format!("expected a table `{{ ... }}`, found {}", in_short(&other)))),
        }
    }

    /// The file.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// An error at `key`.
    pub fn wrong(&self, key: &str, problem: impl fmt::Display, help: impl Into<String>) -> Error {
        Error::content(&self.file, printable(format!("{}{key}: {problem}", self.prefix)), help)
    }

    /// The value of `key`; `null` is no value.
    ///
    /// # Errors
    /// If it is of another type.
    pub fn take<T: DeserializeOwned>(&mut self, key: &'static str) -> Result<Option<T>> {
        self.known.insert(key);
        let Some(value) = self.left.remove(key).filter(|v| !v.is_null()) else { return Ok(None) };
        // serde_json counts the values of a list, figment has the better words.
        serde_json::from_value(value.clone()).map(Some).map_err(|e| {
            let in_words =
                Value::serialize(&value).and_then(|v| v.deserialize::<T>()).map_err(|e| Nested::of(&e).message);
            let problem = in_words.err().unwrap_or_else(|| e.to_string());
            self.wrong(key, problem, "take the file that belongs to the weights, or correct it")
        })
    }

    /// The value of `key`, which has to be there.
    ///
    /// # Errors
    /// If it is missing, or of another type.
    pub fn need<T: DeserializeOwned>(&mut self, key: &'static str) -> Result<T> {
        self.take(key)?.ok_or_else(|| {
            let near = nearest(key, self.left.keys().map(String::as_str)).map(|near| format!(", which has `{near}`"));
            let help = "add it with the value that the model was trained with, or take the file that belongs to it";
            self.wrong(key, format!("missing in this file{}", near.unwrap_or_default()), help)
        })
    }

    /// The table of `key`.
    ///
    /// # Errors
    /// If it is something else than a table.
    pub fn table(&mut self, key: &'static str) -> Result<Option<Self>> {
        self.known.insert(key);
        match self.left.remove(key) {
            None | Some(Json::Null) => Ok(None),
            Some(Json::Object(left)) => {
                let prefix = format!("{}{key}.", self.prefix);
                Ok(Some(Self { file: self.file.clone(), prefix, left, known: BTreeSet::new() }))
            }
            Some(other) => Err(self.wrong(key, format!("expected a table, found {}", in_short(&other)), "correct it")),
        }
    }

    /// Keys that change nothing, whatever their value.
    pub fn harmless(&mut self, keys: &'static [&'static str]) {
        keys.iter().for_each(|key| drop(self.left.remove(*key)));
        self.known.extend(keys);
    }

    /// The text at `key`, which is not asked for by that.
    pub fn peek(&self, key: &str) -> Option<&str> {
        self.left.get(key).and_then(Json::as_str)
    }

    /// Refuses what nobody asked for.
    ///
    /// # Errors
    /// All such keys, with the nearest known one.
    pub fn finish(self) -> Result<()> {
        let mut unknown = Vec::new();
        for (key, value) in &self.left {
            let near = nearest(key, self.known.iter().copied()).map(|near| format!(" (did you mean `{near}`?)"));
            unknown.push(format!("{}{key} = {}{}", self.prefix, in_short(value), near.unwrap_or_default()));
        }
        if unknown.is_empty() {
            return Ok(());
        }
        let problem = printable(format!("dinolab does not know what this means: {}", unknown.join(", ")));
        let help = "correct the key; or remove it, if it does not change what the model computes";
        Err(Error::content(self.file, problem, help))
    }
}

/// A value for a message.
fn in_short(value: &Json) -> String {
    match value {
        Json::Object(_) => "a table".into(),
        Json::Array(list) => format!("a list of {}", list.len()),
        other => {
            let text = other.to_string();
            let short: String = text.chars().take(60).collect();
            if short.len() < text.len() {
                short + "..."
            } else {
                short
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(text: &str) -> Result<JsonTable> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("config.json");
        std::fs::write(&file, text).unwrap();
        JsonTable::read(&file)
    }

    #[test]
    fn a_key_given_twice_is_refused() {
        assert!(table(r#"{"theta": 1, "theta": 2}"#).unwrap_err().to_string().contains("`theta` is there twice"));
    }

    #[test]
    fn what_nobody_asked_for_is_refused_with_the_nearest_key() {
        let mut keys = table(r#"{"rope_tetha": 50.0, "size": 3, "gone": null, "something_else": {"a": 1}}"#).unwrap();
        assert_eq!(keys.take::<usize>("size").unwrap(), Some(3));
        assert_eq!(keys.take::<f64>("gone").unwrap(), None);
        assert_eq!(keys.take::<f64>("rope_theta").unwrap(), None);
        let said = keys.finish().unwrap_err().to_string();
        assert!(said.contains("rope_tetha = 50.0 (did you mean `rope_theta`?), something_else = a table"), "{said}");
        assert!(!said.contains("gone"), "{said}");
    }

    #[test]
    fn a_wrong_type_is_said_with_file_and_key() {
        let mut keys = table(r#"{"size": "large", "depth": 2.5, "inner": {"theta": []}}"#).unwrap();
        let said = keys.take::<usize>("size").unwrap_err().to_string();
        assert!(said.contains("config.json: size: expected a whole number") && said.contains("\"large\""), "{said}");
        assert!(keys.take::<usize>("depth").is_err());
        assert!(keys.need::<usize>("heads").unwrap_err().to_string().contains("heads: missing"));
        let mut inner = keys.table("inner").unwrap().unwrap();
        assert!(inner.need::<f64>("theta").unwrap_err().to_string().contains("inner.theta: expected a number"));
    }
}
