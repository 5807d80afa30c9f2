//! From what a file holds to what is wanted: 8-bit RGB, or its channels as they are.

use dinolab_core::contract::{Pixels, Sample};
use image::{DynamicImage, ImageBuffer, RgbImage, RgbaImage};

use super::{check_channels, Refusal, Wanted};

/// Values of 16 bits that all lie below this hold 12 bits or fewer, and would be black in 8.
const SCAN: u16 = 1 << 12;

/// The image in 8-bit RGB: grey tripled, 16 bits rounded to 8, what is transparent on `background`.
///
/// # Errors
/// If it holds 16 bits and uses so few of them that it would be black.
pub(super) fn to_rgb8(image: DynamicImage, background: [u8; 3]) -> Result<RgbImage, Refusal> {
    let (width, height) = (image.width(), image.height());
    let raw = match image {
        DynamicImage::ImageRgb8(image) => return Ok(image),
        DynamicImage::ImageLuma8(image) => image.as_raw().iter().flat_map(|&grey| [grey; 3]).collect(),
        DynamicImage::ImageLumaA8(image) => over(image.as_raw(), |&[l, a]: &[u8; 2]| ([l; 3], a), background),
        DynamicImage::ImageRgba8(image) => over(image.as_raw(), |&[r, g, b, a]: &[u8; 4]| ([r, g, b], a), background),
        wide => {
            bright_enough(&wide)?;
            let alpha = wide.color().has_alpha();
            let narrow = if alpha { DynamicImage::from(wide.into_rgba8()) } else { wide.into_rgb8().into() };
            return to_rgb8(narrow, background);
        }
    };
    Ok(ImageBuffer::from_raw(width, height, raw).expect("every pixel became three bytes"))
}

/// What is said of samples that are floats or have a sign: nothing tells where black and white are.
pub(super) fn no_whole_numbers() -> Refusal {
    let help = "save it as whole numbers of 8 or 16 bits without a sign, such as `gdal_translate -ot UInt16 -scale`";
    Refusal { problem: "its samples are no whole numbers of 8 or 16 bits".into(), help }
}

/// Fails if the image has floats.
pub(super) fn check_whole_numbers(image: &DynamicImage) -> Result<(), Refusal> {
    match image {
        DynamicImage::ImageRgb32F(_) | DynamicImage::ImageRgba32F(_) => Err(no_whole_numbers()),
        _ => Ok(()),
    }
}

/// The image in 8 bits with its opacity.
///
/// # Errors
/// As [`to_rgb8`].
pub(super) fn to_rgba8(image: DynamicImage) -> Result<RgbaImage, Refusal> {
    bright_enough(&image)?;
    Ok(image.into_rgba8())
}

/// A sample of an image.
pub(super) fn sample((width, height): (u32, u32), pixels: impl Into<Pixels>) -> Sample {
    Sample { width: width as usize, height: height as usize, pixels: pixels.into(), ..Sample::default() }
}

/// Values of 16 bits, rounded to 8 where no more are wanted.
pub(super) fn narrowed(values: Vec<u16>, wanted: &Wanted) -> Pixels {
    match wanted.wide {
        true => values.into(),
        false => values.into_iter().map(|x| ((u32::from(x) + 128) / 257) as u8).collect::<Vec<u8>>().into(),
    }
}

