//! Probe `correspondence`: does a patch find the same place in another crop?

use std::num::NonZeroUsize;
use std::sync::Arc;

use dinolab_core::contract::{Grid, ImageSize, Parts, Picture, Probe, ProbeContext, Sample, Score};
use dinolab_core::rng::{Rng, Stream};
use dinolab_core::{plugin, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::pictures;
use crate::pixels::{cropped, resized, rgb};
use crate::probe_data::{draw_test, middle, Look};

/// Places in two crops of an image, matched by the cosine of patch features.
///
/// Two parts of 60% to 90% of the sides of an image's middle are cut at random and brought to one size, so that it is known
/// where each place of the first lies in the second. Every patch of the first whose centre lies in both is matched with the most
/// similar patch of the second. Scores: `pck_10` and `pck_05`, the share of patches whose match has its centre within 10% or
/// 5% of the crop's longer side of where it should be ("percentage of correct keypoints"; Yang and Ramanan, 2013), over all images
/// together. Needs neither labels nor masks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Correspondence {
    /// Test images to measure.
    #[schemars(range(max = 1_000_000_000))]
    pub samples: NonZeroUsize,
}

impl Default for Correspondence {
    fn default() -> Self {
        Self { samples: NonZeroUsize::new(128).expect("defaults are positive") }
    }
}

/// How far a match may be, in longer sides of a crop.
const WITHIN: [f64; 2] = [0.10, 0.05];

/// A part of an image, in sides of it: of the image's shape, but for whole pixels.
#[derive(Clone, Copy, Debug)]
struct Part {
    left: f64,
    top: f64,
    width: f64,
    height: f64,
}

impl Part {
    fn draw(rng: &mut Rng) -> Self {
        let side = 0.6 + 0.3 * rng.unit();
        Self { left: (1.0 - side) * rng.unit(), top: (1.0 - side) * rng.unit(), width: side, height: side }
    }

    /// The two parts of image number `index`.
    fn pair(seed: u64, index: usize) -> [Self; 2] {
        let mut rng = Rng::new(seed, Stream::Probe, 1, index as u64);
        [Self::draw(&mut rng), Self::draw(&mut rng)]
    }

    /// In pixels of an image of this size: left, top, width, height.
    fn pixels(self, size: ImageSize) -> [usize; 4] {
        let whole = |x: f64, side: usize| (x * side as f64).round().clamp(0.0, side as f64) as usize;
        let width = whole(self.width, size.width).max(1);
        let height = whole(self.height, size.height).max(1);
        let left = whole(self.left, size.width).min(size.width - width);
        [left, whole(self.top, size.height).min(size.height - height), width, height]
    }

    /// As it is cut out of an image of this size.
    fn whole(self, size: ImageSize) -> Self {
        let of = |n: usize, side: usize| n as f64 / side as f64;
        let [left, top, width, height] = self.pixels(size);
        let (left, top) = (of(left, size.width), of(top, size.height));
        Self { left, top, width: of(width, size.width), height: of(height, size.height) }
    }

    fn cut(self, image: &Sample) -> Sample {
        let [left, top, width, height] = self.pixels(ImageSize { width: image.width, height: image.height });
        cropped(image, [left, top], ImageSize { width, height })
    }

    /// Where a place of this part lies in `other`, both in sides.
    fn to(self, other: Self, (x, y): (f64, f64)) -> (f64, f64) {
        let x = (self.left + x * self.width - other.left) / other.width;
        (x, (self.top + y * self.height - other.top) / other.height)
    }
}

/// The centre of a patch, in sides.
fn centre(patch: usize, grid: Grid) -> (f64, f64) {
    let (row, column) = (patch / grid.width, patch % grid.width);
    ((column as f64 + 0.5) / grid.width as f64, (row as f64 + 0.5) / grid.height as f64)
}

/// A patch whose place is known in the other crop, where that is, and the centre of the patch most like it there.
struct Match {
    patch: usize,
    truth: (f64, f64),
    found: (f64, f64),
}

/// Of similarities `[P, P]` of the patches of `from` and `to`.
fn matches(similarities: &[f32], grid: Grid, from: Part, to: Part) -> Vec<Match> {
    let of = |(patch, row): (usize, &[f32])| {
        let (x, y) = from.to(to, centre(patch, grid));
        if !(0.0..1.0).contains(&x) || !(0.0..1.0).contains(&y) {
            return None;
        }
        let best = row.iter().enumerate().rev().max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |(best, _)| best);
        Some(Match { patch, truth: (x, y), found: centre(best, grid) })
    };
    similarities.chunks(grid.patches()).enumerate().filter_map(of).collect()
}

/// Matches within each of [`WITHIN`], and how many there are.
fn count(matches: &[Match], grid: Grid) -> Vec<f64> {
    let longer = grid.width.max(grid.height) as f64;
    let (wide, high) = (grid.width as f64 / longer, grid.height as f64 / longer);
    let mut counts = vec![0.0; WITHIN.len() + 1];
    for Match { truth, found, .. } in matches {
        let distance = ((found.0 - truth.0) * wide).hypot((found.1 - truth.1) * high);
        WITHIN.iter().zip(&mut counts).for_each(|(within, count)| *count += f64::from(u8::from(distance <= *within)));
        counts[WITHIN.len()] += 1.0;
    }
    counts
}

