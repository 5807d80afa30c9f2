//! Which images are looked at, and where their files go.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

use dinolab_core::text::printable;
use dinolab_core::{Error, Result};
use dinolab_plugins::image_folder;

use super::Record;

/// Files beside the folders of images, and in them: no folder is named like one of these.
const OWN: [&str; 10] = [
    "index.html",
    "features.json",
    "done.jsonl",
    "features.safetensors",
    "cls.npy",
    "patches.npy",
    "image.png",
    "pca.png",
    "cls.png",
    "foreground.png",
];
/// Bytes of a folder's name; file systems take 255.
const LONGEST: usize = 200;

/// An image to look at.
#[derive(Debug)]
pub struct Input {
    /// The file.
    pub path: PathBuf,
    /// Its path below the folder that was named, without an extension: where its files go.
    pub name: String,
}

/// An image that was named, or lies in a folder that was.
#[derive(Debug)]
pub struct Found {
    /// The file.
    pub path: PathBuf,
    /// Its path below the folder that was named, without an extension.
    pub inside: PathBuf,
}

/// All images that were named, or lie in folders that were, `.npy` files among them where `arrays` are images, and what was passed
/// over.
///
/// # Errors
/// If one does not exist, or a folder holds no image.
pub fn images(named: &[PathBuf], arrays: bool) -> Result<(Vec<Found>, Vec<String>)> {
    let (mut images, mut notes, mut seen) = (Vec::new(), Vec::new(), BTreeSet::new());
    for root in named {
        let (base, paths) = match root.is_dir() {
            true => {
                let listing = image_folder::list(root, arrays)?;
                notes.extend(listing.notes.into_iter().map(|note| format!("{}: {note}", printable(root))));
                (root.as_path(), listing.paths)
            }
            false if root.symlink_metadata().is_ok() => (root.parent().unwrap_or(Path::new("")), vec![root.clone()]),
            false => return Err(Error::content(root, "does not exist", "name images or folders of images")),
        };
        for path in paths {
            let inside = path.strip_prefix(base).unwrap_or(&path).with_extension("");
            if seen.insert(path.clone()) {
                images.push(Found { path, inside });
            }
        }
    }
    Ok((images, notes))
}

/// Where the files of images go: every image has a folder of its own, also where names differ in case only, and one that is
/// done keeps its.
pub fn name(images: Vec<Found>, record: &Record) -> Vec<Input> {
    let mut taken: BTreeSet<String> =
        images.iter().filter_map(|found| record.name(&found.path)).map(str::to_lowercase).collect();
    let mut inputs = Vec::with_capacity(images.len());
    for Found { path, inside } in images {
        let name = record.name(&path).map(String::from).unwrap_or_else(|| {
            let stem = folder(&inside);
            let numbered = (1..).map(|n| if n == 1 { stem.clone() } else { format!("{stem}-{n}") });
            numbered.into_iter().find(|n| taken.insert(n.to_lowercase())).expect("there are enough numbers")
        });
        inputs.push(Input { path, name });
    }
    inputs
}

/// A path as folders whose names can be printed, are short enough and not ours.
fn folder(inside: &Path) -> String {
    let part = |part: Component<'_>| match part {
        Component::Normal(name) => Some(safe(printable(name))),
        _ => None,
    };
    inside.components().filter_map(part).collect::<Vec<_>>().join("/")
}

fn safe(mut name: String) -> String {
    let lower = name.to_lowercase();
    let drawn = |start: &str| lower.starts_with(start) && lower.ends_with(".png");
    if OWN.contains(&lower.as_str()) || drawn("contact_sheet_") || drawn("similarity_") {
        name.push('_');
    }
    if name.len() > LONGEST {
        let hash = blake3::hash(name.as_bytes()).to_hex();
        let cut = (0..=LONGEST - 17).rev().find(|&i| name.is_char_boundary(i)).unwrap_or(0);
        name = format!("{}-{}", &name[..cut], &hash[..16]);
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_image_takes_the_name_of_an_own_file_or_of_another_image() {
        let folder = tempfile::tempdir().unwrap();
        let record = Record::open(&folder.path().join("out"), &serde_json::Map::new()).unwrap();
        let long = "L".repeat(251);
        let inside =
            ["index.html", "Index.HTML", "a/pca.png", "same", "same", "SAME", "same-2", "two\nlines", &long, "/x"];
        let images =
            inside.iter().enumerate().map(|(i, n)| Found { path: format!("{i}.jpg").into(), inside: n.into() });
        let names: Vec<String> = name(images.collect(), &record).into_iter().map(|input| input.name).collect();
        let different: BTreeSet<String> = names.iter().map(|n| n.to_lowercase()).collect();
        assert_eq!(different.len(), names.len(), "{names:?}");
        for name in &names {
            let free = name.split('/').all(|part| !part.is_empty() && part.len() < 240 && safe(part.into()) == part);
            assert!(free && !name.starts_with('/') && !name.contains('\n'), "{name}");
        }
    }
}
