//! The program `dinolab`: its command line, the suite runner, statistics and the report.
//!
//! A program of your own with plugins of your own is this one with your crate linked in:
//!
//! ```no_run
//! // use my_plugins as _;
//! fn main() -> std::process::ExitCode {
//!     dinolab::cli::main()
//! }
//! ```

#![warn(clippy::print_stdout, clippy::print_stderr)]

use std::sync::OnceLock;

use dinolab_core::problem::Origin;
use dinolab_core::text::printable;
use dinolab_core::train::RunInfo;
use dinolab_core::{registry, Error};

pub mod cli;
pub mod cluster;
pub mod commands;
pub mod evaluate;
pub mod export;
pub mod features;
pub mod filmstrip;
pub mod given;
pub mod pictures;
pub mod pulse;
pub mod ranks;
mod read_by;
pub mod report;
pub mod signals;
pub mod stages;
pub mod statistics;
pub mod style;
pub mod suite;

/// The git revision that this program was built from.
pub const REVISION: &str = env!("PROGRAM_REVISION");

/// The crates that the revision speaks of.
const OWN: [&str; 3] = ["dinolab_core", "dinolab_plugins", "dinolab"];

/// The same with the hash of the program where it has plugins of other crates, of which the revision says nothing.
pub fn build() -> &'static str {
    static BUILD: OnceLock<String> = OnceLock::new();
    BUILD.get_or_init(|| {
        let others: Vec<&str> = registry::crates().into_iter().filter(|name| !OWN.contains(name)).collect();
        if others.is_empty() {
            return REVISION.into();
        }
        let hash = std::env::current_exe().and_then(std::fs::read).map(|program| blake3::hash(&program).to_hex());
        let hash = hash.map_or("unknown".into(), |hash| hash[..8].to_string());
        format!("{REVISION} with {} in {hash}", others.join(", "))
    })
}

/// Whose plugins this program lacks, where `error` is of the recipe of a run that a program with plugins of its own made.
fn of_another_program(error: &Error) -> Option<String> {
    let Error::Recipe(recipe) = error else { return None };
    let file = recipe.0.iter().find_map(|problem| match &problem.origin {
        Origin::File { source, .. } => Some(&source.path),
        _ => None,
    })?;
    // That of a run, or of one of its checkpoints.
    let info =
        [1, 3].into_iter().filter_map(|up| file.ancestors().nth(up)).find_map(|run| RunInfo::read(run).ok()?)?;
    let (_, with) = info.revision.split_once(" with ")?;
    let here = registry::crates();
    let missing: Vec<&str> = with.rsplit_once(" in ")?.0.split(", ").filter(|name| !here.contains(name)).collect();
    let text = format!(
        "{} is of a run that a program with the plugins of {} made: give the command to that program",
        printable(file),
        missing.join(", ")
    );
    (!missing.is_empty()).then_some(text)
}

// Linked for its registrations.
use dinolab_plugins as _;
