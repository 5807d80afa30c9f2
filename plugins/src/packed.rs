//! Images that lie in larger files, tar shards or tables: what their datasets share.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dinolab_core::contract::{Dataset, Sample, Summary};
use dinolab_core::text::printable;
use dinolab_core::{Error, Result};

use crate::file_hashes::Hashes;
use crate::image_folder::decode::{self, Known, Wanted};
use crate::image_folder::{count_classes, decode_mask, in_order, set_aside, unread_share, MaskConfig, PixelClasses};

/// Files that a pattern stands for before it is refused.
const MOST_FILES: usize = 1_000_000;

/// Images by number, wherever they lie.
pub(crate) trait Store: fmt::Debug + Send + Sync {
    /// The bytes of an image file.
    ///
    /// # Errors
    /// If they cannot be read.
    fn bytes(&self, index: usize) -> Result<Vec<u8>>;

    /// Where it lies: the file, and the place in it as if the file were a folder.
    fn place(&self, index: usize) -> PathBuf;

    /// The bytes of its mask; `None` if it has none.
    ///
    /// # Errors
    /// If they cannot be read.
    fn mask(&self, index: usize) -> Result<Option<Vec<u8>>>;

    /// Where its mask lies.
    fn mask_place(&self, index: usize) -> PathBuf;
}

/// The values of an image's mask and their width.
fn mask(store: &impl Store, index: usize) -> Result<Option<(Vec<u8>, usize)>> {
    let Some(bytes) = store.mask(index)? else { return Ok(None) };
    decode_mask(Cursor::new(bytes), &store.mask_place(index)).map(Some)
}

/// The classes in the masks of `images` images.
///
/// # Errors
/// If they have to be counted and cannot be.
pub(crate) fn pixel_classes(store: &impl Store, config: &MaskConfig, images: usize) -> Result<PixelClasses> {
    PixelClasses::of(config, images, |index| mask(store, index))
}

/// The images of a store, and what is known of them.
#[derive(Debug)]
pub(crate) struct All<S> {
    /// Where they are.
    pub store: S,
    /// The class of each.
    pub labels: Vec<Option<u32>>,
    /// The names of the classes.
    pub classes: Vec<String>,
    /// The classes of pixels, where images have masks.
    pub masks: Option<PixelClasses>,
    /// What a user may not expect, a sentence each.
    pub notes: Vec<String>,
    /// Hashes of what is there.
    pub hashes: Hashes,
    /// What images are read as.
    pub wanted: Wanted,
}

/// The images of a store, or the part of them that is trained on or held out.
#[derive(Debug)]
pub(crate) struct Packed<S> {
    all: Arc<All<S>>,
    /// Which were found whole.
    known: Arc<Vec<Known>>,
    part: Vec<usize>,
    held_out: Option<Arc<Packed<S>>>,
}

impl<S: Store + 'static> Packed<S> {
    /// The first `train` images are trained on and the others held out; if there are no others, a share is.
    ///
    /// # Errors
    /// If there are too few images to set a share of them aside.
    pub fn new(mut all: All<S>, train: usize, share: f64, at: &Path) -> Result<Self> {
        let len = all.labels.len();
        all.notes.extend((train < len).then(|| unread_share(share)).flatten());
        let known: Arc<Vec<Known>> = Arc::new((0..len).map(|_| Known::default()).collect());
        let all = Arc::new(all);
        let [train, test] = match train < len {
            true => [(0..train).collect(), (train..len).collect()],
            false => set_aside(len, at, share)?,
        };
        let part = |part: Vec<usize>| Self { all: all.clone(), known: known.clone(), part, held_out: None };
        let held_out = (!test.is_empty()).then(|| Arc::new(part(test)));
        Ok(Self { held_out, ..part(train) })
    }
}

