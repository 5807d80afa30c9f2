//! Augmentations: every key does what it says, plans can be applied, and numbers out of range are refused.

use std::sync::Arc;

use dinolab_core::contract::{Augmentation, CropContext, CropPlan, Cut, Dataset, ImagePlan, Jitter, Rect, Sample};
use dinolab_core::data::{LoaderSpec, Pipeline};
use dinolab_core::recipe::{BatchConfig, Overrides, RawRecipe};
use dinolab_core::registry::{self, Chosen};
use dinolab_core::resolved::Resolved;
use dinolab_core::rng::{Rng, Stream};
use dinolab_core::testing::contracts;
use dinolab_core::{DType, Device, Result};

// The plugins register themselves when they are linked in.
use dinolab_plugins as _;

const SIZE: (usize, usize) = (120, 80);

/// Plans for images of [`SIZE`] with two local crops, by the keys of an augmentation.
fn plans(keys: &str) -> Vec<ImagePlan> {
    let mut crops = CropContext { global_size: 64, local_size: 32, local_count: 2, patch_size: 8, channels: 3 };
    let plugin = contracts::plugin::<dyn Augmentation>(keys, &mut crops).unwrap();
    let rng = |image: u64| move |crop: u64| Rng::new(1, Stream::Augment, 0, image << 16 | crop);
    (0..500).map(|image| plugin.plan(SIZE, &rng(image))).collect()
}

/// The crops of all plans: first global, second global, local.
fn kinds(plans: &[ImagePlan]) -> [Vec<CropPlan>; 3] {
    let of = |f: fn(&ImagePlan) -> &[CropPlan]| plans.iter().flat_map(|p| f(p).to_vec()).collect();
    [of(|p| &p.globals[..1]), of(|p| &p.globals[1..]), of(|p| &p.locals)]
}

fn all(plans: &[ImagePlan]) -> Vec<CropPlan> {
    kinds(plans).concat()
}

fn jitters(plans: &[ImagePlan]) -> Vec<Jitter> {
    all(plans).iter().filter_map(|crop| crop.color.jitter).collect()
}

fn area(crop: &CropPlan) -> (Rect, bool) {
    let Cut::Image { area, flip } = crop.cut else { panic!("it is cut from the image: {crop:?}") };
    (area, flip)
}

/// The least and the most.
fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    values.fold((f64::INFINITY, f64::NEG_INFINITY), |(least, most), x| (least.min(x), most.max(x)))
}

#[test]
fn every_plugin_draws_plans_that_can_be_applied() {
    for keys in [
        "",
        "plugin = \"resized\"",
        "plugin = \"resized\"\nlocal_scale = [1.0, 1.0]",
        "local_from_global = true\nshare_color_jitter = true",
        "aspect = [100, 100]\nglobal_scale = [0.001, 0.001]\ntries = 1",
        "aspect = [0.01, 0.01]\nbrightness = 1.0\ncontrast = 1.0\nsaturation = 1.0\nhue = 0.5\nblur_sigma = [0.01, 100]",
    ] {
        contracts::augmentation(keys).unwrap_or_else(|e| panic!("{keys}: {e}"));
    }
}

#[test]
fn a_recipe_that_names_no_augmentation_has_multi_crop_with_the_numbers_of_the_reference() {
    assert_eq!(registry::default_of::<dyn Augmentation>(), Some("multi_crop"));
    let reference = "plugin = \"multi_crop\"\naspect = [0.75, 1.3333333333333333]\njitter_probability = 0.8\nbrightness = 0.4\n\
        contrast = 0.4\nsaturation = 0.2\nhue = 0.1\ngrey_probability = 0.2\nblur_sigma = [0.1, 2.0]\nsolarize = [0.0, 0.2, 0.0]";
    assert_eq!(Chosen::<dyn Augmentation>::default(), contracts::chosen(reference).unwrap());
    // The ends of the ranges of factors are those decimals, not neighbours of theirs.
    assert_eq!([1.0 - 0.4, 1.0 + 0.4, 1.0 - 0.2, 1.0 + 0.2], [0.6, 1.4, 0.8, 1.2]);
}

