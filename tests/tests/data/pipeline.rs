//! Crops, masks and the loader.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use dinolab_core::contract::{Cut, Dataset, ImagePlan, Sample};
use dinolab_core::data::{Batch, CropMaker, Loader, LoaderSpec, Pipeline, StepBatches, Views};
use dinolab_core::recipe::{BatchConfig, CropConfig, CropsEntry, Resolution};
use dinolab_core::registry::Chosen;
use dinolab_core::rng::{Rng, Stream};
use dinolab_core::testing::contracts;
use dinolab_core::{DType, Device, Error, Result};
use dinolab_plugins::multi_crop::MultiCrop;
use proptest::prelude::*;

/// Noise images of several sizes; some cannot be read, and reading may take time.
#[derive(Debug)]
struct Noise {
    len: usize,
    broken: fn(usize) -> bool,
    delay: Duration,
    reads: AtomicUsize,
}

impl Noise {
    fn new(len: usize) -> Self {
        Self { len, broken: |_| false, delay: Duration::ZERO, reads: AtomicUsize::new(0) }
    }
}

impl Dataset for Noise {
    fn len(&self) -> usize {
        self.len
    }

    fn get(&self, index: usize) -> Result<Sample> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(self.delay);
        if (self.broken)(index) {
            return Err(Error::content(self.describe(index), "not an image", "remove it"));
        }
        let (width, height) = (24 + index % 5, 20 + index % 7);
        let mut rng = Rng::new(0, Stream::Plugin, 0, index as u64);
        let pixels = (0..3 * width * height).map(|_| rng.u32() as u8).collect();
        Ok(Sample { width, height, pixels, ..Sample::default() })
    }

    fn describe(&self, index: usize) -> String {
        format!("photos/{index}.jpg")
    }
}

/// Crops of an augmentation (a table as in a recipe; the default where it names none).
fn crops(own: CropConfig, augmentation: &str) -> CropsEntry {
    CropsEntry { own, plugin: contracts::chosen(augmentation).unwrap() }
}

fn spec() -> LoaderSpec {
    LoaderSpec {
        part: 0..usize::MAX,
        batch: BatchConfig { size: 6, loader_threads: 2, ..BatchConfig::default() },
        crops: crops(CropConfig { global_size: 16, local_size: 8, local_count: 3, ..CropConfig::default() }, ""),
        masking: Chosen::default(),
        patch_size: 4,
        augmentations: Vec::new(),
        teacher_crop_size: Some(24),
        seed: 9,
        device: Device::Cpu,
        dtype: DType::F32,
        start_step: 0,
        total_steps: 6,
        left_out: Vec::new(),
    }
}

/// Everything in a step's batches, as bytes.
fn bytes(step: &StepBatches) -> Vec<u8> {
    let mut all = step.step.to_le_bytes().to_vec();
    for batch in &step.batches {
        let tensors = [Some(&batch.global), batch.local.as_ref(), batch.teacher.as_ref()];
        let masks = [&batch.masks.masks, &batch.masks.indices, &batch.masks.weights];
        tensors.into_iter().flatten().chain(masks).for_each(|t| all.extend(t.as_bytes()));
        batch.indices().for_each(|i| all.extend(i.to_le_bytes()));
    }
    all
}

fn run(spec: LoaderSpec) -> Vec<Vec<u8>> {
    Loader::new(Arc::new(Noise::new(10)), spec).unwrap().map(|step| bytes(&step.unwrap())).collect()
}

#[test]
fn batches_do_not_depend_on_threads_or_prefetch() {
    let expected = run(spec());
    assert_eq!(expected.len(), 6);
    for (threads, prefetch) in [(1, 0), (1, 5), (4, 2)] {
        let mut spec = spec();
        spec.batch.loader_threads = threads;
        spec.batch.prefetch = prefetch;
        assert!(run(spec) == expected, "{threads} threads, prefetch {prefetch}");
    }
}

#[test]
fn a_resumed_run_gets_the_same_batches() {
    let expected = run(spec());
    let resumed = run(LoaderSpec { start_step: 4, ..spec() });
    assert!(resumed == expected[4..]);
    let pipeline = Pipeline::new(Arc::new(Noise::new(10)), spec()).unwrap();
    assert!(bytes(&pipeline.step(2).unwrap()) == expected[2], "a step can be made again");
}

