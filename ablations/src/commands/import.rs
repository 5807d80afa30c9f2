//! `dinolab import`: published weights as a weights folder.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use dinolab_core::weights::PICKLES;
use dinolab_core::{Error, Result};
use dinolab_plugins::published;

use crate::style;

/// What it is given.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// model.safetensors, model.safetensors.index.json, the folder with either (a download, or a model of Hugging Face's
    /// cache), or a reference's state dict as safetensors
    file: PathBuf,
    /// The folder to make
    #[arg(long)]
    out: PathBuf,
}

/// The script that makes safetensors of a PyTorch file.
const CONVERT: &str = include_str!("pth_to_safetensors.py");

/// Runs the command.
pub fn run(args: &Args) -> Result<ExitCode> {
    refuse_pickle(&args.file)?;
    let imported = published::import(&args.file, &args.out)?;
    style::say(&imported.title);
    let millions = imported.numbers as f64 / 1e6;
    let dtypes = imported.dtypes.iter().map(|dtype| format!("{dtype:?}")).collect::<Vec<_>>().join(" and ");
    style::say(&format!("{} tensors, {millions:.1} million numbers of type {dtypes}", imported.tensors));
    imported.notes.iter().for_each(|note| style::say(&format!("note: {note}")));
    style::say(&format!("train from them with --set backbone.weights={}", args.out.display()));
    Ok(ExitCode::SUCCESS)
}

/// A PyTorch file is a program for the pickle machine, which dinolab does not run: says how to convert it.
fn refuse_pickle(file: &Path) -> Result<()> {
    let is_pickle = file.extension().is_some_and(|e| PICKLES.iter().any(|known| e == *known));
    if !is_pickle {
        return Ok(());
    }
    let problem = "a PyTorch file is read by running it, which dinolab does not do";
    let help = format!(
        "convert it with PyTorch, which can check that it holds tensors only, and import the result:\n\n{CONVERT}"
    );
    Err(Error::content(file, problem, help))
}