#[test]
fn probabilities_of_nothing_and_of_always_are_kept() {
    for (key, happens) in [
        ("flip_probability", (|c| area(c).1) as fn(&CropPlan) -> bool),
        ("jitter_probability", |c| c.color.jitter.is_some()),
        ("grey_probability", |c| c.color.grey),
    ] {
        assert!(!all(&plans(&format!("{key} = 0"))).iter().any(happens), "{key}");
        assert!(all(&plans(&format!("{key} = 1"))).iter().all(happens), "{key}");
    }
    assert!(!all(&plans("horizontal_flip = false\nflip_probability = 1")).iter().any(|c| area(c).1));
    for (key, happens) in
        [("blur", (|c| c.blur.is_some()) as fn(&CropPlan) -> bool), ("solarize", |c| c.solarize == Some(128))]
    {
        for kind in 0..3 {
            let mut list = [0.0; 3];
            list[kind] = 1.0;
            for (i, crops) in kinds(&plans(&format!("{key} = {list:?}"))).iter().enumerate() {
                assert!(crops.iter().all(|crop| happens(crop) == (i == kind)), "{key} {kind} {i}");
            }
        }
    }
    assert!(all(&plans("solarize = [1, 1, 1]\nsolarize_threshold = 9")).iter().all(|c| c.solarize == Some(9)));
}

#[test]
fn strengths_and_ranges_are_kept_and_used_to_their_ends() {
    for (key, of) in [
        ("brightness", (|j| f64::from(j.brightness)) as fn(Jitter) -> f64),
        ("contrast", |j| f64::from(j.contrast)),
        ("saturation", |j| f64::from(j.saturation)),
        ("hue", |j| 1.0 + j.hue),
    ] {
        let (least, most) = range(jitters(&plans(&format!("{key} = 0.3"))).into_iter().map(of));
        assert!((0.7 - 1e-6..0.71).contains(&least) && (1.29..1.3 + 1e-6).contains(&most), "{key}: {least} {most}");
        assert!(jitters(&plans(&format!("{key} = 0"))).into_iter().all(|j| of(j) == 1.0), "{key}");
    }
    let sigma = range(all(&plans("blur_sigma = [3, 4]")).iter().filter_map(|c| c.blur).map(f64::from));
    assert!(sigma.0 >= 3.0 && sigma.0 < 3.05 && sigma.1 > 3.95 && sigma.1 <= 4.0, "{sigma:?}");
    let shape = |c: &CropPlan| area(c).0.width as f64 / area(c).0.height as f64;
    // Boxes are whole pixels: their ratios are near the range.
    let aspect = range(all(&plans("aspect = [0.5, 0.6]\nglobal_scale = [0.2, 0.3]\ntries = 100")).iter().map(shape));
    assert!((0.45..0.55).contains(&aspect.0) && (0.55..0.67).contains(&aspect.1), "{aspect:?}");
    let share = |c: &CropPlan| (area(c).0.width * area(c).0.height) as f64 / (SIZE.0 * SIZE.1) as f64;
    let [global, _, local] = kinds(&plans("global_scale = [0.2, 0.3]\nlocal_scale = [0.1, 0.11]"));
    let (global, local) = (range(global.iter().map(share)), range(local.iter().map(share)));
    assert!(global.0 > 0.19 && global.1 < 0.31 && local.0 > 0.09 && local.1 < 0.12, "{global:?} {local:?}");
}

#[test]
fn without_tries_to_spare_more_boxes_are_central() {
    let central = |tries: usize| {
        let plans = plans(&format!("global_scale = [0.6, 1.0]\ntries = {tries}"));
        let whole = |p: &&ImagePlan| area(&p.globals[0]).0 == Rect { x: 6, y: 0, width: 107, height: 80 };
        plans.iter().filter(whole).count()
    };
    let (one, many) = (central(1), central(200));
    assert!(one > 300 && many < 10, "{one} {many}");
}

#[test]
fn resized_images_are_central_squares_and_local_crops_squares_without_distortion() {
    for plan in plans("plugin = \"resized\"\nlocal_scale = [0.1, 0.2]") {
        assert!(plan.shared_color.is_none());
        for crop in plan.globals.iter().chain(&plan.locals) {
            let plain = CropPlan { cut: crop.cut, color: Default::default(), blur: None, solarize: None };
            assert_eq!((*crop, area(crop).1), (plain, false));
        }
        let square = Rect { x: 20, y: 0, width: 80, height: 80 };
        assert!(plan.globals.iter().all(|crop| area(crop).0 == square));
        for crop in &plan.locals {
            let Rect { width, height, .. } = area(crop).0;
            let share = (width * height) as f64 / 9600.0;
            assert!(width == height && (0.09..0.22).contains(&share), "{width} x {height}");
        }
    }
}

