//! A trained backbone read back for evaluation, features and pictures.

use std::path::Path;
use std::sync::Arc;

use crate::checkpoint;
use crate::contract::{Backbone, Crops, Features, Mode};
use crate::params::{load_named, Layout, ParamBuilder, Params};
use crate::recipe::{CropConfig, Precision, Resolved};
use crate::tensor::catch_out_of_memory;
use crate::weights::ModelInfo;
use crate::{DType, Device, Error, Result, Tensor};

/// The backbone of a run as it is evaluated: the EMA of the student. Heads and optimizer are left behind.
///
/// It runs on a GPU when there is one, in f32 there and on the CPU; f64 runs stay what they are.
pub struct Trained {
    /// The backbone.
    pub backbone: Box<dyn Backbone>,
    /// Mean and standard deviation of pixels per channel, for normalisation.
    pub normalization: ([f32; 3], [f32; 3]),
    /// Side in pixels of the global crops that it was trained on.
    pub global_size: usize,
    layout: Arc<Layout>,
    flat: Tensor,
}

impl Trained {
    /// Reads a run folder (its newest checkpoint), one checkpoint folder inside a run, or a folder of imported or exported
    /// weights.
    ///
    /// # Errors
    /// If there is nothing of that kind, or no whole checkpoint.
    pub fn open(path: &Path) -> Result<Self> {
        let help = "name a run, a checkpoint (step-...) inside one, or what `dinolab import` or `dinolab export` wrote";
        if !path.exists() {
            return Err(Error::content(path, "does not exist", help));
        }
        let model = ModelInfo::of(path)?;
        let model = model.ok_or_else(|| Error::content(path, "nothing says what model is here", help))?;
        // Weights by themselves do not say what they were trained on: DINOv3's crops.
        let recipe = Resolved::of_run(path).ok().map(|r| r.recipe);
        let global_size = recipe.as_ref().map_or(CropConfig::default().global_size, |r| r.crops.global_size);
        let (device, dtype) = match recipe.map(|r| r.precision) {
            Some(Precision::F64) => (Device::Cpu, DType::F64),
            _ => ("auto".parse()?, DType::F32),
        };
        let mut params = ParamBuilder::new();
        let backbone = model.build(&mut params, global_size)?;
        let layout = params.finish();
        let source = Device::Cpu.with(|| checkpoint::read_weights(path))?;
        let prefix = if source.has("teacher.backbone.") { "teacher." } else { "" };
        let mut flat = Device::Cpu.with(|| Tensor::zeros(&[layout.len()], dtype));
        load_named(&layout, &mut flat, |name| source.get(&format!("{prefix}{name}")).cloned(), path)?;
        let normalization = (model.crops.mean, model.crops.std);
        Ok(Self { backbone, normalization, global_size, layout, flat: flat.to(device) })
    }

    /// Features of normalised pixels `[B, 3, h, w]`, in evaluation; everything on the host.
    ///
    /// # Errors
    /// If the image is too small for the model, or too large for the device's memory.
    pub fn features(&self, pixels: &Tensor) -> Result<Features> {
        let device = self.flat.device();
        let features = device.with(|| {
            catch_out_of_memory(|| {
                let params = Params::frozen(&self.layout, &self.flat);
                let crops = Crops::global(pixels.to(device));
                let mut features = self.backbone.forward(&params, &[crops], Mode::Eval)?;
                features.pop().ok_or_else(|| Error::shape("backbone", "no features"))
            })
        })?;
        features.to_host()
    }
}
