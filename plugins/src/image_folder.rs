//! `image_folder`: photographs in a folder.

use std::io::{BufReader, Cursor};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dinolab_core::contract::{Dataset, Sample};
use dinolab_core::data::Order;
use dinolab_core::registry::DataContext;
use dinolab_core::{plugin, Error, Result};
use image::{DynamicImage, ImageDecoder, ImageReader, Limits, RgbImage};
use walkdir::WalkDir;

/// More pixels than this are refused before they are decoded (Pillow's limit for "decompression bombs").
const MAX_PIXELS: u64 = 178_956_970;
/// File names that count as images end in one of these.
const EXTENSIONS: [&str; 4] = ["jpg", "jpeg", "png", "webp"];

/// Images in a folder and its sub-folders: JPEG, PNG and WebP.
///
/// If every image lies in one of at least two sub-folders, the sub-folders' names are the classes, in alphabetical
/// order. Colours become 8-bit RGB: grey is tripled, CMYK converted, transparency dropped, 16 bits cut to 8. The
/// orientation that a camera noted (EXIF) is applied.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ImageFolderConfig {
    /// The folder.
    #[schemars(extend("format" = "path"))]
    pub path: PathBuf,
    /// Share of the images set aside for probes: the same ones for every seed.
    #[serde(default = "default_held_out")]
    #[schemars(extend("minimum" = 0, "exclusiveMaximum" = 1))]
    pub held_out: f64,
}

fn default_held_out() -> f64 {
    0.1
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
    /// Class of each; empty if there are no classes.
    labels: Vec<u32>,
    classes: usize,
    /// BLAKE3 of every path in the folder and the size of its file.
    fingerprint: String,
}

impl ImageFolder {
    /// Lists the folder; no image is read.
    ///
    /// # Errors
    /// If the folder cannot be read, holds no image, or too few to set a share of them aside.
    pub fn open(config: &ImageFolderConfig) -> Result<Self> {
        let ImageFolderConfig { path, held_out } = config;
        let files = Arc::new(Files::list(path)?);
        let count = files.paths.len();
        let aside = (count as f64 * held_out).round() as usize;
        let aside = if *held_out > 0.0 { aside.max(1) } else { 0 };
        if aside >= count {
            let problem = format!("{count} image(s) are too few to set {aside} aside for probes");
            return Err(Error::content(path, problem, "add images, or set held_out = 0"));
        }
        // A random but fixed split: not of the run's seed, so that runs with several seeds share it.
        let order = Order::new(0, count);
        let mut shuffled: Vec<usize> = (0..count as u64).map(|i| order.sample(i)).collect();
        let mut part = shuffled.split_off(aside);
        part.sort_unstable();
        shuffled.sort_unstable();
        let held_out = (aside > 0).then(|| Arc::new(Self { files: files.clone(), part: shuffled, held_out: None }));
        Ok(Self { files, part, held_out })
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
        let image = read(self.path(index))?;
        let (width, height) = (image.width() as usize, image.height() as usize);
        let label = self.files.labels.get(self.part[index]).copied();
        Ok(Sample { width, height, rgb: image.into_raw(), label, mask: None })
    }

    fn classes(&self) -> usize {
        self.files.classes
    }

    fn describe(&self, index: usize) -> String {
        self.path(index).display().to_string()
    }

    fn fingerprint(&self) -> Option<String> {
        Some(self.files.fingerprint.clone())
    }

    fn held_out(&self) -> Option<Arc<dyn Dataset>> {
        self.held_out.clone().map(|part| part as Arc<dyn Dataset>)
    }
}

/// The image in a file, upright and in 8-bit RGB as a run sees it.
///
/// # Errors
/// If the file cannot be read, or is no whole image.
pub fn read(path: &Path) -> Result<RgbImage> {
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    // Decoders are written for damaged files, but one that panics must not end a run of days.
    let image = std::panic::catch_unwind(|| decode(bytes)).unwrap_or_else(|_| Err("its decoder panicked".into()));
    let broken = |problem| Error::content(path, problem, "mend or remove the file");
    Ok(image.map_err(broken)?.into_rgb8())
}

