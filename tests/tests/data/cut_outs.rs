//! The `cut_outs` dataset, on cut-outs and photographs that are drawn here.

use std::fs;
use std::path::PathBuf;

use dinolab_core::contract::{DataContext, Dataset, Sample};
use dinolab_core::registry::Chosen;
use dinolab_core::testing::contracts;
use dinolab_core::Result;
use dinolab_plugins as _;
use image::{Rgb, RgbImage, Rgba, RgbaImage};
use serde_json::{json, Value};

/// Red discs, green squares and blue bars, five of each, in front of what is transparent and yellow; grey photographs.
struct Lab(tempfile::TempDir);

const CLASSES: [&str; 3] = ["bar", "disc", "square"];

impl Lab {
    fn new() -> Self {
        let lab = Self(tempfile::tempdir().expect("a folder"));
        for i in 0..5u32 {
            let side = 40 + 10 * i;
            for (class, name) in CLASSES.into_iter().enumerate() {
                let inside = |x: u32, y: u32| {
                    let [x, y] = [x, y].map(|at| (at as f32 + 0.5) / side as f32 * 2.0 - 1.0);
                    [x.abs() < 0.3 && y.abs() < 0.9, x * x + y * y < 0.8, x.abs() < 0.8 && y.abs() < 0.8][class]
                };
                let mut colour = [0, 0, 0, 255];
                colour[[2, 0, 1][class]] = 255;
                let pixel = |x, y| Rgba(if inside(x, y) { colour } else { [255, 255, 0, 0] });
                RgbaImage::from_fn(side, side, pixel)
                    .save(lab.path(&format!("cut/{name}/{i}.png")))
                    .expect("a cut-out");
            }
            let grey = 90 + 5 * i as u8;
            RgbImage::from_pixel(300, 200, Rgb([grey; 3])).save(lab.path(&format!("back/{i}.png"))).expect("a photo");
        }
        lab
    }

    fn path(&self, name: &str) -> PathBuf {
        let path = self.0.path().join(name);
        fs::create_dir_all(path.parent().expect("it is in the folder")).expect("it can be made");
        path
    }

    fn open(&self, seed: u64, keys: Value) -> Result<Box<dyn Dataset>> {
        let mut table = json!({ "plugin": "cut_outs", "path": self.path("cut"), "backgrounds": self.path("back"),
            "count": 50, "held_out": 10 });
        table.as_object_mut().expect("a table").extend(keys.as_object().expect("a table").clone());
        let chosen: Chosen<dyn Dataset> = serde_json::from_value(table).expect("known keys");
        chosen.build(&mut DataContext { seed })
    }

    fn refused(&self, keys: Value, parts: &[&str]) {
        let problem = self.open(1, keys).and_then(|data| data.get(0).map(drop)).expect_err("it is refused").to_string();
        for part in parts {
            assert!(problem.contains(part), "{part} in {problem}");
        }
    }
}

/// The class whose colour a pixel has; `None` for a grey one and for edges.
fn class_of(rgb: &[u8]) -> Option<u8> {
    let spread = rgb.iter().max()? - rgb.iter().min()?;
    match rgb {
        [r, g, b] if *r > 240 && *g < 15 && *b < 15 => Some(2),
        [r, g, b] if *g > 240 && *r < 15 && *b < 15 => Some(3),
        [r, g, b] if *b > 240 && *r < 15 && *g < 15 => Some(1),
        _ if spread == 0 => Some(0),
        _ => None,
    }
}

#[test]
fn masks_labels_and_depths_are_those_of_what_is_seen() {
    let lab = Lab::new();
    let data = lab.open(1, json!({ "size": [80, 64] })).unwrap();
    contracts::dataset(data.as_ref()).unwrap();
    assert_eq!(
        (data.class_names(), data.mask_classes(), data.has_depth()),
        (CLASSES.map(String::from).to_vec(), 4, true)
    );
    assert_eq!(data.mask_class_names()[0], "background");
    let (mut told, mut edges) = (0, 0);
    for index in 0..50 {
        let sample = data.get(index).unwrap();
        let rgb = sample.rgb().into_owned();
        let Sample { width, height, label, mask, depth, .. } = sample;
        assert_eq!((width, height), (80, 64));
        let (mask, depth) = (mask.unwrap(), depth.unwrap());
        for (i, (&class, &distance)) in mask.iter().zip(&depth).enumerate() {
            match class_of(&rgb[3 * i..3 * i + 3]) {
                Some(seen) => {
                    assert_eq!(seen, class, "scene {index}, pixel {i}");
                    told += 1;
                }
                None => edges += 1,
            }
            assert!(
                if class == 0 { distance == 4.0 } else { (1.0..=3.0).contains(&distance) },
                "{class} at {distance}"
            );
            // Hidden colours of what is transparent are nowhere.
            assert!(!(rgb[3 * i] > 200 && rgb[3 * i + 1] > 200), "yellow in scene {index}");
        }
        // The label is the class of the object, which has a distance of its own, of which most is seen.
        let mut areas: Vec<(f32, usize, u8)> = Vec::new();
        for (&class, &distance) in mask.iter().zip(&depth).filter(|(class, _)| **class > 0) {
            match areas.iter_mut().find(|(other, ..)| *other == distance) {
                Some((_, area, _)) => *area += 1,
                None => areas.push((distance, 1, class)),
            }
        }
        let most = areas.iter().max_by_key(|(_, area, _)| *area).unwrap();
        assert!(areas.iter().any(|(_, area, class)| *area == most.1 && u32::from(*class) - 1 == label.unwrap()));
    }
    assert!(edges * 10 < told, "{edges} pixels are edges, {told} are not");
}

