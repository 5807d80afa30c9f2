//! Stages as one file and one command: the same bits as one command a stage, kept, resumed, and told apart by hash.

use std::fs;

use dinolab_tests::program::{assert_same_weights, json, signal, wait_until, Ended, Folder};

const STAGES: &str = r#"
name = "chain"
[set]
probes.cls_patch_cosine.enabled = true

[[stage]]
name = "pretrain"
recipe = "micro.toml"

[[stage]]
name = "gram"
recipe = "micro.toml"
[stage.set]
steps = 20
continue_from = "{pretrain}@8"
losses.gram.enabled = true
teachers.gram.source = { checkpoint = "{pretrain}@4" }
teachers.gram.first_step = 8

[[stage]]
name = "high_res"
recipe = "micro.toml"
[stage.set]
init_from = "{gram}"
init_role = "teacher"
crops.global_size = 48
crops.local_size = 24
"#;

/// The folder with the file, and the stages done one command each.
fn lab(steps: u32) -> Folder {
    let folder = Folder::with_micro();
    let first = format!("recipe = \"micro.toml\"\nset = {{ \"checkpoint.keep_every\" = 4, steps = {steps} }}");
    folder.write("chain.toml", &STAGES.replacen("recipe = \"micro.toml\"", &first, 1));
    folder
}

#[test]
fn a_chain_is_the_runs_that_one_command_each_gives_and_says_what_came_from_what() {
    let folder = lab(12);
    let probe = ["--set", "probes.cls_patch_cosine.enabled=true"];
    let train = |args: &[&str]| drop(folder.succeed(&[&["train", "micro.toml"], args, &probe].concat()));
    train(&["--out", "alone/pretrain", "--set", "checkpoint.keep_every=4"]);
    let gram = ["--set", "losses.gram.enabled=true", "--set", "teachers.gram.first_step=8"];
    let sources = [
        "--set",
        "continue_from=\"alone/pretrain@8\"",
        "--set",
        "teachers.gram.source={ checkpoint = 'alone/pretrain@4' }",
    ];
    train(&[&["--out", "alone/gram", "--set", "steps=20"], &gram[..], &sources].concat());
    let crops = ["--set", "crops.global_size=48", "--set", "crops.local_size=24"];
    train(
        &[&["--out", "alone/high_res", "--set", "init_from='alone/gram'", "--set", "init_role='teacher'"], &crops[..]]
            .concat(),
    );

    let dry = folder.succeed(&["stages", "chain.toml", "--out", "chain", "--dry-run"]).out;
    assert!(
        dry.contains("continue_from = pretrain") && dry.contains("pending") && !folder.path("chain").exists(),
        "{dry}"
    );
    let done = folder.succeed(&["stages", "chain.toml", "--out", "chain"]);
    assert!(done.out.contains("all 3 stages are done; report: chain/report.html"), "{}", done.out);
    for (stage, step) in [("pretrain", 12), ("gram", 20), ("high_res", 12)] {
        assert_same_weights(&folder, &format!("alone/{stage}"), &format!("chain/{stage}"), step);
    }
    // Parents by hash, in the run and in what programs read.
    let (run, chain) = (json(&folder, "chain/gram/run.json"), json(&folder, "chain/stages.json"));
    let parents = chain["stages"][1]["parents"].as_array().expect("a list");
    assert_eq!(parents.len(), 2);
    for parent in parents {
        let key = parent["key"].as_str().expect("a key");
        assert_eq!(run["parents"][key], parent["weights"], "{key}");
    }
    assert_eq!(json(&folder, "chain/high_res/run.json")["parents"].as_object().expect("a table").len(), 1);
    let page = folder.read("chain/report.html");
    for part in ["<svg", ">continue_from<", ">init_from<", "steps 8 to 20", "12 steps", "cls_patch_cosine"] {
        assert!(page.contains(part), "no `{part}` in the report");
    }
    assert!(!page.contains("stroke-dasharray"), "nothing was done anew");

    // What is done is kept; a stage that has other parents than it was trained from is told.
    let before = fs::read(folder.path("chain/gram/metrics.jsonl")).expect("it is there");
    let parents = folder.read("chain/high_res/parents.json");
    let weights = json(&folder, "chain/high_res/parents.json")[0]["weights"].as_str().expect("a hash").to_string();
    let other = weights.chars().rev().collect::<String>();
    fs::write(folder.path("chain/high_res/parents.json"), parents.replace(&weights, &other)).expect("it is there");
    let again = folder.succeed(&["stages", "chain.toml", "--out", "chain"]);
    assert!(again.err.contains("high_res was trained from other weights than init_from names now"), "{}", again.err);
    assert!(folder.read("chain/report.html").contains("init_from (other weights now)"));
    assert_eq!(fs::read(folder.path("chain/gram/metrics.jsonl")).expect("it is there"), before);

    // Another recipe is refused before anything is lost.
    let refused = folder.run(&["stages", "chain.toml", "--out", "chain", "--set", "optimizer.lr=1e-4"]);
    assert_eq!(refused.code, 2, "{}", refused.err);
    assert!(refused.err.contains("optimizer.lr"), "{}", refused.err);
}

