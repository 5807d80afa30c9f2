//! Problems: what is wrong with a recipe, a suite or a plugin table, where it says so, and what was probably meant.
//!
//! A [`Problem`] has a key and the place where it was set; [`Nested`] is one inside a plugin table, read by code that knows
//! neither.

mod nested;

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use annotate_snippets::{AnnotationKind, Group, Level, Renderer, Snippet};

pub use nested::{Fault, Nested};

/// What serde says of a value of a wrong type ("invalid type: string \"x\", expected u64"), without Rust's names of types.
pub fn plain_words(message: &str) -> String {
    let line = |line: &str| {
        if line.starts_with("data did not match any variant of untagged enum") {
            return "this has none of the forms that it may have".into();
        }
        let wrong_type = line.strip_prefix("invalid type: ").and_then(|rest| rest.split_once(", expected "));
        if let Some((found, expected)) = wrong_type {
            return format!("expected {}, found {}", nested::in_words(expected.trim_end()), nested::found(found));
        }
        if let Some((given, known)) = line.strip_prefix("unknown variant ").and_then(|l| l.split_once(", expected ")) {
            return format!("{given} is not one of the choices: {known}");
        }
        match line.split_once("expected ") {
            Some((before, expected)) => format!("{before}expected {}", nested::in_words(expected.trim_end())),
            None => line.to_string(),
        }
    };
    message.lines().map(line).collect::<Vec<_>>().join("\n")
}

/// A file as it was read, for messages that quote it.
#[derive(Debug, PartialEq, Eq)]
pub struct SourceFile {
    /// Where it is.
    pub path: PathBuf,
    /// What it says.
    pub text: String,
}

/// Where a value came from. Later layers win: defaults, files, environment, `--set`, overrides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Nobody set it.
    Default,
    /// A recipe file.
    File {
        /// The file.
        source: Arc<SourceFile>,
        /// Bytes of the key.
        key: Range<usize>,
        /// Bytes of the value.
        value: Range<usize>,
    },
    /// An environment variable, by name.
    Env(String),
    /// A `--set`, as it was typed.
    Set(String),
    /// Something that starts runs, in its own words: "arm `off`".
    Override(String),
}

impl Origin {
    /// Line and column, from 1, of the key.
    pub fn line_column(&self) -> Option<(usize, usize)> {
        let Self::File { source, key, .. } = self else { return None };
        Some(line_column(&source.text, key.start))
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => write!(f, "default"),
            Self::File { source, key, .. } => {
                write!(f, "{}:{}", source.path.display(), line_column(&source.text, key.start).0)
            }
            Self::Env(name) => write!(f, "environment {name}"),
            Self::Set(text) => write!(f, "--set {text}"),
            Self::Override(by) => write!(f, "{by}"),
        }
    }
}

fn line_column(text: &str, at: usize) -> (usize, usize) {
    let before = &text[..at.min(text.len())];
    let start = before.rfind('\n').map_or(0, |i| i + 1);
    (before.matches('\n').count() + 1, before[start..].chars().count() + 1)
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// The recipe cannot be used.
    Error,
    /// It can be used, but probably does not mean what it says.
    Warning,
    /// It can be used, and part of it is not.
    Note,
}

/// One thing that is wrong with a recipe.
#[derive(Clone, Debug, PartialEq)]
pub struct Problem {
    /// How bad it is.
    pub severity: Severity,
    /// The dotted key; empty for the file as a whole.
    pub key: String,
    /// What is wrong, and what was expected.
    pub message: String,
    /// What to do.
    pub help: Option<String>,
    /// Where the key was set.
    pub origin: Origin,
    /// Whether the value is to be marked, not the key.
    pub at_value: bool,
}

impl Problem {
    /// An error at `key`.
    pub fn error(key: impl Into<String>, message: impl Into<String>) -> Self {
        let (key, message) = (key.into(), message.into());
        Self { severity: Severity::Error, key, message, help: None, origin: Origin::Default, at_value: true }
    }

