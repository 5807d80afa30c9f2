//! Masks that are unions of a few large blocks: the targets of I-JEPA.

use dinolab_core::contract::{Grid, Masking, Unmasked};
use dinolab_core::plugin;
use dinolab_core::rng::Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::mask_sizes::{mask_ratios, masked_crops, no_crop};

plugin!(Masking, "multi_block", MultiBlock);

/// The union of a few large blocks: what I-JEPA predicts (Assran et al., arXiv:2301.08243, section 3) is hidden.
///
/// `int(crops * probability)` of the global crops of a batch are masked, chosen at random; the area of their blocks, as
/// shares of the crop, is spread evenly over `scale`. A crop with blocks of share s has
///
/// ```text
/// int(patches * (1 - (1 - s)^blocks))
/// ```
///
/// masked patches, what blocks placed independently cover on average, so every batch has the same number of them. The
/// blocks of a crop have one area and each an aspect ratio and a place of its own. Of `tries` such unions the one whose area
/// is nearest to that number is taken, and brought to it at its border: patches next to a hidden one are hidden, or
/// patches next to a visible one are shown, one after the other, drawn uniformly.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MultiBlock {
    /// Share of the global crops that are masked at all. I-JEPA masks every image.
    #[schemars(range(min = 0, max = 1))]
    pub probability: f64,
    /// Blocks of a crop.
    #[schemars(range(min = 1, max = 100))]
    pub blocks: usize,
    /// Area of a block as a share of the crop's, spread evenly over [least, most].
    #[schemars(inner(range(min = 0, max = 1)), extend("x-ascending" = true))]
    pub scale: [f64; 2],
    /// Aspect ratio of a block, height over width, uniform in [least, most].
    #[schemars(inner(range(min = 0.01, max = 100)), extend("x-ascending" = true))]
    pub aspect: [f64; 2],
    /// Unions drawn for a crop.
    #[schemars(range(min = 1, max = 1000))]
    pub tries: usize,
}

impl Default for MultiBlock {
    fn default() -> Self {
        Self { probability: 0.5, blocks: 4, scale: [0.15, 0.2], aspect: [0.75, 1.5], tries: 10 }
    }
}

/// A rectangle of patches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Target {
    top: usize,
    left: usize,
    height: usize,
    width: usize,
}

impl MultiBlock {
    /// The masked patches of a crop whose blocks have the share `scale` of it each.
    fn count(&self, patches: usize, scale: f64) -> usize {
        (patches as f64 * self.covered(scale)) as usize
    }

    /// The share that independent blocks cover on average.
    fn covered(&self, scale: f64) -> f64 {
        1.0 - (1.0 - scale).powi(self.blocks as i32)
    }

    /// The shares of the blocks of the masked crops, in order.
    fn scales(&self, crops: usize) -> impl Iterator<Item = f64> {
        let scales = mask_ratios(masked_crops(crops, self.probability), self.scale);
        scales.into_iter().skip(1).map(f64::from)
    }

    /// One block of the share `scale`.
    fn target(&self, rng: &mut Rng, grid: Grid, scale: f64) -> Target {
        let area = grid.patches() as f64 * scale;
        let aspect = rng.uniform(self.aspect[0], self.aspect[1]);
        let height = ((area * aspect).sqrt().round() as usize).clamp(1, grid.height);
        let width = ((area / aspect).sqrt().round() as usize).clamp(1, grid.width);
        let (top, left) = (rng.below(grid.height - height + 1), rng.below(grid.width - width + 1));
        Target { top, left, height, width }
    }

    /// The union of the blocks of one crop.
    fn union(&self, rng: &mut Rng, grid: Grid, scale: f64) -> Vec<bool> {
        let mut mask = vec![false; grid.patches()];
        for _ in 0..self.blocks {
            let Target { top, left, height, width } = self.target(rng, grid, scale);
            (top..top + height).for_each(|y| mask[y * grid.width + left..][..width].fill(true));
        }
        mask
    }

    /// A mask of exactly `count` patches, made of blocks of the share `scale`.
    fn draw_one(&self, rng: &mut Rng, grid: Grid, scale: f64, count: usize) -> Vec<bool> {
        let unions: Vec<Vec<bool>> = (0..self.tries).map(|_| self.union(rng, grid, scale)).collect();
        let nearest = unions.into_iter().min_by_key(|mask| hidden(mask).abs_diff(count));
        let mut mask = nearest.expect("there is at least one try");
        let union = hidden(&mask);
        for _ in 0..union.abs_diff(count) {
            turn_at_border(rng, grid, &mut mask, union > count);
        }
        mask
    }
}

fn hidden(mask: &[bool]) -> usize {
    mask.iter().filter(|&&m| m).count()
}

