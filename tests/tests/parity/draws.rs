//! What is random inside the model, against the closed form of its distribution.

use dinolab_core::contract::{Backbone, BackboneContext, PosEncoding};
use dinolab_core::params::ParamBuilder;
use dinolab_core::registry::Chosen;
use dinolab_core::rng::{Rng, Stream};
use dinolab_plugins as _;
use serde_json::{json, Value};

/// Largest distance between the empirical distribution of `sample` and the uniform one on [0, 1], times sqrt(n): above
/// 1.95 with probability 0.001 (Kolmogorov-Smirnov).
fn distance_to_uniform(mut sample: Vec<f64>) -> f64 {
    sample.sort_by(f64::total_cmp);
    let n = sample.len() as f64;
    let gap = |(i, x): (usize, &f64)| (x - i as f64 / n).abs().max((x - (i + 1) as f64 / n).abs());
    sample.iter().enumerate().map(gap).fold(0.0, f64::max) * n.sqrt()
}

fn correlation(a: &[f64], b: &[f64]) -> f64 {
    let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
    let (ma, mb) = (mean(a), mean(b));
    let sum = |f: &dyn Fn(f64, f64) -> f64| a.iter().zip(b).map(|(&a, &b)| f(a - ma, b - mb)).sum::<f64>();
    sum(&|a, b| a * b) / (sum(&|a, _| a * a) * sum(&|_, b| b * b)).sqrt()
}

/// Shift is uniform, jitter of each axis and the common rescale are log-uniform, and none tells of another.
pub fn the_rotary_box_is_moved_as_the_paper_says() {
    let (shift, jitter, rescale) = (0.4, 1.3, 2.0f64);
    let table = json!({ "plugin": "rope_box", "shift": shift, "jitter": jitter, "rescale": rescale });
    let chosen: Chosen<dyn PosEncoding> = serde_json::from_value(table).unwrap();
    let encoding = chosen.build(&mut ()).unwrap();
    const DRAWS: u64 = 5000;
    let draws: Vec<Vec<f64>> = (0..DRAWS).map(|i| encoding.draw(&mut Rng::new(5, Stream::Position, 0, i))).collect();
    let log = |x: f64, s: f64| 0.5 + x.ln() / (2.0 * f64::ln(s));
    let unit = |k: usize| -> Vec<f64> {
        let of = |d: &Vec<f64>| match k {
            0 | 1 => 0.5 + d[k] / (2.0 * shift),
            2 | 3 => log(d[k], jitter),
            _ => log(d[k], rescale),
        };
        draws.iter().map(of).collect()
    };
    for k in 0..5 {
        let distance = distance_to_uniform(unit(k));
        assert!(distance < 1.95, "number {k}: {distance}");
        for other in 0..k {
            let r = correlation(&unit(k), &unit(other)) * (DRAWS as f64).sqrt();
            assert!(r.abs() < 4.0, "numbers {k} and {other}: {r} standard errors");
        }
    }
}

fn vit(table: Value) -> Box<dyn Backbone> {
    let chosen: Chosen<dyn Backbone> = serde_json::from_value(table).unwrap();
    let mut params = ParamBuilder::new();
    chosen.build(&mut BackboneContext { params: &mut params, global_size: 32, channels: 3 }).unwrap()
}

/// Every branch keeps `max(int(B (1 - r)), 1)` images, each equally often, and chooses without regard to the other.
pub fn stochastic_depth_keeps_every_image_equally_often() {
    const STEPS: u64 = 2000;
    for (rate, images) in [(0.4, [7, 5]), (0.3, [10, 1]), (0.9, [4, 3])] {
        let vit = vit(json!({ "plugin": "vit", "preset": "vit_tiny_test", "depth": 2, "drop_path": rate }));
        // How often an image is kept by each branch, and by both, for every block and kind of crop.
        let mut counts = vec![[0u32; 3]; 2 * (images[0] + images[1])];
        for step in 0..STEPS {
            let draws = vit.draw(&|stream, index| Rng::new(5, stream, step, index), &images);
            for (block, kinds) in draws.kept.iter().enumerate() {
                for (kind, branches) in kinds.iter().enumerate() {
                    let expected = ((images[kind] as f64 * (1.0 - rate)) as usize).max(1);
                    for kept in branches {
                        let distinct: std::collections::BTreeSet<&u32> = kept.iter().collect();
                        assert_eq!((kept.len(), distinct.len()), (expected, expected));
                    }
                    let first = block * (images[0] + images[1]) + kind * images[0];
                    for image in 0..images[kind] {
                        let by = branches.each_ref().map(|b| b.contains(&(image as u32)));
                        let here = &mut counts[first + image];
                        here.iter_mut().zip([by[0], by[1], by[0] && by[1]]).for_each(|(n, is)| *n += u32::from(is));
                    }
                }
            }
        }
        for (place, counts) in counts.into_iter().enumerate() {
            let place = place % (images[0] + images[1]);
            let all = if place < images[0] { images[0] } else { images[1] };
            let share = ((all as f64 * (1.0 - rate)) as usize).max(1) as f64 / all as f64;
            for (count, p) in counts.into_iter().zip([share, share, share * share]) {
                let error = 5.0 * (STEPS as f64 * p * (1.0 - p)).sqrt();
                let off = (f64::from(count) - STEPS as f64 * p).abs();
                assert!(off <= error, "rate {rate}, image {place}: {count} of {STEPS}, expected a share of {p}");
            }
        }
    }
}