    /// A warning at `key`.
    pub fn warning(key: impl Into<String>, message: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, ..Self::error(key, message) }
    }

    /// With what to do about it.
    pub fn help(self, help: impl Into<String>) -> Self {
        Self { help: Some(help.into()), ..self }
    }

    /// With one more line of what to do.
    pub(crate) fn further_help(self, line: impl Into<String>) -> Self {
        let line = line.into();
        Self { help: Some(self.help.map_or_else(|| line.clone(), |help| format!("{help}\n  {line}"))), ..self }
    }

    /// With where it was said.
    pub fn at(self, origin: Origin) -> Self {
        Self { origin, ..self }
    }

    /// As [`Nested`] says it, with the nearest known name as help.
    pub(crate) fn of(nested: &Nested) -> Self {
        let mut problem = Self::error(nested.path.join("."), nested.message.clone());
        problem.at_value = matches!(nested.fault, Fault::Value | Fault::UnknownName);
        let mut known: Vec<&str> = nested.known.iter().map(String::as_str).collect();
        known.sort_unstable();
        known.dedup();
        if !known.is_empty() {
            let list = format!("known: {}", known.join(", "));
            problem.help = Some(nested.nearest().map_or(list.clone(), |n| format!("did you mean `{n}`? {list}")));
        }
        problem
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.origin {
            Origin::File { source, key, value } => {
                let span = Some(if self.at_value { value } else { key });
                let span = span.filter(|span| source.text.get(Range::clone(span)).is_some()).unwrap_or(&(0..0));
                let (line, column) = line_column(&source.text, span.start);
                write!(f, "{}:{line}:{column}: ", crate::text::printable(&source.path))?;
                self.fmt_message(f)?;
                let marked = AnnotationKind::Primary.span(span.clone());
                let quoted = Group::with_level(Level::ERROR).element(Snippet::source(&source.text).annotation(marked));
                write!(f, "\n{}", Renderer::plain().render(&[quoted]))?;
            }
            Origin::Default => self.fmt_message(f)?,
            other => {
                write!(f, "{other}: ")?;
                self.fmt_message(f)?;
            }
        }
        self.help.as_ref().map_or(Ok(()), |help| write!(f, "\n  help: {help}"))
    }
}

impl Problem {
    fn fmt_message(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        write!(f, "{}", self.message)
    }
}

/// A recipe that cannot be used: everything that is wrong with it.
#[derive(Debug, PartialEq)]
pub struct RecipeError(pub Vec<Problem>);

impl std::error::Error for RecipeError {}

impl fmt::Display for RecipeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.0.iter().enumerate() {
            write!(f, "{}{problem}", if i == 0 { "" } else { "\n" })?;
        }
        Ok(())
    }
}

/// The known name that was probably meant: a third of the letters may be wrong, or one names the other's beginning.
pub fn nearest<'a>(given: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let lower = given.to_lowercase();
    let distance = |name: &str| strsim::damerau_levenshtein(&lower, &name.to_lowercase());
    let best = known.into_iter().min_by_key(|name| (distance(name), *name))?;
    let near = distance(best) <= given.chars().count().max(best.chars().count()).div_ceil(3);
    (near || (given.len() >= 3 && (best.starts_with(&lower) || lower.starts_with(best)))).then_some(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_name_is_near() {
        let known = ["weight", "enabled", "plugin"];
        assert_eq!(nearest("wieght", known), Some("weight"));
        assert_eq!(nearest("Enabled", known), Some("enabled"));
        assert_eq!(nearest("momentum", known), None);
        assert_eq!(nearest("x", []), None);
    }

    #[test]
    fn a_problem_quotes_its_line_and_marks_the_value() {
        let source = Arc::new(SourceFile { path: "a.toml".into(), text: "seed = 1\n  steps = \"ä\"\n".into() });
        let origin = Origin::File { source, key: 11..16, value: 19..23 };
        let problem = Problem::error("steps", "expected a whole number").at(origin).help("write a number");
        let expected = "a.toml:2:11: steps: expected a whole number\n  |\n\
            2 |   steps = \"ä\"\n  |           ^^^\n  help: write a number";
        assert_eq!(problem.to_string(), expected);
    }
}
