//! What was wrong inside a table, in a form that survives serde's string-only errors.

use figment::error::{Actual, Kind};
use figment::value::Value;
use serde::{Deserialize, Serialize};

use super::nearest;

/// What kind of mistake it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fault {
    /// A key that is not known: the last of the path.
    UnknownKey,
    /// A name (of a plugin or a choice) that is not known.
    UnknownName,
    /// A key that has to be there: the last of the path.
    Missing,
    /// A value of the wrong type, or out of range.
    Value,
}

/// An error inside a (plugin) table: where, what, and what would have been right.
///
/// Plugin tables nest (a schedule in a loss, a position encoding in a backbone), each read by code that knows nothing
/// of the others. serde carries only a string through those borders, so the error is encoded into it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Nested {
    /// Keys from the table that was read to the problem.
    pub path: Vec<String>,
    /// What kind of mistake it was.
    pub fault: Fault,
    /// What is wrong.
    pub message: String,
    /// The name that is not known.
    pub given: Option<String>,
    /// What would have been right.
    pub known: Vec<String>,
}

impl Nested {
    const MARK: &'static str = "\u{1}nested:";

    fn new(fault: Fault, message: String) -> Self {
        Self { path: Vec::new(), fault, message, given: None, known: Vec::new() }
    }

    /// A value of another type than `expected`.
    pub fn wrong_type(value: &Value, expected: &str) -> Self {
        Self::new(Fault::Value, mismatch(&value.to_actual(), expected))
    }

    /// A key that has to be there, with the values it can have.
    pub fn missing(key: &str, known: Vec<String>) -> Self {
        Self { known, ..Self::new(Fault::Missing, "missing key".into()).under(key) }
    }

    /// A `plugin = "name"` that names nothing.
    pub fn unknown_plugin(kind: &str, name: &str, known: Vec<String>) -> Self {
        let message = format!("there is no {kind} plugin `{name}`");
        let given = Some(name.to_string());
        Self { given, known, ..Self::new(Fault::UnknownName, message).under("plugin") }
    }

    /// The same error, seen from the table that holds `key`.
    pub fn under(mut self, key: &str) -> Self {
        self.path.insert(0, key.to_string());
        self
    }

    /// Adds keys that the table that was read knows as well.
    pub fn with_known<'a>(mut self, keys: impl IntoIterator<Item = &'a str>) -> Self {
        if self.fault == Fault::UnknownKey && self.path.len() == 1 {
            self.known.extend(keys.into_iter().map(String::from));
        }
        self
    }

    /// The known name that is nearest to the one that was given.
    pub fn nearest(&self) -> Option<&str> {
        nearest(self.given.as_deref()?, self.known.iter().map(String::as_str))
    }

    /// The dotted key that a misspelt one was probably meant to be.
    pub(crate) fn meant(&self) -> Option<String> {
        let (_, table) = self.path.split_last().filter(|_| self.fault == Fault::UnknownKey)?;
        Some(table.iter().map(String::as_str).chain([self.nearest()?]).collect::<Vec<_>>().join("."))
    }

    /// What a figment error says.
    pub fn of(error: &figment::Error) -> Self {
        let list = |known: &[&str]| known.iter().map(ToString::to_string).collect();
        let mut nested = match &error.kind {
            Kind::Message(m) => match m.strip_prefix(Self::MARK).and_then(|json| serde_json::from_str(json).ok()) {
                Some(inner) => inner,
                None => Self::new(Fault::Value, m.clone()),
            },
            // figment's path already ends with the unknown key.
            Kind::UnknownField(name, known) => {
                let unknown = Self::new(Fault::UnknownKey, "unknown key".into());
                Self { given: Some(name.clone()), known: list(known), ..unknown }
            }
            Kind::UnknownVariant(name, known) => {
                let unknown = Self::new(Fault::UnknownName, format!("`{name}` is not one of the choices"));
                Self { given: Some(name.clone()), known: list(known), ..unknown }
            }
            Kind::MissingField(name) => Self::missing(name, Vec::new()),
            Kind::InvalidType(actual, expected) | Kind::InvalidValue(actual, expected) => {
                Self::new(Fault::Value, mismatch(actual, expected))
            }
            Kind::InvalidLength(n, expected) => {
                Self::new(Fault::Value, format!("expected {}, found {n} of them", in_words(expected)))
            }
            other => Self::new(Fault::Value, other.to_string()),
        };
        nested.path.splice(0..0, error.path.iter().cloned());
        nested
    }

    /// Puts what the schema says of the key into "expected a whole number, found ..", which knows of no range, and into
    /// what serde says where several types are possible.
    pub(crate) fn say_kind(&mut self, kind: &str) {
        // What serde says of enums is of Rust alone.
        let of_enums = ["data did not match any variant", "expected newtype variant", "expected one of the choices"];
        if of_enums.iter().any(|said| self.message.starts_with(said)) {
            let found = self.message.rsplit_once(", found ").map(|(_, found)| found).filter(|f| !f.contains("variant"));
            self.message = format!("expected {kind}{}", found.map(|f| format!(", found {f}")).unwrap_or_default());
        }
        let is_number = kind.starts_with("number") || kind.starts_with("whole number");
        match self.message.strip_prefix("expected a ").and_then(|rest| rest.split_once(", found ")) {
            Some((expected, found)) if is_number && (expected.contains("number")) => {
                self.message = format!("expected a {kind}, found {found}");
            }
            _ => {}
        }
    }

    /// As a message that [`of`](Self::of) can take apart again.
    pub fn encode(&self) -> String {
        let json = serde_json::to_string(self).expect("strings serialise");
        format!("{}{json}", Self::MARK)
    }
}

fn mismatch(actual: &Actual, expected: &str) -> String {
    let found = match actual {
        Actual::Bool(b) => format!("`{b}`"),
        Actual::Unsigned(n) => format!("`{n}`"),
        Actual::Signed(n) => format!("`{n}`"),
        Actual::Float(x) => format!("`{x:?}`"),
        Actual::Str(s) => format!("the text {s:?}"),
        Actual::Seq => "a list".into(),
        Actual::Map => "a table".into(),
        other => other.to_string(),
    };
    format!("expected {}, found {found}", in_words(expected))
}

/// What serde says that it found in place of another type.
pub(super) fn found(found: &str) -> String {
    match found {
        "map" => "a table".into(),
        "sequence" => "a list".into(),
        text if text.starts_with("string ") => format!("the text {}", text.trim_start_matches("string ")),
        // `integer `3``, and the like: the value is enough.
        other => other.split_once('`').map_or_else(|| other.into(), |(_, value)| format!("`{value}")),
    }
}

/// Rust's names of types in the words of the documentation.
pub(super) fn in_words(expected: &str) -> String {
    match expected {
        "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number, 0 or more".into(),
        other if other.starts_with("a nonzero u") => "a whole number, 1 or more".into(),
        "i8" | "i16" | "i32" | "i64" | "isize" => "a whole number".into(),
        "f32" | "f64" => "a number".into(),
        "a boolean" => "`true` or `false`".into(),
        "a string" => "a text in quotes".into(),
        "path string" => "a path in quotes".into(),
        "a sequence" => "a list".into(),
        "a map" => "a table".into(),
        "unit" => "nothing".into(),
        other if other == "enum" || other.starts_with("enum ") => "one of the choices, in quotes".into(),
        other if other.starts_with("struct ") => "a table".into(),
        other if other.starts_with("an array of length ") => {
            format!("a list of {} values", other.trim_start_matches("an array of length "))
        }
        other => other.into(),
    }
}