#[test]
fn a_chain_whose_file_was_edited_is_refused_before_anything_is_trained() {
    let folder = lab(12);
    folder.succeed(&["stages", "chain.toml", "--out", "chain"]);
    let text = folder.read("chain.toml");
    let before = folder.read("chain/gram/metrics.jsonl");
    for (from, to, said) in [
        ("checkpoint = \"{pretrain}@4\"", "checkpoint = \"{pretrain}@8\"", "was started with another recipe"),
        ("steps = 20", "steps = 16", "has done 20 steps, and its recipe now has 16"),
    ] {
        // The stage before could be trained on.
        folder.write(
            "chain.toml",
            &text.replace("keep_every\" = 4, steps = 12", "keep_every\" = 4, steps = 16").replace(from, to),
        );
        for more in [&["--dry-run"][..], &[]] {
            let ended = folder.run(&[&["stages", "chain.toml", "--out", "chain"], more].concat());
            assert!(ended.code == 2 && ended.err.contains(said), "{to}: {}{}", ended.out, ended.err);
        }
        assert!(!folder.path("chain/pretrain/checkpoints/step-00000016").exists());
    }
    assert_eq!(folder.read("chain/gram/metrics.jsonl"), before);
    folder.write("chain.toml", &text);
    folder.succeed(&["stages", "chain.toml", "--out", "chain"]);
}

#[test]
fn a_chain_that_was_asked_to_stop_goes_on_to_the_same_bytes() {
    let folder = lab(300);
    folder.succeed(&["stages", "chain.toml", "--out", "whole"]);
    let args = ["stages", "chain.toml", "--out", "stopped"];
    let mut child = folder.start(&args);
    wait_until(&mut child, || folder.path("stopped/pretrain/checkpoints").exists());
    signal(&child, "TERM");
    let ended: Ended = child.wait_with_output().expect("it was started").into();
    assert_eq!(ended.code, 75, "{}{}", ended.out, ended.err);
    assert!(ended.out.contains("stopped in stage pretrain"), "{}", ended.out);
    folder.succeed(&args);
    for (stage, step) in [("pretrain", 300), ("gram", 20), ("high_res", 12)] {
        assert_same_weights(&folder, &format!("whole/{stage}"), &format!("stopped/{stage}"), step);
    }
}

#[test]
fn a_mistake_in_a_chain_is_named_before_anything_runs() {
    let folder = lab(12);
    for (was, is, said) in [
        ("{gram}", "{gramm}", "did you mean `gram`"),
        ("name = \"gram\"", "name = \"pretrain\"", "stage name `pretrain` is repeated"),
        ("init_role", "init_rol", "init_rol"),
        (
            "{pretrain}@8",
            "{pretrain}@7",
            "stage `gram` needs step 7 of `pretrain`, and its checkpoint would not be kept",
        ),
        ("steps = 20", "steps = 8", "stage `gram` has 8 steps, all done at step 8 of `pretrain`"),
        // By where it goes on from, whatever other step it names.
        (
            "steps = 20\ncontinue_from = \"{pretrain}@8\"",
            "steps = 10\ncontinue_from = \"{pretrain}\"",
            "has 10 steps, all done at step 12 of",
        ),
        ("[[stage]]", "stagez = 1\n[[stage]]", "stagez: unknown key"),
        ("init_from = \"{gram}\"", "backbone.weights = \"{gram}\"", "say `backbone.plugin` and its keys"),
    ] {
        folder.write("wrong.toml", &folder.read("chain.toml").replacen(was, is, 1));
        let ended = folder.run(&["stages", "wrong.toml", "--out", "out"]);
        assert_eq!(ended.code, 2, "{}", ended.err);
        assert!(ended.err.contains(said), "no `{said}` in {}", ended.err);
        assert!(!folder.path("out").exists());
    }
}

#[test]
fn what_a_stage_cannot_take_of_an_earlier_one_is_refused_before_the_first_begins() {
    let folder = lab(12);
    let whole = folder.read("chain.toml");
    let model = "weights of another model than the recipe's\n    backbone.depth is 2 in the weights, 1 in the recipe";
    let prototypes = "first_step = 8\nlosses.dino.head.prototypes = 16";
    let distils = "teacher = { plugin = \"frozen\", checkpoint = \"{gram}\" }\nbackbone.patch_size = 4";
    for (from, to, said) in [
        ("first_step = 8", prototypes, "continue_from: "),
        ("first_step = 8", prototypes, "dino_head.last_layer.weight: [32, 16] in the file, [16, 16] in the model"),
        ("init_role = \"teacher\"", "init_role = \"teacher\"\nbackbone.depth = 1", model),
        ("init_from = \"{gram}\"\ninit_role = \"teacher\"", distils, "the teacher's patches have 8 pixels a side"),
    ] {
        folder.write("changed.toml", &whole.replace(from, to));
        let ended = folder.run(&["stages", "changed.toml", "--out", "changed"]);
        assert!(ended.code == 2 && ended.err.contains(said), "{to}: {}", ended.err);
        assert!(!folder.path("changed/pretrain").exists(), "{to}: the first stage has begun");
    }
}
