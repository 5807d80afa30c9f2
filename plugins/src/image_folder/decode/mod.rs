//! The picture in a file: whole, upright, in 8-bit RGB or as many channels and bits as are wanted; or why there is none.
//!
//! Training, probes and `dinolab features` see an image through [`read`] alone. It is what Pillow (libjpeg-turbo, libpng,
//! libwebp) sees, to within the rounding of a decoder, or an error: data that ran out or was damaged is never filled up.
//! Files are not trusted: sizes are checked before memory is taken, and what is no regular file is never opened.

mod array;
mod content;
mod jpeg;
mod pixels;
mod png;
mod tiff;
mod turned;
mod webp;

use std::fs::File;
use std::io::{Cursor, Read};
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use dinolab_core::contract::Sample;
use dinolab_core::{Error, Result};
use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits, RgbImage, RgbaImage};

pub(crate) use turned::check_turned;

/// More pixels than this are refused before they are decoded (Pillow's limit for "decompression bombs").
const MOST_PIXELS: u64 = 178_956_970;
/// A larger file is no image of so many pixels.
const MOST_BYTES: u64 = 1 << 30;
/// Bytes that tell what a file is.
const HEAD: usize = 512;
/// Bytes that a pixel takes at most while it is decoded: four numbers of 16 bits, and what is made of them.
const BYTES_A_PIXEL: u64 = 16;

/// Why a file gives no picture, and what to do.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub problem: String,
    pub help: &'static str,
}

impl Refusal {
    fn unsupported(problem: impl Into<String>) -> Self {
        let help =
            "save it anew as JPEG, PNG, WebP, TIFF or BMP with any image program, such as `magick old.jpg new.png`";
        Self { problem: problem.into(), help }
    }
}

/// A file that is damaged.
impl<T: Into<String>> From<T> for Refusal {
    fn from(problem: T) -> Self {
        Self { problem: problem.into(), help: "mend or remove the file" }
    }
}

/// The image in a file, upright and in 8-bit RGB as a run sees it; what is transparent lies on `background`.
///
/// # Errors
/// If the file cannot be read, or holds no whole image.
pub fn read(path: &Path, background: [u8; 3]) -> Result<RgbImage> {
    let bytes = load(path, false, |Refusal { problem, help }| Error::content(path, problem, help))?;
    guarded(path, || decode(&bytes, background, &Known::default()))
}

/// The content of a file that was found to be whole, so that it need not be found again in every epoch.
#[derive(Debug, Default)]
pub(crate) struct Known(AtomicU64);

impl Known {
    fn hash(bytes: &[u8]) -> u64 {
        let [first, ..] = *blake3::hash(bytes).as_bytes().as_chunks::<8>().0 else { unreachable!("it has 32 bytes") };
        u64::from_le_bytes(first)
    }

    fn holds(&self, hash: u64) -> bool {
        self.0.load(Ordering::Relaxed) == hash
    }

    fn set(&self, hash: u64) {
        self.0.store(hash, Ordering::Relaxed);
    }
}

/// What images are read as.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// Values of a pixel. For 3 what is in a file becomes RGB; for any other number it has to have as many.
    pub channels: usize,
    /// Whether values of 16 bits are kept; else they are rounded to 8.
    pub wide: bool,
    /// What transparent images lie on where they become RGB.
    pub background: [u8; 3],
}

impl Wanted {
    /// As the keys of a dataset say it: `bits` of 8 or 16, by default 8 for RGB and 16 for any other number of channels.
    pub fn new(channels: usize, bits: Option<u8>, background: [u8; 3]) -> Self {
        Self { channels, wide: bits.map_or(channels != 3, |bits| bits == 16), background }
    }

    /// Whether `.npy` files are images: not where everything becomes 8-bit RGB.
    pub fn takes_arrays(&self) -> bool {
        self.channels != 3 || self.wide
    }
}

/// The image in a file, upright, as it is wanted.
///
/// # Errors
/// If the file cannot be read, holds no whole image, or one of another number of channels.
pub fn read_as(path: &Path, wanted: &Wanted) -> Result<Sample> {
    read_again(path, wanted, &Known::default()).map(|(image, _)| image)
}

