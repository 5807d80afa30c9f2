//! Weights by themselves: files of named tensors, and what model they are of.
//!
//! ```text
//! <weights folder>/
//!   weights.toml        the model as a recipe says it: [backbone], and in [crops] what pixels it was trained on
//!   model.safetensors   backbone.<name>, and <loss>_head.<name> where they come from a run
//! ```
//!
//! What lies at a path that was named for weights is said in one place, [`Source`].
//!
//! Published files are memory-mapped ([`TensorFiles`]) and rewritten tensor by tensor ([`convert`]), so that the size of
//! a model is not limited by the memory of the machine that converts it.

pub mod convert;
mod files;
mod folder;
mod json;
mod of_recipe;
mod places;
mod pytorch;
mod source;

pub use crate::checkpoint::MODEL_FILE;
pub use crate::files::{RawTensor, TensorFiles};
pub use folder::{check_free, write_folder, ModelInfo, Preprocessing, WEIGHTS_FILE};
pub use json::JsonTable;
pub use source::Source;
pub(crate) use source::{check_same_model, run_at_step};

use folder::differences;
pub(crate) use of_recipe::{to_continue, with_model_of_weights};
