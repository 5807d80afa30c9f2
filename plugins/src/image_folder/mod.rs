//! `image_folder`: photographs in a folder. `manifest`: photographs that a table lists.

mod beside;
mod copies;
pub(crate) mod decode;
mod depth;
pub(crate) mod labels;
mod listing;
pub mod manifest;
mod masks;
mod npy;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dinolab_core::contract::{DataContext, Dataset, Sample, Summary};
use dinolab_core::data::Order;
use dinolab_core::text::printable;
use dinolab_core::{plugin, Error, Result};

use crate::file_hashes::{FileHasher, Hashes};
use crate::packed::overlap;

use beside::{DEPTH, MASK};
use decode::{read_again, Known};
use depth::Depths;
use labels::Labelled;
use masks::Masks;

pub use decode::{read, read_as, Wanted};
pub(crate) use labels::in_order;
pub(crate) use listing::is_image;
pub use listing::{list, Listing};
pub(crate) use masks::{decode as decode_mask, read as read_mask, PixelClasses};
pub use masks::{MaskConfig, IGNORED};

/// What transparent images lie on unless a recipe says otherwise: white, as in most viewers.
pub const BACKGROUND: [u8; 3] = [255; 3];
/// Classes that the summary names.
const NAMED: usize = 10;

/// Images in a folder and its sub-folders: JPEG, PNG, WebP, TIFF, BMP and GIF.
///
/// If every image lies in one of at least two sub-folders, the sub-folders' names are the classes, in alphabetical
/// order. If the sub-folders are `train` and `val` (or `test`), `train` is the training data, the other is held out, and
/// the folders inside them are the classes. Hidden files and folders, system folders (`__MACOSX`, `@eaDir`) and other
/// file types are skipped and counted. Links are followed; a folder is read only once.
///
/// With 3 `channels`, every image is converted to 8-bit RGB: grey is repeated three times, CMYK is converted, 16 bits are rounded to 8
/// (unless `bits = 16`), and transparent pixels are blended with `background`. With another number of `channels` nothing is converted: a
/// file with another number of channels is refused. A grey file then has one channel, RGBA has four, and a TIFF has as many as its samples
/// per pixel, of 8 or 16 bits; `.npy` files are images too, `[height, width, channels]` or `[height, width]` of u8 or u16. Colour profiles
/// (ICC) and gamma are not applied. Of an animation the first picture is taken. The orientation that a camera noted (EXIF) is applied. A
/// file that ends early or is damaged is never used: it is named, counted and replaced by another (`batch.max_broken_share`).
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ImageFolderConfig {
    /// The folder.
    #[schemars(extend("format" = "path"))]
    pub path: PathBuf,
    /// Share of the images set aside for probes: the same ones for every seed. Ignored if folders `train` and `val`
    /// already divide the images.
    #[serde(default = "default_held_out")]
    #[schemars(extend("minimum" = 0, "exclusiveMaximum" = 1))]
    pub held_out: f64,
    /// Channels of an image. With 3, every file is converted to RGB; with any other number, every file must have exactly this many
    /// channels. `crops.mean` and `crops.std` need one number per channel.
    #[serde(default = "default_channels")]
    #[schemars(range(min = 1, max = 1024))]
    pub channels: usize,
    /// Bits per value: 8 rounds 16-bit files to 8 bits, 16 keeps them unchanged; 8-bit files stay 8-bit. Default: 8 for 3 channels, 16
    /// for any other number of channels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = [8, 16]))]
    pub bits: Option<u8>,
    /// Background colour for transparent images: red, green and blue, 0 to 255.
    #[serde(default = "default_background")]
    #[schemars(extend("x-with" = { "channels": 3 }))]
    pub background: [u8; 3],
    /// Another folder whose images are held out for probes, instead of a share of the images in `path`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "path"))]
    pub val: Option<PathBuf>,
    /// A folder with segmentation masks (the class of every pixel): for each image a PNG, indexed or grey, at the same
    /// relative path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "path"))]
    pub masks: Option<PathBuf>,
    /// The same for the images of `val`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "path"))]
    pub val_masks: Option<PathBuf>,
    /// What the values of masks mean.
    #[serde(default)]
    #[schemars(extend("x-with" = { "masks": null }))]
    pub mask: MaskConfig,
    /// A folder with depth maps (the distance of every pixel): for each image a 16-bit grey PNG or a `.npy` of `[height,
    /// width]`, at the same relative path. A value that is 0, negative or not finite means: depth not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "path"))]
    pub depth: Option<PathBuf>,
    /// The same for the images of `val`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "path"))]
    pub val_depth: Option<PathBuf>,
    /// Metres of a unit of depth in PNG files and arrays of whole numbers: 0.001 for millimetres, 1/256 in KITTI. Arrays of
    /// floats hold metres.
    #[serde(default = "default_depth_scale")]
    #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0, "x-with" = { "depth": null }))]
    pub depth_scale: f64,
}