impl<S: Store + 'static> Packed<S> {
    /// The image of a sample with its label, and its file's bytes.
    fn image(&self, index: usize) -> Result<(Sample, Vec<u8>)> {
        let (index, all) = (self.part[index], &self.all);
        let bytes = all.store.bytes(index)?;
        let image = decode::read_bytes(&all.store.place(index), &bytes, &all.wanted, &self.known[index])?;
        Ok((Sample { label: all.labels[index], ..image }, bytes))
    }
}

impl<S: Store + 'static> Dataset for Packed<S> {
    fn len(&self) -> usize {
        self.part.len()
    }

    fn get(&self, index: usize) -> Result<Sample> {
        let (number, all) = (self.part[index], &self.all);
        let (image, bytes) = self.image(index)?;
        let Some(classes) = &all.masks else { return Ok(image) };
        let Some(values) = mask(&all.store, number)? else { return Ok(image) };
        let (size, [mask, place]) =
            ([image.width, image.height], [all.store.mask_place(number), all.store.place(number)]);
        let (width, height) = (values.1, values.0.len() / values.1);
        decode::check_turned(&bytes, &place, size, [width, height], &mask)?;
        let classes = classes.classify(values, size, &mask, &place)?;
        Ok(Sample { mask: Some(classes), ..image })
    }

    fn get_image(&self, index: usize) -> Result<Sample> {
        self.image(index).map(|(image, _)| image)
    }

    fn channels(&self) -> usize {
        self.all.wanted.channels
    }

    fn classes(&self) -> usize {
        self.all.classes.len()
    }

    fn class_names(&self) -> Vec<String> {
        self.all.classes.clone()
    }

    fn mask_classes(&self) -> usize {
        self.all.masks.as_ref().map_or(0, PixelClasses::count)
    }

    fn mask_class_names(&self) -> Vec<String> {
        self.all.masks.as_ref().map_or(Vec::new(), |masks| masks.names().to_vec())
    }

    fn describe(&self, index: usize) -> String {
        printable(self.all.store.place(self.part[index]))
    }

    fn summary(&self) -> Summary {
        let classes = count_classes(&self.all.classes, self.part.iter().map(|&i| self.all.labels[i]));
        let mut content = format!("{} images{classes}", self.len());
        if let Some(masks) = &self.all.masks {
            content += &format!(", masks of {} classes", masks.count());
        }
        if let Some(held_out) = &self.held_out {
            content += &format!(", {} more held out for probes", held_out.len());
        }
        Summary { content, notes: self.all.notes.clone() }
    }

    fn fingerprint(&self) -> Option<String> {
        Some(self.all.hashes.content.clone())
    }

    fn stamp(&self) -> Option<String> {
        Some(self.all.hashes.written.clone())
    }

    fn held_out(&self) -> Option<Arc<dyn Dataset>> {
        self.held_out.clone().map(|part| part as Arc<dyn Dataset>)
    }
}

/// The class of each image, and the names of the classes.
type Classes = (Vec<Option<u32>>, Vec<String>);

/// Labels of images as they are met, every text kept once.
#[derive(Default)]
pub(crate) struct Labels {
    ids: BTreeMap<String, u32>,
    /// Of each image, the number of its text.
    of: Vec<Option<u32>>,
}

/// A label as it is written; `None` if nothing is.
pub(crate) fn written(label: &str) -> Option<String> {
    Some(label.trim()).filter(|label| !label.is_empty()).map(String::from)
}

/// Whether a label says that there is none: a number below 0, unless a class has that name.
pub(crate) fn is_none(label: &str) -> bool {
    label.parse::<i128>().is_ok_and(|number| number < 0)
}

impl Labels {
    /// The label of the next image.
    pub fn push(&mut self, label: Option<String>) {
        let label = label.and_then(|label| written(&label));
        let next = self.ids.len() as u32;
        self.of.push(label.map(|label| *self.ids.entry(label).or_insert(next)));
    }