/// The upright image in a file of any supported format, whatever its name says.
fn decode(bytes: Vec<u8>) -> Result<DynamicImage, String> {
    if bytes.is_empty() {
        return Err("the file is empty".into());
    }
    let reader = ImageReader::new(BufReader::new(Cursor::new(bytes))).with_guessed_format();
    let mut reader = reader.map_err(|e| e.to_string())?;
    if reader.format().is_none() {
        return Err("the content is neither JPEG, PNG nor WebP".into());
    }
    let mut limits = Limits::default();
    limits.max_alloc = Some(16 * MAX_PIXELS);
    reader.limits(limits);
    let mut decoder = reader.into_decoder().map_err(|e| e.to_string())?;
    let (width, height) = decoder.dimensions();
    if u64::from(width) * u64::from(height) > MAX_PIXELS {
        return Err(format!("{width}x{height} pixels are more than the limit of {MAX_PIXELS}"));
    }
    // A damaged note of the orientation is no reason to lose the image.
    let orientation = decoder.orientation().ok();
    let mut image = DynamicImage::from_decoder(decoder).map_err(|e| e.to_string())?;
    if let Some(orientation) = orientation {
        image.apply_orientation(orientation);
    }
    Ok(image)
}

impl Files {
    fn list(root: &Path) -> Result<Self> {
        if !root.is_dir() {
            let problem = if root.exists() { "this is not a folder" } else { "there is no such folder" };
            let help = "set data.path to a folder of images; a relative path starts where the program is run";
            return Err(Error::content(root, problem, help));
        }
        let paths = list(root)?;
        let mut hash = blake3::Hasher::new();
        for path in &paths {
            let size = std::fs::metadata(path).map_err(Error::io("read", path))?.len();
            let inside = path.strip_prefix(root).expect("what is found in a folder begins with it");
            hash.update(inside.as_os_str().as_encoded_bytes()).update(&[0]).update(&size.to_le_bytes());
        }
        let (labels, classes) = classes(root, &paths);
        Ok(Self { paths, labels, classes, fingerprint: hash.finalize().to_hex().to_string() })
    }
}

/// The images in a folder and its sub-folders, sorted by path.
///
/// # Errors
/// If the folder cannot be read, or holds no image.
pub fn list(root: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in WalkDir::new(root).follow_links(true).sort_by_file_name() {
        let entry = entry.map_err(|e| {
            let path = e.path().unwrap_or(root).to_path_buf();
            Error::io("read", path)(e.into())
        })?;
        let extension = entry.path().extension().map(|e| e.to_string_lossy().to_ascii_lowercase());
        let known = extension.is_some_and(|e| EXTENSIONS.contains(&e.as_str()));
        if known && entry.file_type().is_file() {
            paths.push(entry.into_path());
        }
    }
    if paths.is_empty() {
        let help = format!("put images in it or in its sub-folders: files ending in {}", EXTENSIONS.join(", "));
        return Err(Error::content(root, "the folder holds no image", help));
    }
    Ok(paths)
}

/// The class of each path and how many there are: none unless every image lies in one of several sub-folders.
fn classes(root: &Path, paths: &[PathBuf]) -> (Vec<u32>, usize) {
    let folder = |path: &PathBuf| {
        let mut parts = path.strip_prefix(root).ok()?.components();
        let first = parts.next()?.as_os_str().to_os_string();
        parts.next().is_some().then_some(first)
    };
    let Some(folders) = paths.iter().map(folder).collect::<Option<Vec<_>>>() else {
        return (Vec::new(), 0);
    };
    let mut names = folders.clone();
    names.sort();
    names.dedup();
    if names.len() < 2 {
        return (Vec::new(), 0);
    }
    let label = |folder| names.binary_search(folder).expect("every folder is among the names") as u32;
    (folders.iter().map(label).collect(), names.len())
}