fn recipe(sets: &[&str]) -> Result<Resolved> {
    let text =
        "name = \"crops\"\nsteps = 10\n[backbone]\nplugin = \"vit\"\npreset = \"vit_tiny_test\"\npatch_size = 4\n\
        [data]\nplugin = \"scenes\"\n[batch]\nsize = 4\n[crops]\nglobal_size = 32\nlocal_size = 16\nlocal_count = 2\n\
        blur = [0, 0, 0]\n[losses.dino]\n[teacher]\nplugin = \"ema\"\n";
    let overrides = Overrides { sets: sets.iter().map(ToString::to_string).collect(), env: false };
    Resolved::of(RawRecipe::from_text(text)?.with(&overrides)?)
}

#[test]
fn keys_are_held_to_their_ranges_and_to_their_plugin() {
    let refused = |sets: &[&str]| recipe(sets).unwrap_err().to_string();
    for (sets, said) in [
        (&["crops.local_scale=[0, 0.1]"][..], "crops.local_scale: number 1 has to be above 0, at most 1, not 0"),
        (&["crops.aspect=[2, 1]"], "crops.aspect: has to be [least, most]"),
        (&["crops.tries=0"], "crops.tries: has to be 1 to 1000, not 0"),
        (&["crops.flip_probability=1.5"], "crops.flip_probability: has to be 0 to 1, not 1.5"),
        (&["crops.hue=0.6"], "crops.hue: has to be 0 to 0.5, not 0.6"),
        (&["crops.blur_sigma=[0, 1]"], "crops.blur_sigma: number 1 has to be 0.01 to 100, not 0"),
        (&["crops.solarize=[0, 0.2]"], "crops.solarize: expected a list of 3 values, found 2"),
        (&["crops.solarize_threshold=256"], "crops.solarize_threshold"),
        (&["crops.plugin=resized", "crops.blur=[0, 0, 0]"], "crops.blur: unknown key"),
        (&["crops.plugin=multicrop"], "there is no augmentation plugin `multicrop`"),
        (&["crops.local_from_global=true", "crops.local_size=64"], "crops: local crops of 64 pixels cannot be cut"),
    ] {
        let message = refused(sets);
        assert!(message.contains(said), "{message}");
    }
    let idle = recipe(&["crops.horizontal_flip=false", "crops.flip_probability=0.3"]).unwrap();
    assert!(idle.warnings[0].to_string().contains("read with horizontal_flip = true only"), "{:?}", idle.warnings);
}

#[test]
fn another_augmentation_keeps_sizes_and_drops_the_keys_of_the_one_before() {
    let crops = recipe(&["crops.plugin=resized"]).unwrap().value["crops"].clone();
    assert_eq!(
        (&crops["plugin"], &crops["global_size"], &crops["local_count"]),
        (&"resized".into(), &32.into(), &2.into())
    );
    assert!(crops.get("blur").is_none());
}

/// Cuts a column more than there is.
#[derive(Debug, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
struct TooWide {}

impl Augmentation for TooWide {
    fn plan(&self, (width, height): (usize, usize), _: &dyn Fn(u64) -> Rng) -> ImagePlan {
        let area = Rect { x: 1, y: 0, width, height };
        let crop =
            CropPlan { cut: Cut::Image { area, flip: false }, color: Default::default(), blur: None, solarize: None };
        ImagePlan { shared_color: None, globals: [crop; 2], locals: vec![crop; 2] }
    }
}

dinolab_core::plugin!(Augmentation, "test_too_wide", TooWide);

/// One grey image.
#[derive(Debug)]
struct Grey;

impl Dataset for Grey {
    fn len(&self) -> usize {
        1
    }

    fn get(&self, _: usize) -> Result<Sample> {
        Ok(Sample { width: 40, height: 32, pixels: vec![9u8; 3 * 40 * 32].into(), ..Sample::default() })
    }
}

#[test]
fn a_plan_that_cannot_be_applied_names_the_plugin() {
    let spec = LoaderSpec {
        part: 0..usize::MAX,
        batch: BatchConfig { size: 2, ..BatchConfig::default() },
        crops: recipe(&["crops.plugin=test_too_wide"]).unwrap().recipe.crops,
        masking: Chosen::default(),
        patch_size: 4,
        augmentations: Vec::new(),
        teacher_crop_size: None,
        seed: 0,
        device: Device::Cpu,
        dtype: DType::F32,
        start_step: 0,
        total_steps: 1,
        left_out: Vec::new(),
    };
    let error = Pipeline::new(Arc::new(Grey), spec).unwrap().step(0).unwrap_err().to_string();
    assert!(error.contains("the augmentation `test_too_wide` has a global crop that cuts Image"), "{error}");
    assert!(error.contains("for an image of 40x32 pixels"), "{error}");
    assert!(contracts::augmentation("plugin = \"test_too_wide\"").is_err());
}
