//! The second backbone: equal to `transformers`, its gradient right, and a student like any other.

use std::path::Path;
use std::sync::Arc;

use dinolab_core::contract::{Backbone, BackboneContext, Crops, Draws, Features, Mode};
use dinolab_core::files::{read_tensors, write_tensors};
use dinolab_core::params::{load_named, Layout, ParamBuilder, Params};
use dinolab_core::registry::Chosen;
use dinolab_core::rng::{Rng, Stream};
use dinolab_core::tensor::Tape;
use dinolab_core::weights::Source;
use dinolab_core::{DType, Tensor};
use dinolab_plugins::published;
use dinolab_tests::program::Folder;
use serde_json::{json, Value};

struct Model {
    backbone: Box<dyn Backbone>,
    layout: Arc<Layout>,
}

fn build(table: Value) -> Model {
    let chosen: Chosen<dyn Backbone> = serde_json::from_value(table).expect("a backbone table");
    let mut params = ParamBuilder::new();
    let mut context = BackboneContext { params: &mut params, global_size: 64, channels: 3 };
    let backbone = chosen.build(&mut context).expect("it can be built");
    Model { backbone, layout: params.finish() }
}

fn normal(seed: u64, shape: &[usize]) -> Tensor {
    let mut rng = Rng::new(seed, Stream::Plugin, 0, 0);
    let data: Vec<f64> = (0..shape.iter().product::<usize>()).map(|_| rng.normal()).collect();
    Tensor::from_slice(&data, shape).expect("sizes agree")
}

fn relative_error(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.shape(), b.shape());
    let (a, b) = (a.to_f64_vec(), b.to_f64_vec());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut a.iter().zip(&b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied())
}

#[test]
fn features_equal_those_of_transformers() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/convnext_hf.safetensors");
    let file = read_tensors(&path).expect("the fixture");
    let folder = Folder::new();
    std::fs::create_dir(folder.path("published")).unwrap();
    folder.write("published/config.json", &file.metadata["config"]);
    let tensors: Vec<_> = file
        .names()
        .filter_map(|name| Some((name.strip_prefix("weights.")?.to_string(), file.get(name)?.clone())))
        .collect();
    write_tensors(&folder.path("published/model.safetensors"), &tensors, &[]).unwrap();
    // Every tensor has its place, or this fails.
    published::import(&folder.path("published"), &folder.path("weights")).expect("it is known");
    let source = Source::at(&folder.path("weights")).unwrap();
    let mut params = ParamBuilder::new();
    let backbone = source.known_model().unwrap().build(&mut params).unwrap();
    let model = Model { backbone, layout: params.finish() };
    let weights = source.tensors().unwrap();
    let pixels = file.get("pixels").expect("it is there");
    for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F64, 1e-6)] {
        let mut flat = Tensor::zeros(&[model.layout.len()], dtype);
        load_named(&model.layout, &mut flat, |name| weights.get(name).cloned(), &path).expect("it fits");
        let params = Params::frozen(&model.layout, &flat);
        let features = model.backbone.forward(&params, &[Crops::global(pixels.clone())], Mode::Eval);
        let Features { cls, patches, .. } = features.expect("it runs").remove(0);
        let hidden = file.get("last_hidden_state").expect("it is there");
        let theirs = hidden.narrow_axis(1, 1, hidden.dim(1) - 1).expect("CLS comes first");
        for (what, ours, theirs) in [("cls", &cls, file.get("pooler_output").unwrap()), ("patches", &patches, &theirs)]
        {
            let error = relative_error(ours, theirs);
            println!("convnext_hf {what} {dtype:?} {error:.1e} (tolerance {tolerance:.0e})");
            assert!(error < tolerance, "{what} {dtype:?}: {error:e}");
        }
    }
}

/// A ConvNeXt of eight blocks' worth of numbers.
fn small() -> Value {
    json!({ "plugin": "convnext", "depths": [1, 1, 2, 1], "dims": [6, 8, 17, 12], "layer_scale": 0.7, "patch_size": 16,
        "drop_path": 0.6 })
}

#[test]
fn the_gradient_of_every_parameter_is_right_with_dropped_paths_and_a_resized_map() {
    let model = build(small());
    let flat = model.layout.init(3, DType::F64).expect("it can be drawn");
    let crops = [(64, 80, false), (48, 32, true)];
    let crops = crops.map(|(h, w, local)| Crops { local, ..Crops::global(normal(5, &[4, 3, h, w])) });
    let draws: Draws = model.backbone.draw(&|stream, index| Rng::new(0, stream, 0, index), &[4, 4]);
    assert!(draws.kept[4].iter().all(|k| k[0].len() == 1) && draws.kept[0].iter().all(|k| k[0].len() == 4));
    let loss = |params: &Params<'_>| {
        let features = model.backbone.forward(params, &crops, Mode::Train(&draws)).expect("it runs");
        let sums = features.iter().zip(0..).flat_map(|(f, k)| {
            let part = |x: &Tensor, seed| x.mul(&normal(seed, x.shape())).unwrap().sum().unwrap();
            [part(&f.cls, 10 + k), part(&f.patches, 20 + k)]
        });
        sums.reduce(|a, b| a.add(&b).unwrap()).expect("there are crops")
    };
    let tape = Tape::new();
    let mut grads = Tensor::zeros(&[model.layout.len()], DType::F64);
    let value = loss(&Params::tracked(&model.layout, &flat, &tape));
    tape.backward(&value, 1.0, Some(&mut grads)).expect("it runs");
    let (start, grads) = (flat.to_f64_vec(), grads.to_f64_vec());
    for spec in model.layout.specs() {
        // One random direction in the space of this parameter.
        let direction = normal(spec.offset as u64, &[spec.range().len()]).to_f64_vec();
        let at = |h: f64| {
            let mut moved = start.clone();
            moved[spec.range()].iter_mut().zip(&direction).for_each(|(x, d)| *x += h * d);
            let moved = Tensor::from_slice(&moved, &[moved.len()]).unwrap();
            loss(&Params::frozen(&model.layout, &moved)).item()
        };
        // Small beside the maps of a fresh model, whose norms divide by little.
        let h = 1e-5;
        let want = (8.0 * (at(h) - at(-h)) - (at(2.0 * h) - at(-2.0 * h))) / (12.0 * h);
        let got: f64 = grads[spec.range()].iter().zip(&direction).map(|(g, d)| g * d).sum();
        assert!((got - want).abs() < 1e-6 * want.abs().max(1.0), "{}: {got}, differences give {want}", spec.name);
    }
}

