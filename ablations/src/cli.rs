//! The command line: which commands there are, and how a program ends.

use std::any::Any;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use dinolab_core::comm::Launch;
use dinolab_core::resolved::Resolved;
use dinolab_core::{registry, Error, Result};

use crate::signals::{self, Answer};
use crate::{commands, ranks, style};

/// Exit code of bad input: a recipe, a suite or a command line that has to be mended.
pub const BAD_INPUT: u8 = 2;
/// Exit code of a run that was interrupted, saved itself and can be resumed.
pub const RESUMABLE: u8 = 75;

/// Exit code of a defect: the one that Rust gives a panic.
const PANIC: u8 = 101;

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
    /// Run a chain of stages, each continuing from the previous one: pretraining, Gram anchoring, high resolution.
    Stages(commands::stages::Args),
    /// Show the report of a run or a suite in a browser while it runs.
    Watch(commands::watch::Args),
    /// Read published DINOv3 weights into a folder that recipes can start from.
    Import(commands::import::Args),
    /// Write the weights of a run for Hugging Face transformers or other tools.
    Export(commands::export::Args),
    /// Time the training step and the data pipeline of a recipe.
    Bench(commands::bench::Args),
    /// Visualize what trained weights see in images: features, pictures, an interactive page.
    Features(commands::features::Args),
    /// Score trained weights on a dataset by probes, at several image sizes.
    Eval(commands::eval::Args),
    /// Check the GPU engine: driver, libraries, kernels, operations and a step against the CPU; under a launcher (mpirun, torchrun, srun), the
    /// communication between processes, and between their GPUs, in place of that.
    Doctor(commands::doctor::Args),
    /// Run a captured step again. Steps are captured when a value is not finite.
    Replay(commands::replay::Args),
    /// Create your own plugin: a working crate that you then change.
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
    /// What it does when a signal asks it to stop; those that are left out end as any program does.
    fn answer(&self) -> Option<Answer> {
        match self {
            Self::Ablate(_) | Self::Train(_) | Self::Stages(_) | Self::Features(_) | Self::Eval(_) => {
                Some(Answer::Save)
            }
            Self::Import(_) | Self::Export(_) | Self::Bench(_) => Some(Answer::End),
            _ => None,
        }
    }

    /// Whether several processes that were started together do it together.
    fn shares_steps(&self) -> bool {
        matches!(self, Self::Train(_) | Self::Bench(_) | Self::Doctor(_))
    }

    /// Whether its thread is the one that computes: students side by side have threads of their own.
    fn computes_itself(&self) -> bool {
        !matches!(self, Self::Train(args) if args.has_students())
    }

    fn run(self) -> Result<ExitCode> {
        match self {
            Self::Ablate(args) => commands::ablate::run(args),
            Self::Train(args) => commands::train::run(&args),
            Self::Stages(args) => commands::stages::run(&args),
            Self::Watch(args) => commands::watch::run(&args),
            Self::Import(args) => commands::import::run(&args),
            Self::Export(args) => commands::export::run(&args),
            Self::Bench(args) => commands::bench::run(&args),
            Self::Features(args) => commands::features::run(&args),
            Self::Eval(args) => commands::eval::run(&args),
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

/// `--device`, for every command that computes.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct DeviceArgs {
    /// Where to run: auto, cpu, cuda or cuda:N, in place of the recipe's `device`
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,
}

impl DeviceArgs {
    /// As overrides of a recipe.
    pub fn sets(&self) -> impl Iterator<Item = String> + '_ {
        self.device.iter().map(|device| format!("device=\"{device}\""))
    }
}

/// A recipe and what overrides it, for the commands that run one.
#[derive(Clone, Debug, clap::Args)]
pub struct RecipeArgs {
    /// A recipe, or the folder of a run.
    #[arg(value_name = "RECIPE")]
    pub path: std::path::PathBuf,
    #[command(flatten)]
    set: SetArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

impl RecipeArgs {
    /// The resolved recipe; its warnings are printed.
    ///
    /// # Errors
    /// All that is wrong with the recipe.
    pub fn resolve(&self) -> Result<Resolved> {
        let resolved = self.resolve_quietly()?;
        resolved.warnings.iter().for_each(style::warn);
        Ok(resolved)
    }
}

impl RecipeArgs {
    /// With so many steps, if a number is given.
    pub fn with_steps(mut self, steps: Option<u32>) -> Self {
        self.set.sets.extend(steps.map(|steps| format!("steps={steps}")));
        self
    }