/// As [`read_as`], of a file that may be `known`; with the file's bytes.
pub(super) fn read_again(path: &Path, wanted: &Wanted, known: &Known) -> Result<(Sample, Vec<u8>)> {
    let bytes = load(path, wanted.takes_arrays(), |Refusal { problem, help }| Error::content(path, problem, help))?;
    Ok((read_bytes(path, &bytes, wanted, known)?, bytes))
}

/// The image in the bytes of a file, that `path` names for messages; its content may be `known`.
///
/// # Errors
/// If they are no whole image.
pub(crate) fn read_bytes(path: &Path, bytes: &[u8], wanted: &Wanted, known: &Known) -> Result<Sample> {
    guarded(path, || decode_as(bytes, wanted, known))
}

/// The image in a file, upright, with its opacity.
///
/// # Errors
/// If the file cannot be read, or holds no whole image.
pub(crate) fn read_rgba(path: &Path) -> Result<RgbaImage> {
    let bytes = load(path, false, |Refusal { problem, help }| Error::content(path, problem, help))?;
    let convert = |image| pixels::to_rgba8(image).map(DynamicImage::from);
    guarded(path, || upright(&bytes, &Known::default(), convert).map(DynamicImage::into_rgba8))
}

/// What `decode` makes of the file `path`. Decoders are written for damaged files, but one that panics must not end a run of days.
fn guarded<T>(path: &Path, decode: impl FnOnce() -> Result<T, Refusal>) -> Result<T> {
    let image = std::panic::catch_unwind(AssertUnwindSafe(decode));
    let image = image.unwrap_or_else(|_| Err("its decoder panicked".into()));
    image.map_err(|Refusal { problem, help }| Error::content(path, problem, help))
}

/// The bytes of an image file, or of an array where `arrays` are images. Its first ones are looked at before the others are read.
fn load(path: &Path, arrays: bool, refused: impl Fn(Refusal) -> Error) -> Result<Vec<u8>> {
    let found = std::fs::metadata(path).map_err(Error::io("read", path))?;
    // To open a pipe is to wait for one who writes.
    if !found.is_file() {
        return Err(refused("it is no regular file".into()));
    }
    let mut file = File::open(path).map_err(Error::io("read", path))?;
    let mut bytes = Vec::new();
    (&mut file).take(HEAD as u64).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    if !(arrays && content::is_array(&bytes)) {
        content::format(&bytes).map_err(&refused)?;
    }
    if found.len() > MOST_BYTES {
        return Err(refused(format!("{} bytes are more than the limit of {MOST_BYTES}", found.len()).into()));
    }
    bytes.try_reserve_exact((found.len() as usize).saturating_sub(bytes.len())).map_err(|_| refused(no_memory()))?;
    file.take(MOST_BYTES).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    Ok(bytes)
}

/// The picture in the bytes of a file, as it is wanted.
fn decode_as(bytes: &[u8], wanted: &Wanted, known: &Known) -> Result<Sample, Refusal> {
    if !wanted.takes_arrays() {
        let image = decode(bytes, wanted.background, known)?;
        return Ok(pixels::sample((image.width(), image.height()), image.into_raw()));
    }
    if content::is_array(bytes) {
        return array::read(bytes, wanted);
    }
    let format = content::format(bytes)?;
    if wanted.channels != 3 && format == ImageFormat::Tiff {
        tiff::check(bytes)?;
        return tiff::read(bytes, wanted);
    }
    let palette = format == ImageFormat::Gif || (format == ImageFormat::Png && png::is_palette(bytes));
    if wanted.channels != 3 && palette {
        let help = "save it with its channels as they are, without a palette, or leave it out";
        return Err(Refusal { problem: "its pixels are numbers of a palette's colours".into(), help });
    }
    let grey = wanted.channels == 1 && format == ImageFormat::Jpeg && jpeg::is_grey(bytes)?;
    let untripled = |image: DynamicImage| Ok(if grey { image.into_luma8().into() } else { image });
    pixels::as_wanted(upright(bytes, known, untripled)?, wanted)
}

/// Fails if an image has another number of channels than are wanted.
fn check_channels(found: usize, what: &str, wanted: &Wanted) -> Result<(), Refusal> {
    if found == wanted.channels {
        return Ok(());
    }
    let help = match wanted.channels {
        1 => "make it grey (`magick old.png -colorspace Gray new.png`), or set data.channels to what the images have",
        _ => "set data.channels to what the images have, or leave out those of another number",
    };
    let problem = format!("it has {found} channels{what}, and data.channels is {}: {help}", wanted.channels);
    Err(Refusal { problem, help })
}

