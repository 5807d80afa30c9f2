//! Classes of pixels: PNG files beside images.

use std::fs::File;
use std::io::{BufRead, BufReader, Seek};
use std::path::{Path, PathBuf};

use dinolab_core::text::printable;
use dinolab_core::{Error, Result};
use rayon::prelude::*;

use super::decode::{affordable, check_turned};

/// What a pixel has that counts nowhere.
pub const IGNORED: u8 = 255;

/// What masks mean.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MaskConfig {
    /// The mask value of pixels to ignore ("void"); any other 255, and values above the classes, are errors.
    pub ignore: u8,
    /// Whether pixels of value 0 are ignored too and 1 is the first class: the convention of ADE20K.
    pub ignore_zero: bool,
    /// Names of the classes, in the order of their values. Without, all masks are read at the start to find how many there are.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub names: Vec<String>,
}

impl Default for MaskConfig {
    fn default() -> Self {
        Self { ignore: IGNORED, ignore_zero: false, names: Vec::new() }
    }
}

/// The masks of a dataset's images, in files of their own.
#[derive(Debug)]
pub(super) struct Masks {
    /// The file of each image.
    files: Vec<Option<PathBuf>>,
    pub classes: PixelClasses,
}

impl Masks {
    /// Those in these files, one an image or none.
    ///
    /// # Errors
    /// If there are too many classes, or, where classes have to be counted, a mask cannot be read.
    pub fn open(config: &MaskConfig, files: Vec<Option<PathBuf>>) -> Result<Self> {
        let classes = PixelClasses::of(config, files.len(), |index| files[index].as_deref().map(read).transpose())?;
        Ok(Self { files, classes })
    }

    /// All of them.
    pub fn files(&self) -> impl Iterator<Item = &PathBuf> {
        self.files.iter().flatten()
    }

    /// The classes of the pixels of image `index`, of that size, and of its file.
    ///
    /// # Errors
    /// If the file is missing or damaged, or [`PixelClasses::classify`] refuses it.
    pub fn read(&self, index: usize, size: [usize; 2], (image, bytes): (&Path, &[u8])) -> Result<Option<Vec<u8>>> {
        let Some(path) = &self.files[index] else { return Ok(None) };
        let (values, width) = read(path)?;
        check_turned(bytes, image, size, [width, values.len() / width], path)?;
        self.classes.classify((values, width), size, path, image).map(Some)
    }
}

/// Which classes the pixels of a dataset have.
#[derive(Debug)]
pub(crate) struct PixelClasses {
    config: MaskConfig,
    /// How many there are.
    count: usize,
    /// How many masks were read to count them.
    read: Option<usize>,
}

impl PixelClasses {
    /// Those of `images` masks; `read` gives the values of one and their width, or none.
    ///
    /// # Errors
    /// If there are too many classes, or, where classes have to be counted, a mask cannot be read.
    pub fn of(
        config: &MaskConfig,
        images: usize,
        read: impl Fn(usize) -> Result<Option<(Vec<u8>, usize)>> + Sync,
    ) -> Result<Self> {
        let (count, read) = match config.names.len() {
            0 => {
                let (greatest, masks) = greatest(config, images, read)?;
                (greatest.map_or(0, |class| usize::from(class) + 1), Some(masks))
            }
            n if n > usize::from(IGNORED) => {
                let problem = format!("{n} names of pixel classes, and a mask of 8 bits has room for {IGNORED}");
                return Err(Error::user(problem, "name fewer classes in data.mask.names"));
            }
            n => (n, None),
        };
        Ok(Self { config: config.clone(), count, read })
    }

    pub fn count(&self) -> usize {
        self.count
    }

    pub fn names(&self) -> &[String] {
        &self.config.names
    }

    /// How the classes were found, if that may surprise.
    pub fn note(&self) -> Option<String> {
        let n = self.read?;
        Some(format!("{} read to count the pixel classes: {} (data.mask.names names them)", masks(n), self.count))
    }

