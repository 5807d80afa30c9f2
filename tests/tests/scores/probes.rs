//! Scores of probes against scikit-learn, numpy, scipy and Pillow (`tests/probes.py`), given the same features.
//!
//! Needs a Python with `sklearn`: that of `DINOLAB_PYTHON`, of `target/python`, or `python3`. Without, the test says so and
//! passes.

mod pixels;
use dinolab_tests::program;
use std::cell::RefCell;
use std::collections::BTreeMap;

use dinolab_core::contract::{Dataset, Features, Grid, ImageSize, Probe, ProbeContext, Sample};
use dinolab_core::registry::Chosen;
use dinolab_core::rng::{Rng, Stream};
use dinolab_core::{DType, Result, Tensor};
use dinolab_plugins::few_shot::FewShot;
use serde_json::{json, Value as Json};

/// Side of an image in pixels, and of its patch grid.
const SIZE: usize = 32;
const GRID: usize = 4;
const DIM: usize = 12;
const CLASSES: usize = 7;
/// How far a score may be.
const TOLERANCE: f64 = 1e-6;

/// Images that are nothing but their number: a model can look up what to say of them.
#[derive(Debug)]
struct Numbered {
    /// The blue of all its images tells it from the other dataset.
    part: u8,
    labels: Vec<u32>,
    /// `[N, P * D]`.
    features: Vec<Vec<f32>>,
    cls: Vec<Vec<f32>>,
    masks: Vec<Vec<u8>>,
    depth: Vec<Vec<f32>>,
}

impl Numbered {
    /// `n` images whose features lean towards their classes.
    fn draw(part: u8, n: usize) -> Self {
        let mut rng = Rng::new(11, Stream::Plugin, u64::from(part), 0);
        let labels: Vec<u32> = (0..n).map(|_| rng.below(CLASSES) as u32).collect();
        let mut feature = |class: usize| -> Vec<f32> {
            let mut feature: Vec<f32> = (0..DIM).map(|_| rng.normal() as f32).collect();
            feature[class] += 1.5;
            feature
        };
        let cls = labels.iter().map(|&label| feature(label as usize)).collect();
        // Regions of a class with borders inside patches, and some pixels that count nowhere.
        let class = |image: usize, x: usize, y: usize| (image + x / 11 + 2 * (y / 13)) % CLASSES;
        let features = (0..n)
            .map(|i| (0..GRID * GRID).flat_map(|p| feature(class(i, p % GRID * 8 + 4, p / GRID * 8 + 4))).collect());
        let features = features.collect();
        let pixel = |image: usize, i: usize| match class(image, i % SIZE, i / SIZE) {
            _ if i.is_multiple_of(37) => 255,
            class => class as u8,
        };
        let masks = (0..n).map(|image| (0..SIZE * SIZE).map(|i| pixel(image, i)).collect()).collect();
        // Metres that follow the class, and some pixels that are not known.
        let metres = |image: usize, i: usize| match class(image, i % SIZE, i / SIZE) {
            _ if i.is_multiple_of(29) || i % SIZE < 9 && image.is_multiple_of(4) => 0.0,
            class => 1.5 + class as f32 + 0.01 * (i % 17) as f32,
        };
        let depth = (0..n).map(|image| (0..SIZE * SIZE).map(|i| metres(image, i)).collect()).collect();
        Self { part, labels, features, cls, masks, depth }
    }

    fn json(&self) -> Json {
        let floats = |rows: &[Vec<f32>]| rows.iter().flatten().map(|&x| json!(f64::from(x))).collect::<Vec<_>>();
        let n = self.labels.len();
        json!({
            "labels": self.labels,
            "cls": table(floats(&self.cls), &[n, DIM]),
            "patches": table(floats(&self.features), &[n, GRID * GRID, DIM]),
            "depth": table(floats(&self.depth), &[n, SIZE, SIZE]),
            "masks": table(self.masks.iter().flatten().map(|&c| json!(c)).collect(), &[n, SIZE, SIZE]),
        })
    }
}

