//! The command line: which commands there are, and how a program ends.

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use dinolab_core::recipe::Resolved;
use dinolab_core::{registry, Error, Result};

use crate::{commands, style};

/// Exit code of bad input: a recipe, a suite or a command line that has to be mended.
pub const BAD_INPUT: u8 = 2;
/// Exit code of a run that was interrupted, saved itself and can be resumed.
pub const RESUMABLE: u8 = 75;

/// A plugin-based research sandbox for DINOv3-style self-supervised vision models.
#[derive(Debug, Parser)]
#[command(name = "dinolab", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// One line a command; each lives in a file of [`commands`].
#[derive(Debug, Subcommand)]
enum Command {
    /// Run a suite: several arms of a recipe over several seeds, then statistics and a report.
    Ablate(commands::ablate::Args),
    /// Train a recipe, or go on with a run.
    Train(commands::train::Args),
    /// Read published DINOv3 weights into a folder that recipes can start from.
    Import(commands::import::Args),
    /// Write the weights of a run for Hugging Face transformers or other tools.
    Export(commands::export::Args),
    /// Time the training step and the data pipeline of a recipe.
    Bench(commands::bench::Args),
    /// See what trained weights see in images: features, pictures, a page to click in.
    Features(commands::features::Args),
    /// Check the GPU engine: driver, libraries, kernels, every operation and a training step against the CPU.
    Doctor(commands::doctor::Args),
    /// Run a step again that was captured because something was not finite.
    Replay(commands::replay::Args),
    /// Make a plugin of your own: a crate that works, to be changed.
    #[command(subcommand)]
    New(commands::new::Command),
    /// Check values and gradients of operations and losses on random cases.
    Check(commands::check::Args),
    /// List the plugins: `dinolab plugins`, `dinolab plugins loss`, `dinolab plugins loss gram`.
    Plugins(commands::plugins::Args),
    /// Show, check, compare and explain recipes.
    #[command(subcommand)]
    Recipe(commands::recipe::Command),
    /// Print completions for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

impl Command {
    fn run(self) -> Result<ExitCode> {
        match self {
            Self::Ablate(args) => commands::ablate::run(args),
            Self::Train(args) => commands::train::run(&args),
            Self::Import(args) => commands::import::run(&args),
            Self::Export(args) => commands::export::run(&args),
            Self::Bench(args) => commands::bench::run(&args),
            Self::Features(args) => commands::features::run(&args),
            Self::Doctor(args) => commands::doctor::run(&args),
            Self::Replay(args) => commands::replay::run(&args),
            Self::New(command) => commands::new::run(&command),
            Self::Check(args) => commands::check::run(&args),
            Self::Plugins(args) => commands::plugins::run(&args),
            Self::Recipe(command) => commands::recipe::run(command),
            Self::Completions { shell } => {
                let mut text = Vec::new();
                clap_complete::generate(shell, &mut Cli::command(), "dinolab", &mut text);
                style::print(&String::from_utf8_lossy(&text));
                Ok(ExitCode::SUCCESS)
            }
        }
    }
}

/// `--set`, for every command that reads a recipe.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct SetArgs {
    /// Override a key, for example `--set optimizer.lr=1e-3`. The value is TOML; a bare word is text.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub sets: Vec<String>,
}

/// A recipe and what overrides it, for the commands that run one.
#[derive(Debug, clap::Args)]
pub struct RecipeArgs {
    /// A recipe, or the folder of a run.
    recipe: std::path::PathBuf,
    #[command(flatten)]
    set: SetArgs,
}

impl RecipeArgs {
    /// The resolved recipe; its warnings are printed.
    ///
    /// # Errors
    /// All that is wrong with the recipe.
    pub fn resolve(&self) -> Result<Resolved> {
        let resolved = Resolved::load(&self.recipe, &self.set.overrides())?;
        resolved.warnings.iter().for_each(style::warn);
        Ok(resolved)
    }
}

impl SetArgs {
    /// With the environment.
    pub fn overrides(&self) -> dinolab_core::recipe::Overrides {
        dinolab_core::recipe::Overrides { sets: self.sets.clone(), env: true }
    }
}

/// Runs the program: 0, [`BAD_INPUT`], [`RESUMABLE`], or 1 for any other failure.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    registry::check().and_then(|()| cli.command.run()).unwrap_or_else(|error| {
        style::error(&error);
        exit_code(&error)
    })
}

/// Whether it was what the user gave, or something else.
pub fn exit_code(error: &Error) -> ExitCode {
    match error {
        Error::Recipe(_) | Error::User { .. } | Error::Content { .. } | Error::Io { action: "read", .. } => {
            ExitCode::from(BAD_INPUT)
        }
        _ => ExitCode::FAILURE,
    }
}
