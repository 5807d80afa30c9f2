//! `dinolab stages`: runs that go on from each other, from one file.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use dinolab_core::recipe::parse_set;
use dinolab_core::text::printable;
use dinolab_core::{Error, Result};

use super::prepared::prepare;
use crate::cli::{DeviceArgs, RESUMABLE};
use crate::stages::{execute, plan, write, Stages};
use crate::suite::{says, Overrides, Progress, Status};
use crate::{signals, style};

/// Runs stages that go on from each other: pretraining, Gram anchoring, high resolution.
///
/// Run it again to continue: finished stages are kept, an interrupted one goes on from its checkpoint. At the end there is a
/// report with the graph of what came from what.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The stages, such as recipes/stages/three_stages.toml
    file: PathBuf,
    /// The folder that contains the folder of each stage; default: runs/ and the `name` of the file
    #[arg(long)]
    out: Option<PathBuf>,
    /// Change the recipes of all stages, where a stage does not say otherwise
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    #[command(flatten)]
    device: DeviceArgs,
    /// Show the stages and how far they are, and run nothing
    #[arg(long)]
    dry_run: bool,
}

/// Runs the command.
///
/// # Errors
/// If the file or a recipe is wrong, or a run fails.
pub fn run(args: &Args) -> Result<ExitCode> {
    let stages = Stages::load(&args.file)?;
    let out = args.out.clone().unwrap_or_else(|| Path::new("runs").join(&stages.name));
    let sets = args.set.iter().cloned().chain(args.device.sets());
    let extra = sets.map(|text| parse_set(&text)).collect::<Result<Overrides>>()?;
    let prepare = |base: &Path, overrides: &Overrides| prepare(&args.file, base, overrides);
    let planned = plan(&stages, &out, &extra, &prepare)?;
    for key in extra.keys() {
        let sets = stages.stages.iter().filter(|stage| says(&stage.set, key));
        let names: Vec<&str> = sets.map(|stage| stage.name.as_str()).collect();
        if !names.is_empty() {
            style::warn(format!("--set {key} changes nothing in {}: the chain sets it there", names.join(", ")));
        }
    }
    let mut done = 0;
    let mut rows = Vec::new();
    for stage in &planned {
        let status = Status::of(&stage.dir)?;
        done += usize::from(matches!(status, Status::Finished(_)));
        let from = stage.stage.parents.iter().map(|(key, parent)| format!("{key} = {parent}"));
        let steps = stage.steps();
        let state = match &status {
            Status::Finished(result) if result.steps < steps && result.stopped.is_none() => {
                format!("at step {}", result.steps)
            }
            status => status.word().into(),
        };
        let from = from.collect::<Vec<_>>().join(", ");
        rows.push(vec![stage.stage.name.clone(), state, format!("to step {steps}"), from]);
    }
    if args.dry_run {
        style::print(&style::table(rows));
        return Ok(ExitCode::SUCCESS);
    }
    let progress = Progress::new(&stages.name, planned.len(), done);
    // From now on the folder is theirs.
    std::fs::create_dir_all(&out).map_err(Error::io("create", &out))?;
    write(&stages, &planned, &out)?;
    if let Some((stage, step)) = execute(&planned, &signals::stop_flag(), &progress)? {
        style::say(&format!("stopped in stage {stage}, step {step}, saved; go on with the same command"));
        return Ok(ExitCode::from(RESUMABLE));
    }
    let report = write(&stages, &planned, &out)?;
    style::say(&format!("all {} stages are done; report: {}", planned.len(), printable(&report)));
    Ok(ExitCode::SUCCESS)
}
