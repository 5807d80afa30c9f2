//! Probes that make images of their own, given features that are read off the pixels: windows, crops, corruptions, films.

use std::cell::RefCell;
use std::path::Path;

use dinolab_core::contract::{Dataset, Features, Grid, ImageSize, Probe, ProbeContext, Sample, Score};
use dinolab_core::registry::Chosen;
use dinolab_core::rng::{Rng, Stream};
use dinolab_core::{DType, Result, Tensor};
use dinolab_plugins::correspondence::Correspondence;
use serde_json::{json, Value as Json};

use super::table;

/// Side of a patch.
const PATCH: usize = 8;
const CLASSES: usize = 3;

/// Coloured ellipses over noise; the class of a pixel and the label of the image are those of the ellipse.
#[derive(Debug)]
pub struct Ellipses {
    pub part: u64,
    pub len: usize,
    pub size: ImageSize,
}

impl Dataset for Ellipses {
    fn len(&self) -> usize {
        self.len
    }
    fn get(&self, index: usize) -> Result<Sample> {
        let ImageSize { width, height } = self.size;
        let mut rng = Rng::new(self.part, Stream::Plugin, 3, index as u64);
        let class = 1 + rng.below(CLASSES - 1);
        let draw =
            |rng: &mut Rng, side: usize| (side as f64 * rng.uniform(0.3, 0.7), side as f64 * rng.uniform(0.15, 0.4));
        let ((cx, rx), (cy, ry)) = (draw(&mut rng, width), draw(&mut rng, height));
        let inside = |i: usize| ((i % width) as f64 - cx).hypot(((i / width) as f64 - cy) * rx / ry) < rx;
        let mask: Vec<u8> = (0..width * height).map(|i| if inside(i) { class as u8 } else { 0 }).collect();
        let ramp = rng.uniform(0.5, 1.5);
        let rgb = mask.iter().enumerate().flat_map(|(i, &class)| {
            let wave = 25.0 * (ramp * (i % width) as f64 / 3.0).sin() + 20.0 * ((i / width) as f64 / 2.5).cos();
            let noise = 40.0 * rng.unit();
            [60.0, 75.0, 90.0].map(|base| (base + f64::from(class) * 35.0 + wave + noise) as u8)
        });
        let (rgb, label) = (rgb.collect(), Some(class as u32 - 1));
        Ok(Sample { width, height, pixels: rgb, label, mask: Some(mask), ..Sample::default() })
    }
    fn classes(&self) -> usize {
        CLASSES - 1
    }
    fn mask_classes(&self) -> usize {
        CLASSES
    }
}

/// What a model was shown, and what it said.
#[derive(Default)]
struct Shown {
    /// `[h, w, 3]`, 0 to 255.
    images: Vec<Vec<f32>>,
    cls: Vec<Vec<f32>>,
    patches: Vec<Vec<f32>>,
}

/// The means of each quarter of every patch, in three colours; and over all of the image.
fn see(pixels: &Tensor, shown: &RefCell<Shown>) -> Result<Features> {
    let (n, height, width) = (pixels.dim(0), pixels.dim(2), pixels.dim(3));
    let grid = Grid { height: height / PATCH, width: width / PATCH };
    let (p, half) = (grid.patches(), PATCH / 2);
    let mut shown = shown.borrow_mut();
    let (mut all_cls, mut all_patches) = (Vec::<f32>::new(), Vec::<f32>::new());
    for image in pixels.as_slice::<f32>().chunks(3 * height * width) {
        let at = |c: usize, y: usize, x: usize| image[(c * height + y) * width + x];
        let quarter = |patch: usize, k: usize| {
            let (top, left) =
                (patch / grid.width * PATCH + k / 2 % 2 * half, patch % grid.width * PATCH + k % 2 * half);
            let places = (0..half * half).map(|i| at(k / 4, top + i / half, left + i % half));
            places.sum::<f32>() / (half * half) as f32 - 0.4
        };
        let patches: Vec<f32> = (0..p).flat_map(|patch| (0..12).map(move |k| quarter(patch, k))).collect();
        let mean = |k: usize| patches.iter().skip(k).step_by(12).map(|x| x * x).sum::<f32>() / p as f32;
        let cls: Vec<f32> = (0..12).map(|k| mean(k) - 0.05 * k as f32).collect();
        all_cls.extend(&cls);
        all_patches.extend(&patches);
        let interleaved = (0..height * width).flat_map(|i| (0..3).map(move |c| 255.0 * at(c, i / width, i % width)));
        shown.images.push(interleaved.collect());
        shown.cls.push(cls);
        shown.patches.push(patches);
    }
    let patches = Tensor::from_slice(&all_patches, &[n, p, 12])?;
    let cls = Tensor::from_slice(&all_cls, &[n, 12])?;
    let registers = Tensor::zeros(&[n, 0, 12], DType::F32);
    Ok(Features { cls, registers, prenorm: patches.clone(), patches, layers: Vec::new(), grid })
}

