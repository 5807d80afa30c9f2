//! What is in a folder already, and what a run is told to start from, is held to what is asked for: nothing is written over, and
//! nothing is taken for something else.

use std::fs;

use dinolab_tests::program::{assert_same_weights, json, Ended, Folder};

const SUITE: &str =
    "name = \"pair\"\nbase = \"micro.toml\"\nseeds = [0]\nmetrics = [\"loss/total\"]\nbaseline = \"low\"\n\
    [[arm]]\nname = \"low\"\nset = { \"losses.koleo.weight\" = 0.0 }\n\
    [[arm]]\nname = \"high\"\nset = { \"losses.koleo.weight\" = 0.1 }\n";
const CHAIN: &str = "name = \"chain\"\n[[stage]]\nname = \"one\"\nrecipe = \"micro.toml\"\nset = { steps = 4 }\n\
    [[stage]]\nname = \"two\"\nrecipe = \"micro.toml\"\nset = { steps = 4, init_from = \"{one}\" }\n";

fn refused(ended: &Ended, parts: &[&str]) {
    assert_ne!(ended.code, 0, "{}", ended.out);
    for part in parts.iter().chain(&["help: "]) {
        assert!(ended.err.contains(part), "no `{part}` in\n{}", ended.err);
    }
}

#[test]
fn stages_and_suites_keep_to_folders_of_their_own() {
    let folder = Folder::with_micro();
    folder.write("chain.toml", CHAIN);
    folder.write("other.toml", &CHAIN.replacen("\"chain\"", "\"other\"", 1));
    folder.write("suite.toml", SUITE);
    folder.succeed(&["stages", "chain.toml", "--out", "chain"]);
    folder.succeed(&["ablate", "suite.toml", "--out", "suite"]);
    let before = folder.read("chain/stages.json");
    refused(&folder.run(&["stages", "other.toml", "--out", "chain"]), &["holds the stages of `chain`"]);
    refused(&folder.run(&["stages", "chain.toml", "--out", "suite"]), &["suite.json"]);
    refused(&folder.run(&["ablate", "suite.toml", "--out", "chain"]), &["stages.json"]);
    assert_eq!(folder.read("chain/stages.json"), before);
    // What a run would write over is of somebody else.
    fs::create_dir(folder.path("mine")).unwrap();
    folder.write("mine/metrics.jsonl", "{\"step\":1}\n");
    refused(&folder.run(&["train", "micro.toml", "--out", "mine"]), &["metrics.jsonl"]);
    assert_eq!(folder.read("mine/metrics.jsonl"), "{\"step\":1}\n");
}

#[test]
fn a_dry_run_refuses_what_the_run_refuses() {
    let folder = Folder::with_micro();
    folder.write("chain.toml", CHAIN);
    folder.write("suite.toml", SUITE);
    folder.succeed(&["stages", "chain.toml", "--out", "chain"]);
    folder.succeed(&["ablate", "suite.toml", "--out", "suite"]);
    for more in [&["--dry-run"][..], &[]] {
        let ablate = ["ablate", "suite.toml", "--out", "suite", "--set", "optimizer.lr=5e-3"];
        refused(&folder.run(&[&ablate, more].concat()), &["optimizer.lr: was 0.001, is 0.005"]);
        let stages = ["stages", "chain.toml", "--out", "chain", "--set", "optimizer.lr=5e-3"];
        refused(&folder.run(&[&stages, more].concat()), &["chain/one", "optimizer.lr: was 0.001, is 0.005"]);
    }
    // A suite has seeds of its own; what every arm sets is not set otherwise by the command line.
    let ablate = |set: &str| folder.run(&["ablate", "suite.toml", "--dry-run", "--set", set]);
    refused(&ablate("seed=3"), &["--seeds"]);
    let idle = ablate("losses.koleo.weight=5");
    assert!(idle.code == 0 && idle.err.contains("changes nothing: every arm sets it"), "{}", idle.err);
    refused(&ablate("losses.koleo.wieght=5"), &["--set losses.koleo.wieght=5: losses.koleo.wieght", "`weight`"]);
}

#[test]
fn a_stage_that_became_longer_makes_those_after_it_stale() {
    let folder = Folder::with_micro();
    folder.write("chain.toml", CHAIN);
    folder.succeed(&["stages", "chain.toml", "--out", "chain"]);
    folder.write("chain.toml", &CHAIN.replacen("steps = 4", "steps = 8", 1));
    let dry = folder.succeed(&["stages", "chain.toml", "--out", "chain", "--dry-run"]).out;
    assert!(dry.contains("at step 4") && dry.contains("to step 8"), "{dry}");
    let longer = folder.succeed(&["stages", "chain.toml", "--out", "chain"]);
    assert!(longer.err.contains("two was trained from other weights than init_from names now"), "{}", longer.err);
    assert_eq!(json(&folder, "chain/stages.json")["stages"][1]["stale"][0], "init_from");
    // Done again, it is what a new chain gives.
    fs::remove_dir_all(folder.path("chain/two")).unwrap();
    folder.succeed(&["stages", "chain.toml", "--out", "chain"]);
    folder.succeed(&["stages", "chain.toml", "--out", "anew"]);
    assert_same_weights(&folder, "chain/two", "anew/two", 4);
}

