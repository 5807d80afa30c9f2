//! `dinolab check [NAME..]`: values and gradients of operations and losses, on random cases.

use std::process::ExitCode;

use dinolab_core::testing::{check, Outcome};
use dinolab_core::{Device, Result};

use crate::style;

/// Arguments of `dinolab check`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Operations or losses, of plugins of your own too; all by default.
    names: Vec<String>,
    /// Random cases of each.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    cases: u32,
    /// Device: `cuda` also compares the kernels, in f32 and bf16, with the CPU.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Another seed draws other cases.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// Runs the command: 0 if everything holds, 1 if something does not.
pub fn run(args: &Args) -> Result<ExitCode> {
    let device: Device = args.device.parse()?;
    // A panic on a case is a failure of that case, reported with the others.
    std::panic::set_hook(Box::new(|_| {}));
    let outcomes = device.with(|| check(&args.names, args.cases, args.seed))?;
    style::print(&style::table(outcomes.iter().map(row)));
    let failures = outcomes.iter().filter_map(|o| Some((o, o.failure.as_ref()?)));
    let mut failed = 0;
    for (outcome, failure) in failures {
        failed += 1;
        let head = style::out().bold(&format!("\n{} {}: {}", outcome.kind, outcome.name, failure.reason));
        style::print(&format!("{head}\n"));
        if !failure.code.is_empty() {
            style::print(&format!("The smallest case that fails, as a test:\n\n{}", failure.code));
        }
    }
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn row(outcome: &Outcome) -> Vec<String> {
    let style = style::out();
    let verdict = if outcome.failure.is_none() { style.green("ok") } else { style.red("wrong") };
    let how = format!("{} cases: {}", outcome.cases, outcome.against);
    vec![style.dim(outcome.kind), style.bold(outcome.name), verdict, style.dim(&how)]
}