/// Patches that a picture follows.
const FOLLOWED: usize = 12;

impl Correspondence {
    /// The two parts of image number `index` that the probe cuts out of an image of this size: left, top, width and height in
    /// pixels.
    pub fn parts(seed: u64, index: usize, size: ImageSize) -> [[usize; 4]; 2] {
        Part::pair(seed, index).map(|part| part.pixels(size))
    }
}

impl Probe for Correspondence {
    fn run(&self, context: &ProbeContext<'_>) -> Result<Vec<Score>> {
        let indices = draw_test(context, self.samples.get());
        let seed = context.seed;
        let crop = |number: usize| move |index: usize, image: Sample| Part::pair(seed, index)[number].cut(&image);
        let [from, to] = [
            Look::at(context.test, &indices).changed(&crop(0)).features(context)?,
            Look::at(context.test, &indices).changed(&crop(1)).features(context)?,
        ];
        let (p, d) = (from.grid.patches(), from.patches.last_dim());
        let (a, b) = (from.patches.l2_normalize(1e-12)?, to.patches.l2_normalize(1e-12)?);
        let matched = |i: usize| -> Result<Vec<Match>> {
            let rows = |x: &dinolab_core::Tensor| x.narrow(i, 1)?.reshape(&[p, d]);
            let similarities = rows(&a)?.matmul_t(&rows(&b)?)?;
            let (index, size) = from.sources[i];
            let [from_part, to_part] = Part::pair(seed, index).map(|part| part.whole(size));
            Ok(matches(similarities.as_slice(), from.grid, from_part, to_part))
        };
        if let Some(show) = context.show {
            for i in 0..from.truth.len().min(pictures::MOST) {
                let mut all = matched(i)?;
                Rng::new(seed, Stream::Probe, 9, i as u64).shuffle(&mut all);
                all.truncate(FOLLOWED);
                let index = from.sources[i].0;
                let whole = middle(context.test.get_image(index)?, context.image_size);
                let crop =
                    |number: usize| rgb(&resized(Part::pair(seed, index)[number].cut(&whole), context.image_size));
                let panel = |label: &str, number: usize, place: &dyn Fn(&Match) -> (f64, f64)| {
                    pictures::panel(label, pictures::points(crop(number), &all.iter().map(place).collect::<Vec<_>>()))
                };
                show(Picture {
                    caption: context.test.describe(index),
                    panels: vec![
                        panel("patches", 0, &|m| centre(m.patch, from.grid)),
                        panel("where they are", 1, &|m| m.truth),
                        panel("where they are found", 1, &|m| m.found),
                    ],
                });
            }
        }
        let count = |i: usize| Ok(count(&matched(i)?, from.grid));
        let images: Arc<[Vec<f64>]> = (0..from.truth.len()).map(count).collect::<Result<Vec<_>>>()?.into();
        let score =
            |i: usize| Parts { images: images.clone(), score: Arc::new(move |sum: &[f64]| sum[i] / sum[WITHIN.len()]) };
        Ok(vec![Score::of("pck_10", score(0)), Score::of("pck_05", score(1))])
    }

    fn images(&self) -> usize {
        self.samples.get().saturating_mul(2)
    }
}

plugin!(Probe, "correspondence", Correspondence);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe_data::testing::{random, run, Halves};

    #[test]
    fn a_place_is_found_where_the_crops_say_it_is() {
        let from = Part { left: 0.1, top: 0.2, width: 0.8, height: 0.8 };
        let to = Part { left: 0.3, top: 0.1, width: 0.6, height: 0.6 };
        let (x, y) = from.to(to, (0.5, 0.25));
        assert!((x - 1.0 / 3.0).abs() < 1e-12 && (y - 0.5).abs() < 1e-12, "{x} {y}");
        // And back again.
        let (x, y) = to.to(from, (x, y));
        assert!((x - 0.5).abs() < 1e-12 && (y - 0.25).abs() < 1e-12);
    }

    #[test]
    fn matches_are_right_where_features_say_the_place() {
        let grid = Grid { height: 8, width: 8 };
        let from = Part { left: 0.0, top: 0.1, width: 0.7, height: 0.7 };
        let to = Part { left: 0.2, top: 0.2, width: 0.8, height: 0.8 };
        // The similarity falls with the distance in the image.
        let similarity = |a: usize, b: usize| {
            let (a, b) = (from.to(to, centre(a, grid)), centre(b, grid));
            -(a.0 - b.0).hypot(a.1 - b.1) as f32
        };
        let similarities: Vec<f32> = (0..64 * 64).map(|i| similarity(i / 64, i % 64)).collect();
        let [ten, five, all] = count(&matches(&similarities, grid, from, to), grid)[..] else {
            unreachable!("three numbers")
        };
        // A patch is an eighth of a side, so that the nearest centre is at most 0.088 away, and 0.05 often.
        assert!(ten == all && five > 0.2 * all && five < all && all > 20.0 && all < 64.0, "{ten} {five} {all}");
    }

    #[test]
    fn random_features_match_by_chance() {
        let data = Halves { len: 100, width: 64, height: 64 };
        let scores = run(&Correspondence::default(), &data, &data, &random);
        // Of sixteen patches about half a one is within a tenth of a side.
        assert!(scores[0].value < 0.1 && scores[1].value <= scores[0].value, "{scores:?}");
    }
}
