//! Images that are arrays of NumPy.

use dinolab_core::contract::Sample;

use super::super::npy;
use super::{affordable, check_channels, pixels, Refusal, Wanted};

/// The image in the bytes of a `.npy` file: `[height, width, channels]` or `[height, width]`, of u8 or u16.
pub(super) fn read(bytes: &[u8], wanted: &Wanted) -> Result<Sample, Refusal> {
    let npy::Array { shape, values, greatest } =
        npy::parse(bytes).map_err(|(problem, help)| Refusal { problem, help })?;
    let (height, width, channels) = match shape[..] {
        [height, width] => (height, width, 1),
        [height, width, channels] => (height, width, channels),
        _ => {
            let help = "save [height, width, channels] or [height, width]";
            return Err(Refusal { problem: format!("an array of the shape {shape:?} is no image"), help });
        }
    };
    affordable(width as u64, height as u64)?;
    let first = channels != wanted.channels && height == wanted.channels;
    check_channels(
        channels,
        if first { " (the last axis; numpy.moveaxis(array, 0, -1) puts the first there)" } else { "" },
        wanted,
    )?;
    let size = (width as u32, height as u32);
    match greatest {
        Some(255.0) => Ok(pixels::sample(size, values.into_iter().map(|x| x as u8).collect::<Vec<_>>())),
        Some(65535.0) => {
            Ok(pixels::sample(size, pixels::narrowed(values.into_iter().map(|x| x as u16).collect(), wanted)))
        }
        _ => {
            let help = "save numpy.uint8 or numpy.uint16: an image has a least and a greatest value";
            Err(Refusal { problem: "its numbers are neither u8 nor u16".into(), help })
        }
    }
}
