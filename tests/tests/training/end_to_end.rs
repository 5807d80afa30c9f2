//! Whole runs of the real program: stopping, resuming, failing, and what they leave behind.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use dinolab_tests::program::{assert_same_weights, final_weights, root, wait_until, Folder};

/// The `step` of every logged line.
fn logged_steps(folder: &Folder, run: &str) -> Vec<u64> {
    let lines = folder.read(&format!("{run}/metrics.jsonl"));
    let step =
        |line: &str| serde_json::from_str::<serde_json::Value>(line).expect("a line is an object")["step"].as_u64();
    lines.lines().map(|line| step(line).expect("a number")).collect()
}

const LONG: [&str; 4] = ["--set", "steps=80", "--set", "losses.gram.enabled=true"];

#[test]
fn a_killed_run_resumes_to_the_same_bytes() {
    let folder = Folder::with_micro();
    folder.succeed(&[&["train", "micro.toml", "--out", "whole"][..], &LONG].concat());
    let killed = [&["train", "micro.toml", "--out", "killed"][..], &LONG].concat();
    let mut child = folder.start(&killed);
    let checkpoint = folder.path("killed/checkpoints/step-00000012");
    wait_until(&mut child, || checkpoint.exists());
    child.kill().expect("it runs");
    child.wait().expect("it was started");
    assert!(!folder.path("killed/result.json").exists(), "it was killed too late to show anything");

    let again = folder.run(&killed);
    assert_eq!(again.code, 2, "a run is not overwritten");
    assert!(again.err.contains("--resume"), "{}", again.err);
    folder.succeed(&[&killed[..], &["--resume"]].concat());
    assert_same_weights(&folder, "whole", "killed", 80);
    assert_eq!(logged_steps(&folder, "killed"), (1..=80).collect::<Vec<_>>(), "every step is logged once");
}

#[test]
fn the_same_seed_gives_the_same_bytes_on_any_number_of_threads() {
    let folder = Folder::with_micro();
    for threads in ["1", "3"] {
        let ended = folder.run_with(&[("RAYON_NUM_THREADS", threads)], &["train", "micro.toml", "--out", threads]);
        assert_eq!(ended.code, 0, "{}", ended.err);
    }
    assert_same_weights(&folder, "1", "3", 12);
    for threads in ["three", "-1", "70000"] {
        let ended = folder.run_with(&[("RAYON_NUM_THREADS", threads)], &["train", "micro.toml", "--out", "none"]);
        assert!(ended.code == 2 && ended.err.contains("is no number of threads"), "{}", ended.err);
    }
    folder.succeed(&["train", "micro.toml", "--out", "other", "--set", "seed=1"]);
    assert_ne!(final_weights(&folder, "1", 12)[0].1, final_weights(&folder, "other", 12)[0].1);
}

/// A loss of the tests' own that is infinite after six steps, in step 7.
const SPIKE: [&str; 2] = ["--set", "losses.toy_spike.at_step=6"];

#[test]
fn a_loss_that_is_not_finite_is_captured_before_the_update_and_replayed() {
    let folder = Folder::with_micro();
    let ended = folder.run(&[&["train", "micro.toml", "--out", "run"][..], &SPIKE].concat());
    assert_eq!(ended.code, 1, "{}", ended.err);
    assert!(ended.err.contains("step 7: ") && ended.err.contains("toy_spike"), "{}", ended.err);
    let capture = "run/captures/step-00000007.safetensors";
    assert!(ended.err.contains(capture) && ended.err.contains("dinolab replay"), "{}", ended.err);

    let replayed = folder.run(&["replay", capture]);
    assert_eq!(replayed.code, 1, "the failure reproduces: {}{}", replayed.out, replayed.err);
    assert!(
        replayed.out.contains("step 7 of `micro`")
            && replayed.out.contains("not finite")
            && replayed.out.contains("toy_spike"),
        "{}",
        replayed.out
    );
}

