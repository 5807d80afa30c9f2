//! What is wrong in what the user gives is said before work is lost: where it is, what was expected, what to do.

use dinolab_tests::program;
use std::fs;

use dinolab_tests::program::Folder;

/// Runs `train micro.toml` with changes; it has to end with `code`, and to say all of `parts`.
fn refused(folder: &Folder, code: i32, sets: &[&str], parts: &[&str]) {
    let mut args = vec!["train", "micro.toml", "--out", "refused"];
    args.extend(sets.iter().flat_map(|set| ["--set", set]));
    let ended = folder.run(&args);
    assert_eq!(ended.code, code, "{sets:?}: {}{}", ended.out, ended.err);
    for part in parts {
        assert!(ended.err.contains(part), "{sets:?}: no `{part}` in\n{}", ended.err);
    }
    for noise in ["panicked", "backtrace", "RUST_"] {
        assert!(!ended.err.contains(noise), "{}", ended.err);
    }
}

/// As [`refused`], with the exit code of bad input; no step was logged.
fn bad(sets: &[&str], parts: &[&str]) {
    let folder = Folder::with_micro();
    refused(&folder, 2, sets, parts);
    assert!(!folder.path("refused/metrics.jsonl").exists(), "{sets:?}: it began to train");
}

#[test]
fn a_recipe_that_is_not_there_is_named() {
    let ended = Folder::new().run(&["train", "nothing.toml"]);
    assert_eq!(ended.code, 2);
    assert!(ended.err.contains("nothing.toml") && ended.err.contains("No such file"), "{}", ended.err);
}

#[test]
fn folders_of_images_are_looked_at_before_training() {
    let image_folder = |path: &'static str| ["data.plugin=image_folder", path];
    bad(&image_folder("data.path=nowhere"), &["nowhere", "no such folder", "help"]);
    let folder = Folder::with_micro();
    fs::create_dir(folder.path("empty")).unwrap();
    refused(&folder, 2, &image_folder("data.path=empty"), &["empty", "no image", "help"]);
}

#[test]
fn a_run_stops_when_too_many_images_are_broken() {
    let folder = Folder::with_micro();
    fs::create_dir(folder.path("pictures")).unwrap();
    for i in 0..20 {
        folder.write(&format!("pictures/{i}.png"), "not a picture");
    }
    let sets = ["data.plugin=image_folder", "data.path=pictures"];
    refused(&folder, 2, &sets, &["pictures/", ".png: this is text, neither JPEG", "[data]"]);
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    bad(&["crops.global_size=30"], &["crops.global_size", "30", "8"]);
    bad(&["crops.local_size=4"], &["crops.local_size", "4", "8"]);
    bad(&["backbone.heads=3"], &["heads", "3", "32"]);
    bad(&["batch.size=0"], &["batch.size"]);
    bad(&["batch.size=5", "batch.micro_batches=2"], &["batch.micro_batches", "5"]);
    bad(&["data.size=4"], &["data.size", "8 to 16384", "4"]);
    bad(&["data.size=8", "backbone.patch_size=16"], &["images of 8x8 pixels are smaller than a patch of 16"]);
    bad(&["losses.koleo.topk=9"], &["koleo", "10"]);
}

#[test]
fn losses_are_refused_what_they_need_and_do_not_get() {
    bad(
        &["losses.vicreg={}", "batch.micro_batches=2"],
        &["losses.vicreg: its statistics run over the whole batch", "splits into 2", "set batch.micro_batches = 1"],
    );
    bad(
        &["losses.online_linear={ classes = 7 }"],
        &["losses.online_linear: tells 7 classes apart", "set losses.online_linear.classes = "],
    );
    bad(
        &["losses.inpainting={}", "masking.probability=0"],
        &["masking.probability: no patch is masked", "`inpainting`"],
    );
}

