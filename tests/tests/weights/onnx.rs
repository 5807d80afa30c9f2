//! Exports as ONNX against onnxruntime: equal features at several sizes.
//!
//! Needs a Python with `onnx`, `onnxruntime` and `safetensors`: that of `DINOLAB_PYTHON`, of `target/python`, or `python3`.
//! Without, the test says so and passes.

use std::path::Path;

use dinolab_core::files::{read_tensors, write_tensors};
use dinolab_core::train::Trained;
use dinolab_core::Tensor;
use dinolab_plugins as _;
use dinolab_tests::program::{python, script, Folder};

/// How far a number may be from onnxruntime's, in parts of the largest.
const TOLERANCE: f64 = 1e-4;
/// Batch, height and width.
type Sizes = [(usize, usize, usize); 3];
const SIZES: Sizes = [(2, 32, 32), (1, 48, 24), (3, 16, 64)];
/// Those of a network that takes 32 pixels at least.
const LARGER: Sizes = [(2, 32, 64), (1, 96, 72), (3, 40, 48)];

/// Every choice that changes the graph.
const MODELS: [(&str, &[&str]); 7] = [
    ("plain", &[]),
    (
        "gated",
        &[
            "backbone.ffn=\"swiglu\"",
            "backbone.norm=\"rms_norm\"",
            "backbone.qkv_bias=false",
            "backbone.ffn_bias=false",
        ],
    ),
    (
        "untied",
        &[
            "backbone.untie_cls_and_patch_norms=true",
            "backbone.registers=0",
            "backbone.layer_scale=0.0",
            "backbone.mask_k_bias=false",
            "backbone.pos_encoding={ plugin = \"rope_box\", normalize = \"max\", periods = { range = [0.5, 20.0] } }",
        ],
    ),
    ("unplaced", &["backbone.pos_encoding={ plugin = \"none\" }", "backbone.proj_bias=false"]),
    ("convnext", &[CONVNEXT, "backbone.patch_size=32", "crops.global_size=64", "crops.local_size=32", TEACHER]),
    ("convnext_16", &[CONVNEXT, "backbone.patch_size=16", "crops.global_size=64", "crops.local_size=32", TEACHER]),
    ("convnext_plain", &[CONVNEXT, "backbone.layer_scale=0.0", "crops.global_size=64", "crops.local_size=32", TEACHER]),
];
/// Crops of the Gram teacher are whole numbers of patches too.
const TEACHER: &str = "teachers.gram.crop_size=64";
const CONVNEXT: &str =
    "backbone={ plugin = \"convnext\", depths = [1, 2, 1, 1], dims = [4, 6, 8, 12], patch_size = 8 }";

fn pixels((n, height, width): (usize, usize, usize)) -> Tensor {
    let values: Vec<f32> = (0..n * 3 * height * width).map(|i| (i as f32 * 0.37).sin() * 2.0).collect();
    Tensor::from_slice(&values, &[n, 3, height, width]).expect("as many as there are")
}

#[test]
fn onnxruntime_gives_the_same_features_at_every_size() {
    let Some(python) = python("onnx, onnxruntime, safetensors") else { return };
    let folder = Folder::with_micro();
    for (name, keys) in MODELS {
        let sets: Vec<&str> = keys.iter().flat_map(|key| ["--set", key]).collect();
        folder.succeed(
            &[&["train", "micro.toml", "--out", name, "--set", "steps=3", "--set", "optimizer.lr=0.05"], &sets[..]]
                .concat(),
        );
        let onnx = format!("{name}_onnx");
        folder.succeed(&["export", name, "--format", "onnx", "--out", &onnx]);
        let sizes = if name.starts_with("convnext") { LARGER } else { SIZES };
        let inputs: Vec<(String, Tensor)> =
            sizes.iter().enumerate().map(|(i, &s)| (i.to_string(), pixels(s))).collect();
        write_tensors(&folder.path(&onnx).join("pixels.safetensors"), &inputs, &[]).expect("it can be written");
        script(&python, "onnx_models.py", &[&folder.path(&onnx)]);
        let theirs = read_tensors(&folder.path(&onnx).join("features.safetensors")).expect("it was just written");
        let trained = Trained::open(&folder.path(name)).expect("a run");
        for (i, (_, pixels)) in inputs.iter().enumerate() {
            let ours = trained.features(pixels).expect("it runs");
            for (kind, ours) in [("cls", &ours.cls), ("registers", &ours.registers), ("patches", &ours.patches)] {
                if ours.is_empty() {
                    continue;
                }
                let theirs = theirs.get(&format!("{i}.{kind}")).unwrap_or_else(|| panic!("{kind} of {name}"));
                assert_eq!(ours.shape(), theirs.shape(), "{name}, {kind}");
                let (a, b) = (ours.to_f64_vec(), theirs.to_f64_vec());
                let most = b.iter().fold(0.0f64, |most, x| most.max(x.abs()));
                let worst = a.iter().zip(&b).fold(0.0f64, |worst, (a, b)| worst.max((a - b).abs())) / most;
                println!("{name} {kind} at {:?}: {worst:.1e}", sizes[i]);
                assert!(worst < TOLERANCE && most > 0.1, "{name}, {kind} at {:?}: {worst:e}", sizes[i]);
            }
        }
    }
}

#[test]
fn what_onnx_has_no_words_for_is_refused_and_nothing_is_written() {
    let folder = Folder::with_micro();
    let learned = "backbone.pos_encoding={ plugin = \"learned_absolute\" }";
    folder.succeed(&["train", "micro.toml", "--out", "run", "--set", "steps=1", "--set", learned]);
    let ended = folder.run(&["export", "run", "--format", "onnx", "--out", "onnx"]);
    assert!(ended.code == 2 && ended.err.contains("learned_absolute") && ended.err.contains("ONNX"), "{}", ended.err);
    assert!(!Path::new(&folder.path("onnx")).exists());
}
