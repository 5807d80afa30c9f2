//! Batches on a GPU: the crops that the CPU makes.

use std::sync::Arc;

use dinolab_core::contract::{Dataset, Sample};
use dinolab_core::cuda::Gpu;
use dinolab_core::data::{Batch, DeviceBatches, Loader, LoaderSpec, Pipeline};
use dinolab_core::recipe::{BatchConfig, CropConfig, CropsEntry, Resolution};
use dinolab_core::registry::Chosen;
use dinolab_core::rng::{Rng, Stream};
use dinolab_core::testing::contracts;
use dinolab_core::{DType, Device, Result, Tensor};
use dinolab_tests::gpu_test;

// The plugins register themselves when they are linked in.
use dinolab_plugins as _;

/// Smooth colours with noise, in several sizes.
#[derive(Debug)]
struct Pictures;

impl Dataset for Pictures {
    fn len(&self) -> usize {
        10
    }

    fn get(&self, index: usize) -> Result<Sample> {
        let (width, height) = (50 + 13 * (index % 4), 70 - 9 * (index % 5));
        let mut rng = Rng::new(3, Stream::Plugin, 0, index as u64);
        let rgb = (0..3 * width * height).map(|i| {
            let (x, y, c) = (i / 3 % width, i / 3 / width, i % 3);
            let smooth = 128.0 + 120.0 * ((x * (c + 1) + index * 17) as f64 / 23.0).sin() * (y as f64 / 17.0).cos();
            (smooth + rng.uniform(-20.0, 20.0)).clamp(0.0, 255.0) as u8
        });
        Ok(Sample { width, height, pixels: rgb.collect(), ..Sample::default() })
    }
}

/// Small crops of an augmentation (a table as in a recipe; the default where it names none).
fn spec(own: CropConfig, augmentation: &str, teacher_crop_size: Option<usize>) -> LoaderSpec {
    let own = CropConfig { global_size: 48, local_size: 20, local_count: 3, ..own };
    LoaderSpec {
        batch: BatchConfig { size: 4, micro_batches: 2, loader_threads: 2, ..BatchConfig::default() },
        part: 0..2,
        crops: CropsEntry { own, plugin: contracts::chosen(augmentation).unwrap() },
        masking: Chosen::default(),
        patch_size: 4,
        augmentations: Vec::new(),
        teacher_crop_size,
        seed: 5,
        device: Device::Cpu,
        dtype: DType::F32,
        start_step: 0,
        total_steps: 3,
        left_out: Vec::new(),
    }
}

fn host(batch: &Batch) -> Vec<Tensor> {
    batch.tensors().map(|t| t.to(Device::Cpu)).collect()
}

/// [`Pictures`] of other channels: their number, and whether an image has 16 bits.
#[derive(Debug)]
struct Channels(usize, Wide);

/// Whether image so-and-so has 16 bits.
type Wide = fn(usize) -> bool;

impl Dataset for Channels {
    fn len(&self) -> usize {
        Pictures.len()
    }

    fn get(&self, index: usize) -> Result<Sample> {
        let Self(channels, wide) = *self;
        let rgb = Pictures.get(index)?;
        let mut rng = Rng::new(4, Stream::Plugin, 0, index as u64);
        let value = |i: usize| rgb.rgb()[3 * (i / channels) + i % channels % 3];
        let values = 0..channels * rgb.width * rgb.height;
        let pixels = match wide(index) {
            true => values.map(|i| (257 * u16::from(value(i))) ^ rng.below(256) as u16).collect(),
            false => values.map(value).collect(),
        };
        Ok(Sample { pixels, ..rgb })
    }

    fn channels(&self) -> usize {
        self.0
    }
}

/// The largest difference of all crops and masks over all steps.
fn difference(spec: LoaderSpec) -> f64 {
    difference_of(Arc::new(Pictures), spec)
}

