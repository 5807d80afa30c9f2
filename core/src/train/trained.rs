//! A trained backbone read back for evaluation, features and pictures.

use std::path::Path;
use std::sync::Arc;

use safetensors::Dtype;

use crate::contract::{Backbone, Crops, Features, Mode};
use crate::cuda;
use crate::params::{Layout, ParamBuilder, Params};
use crate::step::Stored;
use crate::tensor::catch_out_of_memory;
use crate::weights::Source;
use crate::{DType, Device, Error, Result, Tensor};

/// A backbone as it is evaluated: of a run, the EMA of the student. Heads and optimizer are left behind.
///
/// It runs on a GPU when there is one, in f32 there and on the CPU; weights in f64 stay on the CPU and are computed with
/// in f64.
pub struct Trained {
    /// The backbone.
    pub backbone: Box<dyn Backbone>,
    /// Mean and standard deviation of pixels per channel, for normalisation.
    pub normalization: (Vec<f32>, Vec<f32>),
    /// Side in pixels of the global crops that it was trained on.
    pub global_size: usize,
    layout: Arc<Layout>,
    flat: Tensor,
}

impl Trained {
    /// Reads what lies at `path`: a run (its newest checkpoint), a checkpoint, or a weights folder.
    ///
    /// # Errors
    /// If it is none of these (see [`Source::at`]), or is broken.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_on(path, None)
    }

    /// As [`open`](Self::open), on a device; without, on a GPU when there is one.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_on(path: &Path, device: Option<Device>) -> Result<Self> {
        let source = Source::at(path)?;
        let model = source.known_model()?;
        let mut params = ParamBuilder::new();
        let backbone = model.build(&mut params)?;
        let layout = params.finish();
        let tensors = source.files()?;
        let role = match source.has_roles() {
            false => "",
            // A run without a teacher is evaluated by its student.
            true if tensors.has("teacher.") => "teacher.",
            true => "student.",
        };
        let first = layout.specs().first().and_then(|spec| tensors.get(&format!("{role}{}", spec.name)));
        let is_f64 = first.is_some_and(|tensor| tensor.dtype == Dtype::F64);
        let (device, dtype) = match (is_f64, device) {
            (true, _) => (Device::Cpu, DType::F64),
            (false, Some(device)) => (device, DType::F32),
            (false, None) => ("auto".parse()?, DType::F32),
        };
        let flat = Stored { files: &tensors, prefix: role.into(), path, adapt: false }.flat(&layout, dtype)?;
        let normalization = (model.crops.mean, model.crops.std);
        Ok(Self { backbone, normalization, global_size: model.crops.global_size, layout, flat: flat.to(device) })
    }

    /// A hash of everything that features depend on but the code: weights and normalisation.
    ///
    /// # Errors
    /// If the weights cannot be brought to the host.
    pub fn fingerprint(&self) -> Result<String> {
        let mut hash = blake3::Hasher::new();
        let (mean, std) = &self.normalization;
        for x in mean.iter().chain(std) {
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

    /// Features of normalised pixels `[B, channels, h, w]`, in evaluation; everything on the host.
    ///
    /// # Errors
    /// If the image is too small for the model, or too large for the device's memory.
    pub fn features(&self, pixels: &Tensor) -> Result<Features> {
        let device = self.flat.device();
        let features = device.with(|| {
            catch_out_of_memory(|| {
                let _step = cuda::step_scope();
                let params = Params::frozen(&self.layout, &self.flat);
                let crops = Crops::global(pixels.to(device));
                let mut features = self.backbone.forward(&params, &[crops], Mode::Eval)?;
                features.pop().ok_or_else(|| Error::shape("backbone", "no features"))?.to_host()
            })
        })?;
        Ok(features)
    }
}