    /// The class of each image and the names of the classes: `names`, of which a label is the number or the name (where all are
    /// numbers and not all are names, each is a number, so that a class whose name is another's number is not taken for it);
    /// without, all labels, numbers in their order and texts in that of the alphabet.
    ///
    /// # Errors
    /// The first image whose label is none of `names`, with the label.
    pub fn classes(mut self, names: &[String]) -> Result<Classes, (usize, String)> {
        let count = self.ids.len();
        self.ids.retain(|label, _| !is_none(label) || names.contains(label));
        let kept: BTreeSet<u32> = self.ids.values().copied().collect();
        self.of.iter_mut().for_each(|of| *of = of.filter(|id| kept.contains(id)));
        let all: Vec<&String> = match names {
            [] => in_order(self.ids.keys()),
            names => names.iter().collect(),
        };
        let named: BTreeMap<&String, u32> = all.iter().enumerate().map(|(i, name)| (*name, i as u32)).collect();
        let mut class: Vec<Option<u32>> = vec![None; count];
        let number = |label: &String| label.parse().ok().filter(|&n: &u32| (n as usize) < names.len());
        let named_all = self.ids.keys().all(|label| named.contains_key(label));
        let are_numbers = !named_all && self.ids.keys().all(|label| label.parse::<u32>().is_ok());
        for (label, &id) in &self.ids {
            let name = named.get(label).copied().filter(|_| !are_numbers);
            class[id as usize] = name.or_else(|| number(label));
        }
        let mut labels = Vec::with_capacity(self.of.len());
        for (index, id) in self.of.iter().enumerate() {
            let found = id.map(|id| class[id as usize]);
            if found == Some(None) {
                let label = self.ids.iter().find(|(_, other)| Some(**other) == *id).map(|(label, _)| label.clone());
                return Err((index, label.unwrap_or_default()));
            }
            labels.push(found.flatten());
        }
        Ok((labels, all.into_iter().cloned().collect()))
    }
}

/// Says how many images have no label, where others have one.
pub(crate) fn unlabelled(labels: &[Option<u32>]) -> Option<String> {
    without(labels.iter().filter(|label| label.is_none()).count(), labels.len(), "label")
}

/// Says that `none` of `all` images have no such thing, where others have.
pub(crate) fn without(none: usize, all: usize, what: &str) -> Option<String> {
    (0 < none && none < all).then(|| format!("{none} of {all} images have no {what}"))
}

/// The files that `path` stands for: itself, or after brace expansion (`{000..146}`, `{a,b}`), or what ends in `.ending` in a folder,
/// in the order of their names.
///
/// # Errors
/// If braces do not fit, or a file is not there; `key` names the key of the recipe.
pub(crate) fn files(path: &Path, ending: &str, key: &str) -> Result<Vec<PathBuf>> {
    let wrong = |at: &Path, problem: &str| {
        let help = format!(
            "set {key} to a .{ending} file, a folder of them, or several: part-{{000..146}}.{ending}, {{a,b}}.{ending}"
        );
        Error::content(at, problem, help)
    };
    if path.is_dir() {
        let entries = std::fs::read_dir(path).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
        let mut files: Vec<PathBuf> =
            entries.map_err(Error::io("list", path))?.into_iter().map(|entry| entry.path()).collect();
        let hidden = |file: &Path| file.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        files.retain(|file| file.extension().is_some_and(|e| e.eq_ignore_ascii_case(ending)) && !hidden(file));
        files.sort();
        return match files.is_empty() {
            true => Err(wrong(path, &format!("the folder holds no .{ending} file"))),
            false => Ok(files),
        };
    }
    let files = match (path.exists(), path.to_str()) {
        // A name may have braces of its own.
        (true, _) | (_, None) => vec![path.to_path_buf()],
        (false, Some(text)) => {
            let all = expand(text).map_err(|problem| wrong(path, &problem))?;
            all.into_iter().map(PathBuf::from).collect()
        }
    };
    match files.iter().find(|file| !file.is_file()) {
        Some(missing) => Err(wrong(missing, "there is no such file")),
        None => Ok(files),
    }
}