impl Dataset for Numbered {
    fn len(&self) -> usize {
        self.labels.len()
    }
    fn get(&self, index: usize) -> Result<Sample> {
        let pixel = [(index / 256) as u8, (index % 256) as u8, self.part];
        Ok(Sample {
            width: SIZE,
            height: SIZE,
            pixels: pixel.repeat(SIZE * SIZE).into(),
            label: Some(self.labels[index]),
            mask: Some(self.masks[index].clone()),
            depth: Some(self.depth[index].clone()),
            ..Sample::default()
        })
    }
    fn classes(&self) -> usize {
        CLASSES
    }
    fn mask_classes(&self) -> usize {
        CLASSES
    }
    fn has_depth(&self) -> bool {
        true
    }
    fn mask_class_names(&self) -> Vec<String> {
        (0..CLASSES).map(|c| format!("class {c}")).collect()
    }
}

/// Numbers as the other side reads them.
fn table(values: Vec<Json>, shape: &[usize]) -> Json {
    json!({ "values": values, "shape": shape })
}

/// What the numbers of the images say.
fn features(pixels: &Tensor, parts: &[&Numbered]) -> Features {
    let (n, plane) = (pixels.dim(0), SIZE * SIZE);
    let (mut cls, mut patches): (Vec<f32>, Vec<f32>) = (Vec::new(), Vec::new());
    for image in pixels.as_slice::<f32>().chunks(3 * plane) {
        let [high, low, part] = [0, 1, 2].map(|c| (image[c * plane] * 255.0).round() as usize);
        let data = parts.iter().find(|data| usize::from(data.part) == part).expect("an image of a dataset");
        cls.extend(&data.cls[256 * high + low]);
        patches.extend(&data.features[256 * high + low]);
    }
    let patches = Tensor::from_slice(&patches, &[n, GRID * GRID, DIM]).expect("as many as there are");
    Features {
        cls: Tensor::from_slice(&cls, &[n, DIM]).expect("as many as there are"),
        registers: Tensor::zeros(&[n, 0, DIM], DType::F32),
        prenorm: patches.clone(),
        patches,
        layers: Vec::new(),
        grid: Grid { height: GRID, width: GRID },
    }
}

/// The images of every draw of `few_shot`, in the order of the training images.
fn draws(config: &Json, train: &Numbered, seen: &[usize]) -> Json {
    let labels: Vec<Option<u32>> = seen.iter().map(|&i| Some(train.labels[i])).collect();
    let of = |shots: u64| {
        let draw = |i: usize| FewShot::draw(0, i, &labels, shots as usize).into_iter().map(|row| seen[row]).collect();
        let all: Vec<Vec<usize>> = (0..config["draws"].as_u64().expect("a number") as usize).map(draw).collect();
        (shots.to_string(), json!(all))
    };
    let shots = config["shots"].as_array().expect("a list").iter().map(|n| of(n.as_u64().expect("a number")));
    Json::Object(shots.collect())
}

