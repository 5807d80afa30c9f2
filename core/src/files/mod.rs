//! Files: those that others wrote (what a file really is, and readers that believe nothing before it was checked), and our own, whole
//! or not there.

mod atomic;
mod json;
mod really;
mod tensors;

pub use atomic::{hash_file, remove_unfinished, write_file};
pub use json::twice;
pub use really::Really;
pub use tensors::{parse_safetensors, read_tensors, write_pieces, write_tensors, NamedTensors};

pub(crate) use atomic::{new_folder, sync_dir, BUILDING};
pub(crate) use tensors::parse_tensors;
