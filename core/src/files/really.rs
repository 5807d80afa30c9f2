//! What a file really is, whatever its name says: downloads leave error pages, pointers and archives under right names.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::Error;

/// Bytes at a file's beginning that tell what it is: a tar archive says so last, at byte 257.
const HEAD: usize = 512;

/// What a file is that is not what its name promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Really {
    /// What it is, with its article: "a Git LFS pointer, not the file itself".
    pub what: &'static str,
    /// What to do about it.
    pub help: &'static str,
}

const fn really(what: &'static str, help: &'static str) -> Really {
    Really { what, help }
}

const AGAIN: &str = "download or copy it again";
const UNPACK: &str = "unpack it and name what is inside";
const NAMED_SO: &str = "it has a wrong name: name another file";
const CONVERT_PICTURE: &str = "convert it to PNG, JPEG or WebP";

const EMPTY: Really = really("empty (0 bytes)", AGAIN);
const ZEROS: Really = really("nothing but zero bytes, as an unfinished download or a damaged disk leaves", AGAIN);
const LFS: Really =
    really("a Git LFS pointer, not the file itself", "fetch the file with `git lfs pull`, or download it by itself");
const ANNEX: Really = really("a git-annex pointer, not the file itself", "fetch the file with `git annex get`");
const HTML: Really = really(
    "an HTML page, such as a server sends in place of a file that it refuses or does not have",
    "download it again, logged in if the site asks for it",
);
const XML: Really = really(
    "an XML text, such as a server sends in place of a file that it refuses or does not have",
    "ask for a new address and download it again",
);
const JSON: Really = really("a JSON text, such as a server sends in place of a file that it refuses", AGAIN);
const TEXT: Really = really("a text", NAMED_SO);
const TAR: Really = really("a tar archive", UNPACK);
const ZIP: Really = really(
    "a zip archive, as PyTorch's .pth files are",
    "unpack it; if it is PyTorch's, let its name end in .pth and import it",
);
const PICKLE: Really = really("a Python pickle, as old PyTorch files are", "let its name end in .pth and import it");

/// First bytes, and what begins with them.
const MAGIC: [(&[u8], Really); 27] = [
    (b"version https://git-lfs", LFS),
    (b"/annex/objects/", ANNEX),
    (b"PK\x03\x04", ZIP),
    (b"PK\x05\x06", really("an empty zip archive", AGAIN)),
    (b"\x1f\x8b", really("compressed with gzip", UNPACK)),
    (b"\x28\xb5\x2f\xfd", really("compressed with zstd", UNPACK)),
    (b"\xfd7zXZ\0", really("compressed with xz", UNPACK)),
    (b"BZh", really("compressed with bzip2", UNPACK)),
    (b"7z\xbc\xaf\x27\x1c", really("a 7-Zip archive", UNPACK)),
    (b"\x89HDF\r\n\x1a\n", really("an HDF5 file, as Keras writes", NAMED_SO)),
    (b"\x93NUMPY", really("a NumPy array", NAMED_SO)),
    (b"GGUF", really("a GGUF file", NAMED_SO)),
    (b"%PDF", really("a PDF document", NAMED_SO)),
    (b"\x7fELF", really("a program", NAMED_SO)),
    (b"\x00\x05\x16\x07", really("an AppleDouble file, which macOS makes beside another file", "delete it")),
    (b"\x89PNG\r\n\x1a\n", really("a PNG picture", NAMED_SO)),
    (b"\xff\xd8\xff", really("a JPEG picture", NAMED_SO)),
    (b"GIF8", really("a GIF picture", CONVERT_PICTURE)),
    (b"BM", really("a BMP picture", CONVERT_PICTURE)),
    (b"II*\0", really("a TIFF picture", CONVERT_PICTURE)),
    (b"MM\0*", really("a TIFF picture", CONVERT_PICTURE)),
    (b"\xff\x0a", really("a JPEG XL picture", CONVERT_PICTURE)),
    (b"\0\0\0\x0cJXL ", really("a JPEG XL picture", CONVERT_PICTURE)),
    (b"\0\0\0\x0cjP  ", really("a JPEG 2000 picture", CONVERT_PICTURE)),
    (b"8BPS", really("a Photoshop document", CONVERT_PICTURE)),
    (b"\x00\x00\x01\x00", really("an icon", CONVERT_PICTURE)),
    (b"qoif", really("a QOI picture", CONVERT_PICTURE)),
];

/// Kinds of the container of HEIC, AVIF and MP4, at byte 8.
const BRANDS: [(&[u8], &str); 4] =
    [(b"heic", "a HEIC picture"), (b"mif1", "a HEIF picture"), (b"avif", "an AVIF picture"), (b"isom", "a film")];

