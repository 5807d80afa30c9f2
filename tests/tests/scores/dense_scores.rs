//! Label-free scores of patch features against their statements in NumPy (`tests/dense_scores.py`).
//!
//! Needs a Python with `numpy`: that of `DINOLAB_PYTHON`, of `target/python`, or `python3`. Without, the test says so and
//! passes.

use dinolab_tests::program;
use std::collections::BTreeMap;
use std::num::NonZeroUsize;

use dinolab_core::contract::{Dataset, Features, Grid, ImageSize, Probe, ProbeContext, Sample};
use dinolab_core::rng::{Rng, Stream};
use dinolab_core::{DType, Result, Tensor};
use dinolab_plugins::dse::Dse;
use dinolab_plugins::effective_rank::EffectiveRank;
use dinolab_plugins::patch_spread::PatchSpread;
use serde_json::{json, Value as Json};

const SEED: u64 = 5;
/// Images, patches of one, width of a feature, groups of patches.
const SHAPE: (usize, usize, usize, usize) = (5, 12, 7, 3);

/// Grey images, the more so the later: the number of an image can be read from its first pixel.
#[derive(Debug)]
struct Greys;

impl Dataset for Greys {
    fn len(&self) -> usize {
        SHAPE.0
    }
    fn get(&self, index: usize) -> Result<Sample> {
        Ok(Sample { width: 8, height: 8, pixels: vec![index as u8; 8 * 8 * 3].into(), ..Sample::default() })
    }
}

/// CLS `[images, D]`, patches `[images, P, D]`, and the group of every patch: groups are far apart.
fn features(width: f64) -> (Vec<f32>, Vec<f32>, Vec<Vec<usize>>) {
    let (images, p, d, k) = SHAPE;
    let mut rng = Rng::new(SEED, Stream::Plugin, 0, 0);
    let cls = (0..images * d).map(|_| rng.normal() as f32).collect();
    let centers: Vec<f64> = (0..k * d).map(|_| 4.0 * rng.normal()).collect();
    // Every image has all groups, in another order.
    let groups: Vec<Vec<usize>> = (0..images).map(|i| (0..p).map(|j| (i + j * (1 + i % 2)) % k).collect()).collect();
    let mut patches = Vec::new();
    for group in groups.iter().flatten() {
        patches.extend(centers[group * d..][..d].iter().map(|c| (c + width * rng.normal()) as f32));
    }
    (cls, patches, groups)
}

/// Scores of a probe on these features, and the images in the order in which it looked at them.
fn scores(probe: &dyn Probe, cls: &[f32], patches: &[f32]) -> (BTreeMap<String, f64>, Vec<usize>) {
    let (_, p, d, _) = SHAPE;
    let order = std::cell::RefCell::new(Vec::new());
    let see = |pixels: &Tensor| -> Result<Features> {
        let n = pixels.dim(0);
        let first = pixels.as_slice::<f32>().chunks(pixels.len() / n).map(|image| image[0]);
        let images: Vec<usize> = first.map(|grey| (grey * 255.0).round() as usize).collect();
        let of = |all: &[f32], size: usize| images.iter().flat_map(|i| all[i * size..][..size].to_vec()).collect();
        let (cls, patches): (Vec<f32>, Vec<f32>) = (of(cls, d), of(patches, p * d));
        let (cls, patches) = (Tensor::from_slice(&cls, &[n, d])?, Tensor::from_slice(&patches, &[n, p, d])?);
        order.borrow_mut().extend(images);
        let (grid, registers) = (Grid { height: 3, width: 4 }, Tensor::zeros(&[n, 0, d], DType::F32));
        Ok(Features { cls, registers, prenorm: patches.clone(), patches, layers: Vec::new(), grid })
    };
    let context = ProbeContext {
        features: &see,
        train: &Greys,
        test: &Greys,
        image_size: ImageSize::square(8),
        patch_size: 2,
        normalization: (&[0.0; 3], &[1.0; 3]),
        seed: SEED,
        warn: &|text| panic!("{text}"),
        show: None,
    };
    let found = probe.run(&context).unwrap();
    (found.into_iter().map(|s| (s.name.to_string(), s.value)).collect(), order.into_inner())
}

#[test]
fn label_free_scores_are_those_of_their_statements() {
    let Some(python) = program::python("numpy") else { return };
    let (images, p, d, k) = SHAPE;
    let all = NonZeroUsize::new(100).unwrap();
    let dse = Dse { samples: all, image_clusters: k, batch_images: NonZeroUsize::new(2).unwrap(), batch_clusters: k };
    let probes: [(&str, &dyn Probe); 3] = [
        ("effective_rank", &EffectiveRank { samples: all }),
        ("patch_spread", &PatchSpread { samples: all }),
        ("dse", &dse),
    ];
    let (mut cases, mut ours) = (Vec::<Json>::new(), Vec::new());
    for width in [0.01, 0.1] {
        let (cls, patches, groups) = features(width);
        for (name, probe) in probes {
            let (found, order) = scores(probe, &cls, &patches);
            assert_eq!(order.len(), images);
            let rows = |image: usize| patches[image * p * d..][..p * d].chunks(d).map(<[f32]>::to_vec);
            let orders = (0..images).map(|i| Rng::new(SEED, Stream::Probe, 4, i as u64).permutation(p));
            cases.push(json!({
                "probe": name,
                "cls": order.iter().map(|i| cls[i * d..][..d].to_vec()).collect::<Vec<_>>(),
                "patches": order.iter().map(|i| rows(*i).collect()).collect::<Vec<Vec<Vec<f32>>>>(),
                "groups": order.iter().map(|i| groups[*i].clone()).collect::<Vec<_>>(),
                "batch_images": 2,
                "orders": orders.collect::<Vec<_>>(),
            }));
            ours.push((format!("{name}, width {width}"), found));
        }
    }
    let folder = program::Folder::new();
    folder.write("cases.json", &serde_json::to_string(&cases).expect("plain data"));
    let text = program::script(&python, "dense_scores.py", &[&folder.path("cases.json")]);
    let theirs: Vec<BTreeMap<String, f64>> = serde_json::from_str(&text).expect("JSON");
    for ((case, ours), theirs) in ours.iter().zip(&theirs) {
        assert!(ours.keys().eq(theirs.keys()), "{case}: {ours:?} {theirs:?}");
        for (name, value) in ours {
            let off = (value - theirs[name]).abs() / theirs[name].abs().max(1e-3);
            assert!(off < 2e-5, "{case}: {name} is {value}, but NumPy gives {}", theirs[name]);
        }
    }
}
