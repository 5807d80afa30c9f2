//! Patch centres in a normalised box, and their training-time augmentation: what `rope_box` and `relative_bias_box`
//! share.

use std::sync::{Mutex, PoisonError};

use dinolab_core::contract::Grid;
use dinolab_core::rng::Rng;
use dinolab_core::tensor::is_recording;
use dinolab_core::{DType, Device, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A grid, in a type and on a device.
type Key = (Grid, DType, Device);

/// What is made of a grid, for the blocks and steps that ask for the same.
#[derive(Debug)]
pub(crate) struct ByGrid<T>(Mutex<Vec<Known<T>>>);

#[derive(Debug)]
struct Known<T> {
    key: Key,
    made: T,
    /// Whether a recorded step reads it.
    recorded: bool,
}

/// Grids that are remembered beside those of recorded steps: photographs have thousands.
const MOST_GRIDS: usize = 32;

impl<T> Default for ByGrid<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T: Clone> ByGrid<T> {
    /// That of a grid on the current device, made if it is not known.
    pub(crate) fn get(&self, grid: Grid, dtype: DType, make: impl FnOnce() -> Result<T>) -> Result<T> {
        let key: Key = (grid, dtype, Device::current());
        // Only finished ones are pushed, so a panic elsewhere leaves the list whole; none is made under the lock.
        let all = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let recorded = is_recording();
        if let Some(known) = all().iter_mut().find(|known| known.key == key) {
            known.recorded |= recorded;
            return Ok(known.made.clone());
        }
        let made = make()?;
        let mut all = all();
        if all.iter().filter(|known| !known.recorded).count() >= MOST_GRIDS {
            let oldest = all.iter().position(|known| !known.recorded);
            oldest.map(|oldest| all.remove(oldest));
        }
        all.push(Known { key, made: made.clone(), recorded });
        Ok(made)
    }
}

/// What the box [-1, 1] means for a grid that is not square.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Normalize {
    /// Each side spans the box.
    #[default]
    Separate,
    /// The shorter side spans the box; the longer one reaches outside.
    Min,
    /// The longer side spans the box; the shorter one fills a part that begins at -1.
    Max,
}

/// Distribution of the factor by which all coordinates are multiplied in training.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "a number s (log-uniform in [1/s, s]) or a table { uniform = [a, b] }")]
pub enum Rescale {
    /// Log-uniform in [1/s, s].
    LogUniform(#[schemars(range(min = 1, max = 1000))] f64),
    /// Uniform in [a, b].
    Uniform(UniformRange),
}

/// `{ uniform = [a, b] }`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct UniformRange {
    /// Least and greatest factor.
    #[schemars(inner(range(min = 0.001, max = 1000)), extend("x-ascending" = true))]
    pub uniform: [f64; 2],
}

impl Rescale {
    /// Draws a factor.
    pub fn draw(self, rng: &mut Rng) -> f64 {
        match self {
            Self::LogUniform(s) => rng.log_uniform(1.0 / s, s),
            Self::Uniform(UniformRange { uniform: [a, b] }) => rng.uniform(a, b),
        }
    }
}

/// How often a training-time augmentation is drawn anew.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DrawPer {
    /// For every block and kind of crop: the reference's way.
    #[default]
    Block,
    /// Once a step, for each kind of crop.
    Step,
}

/// Coordinates of the rows and of the columns of patch centres: `2 (i + 0.5) / n - 1`, `n` by `normalize`. `round` is
/// applied after every operation, to follow an implementation of lower precision.
pub(crate) fn axes(grid: Grid, normalize: Normalize, round: impl Fn(f64) -> f64) -> [Vec<f64>; 2] {
    let sides = [grid.height, grid.width];
    sides.map(|side| {
        let n = match normalize {
            Normalize::Separate => side,
            Normalize::Min => grid.height.min(grid.width),
            Normalize::Max => grid.height.max(grid.width),
        };
        let centre = |i: usize| round((i as f64 + 0.5) / n as f64);
        (0..side).map(|i| round(2.0 * centre(i) - 1.0)).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_grids_are_remembered_as_a_crop_plan_has_and_no_more() {
        let (known, made) = (ByGrid::default(), std::cell::Cell::new(0));
        let get = |height: usize| {
            let grid = Grid { height, width: 1 };
            let make = || {
                made.set(made.get() + 1);
                Ok(height)
            };
            assert_eq!(known.get(grid, DType::F32, make).expect("nothing can fail"), height);
        };
        (1..=MOST_GRIDS).chain(1..=MOST_GRIDS).for_each(get);
        assert_eq!(made.get(), MOST_GRIDS, "none is made twice");
        get(MOST_GRIDS + 1);
        get(MOST_GRIDS + 1);
        get(2);
        assert_eq!(made.get(), MOST_GRIDS + 1, "the oldest makes room, and no other");
        get(1);
        assert_eq!(made.get(), MOST_GRIDS + 2);
    }
}