#[test]
fn epochs_follow_each_other_without_a_gap() {
    // 6 steps of 6 images from 10: three whole epochs and a part.
    let loader = Loader::new(Arc::new(Noise::new(10)), spec()).unwrap();
    let order: Vec<usize> = loader.flat_map(|step| step.unwrap().batches[0].indices().collect::<Vec<_>>()).collect();
    for epoch in order.chunks_exact(10) {
        let mut seen = epoch.to_vec();
        seen.sort_unstable();
        assert_eq!(seen, (0..10).collect::<Vec<_>>());
    }
}

/// Crops and masks of every image of a step, by its index in the dataset (of which a step has none twice).
fn by_image(batches: &[Batch], crops: usize) -> BTreeMap<usize, Vec<u8>> {
    let mut all = BTreeMap::new();
    for batch in batches {
        let images = batch.images();
        for (slot, index) in batch.indices().enumerate() {
            let mut own = Vec::new();
            let parts = [(Some(&batch.global), 2), (batch.local.as_ref(), crops), (batch.teacher.as_ref(), 2)];
            for (tensor, crops) in parts.into_iter().chain([(Some(&batch.masks.masks), 2)]) {
                let bytes = tensor.expect("crops of every kind").as_bytes();
                let size = bytes.len() / (crops * images);
                (0..crops).for_each(|crop| own.extend(&bytes[(crop * images + slot) * size..][..size]));
            }
            assert!(all.insert(index, own).is_none());
        }
    }
    all
}

#[test]
fn parts_of_a_batch_have_the_images_crops_and_masks_of_the_whole() {
    let pipelines = [1, 2, 3, 6].map(|parts| {
        let mut spec = spec();
        spec.batch.micro_batches = parts;
        Pipeline::new(Arc::new(Noise::new(60)), spec).unwrap()
    });
    for step in 0..5 {
        let [whole, parts @ ..] = pipelines.each_ref().map(|pipeline| pipeline.step(step).unwrap().batches);
        let expected = by_image(&whole, 3);
        assert_eq!(expected.len(), 6);
        for batches in parts {
            assert!(by_image(&batches, 3) == expected, "step {step}, {} parts", batches.len());
            let masked: usize = batches.iter().map(|b| b.masks.indices.len()).sum();
            assert_eq!(masked, pipelines[0].masked_patches(step));
        }
    }
}

#[test]
fn the_number_of_masked_patches_of_each_part_is_the_same_in_every_step() {
    let mut spec = spec();
    (spec.batch.size, spec.batch.micro_batches) = (32, 4);
    (spec.crops.own.global_size, spec.teacher_crop_size, spec.total_steps) = (40, None, 30);
    let pipeline = Pipeline::new(Arc::new(Noise::new(60)), spec).unwrap();
    let counts = |step: u64| -> Vec<usize> {
        pipeline.step(step).unwrap().batches.iter().map(|b| b.masks.indices.len()).collect()
    };
    let first = counts(0);
    assert!(first.iter().max().unwrap() - first.iter().min().unwrap() <= 1, "{first:?}");
    assert!((1..30).all(|step| counts(step) == first));
}