/// The image in the wanted channels, where these are not 8-bit RGB.
///
/// # Errors
/// If it has another number of channels, where they are not 3.
pub(super) fn as_wanted(image: DynamicImage, wanted: &Wanted) -> Result<Sample, Refusal> {
    let (size, color) = ((image.width(), image.height()), image.color());
    let wide = color.bytes_per_pixel() > color.channel_count();
    if wanted.channels == 3 {
        return Ok(match (wide, color.has_alpha()) {
            (false, _) => sample(size, to_rgb8(image, wanted.background)?.into_raw()),
            (true, false) => sample(size, image.into_rgb16().into_raw()),
            (true, true) => sample(size, over_16(image.into_rgba16().as_raw(), wanted.background)),
        });
    }
    let what = match color.channel_count() {
        1 => " (grey)",
        2 => " (grey and opacity)",
        3 => " (red, green and blue)",
        _ => " (red, green, blue and opacity)",
    };
    check_channels(color.channel_count().into(), what, wanted)?;
    if color.channel_count() == 2 {
        let help = "take its opacity off, such as `magick old.png -alpha off new.png`";
        return Err(Refusal { problem: "it is grey with opacity, which is no image of two channels".into(), help });
    }
    Ok(match image {
        DynamicImage::ImageLuma8(image) => sample(size, image.into_raw()),
        DynamicImage::ImageRgba8(image) => sample(size, image.into_raw()),
        DynamicImage::ImageLuma16(image) => sample(size, narrowed(image.into_raw(), wanted)),
        DynamicImage::ImageRgba16(image) => sample(size, narrowed(image.into_raw(), wanted)),
        other => return Err(format!("{:?} is no image of whole numbers", other.color()).into()),
    })
}

/// An image whose colours are multiplied by its opacity, with colours as they are beside it.
pub(super) fn straight(mut image: DynamicImage) -> DynamicImage {
    fn divide<const N: usize, T: Copy + Into<u64> + TryFrom<u64>>(raw: &mut [T], whole: u64) {
        for pixel in raw.as_chunks_mut::<N>().0 {
            let (alpha, colours) = pixel.split_last_mut().expect("it has an opacity");
            let alpha = (*alpha).into();
            for colour in colours {
                let straight = ((*colour).into() * whole + alpha / 2).checked_div(alpha).unwrap_or(0).min(whole);
                *colour = T::try_from(straight).ok().expect("at most the greatest value");
            }
        }
    }
    match &mut image {
        DynamicImage::ImageLumaA8(image) => divide::<2, u8>(image, 255),
        DynamicImage::ImageRgba8(image) => divide::<4, u8>(image, 255),
        DynamicImage::ImageLumaA16(image) => divide::<2, u16>(image, 65535),
        DynamicImage::ImageRgba16(image) => divide::<4, u16>(image, 65535),
        _ => {}
    }
    image
}

/// Colours and opacity of 16 bits over a background of 8.
fn over_16(raw: &[u16], background: [u8; 3]) -> Vec<u16> {
    let mut out = Vec::with_capacity(raw.len() / 4 * 3);
    for &[r, g, b, alpha] in raw.as_chunks::<4>().0 {
        let mixed = |(x, under): (u16, u8)| {
            let (x, alpha, under) = (u64::from(x), u64::from(alpha), 257 * u64::from(under));
            ((x * alpha + under * (65535 - alpha) + 32767) / 65535) as u16
        };
        out.extend([r, g, b].into_iter().zip(background).map(mixed));
    }
    out
}

/// Pixels of colours and opacity over a background.
fn over<const N: usize>(raw: &[u8], split: fn(&[u8; N]) -> ([u8; 3], u8), background: [u8; 3]) -> Vec<u8> {
    let mut out = Vec::with_capacity(raw.len() / N * 3);
    for pixel in raw.as_chunks::<N>().0 {
        let (colours, alpha) = split(pixel);
        let alpha = u32::from(alpha);
        let mixed = |i: usize| (u32::from(colours[i]) * alpha + u32::from(background[i]) * (255 - alpha) + 127) / 255;
        out.extend((0..3).map(|i| mixed(i) as u8));
    }
    out
}

