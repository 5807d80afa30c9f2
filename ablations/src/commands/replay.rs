//! `dinolab replay`: runs a captured step again.

use std::path::PathBuf;
use std::process::ExitCode;

use dinolab_core::recipe::Overrides;
use dinolab_core::{train, Result};

use crate::cli::DeviceArgs;

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
    let (recipe, step, report) =
        train::replay(&args.file, &Overrides { sets: args.device.sets().collect(), env: false })?;
    println!("step {step} of `{}`", recipe.name);
    for (name, value) in &report.losses {
        println!("  {name:<30} {value}");
    }
    for (module, norm) in &report.grad_norms {
        println!("  {:<30} {norm}", format!("grad_norm/{module}"));
    }
    match report.non_finite {
        Some(what) => {
            println!("not finite: {what}");
            Ok(ExitCode::FAILURE)
        }
        None => {
            println!("everything is finite: the failure does not reproduce with this program");
            Ok(ExitCode::SUCCESS)
        }
    }
}