/// The picture in the bytes of a file, on `background`.
fn decode(bytes: &[u8], background: [u8; 3], known: &Known) -> Result<RgbImage, Refusal> {
    let convert = |image| pixels::to_rgb8(image, background).map(DynamicImage::from);
    upright(bytes, known, convert).map(DynamicImage::into_rgb8)
}

/// The picture in the bytes of a file of any supported format, whatever its name says, converted and turned upright.
fn upright(
    bytes: &[u8],
    known: &Known,
    convert: impl FnOnce(DynamicImage) -> Result<DynamicImage, Refusal>,
) -> Result<DynamicImage, Refusal> {
    let format = content::format(bytes)?;
    let (image, orientation) = match format {
        ImageFormat::Jpeg => {
            let hash = Known::hash(bytes);
            let found = jpeg::decode(bytes, known.holds(hash))?;
            known.set(hash);
            (found.0, found.1.and_then(|exif| of_exif(exif.as_ref())))
        }
        ImageFormat::Png => (whole(bytes, format)?.0, png::exif(bytes)?.and_then(|exif| of_exif(&exif))),
        ImageFormat::WebP => (whole(bytes, format)?.0, webp::exif(bytes)?.and_then(|exif| of_exif(&exif))),
        ImageFormat::Tiff => {
            tiff::check(bytes)?;
            let (image, orientation) = whole(bytes, format)?;
            (if tiff::is_associated(bytes) { pixels::straight(image) } else { image }, orientation)
        }
        _ => (whole(bytes, format)?.0, None),
    };
    pixels::check_whole_numbers(&image)?;
    let mut image = convert(image)?;
    if let Some(orientation) = orientation {
        image.apply_orientation(orientation);
    }
    Ok(image)
}

/// How the picture is turned. A damaged note of it is no reason to lose the image.
fn of_exif(exif: &[u8]) -> Option<Orientation> {
    Orientation::from_exif_chunk(exif)
}

/// The picture of any format but JPEG, and how it is turned where the format itself says it.
fn whole(bytes: &[u8], format: ImageFormat) -> Result<(DynamicImage, Option<Orientation>), Refusal> {
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut limits = Limits::default();
    limits.max_alloc = Some(BYTES_A_PIXEL * MOST_PIXELS);
    reader.limits(limits);
    let mut decoder = reader.into_decoder().map_err(|e| e.to_string())?;
    let (width, height) = decoder.dimensions();
    affordable(width.into(), height.into())?;
    let orientation = decoder.orientation().ok();
    Ok((DynamicImage::from_decoder(decoder).map_err(|e| e.to_string())?, orientation))
}

/// Fails if an image has too many pixels, or there is no memory for them. Decoders take theirs without asking.
pub(super) fn affordable(width: u64, height: u64) -> Result<(), Refusal> {
    let pixels = width.saturating_mul(height);
    if pixels > MOST_PIXELS {
        let problem = format!("{width}x{height} pixels are more than the limit of {MOST_PIXELS}");
        let help =
            "cut it into tiles (`gdal_retile.py -ps 4096 4096`, or `magick scene.png -crop 4096x4096 tile_%d.png`): \
            a crop is a part of one image, and of a smaller image it shows the same";
        return Err(Refusal { problem, help });
    }
    Vec::<u8>::new().try_reserve_exact((pixels * BYTES_A_PIXEL) as usize).map_err(|_| no_memory())
}