/// Which file it is, by whatever name or link.
fn identity(path: &Path) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    path.metadata().ok().map(|file| (file.dev(), file.ino()))
}

/// Each file once, under its first name; the others are told of.
pub(crate) fn once(files: Vec<PathBuf>, notes: &mut Vec<String>) -> Vec<PathBuf> {
    let mut known: BTreeMap<(u64, u64), PathBuf> = BTreeMap::new();
    let mut again: Vec<String> = Vec::new();
    let is_new = |path: &PathBuf| match identity(path).map(|id| known.entry(id)) {
        Some(Entry::Occupied(first)) => {
            again.push(match first.get() == path {
                true => format!("{} is named twice", printable(path)),
                false => format!("{} is the file {}", printable(path), printable(first.get())),
            });
            false
        }
        Some(Entry::Vacant(place)) => {
            place.insert(path.clone());
            true
        }
        None => true,
    };
    let files = files.into_iter().filter(is_new).collect();
    if let Some(first) = again.first() {
        let more = again.len() - 1;
        let more = if more > 0 { format!(", and {more} more like it") } else { String::new() };
        notes.push(format!("{first}{more}: read once"));
    }
    files
}

/// Says which files are trained on and held out as well.
pub(crate) fn overlap(train: &[PathBuf], held_out: &[PathBuf]) -> Option<String> {
    let known: BTreeSet<(u64, u64)> = train.iter().filter_map(|path| identity(path)).collect();
    let both: Vec<&PathBuf> =
        held_out.iter().filter(|path| identity(path).is_some_and(|id| known.contains(&id))).collect();
    let first = both.first()?;
    let more = if both.len() > 1 { format!(" and {} more", both.len() - 1) } else { String::new() };
    Some(format!("{}{more} held out for probes and trained on: scores are of images that were seen", printable(first)))
}

/// Fails if a class is named twice.
///
/// # Errors
/// The name.
pub(crate) fn check_classes(names: &[String]) -> Result<()> {
    let mut seen = BTreeSet::new();
    match names.iter().find(|name| !seen.insert(*name)) {
        Some(name) => {
            Err(Error::user(format!("data.classes names `{name}` twice"), "give each class a name of its own"))
        }
        None => Ok(()),
    }
}

/// What a text with braces stands for, as in a shell: `{a,b}` and `{08..11}`, from left to right, nested ones inside.
fn expand(text: &str) -> Result<Vec<String>, String> {
    let Some(open) = text.find('{') else {
        return match text.contains('}') {
            true => Err("a closing brace has no opening one".into()),
            false => Ok(vec![text.into()]),
        };
    };
    let (mut depth, mut cuts, mut close) = (0, vec![open], None);
    for (at, sign) in text.char_indices().skip_while(|(at, _)| *at < open) {
        match sign {
            '{' => depth += 1,
            ',' if depth == 1 => cuts.push(at),
            '}' if depth == 1 => {
                close = Some(at);
                break;
            }
            '}' => depth -= 1,
            _ => {}
        }
    }
    let close = close.ok_or("an opening brace has no closing one")?;
    cuts.push(close);
    let parts: Vec<&str> = cuts.windows(2).map(|cut| &text[cut[0] + 1..cut[1]]).collect();
    let choices = match parts[..] {
        [range] => numbers(range)?,
        _ => {
            let all: Result<Vec<_>, String> = parts.into_iter().map(expand).collect();
            all?.concat()
        }
    };
    let rest = expand(&text[close + 1..])?;
    if choices.len().saturating_mul(rest.len()) > MOST_FILES {
        return Err(format!("it stands for more than {MOST_FILES} files"));
    }
    let before = &text[..open];
    Ok(choices.iter().flat_map(|choice| rest.iter().map(move |rest| format!("{before}{choice}{rest}"))).collect())
}

