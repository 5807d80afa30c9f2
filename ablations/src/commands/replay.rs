//! `dinolab replay`: runs a captured step again.

use std::path::PathBuf;
use std::process::ExitCode;

use dinolab_core::recipe::Overrides;
use dinolab_core::{train, Error, Result};

use crate::cli::DeviceArgs;
use crate::style;

/// What it is given.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A file of a run's captures/ folder
    file: PathBuf,
    #[command(flatten)]
    device: DeviceArgs,
}

/// Runs the command. Fails when the step fails again.
pub fn run(args: &Args) -> Result<ExitCode> {
    if args.file.is_dir() {
        let help = "name a file in the folder captures/ of the run: what was captured of a step that was not finite";
        return Err(Error::content(&args.file, "this is a folder", help));
    }
    let (recipe, step, report) =
        train::replay(&args.file, &Overrides { sets: args.device.sets().collect(), env: false })?;
    style::print(&format!("step {step} of `{}`\n", recipe.name));
    for (name, value) in &report.losses {
        style::print(&format!("  {name:<30} {value}\n"));
    }
    for (module, norm) in &report.grad_norms {
        style::print(&format!("  {:<30} {norm}\n", format!("grad_norm/{module}")));
    }
    match report.non_finite {
        Some(what) => {
            style::print(&format!("not finite: {what}\n"));
            Ok(ExitCode::FAILURE)
        }
        None => {
            style::print("everything is finite: the failure does not reproduce with this program\n");
            Ok(ExitCode::SUCCESS)
        }
    }
}
