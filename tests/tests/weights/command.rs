//! Weights through the program: import, training from them, export, and what is refused.

use std::fs;
use std::path::PathBuf;

use dinolab_core::files::{read_tensors, write_tensors};
use dinolab_core::params::ParamBuilder;
use dinolab_core::weights::Source;
use dinolab_core::{DType, Tensor};
use dinolab_plugins as _;
use dinolab_tests::program::{root, Folder};

/// A small model in the Hugging Face layout.
fn published(name: &str) -> PathBuf {
    root().join("tests/golden").join(name)
}

/// A folder with that model imported as `weights`.
fn imported(name: &str) -> Folder {
    let folder = Folder::with_micro();
    folder.succeed(&["import", published(name).to_str().unwrap(), "--out", "weights"]);
    folder
}

/// What makes the shipped recipe a matter of a second.
const SHRINK: [&str; 9] = [
    "data.plugin=scenes",
    "data.count=8",
    "steps=1",
    "batch.size=2",
    "crops.global_size=48",
    "crops.local_size=16",
    "crops.local_count=2",
    "losses.dino.head={ hidden = 16, bottleneck = 8, prototypes = 16 }",
    "losses.ibot.head={ hidden = 16, bottleneck = 8, prototypes = 16 }",
];

fn sets<'a>(sets: &'a [&'a str]) -> Vec<&'a str> {
    sets.iter().flat_map(|set| ["--set", set]).collect()
}

#[test]
fn the_shipped_recipe_continues_from_imported_weights() {
    let folder = imported("hf_gated");
    let recipe = root().join("recipes/continue_from_hf.toml");
    let from = ["backbone.weights=weights", "teachers.gram.source.checkpoint=weights", "optimizer.lr=0"];
    let args = [&["train", recipe.to_str().unwrap(), "--out", "run"][..], &sets(&SHRINK), &sets(&from)].concat();
    folder.succeed(&args);
    // At a learning rate of zero the student is what it began as.
    folder.succeed(&["export", "run", "--format", "safetensors", "--role", "student", "--out", "back"]);
    let [before, after] = ["weights", "back"].map(|f| read_tensors(&folder.path(f).join("model.safetensors")).unwrap());
    assert!(before.names().count() > 30);
    for name in before.names() {
        assert_eq!(before.get(name).unwrap().as_bytes(), after.get(name).unwrap().as_bytes(), "{name}");
    }
    assert!(after.has("dino_head."), "heads are new, and exported");
    // The run knows its model without the weights.
    fs::remove_dir_all(folder.path("weights")).unwrap();
    folder.succeed(&["recipe", "check", "run"]);
    let next = ["steps=2", "backbone.drop_path=0.3"];
    let from = ["backbone.weights=back", "teachers.gram.source.checkpoint=run"];
    folder.succeed(
        &[&["train", recipe.to_str().unwrap(), "--out", "next"][..], &sets(&SHRINK), &sets(&from), &sets(&next)]
            .concat(),
    );
}

#[test]
fn weights_of_another_model_are_refused_key_by_key() {
    let folder = imported("hf_mlp");
    let ended = folder.run(&["train", "micro.toml", "--set", "backbone.weights=weights"]);
    assert_eq!(ended.code, 2);
    for said in
        ["backbone.dim is 64 in the weights, 32 in the recipe", "backbone.depth is 3", "backbone.ffn_hidden is 160"]
    {
        assert!(ended.err.contains(said), "{said}: {}", ended.err);
    }
    // The number of heads changes no shape.
    let same = ["backbone.dim=64", "backbone.depth=3", "backbone.ffn_ratio=2.5", "backbone.heads=8"];
    for key in ["backbone.weights=weights", "init_from=weights"] {
        let ended = folder.run(&[&["train", "micro.toml", "--set", key][..], &sets(&same)].concat());
        assert_eq!(ended.code, 2, "{}", ended.err);
        assert!(ended.err.contains("backbone.heads is 4 in the weights, 8 in the recipe"), "{}", ended.err);
        assert!(!ended.err.contains("backbone.dim"), "{}", ended.err);
    }
}

#[test]
fn a_recipe_without_a_plugin_says_only_what_the_weights_know() {
    let folder = imported("hf_mlp");
    let recipe = root().join("recipes/continue_from_hf.toml");
    let check = |set: &[&str]| folder.run(&[&["recipe", "check", recipe.to_str().unwrap()][..], &sets(set)].concat());
    let from = ["backbone.weights=weights", "teachers.gram.source.checkpoint=weights"];
    assert_eq!(check(&from).code, 0);
    let ended = check(&[from[0], "backbone.preset=vit_l16"]);
    assert!(ended.code == 2 && ended.err.contains("the model of weights has no such key"), "{}", ended.err);
    let ended = check(&["backbone.weights=nowhere"]);
    assert!(ended.code == 2 && ended.err.contains("backbone.weights: nowhere: does not exist"), "{}", ended.err);
    let ended = check(&[from[0], "init_from=weights"]);
    assert!(ended.code == 2 && ended.err.contains("backbone.weights already"), "{}", ended.err);
}

#[test]
fn everything_that_is_wrong_with_a_file_is_listed() {
    let folder = Folder::new();
    fs::create_dir(folder.path("broken")).unwrap();
    fs::copy(published("hf_mlp").join("config.json"), folder.path("broken/config.json")).unwrap();
    let whole = read_tensors(&published("hf_mlp").join("model.safetensors")).unwrap();
    let mut tensors: Vec<(String, Tensor)> = whole.names().map(|n| (n.into(), whole.get(n).unwrap().clone())).collect();
    tensors.retain(|(name, _)| name != "layer.1.norm1.weight");
    tensors.push(("layer.3.norm1.weight".into(), Tensor::zeros(&[64], DType::F32)));
    tensors.iter_mut().find(|t| t.0 == "norm.bias").unwrap().1 = Tensor::zeros(&[63], DType::F32);
    write_tensors(&folder.path("broken/model.safetensors"), &tensors, &[]).unwrap();
    let ended = folder.run(&["import", "broken", "--out", "weights"]);
    assert_eq!(ended.code, 2);
    for said in [
        "3 problems",
        "missing layer.1.norm1.weight [64]",
        "norm.bias is [63], expected [64]",
        "not part of the model: layer.3.norm1.weight [64]",
    ] {
        assert!(ended.err.contains(said), "{said}: {}", ended.err);
    }
    assert!(!folder.path("weights").exists(), "nothing is left of an import that failed");
}

#[test]
fn a_damaged_pickle_and_one_that_runs_something_are_refused_in_words() {
    let folder = Folder::with_micro();
    // `os.system("touch ran")`, as pickle writes it.
    let program = "cposix\nsystem\n(S'touch ran'\ntR.";
    let pointer = "version https://git-lfs.github.com/spec/v1\n";
    let files = [
        ("cut.pth", "PK\u{3}\u{4}", "as a PyTorch file"),
        ("empty.pt", "", "empty (0 bytes)"),
        ("pointer.pth", pointer, "a Git LFS pointer"),
        ("runs.pth", program, "a text"),
    ];
    for (name, bytes, said) in files {
        folder.write(name, bytes);
        let ended = folder.run(&["import", name, "--out", "weights"]);
        assert!(ended.code == 2 && ended.err.contains(name) && ended.err.contains(said), "{}", ended.err);
        assert!(!folder.path("weights").exists() && !folder.path("ran").exists());
        let set = format!("backbone.weights={name}");
        let ended = folder.run(&["recipe", "check", "micro.toml", "--set", &set]);
        assert!(ended.code == 2 && ended.err.contains(&format!("dinolab import {name}")), "{}", ended.err);
    }
    let left = std::fs::read_dir(folder.path("")).expect("a folder").count();
    assert_eq!(left, 5, "four files and the recipe");
}

#[test]
fn an_existing_folder_is_not_overwritten() {
    let folder = imported("hf_mlp");
    let ended = folder.run(&["export", "weights", "--format", "hf", "--out", "weights"]);
    assert!(ended.code == 2 && ended.err.contains("there is something already"), "{}", ended.err);
}

#[test]
fn what_the_hugging_face_layout_cannot_express_is_refused_by_name() {
    let folder = Folder::with_micro();
    for (i, (set, said)) in [
        ("backbone.pos_encoding={ plugin = \"learned_absolute\" }", "the position encoding `learned_absolute`"),
        ("backbone.norm=rms_norm", "RMSNorm"),
        ("backbone.untie_cls_and_patch_norms=true", "a norm of its own for CLS"),
        ("backbone.layer_scale=0.0", "no LayerScale"),
    ]
    .into_iter()
    .enumerate()
    {
        let run = format!("run{i}");
        folder.succeed(&["train", "micro.toml", "--out", &run, "--set", "steps=1", "--set", set]);
        let ended = folder.run(&["export", &run, "--format", "hf", "--out", "hf"]);
        assert!(ended.code == 2 && ended.err.contains(said), "{said}: {}", ended.err);
        folder.succeed(&["export", &run, "--format", "safetensors", "--out", &format!("weights{i}")]);
    }
}

/// The limit counts all memory of the process but mapped files.
#[test]
#[cfg(target_os = "linux")]
fn importing_needs_less_memory_than_the_file() {
    let folder = imported("hf_mlp");
    // The same model, but wide: 96 MB.
    let text = folder.read("weights/weights.toml").replace("dim = 64", "dim = 640").replace("heads = 4", "heads = 10");
    let text = text.replace("depth = 3", "depth = 6");
    fs::create_dir(folder.path("wide")).unwrap();
    folder.write("wide/weights.toml", &text);
    let mut params = ParamBuilder::new();
    Source::at(&folder.path("wide")).unwrap().known_model().unwrap().build(&mut params).unwrap();
    let layout = params.finish();
    let flat = Tensor::zeros(&[layout.len()], DType::F32);
    let tensors: Vec<(String, Tensor)> =
        layout.specs().iter().map(|s| (s.name.clone(), flat.view(s.offset, &s.shape))).collect();
    write_tensors(&folder.path("wide/model.safetensors"), &tensors, &[]).unwrap();
    folder.succeed(&["export", "wide", "--format", "hf", "--out", "hf"]);
    let size = fs::metadata(folder.path("hf/model.safetensors")).unwrap().len();
    let limit = 42 << 10;
    assert!(size > 2 * (limit << 10), "{size} bytes");
    let program = env!("CARGO_BIN_EXE_with_plugins");
    let command = format!("ulimit -d {limit} && exec {program} import hf --out again");
    let output = std::process::Command::new("sh").args(["-c", &command]).current_dir(folder.path("")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
