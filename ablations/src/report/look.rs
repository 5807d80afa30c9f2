//! What a trained run sees in held-out images: the features behind a report's pictures.

use std::path::Path;

use dinolab_core::Result;

use crate::features::Held;
use crate::pictures::PatchView;

/// The patch features that the EMA teacher of the run in `run` gives for the same few held-out images every time.
///
/// # Errors
/// If the run has no checkpoint, or an image cannot be read.
pub fn look(run: &Path) -> Result<Vec<PatchView>> {
    Ok(Held::of(run)?.see_with(run)?.into_iter().map(|seen| seen.view).collect())
}