impl ImageFolderConfig {
    /// A folder with the defaults of all other keys.
    pub fn of(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            held_out: default_held_out(),
            channels: default_channels(),
            bits: None,
            background: default_background(),
            val: None,
            masks: None,
            val_masks: None,
            mask: MaskConfig::default(),
            depth: None,
            val_depth: None,
            depth_scale: default_depth_scale(),
        }
    }
}

pub(crate) fn default_held_out() -> f64 {
    0.1
}

fn default_depth_scale() -> f64 {
    0.001
}

pub(crate) fn default_channels() -> usize {
    3
}

pub(crate) fn default_background() -> [u8; 3] {
    BACKGROUND
}

plugin!(Dataset, "image_folder", ImageFolderConfig, |config: ImageFolderConfig, _: &mut DataContext| {
    ImageFolder::open(&config).map(|folder| Box::new(folder) as Box<dyn Dataset>)
});

/// The images of a folder, or the part of them that is trained on or held out.
#[derive(Debug)]
pub struct ImageFolder {
    files: Arc<Files>,
    /// This part's files.
    part: Vec<usize>,
    held_out: Option<Arc<ImageFolder>>,
}

/// All images of a folder, sorted by path.
#[derive(Debug)]
struct Files {
    paths: Vec<PathBuf>,
    /// Length of each in bytes; 0 if it cannot be known.
    sizes: Vec<u64>,
    /// What was found whole.
    known: Vec<Known>,
    labelled: Labelled,
    beside: Beside,
    /// What was passed over.
    notes: Vec<String>,
    wanted: Wanted,
    hashes: Hashes,
}

/// What lies beside the images.
#[derive(Debug, Default)]
struct Beside {
    masks: Option<Masks>,
    depth: Option<Depths>,
}

impl ImageFolder {
    /// Lists the folder; no image is read.
    ///
    /// # Errors
    /// If the folder cannot be read, holds no image, or too few to set a share of them aside.
    pub fn open(config: &ImageFolderConfig) -> Result<Self> {
        Self::of(Files::list(config)?, &config.path, config.held_out)
    }

    /// All of `files`; a share of them is set aside where nothing divides them.
    fn of(mut files: Files, at: &Path, held_out: f64) -> Result<Self> {
        files.notes.extend(files.labelled.split.as_ref().and_then(|_| unread_share(held_out)));
        let files = Arc::new(files);
        let [train, test] = match &files.labelled.split {
            Some(parts) => parts.clone(),
            None => set_aside(files.paths.len(), at, held_out)?,
        };
        let part = |part: Vec<usize>| Arc::new(Self { files: files.clone(), part, held_out: None });
        let held_out = (!test.is_empty()).then(|| part(test));
        Ok(Self { files, part: train, held_out })
    }

    /// The image of a sample with its label, and its file's bytes.
    fn image(&self, index: usize) -> Result<(Sample, Vec<u8>)> {
        let known = &self.files.known[self.part[index]];
        let (image, bytes) = read_again(self.path(index), &self.files.wanted, known)?;
        let label = self.files.labelled.labels.get(self.part[index]).copied().flatten();
        Ok((Sample { label, ..image }, bytes))
    }

    fn path(&self, index: usize) -> &Path {
        &self.files.paths[self.part[index]]
    }
}

impl Dataset for ImageFolder {
    fn len(&self) -> usize {
        self.part.len()
    }

    fn get(&self, index: usize) -> Result<Sample> {
        let (image, bytes) = self.image(index)?;
        let (size, file) = ([image.width, image.height], (self.path(index), &bytes[..]));
        let Beside { masks, depth } = &self.files.beside;
        let mask = masks.as_ref().map(|masks| masks.read(self.part[index], size, file));
        let depth = depth.as_ref().map(|depth| depth.read(self.part[index], size, file));
        let (mask, depth) = (mask.transpose()?.flatten(), depth.transpose()?.flatten());
        Ok(Sample { mask, depth, ..image })
    }

