//! The error type of the library: what was wrong, where, and what to do.

use std::path::PathBuf;

use crate::problem::{Problem, RecipeError};
use crate::text::printable;

/// Result with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong because of what the library was given, or where it runs.
///
/// Broken invariants of the library itself are panics; everything here is meant to be read by a user.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A recipe, suite or plugin table says something impossible.
    #[error(transparent)]
    Recipe(#[from] Box<RecipeError>),
    /// Operands whose shapes, types or devices do not fit together.
    #[error("{op}: {problem}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// What does not fit, with the shapes.
        problem: String,
    },
    /// A file or folder that cannot be read or written.
    #[error("cannot {action} {}: {source}{}", printable(path), advice(source))]
    Io {
        /// "read", "write", "create", ...
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// Data or a file whose content is not what it has to be.
    #[error("{}: {problem}\n  help: {help}", printable(path))]
    Content {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
        /// What the user can do.
        help: String,
    },
    /// Anything else that a user can mend.
    #[error("{problem}\n  help: {help}")]
    User {
        /// What is wrong.
        problem: String,
        /// What the user can do.
        help: String,
    },
    /// A loss or gradient stopped being a finite number.
    #[error("step {step}: {what} is not finite{}\n  help: the weights were not updated; {help}", capture.as_ref().map(|p| format!(" (captured in {})", printable(p))).unwrap_or_default())]
    NonFinite {
        /// The step that failed; the first is 1.
        step: u64,
        /// Which loss or gradient, and the first operation that produced it.
        what: String,
        /// The file that reproduces the failure.
        capture: Option<PathBuf>,
        /// What to try.
        help: String,
    },
    /// A run ended by an error, and left a report of it.
    #[error("{error}\n  report: {}", printable(report))]
    Run {
        /// What ended it.
        error: Box<Error>,
        /// The step that it was at.
        step: u64,
        /// Step, recipe, last metrics and the batch's samples.
        report: PathBuf,
    },
}

/// What to do about a failure of the operating system, where it is plain.
fn advice(source: &std::io::Error) -> &'static str {
    use std::io::ErrorKind::{
        AlreadyExists, FileTooLarge, NotADirectory, PermissionDenied, QuotaExceeded, ReadOnlyFilesystem, StorageFull,
    };
    match source.kind() {
        StorageFull | QuotaExceeded | FileTooLarge => {
            "\n  help: make room and give the command again; `train` goes on from what was saved with --resume, `ablate` with --retry-failed"
        }
        PermissionDenied | ReadOnlyFilesystem => "\n  help: choose a place where you may, or change its permissions",
        AlreadyExists => "\n  help: something else has this name: move it away, or choose another",
        NotADirectory => "\n  help: a part of this path is a file: move it away, or choose another",
        _ => "",
    }
}

impl Error {
    /// What is wrong, without what to do: for lists of problems.
    pub fn problem(&self) -> String {
        match self {
            Self::Content { problem, .. } | Self::User { problem, .. } => problem.clone(),
            other => other.to_string(),
        }
    }

    /// What is wrong with a thing that is called `name`, and in which file, where the name does not tell.
    pub fn problem_of(&self, name: &str) -> String {
        match self {
            Self::Content { path, problem, .. } if !name.contains(&printable(path)) => {
                format!("{}: {problem}", printable(path))
            }
            other => other.problem(),
        }
    }

    /// What ended a run, without the report that it left.
    pub fn without_report(self) -> Self {
        match self {
            Self::Run { error, .. } => *error,
            other => other,
        }
    }

    /// A shape error of `op`.
    pub fn shape(op: &'static str, problem: impl Into<String>) -> Self {
        Self::Shape { op, problem: problem.into() }
    }

    /// An error that the user can mend by doing what `help` says.
    pub fn user(problem: impl Into<String>, help: impl Into<String>) -> Self {
        Self::User { problem: problem.into(), help: help.into() }
    }

    /// A file whose content is wrong.
    pub fn content(path: impl Into<PathBuf>, problem: impl Into<String>, help: impl Into<String>) -> Self {
        Self::Content { path: path.into(), problem: problem.into(), help: help.into() }
    }

    /// For `map_err`: an I/O error on `path`.
    pub fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }
}

impl From<Vec<Problem>> for Error {
    fn from(problems: Vec<Problem>) -> Self {
        Box::new(RecipeError(problems)).into()
    }
}

impl From<Problem> for Error {
    fn from(problem: Problem) -> Self {
        vec![problem].into()
    }
}
