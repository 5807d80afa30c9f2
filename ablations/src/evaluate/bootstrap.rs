//! Intervals of scores over test images.

use std::sync::Arc;

use dinolab_core::contract::Score;
use dinolab_core::rng::{Rng, Stream};
use rayon::prelude::*;

use crate::statistics::ALPHA;

/// Times that test images are drawn anew.
pub const RESAMPLES: usize = 1000;

/// Every score of as many draws of test images with replacement as [`RESAMPLES`], in the order of `scores`; empty for one that
/// is not put together from images. The draws follow from the number of images alone: scores of several weights on the same
/// images may be compared draw by draw (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13).
pub fn resample(scores: &[Score]) -> Vec<Vec<f64>> {
    let mut found = vec![Vec::new(); scores.len()];
    let mut left: Vec<usize> = (0..scores.len()).filter(|&i| scores[i].parts.is_some()).collect();
    let parts = |i: usize| scores[i].parts.as_ref().expect("those without parts were left out");
    // Scores of the same numbers are drawn together: there may be one for every class.
    while let Some(&first) = left.first() {
        let images = parts(first).images.clone();
        let (together, others): (Vec<usize>, _) =
            left.into_iter().partition(|&i| Arc::ptr_eq(&parts(i).images, &images));
        left = others;
        let drawn: Vec<Vec<f64>> = (0..RESAMPLES)
            .into_par_iter()
            .map(|draw| {
                let sum = sum_of_draw(&images, draw);
                together.iter().map(|&i| (parts(i).score)(&sum)).collect()
            })
            .collect();
        for (place, &i) in together.iter().enumerate() {
            found[i] = drawn.iter().map(|scores| scores[place]).collect();
        }
    }
    found
}

fn sum_of_draw(images: &[Vec<f64>], draw: usize) -> Vec<f64> {
    let mut rng = Rng::new(images.len() as u64, Stream::Statistics, 1, draw as u64);
    let mut sum = vec![0.0; images.first().map_or(0, Vec::len)];
    for _ in 0..images.len() {
        sum.iter_mut().zip(&images[rng.below(images.len())]).for_each(|(sum, x)| *sum += x);
    }
    sum
}

/// The percentile interval of 95% of drawn numbers; those that are not finite are draws without the class that is scored.
pub fn interval(drawn: impl IntoIterator<Item = f64>) -> Option<[f64; 2]> {
    let mut drawn: Vec<f64> = drawn.into_iter().filter(|x| x.is_finite()).collect();
    drawn.sort_by(f64::total_cmp);
    let last = drawn.len().checked_sub(1)?;
    Some([ALPHA / 2.0, 1.0 - ALPHA / 2.0].map(|q| drawn[(q * last as f64).round() as usize]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_of_a_mean_is_that_of_its_standard_error() {
        // 400 numbers, half 0 and half 1: a standard error of 0.025.
        let score = Score::mean("top1", (0..400).map(|i| f64::from(i % 2)));
        let drawn = resample(std::slice::from_ref(&score));
        let [low, high] = interval(drawn[0].iter().copied()).unwrap();
        assert!((low - 0.451).abs() < 0.008 && (high - 0.549).abs() < 0.008, "{low} {high}");
        assert_eq!(drawn, resample(&[score]), "the same draws every time");
    }

    #[test]
    fn the_same_images_are_drawn_for_all_scores_and_no_interval_is_made_up() {
        let low = Score::mean("a", (0..50).map(f64::from));
        let high = Score::mean("b", (0..50).map(|i| f64::from(i) + 1.0));
        let drawn = resample(&[low, Score::new("c", 3.0), high]);
        assert!(drawn[0].iter().zip(&drawn[2]).all(|(a, b)| (b - a - 1.0).abs() < 1e-9));
        assert!(drawn[1].is_empty() && interval(drawn[1].clone()).is_none());
    }
}