    fn get_image(&self, index: usize) -> Result<Sample> {
        self.image(index).map(|(image, _)| image)
    }

    fn channels(&self) -> usize {
        self.files.wanted.channels
    }

    fn classes(&self) -> usize {
        self.files.labelled.classes.len()
    }

    fn mask_classes(&self) -> usize {
        self.files.beside.masks.as_ref().map_or(0, |masks| masks.classes.count())
    }

    fn has_depth(&self) -> bool {
        self.files.beside.depth.is_some()
    }

    fn class_names(&self) -> Vec<String> {
        self.files.labelled.classes.iter().map(printable).collect()
    }

    fn mask_class_names(&self) -> Vec<String> {
        self.files.beside.masks.as_ref().map_or(Vec::new(), |masks| masks.classes.names().to_vec())
    }

    fn describe(&self, index: usize) -> String {
        printable(self.path(index))
    }

    fn summary(&self) -> Summary {
        let Files { paths, sizes, labelled, beside: Beside { masks, depth }, notes, .. } = self.files.as_ref();
        let classes = self.class_names();
        let labels = self.part.iter().filter_map(|&i| labelled.labels.get(i).copied());
        let mut content = format!("{} images{}", self.len(), count_classes(&classes, labels));
        if let Some(masks) = masks {
            content += &format!(", masks of {} classes", masks.classes.count());
        }
        if depth.is_some() {
            content += ", depth";
        }
        if let Some(held_out) = &self.held_out {
            content += &format!(", {} more held out for probes", held_out.len());
        }
        let mut all = labelled.notes.clone();
        let seen: BTreeSet<u32> = self.part.iter().filter_map(|&i| labelled.labels.get(i).copied().flatten()).collect();
        let unseen: Vec<&str> =
            (0u32..).zip(&classes).filter(|(label, _)| !seen.contains(label)).map(|(_, name)| name.as_str()).collect();
        // What is held out may lack a class; what is trained on had better not.
        if !unseen.is_empty() && self.held_out.is_some() {
            all.push(format!(
                "no image to train on is of {}: scores of labels count these as wrong",
                listing::some(unseen.into_iter().map(String::from))
            ));
        }
        all.extend(notes.iter().cloned());
        all.extend(masks.as_ref().and_then(|masks| masks.classes.note()));
        all.extend(copies::note(paths, sizes));
        Summary { content, notes: all }
    }

    fn fingerprint(&self) -> Option<String> {
        Some(self.files.hashes.content.clone())
    }

    fn stamp(&self) -> Option<String> {
        Some(self.files.hashes.written.clone())
    }

    fn held_out(&self) -> Option<Arc<dyn Dataset>> {
        self.held_out.clone().map(|part| part as Arc<dyn Dataset>)
    }
}

impl Files {
    fn list(config: &ImageFolderConfig) -> Result<Self> {
        let root = &config.path;
        let wanted = Wanted::new(config.channels, config.bits, config.background);
        let Listing { mut paths, mut notes } = listed(root, "data.path", &wanted)?;
        let kinds = [(&MASK, &config.masks, &config.val_masks), (&DEPTH, &config.depth, &config.val_depth)];
        let mut found: [Option<Vec<Option<PathBuf>>>; 2] = [None, None];
        for (found, (kind, folder, val)) in found.iter_mut().zip(kinds) {
            if let Some(folder) = folder {
                *found = Some(beside::find(kind, root, &paths, folder, &mut notes)?);
            }
            if config.val.is_none() && val.is_some() {
                let (key, name) = (kind.key, kind.key.trim_start_matches("data."));
                let problem = format!("data.val_{name} without data.val");
                return Err(Error::user(problem, format!("set data.val, or {key} alone")));
            }
        }
        let labelled = match &config.val {
            Some(val) => {
                let theirs = listed(val, "data.val", &wanted)?;
                notes.extend(overlap(&paths, &theirs.paths));
                notes.extend(theirs.notes.into_iter().map(|note| format!("{}: {note}", printable(val))));
                for (found, (kind, _, folder)) in found.iter_mut().zip(kinds) {
                    match (found, folder) {
                        (Some(all), Some(folder)) => {
                            all.extend(beside::find(kind, val, &theirs.paths, folder, &mut notes)?)
                        }
                        (None, None) => {}
                        _ => {
                            let (key, name) = (kind.key, kind.key.trim_start_matches("data."));
                            let problem =
                                format!("there are {}s for one of the folders data.path and data.val only", kind.name);
                            return Err(Error::user(
                                problem,
                                format!("set both {key} and data.val_{name}, or neither"),
                            ));
                        }
                    }
                }
                labels::with_val(root, &mut paths, val, theirs.paths)?
            }
            None => labels::label(root, &paths),
        };
        let [masks, depth] = found;
        let beside = Beside {
            masks: masks.map(|files| Masks::open(&config.mask, files)).transpose()?,
            depth: depth.map(|files| Depths::of(config.depth_scale, files)),
        };
        let others = [&config.val, &config.masks, &config.val_masks, &config.depth, &config.val_depth];
        let roots = [root].into_iter().chain(others.into_iter().flatten());
        Ok(Self::new(&roots.map(PathBuf::as_path).collect::<Vec<_>>(), paths, labelled, beside, notes, wanted))
    }

