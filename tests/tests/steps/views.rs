//! Views of an image, what losses draw for one, where its crops were cut, and what a dataset adds to it.

use std::sync::Arc;

use dinolab_core::contract::{
    CropBox, Dataset, FieldSpec, ImageContext, ImageDraws, Loss, LossValue, Needs, Outputs, Sample, StepContext, Tile,
    View,
};
use dinolab_core::data::{LoaderSpec, Pipeline};
use dinolab_core::params::Params;
use dinolab_core::resolved::Resolved;
use dinolab_core::step::{Learner, Report};
use dinolab_core::{plugin, train, DType, Device, Result, Tensor};
use dinolab_plugins as _;
use serde::{Deserialize, Serialize};

/// Pictures whose red says the column, whose green says the row and whose blue says which one it is. Each has a field with its
/// number and that times ten.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
struct Rulers {}

impl Dataset for Rulers {
    fn len(&self) -> usize {
        64
    }

    fn get(&self, index: usize) -> Result<Sample> {
        let (width, height) = (100, 80);
        let pixel = |i: usize| [2 * (i % width) as u8, 3 * (i / width) as u8, index as u8];
        let pixels = (0..width * height).flat_map(pixel).collect();
        let fields = vec![vec![index as f32, 10.0 * index as f32]];
        Ok(Sample { width, height, pixels, fields, ..Sample::default() })
    }

    fn fields(&self) -> Vec<FieldSpec> {
        vec![FieldSpec { name: "number".into(), shape: vec![2] }]
    }
}

plugin!(Dataset, "rulers", Rulers);

/// The mean of a field, and of ten times the same from what is drawn for images.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
struct ReadsField {}

impl Loss for ReadsField {
    fn needs(&self) -> Needs {
        Needs { fields: vec!["number".into()], teacher: false, min_batch: 1, ..Needs::default() }
    }

    fn draw_image(&self, context: &mut ImageContext<'_>) -> ImageDraws {
        ImageDraws { numbers: vec![context.image.index as f64, context.image.place as f64], tiles: Vec::new() }
    }

    fn compute(&self, _: &Params<'_>, out: &Outputs<'_>, context: &StepContext<'_>) -> Result<LossValue> {
        let field = out.field("number")?.cast(context.dtype)?;
        assert_eq!(field.shape(), [out.images, 2]);
        assert!(out.field("another").is_err());
        let drawn = out.image_draws.expect("it draws").cast(context.dtype)?;
        let of = |x: &Tensor, column: usize| x.narrow_axis(1, column, 1)?.mean();
        let parts = vec![("ten", of(&field, 1)?), ("drawn", of(&drawn, 0)?), ("place", of(&drawn, 1)?)];
        Ok(LossValue::of(of(&field, 0)?).with_parts(parts))
    }
}

plugin!(Loss, "reads_field", ReadsField);

/// Asks for a view, or draws, as it should not.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
struct BadView {
    /// What is wrong.
    fault: Fault,
}

#[derive(Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Fault {
    Size,
    Outside,
    Count,
    Uneven,
}

impl Loss for BadView {
    fn needs(&self) -> Needs {
        Needs { teacher: false, min_batch: 1, ..Needs::default() }
    }

    fn views(&self, _: usize) -> Result<Vec<View>> {
        Ok(vec![View::new(1, 1, if self.fault == Fault::Size { 9 } else { 8 })])
    }

    fn draw_image(&self, context: &mut ImageContext<'_>) -> ImageDraws {
        let x = if self.fault == Fault::Outside { context.global_size - 7 } else { 0 };
        let tiles = vec![Tile { x, ..Tile::default() }; if self.fault == Fault::Count { 2 } else { 1 }];
        let numbers = vec![0.0; if self.fault == Fault::Uneven { context.image.place } else { 1 }];
        ImageDraws { numbers, tiles: vec![tiles] }
    }

    fn compute(&self, _: &Params<'_>, out: &Outputs<'_>, _: &StepContext<'_>) -> Result<LossValue> {
        out.views[0].cls.square()?.mean().map(LossValue::of)
    }
}

plugin!(Loss, "bad_view", BadView);

const BASE: &str = r#"
name = "views"
steps = 4
device = "cpu"
precision = "f64"
[backbone]
plugin = "vit"
dim = 16
depth = 2
heads = 2
patch_size = 4
pos_encoding = { plugin = "rope_box", rescale = 2.0 }
[data]
plugin = "scenes"
size = 32
count = 16
[batch]
size = 8
[crops]
global_size = 24
local_size = 8
local_count = 2
[teacher]
plugin = "ema"
momentum = 0.9
[optimizer]
lr = 1e-3
"#;

/// The base recipe with `tables` behind it, and keys replaced.
fn resolved(keys: &[(&str, &str)], tables: &str) -> Resolved {
    let text = keys.iter().fold(BASE.to_string(), |text, (old, new)| {
        assert!(text.contains(old), "{old}");
        text.replacen(old, new, 1)
    });
    Resolved::from_text(&format!("{text}\n{tables}")).unwrap_or_else(|e| panic!("{e}"))
}