#[test]
fn data_that_is_left_out_is_passed_over_and_what_follows_moves_up() {
    let whole = run(LoaderSpec { total_steps: 12, ..spec() });
    let shorter = run(LoaderSpec { total_steps: 9, left_out: vec![(2, 1), (5, 2)], ..spec() });
    // The number of a step comes first in its bytes.
    let content = |steps: &[Vec<u8>], i: usize| steps[i][8..].to_vec();
    for (step, source) in [0, 1, 3, 4, 5, 8, 9, 10, 11].into_iter().enumerate() {
        assert!(content(&shorter, step) == content(&whole, source), "step {step}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_the_student_sees_does_not_depend_on_who_else_looks(
        gram in 1usize..12, step in 0u64..1000, flags in any::<[bool; 4]>(), parts in 1usize..4, seed: u64,
    ) {
        let keys = format!(
            "local_from_global = {}\nshare_color_jitter = {}\nhorizontal_flip = {}",
            flags[1], flags[2], flags[3]
        );
        let crops = crops(CropConfig { teacher_without_distortion: flags[0], ..spec().crops.own }, &keys);
        let of = |teacher_crop_size: Option<usize>| {
            let mut spec = LoaderSpec { crops: crops.clone(), teacher_crop_size, seed, total_steps: 1001, ..spec() };
            spec.batch.micro_batches = parts;
            Pipeline::new(Arc::new(Noise::new(60)), spec).unwrap().step(step).unwrap().batches
        };
        for (with, without) in of(Some(4 * gram)).iter().zip(&of(None)) {
            prop_assert_eq!(with.global.as_bytes(), without.global.as_bytes());
            prop_assert_eq!(with.local.as_ref().unwrap().as_bytes(), without.local.as_ref().unwrap().as_bytes());
            prop_assert_eq!(with.masks.masks.as_bytes(), without.masks.masks.as_bytes());
            prop_assert_eq!(&with.sources, &without.sources);
            prop_assert!(with.teacher.is_some() && without.teacher.is_none());
        }
    }
}

#[test]
fn broken_samples_are_named_and_replaced() {
    let dataset = Arc::new(Noise { broken: |i| i == 3, ..Noise::new(10) });
    let mut spec = spec();
    spec.batch.max_broken_share = 0.5;
    let steps: Vec<StepBatches> = Loader::new(dataset, spec).unwrap().map(Result::unwrap).collect();
    let broken: Vec<_> = steps.iter().flat_map(|s| &s.broken).collect();
    assert!(broken.len() >= 3, "sample 3 comes once an epoch: {broken:?}");
    assert!(broken.iter().all(|b| b.index == 3 && b.name == "photos/3.jpg" && b.reason.contains("not an image")));
    assert!(steps.iter().flat_map(|s| &s.batches).all(|b| b.indices().all(|i| i != 3) && b.images() == 6));
}

#[test]
fn too_many_broken_samples_stop_the_run() {
    let dataset = Arc::new(Noise { broken: |i| i % 3 == 0, ..Noise::new(100) });
    let mut loader = Loader::new(dataset, LoaderSpec { total_steps: 1000, ..spec() }).unwrap();
    let error = loader.find_map(Result::err).expect("a third is more than a hundredth").to_string();
    assert!(error.contains("cannot be read") && error.contains("photos/") && error.contains("0.01"), "{error}");
    assert!(loader.next().is_none(), "an error is the last item");
}

#[test]
fn a_dataset_without_a_readable_sample_stops_at_once() {
    let dataset = Arc::new(Noise { broken: |_| true, ..Noise::new(1_000_000) });
    let mut loader = Loader::new(dataset.clone(), spec()).unwrap();
    let error = loader.next().unwrap().unwrap_err().to_string();
    assert!(error.contains("in a row") && error.contains(".jpg: not an image"), "{error}");
    assert!(dataset.reads.load(Ordering::Relaxed) < 1000);
}

#[test]
fn an_image_smaller_than_a_patch_is_a_broken_sample() {
    let mut spec = spec();
    (spec.patch_size, spec.crops.own.global_size, spec.crops.own.local_size) = (21, 42, 21);
    spec.teacher_crop_size = None;
    spec.batch.max_broken_share = 1.0;
    let pipeline = Pipeline::new(Arc::new(Noise::new(100)), spec).unwrap();
    let broken = pipeline.step(0).unwrap().broken;
    // Heights are 20 to 26.
    assert!(broken.iter().all(|b| b.index % 7 == 0 && b.reason.contains("less than a patch of 21x21")), "{broken:?}");
}

#[test]
fn dropping_a_loader_ends_its_threads_promptly() {
    let dataset = Arc::new(Noise { delay: Duration::from_millis(20), ..Noise::new(100) });
    let mut spec = LoaderSpec { total_steps: 1000, ..spec() };
    spec.batch.size = 200;
    let loader = Loader::new(dataset.clone(), spec).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    let start = Instant::now();
    drop(loader);
    // A whole step would take 2 s.
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    assert_eq!(Arc::strong_count(&dataset), 1, "no thread holds the dataset any more");
}

/// A dataset that is not there any more: its reads never end, or it panics.
#[derive(Debug)]
struct Gone {
    hangs: bool,
}

impl Dataset for Gone {
    fn len(&self) -> usize {
        10
    }

    fn get(&self, index: usize) -> Result<Sample> {
        match self.hangs {
            true => std::thread::sleep(Duration::from_secs(3600)),
            false => panic!("no picture {index}"),
        }
        Err(Error::content(self.describe(index), "gone", "bring it back"))
    }
}

#[test]
fn a_wait_for_data_that_never_come_ends_when_asked_to() {
    let mut loader = Loader::new(Arc::new(Gone { hangs: true }), spec()).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let later = stop.clone();
    let signal = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        later.store(true, Ordering::Relaxed);
    });
    let start = Instant::now();
    assert!(loader.next_unless(&stop).is_none());
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    signal.join().unwrap();
    // Its threads hang in a read; they do not keep the run from ending.
    drop(loader);
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
}

