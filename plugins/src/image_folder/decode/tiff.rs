//! What the decoder of TIFF leaves open: compressions whose decoders fill what is missing, where the data lie, and channels beyond
//! colours.

use std::borrow::Cow;
use std::io::Cursor;

use dinolab_core::contract::Sample;
use tiff::decoder::{Decoder, DecodingResult, Limits};
use tiff::tags::{ByteOrder, CompressionMethod, PhotometricInterpretation, PlanarConfiguration, Tag, Type};

use super::{affordable, check_channels, no_memory, pixels, Refusal, Wanted};

/// Fails if the first picture of a TIFF is compressed in a way that cannot be checked, or its data lie beyond the end.
pub(super) fn check(bytes: &[u8]) -> Result<(), Refusal> {
    let mut decoder = Decoder::new(Cursor::new(bytes)).map_err(|e| e.to_string())?;
    let compression = decoder.find_tag_unsigned(Tag::Compression).map_err(|e| e.to_string())?.unwrap_or(1);
    let method = CompressionMethod::from_u16(compression);
    use CompressionMethod::{Deflate, None as Plain, OldDeflate, PackBits, LZW};
    if !matches!(method, Some(Plain | LZW | Deflate | OldDeflate | PackBits)) {
        let name = method.map_or_else(|| format!("number {compression}"), |method| format!("{method:?}"));
        let help = "save it anew with LZW or Deflate, such as `magick old.tif -compress zip new.tif`";
        return Err(Refusal { problem: format!("it is a TIFF in the compression {name}, which is not read"), help });
    }
    let mut numbers = |tag| decoder.find_tag_unsigned_vec::<u64>(tag).map_err(|e| e.to_string());
    for (offsets, counts) in [(Tag::StripOffsets, Tag::StripByteCounts), (Tag::TileOffsets, Tag::TileByteCounts)] {
        let (Some(offsets), Some(counts)) = (numbers(offsets)?, numbers(counts)?) else { continue };
        let end = offsets.iter().zip(&counts).map(|(at, count)| at.saturating_add(*count)).max().unwrap_or(0);
        if end > bytes.len() as u64 {
            return Err("the file is cut short".into());
        }
    }
    Ok(())
}

/// Whether the colours of the first picture of a TIFF are multiplied by its opacity.
pub(super) fn is_associated(bytes: &[u8]) -> bool {
    let extra = |mut decoder: Decoder<_>| decoder.find_tag_unsigned_vec::<u16>(Tag::ExtraSamples);
    Decoder::new(Cursor::new(bytes))
        .and_then(extra)
        .is_ok_and(|extra| extra.is_some_and(|extra| extra.first() == Some(&1)))
}

/// The first picture of a TIFF with every sample of its pixels, whatever they are said to mean.
pub(super) fn read(bytes: &[u8], wanted: &Wanted) -> Result<Sample, Refusal> {
    let text = |e: tiff::TiffError| Refusal::from(e.to_string());
    let bytes = as_samples(bytes)?;
    let mut decoder = Decoder::new(Cursor::new(&bytes[..])).map_err(text)?;
    let (width, height) = decoder.dimensions().map_err(text)?;
    affordable(width.into(), height.into())?;
    let mut number = |tag| decoder.find_tag_unsigned::<u16>(tag).map_err(text).map(|found| found.unwrap_or(1));
    let (samples, orientation, planar) =
        (number(Tag::SamplesPerPixel)?, number(Tag::Orientation)?, number(Tag::PlanarConfiguration)?);
    check_channels(samples.into(), "", wanted)?;
    if orientation != 1 {
        let help = "turn it before, such as `magick old.tif -auto-orient new.tif`";
        return Err(Refusal { problem: "it is to be turned (tag Orientation), which is not done here".into(), help });
    }
    let n = usize::from(samples);
    let values = width as usize * height as usize * n;
    // Two bytes each, and what is made of them.
    Vec::<u8>::new().try_reserve_exact(4 * values).map_err(|_| no_memory())?;
    let mut limits = Limits::default();
    limits.decoding_buffer_size = 8 * values;
    let mut decoder = decoder.with_limits(limits);
    let mut result = DecodingResult::U8(Vec::new());
    decoder.read_image_to_buffer(&mut result).map_err(text)?;
    let by_plane = n > 1 && planar == PlanarConfiguration::Planar.to_u16();
    let found = result.as_buffer(0).as_bytes().len();
    match result {
        DecodingResult::U8(_) if found != values => {
            let help = "save it with 8 or 16 bits a sample, such as `gdal_translate -ot Byte`";
            Err(Refusal { problem: "its samples have fewer than 8 bits".into(), help })
        }
        DecodingResult::U8(values) => Ok(pixels::sample((width, height), interleaved(values, n, by_plane))),
        DecodingResult::U16(values) => {
            Ok(pixels::sample((width, height), pixels::narrowed(interleaved(values, n, by_plane), wanted)))
        }
        _ => Err(pixels::no_whole_numbers()),
    }
}

