//! How many patches of which crop are masked, where a share of the crops is masked and their sizes are spread evenly over a
//! range: what several maskings share.

use dinolab_core::contract::{Grid, Unmasked};
use dinolab_core::rng::Rng;

/// A share of the crops is masked, and the shares of patches masked in those are spread evenly over [least, most].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shares {
    pub(crate) probability: f64,
    pub(crate) ratio: [f64; 2],
}

impl Shares {
    fn sizes(&self, crops: usize, grid: Grid) -> Vec<usize> {
        mask_sizes(crops, grid.patches(), self.probability, self.ratio)
    }

    /// [`Masking::masked`](dinolab_core::contract::Masking::masked).
    pub(crate) fn masked(&self, crops: usize, grid: Grid) -> usize {
        self.sizes(crops, grid).iter().sum()
    }

    /// [`Masking::share`](dinolab_core::contract::Masking::share).
    pub(crate) fn share(&self) -> f64 {
        self.probability * self.ratio.iter().sum::<f64>() / 2.0
    }

    /// [`Masking::unmasked`](dinolab_core::contract::Masking::unmasked).
    pub(crate) fn unmasked(&self, crops: usize, grid: Grid) -> Option<Unmasked> {
        unmasked(crops, grid.patches(), self.probability, self.ratio)
    }

    /// The masks of all crops in a random order, each of so many patches made by `one`.
    pub(crate) fn draw(
        &self,
        rng: &mut Rng,
        crops: usize,
        grid: Grid,
        one: impl Fn(&mut Rng, usize) -> Vec<bool>,
    ) -> Vec<Vec<bool>> {
        let mut rows: Vec<Vec<bool>> = self.sizes(crops, grid).into_iter().map(|size| one(rng, size)).collect();
        rng.shuffle(&mut rows);
        rows
    }
}

/// The ratios between which sizes are spread: `n + 1` numbers from `ratio[0]` to `ratio[1]` in f32, as
/// `torch.linspace` computes them (from both ends towards the middle). The first is not used.
pub fn mask_ratios(n: usize, ratio: [f64; 2]) -> Vec<f32> {
    let (low, high) = (ratio[0] as f32, ratio[1] as f32);
    let step = (high - low) / n.max(1) as f32;
    let from = |i: usize| if i < n.div_ceil(2) { low + step * i as f32 } else { high - step * (n - i) as f32 };
    (0..=n).map(from).collect()
}

/// How many of `crops` crops are masked at all: `int(crops * probability)`.
pub(crate) fn masked_crops(crops: usize, probability: f64) -> usize {
    (crops as f64 * probability) as usize
}

/// How many patches of each of `crops` crops (all global crops of a batch) are masked, before they are shuffled:
/// `int(crops * probability)` crops get `int(patches * ratio)` with ratios spread evenly, the rest get none.
///
/// The sum is the number `M` of masked patches of every batch.
pub fn mask_sizes(crops: usize, patches: usize, probability: f64, ratio: [f64; 2]) -> Vec<usize> {
    mask_sizes_at(crops, patches, &mask_ratios(masked_crops(crops, probability), ratio))
}

/// [`mask_sizes`] with the ratios given: crop `i` gets `int(patches * ratios[i + 1])` in f32.
pub fn mask_sizes_at(crops: usize, patches: usize, ratios: &[f32]) -> Vec<usize> {
    let mut sizes: Vec<usize> = ratios[1..].iter().map(|&r| (patches as f32 * r) as usize).collect();
    sizes.resize(crops, 0);
    sizes
}

/// Why [`mask_sizes`] masks no patch, if it masks none, without listing the sizes of a batch that may be too large to be
/// made.
pub(crate) fn unmasked(crops: usize, patches: usize, probability: f64, ratio: [f64; 2]) -> Option<Unmasked> {
    // Ratios rise, so the last masked crop has the most.
    let most = ratio[1];
    no_crop(crops, probability).or_else(|| {
        let reason = format!("{most} of the {patches} patches of a global crop is less than one patch");
        let help = format!("use at least {}", least_share(patches));
        (mask_sizes_at(1, patches, &[0.0, most as f32]) == [0]).then_some(Unmasked { key: "ratio", reason, help })
    })
}

/// Why no crop is masked at all, if none is.
pub(crate) fn no_crop(crops: usize, probability: f64) -> Option<Unmasked> {
    let reason = format!("{probability} of the {crops} global crops of a batch is less than one crop");
    let help = format!("use at least {}", least_share(crops));
    (masked_crops(crops, probability) == 0).then_some(Unmasked { key: "probability", reason, help })
}

/// The least share, in few digits, of which `n` things give one.
fn least_share(n: usize) -> f64 {
    let digits = 10f64.powi((n as f64).log10().ceil() as i32 + 2);
    let up = (digits / n as f64).ceil();
    if (up - 1.0) / digits * n as f64 >= 1.0 {
        (up - 1.0) / digits
    } else {
        up / digits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_share_gives_one_and_has_few_digits() {
        for n in (1..3000).chain([123_457, 99_999_999]) {
            let share = least_share(n);
            assert!((n as f64 * share) as usize == 1 && (n as f32 * share as f32) as usize >= 1, "{n}: {share}");
        }
        assert_eq!([1, 8, 6, 300].map(least_share), [1.0, 0.125, 0.167, 0.00334]);
    }
}