#[test]
fn the_nearer_object_hides_the_farther_one_and_is_larger() {
    let lab = Lab::new();
    let data = lab.open(2, json!({ "objects": [1, 1], "turn": 0.0, "size": 100 })).unwrap();
    // Of objects that no border cuts: the longer side times the distance is the same.
    let mut products = Vec::new();
    for index in 0..50 {
        let sample = data.get(index).unwrap();
        let (mask, depth) = (sample.mask.unwrap(), sample.depth.unwrap());
        let places: Vec<[usize; 2]> = (0..mask.len()).filter(|&i| mask[i] > 0).map(|i| [i % 100, i / 100]).collect();
        let bounds = [0, 1].map(|axis| {
            let along = || places.iter().map(|place| place[axis]);
            (along().min().unwrap(), along().max().unwrap())
        });
        if bounds.iter().all(|(low, high)| *low > 0 && *high < 99) {
            let side = bounds.iter().map(|(low, high)| high - low + 1).max().unwrap();
            products.push(side as f32 * depth[places[0][1] * 100 + places[0][0]]);
        }
    }
    assert!(products.len() > 10 && products.iter().all(|p| (p - 75.0).abs() < 6.0), "{products:?}");
    // Where objects meet, what is in front is whole: a scene with many has the nearest one whole.
    let data = lab.open(2, json!({ "objects": [6, 6], "turn": 0.0, "size": 100 })).unwrap();
    let mut whole = 0;
    for index in 0..50 {
        let sample = data.get(index).unwrap();
        let (mask, depth) = (sample.mask.unwrap(), sample.depth.unwrap());
        let nearest = depth.iter().copied().fold(f32::MAX, f32::min);
        let places: Vec<usize> = (0..mask.len()).filter(|&i| depth[i] == nearest).collect();
        if mask[places[0]] == 3 {
            let [columns, rows] = [|i: usize| i % 100, |i: usize| i / 100].map(|of| {
                let all = || places.iter().map(|&i| of(i));
                (all().min().unwrap(), all().max().unwrap())
            });
            // Of a corner that lies between pixels less than half may be covered.
            let box_of = (columns.1 - columns.0 + 1) * (rows.1 - rows.0 + 1);
            assert!(places.len() + 4 >= box_of, "scene {index}: {} of {box_of} pixels", places.len());
            whole += 1;
        }
    }
    assert!(whole > 5, "{whole}");
}

#[test]
fn a_scene_depends_on_seed_index_and_part_alone_and_parts_share_no_file() {
    let lab = Lab::new();
    let [a, same, other] = [1, 1, 2].map(|seed| lab.open(seed, json!({})).unwrap());
    // In another order too, and however much is kept.
    let backwards: Vec<Sample> = (0..20).rev().map(|i| same.get(i).unwrap()).collect();
    for index in 0..20 {
        assert_eq!(a.get(index).unwrap(), backwards[19 - index]);
    }
    assert_ne!(a.get(3).unwrap(), a.get(4).unwrap());
    assert_ne!(a.get(3).unwrap(), other.get(3).unwrap());
    let held_out = a.held_out().unwrap();
    assert_eq!((a.len(), held_out.len()), (50, 10));
    assert_ne!(a.get(3).unwrap(), held_out.get(3).unwrap());
    let greys = |data: &dyn Dataset| {
        let of = |i: usize| {
            let sample = data.get(i).unwrap();
            // An edge has a colour.
            let rgb = sample.rgb();
            let mut grey = rgb.as_chunks::<3>().0.iter().filter(|[r, g, b]| r == g && g == b);
            grey.next().expect("some of the photograph is seen")[0]
        };
        (0..data.len()).map(of).collect::<std::collections::BTreeSet<u8>>()
    };
    let (train, test) = (greys(a.as_ref()), greys(held_out.as_ref()));
    assert_eq!((train.len(), test.len()), (4, 1));
    assert!(train.is_disjoint(&test));
    let said = a.summary();
    assert_eq!(
        said.content,
        "50 scenes of 12 cut-outs in 3 classes (bar 4, disc 4, square 4) on 4 photographs, 10 more of others held out for probes"
    );
}

#[test]
fn what_is_wrong_with_cut_outs_is_named_with_its_file() {
    let lab = Lab::new();
    lab.refused(json!({ "path": lab.path("nowhere") }), &["nowhere", "no such folder", "data.path"]);
    lab.refused(json!({ "backgrounds": lab.path("nothing") }), &["nothing", "no such folder", "data.backgrounds"]);
    fs::copy(lab.path("cut/disc/0.png"), lab.path("cut/loose.png")).unwrap();
    lab.refused(json!({}), &["cut/loose.png", "no sub-folder", "its class"]);
    fs::remove_file(lab.path("cut/loose.png")).unwrap();
    // One that is no cut-out is a broken sample, where it is used.
    for (image, said) in [
        (RgbaImage::from_pixel(9, 9, Rgba([1, 2, 3, 255])), "no pixel of it is transparent"),
        (RgbaImage::new(9, 9), "all of it is transparent"),
    ] {
        image.save(lab.path("odd/x/1.png")).unwrap();
        lab.refused(json!({ "path": lab.path("odd") }), &["odd/x/1.png", said, "mend or remove"]);
    }
    fs::write(lab.path("odd/x/1.png"), "no image").unwrap();
    lab.refused(json!({ "path": lab.path("odd") }), &["odd/x/1.png", "text"]);
}
