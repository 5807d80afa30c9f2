//! The files that scenes are composed of: which there are, who may use them, and their pixels at the size that is needed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use dinolab_core::data::Order;
use dinolab_core::text::printable;
use dinolab_core::{Error, Result};
use image::imageops::{crop_imm, FilterType};
use image::{RgbImage, RgbaImage};

use crate::file_hashes::{FileHasher, Hashes};
use crate::image_folder::labels::folders;
use crate::image_folder::{decode, list, Listing, BACKGROUND};
use crate::pixels::{rgb_resized, rgba_resized};

/// Bytes of pixels that are kept between scenes; what does not fit is read anew.
const KEPT: usize = 256 << 20;
/// Classes that a mask of 8 bits has room for, beside the background.
const MOST_CLASSES: usize = 254;

/// All files, and those that were read.
#[derive(Debug)]
pub(super) struct Source {
    classes: Vec<String>,
    /// Of each class, the cut-outs to train on and those of held-out scenes.
    cut_outs: Vec<[Vec<usize>; 2]>,
    /// The photographs to train on and those of held-out scenes.
    backgrounds: [Vec<usize>; 2],
    cut: Files<RgbaImage>,
    photo: Files<RgbImage>,
    /// The longest side of a cut-out in pixels.
    largest: u32,
    /// What a photograph has to cover.
    cover: [u32; 2],
    notes: Vec<String>,
    hashes: Hashes,
}

/// Files, and the pixels of those that were read and fit into memory.
#[derive(Debug)]
struct Files<T> {
    paths: Vec<PathBuf>,
    read: Vec<OnceLock<Arc<T>>>,
    bytes: AtomicUsize,
}

impl<T> Files<T> {
    fn of(paths: Vec<PathBuf>) -> Self {
        let read = paths.iter().map(|_| OnceLock::new()).collect();
        Self { paths, read, bytes: AtomicUsize::new(0) }
    }

    /// The pixels of a file: what `read` gives, `bytes` of them.
    fn get(&self, file: usize, bytes: impl Fn(&T) -> usize, read: impl Fn(&Path) -> Result<T>) -> Result<Arc<T>> {
        if let Some(pixels) = self.read[file].get() {
            return Ok(pixels.clone());
        }
        let pixels = Arc::new(read(&self.paths[file])?);
        if self.bytes.fetch_add(bytes(&pixels), Ordering::Relaxed) < KEPT / 2 {
            // Two threads that read it at once read the same.
            drop(self.read[file].set(pixels.clone()));
        }
        Ok(pixels)
    }
}

impl Source {
    /// Lists both folders and sets a share of every class, and of the photographs, aside.
    ///
    /// # Errors
    /// Those of [`CutOuts::open`](super::CutOuts::open).
    pub fn open(cut_outs: &Path, backgrounds: &Path, aside: f64, largest: u32, cover: [u32; 2]) -> Result<Self> {
        let [cut, photo] = [(cut_outs, "data.path"), (backgrounds, "data.backgrounds")].map(|(root, key)| {
            if root.is_dir() {
                return list(root, false);
            }
            let problem = if root.exists() { "this is not a folder" } else { "there is no such folder" };
            Err(Error::content(root, problem, format!("set {key} to a folder of images")))
        });
        let (Listing { paths: cut, mut notes }, Listing { paths: photo, notes: others }) = (cut?, photo?);
        notes.extend(others);
        let mut of_class: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for (file, path) in cut.iter().enumerate() {
            let Some(class) = folders(cut_outs, path).next() else {
                let help = "put every cut-out into a sub-folder, whose name is its class";
                return Err(Error::content(path, "the cut-out lies in no sub-folder", help));
            };
            of_class.entry(printable(class)).or_default().push(file);
        }
        if of_class.len() > MOST_CLASSES {
            let problem = format!("{} sub-folders are more classes than a mask has room for", of_class.len());
            return Err(Error::content(cut_outs, problem, format!("have at most {MOST_CLASSES}")));
        }
        let mut shared = Vec::new();
        let mut parts = |name: &str, files: Vec<usize>| {
            if aside > 0.0 && files.len() == 1 {
                shared.push(name.to_string());
            }
            divide(files, aside)
        };
        let backgrounds_of = parts("the photographs", (0..photo.len()).collect());
        let (classes, cut_outs_of) = of_class
            .into_iter()
            .map(|(name, files)| {
                let files = parts(&name, files);
                (name, files)
            })
            .unzip();
        if !shared.is_empty() {
            let named = shared.join(", ");
            notes.push(format!("one file alone, which scenes to train on and held-out ones share: {named}"));
        }
        let mut hasher = FileHasher::default();
        for (root, path) in cut.iter().map(|path| (cut_outs, path)).chain(photo.iter().map(|path| (backgrounds, path)))
        {
            hasher.add(path.strip_prefix(root).unwrap_or(path), path);
        }
        Ok(Self {
            classes,
            cut_outs: cut_outs_of,
            backgrounds: backgrounds_of,
            cut: Files::of(cut),
            photo: Files::of(photo),
            largest,
            cover,
            notes,
            hashes: hasher.finish(),
        })
    }

