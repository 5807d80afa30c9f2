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

pub mod cli;
pub mod cluster;
pub mod commands;
pub mod evaluate;
pub mod export;
pub mod features;
pub mod filmstrip;
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

// Linked for its registrations.
use dinolab_plugins as _;