/// Fails if an image of 16 bits holds fewer, as scanners and cameras write them.
fn bright_enough(image: &DynamicImage) -> Result<(), Refusal> {
    let channels = usize::from(image.color().channel_count());
    let colours = channels - usize::from(image.color().has_alpha());
    let Some(values) = (match image {
        DynamicImage::ImageLuma16(image) => Some(image.as_raw()),
        DynamicImage::ImageLumaA16(image) => Some(image.as_raw()),
        DynamicImage::ImageRgb16(image) => Some(image.as_raw()),
        DynamicImage::ImageRgba16(image) => Some(image.as_raw()),
        _ => None,
    }) else {
        return Ok(());
    };
    let values = || values.chunks_exact(channels).flat_map(|pixel| &pixel[..colours]);
    let most = values().copied().max().unwrap_or(0);
    // A picture of 8 bits that was stretched to 16 is as dark as it was.
    let stretched = || values().all(|v| v % 257 == 0);
    if most == 0 || most >= SCAN || stretched() {
        return Ok(());
    }
    let problem =
        format!("its values of 16 bits go up to {most} only, of 65535: it holds fewer bits, and would be black");
    let help =
        "stretch such files to 16 bits before, all by the same factor: `magick old.png -evaluate multiply 16 new.png` \
        for 12 bits";
    Err(Refusal { problem, help })
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{Luma, LumaA, Rgba};

    #[test]
    fn what_is_transparent_shows_the_background_and_nothing_of_its_own() {
        let hidden = ImageBuffer::from_pixel(2, 1, Rgba([200u8, 10, 99, 0]));
        let half = ImageBuffer::from_pixel(2, 1, LumaA([100u8, 128]));
        let white = to_rgb8(hidden.clone().into(), [255; 3]).unwrap();
        assert_eq!(white.as_raw(), &[255; 6]);
        assert_eq!(to_rgb8(hidden.into(), [1, 2, 3]).unwrap().as_raw(), &[1, 2, 3, 1, 2, 3]);
        assert_eq!(to_rgb8(half.into(), [255; 3]).unwrap().as_raw(), &[177; 6]);
    }

    #[test]
    fn floats_are_refused_whatever_they_go_up_to() {
        let white = image::Rgb32FImage::from_pixel(2, 1, image::Rgb([255.0, 3.0, 1.0]));
        assert!(check_whole_numbers(&white.into()).unwrap_err().problem.contains("no whole numbers"));
        assert!(check_whole_numbers(&DynamicImage::new_rgb16(2, 1)).is_ok());
    }

    #[test]
    fn a_scan_of_12_bits_is_refused_and_a_dark_picture_is_not() {
        let grey = |value: fn(u32) -> u16| DynamicImage::from(ImageBuffer::from_fn(64, 1, |x, _| Luma([value(x)])));
        assert!(to_rgb8(grey(|x| (x * 60) as u16), [255; 3]).unwrap_err().problem.contains("go up to 3780"));
        for fine in [grey(|_| 0), grey(|x| (x / 8 * 257) as u16), grey(|x| (x * 1000) as u16)] {
            assert!(to_rgb8(fine, [255; 3]).is_ok());
        }
    }

    #[test]
    fn colours_that_are_multiplied_by_the_opacity_lie_over_a_background_once() {
        let straight_8 =
            RgbaImage::from_raw(4, 1, vec![200, 100, 0, 255, 200, 100, 0, 128, 9, 9, 9, 0, 250, 60, 3, 77]);
        let straight_8 = straight_8.unwrap();
        let multiplied = RgbaImage::from_fn(4, 1, |x, y| {
            let [r, g, b, a] = straight_8.get_pixel(x, y).0;
            let of = |c: u8| ((u32::from(c) * u32::from(a) + 127) / 255) as u8;
            Rgba([of(r), of(g), of(b), a])
        });
        let on_grey = |image: DynamicImage| to_rgb8(image, [90; 3]).unwrap().into_raw();
        let (expected, found) = (on_grey(straight_8.into()), on_grey(straight(multiplied.clone().into())));
        assert!(expected.iter().zip(&found).all(|(a, b)| a.abs_diff(*b) <= 1), "{expected:?} {found:?}");
        let wide = straight(DynamicImage::from(multiplied).into_rgba16().into());
        assert!(expected.iter().zip(on_grey(wide)).all(|(a, b)| a.abs_diff(b) <= 1));
    }
}
