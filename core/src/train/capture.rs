//! A step that was not finite, in a file: weights before it, its batches, and the recipe. `replay` runs it again.

use std::path::{Path, PathBuf};

use crate::checkpoint::{Checkpoint, Content};
use crate::contract::{BatchImage, CropBox};
use crate::data::{Batch, Masks};
use crate::files::{read_tensors, write_tensors, NamedTensors, TensorFiles};
use crate::recipe::{Overrides, RawRecipe, Recipe};
use crate::resolved::Resolved;
use crate::step::{Learner, Report};
use crate::{Device, Error, Result, Tensor};

use super::folder::RunFolder;

/// Writes the capture of the step after `step` steps, after which there is this content, of a run that went back so many times;
/// gives its path.
pub(super) fn write(
    folder: &RunFolder,
    content: Content,
    resolved: &Resolved,
    (step, rewinds): (u64, u64),
    batches: &[Batch],
) -> Result<PathBuf> {
    let captures = folder.path().join("captures");
    std::fs::create_dir_all(&captures).map_err(Error::io("create", &captures))?;
    // The step may have failed before the run went back, with other images.
    let again = if rewinds > 0 { format!("-rewind-{rewinds}") } else { String::new() };
    let path = captures.join(format!("step-{:08}{again}.safetensors", step + 1));
    // The step that failed was counted as skipped; what is captured is the state before it.
    let skipped = content.skipped - 1;
    let mut tensors = content.model;
    tensors.extend(content.optimizer);
    for (i, batch) in batches.iter().enumerate() {
        let mut put = |name: &str, tensor: &Tensor| {
            // Crops of a bf16 step are kept as f32, which every device takes.
            let host = tensor.to(Device::Cpu);
            let wide = host.cast(host.dtype().wide()).expect("real types can be widened");
            tensors.push((format!("batch.{i}.{name}"), wide));
        };
        put("global", &batch.global);
        batch.local.iter().for_each(|t| put("local", t));
        batch.teacher.iter().for_each(|t| put("teacher", t));
        batch.further.iter().for_each(|(name, t)| put(&format!("further.{name}"), t));
        put("masks", &batch.masks.masks);
        put("indices", &batch.masks.indices);
        put("unmasked", &batch.masks.unmasked);
        put("weights", &batch.masks.weights);
        put("labels", &batch.labels);
        batch.fields.iter().for_each(|(name, field)| put(&format!("fields.{name}"), field));
        let mut list = |name: &str, of: &dyn Fn(&BatchImage) -> usize| -> Result<()> {
            let numbers: Vec<u32> = batch.sources.iter().map(|image| of(image) as u32).collect();
            put(name, &Tensor::from_slice(&numbers, &[numbers.len()])?);
            Ok(())
        };
        list("samples", &|image| image.index)?;
        list("places", &|image| image.place)?;
        for (name, boxes) in [("globals", 0), ("locals", 1)] {
            let of = |image: &BatchImage| [&image.globals, &image.locals][boxes].clone();
            let numbers: Vec<f64> = batch.sources.iter().flat_map(of).flat_map(numbers_of).collect();
            put(&format!("boxes.{name}"), &Tensor::from_slice(&numbers, &[numbers.len() / BOX, BOX])?);
        }
    }
    let metadata = [
        ("recipe", resolved.to_toml()),
        ("step", step.to_string()),
        ("skipped", skipped.to_string()),
        ("batches", batches.len().to_string()),
    ];
    write_tensors(&path, &tensors, &metadata)?;
    Ok(path)
}

/// Numbers of a crop's box.
const BOX: usize = 5;

fn numbers_of(crop: CropBox) -> [f64; BOX] {
    [crop.x, crop.y, crop.width, crop.height, f64::from(u8::from(crop.flip))]
}

/// Runs a captured step again, on another device if `overrides` says so, and gives its recipe, its number (the first step is 1)
/// and its report.
///
/// # Errors
/// If the file is not a capture, or was made by plugins that are not here.
pub fn replay(path: &Path, overrides: &Overrides) -> Result<(Recipe, u64, Report)> {
    let tensors = read_tensors(path)?;
    let help = "name a file of a run's captures/ folder";
    let meta = |key: &str| {
        tensors.metadata.get(key).ok_or_else(|| Error::content(path, format!("no `{key}`: not a capture"), help))
    };
    let number = |key: &str| -> Result<u64> {
        meta(key)?.parse().map_err(|_| Error::content(path, format!("`{key}` is not a number"), help))
    };
    let recipe = Resolved::of(RawRecipe::from_text(meta("recipe")?)?.with(overrides)?)?.recipe;
    let (step, skipped, count) = (number("step")?, number("skipped")?, number("batches")?);
    let mut batches = (0..count).map(|i| read_batch(&tensors, i, path)).collect::<Result<Vec<_>>>()?;
    let masked: f64 = batches.iter().map(|batch| batch.masks.share).sum();
    batches.iter_mut().for_each(|batch| batch.masks.share = masked / count as f64);
    let [model, optimizer] = [TensorFiles::open(path)?, TensorFiles::open(path)?];
    let checkpoint = Checkpoint { path: path.into(), step, skipped, model, optimizer };
    let mut learner = Learner::from_checkpoint(&recipe, &checkpoint)?;
    let report = learner.step(step, &batches, true)?;
    Ok((recipe, step + 1, report))
}

fn read_batch(tensors: &NamedTensors, i: u64, path: &Path) -> Result<Batch> {
    let prefix = format!("batch.{i}.");
    let optional = |name: &str| tensors.get(&format!("{prefix}{name}")).cloned();
    let get = |name: &str| {
        optional(name).ok_or_else(|| Error::content(path, format!("no batch.{i}.{name}"), "capture again"))
    };
    let indices = get("indices")?;
    Ok(Batch {
        global: get("global")?,
        local: optional("local"),
        // Earlier versions captured them as `gram`.
        teacher: optional("teacher").or_else(|| optional("gram")),
        further: tensors.with_prefix(&format!("{prefix}further.")),
        masks: Masks {
            masks: get("masks")?,
            share: indices.len() as f64,
            indices,
            unmasked: get("unmasked")?,
            weights: get("weights")?,
        },
        labels: get("labels")?,
        fields: tensors.with_prefix(&format!("{prefix}fields.")),
        sources: read_sources(&get("samples")?, &optional),
    })
}

/// The images of a captured batch; older captures do not say where crops were cut.
fn read_sources(samples: &Tensor, optional: &dyn Fn(&str) -> Option<Tensor>) -> Vec<BatchImage> {
    let samples = samples.as_slice::<u32>();
    let places = optional("places").map(|places| places.as_slice::<u32>().to_vec());
    let boxes = |name: &str| {
        let numbers = optional(name).map(|boxes| boxes.to_f64_vec()).unwrap_or_default();
        let of_crop = |n: &[f64]| CropBox { x: n[0], y: n[1], width: n[2], height: n[3], flip: n[4] != 0.0 };
        numbers.chunks_exact(BOX).map(of_crop).collect::<Vec<_>>()
    };
    let (globals, locals) = (boxes("boxes.globals"), boxes("boxes.locals"));
    let of_image = |boxes: &[CropBox], i: usize| {
        let count = boxes.len() / samples.len();
        boxes[i * count..(i + 1) * count].to_vec()
    };
    let image = |(i, &index): (usize, &u32)| BatchImage {
        index: index as usize,
        place: places.as_ref().map_or(i, |places| places[i] as usize),
        globals: of_image(&globals, i),
        locals: of_image(&locals, i),
    };
    samples.iter().enumerate().map(image).collect()
}