fn no_memory() -> Refusal {
    let help = "make it smaller, or give the program more memory: fewer loader threads hold fewer images";
    Refusal { problem: "there is not enough memory to decode it".into(), help }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dinolab_core::proptest::{self, prelude::*};

    fn encoded(format: ImageFormat, image: &DynamicImage) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        image.write_to(&mut bytes, format).expect("it is encoded");
        bytes.into_inner()
    }

    /// Good files.
    fn wholes() -> &'static [Vec<u8>] {
        static FILES: std::sync::OnceLock<Vec<Vec<u8>>> = std::sync::OnceLock::new();
        FILES.get_or_init(encode_all)
    }

    #[test]
    fn colours_of_a_tiff_that_are_multiplied_by_the_opacity_are_told_from_others() {
        use ::tiff::encoder::{colortype::RGBA8, TiffEncoder};
        let first = |extra: u16| {
            let mut bytes = Cursor::new(Vec::new());
            let mut encoder = TiffEncoder::new(&mut bytes).unwrap();
            let mut image = encoder.new_image::<RGBA8>(3, 2).unwrap();
            // What the fourth sample is: 2 an opacity that colours are not multiplied by, 1 one that they are.
            image.encoder().write_tag(::tiff::tags::Tag::ExtraSamples, &[extra][..]).unwrap();
            image.write_data(&[100, 60, 0, 128].repeat(6)).unwrap();
            decode(bytes.get_ref(), [200; 3], &Known::default()).unwrap().get_pixel(0, 0).0
        };
        let over = |c: u8, opacity: f64| (f64::from(c) * opacity + 200.0 * (127.0 / 255.0)).round() as u8;
        for (extra, opacity) in [(2, 128.0 / 255.0), (1, 1.0)] {
            let (found, expected) = (first(extra), [100, 60, 0].map(|c| over(c, opacity)));
            assert!(found.iter().zip(expected).all(|(a, b)| a.abs_diff(b) <= 1), "{extra}: {found:?}, {expected:?}");
        }
    }

    fn encode_all() -> Vec<Vec<u8>> {
        let image = RgbImage::from_fn(29, 23, |x, y| image::Rgb([(x * 9) as u8, (y * 11) as u8, (x * y) as u8]));
        let image = DynamicImage::from(image);
        let kinds = [image.clone(), image.to_luma8().into(), image.to_rgba8().into(), image.to_rgb16().into()];
        let mut files: Vec<Vec<u8>> = kinds.iter().map(|kind| encoded(ImageFormat::Png, kind)).collect();
        files.extend(kinds[..3].iter().map(|kind| encoded(ImageFormat::WebP, kind)));
        files.extend(kinds[..2].iter().map(|kind| encoded(ImageFormat::Jpeg, kind)));
        files.extend(kinds.iter().map(|kind| encoded(ImageFormat::Tiff, kind)));
        files.extend(kinds[..3].iter().map(|kind| encoded(ImageFormat::Bmp, kind)));
        files.push(encoded(ImageFormat::Gif, &kinds[2]));
        files
    }

    #[test]
    fn a_known_file_gives_the_same_picture_and_another_content_is_walked() {
        let jpeg = &wholes()[7];
        let known = Known::default();
        let first = decode(jpeg, [255; 3], &known).unwrap();
        assert!(known.holds(Known::hash(jpeg)));
        assert_eq!(decode(jpeg, [255; 3], &known).unwrap(), first);
        let cut = &jpeg[..jpeg.len() - 40];
        assert!(decode(cut, [255; 3], &known).is_err(), "it is not the content that is known");
        assert!(known.holds(Known::hash(jpeg)) && !known.holds(Known::hash(cut)));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// A decoder's own panic would be caught by [`read`]; here it fails the test.
        #[test]
        fn no_bytes_end_or_hang_the_program(
            which in 0..17usize,
            flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
            cut in any::<prop::sample::Index>(),
            keep in any::<bool>(),
        ) {
            let mut bytes = wholes()[which].clone();
            let whole = bytes.clone();
            for (at, value) in flips {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            if !keep {
                bytes.truncate(cut.index(bytes.len()));
            }
            for channels in [1, 3, 4] {
                let wanted = Wanted::new(channels, Some(16), [255; 3]);
                match decode_as(&bytes, &wanted, &Known::default()) {
                    Ok(image) => prop_assert_eq!(image.pixels.len(), channels * image.width * image.height),
                    Err(refusal) => prop_assert!(!refusal.problem.is_empty()),
                }
            }
            match decode(&bytes, [255; 3], &Known::default()) {
                Ok(image) => prop_assert!(image.width() > 0 && image.height() > 0),
                Err(refusal) => prop_assert!(bytes != whole && !refusal.problem.is_empty()),
            }
        }

        #[test]
        fn noise_behind_any_beginning_is_refused(start in 0..17usize, length in 0..40usize, noise: Vec<u8>) {
            let mut bytes = wholes()[start].clone();
            bytes.truncate(length);
            bytes.extend(noise);
            prop_assert!(decode(&bytes, [255; 3], &Known::default()).is_err());
        }
    }
}
