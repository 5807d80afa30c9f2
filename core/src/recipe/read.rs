//! The text of a file, and why there is none.

use std::path::Path;

use crate::problem::{nearest, Problem};
use crate::{Error, Result};

/// Why a file of text cannot be read.
#[derive(Debug)]
pub enum NoText {
    /// The system says so.
    Io(std::io::Error),
    /// Its bytes are not UTF-8: what they are, and what to do.
    Encoding(&'static str, &'static str),
}

/// The text of a TOML file, without a byte order mark.
///
/// # Errors
/// If it cannot be read, or is not UTF-8.
pub fn read_text(file: &Path) -> Result<String, NoText> {
    let bytes = std::fs::read(file).map_err(NoText::Io)?;
    // Every other byte of Latin text in UTF-16 is zero.
    let wide = |first: usize| bytes.len() > 3 && bytes[first..].iter().take(16).step_by(2).all(|b| *b == 0);
    if bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) || wide(0) || wide(1) {
        return Err(NoText::Encoding("is text in UTF-16", "save it as UTF-8: TOML files are"));
    }
    let text = bytes.strip_prefix(b"\xef\xbb\xbf").map(<[u8]>::to_vec).unwrap_or(bytes);
    String::from_utf8(text)
        .map_err(|_| NoText::Encoding("is not text in UTF-8", "save it as UTF-8, if it is a TOML file at all"))
}

impl NoText {
    /// As the error of `file`.
    pub fn error(self, file: &Path) -> Error {
        match self {
            Self::Io(error) => Error::io("read", file)(error),
            Self::Encoding(what, help) => Error::content(file, what, help),
        }
    }

    /// As a problem of `file`, for which `given` was asked.
    pub fn at_path(self, given: &Path, file: &Path) -> Problem {
        match self {
            Self::Io(_) if given == file && given.join("recipe.toml").is_file() => {
                let message = format!("{} is a folder, and this has to be a file", given.display());
                Problem::error("", message).help(format!("name {}", given.join("recipe.toml").display()))
            }
            Self::Io(_) if given.is_dir() => {
                let message = format!("{} is a folder without a recipe.toml", given.display());
                Problem::error("", message).help("give a recipe, or the folder of a run")
            }
            Self::Io(error) => {
                Problem::error("", format!("cannot read {}: {error}", file.display())).help(look_alike(file))
            }
            Self::Encoding(what, help) => Problem::error("", format!("{} {what}", file.display())).help(help),
        }
    }
}

/// Names a recipe in the same folder that may have been meant.
fn look_alike(file: &Path) -> String {
    let folder = file.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|e| e.file_name().into_string().ok()).collect();
    names.retain(|n| n.ends_with(".toml"));
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    match nearest(&name, names.iter().map(String::as_str)) {
        Some(near) => format!("did you mean {}?", file.with_file_name(near).display()),
        None => format!("there are {} TOML files in {}", names.len(), folder.display()),
    }
}