fn difference_of(data: Arc<dyn Dataset>, spec: LoaderSpec) -> f64 {
    Gpu::get(0).unwrap();
    let on_gpu = LoaderSpec { device: Device::Cuda(0), ..spec.clone() };
    let cpu = Pipeline::new(data.clone(), spec.clone()).unwrap();
    let mut most = 0.0f64;
    let mut steps = 0;
    for step in Loader::new(data, on_gpu).unwrap() {
        let step = step.unwrap();
        let expected = cpu.step(step.step).unwrap();
        for (batch, expected) in step.batches.iter().zip(&expected.batches) {
            assert_eq!(batch.sources, expected.sources);
            for (got, want) in host(batch).iter().zip(expected.tensors()) {
                assert_eq!((got.shape(), got.dtype()), (want.shape(), want.dtype()));
                let pairs = got.to_f64_vec().into_iter().zip(want.to_f64_vec());
                // NaN counts.
                most = pairs.map(|(a, b)| (a - b).abs()).fold(most, |m, d| if d <= m { m } else { d });
            }
        }
        steps += 1;
    }
    assert_eq!(steps, spec.total_steps);
    most
}

gpu_test!(crops_are_the_same_numbers_as_on_the_cpu, {
    assert_eq!(difference(spec(CropConfig::default(), "", None)), 0.0);
});

gpu_test!(shared_colours_and_local_crops_of_global_ones_are_the_same_too, {
    let keys = "share_color_jitter = true\nlocal_from_global = true";
    assert_eq!(difference(spec(CropConfig::default(), keys, None)), 0.0);
});

gpu_test!(every_distortion_at_its_strongest_is_the_same, {
    let keys = "jitter_probability = 1.0\nbrightness = 1.0\ncontrast = 1.0\nsaturation = 1.0\nhue = 0.5\nblur = [1.0, 1.0, 1.0]\n\
        blur_sigma = [0.01, 100.0]\nsolarize = [1.0, 1.0, 1.0]\nsolarize_threshold = 77\naspect = [0.1, 10.0]\n\
        global_scale = [0.01, 1.0]";
    assert_eq!(difference(spec(CropConfig::default(), keys, Some(96))), 0.0);
    let thresholds = |threshold: u8| format!("solarize = [1.0, 1.0, 1.0]\nsolarize_threshold = {threshold}");
    for keys in [thresholds(0), thresholds(255), "grey_probability = 1.0".into()] {
        assert_eq!(difference(spec(CropConfig::default(), &keys, None)), 0.0, "{keys}");
    }
});

gpu_test!(crops_of_any_number_of_channels_and_of_16_bits_are_the_same, {
    let strong = "jitter_probability = 1.0\nbrightness = 1.0\ncontrast = 1.0\nblur = [1.0, 0.5, 0.5]\nsolarize = [0.5, 1.0, 0.5]";
    let off = "\nsaturation = 0.0\nhue = 0.0\ngrey_probability = 0.0";
    let every_second = |index: usize| index.is_multiple_of(2);
    let kinds: [(usize, Wide); 7] = [
        (1, |_| false),
        (1, |_| true),
        (2, every_second),
        (3, |_| true),
        (3, every_second),
        (4, |_| true),
        (7, every_second),
    ];
    for (channels, wide) in kinds {
        let own = match channels {
            3 => CropConfig::default(),
            n => CropConfig {
                mean: vec![0.4; n],
                std: (1..=n).map(|c| 0.1 * c as f32).collect(),
                ..CropConfig::default()
            },
        };
        for shared in ["", "\nshare_color_jitter = true\nlocal_from_global = true"] {
            let keys = format!("{strong}{}{shared}", if channels == 3 { "" } else { off });
            let data = Arc::new(Channels(channels, wide));
            assert_eq!(difference_of(data, spec(own.clone(), &keys, Some(96))), 0.0, "{channels} channels, {keys}");
        }
    }
});

gpu_test!(crops_of_another_augmentation_are_the_same, {
    assert_eq!(difference(spec(CropConfig::default(), "plugin = \"resized\"", Some(96))), 0.0);
});

gpu_test!(crops_of_further_augmentations_are_the_same, {
    // Colours of a whole image are changed where it lies, and only for that augmentation.
    for (main, further) in [("", ""), ("share_color_jitter = true", ""), ("", "share_color_jitter = true")] {
        let further = [further, "plugin = \"resized\""].map(|keys| contracts::chosen(keys).unwrap());
        let augmentations = ["strong", "weak"].map(String::from).into_iter().zip(further).collect();
        let spec = LoaderSpec { augmentations, ..spec(CropConfig::default(), main, Some(96)) };
        assert_eq!(difference(spec), 0.0, "{main}");
    }
});

