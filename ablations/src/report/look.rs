//! What a trained run sees in held-out images: the features behind a report's pictures.

use std::path::Path;

use dinolab_core::{Device, Result};

use crate::features::Held;
use crate::pictures::PatchView;

/// The patch features that the EMA teacher of the run in `run` gives for the same few held-out images every time: on a device,
/// or else on a GPU when there is one.
///
/// # Errors
/// If the run has no checkpoint, or an image cannot be read.
pub fn look(run: &Path, device: Option<Device>) -> Result<Vec<PatchView>> {
    Ok(Held::of(run)?.see_with(run, device)?.into_iter().map(|seen| seen.view).collect())
}
