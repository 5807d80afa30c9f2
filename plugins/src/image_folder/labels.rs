//! What sub-folders say: the class of every image, and which images are there to be tested on.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use dinolab_core::text::printable;
use dinolab_core::{Error, Result};

use super::listing::{files, some};

/// Names of folders with images to train on, and with others to test on, the best first.
pub(crate) const TRAIN: [&str; 2] = ["train", "training"];
pub(crate) const TEST: [&str; 5] = ["val", "valid", "validation", "test", "testing"];

/// The images of a folder, divided and labelled.
#[derive(Debug, Default)]
pub(super) struct Labelled {
    /// Class of each image; empty if there are no classes.
    pub labels: Vec<Option<u32>>,
    /// The classes, in order.
    pub classes: Vec<OsString>,
    /// Images to train on and to test on, where folders divide them.
    pub split: Option<[Vec<usize>; 2]>,
    /// What a user may not expect, a sentence each.
    pub notes: Vec<String>,
}

/// What the folders below `root` say of images: if every image lies in one of at least two sub-folders, these are the
/// classes; but `train` and `val` are parts of the data, whose sub-folders are the classes.
pub(super) fn label(root: &Path, paths: &[PathBuf]) -> Labelled {
    let top = |path: &PathBuf| folders(root, path).next().map(lower);
    let mut found = Labelled::default();
    let tops: BTreeSet<Option<String>> = paths.iter().map(top).collect();
    let known = |top: &Option<String>| top.as_deref().is_some_and(|t| TRAIN.contains(&t) || TEST.contains(&t));
    let has = |names: &[&'static str]| names.iter().copied().find(|n| tops.contains(&Some(n.to_string())));
    let mut depth = 0;
    match (has(&TRAIN), has(&TEST)) {
        (Some(train), Some(test)) if tops.iter().all(known) => {
            depth = 1;
            let part = |name: &str| -> Vec<usize> {
                let inside = |i: &usize| top(&paths[*i]).as_deref() == Some(name);
                (0..paths.len()).filter(inside).collect()
            };
            let parts = [part(train), part(test)];
            let left = paths.len() - parts[0].len() - parts[1].len();
            found.notes.push(format!("folder {train} is trained on, folder {test} is held out for probes"));
            if left > 0 {
                found.notes.push(format!("{} in other folders beside them are not used", files(left)));
            }
            found.split = Some(parts);
        }
        // Nothing else is there: what is in it are the classes.
        (Some(train), None) if tops.len() == 1 => {
            depth = 1;
            found.notes.push(format!("all images are in the folder {train}"));
        }
        (Some(name), _) | (_, Some(name)) => found.notes.push(format!(
            "folder {name} looks like a part of the data and is taken for a class: name the folder itself in data.path, or \
            have train and val and nothing beside them"
        )),
        _ => {}
    }
    let mut count: BTreeMap<&OsStr, usize> = BTreeMap::new();
    let mut loose = Vec::new();
    // Images that are not used say nothing of classes.
    let used: Vec<&PathBuf> = match &found.split {
        Some(parts) => parts.iter().flatten().map(|i| &paths[*i]).collect(),
        None => paths.iter().collect(),
    };
    for path in used {
        match folders(root, path).nth(depth) {
            Some(class) => *count.entry(class).or_default() += 1,
            None => loose.push(path),
        }
    }
    if count.len() < 2 {
        let name = count.keys().next().filter(|_| loose.is_empty() && found.split.is_none()).map(printable);
        found.notes.extend(name.map(|name| {
            format!(
                "all images lie in the one folder {name}, and classes are two folders or more: if its folders are the classes, name it \
                 in data.path"
            )
        }));
        return found;
    }
    if !loose.is_empty() {
        let inside = loose.iter().map(|path| printable(path.strip_prefix(root).unwrap_or(path)));
        let (n, loose) = (loose.len(), some(inside));
        found.notes.push(format!(
            "the {} folders are no classes, because {} beside them ({loose}): move or remove what is loose to have them",
            count.len(),
            if n == 1 { "an image lies".into() } else { format!("{n} images lie") },
        ));
        return found;
    }
    let alike: BTreeSet<String> = count.keys().map(|name| lower(name)).collect();
    if alike.len() < count.len() {
        found.notes.push("some classes differ in upper and lower case only".into());
    }
    found.classes = count.into_keys().map(OsStr::to_os_string).collect();
    let class = |path: &PathBuf| {
        let name = folders(root, path).nth(depth)?;
        found.classes.binary_search_by(|class| class.as_os_str().cmp(name)).ok().map(|class| class as u32)
    };
    found.labels = paths.iter().map(class).collect();
    found
}

/// The images of a folder and those of another, `val`, that is held out: the classes are those of the first.
///
/// # Errors
/// If a class is in `val` alone, or the first folder is divided already.
pub(super) fn with_val(root: &Path, paths: &mut Vec<PathBuf>, val: &Path, theirs: Vec<PathBuf>) -> Result<Labelled> {
    let mut found = label(root, paths);
    if found.split.is_some() {
        let problem = "its folders divide it into images to train on and images to test on already";
        return Err(Error::content(root, problem, "name the folder to train on itself, or leave out data.val"));
    }
    if !found.classes.is_empty() {
        for path in &theirs {
            let class = folders(val, path).next();
            let place = class.map(|class| found.classes.binary_search_by(|other| other.as_os_str().cmp(class)));
            if let (Some(class), Some(Err(_))) = (class, place) {
                let problem =
                    format!("there is a class `{}`, which {} does not have", printable(class), printable(root));
                return Err(Error::content(
                    val,
                    problem,
                    "both need the same sub-folders: rename or remove those of one",
                ));
            }
            found.labels.push(place.and_then(std::result::Result::ok).map(|place| place as u32));
        }
    }
    found.split = Some([(0..paths.len()).collect(), (paths.len()..paths.len() + theirs.len()).collect()]);
    found.notes.push(format!("the images of {} are held out for probes", printable(val)));
    paths.extend(theirs);
    Ok(found)
}

/// Different labels in order: numbers, if all are, or texts in that of the alphabet, as they come.
pub(crate) fn in_order<'a>(names: impl Iterator<Item = &'a String>) -> Vec<&'a String> {
    let names: Vec<&String> = names.collect();
    let numbers = names.iter().map(|name| name.parse::<i128>().ok().map(|n| (n, *name))).collect::<Option<Vec<_>>>();
    match numbers {
        // 10 comes after 9.
        Some(mut numbers) => {
            numbers.sort();
            numbers.into_iter().map(|(_, name)| name).collect()
        }
        None => names,
    }
}

fn lower(name: &OsStr) -> String {
    name.to_string_lossy().to_lowercase()
}

/// The names of the folders between the root and an image.
pub(crate) fn folders<'a>(root: &Path, path: &'a Path) -> impl Iterator<Item = &'a OsStr> {
    let inside = path.strip_prefix(root).unwrap_or(path);
    inside.parent().unwrap_or(Path::new("")).components().map(|part| part.as_os_str())
}