    /// The classes of the pixels of a mask, of values and their width. It lies at `path` and belongs to an image of `size` (width,
    /// height).
    ///
    /// # Errors
    /// If it is of another size, or has a class that is not known.
    pub fn classify(
        &self,
        (values, width): (Vec<u8>, usize),
        size: [usize; 2],
        path: &Path,
        image: &Path,
    ) -> Result<Vec<u8>> {
        let height = values.len() / width;
        if [width, height] != size {
            let [w, h] = size;
            let problem = format!("the mask has {width}x{height} pixels, and its image {} {w}x{h}", printable(image));
            return Err(Error::content(path, problem, "make it of the image's size, by nearest neighbours"));
        }
        let mut classes = Vec::with_capacity(values.len());
        for (i, value) in values.into_iter().enumerate() {
            let class = class(&self.config, value);
            if class.is_some_and(|class| usize::from(class) >= self.count) {
                let (x, y) = (i % width, i / width);
                let problem = format!(
                    "pixel ({x}, {y}) has the value {value}, which is none of the {} classes and is not ignored ({})",
                    self.count, self.config.ignore
                );
                return Err(Error::content(path, problem, "correct the mask, or data.mask.names or data.mask.ignore"));
            }
            classes.push(class.unwrap_or(IGNORED));
        }
        Ok(classes)
    }
}

/// The class of a value; none if it is ignored.
fn class(config: &MaskConfig, value: u8) -> Option<u8> {
    match value {
        v if v == config.ignore => None,
        v if config.ignore_zero => v.checked_sub(1),
        v => Some(v),
    }
}

/// The greatest class in any mask, and the number of masks.
fn greatest(
    config: &MaskConfig,
    images: usize,
    read: impl Fn(usize) -> Result<Option<(Vec<u8>, usize)>> + Sync,
) -> Result<(Option<u8>, usize)> {
    let of = |index: usize| -> Result<(Option<u8>, usize)> {
        let Some((values, _)) = read(index)? else { return Ok((None, 0)) };
        Ok((values.into_iter().filter_map(|value| class(config, value)).max(), 1))
    };
    let all = (0..images).into_par_iter().map(of);
    let (greatest, masks) = all.try_reduce(|| (None, 0), |a, b| Ok((a.0.max(b.0), a.1 + b.1)))?;
    if greatest == Some(IGNORED) {
        let help = "set data.mask.ignore to the value that counts nowhere";
        return Err(Error::user(format!("a mask has the class {IGNORED}, which dinolab ignores"), help));
    }
    Ok((greatest, masks))
}

fn masks(n: usize) -> String {
    if n == 1 {
        "1 mask".into()
    } else {
        format!("{n} masks")
    }
}

/// The values of a PNG of one channel as they are stored, palettes unused, and its width.
pub(crate) fn read(path: &Path) -> Result<(Vec<u8>, usize)> {
    decode(BufReader::new(File::open(path).map_err(Error::io("read", path))?), path)
}

/// The same of what lies at `path` in a larger file.
pub(crate) fn decode(file: impl BufRead + Seek, path: &Path) -> Result<(Vec<u8>, usize)> {
    let broken = |e: png::DecodingError| Error::content(path, e.to_string(), "a mask is a PNG: mend or replace it");
    let mut decoder = png::Decoder::new(file);
    decoder.set_transformations(png::Transformations::IDENTITY);
    let mut reader = decoder.read_info().map_err(broken)?;
    let (info, bits) = (reader.info(), reader.info().bit_depth as usize);
    if !matches!(info.color_type, png::ColorType::Indexed | png::ColorType::Grayscale) || bits > 8 {
        let problem =
            format!("it is a PNG of {:?} in {bits} bits a channel, which says no class a pixel", info.color_type);
        let help = "a mask is indexed or grey in 8 bits or fewer: its values, not its colours, are the classes";
        return Err(Error::content(path, problem, help));
    }
    let (width, height) = (info.width as usize, info.height as usize);
    let too_large = || Error::content(path, "it is too large to be decoded", "make it of the image's size");
    affordable(width as u64, height as u64)
        .map_err(|refused| Error::content(path, refused.problem, "make it of the image's size"))?;
    let mut bytes = vec![0; reader.output_buffer_size().ok_or_else(too_large)?];
    let frame = reader.next_frame(&mut bytes).map_err(broken)?;
    if bits == 8 {
        bytes.truncate(width * height);
        return Ok((bytes, width));
    }
    // Rows begin with a byte; the first pixel has its highest bits.
    let pixel = |row: &[u8], x: usize| row[x * bits / 8] >> (8 - bits - x * bits % 8) & ((1 << bits) - 1);
    let rows = bytes.chunks(frame.line_size).take(height);
    Ok((rows.flat_map(|row| (0..width).map(move |x| pixel(row, x))).collect(), width))
}
