//! What the decoder of WebP leaves open: whether the file is as long as it says.

use super::Refusal;

/// The EXIF data of a WebP.
///
/// # Errors
/// If the file, or a chunk in it, is longer than what there is.
pub(super) fn exif(bytes: &[u8]) -> Result<Option<Vec<u8>>, Refusal> {
    let cut = "the file is cut short";
    let length = |at: usize| {
        let bytes: [u8; 4] = bytes.get(at..at + 4).ok_or(cut)?.try_into().expect("it is four bytes");
        Ok::<usize, &str>(u32::from_le_bytes(bytes) as usize)
    };
    let end = length(4)? + 8;
    if end > bytes.len() {
        return Err(cut.into());
    }
    let (mut at, mut exif) = (12, None);
    while at + 8 <= end {
        let size = length(at + 4)?;
        let body =
            bytes[..end].get(at + 8..at + 8 + size).ok_or("a part of it is longer than the file: it is damaged")?;
        if &bytes[at..at + 4] == b"EXIF" {
            // Some programs write the header that JPEG has before it.
            exif = Some(body.strip_prefix(b"Exif\0\0").unwrap_or(body).to_vec());
        }
        at += 8 + size + size % 2;
    }
    Ok(exif)
}