impl Really {
    /// What begins with these bytes (the whole file, if it is shorter than 512), unless they tell nothing.
    ///
    /// ```
    /// use dinolab_core::files::Really;
    ///
    /// assert!(Really::of(b"<!DOCTYPE html><title>403</title>").unwrap().what.starts_with("an HTML page"));
    /// assert_eq!(Really::of(b"").unwrap().what, "empty (0 bytes)");
    /// assert_eq!(Really::of(b"\x50\0\0\0\0\0\0\0{\"a\":"), None);
    /// ```
    pub fn of(head: &[u8]) -> Option<Self> {
        let head = &head[..head.len().min(HEAD)];
        if head.is_empty() {
            return Some(EMPTY);
        }
        // A safetensors header of any length below 4 GiB: its first bytes may be those of anything.
        if head.get(4..9) == Some(b"\0\0\0\0{") {
            return None;
        }
        if let Some((_, found)) = MAGIC.iter().find(|(magic, _)| head.starts_with(magic) && is_it(magic, head)) {
            return Some(*found);
        }
        if head.get(4..8) == Some(b"ftyp") {
            let brand = BRANDS.iter().find(|(brand, _)| head.get(8..12) == Some(brand));
            return Some(really(brand.map_or("a film or picture of the MP4 family", |b| b.1), CONVERT_PICTURE));
        }
        if head.get(..4) == Some(b"RIFF") && head.get(8..12) == Some(b"WEBP") {
            return Some(really("a WebP picture", NAMED_SO));
        }
        if head.get(257..262) == Some(b"ustar") {
            return Some(TAR);
        }
        if let [0x80, 2..=5, ..] = head {
            return Some(PICKLE);
        }
        if head.iter().all(|&byte| byte == 0) {
            return Some(ZEROS);
        }
        text(head)
    }

    /// What lies at `path`, unless its first bytes tell nothing or it cannot be read.
    pub fn at(path: &Path) -> Option<Self> {
        let mut head = Vec::new();
        File::open(path).ok()?.take(HEAD as u64).read_to_end(&mut head).ok()?;
        Self::of(&head)
    }

    /// Whether PyTorch writes such files.
    pub(crate) fn is_pytorch(self) -> bool {
        [ZIP, PICKLE, TAR].contains(&self)
    }

    /// The error of a file that should be `expected` ("a safetensors file") and is this.
    pub fn error(self, path: &Path, expected: &str) -> Error {
        Error::content(path, format!("this is not {expected} but {}", self.what), self.help)
    }
}

/// Whether the rest fits as well, where the first bytes are few and may begin anything.
fn is_it(magic: &[u8], head: &[u8]) -> bool {
    match magic {
        // Four reserved bytes behind the file's length are zero.
        b"BM" => head.get(6..10) == Some(&[0; 4]),
        b"BZh" => head.get(4..10) == Some(b"1AY&SY"),
        b"\xff\x0a" => head.len() > 2 && head[2] != 0,
        b"\x00\x00\x01\x00" => head.get(4..6).is_some_and(|n| n != [0, 0]) && head.get(5) == Some(&0),
        _ => true,
    }
}

/// What a text is; `None` for bytes that are none.
fn text(head: &[u8]) -> Option<Really> {
    let head = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head);
    // A character may be cut at the end.
    let text = match std::str::from_utf8(head) {
        Ok(text) => text,
        Err(e) if e.error_len().is_none() && e.valid_up_to() > 0 => {
            std::str::from_utf8(&head[..e.valid_up_to()]).ok()?
        }
        Err(_) => return None,
    };
    if text.chars().any(|c| c.is_control() && !c.is_whitespace()) {
        return None;
    }
    let begin = text.trim_start().to_ascii_lowercase();
    let begins = |known: &[&str]| known.iter().any(|k| begin.starts_with(k));
    Some(match () {
        () if begins(&["<!doctype html", "<html", "<head", "<body", "<!--", "<title"]) => HTML,
        () if begins(&["<?xml", "<error"]) => XML,
        () if begins(&["{", "["]) => JSON,
        () => TEXT,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn what(head: &[u8]) -> &'static str {
        Really::of(head).map_or("unknown", |r| r.what)
    }

    #[test]
    fn what_downloads_leave_is_named() {
        let archive = [&[b'a'; 257][..], b"ustar\x0000"].concat();
        for (head, said) in [
            (&b""[..], "empty"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n", "Git LFS pointer"),
            (b"/annex/objects/SHA256E-s123--00", "git-annex pointer"),
            (b"\n <!DOCTYPE HTML PUBLIC>", "HTML page"),
            (b"\xef\xbb\xbf<html>", "HTML page"),
            (b"<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code></Error>", "XML text"),
            (b"{\"error\": \"Repository not found\"}", "JSON text"),
            (b"PK\x03\x04rest", "zip archive"),
            (b"\x80\x02}q", "pickle"),
            (b"\x1f\x8b\x08rest", "gzip"),
            (b"Entry not found", "a text"),
            (b"\0\0\0\0\0\0\0\0\0\0\0\0", "nothing but zero bytes"),
            (b"\0\0\0\x1cftypheic", "HEIC"),
            (&archive, "tar archive"),
        ] {
            assert!(what(head).contains(said), "{said}: {}", what(head));
        }
    }

    proptest! {
        /// A header's length, then its JSON: never taken for something else.
        #[test]
        fn a_safetensors_file_tells_nothing(n in prop_oneof![2u64..1 << 17, 2u64..1 << 27], rest in ".{0,64}") {
            let head = [&n.to_le_bytes()[..], b"{\"", rest.as_bytes()].concat();
            prop_assert_eq!(Really::of(&head), None);
        }

        #[test]
        fn no_bytes_are_a_panic(head in proptest::collection::vec(any::<u8>(), 0..600)) {
            Really::of(&head);
        }
    }
}