#[test]
fn scores_are_those_of_scikit_learn() {
    let Some(python) = program::python("sklearn") else { return };
    let (train, test) = (Numbered::draw(1, 300), Numbered::draw(2, 150));
    let probes = [
        ("knn", json!({ "k": 7, "more_k": [1, 30], "temperature": 0.2, "train_samples": 300, "test_samples": 150 })),
        ("linear_classification", json!({ "penalties": [1e-2], "iterations": 5000 })),
        (
            "few_shot",
            json!({ "shots": [1, 4], "draws": 3, "train_samples": 300, "test_samples": 150, "l2": 1e-2,
            "iterations": 3000 }),
        ),
        ("depth", json!({ "train_samples": 300, "test_samples": 150, "l2": 1e-2 })),
        ("retrieval", json!({ "recall": [1, 3] })),
        ("linear_segmentation", json!({ "train_samples": 300, "test_samples": 150, "l2": 1e-2, "iterations": 2000 })),
        ("knn_segmentation", json!({ "train_samples": 300, "test_samples": 150, "k": 9, "temperature": 0.2 })),
    ];
    let (mut ours, mut cases) = (BTreeMap::new(), serde_json::Map::new());
    for (name, mut config) in probes {
        config["plugin"] = name.into();
        let seen = RefCell::new(Vec::new());
        let chosen: Chosen<dyn Probe> = serde_json::from_value(config).expect("the probe is registered");
        let context = ProbeContext {
            features: &|pixels| {
                let plane = SIZE * SIZE;
                let byte = |image: &[f32], c: usize| (image[c * plane] * 255.0).round() as usize;
                let images = pixels.as_slice::<f32>().chunks(3 * plane);
                let images = images.filter(|image| byte(image, 2) == usize::from(train.part));
                seen.borrow_mut().extend(images.map(|image| 256 * byte(image, 0) + byte(image, 1)));
                Ok(features(pixels, &[&train, &test]))
            },
            train: &train,
            test: &test,
            image_size: ImageSize::square(SIZE),
            patch_size: SIZE / GRID,
            normalization: (&[0.0; 3], &[1.0; 3]),
            seed: 0,
            warn: &|text| panic!("{text}"),
            show: None,
        };
        let scores = chosen.build(&mut ()).and_then(|probe| probe.run(&context)).expect("it can be taken");
        ours.insert(name, scores);
        cases.insert(
            name.into(),
            json!({ "config": chosen.config(), "train": train.json(), "test": test.json(), "classes": CLASSES,
                "names": test.mask_class_names(), "grid": GRID,
                "draws": if name == "few_shot" { draws(chosen.config(), &train, &seen.borrow()) } else { json!({}) } }),
        );
    }
    let folder = program::Folder::new();
    let own = [
        ("windows", pixels::windows()),
        ("correspondence", pixels::correspondence()),
        ("robustness", pixels::robustness()),
        ("tracking", pixels::tracking(&folder.path("films"))),
    ];
    for (name, (scores, case)) in own {
        ours.insert(name, scores);
        cases.insert(name.into(), case);
    }
    // Images that probes make are those of Pillow and scipy.
    cases.insert("crops".into(), cases["correspondence"].clone());
    cases.insert("corruptions".into(), cases["robustness"].clone());
    folder.write("cases.json", &Json::from(cases).to_string());
    let text = program::script(&python, "probes.py", &[&folder.path("cases.json")]);
    let theirs: BTreeMap<String, BTreeMap<String, f64>> = serde_json::from_str(&text).expect("JSON");
    for (name, scores) in &ours {
        assert_eq!(scores.len(), theirs[*name].len(), "{name}: {scores:?} {:?}", theirs[*name]);
        for score in scores {
            let (a, b) = (score.value, theirs[*name][score.name.as_ref()]);
            println!("{name}/{} {a:.6}", score.name);
            assert!((a - b).abs() < TOLERANCE, "{name}/{}: {a}, but scikit-learn gives {b}", score.name);
        }
        // The images that robustness is told of are easy while they are whole.
        let mut whole = scores.iter().filter(|s| !s.detail && !["rmse", "clean"].contains(&s.name.as_ref()));
        assert!(whole.all(|s| s.value > 0.1 && s.value < 1.0), "{name}: neither chance nor perfect: {scores:?}");
    }
    assert!(theirs["crops"]["levels"] <= 1.0, "{:?}", theirs["crops"]);
    assert_eq!(theirs["corruptions"].len(), 25);
    for (name, levels) in &theirs["corruptions"] {
        println!("{name} is {levels:.3} levels away");
        assert!(*levels < 1.5, "{name}: {levels} levels of 255 away from Pillow and scipy");
    }
}
