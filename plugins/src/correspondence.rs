//! Probe `correspondence`: does a patch find the same place in another crop?

use std::num::NonZeroUsize;
use std::sync::Arc;

use dinolab_core::contract::{Grid, Parts, Probe, ProbeContext, Score};
use dinolab_core::rng::{Rng, Stream};
use dinolab_core::{plugin, Result};
use image::imageops::crop_imm;
use image::RgbImage;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::probe_data::{draw_test, features_of_changed};

/// Places in two crops of an image, matched by the cosine of patch features.
///
/// Two squares of 60% to 90% of an image's central square are cut at random and brought to one size, so that it is known where
/// each place of the first lies in the second. Every patch of the first whose centre lies in both is matched with the most
/// similar patch of the second. Scores: `pck_10` and `pck_05`, the share of patches whose match has its centre within 10% or
/// 5% of the crop's side of where it should be ("percentage of correct keypoints"; Yang and Ramanan, 2013), over all images
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

/// How far a match may be, in sides of a crop.
const WITHIN: [f64; 2] = [0.10, 0.05];

/// A square inside the unit square.
#[derive(Clone, Copy, Debug)]
struct Square {
    left: f64,
    top: f64,
    side: f64,
}

impl Square {
    fn draw(rng: &mut Rng) -> Self {
        let side = 0.6 + 0.3 * rng.unit();
        Self { left: (1.0 - side) * rng.unit(), top: (1.0 - side) * rng.unit(), side }
    }

    /// The two squares of image number `index`.
    fn pair(seed: u64, index: usize) -> [Self; 2] {
        let mut rng = Rng::new(seed, Stream::Probe, 1, index as u64);
        [Self::draw(&mut rng), Self::draw(&mut rng)]
    }

    /// As it is cut out of a square image of so many pixels a side: whole pixels.
    fn whole(self, pixels: usize) -> Self {
        let whole = |x: f64| (x * pixels as f64).round().clamp(0.0, pixels as f64) as usize;
        let side = whole(self.side).max(1);
        let of = |n: usize| n as f64 / pixels as f64;
        Self {
            left: of(whole(self.left).min(pixels - side)),
            top: of(whole(self.top).min(pixels - side)),
            side: of(side),
        }
    }

    fn cut(self, image: &RgbImage) -> RgbImage {
        let Self { left, top, side } = self.whole(image.width() as usize);
        let [left, top, side] = [left, top, side].map(|x| (x * f64::from(image.width())).round() as u32);
        crop_imm(image, left, top, side, side).to_image()
    }

    /// Where a place of this square lies in `other`, both in sides.
    fn to(self, other: Self, (x, y): (f64, f64)) -> (f64, f64) {
        let map = |at: f64, mine: f64, theirs: f64| (mine + at * self.side - theirs) / other.side;
        (map(x, self.left, other.left), map(y, self.top, other.top))
    }
}

/// The centre of a patch, in sides.
fn centre(patch: usize, grid: Grid) -> (f64, f64) {
    let (row, column) = (patch / grid.width, patch % grid.width);
    ((column as f64 + 0.5) / grid.width as f64, (row as f64 + 0.5) / grid.height as f64)
}

/// Matches within each of [`WITHIN`], and how many there are: of similarities `[P, P]` of the patches of `from` and `to`.
fn matches(similarities: &[f32], grid: Grid, from: Square, to: Square) -> Vec<f64> {
    let mut counts = vec![0.0; WITHIN.len() + 1];
    for (patch, row) in similarities.chunks(grid.patches()).enumerate() {
        let (x, y) = from.to(to, centre(patch, grid));
        if !(0.0..1.0).contains(&x) || !(0.0..1.0).contains(&y) {
            continue;
        }
        let best = row.iter().enumerate().rev().max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |(best, _)| best);
        let found = centre(best, grid);
        let distance = (found.0 - x).hypot(found.1 - y);
        WITHIN.iter().zip(&mut counts).for_each(|(within, count)| *count += f64::from(u8::from(distance <= *within)));
        counts[WITHIN.len()] += 1.0;
    }
    counts
}

impl Probe for Correspondence {
    fn run(&self, context: &ProbeContext<'_>) -> Result<Vec<Score>> {
        let indices = draw_test(context, self.samples.get());
        let seed = context.seed;
        let crop = |number: usize| move |index: usize, image: RgbImage| Square::pair(seed, index)[number].cut(&image);
        let [from, to] = [
            features_of_changed(context, context.test, &indices, &crop(0))?,
            features_of_changed(context, context.test, &indices, &crop(1))?,
        ];
        let (p, d) = (from.grid.patches(), from.patches.last_dim());
        let (a, b) = (from.patches.l2_normalize(1e-12)?, to.patches.l2_normalize(1e-12)?);
        let count = |i: usize| -> Result<Vec<f64>> {
            let rows = |x: &dinolab_core::Tensor| x.narrow(i, 1)?.reshape(&[p, d]);
            let similarities = rows(&a)?.matmul_t(&rows(&b)?)?;
            let (index, side) = from.sources[i];
            let [from_square, to_square] = Square::pair(seed, index).map(|square| square.whole(side));
            Ok(matches(similarities.as_slice(), from.grid, from_square, to_square))
        };
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
        let from = Square { left: 0.1, top: 0.2, side: 0.8 };
        let to = Square { left: 0.3, top: 0.1, side: 0.6 };
        let (x, y) = from.to(to, (0.5, 0.25));
        assert!((x - 1.0 / 3.0).abs() < 1e-12 && (y - 0.5).abs() < 1e-12, "{x} {y}");
        // And back again.
        let (x, y) = to.to(from, (x, y));
        assert!((x - 0.5).abs() < 1e-12 && (y - 0.25).abs() < 1e-12);
    }

    #[test]
    fn matches_are_right_where_features_say_the_place() {
        let grid = Grid { height: 8, width: 8 };
        let (from, to) = (Square { left: 0.0, top: 0.1, side: 0.7 }, Square { left: 0.2, top: 0.2, side: 0.8 });
        // The similarity falls with the distance in the image.
        let similarity = |a: usize, b: usize| {
            let (a, b) = (from.to(to, centre(a, grid)), centre(b, grid));
            -(a.0 - b.0).hypot(a.1 - b.1) as f32
        };
        let similarities: Vec<f32> = (0..64 * 64).map(|i| similarity(i / 64, i % 64)).collect();
        let [ten, five, all] = matches(&similarities, grid, from, to)[..] else { unreachable!("three numbers") };
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