/// The reports of the first steps, and the student's weights.
fn trained(resolved: &Resolved, steps: u64) -> (Vec<Report>, Vec<f64>) {
    let mut learner = Learner::new(&resolved.recipe).unwrap();
    let pipeline = pipeline(resolved, &learner);
    let step =
        |step| learner.step(step, &pipeline.step(step).unwrap().batches, false).unwrap_or_else(|e| panic!("{e}"));
    let reports = (0..steps).map(step).collect();
    (reports, learner.weights().student.to_f64_vec())
}

fn pipeline(resolved: &Resolved, learner: &Learner) -> Pipeline {
    let (data, _) = train::datasets(&resolved.recipe).unwrap();
    Pipeline::new(data, train::loader_spec(&resolved.recipe, learner, 0)).unwrap()
}

const PRETEXT: &str = "[losses.rotation]\nturns = 2\n[losses.jigsaw]\npermutations = 5\nhidden = 8\n\
    [losses.relative_location]\nneighbours = 3\nhidden = 8\n[losses.cka]\npoints = 3\n";

#[test]
fn parts_of_a_batch_get_the_views_and_draws_of_the_whole() {
    let (whole, weights) = trained(&resolved(&[], PRETEXT), 3);
    let (parts, of_parts) =
        trained(&resolved(&[("size = 8\n[crops]", "size = 8\nmicro_batches = 4\n[crops]")], PRETEXT), 3);
    for (a, b) in whole.iter().zip(&parts) {
        for (name, a) in &a.losses {
            assert!((a - b.losses[name]).abs() < 1e-9, "{name}: {a} of the whole, {} of its parts", b.losses[name]);
        }
    }
    let far = weights.iter().zip(&of_parts).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(far < 1e-9, "{far}");
}

#[test]
fn a_view_changes_nothing_that_other_losses_see() {
    let koleo = "[losses.koleo]\n[losses.sigreg]\nprojector = { hidden = 8, output = 4, layers = 1 }\n";
    let first = |tables: &str| trained(&resolved(&[], tables), 1).0.remove(0).losses;
    let (alone, beside) = (first(koleo), first(&format!("{koleo}{PRETEXT}")));
    for name in ["loss/koleo", "loss/sigreg"] {
        assert!((alone[name] - beside[name]).abs() < 1e-12, "{name}: {} alone, {}", alone[name], beside[name]);
    }
    // Positions are drawn for views as well, and other crops keep theirs.
    let jitter = [("rescale = 2.0", "rescale = 2.0, jitter = 1.5")];
    let first = |tables: &str| trained(&resolved(&jitter, tables), 1).0.remove(0).losses["loss/koleo"];
    assert!((first("[losses.koleo]") - first(&format!("[losses.koleo]\n{PRETEXT}"))).abs() < 1e-12);
}

#[test]
fn turns_can_be_told_where_there_is_an_up() {
    // All turns of an image are in the batch, so that guessing gives a quarter.
    let accuracy = |data: &str| {
        let keys = [("plugin = \"scenes\"\nsize = 32\ncount = 16", data), ("steps = 4", "steps = 100"), ("f64", "f32")];
        let (reports, _) = trained(&resolved(&keys, "[losses.rotation]"), 100);
        reports[80..].iter().map(|r| r.losses["loss/rotation/accuracy"]).sum::<f64>() / 20.0
    };
    let (rulers, scenes) = (accuracy("plugin = \"rulers\""), accuracy("plugin = \"scenes\""));
    assert!(rulers > 0.5 && (0.1..0.4).contains(&scenes), "{rulers} of rulers, {scenes} of scenes without an up");
}

#[test]
fn boxes_and_flips_say_where_crops_were_cut() {
    let resolved = resolved(&[("plugin = \"scenes\"\nsize = 32\ncount = 16", "plugin = \"rulers\"")], "[losses.dino]");
    let learner = Learner::new(&resolved.recipe).unwrap();
    // The Gram teacher's crops have the boxes of the global ones, and no distortion if asked.
    let mut spec = LoaderSpec { teacher_crop_size: Some(24), ..train::loader_spec(&resolved.recipe, &learner, 0) };
    spec.crops.own.teacher_without_distortion = true;
    let (mean, std) = (spec.crops.mean.clone(), spec.crops.std.clone());
    let pipeline = Pipeline::new(Arc::new(Rulers {}), spec).unwrap();
    let mut flips = [0; 2];
    for step in 0..4 {
        let batch = pipeline.step(step).unwrap().batches.remove(0);
        let crops = batch.teacher.as_ref().unwrap().to_f64_vec();
        for (i, image) in batch.sources.iter().enumerate() {
            for (k, &CropBox { x, y, width, height, flip }) in image.globals.iter().enumerate() {
                let pixels = &crops[(k * batch.images() + i) * 3 * 576..][..3 * 576];
                let value = |channel: usize, at: usize| {
                    (pixels[channel * 576 + at] * f64::from(std[channel]) + f64::from(mean[channel])) * 255.0
                };
                let mean_of = |channel| (0..576).map(|at| value(channel, at)).sum::<f64>() / 576.0;
                assert!((mean_of(0) - 2.0 * (x + width / 2.0 - 0.5)).abs() < 1.5, "columns of {x} + {width}");
                assert!((mean_of(1) - 3.0 * (y + height / 2.0 - 0.5)).abs() < 2.0, "rows of {y} + {height}");
                assert!((mean_of(2) - image.index as f64).abs() < 1.0, "which image");
                let rises = value(0, 12 * 24 + 23) > value(0, 12 * 24);
                assert_eq!(rises, !flip);
                flips[usize::from(flip)] += 1;
            }
            assert_eq!(image.locals.len(), 2);
            assert!(image
                .locals
                .iter()
                .all(|c| c.x >= 0.0 && c.y >= 0.0 && c.x + c.width <= 100.0 && c.y + c.height <= 80.0));
        }
    }
    assert!(flips.iter().all(|&n| n > 10), "{flips:?}");
}

