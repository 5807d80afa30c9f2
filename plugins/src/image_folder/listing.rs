//! Which images a folder holds, and what else is in it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};

use dinolab_core::text::printable;
use dinolab_core::{Error, Result};

/// File names that count as images end in one of these.
const EXTENSIONS: [&str; 10] = ["jpg", "jpeg", "jpe", "jfif", "png", "webp", "tif", "tiff", "bmp", "gif"];
/// Folders that systems and network drives keep for themselves; others of theirs begin with a dot.
const SYSTEM: [&str; 8] = [
    "__MACOSX",
    "@eaDir",
    "#recycle",
    "#snapshot",
    "$RECYCLE.BIN",
    "System Volume Information",
    "lost+found",
    "RECYCLER",
];
/// Names that a sentence tells.
const TOLD: usize = 3;

/// Arrays, where they are images.
const ARRAY: &str = "npy";

/// Whether files with this ending, in small letters, are images; `arrays` says whether arrays are.
pub(crate) fn is_image(ending: &str, arrays: bool) -> bool {
    EXTENSIONS.contains(&ending) || (arrays && ending == ARRAY)
}

/// The images of a folder, and what was passed over.
#[derive(Debug, Default)]
pub struct Listing {
    /// The images, sorted by path.
    pub paths: Vec<PathBuf>,
    /// What was passed over and why, a sentence each.
    pub notes: Vec<String>,
}

/// The images in a folder and its sub-folders, `.npy` files among them where `arrays` are images. A folder is taken once,
/// however many links lead to it, and links are followed after everything else. What cannot be listed is noted; a link to nowhere that is named like an image is a broken
/// one.
///
/// # Errors
/// If the folder itself cannot be listed, or holds no image.
pub fn list(root: &Path, arrays: bool) -> Result<Listing> {
    fs::read_dir(root).map_err(Error::io("list", root))?;
    let mut walk = Walk { arrays, ..Walk::default() };
    walk.links.push_back(root.to_path_buf());
    while let Some(link) = walk.links.pop_front() {
        walk.folder(link);
    }
    for paths in [&mut walk.paths, &mut walk.hidden, &mut walk.special, &mut walk.twice] {
        paths.sort();
    }
    walk.unreadable.sort_by(|a, b| a.0.cmp(&b.0));
    let notes = walk.notes(root);
    if walk.paths.is_empty() {
        let seen = if notes.is_empty() { String::new() } else { format!(": {}", notes.join("; ")) };
        let help = format!("put images in it or in its sub-folders: files ending in {}", EXTENSIONS.join(", "));
        return Err(Error::content(root, format!("the folder holds no image{seen}"), help));
    }
    Ok(Listing { paths: walk.paths, notes })
}

#[derive(Default)]
struct Walk {
    /// Whether arrays are images.
    arrays: bool,
    paths: Vec<PathBuf>,
    /// Links to folders, to be followed once all real folders are known.
    links: VecDeque<PathBuf>,
    /// Real paths of the folders that were taken.
    taken: BTreeSet<PathBuf>,
    hidden: Vec<PathBuf>,
    /// Other files by the end of their name.
    others: BTreeMap<String, usize>,
    /// Pipes, sockets and devices.
    special: Vec<PathBuf>,
    twice: Vec<PathBuf>,
    unreadable: Vec<(PathBuf, std::io::Error)>,
}

impl Walk {
    /// Takes a folder with all real folders in it.
    fn folder(&mut self, first: PathBuf) {
        let mut left = vec![first];
        while let Some(folder) = left.pop() {
            let real = match fs::canonicalize(&folder) {
                Ok(real) => real,
                Err(error) => {
                    self.unreadable.push((folder, error));
                    continue;
                }
            };
            if !self.taken.insert(real) {
                self.twice.push(folder);
                continue;
            }
            let entries = fs::read_dir(&folder)
                .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<PathBuf>>>());
            match entries {
                Ok(mut entries) => {
                    entries.sort_unstable();
                    entries.into_iter().for_each(|path| self.entry(path, &mut left));
                }
                Err(error) => self.unreadable.push((folder, error)),
            }
        }
    }

    fn entry(&mut self, path: PathBuf, folders: &mut Vec<PathBuf>) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with('.') || SYSTEM.iter().any(|s| name.eq_ignore_ascii_case(s)) {
            self.hidden.push(path);
            return;
        }
        let extension = path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase());
        let image = extension.as_deref().is_some_and(|ending| is_image(ending, self.arrays));
        let found = fs::symlink_metadata(&path).map(|entry| (entry.is_symlink(), fs::metadata(&path)));
        match found {
            Ok((true, Ok(target))) if target.is_dir() => self.links.push_back(path),
            Ok((_, Ok(target))) if target.is_dir() => folders.push(path),
            Ok((_, Ok(target))) if target.is_file() && image => self.paths.push(path),
            Ok((_, Ok(target))) if target.is_file() => {
                *self.others.entry(extension.unwrap_or_default()).or_default() += 1
            }
            Ok((_, Ok(_))) => self.special.push(path),
            // It says what is wrong when it is read.
            Ok((_, Err(_))) | Err(_) if image => self.paths.push(path),
            Ok((_, Err(error))) | Err(error) => self.unreadable.push((path, error)),
        }
    }

    fn notes(&self, root: &Path) -> Vec<String> {
        let mut notes = Vec::new();
        let inside = |path: &PathBuf| printable(path.strip_prefix(root).unwrap_or(path));
        if !self.others.is_empty() {
            let mut kinds: Vec<(&String, &usize)> = self.others.iter().collect();
            kinds.sort_by(|a, b| b.1.cmp(a.1));
            let kind = |(end, n): &(&String, &usize)| match end.as_str() {
                "" => format!("{n} without an ending"),
                end => format!("{n} .{}", printable(end)),
            };
            let mut named: Vec<String> = kinds.iter().take(2 * TOLD).map(kind).collect();
            if kinds.len() > named.len() {
                named.push("others".into());
            }
            let total: usize = self.others.values().sum();
            notes.push(format!("{} of other types passed over ({})", files(total), named.join(", ")));
        }
        let names = |paths: &[PathBuf]| some(paths.iter().map(inside));
        if !self.hidden.is_empty() {
            let (n, names) = (self.hidden.len(), names(&self.hidden));
            notes.push(format!("{n} hidden or system entries passed over ({names})"));
        }
        if !self.special.is_empty() {
            let (n, names) = (self.special.len(), names(&self.special));
            notes.push(format!("{n} pipes, sockets or devices passed over ({names})"));
        }
        if !self.twice.is_empty() {
            let (n, names) = (self.twice.len(), names(&self.twice));
            notes.push(format!("{n} links to folders that are taken already passed over ({names})"));
        }
        if !self.unreadable.is_empty() {
            let named = self.unreadable.iter().map(|(path, error)| format!("{}: {error}", inside(path)));
            notes.push(format!("{} entries cannot be read ({})", self.unreadable.len(), some(named)));
        }
        notes
    }
}

/// A number of files in words.
pub(super) fn files(n: usize) -> String {
    if n == 1 {
        "1 file".into()
    } else {
        format!("{n} files")
    }
}

/// The first of some names.
pub(super) fn some(names: impl ExactSizeIterator<Item = String>) -> String {
    let more = if names.len() > TOLD { ", ..." } else { "" };
    names.take(TOLD).collect::<Vec<_>>().join(", ") + more
}