#[test]
fn numbers_that_no_step_can_compute_with_are_refused() {
    bad(&["losses.dino.student_temp=0"], &["losses.dino.student_temp", "0.001 to 100"]);
    bad(&["losses.ibot.teacher_temp=-0.07"], &["losses.ibot.teacher_temp", "0.001 to 100", "-0.07"]);
    bad(
        &["losses.dino.teacher_temp={ plugin = 'linear_warmup', peak = 0.07, warmup_steps = 3 }"],
        &["is 0.0 at step 0"],
    );
    bad(&["teacher.momentum={ plugin = 'cosine', peak = 0.9, end = 1.5 }"], &["teacher.momentum: is", "0 to 1"]);
    bad(&["losses.dino.center_momentum=1.5"], &["losses.dino.center_momentum", "0 to 1"]);
    bad(&["losses.dino.sinkhorn_iterations=0"], &["losses.dino.sinkhorn_iterations", "1 to 1000"]);
    bad(&["losses.dino.head.prototype_std=1e30"], &["losses.dino.head.prototype_std", "above 0, at most 2"]);
    bad(&["losses.dino.head.layers=9223372036854775807"], &["losses.dino.head.layers", "1 to 100"]);
    bad(&["losses.koleo.topk=0"], &["losses.koleo.topk", "1 to"]);
    bad(&["losses.koleo.group_size=1"], &["losses.koleo", "groups of at least 2 rows, and a group has 1"]);
    bad(&["losses.koleo.group_size=3"], &["losses.koleo", "4 rows cannot be split into groups of 3"]);
    bad(&["backbone.ffn_ratio=1e30"], &["backbone.ffn_ratio", "above 0, at most 1000"]);
    bad(&["backbone.norm_eps=1e-50"], &["backbone.norm_eps", "1e-12 to 1"]);
    bad(&["backbone.layer_scale=-1"], &["backbone.layer_scale", "0 to 1000"]);
    bad(&["backbone.depth=1000000000"], &["backbone.depth", "1 to 1000"]);
    bad(&["backbone.dim=1000000000"], &["backbone.dim", "1 to 1000000"]);
    bad(&["crops.blur=[0, 2, 0]"], &["crops.blur: number 2", "0 to 1"]);
    bad(&["crops.std=[58.395, 57.12, 57.375]"], &["crops.std: number 1", "divide"]);
    bad(&["data.texture_cue=7"], &["data.texture_cue", "0 to 1"]);
    bad(&["data.objects=[1, 3, 7]"], &["data.objects: expected a list of 2 values, found 3"]);
    bad(&["optimizer.weight_decay=2000"], &["optimizer.weight_decay", "0 to 1000"]);
}

#[test]
fn what_no_memory_holds_names_the_key() {
    bad(&["batch.size=100000000"], &["batch.size: with 100000000 the run needs about", "this machine has"]);
    let prototypes = ["losses.dino.head.prototypes=2000000000"];
    bad(&prototypes, &["losses.dino.head.prototypes: with 2000000000 the run needs about"]);
    bad(
        &["backbone.dim=960000", "backbone.heads=4"],
        &["backbone.dim: with 960000 the run needs about", "and this machine has"],
    );
    // A recipe may be meant for a larger machine.
    let folder = Folder::with_micro();
    let ended = folder.succeed(&["recipe", "check", "micro.toml", "--set", prototypes[0]]);
    assert!(ended.err.contains("warning: micro.toml: losses.dino.head.prototypes: with 2000000000"), "{}", ended.err);
}

#[test]
fn combinations_that_make_no_sense_are_refused() {
    let folder = Folder::with_micro();
    let text = folder.read("micro.toml");
    let alone = "name = 'alone'\nsteps = 2\nbackbone = { plugin = 'vit', preset = 'vit_tiny_test' }\n\
        data = { plugin = 'scenes' }\nteacher = { plugin = 'ema' }\nlosses = { gram = {} }\n";
    folder.write("micro.toml", alone);
    refused(&folder, 2, &[], &["gram", "[teachers.gram]"]);
    folder.write("micro.toml", &text);
    refused(&folder, 2, &["backbone.plugin=vti"], &["vti", "`vit`"]);
    refused(&folder, 2, &["losses.gramm.weight=1"], &["gramm", "`gram`"]);
    refused(&folder, 2, &["optimizer.lrr=1"], &["optimizer.lrr", "`lr`"]);
    refused(&folder, 2, &["optimizer.lr='fast'"], &["optimizer.lr", "fast"]);
    refused(&folder, 2, &["steps=-1"], &["steps", "-1"]);
}

