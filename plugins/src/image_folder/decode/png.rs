//! What the decoder of PNG leaves open: chunks that it passes over when they are damaged, and the end of the file.

use super::Refusal;

/// The EXIF data of a PNG, wherever in the file it is.
///
/// # Errors
/// If the file ends before its end, or a chunk is damaged.
pub(super) fn exif(bytes: &[u8]) -> Result<Option<Vec<u8>>, Refusal> {
    let (mut at, mut exif) = (8, None);
    loop {
        let head = bytes.get(at..at + 8).ok_or("the file is cut short")?;
        let length = u32::from_be_bytes(head[..4].try_into().expect("it is four bytes")) as usize;
        let chunk = bytes.get(at + 4..at + 12 + length).ok_or("the file is cut short")?;
        let (content, sum) = chunk.split_at(4 + length);
        let name = &content[..4];
        // A name or a sum that is wrong may hide transparency, or how the picture is turned. The decoder sees to IDAT.
        let sound = name.iter().all(u8::is_ascii_alphabetic)
            && (name == b"IDAT" || crc32fast::hash(content).to_be_bytes() == sum);
        match name {
            _ if !sound => return Err("the name or the check sum of a chunk is wrong: the file is damaged".into()),
            b"IEND" => return Ok(exif),
            b"eXIf" => exif = Some(content[4..].to_vec()),
            _ => {}
        }
        at += 12 + length;
    }
}

/// Whether the pixels of a PNG are numbers of a palette's colours.
pub(super) fn is_palette(bytes: &[u8]) -> bool {
    // The type of colour in the first chunk, IHDR.
    bytes.get(25) == Some(&3)
}