/// `08..11`: the numbers from the first to the last, as wide as the wider of both where one begins with 0.
fn numbers(range: &str) -> Result<Vec<String>, String> {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let ends = range.split_once("..").filter(|(first, last)| digits(first) && digits(last));
    let wrong = || format!("{{{range}}} is neither a list {{a,b}} nor numbers {{000..146}}");
    let (first, last) = ends.ok_or_else(wrong)?;
    let wide = [first, last].iter().any(|end| end.len() > 1 && end.starts_with('0'));
    let width = if wide { first.len().max(last.len()) } else { 0 };
    let (first, last): (usize, usize) =
        first.parse().and_then(|first| Ok((first, last.parse()?))).map_err(|_| wrong())?;
    if last < first {
        return Err(format!("{{{range}}} ends before it begins"));
    }
    if last - first >= MOST_FILES {
        return Err(format!("it stands for more than {MOST_FILES} files"));
    }
    Ok((first..=last).map(|number| format!("{number:0width$}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn braces_stand_for_what_a_shell_makes_of_them() {
        let of = |text: &str| expand(text).unwrap();
        assert_eq!(of("a.tar"), ["a.tar"]);
        assert_eq!(of("p-{008..011}.tar"), ["p-008.tar", "p-009.tar", "p-010.tar", "p-011.tar"]);
        assert_eq!(of("{9..11}"), ["9", "10", "11"]);
        assert_eq!(of("{a,b{1..2}}-{x,}.tar"), ["a-x.tar", "a-.tar", "b1-x.tar", "b1-.tar", "b2-x.tar", "b2-.tar"]);
        for (text, problem) in [
            ("p-{1..2", "no closing"),
            ("p-1}", "no opening"),
            ("p-{1}", "neither"),
            ("p-{2..1}", "ends before"),
            ("p-{0..99999999}", "more than"),
            ("p-{0..9999}{0..9999}", "more than"),
            ("p-{0..99999999999999999999999}", "neither"),
        ] {
            assert!(expand(text).unwrap_err().contains(problem), "{text}");
        }
    }

    #[test]
    fn labels_are_numbers_in_order_names_or_none() {
        let labels = |texts: &[&str]| {
            let mut labels = Labels::default();
            texts.iter().for_each(|text| labels.push((!text.is_empty()).then(|| text.to_string())));
            labels
        };
        let (of, names) = labels(&["10\n", "9", "", "-1", "10"]).classes(&[]).unwrap();
        assert_eq!((of, names), (vec![Some(1), Some(0), None, None, Some(1)], vec!["9".into(), "10".into()]));
        let (of, names) = labels(&["dog", "cat"]).classes(&[]).unwrap();
        assert_eq!((of, names), (vec![Some(1), Some(0)], vec!["cat".into(), "dog".into()]));
        let given = ["dog".to_string(), "cat".into(), "cow".into()];
        let (of, names) = labels(&["2", "cat"]).classes(&given).unwrap();
        assert_eq!((of, names), (vec![Some(2), Some(1)], given.to_vec()));
        assert_eq!(labels(&["0", "3"]).classes(&given).unwrap_err(), (1, "3".into()));
        // A name that is another's number: all labels are numbers, or all are names.
        let shifted = ["1".to_string(), "2".into(), "3".into()];
        assert_eq!(labels(&["0", "1", "2"]).classes(&shifted).unwrap().0, [Some(0), Some(1), Some(2)]);
        assert_eq!(labels(&["1", "3"]).classes(&shifted).unwrap().0, [Some(0), Some(2)]);
        // A number below 0 is no label, unless a class has that name.
        let signs = ["-1".to_string(), "1".into()];
        assert_eq!(labels(&["1", "-1", "-2"]).classes(&signs).unwrap().0, [Some(1), Some(0), None]);
        assert_eq!(labels(&[]).classes(&[]).unwrap(), (vec![], vec![]));
    }
}