/// Turns one of the patches that are `from` and touch one that is not along an edge; any of them if none does.
fn turn_at_border(rng: &mut Rng, grid: Grid, mask: &mut [bool], from: bool) {
    let Grid { height, width } = grid;
    let touches = |&i: &usize| {
        let (y, x) = (i / width, i % width);
        let other = |inside: bool, at: usize| inside && mask[at] != from;
        other(y > 0, i.wrapping_sub(width))
            || other(y + 1 < height, i + width)
            || other(x > 0, i.wrapping_sub(1))
            || other(x + 1 < width, i + 1)
    };
    let all: Vec<usize> = (0..mask.len()).filter(|&i| mask[i] == from).collect();
    let border: Vec<usize> = all.iter().copied().filter(touches).collect();
    let candidates = if border.is_empty() { all } else { border };
    mask[candidates[rng.below(candidates.len())]] = !from;
}

impl Masking for MultiBlock {
    fn masked(&self, crops: usize, grid: Grid) -> usize {
        self.scales(crops).map(|scale| self.count(grid.patches(), scale)).sum()
    }

    fn share(&self, _: Grid) -> f64 {
        let [least, most] = self.scale;
        let power = self.blocks as i32 + 1;
        // The mean of what is covered over the range of scales.
        let covered = match most - least {
            width if width < 1e-6 => self.covered(least),
            width => 1.0 - ((1.0 - least).powi(power) - (1.0 - most).powi(power)) / (f64::from(power) * width),
        };
        self.probability * covered
    }

    fn unmasked(&self, crops: usize, grid: Grid) -> Option<Unmasked> {
        let (patches, most) = (grid.patches(), self.scale[1]);
        let none = || {
            let reason = format!("{} blocks of {most} of the {patches} patches are less than one patch", self.blocks);
            Unmasked { key: "scale", reason, help: format!("use at least {:.1e}", 1.05 / patches as f64) }
        };
        // In the single precision in which scales are spread.
        let empty = self.count(patches, f64::from(most as f32)) == 0;
        no_crop(crops, self.probability).or_else(|| empty.then(none))
    }

    fn draw(&self, rng: &mut Rng, crops: usize, grid: Grid) -> Vec<Vec<bool>> {
        let draw = |scale: f64| match self.count(grid.patches(), scale) {
            0 => vec![false; grid.patches()],
            count => self.draw_one(rng, grid, scale, count),
        };
        let mut rows: Vec<Vec<bool>> = self.scales(crops).map(draw).collect();
        rows.resize(crops, vec![false; grid.patches()]);
        rng.shuffle(&mut rows);
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dinolab_core::proptest::prelude::{prop_assert, prop_assert_eq, proptest};
    use dinolab_core::rng::Stream;

    const GRID: Grid = Grid { height: 16, width: 16 };

    fn rng(seed: u64) -> Rng {
        Rng::new(seed, Stream::Mask, 0, 0)
    }

    proptest! {
        #[test]
        fn blocks_lie_inside_and_have_the_area_and_the_aspect_that_are_asked_for(seed: u64, scale in 0.05..0.4f64) {
            let masking = MultiBlock::default();
            let Target { top, left, height, width } = masking.target(&mut rng(seed), GRID, scale);
            prop_assert!(top + height <= GRID.height && left + width <= GRID.width);
            // Each side is rounded to whole patches.
            let (h, w) = (height as f64, width as f64);
            let area = 256.0 * scale;
            prop_assert!((h - 0.5) * (w - 0.5) <= area && area <= (h + 0.5) * (w + 0.5), "{h} x {w} for {area}");
            let [least, most] = masking.aspect;
            prop_assert!((h + 0.5) / (w - 0.5) >= least && (h - 0.5) / (w + 0.5) <= most, "{h} / {w}");
        }

        #[test]
        fn a_union_is_brought_to_its_count_at_its_border(seed: u64, scale in 0.02..0.5f64, count in 0usize..=256) {
            let masking = MultiBlock { blocks: 1, tries: 1, ..MultiBlock::default() };
            let (union, mask) =
                (masking.union(&mut rng(seed), GRID, scale), masking.draw_one(&mut rng(seed), GRID, scale, count));
            prop_assert_eq!(hidden(&mask), count);
            // It grows or shrinks, and does not move.
            let inside = |a: &[bool], b: &[bool]| a.iter().zip(b).all(|(a, b)| !a || *b);
            let (small, large) = if hidden(&union) > count { (&mask, &union) } else { (&union, &mask) };
            prop_assert!(inside(small, large));
        }
    }

    #[test]
    fn the_union_of_several_tries_needs_few_corrections() {
        let masking = MultiBlock::default();
        let off = |tries: usize| -> usize {
            let masking = MultiBlock { tries, ..masking.clone() };
            let count = masking.count(256, 0.175);
            let mut total = 0;
            for seed in 0..200 {
                let rng = &mut rng(seed);
                let unions = (0..tries).map(|_| masking.union(rng, GRID, 0.175));
                total += unions.map(|mask| hidden(&mask).abs_diff(count)).min().expect("there is one");
            }
            total
        };
        // A union of four blocks covers about half of the crop, give or take a seventh of that.
        let (one, ten) = (off(1), off(10));
        assert!(one < 200 * 30 && 4 * ten < one, "{one} patches with one try, {ten} with ten");
    }
}