/// Values plane by plane to pixel by pixel.
fn interleaved<T: Copy>(values: Vec<T>, channels: usize, by_plane: bool) -> Vec<T> {
    let n = values.len() / channels;
    match by_plane {
        true => (0..values.len()).map(|i| values[i % channels * n + i / channels]).collect(),
        false => values,
    }
}

/// The file as one of samples without a meaning: of colours the decoder would give three or four samples and drop the others.
fn as_samples(bytes: &[u8]) -> Result<Cow<'_, [u8]>, Refusal> {
    let text = |e: tiff::TiffError| Refusal::from(e.to_string());
    let mut decoder = Decoder::new(Cursor::new(bytes)).map_err(text)?;
    let meaning = decoder.find_tag_unsigned::<u16>(Tag::PhotometricInterpretation).map_err(text)?;
    let meaning = meaning.and_then(PhotometricInterpretation::from_u16);
    use PhotometricInterpretation::{BlackIsZero, RGBPalette, WhiteIsZero};
    match meaning {
        None | Some(BlackIsZero | WhiteIsZero) => return Ok(bytes.into()),
        Some(RGBPalette) => {
            let help = "write its values out, such as `gdal_translate -expand rgb` or `magick old.tif -type TrueColor new.tif`";
            return Err(Refusal { problem: "its values are places in a palette".into(), help });
        }
        Some(_) => {}
    }
    // An entry is tag, type, count and value; in a large file (BigTIFF) count and value have 8 bytes.
    let big = bytes.get(2..4).is_some_and(|version| version.contains(&43));
    let (head, entry, value) = if big { (8, 20, 12) } else { (2, 12, 8) };
    let little = decoder.byte_order() == ByteOrder::LittleEndian;
    let short = |x: u16| if little { x.to_le_bytes() } else { x.to_be_bytes() };
    let long = |x: u32| if little { x.to_le_bytes() } else { x.to_be_bytes() };
    let first = decoder.ifd_pointer().map_or(0, |at| at.0) as usize;
    let mut bytes = bytes.to_vec();
    let entries = (first.saturating_add(head)..bytes.len().saturating_sub(entry)).step_by(entry);
    let tag = short(Tag::PhotometricInterpretation.to_u16());
    let Some(at) = entries.into_iter().find(|&at| bytes[at..at + 2] == tag) else {
        return Err("the file is cut short".into());
    };
    // The meaning is a SHORT, and some writers make it a LONG.
    let meaning = BlackIsZero.to_u16();
    match bytes[at + 2..at + 4] == short(Type::LONG.to_u16()) {
        true => bytes[at + value..at + value + 4].copy_from_slice(&long(meaning.into())),
        false => bytes[at + value..at + value + 2].copy_from_slice(&short(meaning)),
    }
    Ok(bytes.into())
}
