//! How a published model wants its pixels: `preprocessor_config.json`.

use std::path::Path;

use dinolab_core::weights::{JsonTable, Preprocessing};
use dinolab_core::Result;
use serde::Deserialize;

/// The file, beside the weights.
pub(crate) const FILE: &str = "preprocessor_config.json";

/// A number for all channels, or one for each.
#[derive(Deserialize)]
#[serde(untagged, expecting = "a number, or a list with one for every channel")]
enum Channels {
    One(f64),
    Each(Vec<f64>),
}

/// Keys that say how images are brought to a size, which dinolab does in its own way, and what the file is of.
const HARMLESS: [&str; 28] = [
    "image_processor_type",
    "feature_extractor_type",
    "processor_class",
    "transformers_version",
    "_valid_processor_keys",
    "_processor_class",
    "do_resize",
    "size",
    "size_divisor",
    "default_to_square",
    "resample",
    "interpolation",
    "antialias",
    "do_center_crop",
    "crop_size",
    "crop_pct",
    "do_pad",
    "pad_size",
    "do_convert_rgb",
    "data_format",
    "input_data_format",
    "image_seq_length",
    "return_tensors",
    "device",
    "disable_grouping",
    "num_channels",
    "image_size",
    "do_reduce_labels",
];

/// Mean and standard deviation of pixels in [0, 1], as the file beside `weights` says them. What it leaves to defaults, or
/// is not there, is said in `notes`.
///
/// A processor computes `(factor * x - mean) / std` of x in 0..255; dinolab `(x / 255 - mean') / std'`.
///
/// # Errors
/// If the file says something that dinolab does not know, or that makes no sense.
pub(crate) fn pixels(
    weights: &Path,
    mut pixels: Preprocessing,
    channels: usize,
    satellite: bool,
    notes: &mut Vec<String>,
) -> Result<Preprocessing> {
    if channels != pixels.channels() {
        // Nothing is known of them.
        (pixels.mean, pixels.std) = (vec![0.5; channels], vec![0.5; channels]);
    }
    let Some(file) = super::beside(weights, FILE) else {
        notes.push(assumed(&format!("there is no {FILE}"), &pixels, satellite));
        return Ok(pixels);
    };
    let mut keys = JsonTable::read(&file)?;
    keys.harmless(&HARMLESS);
    if keys.take("do_flip_channel_order")? == Some(true) {
        return Err(keys.wrong("do_flip_channel_order", "dinolab's pixels are in the order RGB", super::names::DINOV3));
    }
    let factor = match keys.take("do_rescale")? {
        Some(false) => {
            keys.harmless(&["rescale_factor"]);
            1.0
        }
        _ => keys.take::<f64>("rescale_factor")?.unwrap_or(1.0 / 255.0),
    };
    if !(factor.is_finite() && factor > 0.0) {
        return Err(keys.wrong(
            "rescale_factor",
            format!("{factor} makes no pixels"),
            "it is 1/255 in published files",
        ));
    }
    // Values of 16 bits are read as shares of 65535, as those of 8 bits are of 255.
    let wide = (factor * f64::from(u16::MAX) - 1.0).abs() < 1e-9;
    let unit = if wide { 1.0 } else { 255.0 * factor };
    let each = |value: Option<Channels>| match value? {
        Channels::One(x) => Some(vec![x; channels]),
        Channels::Each(x) => Some(x),
    };
    if keys.take("do_normalize")? == Some(false) {
        keys.harmless(&["image_mean", "image_std"]);
        keys.finish()?;
        return Ok(Preprocessing { mean: vec![0.0; channels], std: vec![(1.0 / unit) as f32; channels], ..pixels });
    }
    let mean = each(keys.take("image_mean")?);
    let std = each(keys.take("image_std")?);
    for (key, value) in [("image_mean", &mean), ("image_std", &std)] {
        if let Some(value) = value.as_ref().filter(|value| value.len() != channels) {
            let problem = format!("it has {} numbers, and the model sees {channels} channels", value.len());
            return Err(keys.wrong(key, problem, "give one number for every channel"));
        }
        // What the keys `crops.mean` and `crops.std` take.
        let least = if key == "image_std" { 1e-3 } else { 0.0 };
        let inside = |x: &f64| (least..=1.0).contains(&(x / unit));
        if let Some(value) = value.as_ref().filter(|value| !value.iter().all(inside)) {
            let problem = format!("{value:?} is outside what pixels from 0 to {} can have", as_number(unit));
            let help = match value.iter().all(|x| (least..=1.0).contains(&(x / unit / 255.0))) {
                true => "these are numbers of pixels from 0 to 255: divide them by 255, or set do_rescale to false",
                false => "correct it; ImageNet's are [0.485, 0.456, 0.406] and [0.229, 0.224, 0.225]",
            };
            return Err(keys.wrong(key, problem, help));
        }
    }
    keys.finish()?;
    let scaled = |value: Vec<f64>| value.into_iter().map(|x| (x / unit) as f32).collect();
    let given = [("image_mean", mean.is_some()), ("image_std", std.is_some())];
    let missing: Vec<&str> = given.iter().filter(|(_, given)| !given).map(|(key, _)| *key).collect();
    let found = Preprocessing { mean: mean.map_or(pixels.mean, scaled), std: std.map_or(pixels.std, scaled), ..pixels };
    if !missing.is_empty() {
        notes.push(assumed(&format!("{FILE} has no {}", missing.join(" and no ")), &found, satellite));
    }
    Ok(found)
}

fn as_number(x: f64) -> String {
    // 255 * (1 / 255) is 1, give or take a rounding.
    if (x - 1.0).abs() < 1e-9 {
        "1".into()
    } else {
        format!("{x}")
    }
}

/// That mean and standard deviation are a guess, and where to set others.
fn assumed(because: &str, pixels: &Preprocessing, satellite: bool) -> String {
    let Preprocessing { mean, std, .. } = pixels;
    let whose = if pixels.channels() == 3 { "ImageNet's" } else { "a guess" };
    let also = match satellite {
        true => {
            "; a norm of local crops is what the satellite models have: theirs are [0.430, 0.411, 0.296] and [0.213, 0.156, \
            0.143]"
        }
        false => "",
    };
    format!(
        "{because}, so the pixels' mean {mean:?} and standard deviation {std:?} ({whose}) are assumed{also}: if others \
        are right, set `mean` and `std` under [crops] of weights.toml, or crops.mean and crops.std of a recipe"
    )
}