#[test]
fn a_checkpoint_of_another_architecture_says_what_differs() {
    let folder = Folder::with_micro();
    folder.succeed(&["train", "micro.toml", "--out", "narrow"]);
    let sets = ["init_from=narrow", "backbone.dim=64"];
    refused(&folder, 2, &sets, &["narrow", "backbone.dim is 32 in the weights, 64 in the recipe"]);
    let sets = ["init_from=narrow", "backbone.depth=3"];
    refused(&folder, 2, &sets, &["narrow", "backbone.depth is 2 in the weights, 3 in the recipe"]);
    let sets = ["init_from=nowhere"];
    refused(&folder, 2, &sets, &["nowhere"]);
}

#[test]
fn a_truncated_checkpoint_is_passed_over_for_the_one_before() {
    let folder = Folder::with_micro();
    folder.succeed(&["train", "micro.toml", "--out", "whole"]);
    folder.succeed(&["train", "micro.toml", "--out", "run"]);
    fs::remove_file(folder.path("run/result.json")).unwrap();
    let model = folder.path("run/checkpoints/step-00000012/model.safetensors");
    let bytes = fs::read(&model).unwrap();
    fs::write(&model, &bytes[..bytes.len() / 2]).unwrap();
    let ended = folder.succeed(&["train", "micro.toml", "--out", "run", "--resume"]);
    assert!(ended.err.contains("step-00000012") && ended.err.contains("step 8"), "{}", ended.err);
    assert!(fs::read(&model).unwrap() == bytes, "the same bytes as if nothing had happened");

    let copy = folder.path("half.safetensors");
    fs::write(&copy, &bytes[..bytes.len() / 2]).unwrap();
    refused(&folder, 2, &["init_from=half.safetensors"], &["half.safetensors", "help"]);
}

#[test]
fn an_output_folder_that_cannot_be_written_is_named() {
    let folder = Folder::with_micro();
    folder.write("file", "");
    let ended = folder.run(&["train", "micro.toml", "--out", "file/run"]);
    assert_eq!(ended.code, 1);
    assert!(ended.err.contains("cannot create file/run"), "{}", ended.err);
    let suite = program::root().join("ablations/centring.toml");
    let ended = folder.run(&["ablate", suite.to_str().expect("a UTF-8 path"), "--out", "file/suite"]);
    assert_eq!(ended.code, 1);
    assert!(ended.err.contains("cannot create file/suite"), "{}", ended.err);
}

/// Runs the program with a limit on the size of a file, in blocks of 1 KiB: what a full disk looks like.
fn with_file_limit(folder: &Folder, blocks: u32, args: &str) -> program::Ended {
    let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec {} {args}", env!("CARGO_BIN_EXE_with_plugins"));
    let mut command = std::process::Command::new("bash");
    command.args(["-c", &script]).current_dir(folder.path("."));
    command.output().expect("there is a bash").into()
}

#[test]
fn a_full_disk_stops_the_run_and_leaves_what_was_saved() {
    let folder = Folder::with_micro();
    folder.succeed(&["train", "micro.toml", "--out", "whole"]);
    // Ample for what is logged, too little for a checkpoint.
    let ended = with_file_limit(&folder, 100, "train micro.toml --out run");
    assert_eq!(ended.code, 1, "{}{}", ended.out, ended.err);
    assert!(ended.err.contains("cannot write") && ended.err.contains("run/checkpoints"), "{}", ended.err);
    assert!(ended.err.contains("help"), "{}", ended.err);
    assert!(!folder.path("run/checkpoints/step-00000004").exists(), "half a checkpoint was left");
    folder.succeed(&["train", "micro.toml", "--out", "run", "--resume"]);
    let weights = |run: &str| fs::read(folder.path(run).join("checkpoints/step-00000012/model.safetensors")).unwrap();
    assert!(weights("whole") == weights("run"));
}

