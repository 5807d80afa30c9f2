//! Files of earlier versions: what was written under schema 1 still loads, gives the same features and trains.
//!
//! `tests/fixtures/schema_1` was made by the program of that version, and is never made anew:
//!
//! ```text
//! dinolab train recipe.toml --out run            # then back to its checkpoint of step 2
//! dinolab export run --format safetensors --out weights
//! ```

use std::fs;
use std::path::Path;

use dinolab_core::train::Trained;
use dinolab_core::Tensor;
use dinolab_plugins as _;
use dinolab_tests::program::{root, Folder};

/// A copy of the fixture.
fn fixture() -> Folder {
    fn copy(from: &Path, to: &Path) {
        fs::create_dir_all(to).unwrap();
        for entry in fs::read_dir(from).unwrap().map(|e| e.unwrap()) {
            let target = to.join(entry.file_name());
            match entry.path().is_dir() {
                true => copy(&entry.path(), &target),
                false => drop(fs::copy(entry.path(), target).unwrap()),
            }
        }
    }
    let folder = Folder::new();
    copy(&root().join("tests/fixtures/schema_1"), &folder.path(""));
    folder
}

/// CLS features of a fixed image.
fn features(path: &Path) -> Vec<f64> {
    let pixels: Vec<f32> = (0..3 * 32 * 32).map(|i| (i as f32 * 0.37).sin()).collect();
    let pixels = Tensor::from_slice(&pixels, &[1, 3, 32, 32]).unwrap();
    Trained::open(path).unwrap_or_else(|e| panic!("{e}")).features(&pixels).unwrap().cls.to_f64_vec()
}

#[test]
fn models_of_schema_1_give_the_features_that_they_gave() {
    let folder = fixture();
    let expected: Vec<f64> = serde_json::from_str(&folder.read("features.json")).unwrap();
    for path in ["run", "run/checkpoints/step-00000002", "weights"] {
        let found = features(&folder.path(path));
        assert_eq!(found.len(), expected.len(), "{path}: {found:?}");
        let error = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(error < 1e-4, "{path}: {error:e}");
    }
}

#[test]
fn recipes_of_schema_1_check_and_train_from_their_weights() {
    let folder = fixture();
    folder.succeed(&["recipe", "check", "recipe.toml", "run"]);
    folder.succeed(&["train", "recipe.toml", "--out", "again"]);
    let start = |key: &'static str| ["train", "recipe.toml", "--set", "steps=2", "--set", key, "--out"];
    folder.succeed(&[&start("backbone.weights=weights")[..], &["a"]].concat());
    folder.succeed(&[&start("init_from=run")[..], &["b"]].concat());
    folder.succeed(&[&start("teachers.gram.source.checkpoint=run/checkpoints/step-00000002")[..], &["c"]].concat());
}

#[test]
fn a_run_of_schema_1_goes_on() {
    let folder = fixture();
    let ended = folder.succeed(&["train", "run", "--out", "run", "--resume"]);
    assert!(!ended.err.contains("broken"), "{}", ended.err);
    assert!(folder.path("run/checkpoints/step-00000004/state.json").exists());
    assert!(folder.read("run/metrics.jsonl").lines().count() >= 4);
}

#[test]
fn files_of_a_newer_version_are_refused_in_these_words() {
    let folder = fixture();
    folder.write("recipe.toml", &folder.read("recipe.toml").replace("schema = 1\n", "schema = 2\n"));
    let ended = folder.run(&["recipe", "check", "recipe.toml"]);
    assert_eq!(ended.code, 2);
    for said in ["recipe.toml:2", "schema", "version 2", "reads version 1", "a newer one"] {
        assert!(ended.err.contains(said), "{said}: {}", ended.err);
    }
    folder.write("weights/weights.toml", &folder.read("weights/weights.toml").replace("schema = 1\n", "schema = 2\n"));
    let said = Trained::open(&folder.path("weights")).err().expect("it is newer").to_string();
    assert!(said.contains("weights.toml") && said.contains("reads version 1"), "{said}");
    let state = "run/checkpoints/step-00000002/state.json";
    folder.write(state, &folder.read(state).replace("\"format\": 1", "\"format\": 2, \"new\": true"));
    let said = Trained::open(&folder.path("run")).err().expect("it is newer").to_string();
    assert!(said.contains("format 2, this is format 1") && said.contains("a newer one"), "{said}");
}