    /// Of files that were found in these folders: where a folder lies is not what the data are known by.
    fn new(
        roots: &[&Path],
        paths: Vec<PathBuf>,
        labelled: Labelled,
        beside: Beside,
        notes: Vec<String>,
        wanted: Wanted,
    ) -> Self {
        let mut hasher = FileHasher::default();
        let mut add = |path: &Path| {
            let inside = roots.iter().find_map(|root| path.strip_prefix(root).ok());
            hasher.add(inside.unwrap_or(path), path)
        };
        let sizes = paths.iter().map(|path| add(path)).collect();
        let (masks, depth) = (beside.masks.iter(), beside.depth.iter());
        for path in masks.flat_map(Masks::files).chain(depth.flat_map(Depths::files)) {
            add(path);
        }
        let known = paths.iter().map(|_| Known::default()).collect();
        Self { paths, sizes, known, labelled, beside, notes, wanted, hashes: hasher.finish() }
    }
}

/// Says that the share of images that are set aside is not read, if it was given: the data are divided.
pub(crate) fn unread_share(held_out: f64) -> Option<String> {
    let given = held_out != default_held_out();
    given.then(|| "data.held_out is read by nothing: the data say themselves which images are held out".into())
}

/// A share of `count` images to test on, and the others to train on; `at` is where they are, for messages.
///
/// # Errors
/// If there are too few.
pub(crate) fn set_aside(count: usize, at: &Path, share: f64) -> Result<[Vec<usize>; 2]> {
    let aside = (count as f64 * share).round() as usize;
    let aside = if share > 0.0 { aside.max(1) } else { 0 };
    if aside >= count {
        let problem = format!("{count} image(s) are too few to set {aside} aside for probes");
        return Err(Error::content(at, problem, "add images, or set held_out = 0"));
    }
    // A random but fixed split: not of the run's seed, so that runs with several seeds share it.
    let order = Order::new(0, count);
    let mut test: Vec<usize> = (0..count as u64).map(|i| order.sample(i)).collect();
    let mut train = test.split_off(aside);
    train.sort_unstable();
    test.sort_unstable();
    Ok([train, test])
}

/// How many images each class has, in words: ` in 2 classes (cat 3, dog 5)`; nothing without classes.
pub(crate) fn count_classes(classes: &[String], labels: impl Iterator<Item = Option<u32>>) -> String {
    if classes.is_empty() {
        return String::new();
    }
    let n = classes.len();
    let mut count = vec![0usize; n];
    labels.flatten().for_each(|label| count[label as usize] += 1);
    let mut named: Vec<String> = classes.iter().zip(count).take(NAMED).map(|(name, n)| format!("{name} {n}")).collect();
    if classes.len() > NAMED {
        named.push("...".into());
    }
    let classes = if classes.len() == 1 { "class" } else { "classes" };
    format!(" in {n} {classes} ({})", named.join(", "))
}

/// The images of the folder that a key names.
fn listed(root: &Path, key: &str, wanted: &Wanted) -> Result<Listing> {
    if root.is_dir() {
        return list(root, wanted.takes_arrays());
    }
    let problem = if root.exists() { "this is not a folder" } else { "there is no such folder" };
    let help = format!("set {key} to a folder of images; a relative path starts where the program is run");
    Err(Error::content(root, problem, help))
}