fn run(probe: &Json, train: &Ellipses, test: &Ellipses, image_size: ImageSize) -> (Vec<Score>, Shown, Json) {
    let shown = RefCell::default();
    let context = ProbeContext {
        features: &|pixels| see(pixels, &shown),
        train,
        test,
        image_size,
        patch_size: PATCH,
        normalization: (&[0.0; 3], &[1.0; 3]),
        seed: 0,
        warn: &|text| panic!("{text}"),
        show: None,
    };
    let chosen: Chosen<dyn Probe> = serde_json::from_value(probe.clone()).expect("the probe is registered");
    let scores = chosen.build(&mut ()).and_then(|probe| probe.run(&context)).expect("it can be taken");
    (scores, shown.into_inner(), serde_json::to_value(chosen.config()).expect("plain data"))
}

fn rows(rows: &[Vec<f32>], shape: &[usize]) -> Json {
    let shape: Vec<usize> = [rows.len()].into_iter().chain(shape.iter().copied()).collect();
    table(rows.iter().flatten().map(|&x| json!(f64::from(x))).collect(), &shape)
}

/// Sorted by number: what the order of draws was does not matter.
fn whole(dataset: &Ellipses) -> Vec<Sample> {
    (0..dataset.len).map(|i| dataset.get(i).expect("it is drawn")).collect()
}

/// The case of sliding windows: scores and what the other side needs. As many samples as there are, so that their order is that
/// of the draw; it is read off the images.
pub fn windows() -> (Vec<Score>, Json) {
    let size = ImageSize { width: 48, height: 40 };
    let (train, test) = (Ellipses { part: 1, len: 40, size }, Ellipses { part: 2, len: 20, size });
    let probe = json!({ "plugin": "linear_segmentation", "window": 32, "stride": 0.5, "l2": 1e-3, "iterations": 3000,
        "train_samples": 40, "test_samples": 20 });
    let (scores, shown, config) = run(&probe, &train, &test, size);
    // Windows of 32 pixels, 16 apart, the last at the end.
    let places = [[0, 0], [16, 0], [0, 8], [16, 8]];
    let masks = |dataset: &Ellipses, shown: &[Vec<f32>]| {
        let all = whole(dataset);
        let of = |window: &[f32]| {
            // The window at the image's first pixel is its corner.
            let same = |sample: &&Sample| {
                (0..32 * 32).all(|i| (sample.rgb()[3 * (i / 32 * 48 + i % 32)] as f32 - window[3 * i]).abs() < 0.5)
            };
            all.iter().find(same).expect("it is an image of the dataset").mask.clone().expect("it has a mask")
        };
        let masks: Vec<Vec<u8>> = shown.chunks(4).map(|windows| of(&windows[0])).collect();
        table(masks.iter().flatten().map(|&c| json!(c)).collect(), &[masks.len(), 40, 48])
    };
    let (first, second) = (&shown.images[..160], &shown.images[160..]);
    let case = json!({
        "config": config, "classes": CLASSES, "names": ["0", "1", "2"], "window": 32, "grid": 4, "size": [48, 40],
        "places": places,
        "train": { "patches": rows(&shown.patches[..160], &[16, 12]), "masks": masks(&train, first) },
        "test": { "patches": rows(&shown.patches[160..], &[16, 12]), "masks": masks(&test, second) },
    });
    (scores, case)
}

/// The case of two crops of images that are not square.
pub fn correspondence() -> (Vec<Score>, Json) {
    let size = ImageSize { width: 96, height: 64 };
    let test = Ellipses { part: 3, len: 30, size: ImageSize { width: 75, height: 50 } };
    let (scores, shown, config) = run(&json!({ "plugin": "correspondence", "samples": 30 }), &test, &test, size);
    // Every image is known by its two crops, which are those of its number.
    let order = drawn(30);
    let parts: Vec<_> = order.iter().map(|&i| Correspondence::parts(0, i, test.size)).collect();
    let images: Vec<Vec<f32>> = order
        .iter()
        .map(|&i| test.get(i).expect("it is drawn").rgb().iter().map(|&x| f32::from(x)).collect())
        .collect();
    let part = |range: std::ops::Range<usize>| {
        json!({ "patches": rows(&shown.patches[range.clone()], &[96, 12]),
            "rgb": rows(&shown.images[range], &[64, 96, 3]) })
    };
    let case = json!({ "config": config, "grid": [8, 12], "parts": parts, "from": part(0..30), "to": part(30..60),
        "images": { "rgb": rows(&images, &[50, 75, 3]) } });
    (scores, case)
}

/// The order in which a probe with seed 0 draws all of `n` test samples: that of images that are nothing but their number.
fn drawn(n: usize) -> Vec<usize> {
    #[derive(Debug)]
    struct Numbers(usize);
    impl Dataset for Numbers {
        fn len(&self) -> usize {
            self.0
        }
        fn get(&self, index: usize) -> Result<Sample> {
            Ok(Sample { width: 8, height: 8, pixels: vec![index as u8; 192].into(), ..Sample::default() })
        }
    }
    let order = RefCell::new(Vec::new());
    let data = Numbers(n);
    let context = ProbeContext {
        features: &|pixels: &Tensor| {
            let firsts = pixels.as_slice::<f32>().chunks(192).map(|image| (image[0] * 255.0).round() as usize);
            order.borrow_mut().extend(firsts);
            see(pixels, &RefCell::default())
        },
        train: &data,
        test: &data,
        image_size: ImageSize::square(8),
        patch_size: PATCH,
        normalization: (&[0.0; 3], &[1.0; 3]),
        seed: 0,
        warn: &|text| panic!("{text}"),
        show: None,
    };
    Correspondence { samples: n.try_into().expect("there are some") }.run(&context).expect("it can be taken");
    let mut order = order.into_inner();
    order.truncate(n);
    order
}

