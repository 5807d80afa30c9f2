//! Masks and collation against the reference's numbers.

#[allow(dead_code, reason = "each test binary uses its part")]
mod golden;

use dinolab_core::contract::Grid;
use dinolab_core::data::masks::{mask_sizes, mask_sizes_at};
use dinolab_core::data::{views_of_images, BlockMask, Masks};
use dinolab_core::recipe::MaskConfig;
use dinolab_core::rng::{Rng, Stream};
use dinolab_core::{DType, Tensor};
use golden::Golden;

/// Our draws; the reference's statistics are of `draws` in the file's options.
const DRAWS: usize = 20_000;

/// Horizontally and vertically adjacent pairs that are both masked, as a share of all such pairs.
fn adjacency(mask: &[bool], grid: Grid) -> [f64; 2] {
    let Grid { height: h, width: w } = grid;
    let at = |y: usize, x: usize| mask[y * w + x];
    let pairs = |right: usize, down: usize| {
        let all = (0..h - down).flat_map(|y| (0..w - right).map(move |x| (y, x)));
        let both = all.filter(|&(y, x)| at(y, x) && at(y + down, x + right)).count();
        both as f64 / ((h - down) * (w - right)) as f64
    };
    [pairs(1, 0), pairs(0, 1)]
}

/// Masked regions whose cells touch along an edge.
fn components(mask: &[bool], grid: Grid) -> usize {
    let mut open = mask.to_vec();
    let mut count = 0;
    for start in 0..open.len() {
        let mut stack = vec![start];
        count += usize::from(open[start]);
        while let Some(i) = stack.pop() {
            if !std::mem::take(&mut open[i]) {
                continue;
            }
            let (y, x) = (i / grid.width, i % grid.width);
            stack.extend((x > 0).then(|| i - 1));
            stack.extend((x + 1 < grid.width).then(|| i + 1));
            stack.extend((y > 0).then(|| i - grid.width));
            stack.extend((y + 1 < grid.height).then(|| i + grid.width));
        }
    }
    count
}

#[test]
fn mask_statistics_equal_the_reference() {
    let Some(golden) = Golden::open("masking") else { return };
    let draws = golden.number("/draws", None);
    let cases = golden.options["cases"].as_array().unwrap().clone();
    for (k, case) in cases.iter().enumerate() {
        let number = |key: &str| case[key].as_u64().unwrap() as usize;
        let (grid, count) = (Grid { height: number("H"), width: number("W") }, number("num_masked"));
        let name = |what: &str| format!("{}x{}_n{count}.{what}", grid.height, grid.width);
        let mut rng = Rng::new(17, Stream::Mask, k as u64, 0);
        let masks: Vec<Vec<bool>> = (0..DRAWS).map(|_| BlockMask::new(grid).draw(&mut rng, count)).collect();

        let counts = masks.iter().map(|mask| mask.iter().filter(|&&m| m).count() as f64);
        let (least, most) = counts.fold((f64::MAX, 0.0f64), |(a, b), c| (a.min(c), b.max(c)));
        assert_eq!(golden.values(&name("count")), [count as f64, least, most]);

        // In units of the standard error of the difference of both samples.
        let noise = (1.0 / draws + 1.0 / DRAWS as f64).sqrt();
        let mut worst = 0.0f64;
        for (cell, &p) in golden.values(&name("prob_map")).iter().enumerate() {
            let ours = masks.iter().filter(|mask| mask[cell]).count() as f64 / DRAWS as f64;
            let spread = (p * (1.0 - p)).max(1.0 / draws).sqrt();
            worst = worst.max((ours - p).abs() / (spread * noise));
        }
        println!("masking {:24} worst cell: {worst:5.2} standard errors", name("prob_map"));
        assert!(worst < 5.0, "{}: {worst} standard errors", name("prob_map"));

        let [h, v]: [Vec<f64>; 2] = [0, 1].map(|axis| masks.iter().map(|mask| adjacency(mask, grid)[axis]).collect());
        let regions = masks.iter().map(|mask| components(mask, grid) as f64).collect();
        for (what, ours) in [("adj_h", h), ("adj_v", v), ("components", regions)] {
            let [mean, _, deviation] = golden.values(&name(what)).try_into().unwrap();
            let our_mean = ours.iter().sum::<f64>() / DRAWS as f64;
            let off = (our_mean - mean).abs() / (deviation * noise);
            println!("masking {:24} {our_mean:.4} against {mean:.4}: {off:5.2} standard errors", name(what));
            assert!(off < 5.0, "{}: {our_mean} against {mean}", name(what));
        }
    }
}

