//! Images larger than a model is shown at once, cut into windows that overlap.

use dinolab_core::contract::{Dataset, ImageSize, Sample};
use dinolab_core::Result;

use crate::pixels::{cropped, resized};
use crate::probe_data::{middle, nearest_pixels};

/// The windows of a dataset's samples as samples of their own: number `i * n + k` is window `k` of `n` of sample `i`, whose
/// largest middle part of the shape of `whole` is brought to that.
#[derive(Debug)]
pub(crate) struct Windows<'a> {
    dataset: &'a dyn Dataset,
    whole: ImageSize,
    window: ImageSize,
    places: Vec<[usize; 2]>,
}

/// Where windows begin along a side: every `stride` pixels, the last one at the end.
fn starts(side: usize, window: usize, stride: usize) -> Vec<usize> {
    let last = side.saturating_sub(window);
    (0..=last.div_ceil(stride)).map(|i| (i * stride).min(last)).collect()
}

impl<'a> Windows<'a> {
    /// Of images of this size, which windows are not larger than, `stride` (a share of its sides) apart.
    pub(crate) fn new(dataset: &'a dyn Dataset, whole: ImageSize, window: ImageSize, stride: f64) -> Self {
        let step = |side: usize| ((side as f64 * stride).round() as usize).max(1);
        let columns = starts(whole.width, window.width, step(window.width));
        let rows = starts(whole.height, window.height, step(window.height));
        let places = rows.iter().flat_map(|&top| columns.iter().map(move |&left| [left, top])).collect();
        Self { dataset, whole, window, places }
    }

    /// Left and top of every window of an image.
    pub(crate) fn places(&self) -> &[[usize; 2]] {
        &self.places
    }

    /// The windows of these samples.
    pub(crate) fn of(&self, samples: &[usize]) -> Vec<usize> {
        let n = self.places.len();
        samples.iter().flat_map(|i| i * n..(i + 1) * n).collect()
    }
}

impl Dataset for Windows<'_> {
    fn len(&self) -> usize {
        self.dataset.len() * self.places.len()
    }

    fn get(&self, index: usize) -> Result<Sample> {
        let (whole, window) = (self.whole, self.window);
        let sample = self.dataset.get(index / self.places.len())?;
        let [left, top] = self.places[index % self.places.len()];
        let from = nearest_pixels(&sample, whole);
        let mask = sample.mask.as_ref().map(|mask| {
            let pixel = |i: usize| mask[from((top + i / window.width) * whole.width + left + i % window.width)];
            (0..window.pixels()).map(pixel).collect()
        });
        let label = sample.label;
        let image = cropped(&resized(middle(sample, whole), whole), [left, top], window);
        Ok(Sample { label, mask, ..image })
    }

    fn channels(&self) -> usize {
        self.dataset.channels()
    }

    fn mask_classes(&self) -> usize {
        self.dataset.mask_classes()
    }

    fn describe(&self, index: usize) -> String {
        self.dataset.describe(index / self.places.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe_data::testing::Halves;

    #[test]
    fn windows_cover_a_side_and_the_last_ends_with_it() {
        assert_eq!(starts(10, 4, 3), [0, 3, 6]);
        assert_eq!(starts(11, 4, 3), [0, 3, 6, 7]);
        assert_eq!(starts(4, 4, 3), [0]);
        assert_eq!(starts(3, 4, 3), [0]);
    }

    #[test]
    fn a_window_has_the_pixels_and_classes_of_its_place() {
        let data = Halves { len: 3, width: 40, height: 20 };
        let whole = ImageSize { width: 40, height: 20 };
        let windows = Windows::new(&data, whole, ImageSize::square(16), 0.5);
        assert_eq!(windows.places().len(), 4 * 2);
        assert_eq!(windows.of(&[2]), (16..24).collect::<Vec<_>>());
        for k in 0..8 {
            let sample = windows.get(8 + k).unwrap();
            let [left, _] = windows.places()[k];
            let class = |i: usize| if left + i % 16 < 20 { 2 } else { 0 };
            let mask = sample.mask.clone().unwrap();
            assert!(
                mask.iter().enumerate().all(|(i, &c)| c == class(i) && sample.rgb()[3 * i] == 60 * c),
                "window {k}"
            );
        }
    }
}
