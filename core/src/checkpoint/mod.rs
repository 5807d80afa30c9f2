//! Checkpoints: a folder of safetensors files that is either whole or not there.
//!
//! ```text
//! checkpoints/step-00000300/
//!   model.safetensors      student.<name>, teacher.<name>, <teacher>_teacher.<name>: opens in any tool
//!   optimizer.safetensors  <moment>.<name>, such as exp_avg.<name>, and state.<loss>.<name>
//!   recipe.toml            the run's recipe, so that a checkpoint that is copied elsewhere says what model it is of
//!   state.json             step, and the BLAKE3 hash of each file
//! ```
//!
//! Tensors that are too many for one file are split as Hugging Face splits them: `model-00001-of-00003.safetensors` and so on, with
//! `model.safetensors.index.json`. What is in which file depends on the model alone. Of several ranks each writes some of them.
//!
//! Everything is written to a temporary folder, flushed to the disk and renamed, so that a kill at any moment leaves
//! the old checkpoints, or those and a whole new one. A file whose hash does not fit is refused by name.

mod list;
mod read;
mod write;

pub use list::{clear, list, newest_step, prune, steps, Keep};
pub(crate) use list::{run_of, step_at};
pub use read::{load, load_newest, load_newest_before, model_bytes, Checkpoint};
pub(crate) use read::{model, open, recipe_file, set_of, verify};
pub(crate) use write::is_split;
pub use write::{save, write, Content, Give, Saved, Saving, Written};

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The version of the format written here.
const FORMAT: u32 = 1;

/// The folder of checkpoints inside a run folder.
pub const FOLDER: &str = "checkpoints";

/// Weights, in a checkpoint and elsewhere.
pub const MODEL_FILE: &str = "model.safetensors";

/// The file that makes a folder a checkpoint.
pub const STATE_FILE: &str = "state.json";

/// The recipe of a run, in its folder and in its checkpoints.
pub const RECIPE_FILE: &str = "recipe.toml";

/// What [`STATE_FILE`] says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    format: u32,
    dinolab: String,
    step: u64,
    skipped: u64,
    /// BLAKE3 of every other file.
    files: BTreeMap<String, String>,
}

/// Tensors of a checkpoint that are in files of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Set {
    /// Weights by role and name.
    Model,
    /// The rest of what a run needs to go on: moments and the losses' state.
    Optimizer,
}

impl Set {
    const ALL: [Self; 2] = [Self::Model, Self::Optimizer];

    /// What the names of its files begin with.
    fn stem(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Optimizer => "optimizer",
        }
    }

    /// One key a file: the library writes several in any order, and a checkpoint's bytes are those of any run like it.
    fn metadata(self, step: u64, skipped: u64) -> (&'static str, String) {
        match self {
            Self::Model => ("step", step.to_string()),
            Self::Optimizer => ("skipped", skipped.to_string()),
        }
    }
}

/// What the first line of a checkpoint's recipe begins with; the BLAKE3 hash of the rest follows. It is not in
/// [`STATE_FILE`], which is the same under other keys that change no number.
const SEAL: &str = "# blake3 of what follows: ";

/// A small checkpoint.
#[cfg(test)]
fn content(step: u64) -> Content {
    use crate::Tensor;
    let weight = Tensor::from_slice(&[step as f32, 2.0, 3.0], &[3]).unwrap();
    let moment = Tensor::from_slice(&[0.5f32; 3], &[3]).unwrap();
    Content {
        step,
        skipped: 0,
        model: vec![("student.w".into(), weight)],
        optimizer: vec![("exp_avg.w".into(), moment)],
    }
}
