//! Probe `my_plugin`.

use std::num::NonZeroUsize;

use dinolab_core::contract::{Probe, ProbeContext, Sample, Score};
use dinolab_core::{plugin, Result, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Mean cosine between the CLS features of an image and of its mirror image: 1 for a representation that does not see
/// the difference.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MyPlugin {
    /// Test images to measure.
    pub samples: NonZeroUsize,
}

impl Default for MyPlugin {
    fn default() -> Self {
        Self { samples: NonZeroUsize::new(64).expect("64 is not 0") }
    }
}

/// An image as the model sees it, `[3, height, width]` by nearest neighbours, mirrored or not.
fn pixels(sample: &Sample, context: &ProbeContext<'_>, mirrored: bool) -> Vec<f32> {
    let (size, (mean, std)) = (context.image_size, context.normalization);
    let mut out = Vec::with_capacity(3 * size.pixels());
    for (channel, i) in (0..3).flat_map(|c| (0..size.pixels()).map(move |i| (c, i))) {
        let (y, x) = (i / size.width, i % size.width);
        let x = if mirrored { size.width - 1 - x } else { x };
        let from = y * sample.height / size.height * sample.width + x * sample.width / size.width;
        out.push((f32::from(sample.rgb[3 * from + channel]) / 255.0 - mean[channel]) / std[channel]);
    }
    out
}

impl Probe for MyPlugin {
    fn run(&self, context: &ProbeContext<'_>) -> Result<Vec<Score>> {
        let count = self.samples.get().min(context.test.len());
        let samples: Vec<Sample> = (0..count).map(|i| context.test.get(i)).collect::<Result<_>>()?;
        let cls = |mirrored: bool| -> Result<Tensor> {
            let all: Vec<f32> = samples.iter().flat_map(|s| pixels(s, context, mirrored)).collect();
            let batch = Tensor::from_slice(&all, &[count, 3, context.image_size.height, context.image_size.width])?;
            (context.features)(&batch)?.cls.l2_normalize(1e-12)
        };
        let cosine = cls(false)?.mul(&cls(true)?)?.sum()?.item() / count as f64;
        Ok(vec![Score::new("cosine", cosine)])
    }
}

plugin!(Probe, "my_plugin", MyPlugin);