gpu_test!(gram_crops_without_distortion_are_the_same, {
    let own = CropConfig { teacher_without_distortion: true, ..CropConfig::default() };
    assert_eq!(difference(spec(own, "local_from_global = true", Some(96))), 0.0);
});

gpu_test!(distorted_gram_crops_are_the_same, {
    assert_eq!(difference(spec(CropConfig::default(), "", Some(96))), 0.0);
});

gpu_test!(sizes_may_change_from_step_to_step, {
    let size = |global_size| Resolution { share: 1.0, global_size, local_size: 20, teacher_size: None };
    let crops = CropConfig { resolutions: vec![size(40), size(32)], ..CropConfig::default() };
    assert_eq!(difference(LoaderSpec { total_steps: 6, ..spec(crops, "", None) }), 0.0);
});

gpu_test!(finished_batches_keep_their_place_from_step_to_step, {
    // Enough images a part for each to have as many masked patches in every step.
    let mut spec = spec(CropConfig::default(), "", None);
    (spec.batch.size, spec.batch.micro_batches) = (16, 2);
    let pipeline = Pipeline::new(Arc::new(Pictures), spec).unwrap();
    let mut batches = DeviceBatches::new(Gpu::get(0).unwrap(), DType::F32).unwrap();
    let mut places = Vec::new();
    for step in 0..3 {
        let made = pipeline.step(step).unwrap().batches;
        let there = batches.upload(&made).unwrap();
        for (there, made) in there.iter().zip(&made) {
            assert_eq!(there.sources, made.sources);
            let same = host(there).iter().zip(made.tensors()).all(|(a, b)| a.as_bytes() == b.as_bytes());
            assert!(same, "step {step}");
        }
        places.push(there.iter().flat_map(Batch::tensors).map(Tensor::device_address).collect::<Vec<_>>());
    }
    assert!(places.windows(2).all(|w| w[0] == w[1]));
});

gpu_test!(lists_of_other_lengths_take_no_memory_of_their_own, {
    let pipeline = Pipeline::new(Arc::new(Pictures), spec(CropConfig::default(), "", None)).unwrap();
    let made = pipeline.step(0).unwrap().batches;
    let mut batches = DeviceBatches::new(Gpu::get(0).unwrap(), DType::F32).unwrap();
    let mut place = None;
    let masked = made[0].masks.indices.len();
    for count in (1..=masked).rev() {
        let mut fewer = made.clone();
        let masks = &mut fewer[0].masks;
        (masks.indices, masks.weights) = (masks.indices.view(0, &[count]), masks.weights.view(0, &[count]));
        let there = &batches.upload(&fewer).unwrap()[0];
        assert_eq!(there.masks.indices.to(Device::Cpu).as_bytes(), fewer[0].masks.indices.as_bytes());
        let [global, weights] = [&there.global, &there.masks.weights].map(Tensor::device_address);
        assert_eq!(*place.get_or_insert((global, weights)), (global, weights), "{count} of {masked}");
    }
});

gpu_test!(crops_in_bf16_are_those_in_f32_rounded, {
    let spec = LoaderSpec { device: Device::Cuda(0), dtype: DType::BF16, ..spec(CropConfig::default(), "", None) };
    Gpu::get(0).unwrap();
    let cpu = Pipeline::new(Arc::new(Pictures), LoaderSpec { device: Device::Cpu, dtype: DType::F32, ..spec.clone() });
    let expected = cpu.unwrap().step(0).unwrap();
    let got = Loader::new(Arc::new(Pictures), spec).unwrap().next().unwrap().unwrap();
    let (got, expected) = (got.batches[1].global.to(Device::Cpu), &expected.batches[1].global);
    assert_eq!(got.dtype(), DType::BF16);
    for (a, b) in got.to_f64_vec().into_iter().zip(expected.to_f64_vec()) {
        assert!((a - b).abs() <= b.abs() / 256.0, "{a}, {b}");
    }
});

gpu_test!(a_loader_that_is_dropped_early_ends, {
    Gpu::get(0).unwrap();
    let spec = LoaderSpec { device: Device::Cuda(0), total_steps: 1000, ..spec(CropConfig::default(), "", None) };
    let mut loader = Loader::new(Arc::new(Pictures), spec).unwrap();
    assert_eq!(loader.next().unwrap().unwrap().step, 0);
});
