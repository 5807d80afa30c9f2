//! What a file is, by its first bytes: one of the formats that are read, or what to call it.

use image::ImageFormat;

use super::Refusal;

/// What is not read.
const NONE: &str = "neither JPEG, PNG, WebP, TIFF, BMP nor GIF";

/// Beginnings of files that are found under the name of an image, and what they are.
const KNOWN: [(&[u8], &str); 23] = [
    (b"II\xbc", "a JPEG XR"),
    (b"\xff\x0a", "a JPEG XL"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000"),
    (b"\xff\xd8\xff\xf7", "a JPEG-LS"),
    (b"8BPS", "a Photoshop document"),
    (b"\0\0\x01\0", "an icon"),
    (b"DDS ", "a DDS texture"),
    (b"qoif", "a QOI"),
    (b"v/1\x01", "an OpenEXR"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"%PDF", "a PDF"),
    (b"%!PS", "a PostScript document"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"PK\x05\x06", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\xfd7zXZ", "an xz archive"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"Rar!", "a RAR archive"),
    (b"\0\x05\x16\x07", "data that macOS keeps beside a file, not the file"),
];

/// Whether a file is an array of NumPy.
pub(super) fn is_array(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\x93NUMPY")
}

/// The format of a file, by its first bytes.
///
/// # Errors
/// What it is, if none that is read.
pub(super) fn format(bytes: &[u8]) -> Result<ImageFormat, Refusal> {
    match bytes {
        [] => Err("the file is empty".into()),
        [0xff, 0xd8, 0xff, next, ..] if *next != 0xf7 => Ok(ImageFormat::Jpeg),
        [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1a, b'\n', ..] => Ok(ImageFormat::Png),
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => Ok(ImageFormat::WebP),
        [b'G', b'I', b'F', b'8', b'7' | b'9', b'a', ..] => Ok(ImageFormat::Gif),
        [b'I', b'I', b'*' | b'+', 0, ..] | [b'M', b'M', 0, b'*' | b'+', ..] => Ok(ImageFormat::Tiff),
        // Two letters alone may begin a text; the four bytes here are zero in every BMP.
        [b'B', b'M', _, _, _, _, 0, 0, 0, 0, ..] => Ok(ImageFormat::Bmp),
        _ => Err(named(bytes)),
    }
}

fn named(bytes: &[u8]) -> Refusal {
    let again = |problem: &str, help| Refusal { problem: format!("{problem}, not the image"), help };
    if bytes.iter().all(|&b| b == 0) {
        let help = "copy or download it again, or remove it";
        return Refusal { problem: "it holds zeros only: a copy that never ended".into(), help };
    }
    if bytes.starts_with(b"version https://git-lfs") {
        return again("this is a pointer of Git LFS", "get the files themselves with `git lfs pull`");
    }
    let text = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes).trim_ascii_start();
    let lower = String::from_utf8_lossy(&text[..text.len().min(super::HEAD)]).to_ascii_lowercase();
    if lower.starts_with("<!doctype html") || lower.starts_with("<html") || lower.contains("<head") {
        return again("this is a web page", "its download failed: get the file again, or remove it");
    }
    if lower.contains("<svg") {
        return Refusal::unsupported(format!("this is an SVG, {NONE}"));
    }
    if lower.starts_with("<?xml") || lower.starts_with('{') {
        return again("this is the answer of a server", "its download failed: get the file again, or remove it");
    }
    let known = KNOWN.iter().find(|(start, _)| bytes.starts_with(start)).map(|(_, name)| *name);
    match known.or_else(|| boxed(bytes)).or_else(|| archive(bytes)).or_else(|| plain(bytes)) {
        Some(name) => Refusal::unsupported(format!("this is {name}, {NONE}")),
        None => format!("the content is {NONE}").into(),
    }
}

/// Files of the ISO family say what they are in their first box.
fn boxed(bytes: &[u8]) -> Option<&'static str> {
    let brand = bytes.get(8..12).filter(|_| bytes.get(4..8) == Some(b"ftyp"))?;
    Some(match brand {
        b"avif" | b"avis" => "an AVIF",
        b"heic" | b"heix" | b"hevc" | b"heim" | b"heis" | b"mif1" | b"msf1" => "a HEIC",
        b"crx " => "the raw data of a camera",
        _ => "a video",
    })
}

fn archive(bytes: &[u8]) -> Option<&'static str> {
    (bytes.get(257..262) == Some(b"ustar")).then_some("a tar archive")
}

fn plain(bytes: &[u8]) -> Option<&'static str> {
    let text = |&b: &u8| b.is_ascii_graphic() || b.is_ascii_whitespace() || b >= 0x80;
    bytes.iter().all(text).then_some("text")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_image_is_named_as_what_it_is() {
        let cases: [(&[u8], &str); 14] = [
            (b"", "empty"),
            (&[0; 300], "zeros only"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"),
            (b"<!DOCTYPE html><html>", "web page"),
            (b"\n\n<HTML><body>", "web page"),
            (b"<?xml version=\"1.0\"?><Error><Code>AccessDenied", "server"),
            (b"{\"error\": 403}", "server"),
            (b"PK\x03\x04....", "ZIP"),
            (b"BMI is a measure", "text, neither JPEG"),
            (b"\0\0\0\x1cftypavif", "AVIF"),
            (b"\0\0\0\x18ftypheic", "HEIC"),
            (b"\xff\x0a\xfa\x7f", "JPEG XL"),
            (b"hello, I am text", "text, neither JPEG"),
            (b"\x01\x02\x03\x04", "neither JPEG"),
        ];
        for (bytes, said) in cases {
            let refusal = format(bytes).unwrap_err();
            assert!(refusal.problem.contains(said), "{bytes:?}: {refusal:?}");
        }
    }
}