#[test]
fn what_panics_in_a_loader_thread_is_an_error_of_the_run() {
    let mut loader = Loader::new(Arc::new(Gone { hangs: false }), spec()).unwrap();
    let error = loader.next().expect("an error is an item").unwrap_err().to_string();
    assert!(error.contains("a loader thread failed: no picture"), "{error}");
    assert!(loader.next().is_none());
}

#[test]
fn numbers_that_do_not_fit_together_are_errors() {
    let build = |change: &dyn Fn(&mut LoaderSpec)| {
        let mut spec = spec();
        change(&mut spec);
        Pipeline::new(Arc::new(Noise::new(10)), spec).map(|_| ()).unwrap_err().to_string()
    };
    assert!(build(&|s| s.batch.micro_batches = 4).contains("6 images cannot be split into 4"));
    assert!(build(&|s| s.crops.own.global_size = 18)
        .contains("crops.global_size = 18 is not a multiple of the patch size 4"));
    assert!(build(&|s| s.teacher_crop_size = Some(30)).contains("crop_size of a teacher = 30"));
    let larger = |s: &mut LoaderSpec| {
        let sizes = |global_size, local_size| Resolution { share: 1.0, global_size, local_size, teacher_size: None };
        s.crops.plugin = contracts::chosen("local_from_global = true").unwrap();
        s.crops.own.resolutions = vec![sizes(32, 16), sizes(16, 24)];
    };
    assert!(build(&larger).contains("local crops of 24 pixels cannot be cut from global ones of 16"));
}

/// Largest distance between the empirical distribution of `sample` and the uniform one on [0, 1], times sqrt(n):
/// above 1.95 with probability 0.001 (Kolmogorov-Smirnov).
fn distance_to_uniform(mut sample: Vec<f64>) -> f64 {
    sample.sort_by(f64::total_cmp);
    let n = sample.len() as f64;
    let gap = |(i, x): (usize, &f64)| (x - i as f64 / n).abs().max((x - (i + 1) as f64 / n).abs());
    sample.iter().enumerate().map(gap).fold(0.0, f64::max) * n.sqrt()
}

#[test]
fn boxes_have_uniform_area_log_uniform_aspect_and_uniform_place() {
    let (side, scale) = (40_000, [0.05, 0.32]);
    let mut rng = Rng::new(3, Stream::Augment, 0, 0);
    let config = MultiCrop::default();
    let boxes: Vec<_> = (0..20_000).map(|_| config.random_box(&mut rng, side, side, scale)).collect();
    let of = |f: &dyn Fn(f64, f64, f64) -> f64| {
        boxes.iter().map(|b| f(b.width as f64, b.height as f64, b.x as f64)).collect::<Vec<_>>()
    };
    let all = (side * side) as f64;
    let area = distance_to_uniform(of(&|w, h, _| (w * h / all - scale[0]) / (scale[1] - scale[0])));
    let aspect = distance_to_uniform(of(&|w, h, _| (w / h).ln() / (2.0 * (4.0f64 / 3.0).ln()) + 0.5));
    let place = distance_to_uniform(of(&|w, _, x| x / (side as f64 - w)));
    assert!(area < 1.95 && aspect < 1.95 && place < 1.95, "{area} {aspect} {place}");
}

#[test]
fn a_box_that_never_fits_becomes_the_central_one() {
    let mut rng = Rng::new(3, Stream::Augment, 0, 0);
    let config = MultiCrop::default();
    let whole = config.random_box(&mut rng, 12, 1000, [1.0, 1.0]);
    assert_eq!((whole.x, whole.y, whole.width, whole.height), (0, 492, 12, 16));
    let whole = config.random_box(&mut rng, 1000, 12, [1.0, 1.0]);
    assert_eq!((whole.x, whole.y, whole.width, whole.height), (492, 0, 16, 12));
}