#[test]
fn local_crops_of_global_ones_lie_in_their_boxes() {
    let text = [("local_count = 2", "local_count = 4\nlocal_from_global = true")];
    let resolved = resolved(&text, "[losses.sigreg]\nprojector = { hidden = 8, output = 4, layers = 1 }");
    let learner = Learner::new(&resolved.recipe).unwrap();
    let batch = pipeline(&resolved, &learner).step(0).unwrap().batches.remove(0);
    for image in &batch.sources {
        for (k, local) in image.locals.iter().enumerate() {
            let global = image.globals[k / 2];
            // A window of 8 of the 24 pixels.
            let close = |a: f64, b: f64| (a - b).abs() < 1e-9;
            assert!(close(local.width, global.width / 3.0) && close(local.height, global.height / 3.0));
            assert!(local.x >= global.x - 1e-9 && local.x + local.width <= global.x + global.width + 1e-9);
            assert_eq!(local.flip, global.flip);
        }
    }
}

#[test]
fn a_loss_reads_fields_of_the_dataset() {
    let data = [("plugin = \"scenes\"\nsize = 32\ncount = 16", "plugin = \"rulers\"")];
    let resolved = resolved(&data, "[losses.reads_field]");
    let learner = Learner::new(&resolved.recipe).unwrap();
    let batch = pipeline(&resolved, &learner).step(0).unwrap().batches.remove(0);
    let mean = batch.indices().sum::<usize>() as f64 / 8.0;
    let losses = trained(&resolved, 1).0.remove(0).losses;
    let values = ["loss/reads_field", "loss/reads_field/drawn", "loss/reads_field/ten", "loss/reads_field/place"];
    assert_eq!(values.map(|name| losses[name]), [mean, mean, 10.0 * mean, 3.5]);
}

#[test]
fn a_field_that_no_dataset_gives_is_an_error_of_check() {
    let resolved = resolved(&[], "[losses.reads_field]");
    let (data, _) = train::datasets(&resolved.recipe).unwrap();
    let text = resolved.check_data(data.as_ref()).expect_err("refused").to_string();
    for part in ["losses.reads_field", "reads the field `number`", "`scenes` has none", "enabled = false"] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn views_that_cannot_be_made_are_errors_of_check() {
    let refused = |fault: &str| {
        let text = format!("{BASE}\n[losses.bad_view]\nfault = \"{fault}\"");
        Resolved::from_text(&text).expect_err("refused").to_string()
    };
    for (fault, parts) in [
        ("size", ["losses.bad_view", "1 crops of 9 pixels", "multiple of the 4 pixels"]),
        ("outside", ["losses.bad_view", "Tile { crop: 0, x: 17", "in one of 2 crops of 24"]),
        ("count", ["losses.bad_view", "[2] tiles for its views, which have [1]", "draw_image"]),
        ("uneven", ["losses.bad_view", "1 numbers for one image and 0 for another", "draw_image"]),
    ] {
        let error = refused(fault);
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    }
    let small = BASE.replace("global_size = 24", "global_size = 12");
    let error = Resolved::from_text(&format!("{small}\n[losses.jigsaw]")).expect_err("refused").to_string();
    assert!(error.contains("losses.jigsaw") && error.contains("crops.global_size to 15"), "{error}");
}

#[test]
fn local_crops_that_no_loss_reads_are_not_made() {
    let batch = |tables: &str| {
        let resolved = resolved(&[], tables);
        let learner = Learner::new(&resolved.recipe).unwrap();
        pipeline(&resolved, &learner).step(0).unwrap().batches.remove(0)
    };
    let (without, with) = (batch("[losses.koleo]"), batch("[losses.koleo]\n[losses.dino]"));
    assert!(without.local.is_none() && with.local.is_some());
    assert_eq!(without.global.to_f64_vec(), with.global.to_f64_vec());
    assert_eq!((with.global.device(), with.global.dtype()), (Device::Cpu, DType::F32));
}