#[test]
fn a_rule_sees_every_number_of_a_step_and_metrics_are_those_of_results() {
    let folder = Folder::with_micro();
    let rule = |metric: &str| format!("{SUITE}[[drop]]\nmetric = \"{metric}\"\nabove = -1e9\nafter = 3\n");
    for (i, metric) in ["grad_norm/dino_head", "lr", "health/feature_std"].iter().enumerate() {
        folder.write("suite.toml", &rule(metric));
        let ended = folder.run(&["ablate", "suite.toml", "--out", &format!("dropped{i}")]);
        assert!(ended.err.contains(&format!("dropped after step 3: {metric} = ")), "{metric}: {}", ended.err);
    }
    for metric in ["grad_norm/backbone", "throughput/seconds", "lr"] {
        folder.write("suite.toml", &SUITE.replace("loss/total", metric));
        refused(
            &folder.run(&["ablate", "suite.toml", "--out", "none"]),
            &[&format!("metric `{metric}` is not measured")],
        );
    }
}

#[test]
fn a_rule_that_the_last_probe_breaks_drops_the_run() {
    let folder = Folder::with_micro();
    let metric = "probe/cls_patch_cosine/mean";
    let rule = format!("metric = \"{metric}\"\nbelow = 2.0\n");
    folder.write(
        "suite.toml",
        &format!("{SUITE}[set]\nprobes.cls_patch_cosine = {{ enabled = true, samples = 4 }}\n[[drop]]\n{rule}"),
    );
    for more in [&[][..], &["--retry-failed"]] {
        let ended = folder.run(&[&["ablate", "suite.toml", "--out", "dropped"], more].concat());
        assert_eq!(ended.code, 0, "{}", ended.err);
        assert!(ended.err.contains(&format!("dropped after step 12: {metric} = ")), "{}", ended.err);
        assert!(folder.read("dropped/summary.md").contains("is not in the numbers"));
    }
}

#[test]
fn an_arm_is_what_it_says_whatever_all_arms_share() {
    let folder = Folder::with_micro();
    let arms =
        "name = \"pair\"\nbase = \"micro.toml\"\nseeds = [0]\nmetrics = [\"loss/total\"]\nbaseline = \"adamw\"\n\
        [set]\noptimizer.lr = 1e-3\noptimizer.weight_decay = 0.5\n\
        [[arm]]\nname = \"adamw\"\n[[arm]]\nname = \"sgd\"\nset = { optimizer = { plugin = \"sgd\", lr = 0.1 } }\n";
    folder.write("suite.toml", arms);
    let ended = folder.succeed(&["ablate", "suite.toml", "--out", "out", "--steps", "1", "--set", "optimizer.lr=1e-2"]);
    let said = "--set optimizer.lr changes nothing in sgd: the suite sets it there";
    assert!(ended.err.contains(said), "{}", ended.err);
    for (arm, lr) in [("adamw", 0.01), ("sgd", 0.1)] {
        let recipe: toml::Table = folder.read(&format!("out/arms/{arm}/seed-0/recipe.toml")).parse().expect("TOML");
        assert_eq!(recipe["optimizer"]["lr"].as_float(), Some(lr), "{arm}");
        assert_eq!(recipe["optimizer"]["weight_decay"].as_float(), Some(0.5), "{arm}");
    }
}

#[test]
fn a_probe_that_changed_does_not_mix_with_the_scores_of_finished_runs() {
    let folder = Folder::with_micro();
    let suite = |probe: &str, seeds: &str| {
        let text = SUITE.replace("loss/total", "probe/cls_patch_cosine/mean").replace("[0]", seeds);
        folder.write("suite.toml", &format!("{text}[set]\n{probe}\nsteps = 2\n"));
        folder.run(&["ablate", "suite.toml", "--out", "out"])
    };
    assert_eq!(suite("probes.cls_patch_cosine = { enabled = true, samples = 4 }", "[0]").code, 0);
    let other = suite("probes.cls_patch_cosine = { enabled = true, samples = 8 }", "[0, 1]");
    refused(&other, &["probes.cls_patch_cosine.samples: was 4, is 8"]);
    let often = suite("probes.cls_patch_cosine = { enabled = true, samples = 4, every = 1 }", "[0, 1]");
    assert_eq!(often.code, 0, "when it is taken beside changes no final score: {}", often.err);
    // What a variable of the environment changes is no longer the suite of the file.
    folder.write("said.toml", &(SUITE.to_string() + "[measured]\non = \"two cores\"\nn = 1\nseconds = 5.0\n"));
    let dry = |vars: &[(&str, &str)]| folder.run_with(vars, &["ablate", "said.toml", "--dry-run"]).out;
    assert!(dry(&[]).contains("the suite's [measured]") && dry(&[("DINOLAB_NAME", "x")]).contains("[measured]"));
    assert!(!dry(&[("DINOLAB_OPTIMIZER__LR", "0.5")]).contains("[measured]"));
}

