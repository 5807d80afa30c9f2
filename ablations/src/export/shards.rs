//! Weights in one file, or split as Hugging Face splits them.

use std::collections::BTreeMap;
use std::path::Path;

use dinolab_core::files::{write_file, write_pieces};
use dinolab_core::weights::convert::Piece;
use dinolab_core::weights::MODEL_FILE;
use dinolab_core::Result;
use safetensors::tensor::View;
use serde_json::json;

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
    let bytes = |piece: &Piece<'_>| piece.data_len() as u64;
    let total: u64 = pieces.iter().map(|(_, piece)| bytes(piece)).sum();
    let Some(most) = most.filter(|most| total > *most) else {
        return write_pieces(&folder.join(MODEL_FILE), pieces, metadata);
    };
    let mut shards: Vec<Vec<(String, Piece<'_>)>> = Vec::new();
    let mut filled = 0;
    for (name, piece) in pieces {
        if shards.is_empty() || filled + bytes(&piece) > most {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += bytes(&piece);
        shards.last_mut().expect("one was just added").push((name, piece));
    }
    let (count, mut weight_map) = (shards.len(), BTreeMap::new());
    for (i, shard) in shards.into_iter().enumerate() {
        let file = format!("model-{:05}-of-{count:05}.safetensors", i + 1);
        weight_map.extend(shard.iter().map(|(name, _)| (name.clone(), file.clone())));
        write_pieces(&folder.join(file), shard, metadata)?;
    }
    let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
    let text = serde_json::to_string_pretty(&index).expect("plain data") + "\n";
    write_file(&folder.join("model.safetensors.index.json"), text.as_bytes())
}
