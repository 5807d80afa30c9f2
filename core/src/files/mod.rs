//! Files: those that others wrote (what a file really is, and readers that believe nothing before it was checked), and our own, whole
//! or not there.

mod atomic;
mod json;
mod mapped;
mod really;
mod split;
mod tensors;

pub use atomic::{hash_file, remove_unfinished, write_file};
pub use json::twice;
pub use mapped::{RawTensor, TensorFiles};
pub use really::Really;
pub use split::{index_name, split, split_name, write_index};
pub use tensors::{parse_safetensors, read_tensors, write_pieces, write_tensors, NamedTensors};

pub(crate) use atomic::{hash_files, hash_of_hashes, new_folder, sync_dir, BUILDING};
pub(crate) use mapped::floats;
pub(crate) use split::is_split_name;

use tensors::to_tensor;