#[test]
fn a_run_goes_on_from_weights_of_its_own_model_alone() {
    let folder = Folder::with_micro();
    folder.succeed(&["train", "micro.toml", "--out", "first", "--set", "steps=2"]);
    folder.succeed(&["export", "first", "--format", "safetensors", "--out", "weights"]);
    let on = ["--set", "continue_from=first", "--set", "steps=4"];
    for set in ["backbone.heads=1", "backbone.depth=1"] {
        let told = format!("{} is 2 in the weights, 1 in the recipe", set.trim_end_matches("=1"));
        refused(&folder.run(&[&["recipe", "check", "micro.toml", "--set", set], &on[..]].concat()), &[&told]);
        refused(&folder.run(&[&["train", "micro.toml", "--out", "on", "--set", set], &on[..]].concat()), &[&told]);
    }
    let alone = ["recipe", "check", "micro.toml", "--set", "continue_from=weights"];
    refused(&folder.run(&alone), &["weights alone"]);
    let untaught =
        ["--set", "teacher.plugin=none", "--set", "losses.dino.enabled=false", "--set", "losses.ibot.enabled=false"];
    folder.succeed(&[&["train", "micro.toml", "--out", "untaught", "--set", "steps=2"], &untaught[..]].concat());
    let of_teacher = ["recipe", "check", "micro.toml", "--set", "init_from=untaught", "--set", "init_role=teacher"];
    refused(&folder.run(&of_teacher), &["no tensors teacher.backbone.*"]);
}

#[test]
fn a_card_has_the_scores_and_the_origin_of_its_own_weights() {
    let folder = Folder::with_micro();
    folder.succeed(&["train", "micro.toml", "--out", "first", "--set", "steps=2"]);
    folder.succeed(&["eval", "first", "--data", "micro.toml", "--probes", "cls_patch_cosine", "--out", "scores"]);
    let export = |run: &str, more: &[&str]| folder.run(&[&["export", run, "--format", "safetensors"], more].concat());
    let scores = ["--scores", "scores/eval.json"];
    refused(
        &export("first", &[&["--role", "student", "--out", "student"], &scores[..]].concat()),
        &["scores of the teacher"],
    );
    assert_eq!(export("first", &[&["--out", "weights"], &scores[..]].concat()).code, 0);
    refused(&export("weights", &["--role", "student", "--out", "again"]), &["leave out --role"]);
    // Runs that go on from each other began where the first did.
    folder.succeed(&["train", "micro.toml", "--out", "second", "--set", "steps=2", "--set", "init_from=weights"]);
    folder.succeed(&["train", "micro.toml", "--out", "third", "--set", "steps=4", "--set", "continue_from=second"]);
    for (run, origin) in [("first", "began from random weights"), ("third", "whose licence holds for these too")] {
        assert_eq!(export(run, &["--out", &format!("of_{run}")]).code, 0);
        assert!(folder.read(&format!("of_{run}/README.md")).contains(origin), "{run}");
    }
}

#[test]
fn a_stop_that_no_probe_gives_loses_no_step() {
    let folder = Folder::with_micro();
    let sets = ["steps=12", "checkpoint.every=0", "probes.cls_patch_cosine={ enabled = true, every = 9 }"];
    let train = |metric: &str, more: &[&str]| {
        let stop = format!("stop={{ metric = \"probe/cls_patch_cosine/{metric}\", patience = 5 }}");
        let sets = sets.iter().copied().chain([stop.as_str()]).flat_map(|set| ["--set", set]).collect::<Vec<_>>();
        folder.run(&[&["train", "micro.toml", "--out", "run"], &sets[..], more].concat())
    };
    refused(&train("means", &[]), &["did you mean `probe/cls_patch_cosine/mean`?", "--resume"]);
    let resumed = train("mean", &["--resume"]);
    assert!(resumed.code == 0 && resumed.err.contains("step 10 of 12"), "{}", resumed.err);
    let total = ["recipe", "check", "micro.toml", "--set", "losses.total={ plugin = \"koleo\" }"];
    refused(&folder.run(&total), &["the sum of all losses"]);
    let cut = folder.run_with(&[("DINOLAB_STEPS__", "7")], &["recipe", "check", "micro.toml"]);
    refused(&cut, &["DINOLAB_STEPS__"]);
}