#[test]
fn rare_steps_that_are_not_finite_are_skipped_if_the_recipe_allows_it() {
    let folder = Folder::with_micro();
    let args = [&["train", "micro.toml", "--out", "run", "--set", "on_non_finite={ skip = 1 }"][..], &SPIKE].concat();
    folder.succeed(&args);
    let result: serde_json::Value = serde_json::from_str(&folder.read("run/result.json")).expect("JSON");
    assert_eq!(result["skipped"], 1);
    assert!(folder.read("run/messages.jsonl").contains("was skipped"));

    // A program without the loss says who has it, of the run and of a checkpoint of it.
    let checkpoint = "run/checkpoints/step-00000012";
    for (file, from, to) in [
        ("run/run.json", " with with_plugins in ", " with their_plugins in "),
        ("run/recipe.toml", "toy_spike", "their_spike"),
        ("run/checkpoints/step-00000012/recipe.toml", "toy_spike", "their_spike"),
    ] {
        let text = folder.read(file);
        assert!(text.contains(from), "{file}: {text}");
        folder.write(file, &text.replace(from, to));
    }
    for of in ["run", checkpoint] {
        let said = folder.run(&["recipe", "show", of]).err;
        assert!(said.contains("the plugins of their_plugins made: give the command to that program"), "{said}");
    }
}

#[test]
fn a_recipe_alone_in_a_folder_is_the_users_and_no_run() {
    let folder = Folder::with_micro();
    for name in ["own", "begun"] {
        fs::create_dir(folder.path(name)).expect("the folder can be written");
    }
    folder.write("own/recipe.toml", "extends = \"../micro.toml\"\nsteps = 2\n");
    for resume in [&[][..], &["--resume"]] {
        let ended = folder.run(&[&["train", "own/recipe.toml", "--out", "own"][..], resume].concat());
        assert!(ended.code == 2 && ended.err.contains("no run in this folder"), "{}: {}", ended.code, ended.err);
    }
    assert!(folder.read("own/recipe.toml").starts_with("extends"));
    // What a run left that was ended as soon as it had begun is its own.
    folder.succeed(&["train", "own/recipe.toml", "--out", "run"]);
    let recipe = folder.read("run/recipe.toml");
    folder.write("begun/recipe.toml", &recipe);
    folder.succeed(&["train", "own/recipe.toml", "--out", "begun", "--resume"]);
    // So is one that lost its `run.json` before its first checkpoint.
    for file in ["run.json", "result.json"] {
        fs::remove_file(folder.path("begun").join(file)).expect("it was written");
    }
    fs::remove_dir_all(folder.path("begun/checkpoints")).expect("it was written");
    folder.succeed(&["train", "own/recipe.toml", "--out", "begun", "--resume"]);
    assert_same_weights(&folder, "run", "begun", 2);
    // A run that is refused leaves no folder.
    let ended = folder.run(&["train", "own/recipe.toml", "--out", "refused", "--set", "init_from=nowhere"]);
    assert!(ended.code == 2 && !folder.path("refused").exists(), "{}", ended.err);
    // The tests' program has plugins of its own, whose code no revision of dinolab tells.
    let run: serde_json::Value = serde_json::from_str(&folder.read("run/run.json")).expect("JSON");
    assert!(run["revision"].as_str().is_some_and(|revision| revision.contains(" with ")), "{}", run["revision"]);
}

/// The most memory the process has held so far, in KiB.
fn peak_rss(child: &Child) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", child.id())).ok()?;
    status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?.trim().strip_suffix(" kB")?.parse().ok()
}

