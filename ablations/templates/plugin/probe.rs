//! Probe `my_plugin`.

use std::num::NonZeroUsize;

use dinolab_core::contract::{ImageSize, Probe, ProbeContext, Sample, Score};
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

/// An image as the model sees it, `[channels, height, width]` by nearest neighbours, mirrored or not.
fn pixels(sample: &Sample, context: &ProbeContext<'_>, mirrored: bool) -> Vec<f32> {
    let (size, (mean, std)) = (context.image_size, context.normalization);
    let channels = mean.len();
    let mut out = Vec::with_capacity(channels * size.pixels());
    for (channel, i) in (0..channels).flat_map(|c| (0..size.pixels()).map(move |i| (c, i))) {
        let (y, x) = (i / size.width, i % size.width);
        let x = if mirrored { size.width - 1 - x } else { x };
        let from = y * sample.height / size.height * sample.width + x * sample.width / size.width;
        out.push((sample.pixels.get(channels * from + channel) - mean[channel]) / std[channel]);
    }
    out
}

impl Probe for MyPlugin {
    fn run(&self, context: &ProbeContext<'_>) -> Result<Vec<Score>> {
        let count = self.samples.get().min(context.test.len());
        let samples: Vec<Sample> = (0..count).map(|i| context.test.get(i)).collect::<Result<_>>()?;
        let cls = |mirrored: bool| -> Result<Tensor> {
            let all: Vec<f32> = samples.iter().flat_map(|s| pixels(s, context, mirrored)).collect();
            let channels = context.normalization.0.len();
            let ImageSize { height, width } = context.image_size;
            let batch = Tensor::from_slice(&all, &[count, channels, height, width])?;
            (context.features)(&batch)?.cls.l2_normalize(1e-12)
        };
        let cosine = cls(false)?.mul(&cls(true)?)?.sum()?.item() / count as f64;
        Ok(vec![Score::new("cosine", cosine)])
    }
}

plugin!(Probe, "my_plugin", MyPlugin);
