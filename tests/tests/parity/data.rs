//! Masks and collation against the reference's numbers.

use crate::golden::{Comparison, Golden};
use dinolab_core::contract::Grid;
use dinolab_core::data::{views_of_images, Masks};
use dinolab_core::rng::{Rng, Stream};
use dinolab_core::{DType, Tensor};
use dinolab_plugins::block::Block;
use dinolab_plugins::mask_sizes::{mask_sizes, mask_sizes_at};

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

pub fn mask_statistics(golden: &Golden, _: DType, c: &mut Comparison<'_>) {
    let draws = golden.number("/draws", None);
    let cases = golden.options["cases"].as_array().unwrap().clone();
    for (k, case) in cases.iter().enumerate() {
        let number = |key: &str| case[key].as_u64().unwrap() as usize;
        let (grid, count) = (Grid { height: number("H"), width: number("W") }, number("num_masked"));
        let name = |what: &str| format!("{}x{}_n{count}.{what}", grid.height, grid.width);
        let mut rng = Rng::new(17, Stream::Mask, k as u64, 0);
        let masks: Vec<Vec<bool>> = (0..DRAWS).map(|_| Block::default().draw_one(&mut rng, grid, count)).collect();

        let counts = masks.iter().map(|mask| mask.iter().filter(|&&m| m).count() as f64);
        let (least, most) = counts.fold((f64::MAX, 0.0f64), |(a, b), c| (a.min(c), b.max(c)));
        c.check_values(&name("count"), &[count as f64, least, most]);

        // In units of the standard error of the difference of both samples.
        let noise = (1.0 / draws + 1.0 / DRAWS as f64).sqrt();
        let share = |cell: usize| masks.iter().filter(|mask| mask[cell]).count() as f64 / DRAWS as f64;
        let ours: Vec<f64> = (0..grid.patches()).map(share).collect();
        c.check_values(&name("prob_map"), &ours);
        let stored = golden.values(&name("prob_map")).iter();
        let off = ours.iter().zip(stored).map(|(our, p)| {
            let spread = (p * (1.0 - p)).max(1.0 / draws).sqrt();
            (our - p).abs() / (spread * noise)
        });
        let worst = off.fold(0.0, f64::max);
        assert!(worst < 5.0, "{}: {worst} standard errors", name("prob_map"));

        let [h, v]: [Vec<f64>; 2] = [0, 1].map(|axis| masks.iter().map(|mask| adjacency(mask, grid)[axis]).collect());
        let regions = masks.iter().map(|mask| components(mask, grid) as f64).collect();
        for (what, ours) in [("adj_h", h), ("adj_v", v), ("components", regions)] {
            let mean = ours.iter().sum::<f64>() / DRAWS as f64;
            let deviation = (ours.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / DRAWS as f64).sqrt();
            // The error of the mean is that of as many draws as the file's.
            c.check_values(&name(what), &[mean, deviation / draws.sqrt(), deviation]);
            let [stored, _, spread] = golden.values(&name(what)).try_into().unwrap();
            let off = (mean - stored).abs() / (spread * noise);
            assert!(off < 5.0, "{}: {mean} against {stored}, {off} standard errors", name(what));
        }
    }
}

/// How many patches of each of so many crops are masked, by the options of a case.
fn sizes(crops: usize, patches: usize, options: &serde_json::Value) -> Vec<usize> {
    let number = |v: &serde_json::Value| v.as_f64().unwrap();
    let ratio = [0, 1].map(|end| number(&options["mask_ratio"][end]));
    mask_sizes(crops, patches, number(&options["mask_probability"]), ratio)
}

/// A per-sample tensor `[B, crops, ...]` through the batch's crop-major slots.
fn collated(golden: &Golden, name: &str) -> Vec<f64> {
    let (shape, values) = (golden.shape(name), golden.values(name));
    let (images, crops, side) = (shape[0], shape[1], values.len() / shape[0] / shape[1]);
    let mut globals = vec![0.0f32; 2 * images];
    let mut buffer = vec![0.0f32; values.len()];
    let views = views_of_images(images, &mut globals, Some((&mut buffer, crops)), None, Vec::new());
    for (image, view) in views.into_iter().enumerate() {
        for (crop, slot) in view.locals.into_iter().enumerate() {
            let from = (image * crops + crop) * side;
            slot.iter_mut().zip(&values[from..from + side]).for_each(|(to, &x)| *to = x as f32);
        }
    }
    buffer.into_iter().map(f64::from).collect()
}

pub fn collate(golden: &Golden, _: DType, c: &mut Comparison<'_>) {
    for crops in ["global_crops", "local_crops", "gram_teacher_crops"] {
        c.check_values(&format!("collated_{crops}"), &collated(golden, crops));
    }

    let grid = golden.number("/grid", None) as usize;
    let crops = 2 * golden.number("/B", None) as usize;
    let requested = sizes(crops, grid * grid, &golden.options);
    c.check_values("requested_sizes", &requested.iter().map(|&n| n as f64).collect::<Vec<_>>());
    c.check_values("upperbound", &[requested.iter().sum::<usize>() as f64]);

    let rows = |name: &str| -> Vec<Vec<bool>> {
        golden.values(name).chunks(grid * grid).map(|row| row.iter().map(|&m| m != 0.0).collect()).collect()
    };
    let (mut given, mut shuffled) = (rows("given_masks"), rows("collated_masks"));
    let masks = Masks::from_rows(&shuffled, DType::F32).unwrap();
    c.check("collated_masks", &masks.masks);
    c.check("mask_indices_list", &masks.indices);
    c.check("masks_weight", &masks.weights);
    c.check("n_masked_patches", &Tensor::from_slice(&[masks.indices.len() as u32], &[1]).unwrap());
    given.sort();
    shuffled.sort();
    assert_eq!(given, shuffled, "a shuffle keeps the masks");

    for (i, table) in golden.options["size_tables"].as_array().unwrap().iter().enumerate() {
        let number = |key: &str| table[key].as_u64().unwrap() as usize;
        let (crops, patches) = (2 * number("B"), number("N"));
        let ratios: Vec<f32> = golden.values(&format!("ratios{i}")).iter().map(|&r| r as f32).collect();
        let given = mask_sizes_at(crops, patches, &ratios);
        c.check_values(&format!("sizes{i}"), &given.iter().map(|&n| n as f64).collect::<Vec<_>>());
        // The last bit of the reference's own ratios depends on its machine.
        let ours = sizes(crops, patches, table);
        assert!(ours.iter().zip(&given).all(|(a, b)| a.abs_diff(*b) <= 1), "{ours:?} against {given:?}");
    }
}
