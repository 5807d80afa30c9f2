//! Weights in one file, or split as Hugging Face splits them.

use std::collections::BTreeMap;
use std::path::Path;

use dinolab_core::files::{split, split_name, write_index, write_pieces};
use dinolab_core::weights::convert::Piece;
use dinolab_core::Result;
use safetensors::tensor::View;

/// What the names of files of weights begin with.
const STEM: &str = "model";

/// Writes `model.safetensors`; or, where the tensors have more than `most` bytes together, `model-00001-of-0000n.safetensors`
/// and so on, each of at most so many (a larger tensor alone), with `model.safetensors.index.json`.
///
/// # Errors
/// If a file cannot be written.
pub fn write(
    folder: &Path,
    pieces: Vec<(String, Piece<'_>)>,
    metadata: &[(&str, String)],
    most: Option<u64>,
) -> Result<()> {
    let bytes: Vec<u64> = pieces.iter().map(|(_, piece)| piece.data_len() as u64).collect();
    let files = split(&bytes, most.unwrap_or(u64::MAX));
    let (count, mut file_of, mut pieces) = (files.len(), BTreeMap::new(), pieces.into_iter());
    for (i, inside) in files.into_iter().enumerate() {
        let (file, pieces): (_, Vec<_>) = (split_name(STEM, i, count), pieces.by_ref().take(inside.len()).collect());
        file_of.extend(pieces.iter().map(|(name, _)| (name.clone(), file.clone())));
        write_pieces(&folder.join(file), pieces, metadata)?;
    }
    match count {
        1 => Ok(()),
        _ => write_index(folder, STEM, &file_of, bytes.iter().sum()),
    }
}