    pub fn classes(&self) -> &[String] {
        &self.classes
    }

    /// The cut-outs of a class that scenes of `part` have.
    pub fn cut_outs(&self, class: usize, part: usize) -> &[usize] {
        &self.cut_outs[class][part]
    }

    /// The photographs that scenes of `part` have.
    pub fn backgrounds(&self, part: usize) -> &[usize] {
        &self.backgrounds[part]
    }

    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    pub fn hashes(&self) -> &Hashes {
        &self.hashes
    }

    /// A cut-out: what is opaque of it, no larger than is needed, colours times opacity.
    ///
    /// # Errors
    /// If the file is no whole image, or nothing or all of it is opaque.
    pub fn cut_out(&self, file: usize) -> Result<Arc<RgbaImage>> {
        self.cut.get(file, |image| image.as_raw().len(), |path| read_cut_out(path, self.largest))
    }

    /// A photograph, no larger than is needed.
    ///
    /// # Errors
    /// If the file is no whole image.
    pub fn background(&self, file: usize) -> Result<Arc<RgbImage>> {
        let read = |path: &Path| {
            let image = decode::read(path, BACKGROUND)?;
            let scale = |side: u32, need: u32| f64::from(need) / f64::from(side);
            let factor = scale(image.width(), self.cover[0]).max(scale(image.height(), self.cover[1]));
            if factor >= 1.0 {
                return Ok(image);
            }
            let [width, height] = [image.width(), image.height()].map(|side| (f64::from(side) * factor).ceil() as u32);
            Ok(rgb_resized(image, width, height, FilterType::Triangle))
        };
        self.photo.get(file, |image| image.as_raw().len(), read)
    }
}

/// Files to train on and a share of them that is set aside, at least one of each; both have a single one.
fn divide(files: Vec<usize>, share: f64) -> [Vec<usize>; 2] {
    let n = files.len();
    if share == 0.0 || n < 2 {
        return [files.clone(), files];
    }
    let aside = ((n as f64 * share).round() as usize).clamp(1, n - 1);
    // Not of the run's seed, so that runs with several seeds share the division.
    let order = Order::new(0, n);
    let mut held_out: Vec<usize> = (0..n as u64).map(|i| files[order.sample(i)]).collect();
    let mut train = held_out.split_off(aside);
    train.sort_unstable();
    held_out.sort_unstable();
    [train, held_out]
}

fn read_cut_out(path: &Path, largest: u32) -> Result<RgbaImage> {
    let mut image = decode::read_rgba(path)?;
    let opaque = || image.enumerate_pixels().filter(|(_, _, pixel)| pixel.0[3] > 127);
    let wrong = |problem: &str| {
        let help = "a cut-out is a PNG, WebP or GIF that is transparent around the object: mend or remove it";
        Error::content(path, problem, help)
    };
    if image.pixels().all(|pixel| pixel.0[3] > 127) {
        return Err(wrong("no pixel of it is transparent"));
    }
    let bounds = opaque().fold(None, |bounds, (x, y, _)| {
        let [left, top, right, bottom] = bounds.unwrap_or([x, y, x, y]);
        Some([left.min(x), top.min(y), right.max(x), bottom.max(y)])
    });
    let Some([left, top, right, bottom]) = bounds else { return Err(wrong("all of it is transparent")) };
    for pixel in image.pixels_mut() {
        let alpha = u32::from(pixel.0[3]);
        (0..3).for_each(|c| pixel.0[c] = ((u32::from(pixel.0[c]) * alpha + 127) / 255) as u8);
    }
    let image = crop_imm(&image, left, top, right - left + 1, bottom - top + 1).to_image();
    let factor = f64::from(largest) / f64::from(image.width().max(image.height()));
    if factor >= 1.0 {
        return Ok(image);
    }
    let [width, height] =
        [image.width(), image.height()].map(|side| (f64::from(side) * factor).round().max(1.0) as u32);
    Ok(rgba_resized(image, width, height, FilterType::Triangle))
}