fn config(options: &serde_json::Value) -> MaskConfig {
    let number = |v: &serde_json::Value| v.as_f64().unwrap();
    MaskConfig {
        probability: number(&options["mask_probability"]),
        ratio: [number(&options["mask_ratio"][0]), number(&options["mask_ratio"][1])],
        random_circular_shift: false,
    }
}

/// A per-sample tensor `[B, crops, ...]` through the batch's crop-major slots.
fn collated(golden: &Golden, name: &str) -> Vec<f64> {
    let (shape, values) = (golden.shape(name), golden.values(name));
    let (images, crops, side) = (shape[0], shape[1], values.len() / shape[0] / shape[1]);
    let mut globals = vec![0.0f32; 2 * images];
    let mut buffer = vec![0.0f32; values.len()];
    let views = views_of_images(images, &mut globals, Some((&mut buffer, crops)), None);
    for (image, view) in views.into_iter().enumerate() {
        for (crop, slot) in view.locals.into_iter().enumerate() {
            let from = (image * crops + crop) * side;
            slot.iter_mut().zip(&values[from..from + side]).for_each(|(to, &x)| *to = x as f32);
        }
    }
    buffer.into_iter().map(f64::from).collect()
}

#[test]
fn collation_equals_the_reference() {
    let Some(golden) = Golden::open("collate") else { return };
    let mut comparison = golden.compare(DType::F32);
    for crops in ["global_crops", "local_crops", "gram_teacher_crops"] {
        comparison.check_values(&format!("collated_{crops}"), &collated(&golden, crops));
    }

    let grid = golden.number("/grid", None) as usize;
    let crops = 2 * golden.number("/B", None) as usize;
    let sizes = mask_sizes(crops, grid * grid, &config(&golden.options));
    comparison.check_values("requested_sizes", &sizes.iter().map(|&n| n as f64).collect::<Vec<_>>());
    comparison.check_values("upperbound", &[sizes.iter().sum::<usize>() as f64]);

    let rows = |name: &str| -> Vec<Vec<bool>> {
        golden.values(name).chunks(grid * grid).map(|row| row.iter().map(|&m| m != 0.0).collect()).collect()
    };
    let (mut given, mut shuffled) = (rows("given_masks"), rows("collated_masks"));
    let masks = Masks::from_rows(&shuffled, DType::F32).unwrap();
    comparison.check("collated_masks", &masks.masks);
    comparison.check("mask_indices_list", &masks.indices);
    comparison.check("masks_weight", &masks.weights);
    comparison.check("n_masked_patches", &Tensor::from_slice(&[masks.indices.len() as u32], &[1]).unwrap());
    given.sort();
    shuffled.sort();
    assert_eq!(given, shuffled, "a shuffle keeps the masks");

    for (i, table) in golden.options["size_tables"].as_array().unwrap().iter().enumerate() {
        let number = |key: &str| table[key].as_u64().unwrap() as usize;
        let (crops, patches) = (2 * number("B"), number("N"));
        let ratios: Vec<f32> = golden.values(&format!("ratios{i}")).iter().map(|&r| r as f32).collect();
        let sizes = mask_sizes_at(crops, patches, &ratios);
        comparison.check_values(&format!("sizes{i}"), &sizes.iter().map(|&n| n as f64).collect::<Vec<_>>());
        // The last bit of the reference's own ratios depends on its machine.
        let ours = mask_sizes(crops, patches, &config(table));
        assert!(ours.iter().zip(&sizes).all(|(a, b)| a.abs_diff(*b) <= 1), "{ours:?} against {sizes:?}");
    }
    comparison.finish();
}