#[test]
fn nothing_is_overwritten() {
    let folder = Folder::with_micro();
    folder.succeed(&["train", "micro.toml", "--out", "refused"]);
    let before = folder.read("refused/metrics.jsonl");
    refused(&folder, 2, &[], &["refused", "already", "--resume", "--out"]);
    let ended = folder.run(&["train", "micro.toml", "--out", "refused", "--resume", "--set", "optimizer.lr=1"]);
    assert_eq!(ended.code, 2);
    assert!(ended.err.contains("other numbers") && ended.err.contains("optimizer.lr"), "{}", ended.err);
    assert_eq!(folder.read("refused/metrics.jsonl"), before);
    // Nor is a run that lost its recipe taken for none.
    fs::remove_file(folder.path("refused/recipe.toml")).unwrap();
    refused(&folder, 2, &[], &["refused", "already"]);
    let ended = folder.run(&["train", "micro.toml", "--out", "refused", "--resume"]);
    assert!(ended.code == 2 && ended.err.contains("lost its recipe.toml"), "{}", ended.err);
    assert_eq!(folder.read("refused/metrics.jsonl"), before);
}

#[test]
fn captures_that_are_none_are_refused() {
    let folder = Folder::new();
    folder.write("text.safetensors", "text");
    let ended = folder.run(&["replay", "text.safetensors"]);
    assert_eq!(ended.code, 2);
    assert!(ended.err.contains("text.safetensors") && ended.err.contains("help"), "{}", ended.err);
}

#[test]
fn what_is_wrong_with_arms_is_told_of_all_of_them_where_their_file_says_it() {
    let folder = Folder::with_micro();
    let suite = "name = \"s\"\nbase = \"micro.toml\"\nseeds = [0]\nmetrics = [\"loss/dino\"]\nbaseline = \"a\"\n\n[set]\nSET\n\n\
        [[arm]]\nname = \"a\"\nset = { \"losses.koleo.wieght\" = 1 }\n\n[[arm]]\nname = \"b\"\n[arm.set.losses.koleo]\nweight = \"x\"\n";
    let refused = |set: &str, args: &[&str]| {
        folder.write("suite.toml", &suite.replace("SET", set));
        folder.run(&[&["ablate", "suite.toml", "--dry-run"], args].concat()).err
    };
    let error = refused("log.every = 5", &[]);
    for part in [
        "suite.toml:12:9: losses.koleo.wieght: unknown key (arm `a`)",
        "suite.toml:17:10: losses.koleo.weight: expected a number",
        "(arm `b`)",
    ] {
        assert!(error.contains(part), "no `{part}` in {error}");
    }
    // What all arms have is told once, and without their names.
    let error = refused("batch.siz = 8", &[]);
    assert_eq!(error.matches("suite.toml:8:7: batch.siz: unknown key\n").count(), 1, "{error}");
    let error = refused("", &["--set", "batch.siz=8"]);
    assert_eq!(error.matches("--set batch.siz=8: batch.siz: unknown key\n").count(), 1, "{error}");

    // A preset over keys that it would fill in.
    let ended = folder.run(&["recipe", "check", "micro.toml", "--set", "backbone.preset=vit_b16"]);
    assert!(ended.err.contains("the recipe has dim = 32 (micro.toml:6), not 768"), "{}", ended.err);
    let error = folder.run(&["stages", "suite.toml", "--dry-run"]).err;
    assert!(error.contains("this is the file of a suite"), "{error}");

    // A key of another plugin.
    let error = folder.run(&["recipe", "check", "micro.toml", "--set", "data.path=photos"]).err;
    assert!(error.contains("`path` is a key of other choices of data.plugin: cut_outs, image_folder"), "{error}");

    // Keys that do not fit each other: the one that is told may not be the one that was changed.
    let fits = suite.replace("wieght", "weight").replace("\"x\"", "2").replace("SET", "batch.size = 1");
    folder.write("suite.toml", &fits);
    let error = folder.run(&["ablate", "suite.toml", "--dry-run"]).err;
    assert!(error.contains("set over it: batch.size (suite.toml)"), "{error}");
    let error = folder.run(&["recipe", "check", "micro.toml", "--set", "batch.size=1"]).err;
    assert!(error.contains("set over it: --set batch.size=1"), "{error}");
}
