//! What may lie at a path that is named for weights: every place takes the same things, and says of others by which command
//! they become usable.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use dinolab_core::files::write_tensors;
use dinolab_core::resolved::Resolved;
use dinolab_core::train::Trained;
use dinolab_core::weights::Source;
use dinolab_core::Tensor;
use dinolab_plugins as _;
use dinolab_tests::program::{json, root, Folder};

/// A run with two checkpoints, and what can be made of it.
fn run() -> Folder {
    let folder = Folder::with_micro();
    folder.succeed(&["train", "micro.toml", "--out", "runs/first", "--set", "steps=2", "--set", "checkpoint.every=1"]);
    folder.succeed(&["export", "runs/first", "--format", "safetensors", "--out", "weights"]);
    let newest = folder.path("runs/first/checkpoints/step-00000002");
    copy(&newest, &folder.path("copied"));
    symlink(&newest, folder.path("latest")).unwrap();
    symlink(folder.path("weights/model.safetensors"), folder.path("link.safetensors")).unwrap();
    symlink("gone", folder.path("dead")).unwrap();
    folder
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(|e| e.unwrap()) {
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

fn refusal(path: &Path) -> String {
    let said = Source::at(path).map(|s| format!("{s:?}")).expect_err("it is refused").to_string();
    assert!(said.contains("help: "), "{said}");
    said
}

#[test]
fn runs_checkpoints_weights_and_their_files_are_found_through_links_and_copies() {
    let folder = run();
    for path in [
        "runs/first",
        "runs/first/recipe.toml",
        "runs/first/checkpoints/step-00000002",
        "runs/first/checkpoints/step-00000002/model.safetensors",
        "runs/first/checkpoints/step-00000002/state.json",
        "copied",
        "copied/model.safetensors",
        "latest",
        "latest/model.safetensors",
        "weights",
        "weights/model.safetensors",
        "weights/weights.toml",
        "link.safetensors",
    ] {
        let source = Source::at(&folder.path(path)).unwrap_or_else(|e| panic!("{path}: {e}"));
        assert_eq!(source.known_model().unwrap().crops.global_size, 32, "{path}");
        Trained::open(&folder.path(path)).unwrap_or_else(|e| panic!("{path}: {e}"));
        assert_eq!(Resolved::of_source(&source).is_ok(), source.has_roles(), "{path}");
    }
    // A checkpoint of a version that wrote no recipe into it, inside its run and out of it.
    let newest = folder.path("runs/first/checkpoints/step-00000002");
    for checkpoint in [&newest, &folder.path("copied")] {
        fs::remove_file(checkpoint.join("recipe.toml")).unwrap();
        let mut state: serde_json::Value =
            serde_json::from_str(&fs::read_to_string(checkpoint.join("state.json")).unwrap()).unwrap();
        state["files"].as_object_mut().unwrap().remove("recipe.toml");
        fs::write(checkpoint.join("state.json"), state.to_string()).unwrap();
    }
    for path in ["runs/first", "latest"] {
        Trained::open(&folder.path(path)).unwrap_or_else(|e| panic!("{path}: {e}"));
    }
    let said = Trained::open(&folder.path("copied")).err().expect("its model is unknown").to_string();
    assert!(said.contains("copy the recipe.toml of the run"), "{said}");
    fs::copy(folder.path("runs/first/recipe.toml"), folder.path("copied/recipe.toml")).unwrap();
    Trained::open(&folder.path("copied")).unwrap();
}

#[test]
fn what_is_no_weights_is_named_with_what_to_do() {
    let folder = run();
    let published = root().join("tests/golden/hf_mlp");
    let cache = folder.path("models--facebook--tiny/snapshots/0123");
    fs::create_dir_all(&cache).unwrap();
    fs::create_dir(folder.path("empty")).unwrap();
    fs::create_dir(folder.path("begun")).unwrap();
    fs::copy(folder.path("runs/first/recipe.toml"), folder.path("begun/recipe.toml")).unwrap();
    folder.write("dinov3.pth", "PK");
    for (path, said) in [
        (published.clone(), "dinolab import"),
        (published.join("model.safetensors"), "dinolab import"),
        (folder.path("models--facebook--tiny"), "Hugging Face's cache"),
        (cache, "there are no weights here"),
        (folder.path("runs"), "runs below"),
        (folder.path("runs/first/checkpoints"), "the checkpoints of a run"),
        (folder.path("runs/first/checkpoints/step-00000002/optimizer.safetensors"), "the moments of a checkpoint"),
        (folder.path("begun"), "no checkpoint yet"),
        (folder.path("empty"), "there are no weights here"),
        (folder.path("dead"), "a link to gone, where nothing is"),
        (folder.path("nowhere"), "does not exist"),
        (folder.path("dinov3.pth"), "dinolab import"),
        (folder.path("micro.toml"), "not a safetensors file but a text"),
    ] {
        let refused = refusal(&path);
        assert!(refused.contains(said), "{}: no `{said}` in {refused}", path.display());
    }
    // A file by itself has no model, but a recipe may have it.
    fs::copy(folder.path("weights/model.safetensors"), folder.path("alone.safetensors")).unwrap();
    let source = Source::at(&folder.path("alone.safetensors")).unwrap();
    assert!(source.model().unwrap().is_none());
    assert!(source.known_model().unwrap_err().to_string().contains("weights.toml"));
}

#[test]
fn every_place_takes_a_copied_checkpoint_and_says_how_to_import_what_is_published() {
    let folder = run();
    folder.add_photos("photos");
    let published = root().join("tests/golden/hf_mlp").display().to_string();
    let places: [&[&str]; 6] = [
        &["features", "photos", "--no-pictures", "--size", "48", "--weights", "PATH", "--out", "OUT"],
        &["export", "PATH", "--format", "safetensors", "--out", "OUT"],
        &["train", "micro.toml", "--set", "steps=1", "--set", "init_from=PATH", "--out", "OUT"],
        &["train", "micro.toml", "--set", "steps=1", "--set", "backbone.weights=PATH", "--out", "OUT"],
        &[
            "train",
            "micro.toml",
            "--set",
            "steps=1",
            "--set",
            "losses.gram.enabled=true",
            "--set",
            "teachers.gram.source.checkpoint=PATH",
            "--out",
            "OUT",
        ],
        &[
            "train",
            "micro.toml",
            "--set",
            "steps=1",
            "--set",
            "teacher={ plugin = 'frozen', checkpoint = 'PATH' }",
            "--out",
            "OUT",
        ],
    ];
    for (i, place) in places.into_iter().enumerate() {
        let with = |path: &str, out: &str| -> Vec<String> {
            place.iter().map(|part| part.replace("PATH", path).replace("OUT", out)).collect()
        };
        let run = |args: Vec<String>| folder.run(&args.iter().map(String::as_str).collect::<Vec<_>>());
        let ended = run(with("copied", &format!("out{i}")));
        assert_eq!(ended.code, 0, "{place:?}: {}{}", ended.out, ended.err);
        let ended = run(with(&published, "refused"));
        assert_eq!(ended.code, 2, "{place:?}: {}{}", ended.out, ended.err);
        assert!(ended.err.contains(&format!("dinolab import {published}")), "{place:?}: {}", ended.err);
    }
}

#[test]
fn weights_that_are_not_finite_are_refused_wherever_they_are_used() {
    let folder = run();
    let tensors = Source::at(&folder.path("weights")).unwrap().tensors().unwrap();
    let mut list: Vec<(String, Tensor)> =
        tensors.names().map(|n| (n.into(), tensors.get(n).unwrap().clone())).collect();
    let norm = list.iter_mut().find(|(name, _)| name == "backbone.norm.weight").unwrap();
    norm.1 = norm.1.scale(f64::NAN).unwrap();
    write_tensors(&folder.path("weights/model.safetensors"), &list, &[]).unwrap();
    for place in [
        &["features", "micro.toml", "--weights", "weights"][..],
        &["export", "weights", "--format", "hf", "--out", "hf"],
        &["export", "weights", "--format", "safetensors", "--out", "again"],
        &["train", "micro.toml", "--set", "backbone.weights=weights", "--out", "second"],
        &["train", "micro.toml", "--set", "init_from=weights", "--out", "second"],
    ] {
        let ended = folder.run(place);
        assert_eq!(ended.code, 2, "{place:?}: {}{}", ended.out, ended.err);
        assert!(ended.err.contains("norm.weight has 32 of 32 numbers that are not finite"), "{place:?}: {}", ended.err);
    }
}

/// Trained to the end in one go and in two, exported, and started from: a checkpoint in several files does all that one in one file
/// does.
#[test]
fn a_checkpoint_in_several_files_is_read_wherever_one_is() {
    let folder = Folder::with_micro();
    let train = |out: &str, sets: &[&str]| {
        let all = ["backbone.dim=128", "steps=4", "checkpoint.every=2"];
        let args = ["train", "micro.toml", "--resume", "--out", out].into_iter();
        let sets = all.iter().chain(sets).flat_map(|set| ["--set", *set]);
        folder.succeed(&args.chain(sets).collect::<Vec<_>>());
    };
    train("one", &[]);
    let split = "checkpoint.file_mb=1";
    train("several", &["steps=2", split]);
    train("several", &[split]);
    let newest = "several/checkpoints/step-00000004";
    let names =
        fs::read_dir(folder.path(newest)).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let second = names.into_iter().find(|name| name.starts_with("model-00002-of-")).expect("there are several");
    let same = |a: &str, b: &str| {
        let [a, b] = [a, b].map(|path| fs::read(folder.path(path)).unwrap());
        assert!(a == b);
    };
    for (i, path) in
        ["one", "several", newest, &format!("{newest}/model.safetensors.index.json")].into_iter().enumerate()
    {
        folder.succeed(&["export", path, "--format", "safetensors", "--out", &format!("export{i}")]);
        same("export0/model.safetensors", &format!("export{i}/model.safetensors"));
        train(&format!("begun{i}"), &[&format!("init_from={path}"), "steps=1"]);
        same(
            "begun0/checkpoints/step-00000001/model.safetensors",
            &format!("begun{i}/checkpoints/step-00000001/model.safetensors"),
        );
    }
    let parents = |run: &str| {
        let parents = json(&folder, &format!("{run}/parents.json"));
        parents[0]["weights"].as_str().expect("a hash").to_string()
    };
    assert_eq!(parents("begun1"), parents("begun2"));
    // What lies beside the files of a checkpoint is none of it; one of them stands for all.
    let stray = folder.path(newest).join("model.safetensors");
    train("other", &["seed=7"]);
    fs::copy(folder.path("other/checkpoints/step-00000004/model.safetensors"), &stray).unwrap();
    let shard = format!("{newest}/{second}");
    for (i, path) in ["several", newest, &shard].into_iter().enumerate() {
        folder.succeed(&["export", path, "--format", "safetensors", "--out", &format!("beside{i}")]);
        same("export0/model.safetensors", &format!("beside{i}/model.safetensors"));
    }
    fs::remove_file(stray).unwrap();
    folder.succeed(&["export", "several", "--format", "hf", "--shard-size", "1", "--out", "hf"]);
    let names = fs::read_dir(folder.path("hf")).unwrap().map(|entry| entry.unwrap().path());
    let part =
        names.into_iter().find(|path| path.display().to_string().contains("model-00001-of-")).expect("it is split");
    let ended = folder.run(&["import", part.to_str().unwrap(), "--out", "imported"]);
    assert!(ended.code == 2 && ended.err.contains("one of several files"), "{}", ended.err);
    fs::remove_file(folder.path(&shard)).unwrap();
    let ended = folder.run(&["export", "several", "--format", "safetensors", "--out", "none"]);
    assert!(
        ended.code == 2
            && ended.err.contains("step-00000002")
            && ended.err.contains("broken")
            && ended.err.contains(&second),
        "{}",
        ended.err
    );
}

#[test]
fn a_broken_newest_checkpoint_is_not_passed_over_without_a_word() {
    let folder = run();
    let newest = folder.path("runs/first/checkpoints/step-00000002/model.safetensors");
    let bytes = fs::read(&newest).unwrap();
    fs::write(&newest, &bytes[..bytes.len() / 2]).unwrap();
    let said = Trained::open(&folder.path("runs/first")).err().expect("it is broken").to_string();
    assert!(said.contains("the newest checkpoint of this run is broken") && said.contains("step-00000001"), "{said}");
    Trained::open(&folder.path("runs/first/checkpoints/step-00000001")).unwrap();
}

#[test]
fn keys_of_a_weights_folder_that_somebody_wrote_count_or_are_refused() {
    let folder = run();
    let text = folder.read("weights/weights.toml");
    for (from, to, said) in [
        ("mean = ", "maen = ", "maen"),
        ("[crops]", "[crosp]", "crosp"),
        ("dim = 32", "dmi = 32", "dmi"),
        ("schema = 1", "schema = 2", "reads version 1"),
        ("std = [", "std = [0.5, ", "crops.std: has 4 numbers, and crops.mean 3"),
        ("mean = [0.485, 0.456, 0.406]", "mean = [123.7, 116.3, 103.5]", "divide"),
        ("mean = [0.485, 0.456, 0.406]", "mean = [0.485, 0.456]", "crops.mean"),
    ] {
        assert!(text.contains(from), "{text}");
        folder.write("weights/weights.toml", &text.replace(from, to));
        let refused = Trained::open(&folder.path("weights")).err().expect(said).to_string();
        assert!(refused.contains("weights.toml") && refused.contains(said), "{said}: {refused}");
    }
    folder.write("weights/weights.toml", &text.replace("mean = [0.485, 0.456, 0.406]", "mean = [0.43, 0.411, 0.296]"));
    assert_eq!(Trained::open(&folder.path("weights")).unwrap().normalization.0, [0.43, 0.411, 0.296]);
}

#[test]
fn what_a_run_cannot_load_is_refused_by_check() {
    let folder = run();
    fs::copy(folder.path("weights/model.safetensors"), folder.path("alone.safetensors")).unwrap();
    let check = |changes: &[&str]| {
        let sets = changes.iter().flat_map(|change| ["--set", *change]);
        folder.run(&[&["recipe", "check", "micro.toml"], &sets.collect::<Vec<_>>()[..]].concat())
    };
    let prototypes = "losses.ibot.head.prototypes=16";
    for key in ["init_from", "continue_from"] {
        let refused = check(&[&format!("{key}=runs/first"), prototypes]);
        assert_eq!(refused.code, 2);
        let said = "ibot_head.last_layer.weight: [32, 16] in the file, [16, 16] in the model";
        assert!(refused.err.contains(&format!("{key}: ")) && refused.err.contains(said), "{}", refused.err);
    }
    // Nothing says what model a file by itself is of, but its shapes do.
    let refused = check(&["backbone.dim=16", "init_from=alone.safetensors"]);
    assert!(refused.code == 2 && refused.err.contains("[32] in the file, [16] in the model"), "{}", refused.err);
    let cut = fs::read(folder.path("alone.safetensors")).unwrap();
    fs::write(folder.path("cut.safetensors"), &cut[..cut.len() / 2]).unwrap();
    assert_eq!(check(&["init_from=cut.safetensors"]).code, 2);
    // Heads that only the weights have are passed over.
    for changes in [
        &["init_from=weights"][..],
        &["init_from=alone.safetensors"],
        &["init_from=runs/first", "losses.ibot.enabled=false"],
    ] {
        let accepted = check(changes);
        assert_eq!(accepted.code, 0, "{changes:?}: {}", accepted.err);
    }
}