fn plans(crops: &CropsEntry) -> Vec<ImagePlan> {
    let (augmentation, _) = crops.build(&crops.variants(None)[0], 8).unwrap();
    let rng = |i: u64| move |crop: u64| Rng::new(1, Stream::Augment, 0, i << 16 | crop);
    (0..4000).map(|i| augmentation.plan((64, 64), &rng(i))).collect()
}

#[test]
fn distortions_come_with_the_reference_probabilities() {
    let plans = plans(&crops(CropConfig { local_count: 1, ..CropConfig::default() }, ""));
    let share = |f: &dyn Fn(&ImagePlan) -> bool| plans.iter().filter(|p| f(p)).count() as f64 / plans.len() as f64;
    let flipped = |cut: Cut| matches!(cut, Cut::Image { flip: true, .. });
    for (name, p, got) in [
        ("jitter", 0.8, share(&|p| p.globals[0].color.jitter.is_some())),
        ("grey", 0.2, share(&|p| p.locals[0].color.grey)),
        ("flip", 0.5, share(&|p| flipped(p.globals[1].cut))),
        ("blur of the first", 0.0, share(&|p| p.globals[0].blur.is_some())),
        ("blur of the second", 0.9, share(&|p| p.globals[1].blur.is_some())),
        ("blur of a local one", 0.5, share(&|p| p.locals[0].blur.is_some())),
        ("solarise the first", 0.0, share(&|p| p.globals[0].solarize == Some(128))),
        ("solarise the second", 0.2, share(&|p| p.globals[1].solarize == Some(128))),
        ("solarise a local one", 0.0, share(&|p| p.locals[0].solarize.is_some())),
    ] {
        let error = 5.0 * f64::sqrt(p * (1.0 - p) / 4000.0);
        assert!((got - p).abs() <= error, "{name}: {got}, expected {p}");
    }
    let hues: Vec<f64> = plans.iter().filter_map(|p| p.globals[0].color.jitter).map(|j| (j.hue + 0.1) / 0.2).collect();
    let sigmas = plans.iter().filter_map(|p| p.locals[0].blur).map(|s| (f64::from(s) - 0.1) / 1.9).collect();
    let (hues, sigmas) = (distance_to_uniform(hues), distance_to_uniform(sigmas));
    assert!(hues < 1.95 && sigmas < 1.95, "{hues} {sigmas}");
}

#[test]
fn options_change_what_they_say_and_nothing_else() {
    let base = CropConfig { global_size: 64, local_size: 32, local_count: 4, ..CropConfig::default() };
    let [plain, flat, shared, nested] =
        ["", "horizontal_flip = false", "share_color_jitter = true", "local_from_global = true"]
            .map(|keys| plans(&crops(base.clone(), keys)));
    for i in 0..plain.len() {
        let (Cut::Image { area, .. }, Cut::Image { area: same, flip }) =
            (plain[i].globals[0].cut, flat[i].globals[0].cut)
        else {
            panic!("global crops are cut from the image")
        };
        assert!(area == same && !flip);
        assert!(shared[i].shared_color.is_some() && shared[i].locals.iter().all(|c| c.color == Default::default()));
        assert_eq!(nested[i].globals, plain[i].globals);
        for (k, crop) in nested[i].locals.iter().enumerate() {
            let Cut::Global { global, x, y } = crop.cut else { panic!("cut from a global crop") };
            assert!(global == k / 2 && x % 8 == 0 && y % 8 == 0 && x + 32 <= 64 && y + 32 <= 64);
        }
    }
}

