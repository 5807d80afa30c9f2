//! Dataset `my_plugin`.

use std::num::NonZeroUsize;

use dinolab_core::contract::{DataContext, Dataset, Sample};
use dinolab_core::rng::{Rng, Stream};
use dinolab_core::{plugin, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Stripes: the class is their direction (horizontal, vertical or one of the two diagonals); width, phase and colour are
/// random.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Images.
    pub count: NonZeroUsize,
    /// Side of an image in pixels.
    pub size: NonZeroUsize,
}

impl Default for Config {
    fn default() -> Self {
        let positive = |n| NonZeroUsize::new(n).expect("defaults are positive");
        Self { count: positive(1024), size: positive(64) }
    }
}

/// The images of one seed.
#[derive(Debug)]
pub struct MyPlugin {
    config: Config,
    seed: u64,
}

impl MyPlugin {
    /// The images of this run's seed.
    pub fn new(config: Config, context: &mut DataContext) -> Result<Box<dyn Dataset>> {
        Ok(Box::new(Self { config, seed: context.seed }))
    }
}

impl Dataset for MyPlugin {
    fn len(&self) -> usize {
        self.config.count.get()
    }

    fn get(&self, index: usize) -> Result<Sample> {
        // All that is random is a function of seed and index, so any thread may read any sample at any time.
        let mut rng = Rng::new(self.seed, Stream::Plugin, 0, index as u64);
        let (class, side) = (rng.below(4), self.config.size.get());
        let (width, phase) = (rng.uniform(3.0, 9.0), rng.uniform(0.0, 18.0));
        let colours = [0, 1].map(|_| [0, 1, 2].map(|_| rng.below(256) as u8));
        let [across, down] = [[0.0, 1.0], [1.0, 0.0], [0.7, 0.7], [-0.7, 0.7]][class];
        let pixel = |i: usize| {
            let place = across * (i % side) as f64 + down * (i / side) as f64 + phase;
            colours[(place / width).floor().rem_euclid(2.0) as usize]
        };
        let pixels = (0..side * side).flat_map(pixel).collect();
        Ok(Sample { width: side, height: side, pixels, label: Some(class as u32), ..Sample::default() })
    }

    fn classes(&self) -> usize {
        4
    }
}

plugin!(Dataset, "my_plugin", Config, MyPlugin::new);
