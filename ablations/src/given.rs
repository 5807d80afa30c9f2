//! The command that was given to this program.

use std::path::Path;

use dinolab_core::recipe::key_variables;

use crate::style::shell;

/// What this program was started as: `dinolab`, or the name of a program with plugins of its own.
pub fn program() -> String {
    let first = std::env::args_os().next().unwrap_or_default();
    Path::new(&first).file_name().map_or_else(|| "dinolab".into(), |name| name.to_string_lossy().into_owned())
}

/// The command as a shell reads it, after the variables of the environment that set keys of recipes.
pub fn command() -> String {
    let variables = key_variables().into_iter().map(|(name, value)| format!("{name}={}", shell(&value)));
    // The part of a suite that writes its report does no run.
    let arguments = std::env::args_os().skip(1).filter(|word| word != "--report");
    let arguments = arguments.map(|word| shell(&word.to_string_lossy()));
    variables.chain([shell(&program())]).chain(arguments).collect::<Vec<_>>().join(" ")
}
