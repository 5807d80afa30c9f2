//! Films: frames in order, with the objects of some of them.

use std::path::{Path, PathBuf};

use dinolab_core::contract::{ImageSize, ProbeContext, Sample};
use dinolab_core::text::printable;
use dinolab_core::{Error, Result};

use walkdir::WalkDir;

use super::Tracking;
use crate::file_hashes::FileHasher;
use crate::image_folder::{list, read, read_mask};
use crate::pixels::resized;
use crate::probe_data::{middle, nearest_pixels};
use crate::scenes::{Scenes, ScenesConfig, Size};

/// A frame at the probe's size.
pub(super) struct Frame {
    pub image: Sample,
    /// The object of every pixel, 0 for the background, where it is known.
    pub objects: Option<Vec<u8>>,
}

/// Films that are drawn, or lie in a folder.
pub(super) enum Films {
    Drawn { scenes: Scenes, count: usize, length: usize },
    Files(Vec<Film>),
}

/// A film of a folder.
pub(super) struct Film {
    name: String,
    frames: Vec<(PathBuf, Option<PathBuf>)>,
}

/// A hash of the names, lengths and times of the files of a probe's folders.
pub(super) fn stamp(probe: &Tracking) -> Option<String> {
    let folders = [probe.frames.as_ref()?, probe.masks.as_ref()?];
    let mut hasher = FileHasher::default();
    for folder in folders {
        let files = WalkDir::new(folder).sort_by_file_name().into_iter().flatten().filter(|e| !e.file_type().is_dir());
        files.for_each(|file| _ = hasher.add(file.path().strip_prefix(folder).unwrap_or(file.path()), file.path()));
    }
    let hashes = hasher.finish();
    Some(hashes.content + &hashes.written)
}

impl Films {
    /// Those of a probe's keys.
    ///
    /// # Errors
    /// If a folder is missing, a film has too few frames, or a first frame has no mask.
    pub fn of(probe: &Tracking, context: &ProbeContext<'_>) -> Result<Self> {
        let (frames, masks) = match (&probe.frames, &probe.masks) {
            (None, None) => {
                let ImageSize { width, height } = context.image_size;
                let config = ScenesConfig { size: Size::Rectangle([width, height]), ..ScenesConfig::default() };
                let scenes = Scenes::new(&config, context.seed);
                return Ok(Self::Drawn { scenes, count: probe.films.get(), length: probe.length });
            }
            (Some(frames), Some(masks)) => (frames, masks),
            _ => {
                let problem = "probe `tracking`: of `frames` and `masks` only one is given";
                return Err(Error::user(problem, "give both folders, or neither"));
            }
        };
        let mut names: Vec<PathBuf> = Vec::new();
        for entry in std::fs::read_dir(frames).map_err(Error::io("read", frames))? {
            let path = entry.map_err(Error::io("read", frames))?.path();
            names.extend(path.is_dir().then_some(path));
        }
        names.sort();
        names.truncate(probe.films.get());
        let films = names.iter().map(|folder| Film::of(folder, masks)).collect::<Result<Vec<_>>>()?;
        let help = "it has a sub-folder of frames for every film, as JPEGImages/480p of DAVIS";
        match films.is_empty() {
            true => Err(Error::content(frames, "there is no film here", help)),
            false => Ok(Self::Files(films)),
        }
    }

    pub fn len(&self) -> usize {
        match self {
            Self::Drawn { count, .. } => *count,
            Self::Files(films) => films.len(),
        }
    }

    pub fn name(&self, film: usize) -> String {
        match self {
            Self::Drawn { .. } => format!("drawn film {film}"),
            Self::Files(films) => films[film].name.clone(),
        }
    }

    /// All frames of a film.
    ///
    /// # Errors
    /// If one cannot be read.
    pub fn read(&self, film: usize, size: ImageSize) -> Result<Vec<Frame>> {
        match self {
            Self::Drawn { scenes, length, .. } => {
                let frame = |sample: Sample| frame(sample, size);
                Ok(scenes.film(film, *length).into_iter().map(frame).collect())
            }
            Self::Files(films) => {
                films[film].frames.iter().map(|(image, mask)| load(image, mask.as_deref(), size)).collect()
            }
        }
    }
}

impl Film {
    fn of(folder: &Path, masks: &Path) -> Result<Self> {
        let name = folder.file_name().unwrap_or_default();
        let masks = masks.join(name);
        let mut images = list(folder, false)?.paths;
        images.sort();
        if images.len() < 3 {
            let problem = format!("{} frames are too few to follow anything", images.len());
            return Err(Error::content(folder, problem, "a film has three frames or more"));
        }
        let mask = |image: &PathBuf| masks.join(image.file_stem().unwrap_or_default()).with_extension("png");
        let frames: Vec<(PathBuf, Option<PathBuf>)> = images
            .into_iter()
            .map(|image| {
                let mask = Some(mask(&image)).filter(|mask| mask.is_file());
                (image, mask)
            })
            .collect();
        if frames[0].1.is_none() {
            let problem = "the first frame of this film has no mask";
            return Err(Error::content(mask(&frames[0].0), problem, "objects are followed from there: add it"));
        }
        Ok(Self { name: printable(name), frames })
    }
}

fn load(image: &Path, mask: Option<&Path>, size: ImageSize) -> Result<Frame> {
    let rgb = read(image, [255; 3])?;
    let (width, height) = (rgb.width() as usize, rgb.height() as usize);
    let mask = match mask {
        Some(path) => {
            let (mask, columns) = read_mask(path)?;
            if columns != width || mask.len() != width * height {
                let problem = format!("the mask has {columns} pixels in a row of {}, its frame {width}", mask.len());
                return Err(Error::content(path, problem, "a mask has the size of its frame"));
            }
            Some(mask)
        }
        None => None,
    };
    Ok(frame(Sample { width, height, pixels: rgb.into_raw().into(), mask, ..Sample::default() }, size))
}

/// A sample at a size, its mask by the nearest pixel.
fn frame(sample: Sample, size: ImageSize) -> Frame {
    let from = nearest_pixels(&sample, size);
    let objects = sample.mask.as_ref().map(|mask| (0..size.pixels()).map(|i| mask[from(i)]).collect());
    Frame { objects, image: resized(middle(sample, size), size) }
}
