//! What the decoder of TIFF leaves open: compressions whose decoders fill what is missing, and where the data lie.

use std::io::Cursor;

use tiff::decoder::Decoder;
use tiff::tags::{CompressionMethod, Tag};

use super::Refusal;

/// Fails if the first picture of a TIFF is compressed in a way that cannot be checked, or its data lie beyond the end.
pub(super) fn check(bytes: &[u8]) -> Result<(), Refusal> {
    let mut decoder = Decoder::new(Cursor::new(bytes)).map_err(|e| e.to_string())?;
    let compression = decoder.find_tag_unsigned(Tag::Compression).map_err(|e| e.to_string())?.unwrap_or(1);
    let method = CompressionMethod::from_u16(compression);
    use CompressionMethod::{Deflate, None as Plain, OldDeflate, PackBits, LZW};
    if !matches!(method, Some(Plain | LZW | Deflate | OldDeflate | PackBits)) {
        let name = method.map_or_else(|| format!("number {compression}"), |method| format!("{method:?}"));
        let help = "save it anew with LZW or Deflate, such as `magick old.tif -compress zip new.tif`";
        return Err(Refusal { problem: format!("it is a TIFF in the compression {name}, which is not read"), help });
    }
    let mut numbers = |tag| decoder.find_tag_unsigned_vec::<u64>(tag).map_err(|e| e.to_string());
    for (offsets, counts) in [(Tag::StripOffsets, Tag::StripByteCounts), (Tag::TileOffsets, Tag::TileByteCounts)] {
        let (Some(offsets), Some(counts)) = (numbers(offsets)?, numbers(counts)?) else { continue };
        let end = offsets.iter().zip(&counts).map(|(at, count)| at.saturating_add(*count)).max().unwrap_or(0);
        if end > bytes.len() as u64 {
            return Err("the file is cut short".into());
        }
    }
    Ok(())
}
