//! What a folder of features holds, so that a command that was stopped goes on with what is missing.
//!
//! ```text
//! features.json    the weights and options that everything in the folder was made with
//! done.jsonl       one line an image whose files are all written
//! ```

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use dinolab_core::files::{hash_file, write_file};
use dinolab_core::text::printable;
use dinolab_core::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

const MADE_WITH: &str = "features.json";
const DONE: &str = "done.jsonl";

/// An image whose files are all written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Done {
    /// Its path, as it can be printed.
    image: String,
    /// Length of its file in bytes, and its hash: another one is another image.
    bytes: u64,
    #[serde(default)]
    hash: Option<String>,
    /// Where its files are, below the folder.
    name: String,
}

/// The images of a folder that are done.
#[derive(Debug)]
pub struct Record {
    done: BTreeMap<String, Done>,
    file: File,
    path: PathBuf,
}

impl Record {
    /// Makes the folder, or opens one that was made with the same weights and options.
    ///
    /// # Errors
    /// If the folder holds anything else.
    pub fn open(folder: &Path, made_with: &Map<String, Value>) -> Result<Self> {
        fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        let (about, path) = (folder.join(MADE_WITH), folder.join(DONE));
        let other = "name another with --out, or remove it";
        match fs::read_to_string(&about) {
            Ok(text) => {
                let before: Map<String, Value> = serde_json::from_str(&text)
                    .map_err(|e| Error::content(&about, format!("it cannot be understood: {e}"), other))?;
                let changed: Vec<String> = made_with
                    .iter()
                    .filter(|(key, now)| before.get(*key) != Some(*now))
                    .map(|(key, now)| format!("{key} = {}, now {now}", before.get(key).unwrap_or(&Value::Null)))
                    .collect();
                if !changed.is_empty() {
                    let problem = format!("it holds features that were made otherwise: {}", changed.join("; "));
                    return Err(Error::content(folder, problem, other));
                }
            }
            Err(_) => {
                if fs::read_dir(folder).map_err(Error::io("list", folder))?.next().is_some() {
                    return Err(Error::content(folder, "this folder is not empty", other));
                }
                let text = serde_json::to_string_pretty(made_with).expect("plain data");
                write_file(&about, text.as_bytes())?;
            }
        }
        let text = fs::read(&path).unwrap_or_default();
        let lines = text.split_inclusive(|&b| b == b'\n');
        // A line that was being written when the program was killed is none.
        let whole: Vec<Done> =
            lines.filter_map(|line| serde_json::from_slice(line.strip_suffix(b"\n")?).ok()).collect();
        let done = whole.into_iter().map(|done| (done.image.clone(), done)).collect();
        let mut file = OpenOptions::new().create(true).append(true).open(&path).map_err(Error::io("open", &path))?;
        if text.last().is_some_and(|&b| b != b'\n') {
            file.write_all(b"\n").map_err(Error::io("write", &path))?;
        }
        Ok(Self { done, file, path })
    }

    /// Where the files of an image are, if it was done or begun before.
    pub fn name(&self, image: &Path) -> Option<&str> {
        self.done.get(&printable(image)).map(|done| done.name.as_str())
    }

    /// Whether all files of an image are written.
    pub fn has(&self, image: &Path) -> bool {
        let Some(done) = self.done.get(&printable(image)) else { return false };
        let length = fs::metadata(image).map(|found| found.len()).ok();
        Some(done.bytes) == length && (done.hash.is_none() || done.hash == hash_file(image).ok())
    }

    /// Notes that all files of an image are written.
    ///
    /// # Errors
    /// If the record cannot be written.
    pub fn add(&mut self, image: &Path, name: &str) -> Result<()> {
        let bytes = fs::metadata(image).map_or(0, |found| found.len());
        let done = Done { image: printable(image), bytes, hash: hash_file(image).ok(), name: name.into() };
        let line = serde_json::to_string(&done).expect("plain data") + "\n";
        self.file.write_all(line.as_bytes()).map_err(Error::io("write", &self.path))?;
        self.done.insert(done.image.clone(), done);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_picture_of_the_same_length_is_not_done() {
        let folder = tempfile::tempdir().unwrap();
        let (image, out) = (folder.path().join("a.bmp"), folder.path().join("out"));
        fs::write(&image, [1u8; 9]).unwrap();
        let mut record = Record::open(&out, &Map::new()).unwrap();
        assert!(!record.has(&image));
        record.add(&image, "a").unwrap();
        assert!(record.has(&image) && Record::open(&out, &Map::new()).unwrap().has(&image));
        fs::write(&image, [2u8; 9]).unwrap();
        assert!(!record.has(&image));
    }
}