/// The case of corrupted images.
pub fn robustness() -> (Vec<Score>, Json) {
    let size = ImageSize { width: 72, height: 56 };
    let (train, test) = (Ellipses { part: 4, len: 60, size }, Ellipses { part: 5, len: 24, size });
    let probe = json!({ "plugin": "robustness", "train_samples": 60, "test_samples": 24, "k": 5 });
    let (scores, shown, config) = run(&probe, &train, &test, size);
    let labels = |dataset: &Ellipses, images: &[Vec<f32>]| -> Vec<Option<u32>> {
        let all = whole(dataset);
        let same = |sample: &Sample, image: &[f32]| {
            sample.rgb().iter().zip(image).all(|(a, b)| (f32::from(*a) - b).abs() < 0.5)
        };
        images.iter().map(|image| all.iter().find(|s| same(s, image)).expect("it is an image").label).collect()
    };
    let kinds = ["noise", "blur", "contrast", "jpeg", "scale"].into_iter();
    let names = kinds.flat_map(|kind| (1..=5).map(move |strength| format!("{kind}/{strength}")));
    let of = ["clean".to_string()].into_iter().chain(names).enumerate().map(|(i, name)| {
        let range = 60 + 24 * i..60 + 24 * (i + 1);
        let of =
            json!({ "cls": rows(&shown.cls[range.clone()], &[12]), "rgb": rows(&shown.images[range], &[56, 72, 3]) });
        (name, of)
    });
    let of: serde_json::Map<String, Json> = of.collect();
    let case = json!({ "config": config, "of": of,
        "train": { "cls": rows(&shown.cls[..60], &[12]), "labels": labels(&train, &shown.images[..60]) },
        "test": { "labels": labels(&test, &shown.images[60..84]) } });
    (scores, case)
}

/// The case of two films of a folder, written below `folder`.
pub fn tracking(folder: &Path) -> (Vec<Score>, Json) {
    let size = ImageSize { width: 96, height: 64 };
    let length = 6;
    let mut truths = Vec::new();
    for film in 0..2u64 {
        let name = format!("film{film}");
        let (frames, masks) = (folder.join("frames").join(&name), folder.join("masks").join(&name));
        [&frames, &masks].into_iter().for_each(|path| std::fs::create_dir_all(path).expect("a temporary folder"));
        let data = Ellipses { part: 20 + film, len: 2, size };
        let [near, far] = [0, 1].map(|i| data.get(i).expect("it is drawn"));
        for t in 0..length {
            // Two ellipses; the first moves over the second.
            let moved = |i: usize| {
                let x = (i % 96 + 96 - 3 * t) % 96;
                near.mask.as_ref().expect("it has one")[i / 96 * 96 + x]
            };
            let object = |i: usize| match (moved(i), far.mask.as_ref().expect("it has one")[i]) {
                (1.., _) => 1,
                (_, 1..) => 2,
                _ => 0,
            };
            let mask: Vec<u8> = (0..96 * 64).map(|i| if i == 5 { 255 } else { object(i) }).collect();
            let pixel = |i: usize| {
                let from = if mask[i] == 1 { (&near, i / 96 * 96 + (i % 96 + 96 - 3 * t) % 96) } else { (&far, i) };
                [0, 1, 2].map(|c| from.0.rgb()[3 * from.1 + c].saturating_add(80 * u8::from(mask[i] == 1)))
            };
            let rgb: Vec<u8> = (0..96 * 64).flat_map(pixel).collect();
            let save = |path: std::path::PathBuf, pixels: &[u8], color| {
                image::save_buffer(path, pixels, 96, 64, color).expect("a temporary folder");
            };
            save(frames.join(format!("{t:05}.png")), &rgb, image::ExtendedColorType::Rgb8);
            save(masks.join(format!("{t:05}.png")), &mask, image::ExtendedColorType::L8);
            truths.push(mask);
        }
    }
    let probe = json!({ "plugin": "tracking", "frames": folder.join("frames"), "masks": folder.join("masks"),
        "last_frames": 2, "radius": 3, "top_k": 4 });
    let data = Ellipses { part: 0, len: 1, size };
    let (scores, shown, config) = run(&probe, &data, &data, size);
    let film = |i: usize| {
        let range = i * length..(i + 1) * length;
        let masks = truths[range.clone()].iter().flatten().map(|&c| json!(c)).collect();
        json!({ "features": rows(&shown.patches[range], &[96, 12]), "grid": [8, 12],
            "masks": table(masks, &[length, 64, 96]) })
    };
    (scores, json!({ "config": config, "films": [film(0), film(1)] }))
}