#[test]
fn features_do_not_depend_on_what_else_is_in_the_batch_and_patches_lie_on_the_asked_grid() {
    let model = build(small());
    let flat = model.layout.init(1, DType::F64).expect("it can be drawn");
    let params = Params::frozen(&model.layout, &flat);
    let pixels = normal(7, &[3, 3, 64, 96]);
    let see = |pixels: Tensor| model.backbone.forward(&params, &[Crops::global(pixels)], Mode::Eval).unwrap().remove(0);
    let (all, last) = (see(pixels.clone()), see(pixels.narrow(2, 1).unwrap()));
    assert_eq!((all.patches.shape(), all.prenorm.shape()), (&[3, 24, 12][..], &[3, 25, 12][..]));
    // Products of other sizes add up in another order.
    assert!(relative_error(&all.patches.narrow(2, 1).unwrap(), &last.patches) < 1e-12);
    assert!(relative_error(&all.cls.narrow(2, 1).unwrap(), &last.cls) < 1e-12);
}

#[test]
fn published_sizes_have_the_published_numbers_of_parameters() {
    for (preset, millions) in [("tiny", 27.8), ("small", 49.5), ("base", 87.6), ("large", 196.2)] {
        let model = build(json!({ "plugin": "convnext", "preset": preset }));
        assert!((model.layout.count() as f64 / 1e6 - millions).abs() < 0.1, "{preset}: {}", model.layout.count());
    }
}

/// The micro recipe with a ConvNeXt.
const CONVNEXT: &str = r#"
extends = "micro.toml"
name = "convnext"
steps = 40
[backbone]
plugin = "convnext"
depths = [1, 1, 2, 1]
dims = [8, 12, 16, 24]
layer_scale = 0.5
patch_size = 16
[crops]
global_size = 64
local_size = 32
[losses]
ibot = { enabled = false }
gram = { enabled = false }
[checkpoint]
every = 20
"#;

fn loss(folder: &Folder, run: &str, steps: std::ops::Range<usize>) -> f64 {
    let metrics = folder.read(&format!("{run}/metrics.jsonl"));
    let value = |line: &str| serde_json::from_str::<Value>(line).expect("JSON")["loss/dino"].as_f64().expect("a loss");
    let values: Vec<f64> = metrics.lines().map(value).collect();
    values[steps.clone()].iter().sum::<f64>() / steps.len() as f64
}

#[test]
fn the_loss_of_a_convnext_falls_and_it_resumes_to_the_same_bytes() {
    let folder = Folder::with_micro();
    folder.write("convnext.toml", CONVNEXT);
    folder.succeed(&["train", "convnext.toml", "--out", "whole"]);
    let (first, last) = (loss(&folder, "whole", 0..5), loss(&folder, "whole", 35..40));
    assert!(last < first - 0.05, "the loss went from {first} to {last}");
    let last = |run: &str| std::fs::read(folder.path(run).join("checkpoints/step-00000040/model.safetensors")).unwrap();
    let whole = last("whole");
    std::fs::remove_dir_all(folder.path("whole/checkpoints/step-00000040")).unwrap();
    std::fs::remove_file(folder.path("whole/result.json")).unwrap();
    folder.succeed(&["train", "convnext.toml", "--out", "whole", "--resume"]);
    assert!(last("whole") == whole, "the resumed run differs");
}

#[test]
fn crops_that_a_convnext_cannot_see_are_refused() {
    let folder = Folder::with_micro();
    folder.write("convnext.toml", CONVNEXT);
    let ended = folder.run(&["recipe", "check", "convnext.toml", "--set", "crops.local_size=16"]);
    assert_eq!(ended.code, 2, "{}", ended.err);
    assert!(ended.err.contains("crops.local_size") && ended.err.contains("use at least 32"), "{}", ended.err);
}

#[test]
fn a_recipe_that_masks_patches_for_a_convnext_is_warned() {
    let folder = Folder::with_micro();
    folder.write("convnext.toml", CONVNEXT);
    let plain = folder.succeed(&["recipe", "check", "convnext.toml"]);
    assert!(!plain.err.contains("mask token"), "{}", plain.err);
    let masked = folder.succeed(&["recipe", "check", "convnext.toml", "--set", "losses.ibot.enabled=true"]);
    assert!(masked.err.contains("has no mask token") && masked.err.contains("losses.ibot"), "{}", masked.err);
}
