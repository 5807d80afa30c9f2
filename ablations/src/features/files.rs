//! One image's features and pictures as files.

use std::fs::File;
use std::io::BufWriter;
use std::path::Path;

use dinolab_core::files::{read_tensors, write_tensors};
use dinolab_core::{Error, Result, Tensor};
use image::RgbImage;
use npyz::WriterBuilder;

use super::{Maps, Seen};
use crate::pictures::{map, png, scaled, to_colors, viridis, PatchView};

/// A file format for features.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// `features.safetensors` with `cls [D]` and `patches [H, W, D]`, f32.
    Safetensors,
    /// `cls.npy [D]` and `patches.npy [H, W, D]`, f32.
    Npy,
}

/// Writes CLS and patch features into `folder`; `metadata` goes where the format has a place for it.
///
/// # Errors
/// If a file cannot be written.
pub fn write_features(folder: &Path, seen: &Seen, format: Format, metadata: &[(&str, String)]) -> Result<()> {
    let narrow = |x: &[f64]| x.iter().map(|&x| x as f32).collect::<Vec<f32>>();
    let (cls, patches) = (narrow(&seen.cls), narrow(&seen.view.features));
    let shape = [seen.view.height, seen.view.width, seen.cls.len()];
    match format {
        Format::Safetensors => {
            let cls = Tensor::from_slice(&cls, &shape[2..])?;
            let tensors = [("cls".into(), cls), ("patches".into(), Tensor::from_slice(&patches, &shape)?)];
            write_tensors(&folder.join("features.safetensors"), &tensors, metadata)
        }
        Format::Npy => {
            write_npy(&folder.join("cls.npy"), &cls, &shape[2..])?;
            write_npy(&folder.join("patches.npy"), &patches, &shape)
        }
    }
}

fn write_npy(path: &Path, data: &[f32], shape: &[usize]) -> Result<()> {
    let shape: Vec<u64> = shape.iter().map(|&n| n as u64).collect();
    let write = || -> std::io::Result<()> {
        let options = npyz::WriteOptions::new().default_dtype().shape(&shape);
        let mut writer = options.writer(BufWriter::new(File::create(path)?)).begin_nd()?;
        writer.extend(data.iter().copied())?;
        writer.finish()
    };
    write().map_err(Error::io("write", path))
}

/// What was written of an image as one model sees it, read back: the image from its picture, the features from a file of
/// any format.
///
/// # Errors
/// If a file is not there, or not whole.
pub fn read_back(folder: &Path, format: Format) -> Result<Seen> {
    let path = folder.join("image.png");
    let broken = |e: &dyn std::fmt::Display| Error::content(&path, e.to_string(), "remove it");
    let image = image::open(&path).map_err(|e| broken(&e))?.into_rgb8();
    let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
    let (cls, patches, shape) = match format {
        Format::Safetensors => {
            let file = read_tensors(&folder.join("features.safetensors"))?;
            let get = |name: &str| file.get(name).ok_or_else(|| broken(&"features.safetensors is not whole"));
            let patches = get("patches")?;
            (wide(get("cls")?.as_slice::<f32>()), wide(patches.as_slice::<f32>()), patches.shape().to_vec())
        }
        Format::Npy => {
            let read = |name: &str| -> Result<(Vec<f32>, Vec<usize>)> {
                let path = folder.join(name);
                let bytes = std::fs::read(&path).map_err(Error::io("read", &path))?;
                let file = npyz::NpyFile::new(&bytes[..]).map_err(Error::io("read", &path))?;
                let shape = file.shape().iter().map(|&n| n as usize).collect();
                Ok((file.into_vec::<f32>().map_err(Error::io("read", &path))?, shape))
            };
            let (patches, shape) = read("patches.npy")?;
            (wide(&read("cls.npy")?.0), wide(&patches), shape)
        }
    };
    let [height, width, _] = shape[..] else { return Err(broken(&"its features are not [rows, columns, D]")) };
    Ok(Seen { view: PatchView { image, height, width, features: patches, foreground: None }, cls })
}

/// The pictures of one image by name, each of the image's size.
pub(super) fn pictures(seen: &Seen, maps: &Maps) -> Vec<(String, RgbImage)> {
    let view = &seen.view;
    let full = |colors: Vec<[u8; 3]>| scaled(&map(view.width, colors), view.image.dimensions());
    let cosine = |values: &[f64]| full(values.iter().map(|&v| viridis(v)).collect());
    let mut all = vec![("image".into(), view.image.clone()), ("pca".into(), full(to_colors(&maps.scores)))];
    for (patch, values) in &maps.similarity {
        all.push((format!("similarity_{}_{}", patch / view.width, patch % view.width), cosine(values)));
    }
    all.push(("cls".into(), cosine(&maps.cls)));
    all.push(("foreground".into(), dimmed(seen, &maps.foreground)));
    all
}

/// The image with its background at a quarter of the brightness.
fn dimmed(seen: &Seen, foreground: &[bool]) -> RgbImage {
    let view = &seen.view;
    let (ph, pw) = (view.image.height() as usize / view.height, view.image.width() as usize / view.width);
    RgbImage::from_fn(view.image.width(), view.image.height(), |x, y| {
        let pixel = view.image.get_pixel(x, y);
        match foreground[y as usize / ph * view.width + x as usize / pw] {
            true => *pixel,
            false => image::Rgb(pixel.0.map(|v| v / 4)),
        }
    })
}

/// Writes the pictures of one image into `folder`.
///
/// # Errors
/// If a file cannot be written.
pub fn write_pictures(folder: &Path, seen: &Seen, maps: &Maps) -> Result<()> {
    for (name, picture) in pictures(seen, maps) {
        save_png(&folder.join(format!("{name}.png")), &picture)?;
    }
    Ok(())
}

pub(super) fn save_png(path: &Path, picture: &RgbImage) -> Result<()> {
    let failed = |source| Error::Io { action: "write", path: path.into(), source };
    std::fs::write(path, png(picture)).map_err(failed)
}
