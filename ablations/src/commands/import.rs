//! `dinolab import`: published weights as a weights folder.

use std::path::PathBuf;
use std::process::ExitCode;

use dinolab_core::Result;
use dinolab_plugins::published;

use crate::style;

/// What it is given.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// model.safetensors, model.safetensors.index.json, the folder with either (a download, or a model of Hugging Face's
    /// cache), or a reference's state dict, as PyTorch wrote it (.pth) or as safetensors
    file: PathBuf,
    /// The folder to make
    #[arg(long)]
    out: PathBuf,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<ExitCode> {
    let imported = published::import(&args.file, &args.out)?;
    style::say(&imported.title);
    let millions = imported.numbers as f64 / 1e6;
    let dtypes = imported.dtypes.iter().map(|dtype| format!("{dtype:?}")).collect::<Vec<_>>().join(" and ");
    style::say(&format!("{} tensors, {millions:.1} million numbers of type {dtypes}", imported.tensors));
    imported.notes.iter().for_each(|note| style::say(&format!("note: {note}")));
    style::say(&format!("train from them with --set backbone.weights={}", args.out.display()));
    Ok(ExitCode::SUCCESS)
}
