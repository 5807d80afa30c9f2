//! Published layouts, both ways, against Hugging Face transformers itself: what it saves is imported and gives the same
//! features, and what is exported it loads and gives the same features.
//!
//! Needs a Python with `torch` and `transformers`: that of `DINOLAB_PYTHON`, of `target/python`, or `python3`. Without,
//! the test says so and passes.

use std::path::Path;

use dinolab_core::contract::{Crops, Mode};
use dinolab_core::files::{read_tensors, write_tensors};
use dinolab_core::params::{load_named, ParamBuilder, Params};
use dinolab_core::train::Trained;
use dinolab_core::weights::{Source, TensorFiles};
use dinolab_core::{DType, Tensor};
use dinolab_plugins::published;
use dinolab_tests::program::{python, script, Folder};

const MODULES: &str = "torch, transformers, safetensors";

fn relative_error(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied())
}

/// Errors of the last and of the first block's tokens of the weights in `folder`, against `expected`.
fn errors(folder: &Path, expected: &Path) -> [f64; 2] {
    let model = Source::at(folder).unwrap().known_model().unwrap();
    let mut params = ParamBuilder::new();
    let backbone = model.build(&mut params).unwrap();
    let layout = params.finish();
    let mut flat = Tensor::zeros(&[layout.len()], DType::F32);
    let weights = Source::at(folder).unwrap().tensors().unwrap();
    load_named(&layout, &mut flat, |name| weights.get(name).cloned(), folder).unwrap();
    let params = Params::frozen(&layout, &flat);
    let expected = read_tensors(expected).unwrap();
    let get = |name: &str| expected.get(name).unwrap();
    let crops = Crops::global(get("pixels").clone());
    let last = backbone.forward(&params, std::slice::from_ref(&crops), Mode::Eval).unwrap().remove(0);
    let first = backbone.intermediate(&params, &crops, backbone.depth()).unwrap().remove(0);
    [(tokens(&last), "last_hidden_state"), (first.prenorm.to_f64_vec(), "hidden_state_1")]
        .map(|(got, name)| relative_error(&got, &get(name).to_f64_vec()))
}

/// CLS, registers and patches of every image, after the final norm.
fn tokens(features: &dinolab_core::contract::Features) -> Vec<f64> {
    let parts = [&features.cls, &features.registers, &features.patches].map(Tensor::to_f64_vec);
    let images = features.cls.dim(0);
    let of = |i: usize| parts.iter().flat_map(move |p| &p[i * p.len() / images..(i + 1) * p.len() / images]);
    (0..images).flat_map(of).copied().collect()
}

#[test]
fn transformers_and_dinolab_agree_both_ways() {
    let Some(python) = python(MODULES) else { return };
    let folder = Folder::new();
    let models = folder.path("models");
    std::fs::create_dir(&models).unwrap();
    script(&python, "hugging_face.py", &[Path::new("make"), &models]);
    let mut exports = Vec::new();
    for entry in std::fs::read_dir(&models).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_dir()) {
        let name = entry.file_name().unwrap().to_str().unwrap().to_string();
        let original = entry.join("model.pth");
        let file = if original.exists() { &original } else { &entry };
        let (weights, expected) = (folder.path(&name), models.join(format!("{name}.expected.safetensors")));
        published::import(file, &weights).unwrap();
        let [last, first] = errors(&weights, &expected);
        println!("{name:14} imported: last {last:.1e}, first block {first:.1e}");
        assert!(last < 1e-5 && first < 1e-5, "{name}: {last:e}, {first:e}");

        let export = folder.path(&format!("{name}_hf"));
        folder.succeed(&["export", &name, "--format", "hf", "--out", export.to_str().unwrap()]);
        if !original.exists() && !["state_dict", "pickled"].contains(&name.as_str()) {
            same_bits(&entry, &export);
        }
        std::fs::copy(&expected, export.join("pixels.safetensors")).unwrap();
        exports.push((export, expected));
    }
    assert_eq!(exports.len(), 13, "every model was seen");
    let paths: Vec<&Path> = [Path::new("run")].into_iter().chain(exports.iter().map(|e| e.0.as_path())).collect();
    script(&python, "hugging_face.py", &paths);
    for (export, expected) in &exports {
        let read = |path: &Path| read_tensors(path).unwrap().get("last_hidden_state").unwrap().to_f64_vec();
        let error = relative_error(&read(&export.join("expected.safetensors")), &read(expected));
        println!("{} exported: {error:.1e}", export.display());
        // Half-precision files are compared as transformers reads them, which computes in f64 all the same.
        assert!(error < 1e-6, "{}: {error:e}", export.display());
    }
}

/// The same tensors to the bit, whatever file they are in. A model without registers need not have an empty tensor.
fn same_bits(a: &Path, b: &Path) {
    let [a, b] = [a, b].map(|path| TensorFiles::open(path).unwrap());
    let names = |files: &TensorFiles| -> Vec<String> {
        files.names().filter(|n| !files.get(n).unwrap().bytes.is_empty()).map(String::from).collect()
    };
    assert_eq!(names(&a), names(&b));
    for name in names(&a) {
        let (a, b) = (a.get(&name).unwrap(), b.get(&name).unwrap());
        assert_eq!((a.dtype, a.shape), (b.dtype, b.shape), "{name}");
        assert!(a.bytes == b.bytes, "{name} has other bits");
    }
}

#[test]
fn transformers_reads_a_trained_teacher() {
    let Some(python) = python(MODULES) else { return };
    let folder = Folder::with_micro();
    let convnext = "backbone={ plugin = \"convnext\", depths = [1, 2, 1, 1], dims = [4, 6, 8, 12], layer_scale = 0.5 }";
    let (vit, convnext) =
        (["steps=2"; 4], [convnext, "crops.global_size=64", "crops.local_size=32", "teachers.gram.crop_size=64"]);
    let runs = [("vit", vit, (40, 24)), ("convnext", convnext, (64, 96))];
    let got = runs.map(|(run, sets, (height, width))| {
        let sets = sets.iter().flat_map(|set| ["--set", set]);
        let args: Vec<&str> =
            ["train", "micro.toml", "--set", "steps=2", "--out", run].into_iter().chain(sets).collect();
        folder.succeed(&args);
        let out = format!("{run}_hf");
        folder.succeed(&["export", run, "--format", "hf", "--out", &out]);
        let trained = Trained::open(&folder.path(run)).unwrap();
        let pixels: Vec<f32> = (0..3 * height * width).map(|i| (i as f32 * 0.37).sin()).collect();
        let pixels = Tensor::from_slice(&pixels, &[1, 3, height, width]).unwrap();
        let file = folder.path(&out).join("pixels.safetensors");
        write_tensors(&file, &[("pixels".into(), pixels.clone())], &[]).unwrap();
        tokens(&trained.features(&pixels).unwrap())
    });
    let outs = ["vit_hf", "convnext_hf"].map(|out| folder.path(out));
    script(&python, "hugging_face.py", &[Path::new("run"), &outs[0], &outs[1]]);
    for ((run, ..), (got, out)) in runs.iter().zip(got.iter().zip(&outs)) {
        let expected = read_tensors(&out.join("expected.safetensors")).unwrap();
        let error = relative_error(got, &expected.get("last_hidden_state").unwrap().to_f64_vec());
        assert!(error < 1e-5, "{run}: {error:e}");
    }
}
