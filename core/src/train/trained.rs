//! A trained backbone read back for evaluation, features and pictures.

use std::path::Path;
use std::sync::Arc;

use crate::checkpoint;
use crate::contract::{Backbone, Crops, Features, Mode};
use crate::params::{load_named, Layout, ParamBuilder, Params};
use crate::recipe::{Precision, Resolved};
use crate::registry::BackboneContext;
use crate::step::CHANNELS;
use crate::tensor::catch_out_of_memory;
use crate::weights::{ModelInfo, WEIGHTS_FILE};
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
    /// Reads a run folder (its newest checkpoint), one checkpoint folder inside a run, or a weights folder.
    ///
    /// # Errors
    /// If there is none of these, or no whole checkpoint.
    pub fn open(path: &Path) -> Result<Self> {
        if path.join(WEIGHTS_FILE).exists() {
            return Self::open_weights(path);
        }
        let recipe = Resolved::of_run(path)?.recipe;
        let source = checkpoint::read_weights(path)?;
        let mut params = ParamBuilder::new();
        let global_size = recipe.crops.global_size;
        let backbone = params.scope("backbone", |params| {
            recipe.backbone.build(&mut BackboneContext { params, global_size, channels: CHANNELS })
        })?;
        let layout = params.finish();
        let (device, dtype) = match recipe.precision {
            Precision::F64 => (Device::Cpu, DType::F64),
            _ => ("auto".parse()?, DType::F32),
        };
        let mut flat = Device::Cpu.with(|| Tensor::zeros(&[layout.len()], dtype));
        load_named(&layout, &mut flat, |name| source.get(&format!("teacher.{name}")).cloned(), path)?;
        let normalization = (recipe.crops.mean, recipe.crops.std);
        Ok(Self { backbone, normalization, global_size, layout, flat: flat.to(device) })
    }

    fn open_weights(path: &Path) -> Result<Self> {
        let model = ModelInfo::of(path)?.expect("a weights folder says what it is");
        let source = checkpoint::read_weights(path)?;
        let mut params = ParamBuilder::new();
        let backbone = model.build(&mut params)?;
        let layout = params.finish();
        let mut flat = Device::Cpu.with(|| Tensor::zeros(&[layout.len()], DType::F32));
        load_named(&layout, &mut flat, |name| source.get(name).cloned(), path)?;
        let normalization = (model.crops.mean, model.crops.std);
        let global_size = model.crops.global_size;
        Ok(Self { backbone, normalization, global_size, layout, flat: flat.to("auto".parse()?) })
    }

    /// A hash of everything that features depend on but the code: weights and normalisation.
    ///
    /// # Errors
    /// If the weights cannot be brought to the host.
    pub fn fingerprint(&self) -> Result<String> {
        let mut hash = blake3::Hasher::new();
        let (mean, std) = self.normalization;
        for x in mean.iter().chain(&std) {
            hash.update(&x.to_le_bytes());
        }
        hash.update(format!("{:?}", self.backbone).as_bytes());
        let host = self.flat.to(Device::Cpu);
        match host.dtype() {
            DType::F64 => hash.update(bytemuck::cast_slice(host.as_slice::<f64>())),
            _ => hash.update(bytemuck::cast_slice(host.as_slice::<f32>())),
        };
        Ok(hash.finalize().to_hex().to_string())
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
