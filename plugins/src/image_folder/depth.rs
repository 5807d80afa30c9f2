//! Distances of pixels: 16-bit PNG files or arrays beside images.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use dinolab_core::text::printable;
use dinolab_core::{Error, Result};

use super::decode::{affordable, check_turned};
use super::npy;

/// The depths of a dataset's images.
#[derive(Debug)]
pub(super) struct Depths {
    /// Metres of a unit of whole numbers.
    scale: f64,
    /// The file of each image.
    files: Vec<Option<PathBuf>>,
}

impl Depths {
    /// Those in these files, one an image or none.
    pub fn of(scale: f64, files: Vec<Option<PathBuf>>) -> Self {
        Self { scale, files }
    }

    /// All of them.
    pub fn files(&self) -> impl Iterator<Item = &PathBuf> {
        self.files.iter().flatten()
    }

    /// The distance of every pixel of image `index`, which has that size, in metres; 0 where it is not known.
    ///
    /// # Errors
    /// If the file is missing or damaged, holds no depth, or is of another size.
    pub fn read(&self, index: usize, size: [usize; 2], (image, bytes): (&Path, &[u8])) -> Result<Option<Vec<f32>>> {
        let Some(path) = &self.files[index] else { return Ok(None) };
        let (mut values, [width, height], whole) = match path.extension().is_some_and(|e| e.eq_ignore_ascii_case("npy"))
        {
            true => {
                let array = npy::read(path)?;
                let size = match array.shape[..] {
                    [height, width] | [height, width, 1] | [1, height, width] => [width, height],
                    _ => {
                        let problem = format!("an array of the shape {:?} is no depth", array.shape);
                        return Err(Error::content(path, problem, "save [height, width]"));
                    }
                };
                (array.values, size, array.greatest.is_some())
            }
            false => {
                let (values, size) = read_png(path)?;
                (values.into_iter().map(f32::from).collect(), size, true)
            }
        };
        check_turned(bytes, image, size, [width, height], path)?;
        if [width, height] != size {
            let [w, h] = size;
            let problem = format!("the depth has {width}x{height} pixels, and its image {} {w}x{h}", printable(image));
            return Err(Error::content(path, problem, "make it of the image's size, by nearest neighbours"));
        }
        for value in &mut values {
            let metres = if whole { f64::from(*value) * self.scale } else { f64::from(*value) } as f32;
            *value = if metres.is_finite() && metres > 0.0 { metres } else { 0.0 };
        }
        Ok(Some(values))
    }
}

/// The values of a grey PNG of 8 or 16 bits as they are stored, row by row, and [width, height].
///
/// # Errors
/// If the file cannot be read, is damaged, or is a PNG of another kind.
fn read_png(path: &Path) -> Result<(Vec<u16>, [usize; 2])> {
    let file = File::open(path).map_err(Error::io("read", path))?;
    let broken =
        |e: png::DecodingError| Error::content(path, e.to_string(), "a depth is a grey PNG: mend or replace it");
    let mut decoder = png::Decoder::new(BufReader::new(file));
    decoder.set_transformations(png::Transformations::IDENTITY);
    let mut reader = decoder.read_info().map_err(broken)?;
    let (info, bits) = (reader.info(), reader.info().bit_depth as usize);
    let size = [info.width as usize, info.height as usize];
    if info.color_type != png::ColorType::Grayscale || bits < 8 {
        let problem = format!("it is a PNG of {:?} in {bits} bits a channel, which says no depth", info.color_type);
        return Err(Error::content(path, problem, "a depth is a grey PNG of 16 bits, or a .npy of [height, width]"));
    }
    let too_large = || Error::content(path, "it is too large to be decoded", "make it of the image's size");
    affordable(size[0] as u64, size[1] as u64)
        .map_err(|refused| Error::content(path, refused.problem, "make it of the image's size"))?;
    let mut bytes = vec![0; reader.output_buffer_size().ok_or_else(too_large)?];
    reader.next_frame(&mut bytes).map_err(broken)?;
    let values = match bits {
        8 => bytes.into_iter().map(u16::from).collect(),
        _ => bytes.as_chunks().0.iter().map(|&pair| u16::from_be_bytes(pair)).collect(),
    };
    Ok((values, size))
}
