//! Files that lie beside images: masks and depths, each in a folder of its own.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use dinolab_core::text::printable;
use dinolab_core::{Error, Result};

use super::listing::{files, some};

/// A kind of file that belongs to an image.
pub(super) struct Kind {
    /// What it is called.
    pub name: &'static str,
    /// The key that names its folder.
    pub key: &'static str,
    /// How its name may end, the first that is there.
    pub endings: &'static [&'static str],
    /// What it is, for who has none.
    pub help: &'static str,
}

pub(super) const MASK: Kind = Kind {
    name: "mask",
    key: "data.masks",
    endings: &["png"],
    help: "a mask is a PNG in this folder, at the path that its image has below data.path: add them, or move these images away",
};

pub(super) const DEPTH: Kind = Kind {
    name: "depth",
    key: "data.depth",
    endings: &["png", "npy"],
    help: "a depth is a PNG or .npy in this folder, at the path that its image has below data.path: add them, or move these images away",
};

/// The files in `folder` of images below `root`: at the image's own path with another ending.
///
/// # Errors
/// If an image has none, or two images would have the same. Files without an image are noted.
pub(super) fn find(
    kind: &Kind,
    root: &Path,
    images: &[PathBuf],
    folder: &Path,
    notes: &mut Vec<String>,
) -> Result<Vec<Option<PathBuf>>> {
    let Kind { name, key, endings, help } = kind;
    if !folder.is_dir() {
        let problem = if folder.exists() { "this is not a folder" } else { "there is no such folder" };
        let help = format!("set {key} to the folder of the {name}s; a relative path starts where the program is run");
        return Err(Error::content(folder, problem, help));
    }
    let mut owner: BTreeMap<PathBuf, &PathBuf> = BTreeMap::new();
    let mut missing = Vec::new();
    let mut found = Vec::with_capacity(images.len());
    for image in images {
        let own = folder.join(image.strip_prefix(root).unwrap_or(image));
        let own = endings.iter().map(|ending| own.with_extension(ending)).find(|path| path.is_file());
        let Some(own) = own else {
            missing.push(image);
            continue;
        };
        if let Some(other) = owner.insert(own.clone(), image) {
            let problem =
                format!("it would be the {name} of two images: {} and {}", printable(other), printable(image));
            return Err(Error::content(own, problem, "give every image a name of its own, whatever its ending"));
        }
        found.push(Some(own));
    }
    if !missing.is_empty() {
        let n = missing.len();
        let named = some(missing.iter().map(|image| printable(image.strip_prefix(root).unwrap_or(image))));
        let problem = format!("{n} of {} images have no {name} here: {named}", images.len());
        return Err(Error::content(folder, problem, *help));
    }
    let mut alone = 0;
    for entry in walkdir::WalkDir::new(folder).follow_links(true).into_iter().flatten() {
        let ending = entry.path().extension().and_then(|e| e.to_str());
        let of_kind = ending.is_some_and(|e| endings.contains(&e));
        alone += usize::from(of_kind && entry.file_type().is_file() && !owner.contains_key(entry.path()));
    }
    if alone > 0 {
        notes.push(format!("{} of {} belong to no image and are passed over", files(alone), printable(folder)));
    }
    Ok(found)
}