    /// The resolved recipe, whose warnings were printed by another process.
    ///
    /// # Errors
    /// As [`resolve`](Self::resolve).
    pub fn resolve_quietly(&self) -> Result<Resolved> {
        self.resolve_other(&self.path)
    }

    /// Another recipe under the same overrides.
    ///
    /// # Errors
    /// As [`resolve`](Self::resolve).
    pub fn resolve_other(&self, path: &std::path::Path) -> Result<Resolved> {
        let mut overrides = self.set.overrides();
        overrides.sets.extend(self.device.sets());
        Resolved::load(path, &overrides)
    }
}

impl SetArgs {
    /// With the environment.
    pub fn overrides(&self) -> dinolab_core::recipe::Overrides {
        dinolab_core::recipe::Overrides { sets: self.sets.clone(), env: true }
    }
}

/// Runs the program: 0, [`BAD_INPUT`], [`RESUMABLE`], 130 after a signal that nothing could be saved for, or 1 for any
/// other failure.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        // Help and version are no errors.
        Err(text) => {
            let code = if text.use_stderr() { ExitCode::from(BAD_INPUT) } else { ExitCode::SUCCESS };
            let written = text.print().and_then(|()| std::io::Write::flush(&mut std::io::stdout()));
            let full = written.is_err_and(|e| e.kind() != std::io::ErrorKind::BrokenPipe);
            return if full { ExitCode::FAILURE } else { code };
        }
    };
    keep_freed_memory();
    let run = || {
        let launch = Launch::detect()?;
        if let Some(launch) = launch.filter(|_| !cli.command.shares_steps()) {
            let problem = format!(
                "{} started {} processes of a command that is one process's work",
                launch.launcher, launch.world
            );
            let help =
                "start it without a launcher, or set DINOLAB_RANKS=1 to have as many that know nothing of each other";
            return if launch.rank == 0 { Err(Error::user(problem, help)) } else { Ok(ExitCode::from(BAD_INPUT)) };
        }
        cli.command.answer().map_or(Ok(()), |answer| signals::listen(answer, launch.is_some()))?;
        registry::check()?;
        ranks::asked_threads()?;
        if launch.is_none() && cli.command.computes_itself() {
            ranks::compute_here(1)?;
        }
        cli.command.run()
    };
    let ended = catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(unwound);
    style::exit_code(ended.unwrap_or_else(|error| {
        style::error(&error);
        crate::of_another_program(&error).into_iter().for_each(style::note);
        ExitCode::from(exit_code(&error))
    }))
}

/// Has the allocator keep what is freed for the next image or tensor of that size: given back to the system, every buffer is
/// mapped and zeroed page by page again, which was a quarter of the loader threads' time.
fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: both only set numbers of the allocator, which are documented for any moment.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 512 << 20);
    }
}

/// Nothing ends without a word: what unwound is an error of the device, thrown from where no error can be returned, or a
/// panic, whose message was printed.
fn unwound(payload: Box<dyn Any + Send>) -> Result<ExitCode> {
    match payload.downcast::<Error>() {
        Ok(error) => Err(*error),
        Err(_) => {
            style::line("this is a defect of dinolab or of a plugin: please report it with the lines above");
            Ok(ExitCode::from(PANIC))
        }
    }
}

/// [`BAD_INPUT`] if it was what the user gave, or 1.
pub fn exit_code(error: &Error) -> u8 {
    match error {
        Error::Run { error, .. } => exit_code(error),
        Error::Recipe(_) | Error::User { .. } | Error::Content { .. } | Error::Io { action: "read", .. } => BAD_INPUT,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_that_unwound_is_an_error_like_any_other_and_a_panic_is_a_defect() {
        let thrown = || std::panic::resume_unwind(Box::new(Error::user("the device is lost", "restart it")));
        let ended = unwound(catch_unwind(thrown).map(|(): ()| ()).unwrap_err());
        assert_eq!(exit_code(&ended.unwrap_err()), BAD_INPUT);
        assert_eq!(unwound(Box::new("an invariant is broken")).unwrap(), ExitCode::from(PANIC));
    }
}