/// The crops of `plan`, normalisation undone: [globals, locals, gram], each `[3, side, side]` in 0..=255.
fn crops_of(config: &CropsEntry, gram: Option<usize>, image: &Sample, plan: &ImagePlan) -> [Vec<Vec<f32>>; 3] {
    let buffers = |count: usize, side: usize| vec![vec![0.0f32; 3 * side * side]; count];
    let (globals, locals) = (buffers(2, config.global_size), buffers(plan.locals.len(), config.local_size));
    let mut all = [globals, locals, gram.map_or(Vec::new(), |side| buffers(2, side))];
    let [globals, locals, teacher] = all.each_mut().map(|b| b.iter_mut().map(Vec::as_mut_slice).collect());
    CropMaker::new(config, gram).apply(image, plan, &mut Views { globals, locals, teacher, further: vec![] });
    for crop in all.iter_mut().flatten() {
        let n = crop.len() / 3;
        let pixel = |(i, x): (usize, &mut f32)| *x = 255.0 * (*x * config.std[i / n] + config.mean[i / n]);
        crop.iter_mut().enumerate().for_each(pixel);
    }
    all
}

/// Red grows to the right, green downwards.
fn ramp(side: usize) -> Sample {
    let rgb = (0..side * side).flat_map(|i| [(i % side) as u8, (i / side) as u8, 128]).collect();
    Sample { width: side, height: side, pixels: rgb, ..Sample::default() }
}

#[test]
fn undistorted_gram_crops_show_the_boxes_of_the_global_ones() {
    let own = CropConfig { global_size: 32, local_count: 0, teacher_without_distortion: true, ..CropConfig::default() };
    let config = crops(own, "");
    let image = ramp(200);
    for plan in &plans(&config)[..50] {
        let [_, _, gram] = crops_of(&config, Some(64), &image, plan);
        for (crop, pixels) in plan.globals.iter().zip(gram) {
            let Cut::Image { area, flip } = crop.cut else { unreachable!() };
            for (x, y) in [(10, 20), (50, 33)] {
                let column = if flip { 63 - x } else { x };
                let red = area.x as f32 + (column as f32 + 0.5) * area.width as f32 / 64.0 - 0.5;
                let green = area.y as f32 + (y as f32 + 0.5) * area.height as f32 / 64.0 - 0.5;
                let (r, g) = (pixels[y * 64 + x], pixels[64 * 64 + y * 64 + x]);
                assert!((r - red).abs() < 2.0 && (g - green).abs() < 2.0, "{r} {red}, {g} {green}");
            }
        }
    }
}

#[test]
fn distorted_gram_crops_are_the_global_ones_in_more_detail() {
    let config = crops(CropConfig { global_size: 32, local_count: 0, ..CropConfig::default() }, "");
    let image = ramp(200);
    for plan in &plans(&config)[..50] {
        let [global, _, gram] = crops_of(&config, Some(64), &image, plan);
        for ((small, large), crop) in global.iter().zip(&gram).zip(&plan.globals) {
            // Away from the border and from solarised edges, a smooth image is reduced to the mean of its 2x2 cells.
            if crop.solarize.is_some() {
                continue;
            }
            for c in 0..3 {
                for (x, y) in [(8, 8), (20, 15), (25, 9)] {
                    let cell = |dx: usize, dy: usize| large[c * 4096 + (2 * y + dy) * 64 + 2 * x + dx];
                    let mean = (cell(0, 0) + cell(1, 0) + cell(0, 1) + cell(1, 1)) / 4.0;
                    let value = small[c * 1024 + y * 32 + x];
                    assert!((value - mean).abs() < 8.0, "{value} and {mean}");
                }
            }
        }
    }
}

#[test]
fn a_local_crop_from_a_global_one_shows_its_window() {
    let own = CropConfig { global_size: 64, local_size: 32, local_count: 2, ..CropConfig::default() };
    let config = crops(own, "local_from_global = true");
    let image = ramp(200);
    for plan in &mut plans(&config)[..20] {
        // Without distortion both are plain cuts.
        for crop in plan.globals.iter_mut().chain(&mut plan.locals) {
            (crop.color, crop.blur, crop.solarize) = (Default::default(), None, None);
        }
        let [globals, locals, _] = crops_of(&config, None, &image, plan);
        for (crop, local) in plan.locals.iter().zip(locals) {
            let Cut::Global { global, x, y } = crop.cut else { unreachable!() };
            #[allow(clippy::needless_range_loop)] // Three pictures are walked together.
            for i in 0..3 * 32 * 32 {
                let (c, row, column) = (i / 1024, i / 32 % 32, i % 32);
                assert!((local[i] - globals[global][c * 4096 + (y + row) * 64 + x + column]).abs() < 1e-3);
            }
        }
    }
}