#[test]
fn memory_is_flat_from_step_50_to_step_1000() {
    let folder = Folder::with_micro();
    let args = ["train", "micro.toml", "--set", "steps=1000", "--set", "checkpoint.every=0", "--out", "run"];
    let gram = ["--set", "losses.gram.enabled=true", "--set", "teachers.gram.first_step=2"];
    let mut child = folder.start(&[&args[..], &gram].concat());
    let metrics = folder.path("run/metrics.jsonl");
    let logged = || fs::read_to_string(&metrics).map_or(0, |text| text.lines().count());
    wait_until(&mut child, || logged() >= 50);
    let early = peak_rss(&child).expect("it runs");
    let mut late = early;
    while child.try_wait().expect("it was started").is_none() {
        // The end of a run loads code that steps do not use.
        late = if logged() < 1000 { peak_rss(&child).unwrap_or(late) } else { late };
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(logged(), 1000);
    // A percent, or what allocators keep for themselves of a process as small as this one.
    let more = (early / 100).max(1024);
    assert!(late <= early + more, "{early} KiB at step 50, {late} KiB at step 1000");
}

#[test]
fn a_second_stage_starts_from_the_first() {
    let folder = Folder::with_micro();
    folder.succeed(&["train", "micro.toml", "--out", "first"]);
    let gram = ["--set", "losses.gram.enabled=true", "--set", "teachers.gram.source={ checkpoint = 'first' }"];
    folder.succeed(&[&["train", "micro.toml", "--out", "second", "--set", "init_from='first'"][..], &gram].concat());
    let line = folder.read("second/metrics.jsonl").lines().next().expect("a step was logged").to_string();
    assert!(line.contains("\"step\":1"), "schedules start anew: {line}");
}

#[test]
fn the_folder_of_a_run_is_a_recipe_that_repeats_it() {
    let folder = Folder::with_micro();
    folder.succeed(&["train", "micro.toml", "--out", "first", "--set", "optimizer.lr=3e-3"]);
    folder.succeed(&["train", "first", "--out", "again"]);
    assert_same_weights(&folder, "first", "again", 12);
}

#[test]
fn two_runs_are_compared_by_recipe_code_data_and_metrics() {
    let folder = Folder::with_micro();
    folder.succeed(&["train", "micro.toml", "--out", "a"]);
    folder.succeed(&["train", "micro.toml", "--out", "b", "--set", "optimizer.lr=2e-3"]);
    let text = folder.succeed(&["recipe", "diff", "a", "b"]).out;
    for part in ["optimizer.lr", "0.001 -> 0.002", "in both", "as the recipe says", "loss/total", "B - A"] {
        assert!(text.contains(part), "no `{part}` in\n{text}");
    }
}

const PHOTOS: [&str; 6] =
    ["--set", "data.plugin=image_folder", "--set", "data.path=photos", "--set", "probes.cls_patch_cosine.enabled=true"];

#[test]
fn photographs_train_and_are_probed() {
    let folder = Folder::with_micro();
    folder.add_photos("photos");
    folder.succeed(&[&["train", "micro.toml", "--out", "run"][..], &PHOTOS].concat());
    let result: serde_json::Value = serde_json::from_str(&folder.read("run/result.json")).expect("JSON");
    assert!(result["metrics"]["probe/cls_patch_cosine/mean"].is_f64(), "{result}");
    let messages = folder.read("run/messages.jsonl");
    assert!(!messages.contains("cannot be used"), "every photograph can be read: {messages}");
}

#[test]
fn a_run_does_not_go_on_with_other_images() {
    let folder = Folder::with_micro();
    folder.add_photos("photos");
    let args = [&["train", "micro.toml", "--out", "run"][..], &PHOTOS].concat();
    folder.succeed(&args);
    fs::remove_file(folder.path("run/result.json")).expect("the run finished");
    fs::remove_dir_all(folder.path("run/checkpoints/step-00000012")).expect("the run finished");
    fs::rename(folder.path("photos/cat.jpg"), folder.path("cat.jpg")).expect("it was copied");
    let ended = folder.run(&[&args[..], &["--resume"]].concat());
    assert_eq!(ended.code, 2, "{}", ended.err);
    assert!(ended.err.contains("came, went or changed") && ended.err.contains("init_from"), "{}", ended.err);
    // As they were, in another place, it goes on.
    fs::rename(folder.path("cat.jpg"), folder.path("photos/cat.jpg")).expect("it is there");
    fs::rename(folder.path("photos"), folder.path("moved")).expect("it is there");
    folder.succeed(&[&args[..], &["--resume", "--set", "data.path=moved"]].concat());
}

#[test]
fn a_run_goes_on_under_other_keys_that_change_no_number_and_is_told_of_those_that_do() {
    let folder = Folder::with_micro();
    let args = ["train", "micro.toml", "--out", "run", "--set", "checkpoint.keep=9"];
    folder.succeed(&args);
    fs::copy(folder.path("run/recipe.toml"), folder.path("first.toml")).expect("the run finished");
    let again = |sets: &[&str]| {
        fs::remove_file(folder.path("run/result.json")).expect("the run finished");
        fs::remove_dir_all(folder.path("run/checkpoints/step-00000012")).expect("the run finished");
        let sets = sets.iter().flat_map(|set| ["--set", set]).collect::<Vec<_>>();
        folder.run(&[&args[..], &["--resume"], &sets[..]].concat())
    };
    let harmless = [
        "device=cpu",
        "batch.loader_threads=1",
        "batch.prefetch=3",
        "log.every=2",
        "checkpoint.every=3",
        "probes.cls_patch_cosine.enabled=true",
        "on_non_finite={ skip = 1 }",
        "name=other",
    ];
    let ended = again(&harmless);
    assert_eq!(ended.code, 0, "{}", ended.err);
    assert!(ended.err.contains("log.every: was 1, is 2"), "what changed is said: {}", ended.err);
    folder.succeed(&["train", "first.toml", "--out", "whole"]);
    assert_same_weights(&folder, "whole", "run", 12);
    fs::copy(folder.path("first.toml"), folder.path("run/recipe.toml")).expect("it is a file");

    let ended = again(&["optimizer.eps=1e-7", "seed=4", "log.every=3"]);
    assert_eq!(ended.code, 2, "{}", ended.err);
    for part in ["seed: was 0, is 4", "optimizer.eps: was 1e-8, is 1e-7", "init_from"] {
        assert!(ended.err.contains(part), "no `{part}` in {}", ended.err);
    }
    assert!(!ended.err.contains("log.every"), "it changes no number: {}", ended.err);
}

#[test]
fn a_run_without_its_result_measures_nothing_twice_and_loses_nothing() {
    let folder = Folder::with_micro();
    let probes = ["--set", "probes.cls_patch_cosine={ enabled = true, every = 4 }"];
    let args = [&["train", "micro.toml", "--out", "run"][..], &probes].concat();
    folder.succeed(&args);
    let whole = fs::read(folder.path("run/result.json")).expect("the run finished");
    let lines = folder.read("run/metrics.jsonl");
    // Killed after the last checkpoint and before the result: everything is read back.
    fs::remove_file(folder.path("run/result.json")).expect("the run finished");
    folder.succeed(&[&args[..], &["--resume"]].concat());
    assert_eq!(fs::read(folder.path("run/result.json")).expect("it finished"), whole);
    assert_eq!(folder.read("run/metrics.jsonl"), lines);
    // A probe that was not taken is taken; a step whose losses are not known is done again.
    let number = |text: &[u8]| serde_json::from_slice::<serde_json::Value>(text).expect("JSON")["metrics"].clone();
    let early: String = lines.lines().take(11).map(|line| format!("{line}\n")).collect();
    let mut last: serde_json::Map<_, _> =
        serde_json::from_str(lines.lines().last().expect("it was logged")).expect("JSON");
    last.retain(|name, _| !name.starts_with("probe/"));
    let without_probes = early.clone() + &serde_json::to_string(&last).expect("plain data") + "\n";
    for (lost, lines) in [("its probes", without_probes), ("its last step", early)] {
        folder.write("run/metrics.jsonl", &lines);
        fs::remove_file(folder.path("run/result.json")).expect("the run finished");
        folder.succeed(&[&args[..], &["--resume"]].concat());
        let again = fs::read(folder.path("run/result.json")).expect("it finished");
        assert_eq!(number(&again), number(&whole), "without {lost}");
    }
}

#[test]
fn a_run_goes_on_and_is_repeated_from_any_folder() {
    let folder = Folder::with_micro();
    folder.add_photos("photos");
    folder.succeed(&[&["train", "micro.toml", "--out", "run"][..], &PHOTOS].concat());
    let elsewhere = Folder::new();
    // Another folder of the same name is not taken for it.
    elsewhere.add_photos("photos");
    fs::remove_file(elsewhere.path("photos/cat.jpg")).expect("it was copied");
    let run = folder.path("run");
    elsewhere.succeed(&["train", run.to_str().expect("UTF-8"), "--out", "again"]);
    fs::rename(elsewhere.path("again"), folder.path("again")).expect("one file system");
    assert_same_weights(&folder, "run", "again", 12);
}

#[test]
fn a_run_that_fails_leaves_a_report_and_names_it() {
    let folder = Folder::with_micro();
    let ended = folder.run(&[&["train", "micro.toml", "--out", "run"][..], &SPIKE].concat());
    assert_eq!(ended.code, 1, "{}", ended.err);
    assert!(ended.err.contains("run/crash/step-00000007.json"), "{}", ended.err);
    let report: serde_json::Value = serde_json::from_str(&folder.read("run/crash/step-00000007.json")).expect("JSON");
    assert_eq!((&report["step"], &report["last_metrics"]["step"]), (&7.into(), &6.into()));
    assert_eq!(report["samples"].as_array().expect("a list").len(), 4);
    assert!(report["message"].as_str().expect("text").contains("toy_spike"), "{report}");
    assert!(report["run"]["device"].is_string() && report["recipe"].as_str().expect("text").contains("[optimizer]"));
}

#[test]
fn a_folder_of_pictures_trains_and_broken_ones_are_named() {
    let folder = Folder::with_micro();
    for class in ["red", "blue"] {
        fs::create_dir_all(folder.path("pictures").join(class)).expect("the folder can be written");
        for i in 0..6u8 {
            let pixel = |x, y| image::Rgb([x as u8 * 3, y as u8 * 4, i * 20 + class.len() as u8]);
            let picture = image::RgbImage::from_fn(60 + u32::from(i), 50, pixel);
            picture.save(folder.path(&format!("pictures/{class}/{i}.png"))).expect("it can be written");
        }
    }
    folder.write("pictures/red/broken.jpg", "not a picture");
    let data =
        ["--set", "data.plugin=image_folder", "--set", "data.path=pictures", "--set", "batch.max_broken_share=0.2"];
    folder.succeed(&[&["train", "micro.toml", "--out", "run"][..], &data].concat());
    assert!(folder.read("run/messages.jsonl").contains("broken.jpg"));
}

#[test]
fn pictures_without_content_are_named() {
    let folder = Folder::with_micro();
    folder.add_photos("pictures");
    for name in ["night.png", "lens_cap.png"] {
        image::RgbImage::new(60, 60).save(folder.path("pictures").join(name)).expect("it can be written");
    }
    let data = ["--set", "data.plugin=image_folder", "--set", "data.path=pictures", "--set", "data.held_out=0"];
    folder.succeed(&[&["train", "micro.toml", "--out", "run", "--set", "batch.size=10"][..], &data].concat());
    let messages = folder.read("run/messages.jsonl");
    let line = messages.lines().find(|line| line.contains("duplicates")).unwrap_or_else(|| panic!("{messages}"));
    assert!(line.contains("night.png") && line.contains("lens_cap.png"), "{line}");
}

const SUITE: &str = r#"
name = "lr"
base = "micro.toml"
seeds = [0, 1]
metrics = ["loss/total"]
baseline = "optimizer.lr=0.001"
[grid]
"optimizer.lr" = [1e-3, 2e-3]
"#;

#[test]
fn a_killed_suite_goes_on_to_the_same_report() {
    let folder = Folder::with_micro();
    folder.write("suite.toml", SUITE);
    let ended = folder.run_with(&[("DINOLAB_CHECKPOINT__EVERY", "3")], &["ablate", "suite.toml", "--out", "whole"]);
    assert_eq!(ended.code, 0, "{}", ended.err);
    let args = ["ablate", "suite.toml", "--out", "killed"];
    let mut child = folder.start(&args);
    wait_until(&mut child, || folder.path("killed/arms/optimizer.lr=0.002/seed-0/checkpoints").exists());
    child.kill().expect("it runs");
    child.wait().expect("it was started");
    let first = folder.path("killed/arms/optimizer.lr=0.001/seed-0/result.json");
    let before = fs::metadata(&first).and_then(|m| m.modified()).expect("the first run was finished");
    folder.succeed(&args);
    assert_eq!(before, fs::metadata(&first).and_then(|m| m.modified()).expect("it is there"), "it was not run again");
    let comparisons = |out: &str| -> serde_json::Value {
        let summary: serde_json::Value =
            serde_json::from_str(&folder.read(&format!("{out}/summary.json"))).expect("JSON");
        summary["comparisons"].clone()
    };
    assert_eq!(comparisons("whole"), comparisons("killed"));

    // Suites and runs keep out of each other's folders.
    let inside = folder.run(&["train", "micro.toml", "--out", "whole"]);
    assert!(inside.code == 2 && inside.err.contains("the folder of a suite"), "{}", inside.err);
    let inside = folder.run(&["ablate", "suite.toml", "--out", "whole/arms/optimizer.lr=0.001/seed-0"]);
    assert!(inside.code == 2 && inside.err.contains("was not begun in this folder"), "{}", inside.err);

    // The command that gives it again has what the environment said, and the name of the program with these plugins.
    let summary: serde_json::Value = serde_json::from_str(&folder.read("whole/summary.json")).expect("JSON");
    let command = "DINOLAB_CHECKPOINT__EVERY=3 with_plugins ablate suite.toml --out whole";
    assert_eq!(summary["provenance"]["command"], command);
    let said = "variables of the environment change the recipe of all arms, in checkpoint.every";
    assert!(summary["warnings"].to_string().contains(said), "{}", summary["warnings"]);
}

#[test]
fn a_run_of_a_suite_that_fails_before_its_first_step_is_tried_again_and_recorded() {
    let folder = Folder::with_micro();
    let retries = SUITE.replace("seeds = [0, 1]", "seeds = [0]\nretries = 1\nset = { init_from = \"nowhere\" }");
    folder.write("suite.toml", &retries);
    let ended = folder.run(&["ablate", "suite.toml", "--out", "out", "--smoke-steps", "0"]);
    assert!(ended.code == 1 && ended.err.contains("is tried again"), "{}: {}{}", ended.code, ended.out, ended.err);
    for arm in ["optimizer.lr=0.001", "optimizer.lr=0.002"] {
        let attempts = folder.read(&format!("out/arms/{arm}/seed-0/attempts.json"));
        assert!(attempts.contains("nowhere"), "{attempts}");
        assert!(folder.path(&format!("out/arms/{arm}/seed-0/failure.json")).exists());
    }
}

fn files(folder: &str, ending: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(root().join(folder)).expect("the repository is whole");
    let mut files: Vec<_> = entries.map(|e| e.expect("it can be read").path()).collect();
    files.retain(|p| p.to_string_lossy().ends_with(ending) && p.file_name() != Some("Cargo.toml".as_ref()));
    files.sort();
    assert!(!files.is_empty());
    files
}

#[test]
fn every_shipped_recipe_passes_check() {
    let folder = Folder::new();
    // The weights that a recipe starts from.
    fs::create_dir(folder.path("weights")).expect("the folder can be written");
    let published = root().join("tests/golden/hf_mlp");
    folder.succeed(&["import", published.to_str().expect("a UTF-8 path"), "--out", "weights/vit_s16"]);
    for recipe in files("recipes", ".toml").into_iter().chain(files("recipes/bench", ".toml")) {
        let path = recipe.to_str().expect("a UTF-8 path");
        let ended = folder.succeed(&["recipe", "check", "--cost", path]);
        // Only what the user has is missing: images, runs that others start from, a larger machine.
        let known = ["there is no such folder", "is not there (yet)", "and this machine has"];
        let mut warnings = ended.err.lines().filter(|line| line.contains("warning"));
        assert!(warnings.all(|line| known.iter().any(|k| line.contains(k))), "{path}: {}", ended.err);
    }
}

/// What makes a run of the tiny recipe take a second.
const SHRINK: [&str; 14] = [
    "backbone.dim=32",
    "backbone.depth=2",
    "backbone.heads=2",
    "batch.size=4",
    "crops.local_count=2",
    "teachers.gram.first_step=2",
    "teachers.gram.refresh.every=2",
    "optimizer.freeze_last_layer_steps=0",
    "log.every=1",
    "data.held_out=32",
    "probes.knn.train_samples=32",
    "probes.knn.test_samples=16",
    "probes.linear_segmentation.train_samples=8",
    "probes.linear_segmentation.test_samples=8",
];

/// A shipped suite for so few steps, in `folder`: one with a trunk has a checkpoint at step 2, and forks at step 4.
fn short_suite(folder: &Folder, suite: &Path) -> PathBuf {
    let text = fs::read_to_string(suite).expect("it is there");
    let short = if text.contains("[trunk]") {
        let steps = [("2400", "4"), ("600", "2"), ("3000", "6"), ("every\" = 200", "every\" = 2")];
        steps.iter().fold(text, |text, (long, short)| text.replace(long, short))
    } else {
        text
    };
    let recipes = root().join("recipes");
    folder.write("suite.toml", &short.replace("../recipes", recipes.to_str().expect("a UTF-8 path")));
    folder.path("suite.toml")
}

/// Runs a shipped suite with its first two seeds for 6 steps and gives its summary.
fn run_suite(folder: &Folder, suite: &Path) -> serde_json::Value {
    let text = fs::read_to_string(suite).expect("it is there");
    let seeds = text.lines().find_map(|line| line.strip_prefix("seeds = [")).expect("a suite has seeds");
    let seeds: Vec<&str> = seeds.trim_end_matches(']').split(", ").take(2).collect();
    let seeds = seeds.join(",");
    let suite = suite.to_str().expect("a UTF-8 path");
    let mut args = vec!["ablate", suite, "--out", "out", "--seeds", &seeds, "--steps", "6"];
    args.extend(SHRINK.iter().flat_map(|set| ["--set", set]));
    folder.succeed(&args);
    assert!(folder.read("out/report.html").contains("</html>"));
    assert!(folder.read("out/summary.md").contains("## Arms"));
    serde_json::from_str(&folder.read("out/summary.json")).expect("JSON")
}

#[test]
fn every_shipped_suite_runs_to_its_report() {
    for suite in files("ablations", ".toml") {
        let folder = Folder::new();
        if suite.ends_with("distill_vs_scratch.toml") {
            // The run that its students learn from.
            let teacher = root().join("recipes/tiny.toml");
            let mut args = vec!["train", teacher.to_str().expect("a UTF-8 path"), "--set", "steps=6"];
            args.extend(SHRINK.iter().flat_map(|set| ["--set", set]));
            folder.succeed(&args);
        }
        let suite = short_suite(&folder, &suite);
        let summary = run_suite(&folder, &suite);
        let arms = summary["arms"].as_array().expect("a list");
        let metrics = summary["metrics"].as_array().expect("a list");
        assert!(arms.len() >= 2 && metrics.len() >= 2, "{suite:?}");
        for arm in arms {
            let runs = arm["runs"].as_array().expect("a list");
            assert_eq!(runs.iter().filter(|run| run["status"] == "finished").count(), 2, "{suite:?}: {arm}");
        }
        let comparisons = summary["comparisons"].as_array().expect("a list");
        assert_eq!(comparisons.len(), (arms.len() - 1) * metrics.len(), "{suite:?}");
        assert!(comparisons.iter().all(|c| c["n"] == 2 && c["difference"].is_f64()), "{suite:?}: {comparisons:?}");
        // A second call finds everything done.
        let before = fs::metadata(folder.path("out/arms")).and_then(|m| m.modified()).expect("it was written");
        assert_eq!(run_suite(&folder, &suite)["comparisons"], summary["comparisons"]);
        assert_eq!(before, fs::metadata(folder.path("out/arms")).and_then(|m| m.modified()).expect("it is there"));
    }
}
