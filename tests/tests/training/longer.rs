//! Runs that become longer, and runs that go on from others: equal to the bit to what was that long, or one run, from the start.

use std::fs;

use dinolab_tests::program::{assert_same_weights, json, metrics, Folder};
use serde_json::Value;

const GRAM: [&str; 4] = ["--set", "losses.gram.enabled=true", "--set", "checkpoint.keep=9"];

fn train<'a>(args: &[&'a str]) -> Vec<&'a str> {
    [&["train"][..], args, &GRAM].concat()
}

#[test]
fn a_finished_run_made_longer_twice_is_the_run_that_was_that_long_from_the_start() {
    let folder = Folder::with_micro();
    folder.succeed(&train(&["micro.toml", "--out", "whole", "--set", "steps=18"]));
    folder.succeed(&train(&["micro.toml", "--out", "run", "--set", "steps=5"]));
    for (steps, from) in [("11", "was 5, is 11"), ("18", "was 11, is 18")] {
        // The folder of the run says the rest.
        let ended = folder.succeed(&["train", "run", "--resume", "--set", &format!("steps={steps}")]);
        assert!(ended.err.contains(from), "{}", ended.err);
    }
    assert_same_weights(&folder, "whole", "run", 18);
    assert_eq!(metrics(&folder, "whole"), metrics(&folder, "run"));
    let result: Value = serde_json::from_str(&folder.read("run/result.json")).expect("JSON");
    assert_eq!(result["steps"], 18);
    // It is finished, and says so again.
    folder.succeed(&["train", "run", "--resume"]);
}

#[test]
fn a_run_that_was_stopped_goes_on_longer_and_not_to_fewer_steps_than_it_has_done() {
    let folder = Folder::with_micro();
    folder.succeed(&train(&["micro.toml", "--out", "run"]));
    // As a kill after step 10 leaves it.
    fs::remove_file(folder.path("run/result.json")).expect("the run finished");
    fs::remove_dir_all(folder.path("run/checkpoints/step-00000012")).expect("the run finished");
    let fewer = folder.run(&["train", "run", "--resume", "--set", "steps=6"]);
    assert_eq!(fewer.code, 2, "{}", fewer.err);
    assert!(fewer.err.contains("has done 8 steps already") && fewer.err.contains("steps=8"), "{}", fewer.err);
    folder.succeed(&["train", "run", "--resume", "--set", "steps=14"]);
    folder.succeed(&train(&["micro.toml", "--out", "whole", "--set", "steps=14"]));
    assert_same_weights(&folder, "whole", "run", 14);
    // Shorter than it was to be, and longer than it is.
    fs::remove_file(folder.path("run/result.json")).expect("the run finished");
    fs::remove_dir_all(folder.path("run/checkpoints/step-00000014")).expect("the run finished");
    folder.succeed(&["train", "run", "--resume", "--set", "steps=13"]);
    folder.succeed(&train(&["micro.toml", "--out", "thirteen", "--set", "steps=13"]));
    assert_same_weights(&folder, "thirteen", "run", 13);
}

#[test]
fn a_schedule_over_the_whole_run_is_named_with_its_jump_at_the_seam() {
    let folder = Folder::with_micro();
    let lr = "optimizer.lr={ plugin = 'linear_warmup_cosine', peak = 1e-3, end = 0.0, warmup_steps = 0 }";
    folder.succeed(&["train", "micro.toml", "--out", "run", "--set", lr]);
    let checked = folder.succeed(&["recipe", "check", "run"]);
    assert!(checked.err.contains("optimizer.lr") && checked.err.contains("made longer"), "{}", checked.err);
    for args in
        [&["recipe", "check", "run", "--set", "steps=24"][..], &["train", "run", "--resume", "--set", "steps=24"]]
    {
        let said = folder.succeed(args).err;
        // Half a cosine from 1e-3 to 0: step 11 of 12 and of 24, step 12 of 24.
        for part in ["optimizer.lr", "was 0 in step 12", "has 5.341e-4", "goes on at 4.659e-4"] {
            assert!(said.contains(part), "no `{part}` in {said}");
        }
    }
    assert!(folder.read("run/messages.jsonl").contains("not the run that had 24 steps from the start"));
    // Numbers alone have no seam.
    let plain = folder.succeed(&["recipe", "check", "micro.toml", "--set", "steps=24"]);
    assert!(!plain.err.contains("length of the run"), "{}", plain.err);
}

#[test]
fn a_run_that_continues_another_under_the_same_recipe_is_one_long_run() {
    let folder = Folder::with_micro();
    // With a Gram teacher that is refreshed on both sides of the fork.
    folder.succeed(&train(&["micro.toml", "--out", "whole", "--set", "steps=14"]));
    folder.succeed(&train(&["micro.toml", "--out", "first", "--set", "steps=9"]));
    let spelled = [
        ("newest", "continue_from='first'"),
        ("step", "continue_from={ run = 'first', step = 8 }"),
        ("at", "continue_from='first@8'"),
        ("folder", "continue_from='first/checkpoints/step-00000008'"),
    ];
    for (out, from) in spelled {
        folder.succeed(&train(&["micro.toml", "--out", out, "--set", "steps=14", "--set", from]));
        assert_same_weights(&folder, "whole", out, 14);
        let (whole, part) = (metrics(&folder, "whole"), metrics(&folder, out));
        assert_eq!(whole[whole.len() - part.len()..], part[..], "{out}");
        let parents = json(&folder, &format!("{out}/parents.json"));
        let step = if out == "newest" { 9 } else { 8 };
        assert_eq!(parents[0]["step"], step);
        assert_eq!(part[0]["step"], step + 1);
        let state = json(&folder, &format!("first/checkpoints/step-{step:08}/state.json"));
        assert_eq!(parents[0]["weights"], state["files"]["model.safetensors"]);
        assert_eq!(parents[0]["differences"], serde_json::json!(["steps: was 9, is 14"]));
    }
    // Its own folder continues in turn, by a kill or longer.
    fs::remove_dir_all(folder.path("at/checkpoints/step-00000014")).expect("the run finished");
    fs::remove_file(folder.path("at/result.json")).expect("the run finished");
    folder.succeed(&["train", "at", "--resume"]);
    assert_same_weights(&folder, "whole", "at", 14);
    let nothing =
        folder.run(&train(&["micro.toml", "--out", "x", "--set", "steps=9", "--set", "continue_from='first'"]));
    assert_eq!(nothing.code, 2);
    assert!(nothing.err.contains("9 steps are all done") && nothing.err.contains("name more"), "{}", nothing.err);
    let no_step =
        folder.run(&train(&["micro.toml", "--out", "x", "--set", "steps=14", "--set", "continue_from='first@3'"]));
    assert_eq!(no_step.code, 2);
    assert!(no_step.err.contains("no checkpoint of step 3; it keeps 4, 8, 9"), "{}", no_step.err);
    assert!(no_step.err.contains("keep_every"), "{}", no_step.err);
}

#[test]
fn a_run_that_continues_another_under_another_recipe_says_in_what_it_differs() {
    let folder = Folder::with_micro();
    folder.succeed(&[
        "train",
        "micro.toml",
        "--out",
        "first",
        "--set",
        "losses.koleo.enabled=false",
        "--set",
        "steps=6",
    ]);
    let fork = ["--set", "continue_from='first'", "--set", "optimizer.lr=2e-3", "--set", "crops.local_count=3"];
    // A head of another loss, and a Gram teacher: neither was there.
    let new = ["--set", "losses.byol={ }", "--set", "teachers.gram.first_step=0"];
    let args = train(&[&["micro.toml", "--out", "fork", "--set", "steps=10"][..], &fork, &new].concat());
    let ended = folder.succeed(&args);
    let differences = json(&folder, "fork/parents.json")[0]["differences"].to_string();
    for part in [
        "optimizer.lr: was 0.001, is 0.002",
        "crops.local_count: was 2, is 3",
        "steps: was 6, is 10",
        "the teacher `gram` is new",
        "is new: it starts from the seed",
    ] {
        assert!(differences.contains(part), "no `{part}` in {differences}");
        assert!(ended.err.contains(part), "no `{part}` in {}", ended.err);
    }
    let wide = folder.run(&train(&[
        "micro.toml",
        "--out",
        "wide",
        "--set",
        "continue_from='first'",
        "--set",
        "backbone.dim=64",
    ]));
    assert_eq!(wide.code, 2, "{}", wide.err);
    assert!(wide.err.contains("backbone.dim is 32 in the weights, 64 in the recipe"), "{}", wide.err);
}

#[test]
fn a_fork_goes_on_after_a_kill_and_only_from_the_checkpoint_that_it_began_with() {
    let folder = Folder::with_micro();
    folder.succeed(&train(&["micro.toml", "--out", "first", "--set", "steps=6"]));
    let fork = ["--set", "continue_from='first'", "--set", "optimizer.lr=2e-3", "--set", "steps=12"];
    let args = train(&[&["micro.toml", "--out", "fork"][..], &fork].concat());
    folder.succeed(&args);
    folder.succeed(&train(&[&["micro.toml", "--out", "again"][..], &fork].concat()));
    // Before its first checkpoint it begins anew from its parent; after, without it.
    for gone in [&["step-00000008", "step-00000012"][..], &["step-00000012"]] {
        for step in gone {
            fs::remove_dir_all(folder.path(&format!("fork/checkpoints/{step}"))).expect("the run finished");
        }
        fs::remove_file(folder.path("fork/result.json")).expect("the run finished");
        folder.succeed(&[&args[..], &["--resume"]].concat());
        assert_same_weights(&folder, "again", "fork", 12);
        assert_eq!(metrics(&folder, "again"), metrics(&folder, "fork"));
    }
    folder.succeed(&["train", "first", "--resume", "--set", "steps=7"]);
    fs::remove_dir_all(folder.path("fork/checkpoints")).expect("the run finished");
    fs::remove_file(folder.path("fork/result.json")).expect("the run finished");
    let other = folder.run(&[&args[..], &["--resume"]].concat());
    assert_eq!(other.code, 2, "{}", other.err);
    assert!(other.err.contains("continue_from is no longer what this run began with"), "{}", other.err);
}

#[test]
fn a_stage_starts_from_the_student_or_from_its_average() {
    let folder = Folder::with_micro();
    folder.succeed(&["train", "micro.toml", "--out", "first"]);
    // A rate of zero shows the weights as they were at the start.
    let still = [
        "--set",
        "steps=1",
        "--set",
        "optimizer.lr=0.0",
        "--set",
        "teacher.momentum=1.0",
        "--set",
        "init_from='first'",
    ];
    let weights = |run: &str, step: u64| {
        let file = folder.path(&format!("{run}/checkpoints/step-{step:08}/model.safetensors"));
        dinolab_core::files::read_tensors(&file).expect("it was written")
    };
    let first = weights("first", 12);
    for (role, student, teacher) in
        [(None, "student", "teacher"), (Some("student"), "student", "student"), (Some("teacher"), "teacher", "teacher")]
    {
        let out = role.unwrap_or("each");
        let role = role.map(|role| format!("init_role={role}"));
        let role: Vec<&str> = role.iter().flat_map(|role| ["--set", role.as_str()]).collect();
        folder.succeed(&[&["train", "micro.toml", "--out", out][..], &still, &role].concat());
        let now = weights(out, 1);
        for (to, from) in [("student", student), ("teacher", teacher)] {
            for (name, tensor) in now.with_prefix(&format!("{to}.")) {
                let old = first.get(&format!("{from}.{name}")).expect("it has the same names");
                assert!(tensor.to_f64_vec() == old.to_f64_vec(), "{out}: {to}.{name} is not {from}'s");
            }
        }
        let parents = json(&folder, &format!("{out}/parents.json"));
        assert_eq!((&parents[0]["key"], &parents[0]["step"]), (&"init_from".into(), &Value::Null));
    }
    let alone = folder.run(&["recipe", "check", "micro.toml", "--set", "init_role=teacher"]);
    assert!(alone.code == 2 && alone.err.contains("there is no init_from"), "{}", alone.err);
}

#[test]
fn one_in_so_many_steps_is_kept_and_a_gram_teacher_may_be_one_of_them() {
    let folder = Folder::with_micro();
    let keep = ["--set", "checkpoint={ every = 4, keep = 1, keep_every = 3 }"];
    folder.succeed(&[&["train", "micro.toml", "--out", "run"][..], &keep].concat());
    let mut names: Vec<String> = fs::read_dir(folder.path("run/checkpoints"))
        .expect("the run finished")
        .map(|e| e.expect("it can be read").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    assert_eq!(names, ["step-00000003", "step-00000006", "step-00000009", "step-00000012"]);
    let gram =
        |source: &str| format!("teachers.gram={{ plugin = 'gram_anchor', source = {{ checkpoint = '{source}' }} }}");
    for (out, source) in [("early", gram("run@3")), ("path", gram("run/checkpoints/step-00000003"))] {
        folder.succeed(&train(&["micro.toml", "--out", out, "--set", &source]));
    }
    assert_same_weights(&folder, "early", "path", 12);
    let parents = json(&folder, "early/parents.json");
    assert_eq!(parents[0]["key"], "teachers.gram");
    assert!(parents[0]["path"].as_str().expect("a path").ends_with("run/checkpoints/step-00000003"), "{parents}");
    let none =
        folder.run(&["recipe", "check", "micro.toml", "--set", "losses.gram.enabled=true", "--set", &gram("run@4")]);
    assert!(none.code == 2 && none.err.contains("it keeps 3, 6, 9, 12"), "{}", none.err);
}

/// What happened in a run: (step, kind, text).
fn events(folder: &Folder, run: &str) -> Vec<(u64, String, String)> {
    let all = dinolab_core::train::RunEvent::read(&folder.path(run)).expect("it can be read");
    all.into_iter().map(|event| (event.step, event.kind, event.text)).collect()
}

#[test]
fn what_happens_in_a_run_is_written_once_however_often_it_was_stopped() {
    let folder = Folder::with_micro();
    let lr = "optimizer.lr={ plugin = 'linear_warmup_cosine', peak = 1e-3, end = 1e-4, warmup_steps = 3 }";
    let args = train(&["micro.toml", "--out", "run", "--set", lr]);
    folder.succeed(&args);
    let planned = |events: Vec<(u64, String, String)>| {
        events
            .into_iter()
            .filter(|(_, kind, _)| kind != "resume")
            .map(|(step, kind, _)| (step, kind))
            .collect::<Vec<_>>()
    };
    let expected = [(3, "schedule"), (4, "teachers.gram"), (8, "teachers.gram")];
    assert_eq!(planned(events(&folder, "run")), expected.map(|(step, kind)| (step, kind.to_string())));
    // The refresh before step 8 was written before the kill, and is not again.
    fs::remove_file(folder.path("run/result.json")).expect("the run finished");
    fs::remove_dir_all(folder.path("run/checkpoints/step-00000012")).expect("the run finished");
    folder.succeed(&[&args[..], &["--resume"]].concat());
    assert_eq!(planned(events(&folder, "run")), expected.map(|(step, kind)| (step, kind.to_string())));
    let resumed = events(&folder, "run").into_iter().filter(|(_, kind, _)| kind == "resume");
    assert_eq!(resumed.map(|(step, ..)| step).collect::<Vec<_>>(), [8]);
    folder.succeed(&["train", "run", "--resume", "--set", "steps=14"]);
    assert!(events(&folder, "run").contains(&(12, "longer".into(), "steps: was 12, is 14".into())));
    let fork = ["--set", "continue_from='run@8'", "--set", "steps=10"];
    folder.succeed(&train(&[&["micro.toml", "--out", "fork"][..], &fork].concat()));
    assert_eq!(events(&folder, "fork")[0].1, "fork");
    // Its Gram teacher is the one that was there: it does not begin.
    assert_eq!(planned(events(&folder, "fork")), [(8, "fork".to_string()), (8, "teachers.gram".to_string())]);
    assert!(events(&folder, "fork")[1].2.starts_with("refresh"));
    // TensorBoard has the same as texts.
    let folders = fs::read_dir(folder.path("fork/tensorboard")).expect("it is on by default");
    let bytes: Vec<u8> = folders.flat_map(|e| fs::read(e.expect("it can be read").path()).expect("a file")).collect();
    assert!(bytes.windows(11).any(|w| w == b"events/fork"), "no event in TensorBoard's files");
}

const STOP: [&str; 6] = [
    "--set",
    "probes.cls_patch_cosine={ enabled = true, every = 2 }",
    "--set",
    // It would have to rise by more than a cosine can: the first measurement stays the best.
    "stop={ metric = 'probe/cls_patch_cosine/mean', patience = 2, min_delta = 2.0 }",
    "--set",
    "probes.patch_similarity={ enabled = true }",
];

#[test]
fn a_run_ends_when_its_score_stops_improving_and_goes_on_when_the_rule_is_gone() {
    let folder = Folder::with_micro();
    let args = train(&[&["micro.toml", "--out", "run"][..], &STOP].concat());
    let ended = folder.succeed(&args);
    assert!(ended.out.contains("ended before its 12 steps"), "{}", ended.out);
    let result = json(&folder, "run/result.json");
    assert_eq!(result["steps"], 6, "measured after 2, 4 and 6 steps");
    assert!(result["stopped"].as_str().expect("it says why").contains("best at step 2"), "{result}");
    // Probes that are taken at the end are taken at this end.
    assert!(result["metrics"]
        .as_object()
        .expect("a table")
        .keys()
        .any(|name| name.starts_with("probe/patch_similarity/")));
    assert_eq!(metrics(&folder, "run").len(), 6);
    // Again it is finished; and so it is when it was killed before it said so.
    folder.succeed(&["train", "run", "--resume"]);
    fs::remove_file(folder.path("run/result.json")).expect("the run finished");
    folder.succeed(&["train", "run", "--resume"]);
    let mut again = json(&folder, "run/result.json");
    again["seconds"] = result["seconds"].clone();
    assert_eq!(again, result);
    assert_eq!(metrics(&folder, "run").len(), 6);
    // Its last losses are done again if the log lost them.
    fs::remove_file(folder.path("run/result.json")).expect("the run finished");
    let log = folder.read("run/metrics.jsonl");
    folder.write("run/metrics.jsonl", &log[..log.len() - 30]);
    folder.succeed(&["train", "run", "--resume"]);
    let mut again = json(&folder, "run/result.json");
    again["seconds"] = result["seconds"].clone();
    assert_eq!(again, result);
    // Under a more patient rule it does its steps, to the bits of a run without any.
    folder.succeed(&["train", "run", "--resume", "--set", "stop.patience=99"]);
    assert_eq!(json(&folder, "run/result.json")["steps"], 12);
    folder.succeed(&train(&["micro.toml", "--out", "whole"]));
    assert_same_weights(&folder, "whole", "run", 12);
}

#[test]
fn a_rule_that_could_never_end_a_run_is_refused() {
    let folder = Folder::with_micro();
    let check = |sets: &[&str]| {
        let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
        let ended = folder.run(&[&["recipe", "check", "micro.toml"][..], &sets].concat());
        assert_eq!(ended.code, 2, "{}", ended.err);
        ended.err
    };
    let on = "probes.cls_patch_cosine={ enabled = true, every = 2 }";
    assert!(check(&[on, "stop={ metric = 'loss/total', patience = 2 }"]).contains("is no score of a probe"));
    assert!(check(&[on, "stop={ metric = 'probe/knn/top1', patience = 2 }"])
        .contains("the probes that are: cls_patch_cosine"));
    let end = "probes.cls_patch_cosine.enabled=true";
    assert!(check(&[end, "stop={ metric = 'probe/cls_patch_cosine/mean', patience = 2 }"])
        .contains("set probes.cls_patch_cosine.every"));
    let args = train(&[
        "micro.toml",
        "--out",
        "run",
        "--set",
        on,
        "--set",
        "stop={ metric = 'probe/cls_patch_cosine/men', patience = 2 }",
    ]);
    let ended = folder.run(&args);
    assert!(ended.code == 2 && ended.err.contains("did you mean `probe/cls_patch_cosine/mean`"), "{}", ended.err);
}

const SUITE: &str = r#"
name = "fork"
base = "micro.toml"
seeds = [0, 1]
metrics = ["probe/cls_patch_cosine/mean"]
baseline = "off"
[set]
probes.cls_patch_cosine = { plugin = "cls_patch_cosine", enabled = true, every = 4 }
steps = 14
[trunk]
steps = 8
set = { "checkpoint.keep_every" = 4 }
[[arm]]
name = "off"
[[arm]]
name = "early"
set = { "losses.gram.enabled" = true, "teachers.gram" = { plugin = "gram_anchor", source = { checkpoint = "{trunk}@4" } } }
[[arm]]
name = "late"
set = { "losses.gram.enabled" = true, "teachers.gram" = { plugin = "gram_anchor", source = { checkpoint = "{trunk}@8" } } }
"#;

#[test]
fn arms_of_a_suite_go_on_from_one_trunk_a_seed() {
    let folder = Folder::with_micro();
    folder.write("suite.toml", SUITE);
    let dry = folder.succeed(&["ablate", "suite.toml", "--dry-run"]).out;
    for part in ["trunk", "8 to 14", "8 runs in", "TFLOP in all", "seed 1 pending"] {
        assert!(dry.contains(part), "no `{part}` in {dry}");
    }
    folder.succeed(&["ablate", "suite.toml", "--out", "out"]);
    for seed in 0..2 {
        let trunk = format!("out/trunk/seed-{seed}");
        let hash = |step: u64| {
            json(&folder, &format!("{trunk}/checkpoints/step-{step:08}/state.json"))["files"]["model.safetensors"]
                .clone()
        };
        for (arm, teacher) in [("off", None), ("early", Some(4)), ("late", Some(8))] {
            let parents = json(&folder, &format!("out/arms/{arm}/seed-{seed}/parents.json"));
            let of = |key: &str| {
                parents.as_array().expect("a list").iter().find(|p| p["key"] == key).map(|p| p["weights"].clone())
            };
            assert_eq!(of("continue_from"), Some(hash(8)), "{arm} {parents}");
            assert_eq!(of("teachers.gram"), teacher.map(hash), "{arm} {parents}");
        }
    }
    let summary = json(&folder, "out/summary.json");
    assert_eq!(summary["trunk"]["fork"], 8);
    assert_eq!(summary["comparisons"][0]["n"], 2);
    let series = |arm: &str| {
        let all = summary["series"].as_array().expect("a list");
        all.iter()
            .find(|s| s["arm"] == arm && s["metric"] == "probe/cls_patch_cosine/mean")
            .expect("it was measured")
            .clone()
    };
    assert_eq!(series("trunk")["steps"], serde_json::json!([4.0, 8.0]));
    // Where an arm begins it is the trunk.
    assert_eq!(series("early")["steps"], serde_json::json!([8.0, 12.0, 14.0]));
    assert_eq!(series("early")["mean"][0], series("trunk")["mean"][1]);
    assert_eq!(series("early")["n"], serde_json::json!([2, 2, 2]));
    let of = |kind: &str| -> Vec<(String, u64)> {
        let all = summary["events"].as_array().expect("a list").iter().filter(|event| event["kind"] == kind);
        all.map(|e| (e["arm"].as_str().expect("a name").into(), e["step"].as_u64().expect("a step"))).collect()
    };
    assert_eq!(of("fork"), ["early", "late", "off"].map(|arm| (arm.to_string(), 8)));
    let gram = of("teachers.gram");
    assert!(
        gram.contains(&("early".into(), 8)) && gram.contains(&("late".into(), 8)),
        "it begins at the fork: {gram:?}"
    );
    assert_eq!(gram.iter().filter(|(_, step)| *step == 8).count(), 2, "and is not refreshed there: {gram:?}");
    let report = folder.read("out/report.html");
    assert!(report.contains("Arms go on from step 8 of the trunk"));
    // Three steps are kept: 4 and 8 of the trunk, and the arms' last.
    assert!(report.contains("What the patches saw over time") && report.contains("<th class=\"num\">step 14</th>"));
    // Without what it has of the trunk, a run of the arm's recipe is the same.
    folder.succeed(&["train", "out/arms/late/seed-1", "--out", "alone"]);
    assert_same_weights(&folder, "out/arms/late/seed-1", "alone", 14);
    // Finished trunks are not trained again.
    let again = folder.succeed(&["ablate", "suite.toml", "--out", "out"]);
    assert!(!again.err.contains("trunk seed"), "{}", again.err);
    // Nor one whose folder is gone, which no arm needs any more.
    fs::remove_dir_all(folder.path("out/trunk/seed-0")).expect("it was trained");
    folder.succeed(&["ablate", "suite.toml", "--out", "out"]);
    assert!(!folder.path("out/trunk/seed-0/result.json").exists(), "it was trained again");
    let warnings = json(&folder, "out/summary.json")["warnings"].to_string();
    assert!(!warnings.contains("trunk seed 0 is pending"), "{warnings}");
}

#[test]
fn a_suite_goes_on_where_its_folder_was_moved_to() {
    let folder = Folder::with_micro();
    folder.write("suite.toml", &SUITE.replace("seeds = [0, 1]", "seeds = [0]"));
    folder.succeed(&["ablate", "suite.toml", "--out", "out", "--arms", "off,early"]);
    let hashes = |name: &str| json(&folder, name)["runs"].clone();
    let before = hashes("out/suite.json");
    // One arm is done, one was killed after its last checkpoint, one did not begin.
    std::fs::remove_file(folder.path("out/arms/early/seed-0/result.json")).expect("it was done");
    std::fs::rename(folder.path("out"), folder.path("moved")).expect("one file system");
    let ended = folder.succeed(&["ablate", "suite.toml", "--out", "moved"]);
    assert!(!ended.err.contains("trunk seed") && !ended.err.contains("off seed"), "{}", ended.err);
    assert_eq!(hashes("moved/suite.json"), before);
    assert_eq!(json(&folder, "moved/summary.json")["comparisons"][0]["n"], 1);
    // Weights in another place have to be the same.
    let go_on = |from: &str| {
        let set = format!("continue_from={{ run = \"{from}\", step = 8 }}");
        folder.run(&["train", "moved/arms/early/seed-0", "--resume", "--set", "steps=15", "--set", &set])
    };
    folder.succeed(&["train", "micro.toml", "--out", "other", "--set", "seed=7", "--set", "steps=8"]);
    let refused = go_on("other");
    assert!(refused.code == 2 && refused.err.contains("continue_from.run: was"), "{}", refused.err);
    std::fs::rename(folder.path("moved/trunk"), folder.path("trunk")).expect("one file system");
    let ended = go_on("trunk/seed-0");
    assert_eq!(ended.code, 0, "{}", ended.err);
}

#[test]
fn a_trunk_that_does_not_keep_what_is_asked_of_it_is_refused_before_it_is_trained() {
    let folder = Folder::with_micro();
    let refused = |from: &str, to: &str| {
        assert!(SUITE.contains(from));
        folder.write("suite.toml", &SUITE.replace(from, to));
        let ended = folder.run(&["ablate", "suite.toml", "--out", "out"]);
        assert_eq!(ended.code, 2, "{}", ended.err);
        assert!(!folder.path("out/trunk").exists());
        ended.err
    };
    assert!(refused("{trunk}@4", "{trunk}@3").contains("step 3 of the trunk is needed"));
    assert!(refused("steps = 14", "steps = 8").contains("all done at the fork of step 8"));
    assert!(refused("steps = 8\n", "steps = 8\nfork = 9\n").contains("from step 9 of a trunk of 8 steps"));
    assert!(refused("[trunk]\n", "continue_from = \"x\"\n[trunk]\n").contains("there is a [trunk]"));
    assert!(refused("name = \"late\"", "name = \"trunk\"").contains("which is the trunk's"));
    // The same suite, tried short.
    folder.write("suite.toml", &SUITE.replace("{trunk}@8", "{trunk}"));
    let short = ["--set", "trunk.steps=4", "--steps", "5", "--seeds", "0", "--arms", "off,early"];
    folder.succeed(&[&["ablate", "suite.toml", "--out", "short"][..], &short].concat());
    assert_eq!(json(&folder, "short/trunk/seed-0/result.json")["steps"], 4);
}

#[test]
fn what_a_run_saw_at_every_kept_step_is_one_page() {
    let folder = Folder::with_micro();
    folder.succeed(&[
        "train",
        "micro.toml",
        "--out",
        "run",
        "--set",
        "checkpoint={ every = 0, keep = 1, keep_every = 3 }",
    ]);
    folder.succeed(&[
        "train",
        "micro.toml",
        "--out",
        "one",
        "--set",
        "checkpoint={ every = 0, keep = 1, keep_every = 6 }",
    ]);
    let ended = folder.succeed(&["features", "--over", "run", "one", "--out", "film"]);
    assert!(ended.out.contains("4 steps of 2 runs"), "{}", ended.out);
    let page = folder.read("film/filmstrip.html");
    for step in [3, 6, 9, 12] {
        assert_eq!(page.matches(&format!("step {step}</th>")).count(), 3, "one column a step and kind");
    }
    // Two of the four columns of the second run are empty.
    let images = page.matches("<table").count();
    assert_eq!((images, page.matches("<td></td>").count()), (3, 3 * 4 * 2));
    assert!(!page.contains("http://") && !page.contains("https://") && !page.contains("<script"), "it stands alone");
    // TensorBoard has the same as pictures over the steps that the run kept, made anew each time.
    folder.succeed(&["features", "--over", "run", "one", "--out", "film"]);
    for (run, steps) in [("run", 4), ("one", 2)] {
        let strip = folder.path(run).join("tensorboard/filmstrip");
        let files: Vec<_> =
            std::fs::read_dir(strip).expect("it was written").map(|e| e.expect("a file").path()).collect();
        let bytes = std::fs::read(&files[0]).expect("a file");
        let count = |what: &[u8]| bytes.windows(what.len()).filter(|window| *window == what).count();
        assert_eq!((files.len(), count(b"\x89PNG")), (1, 4 * steps), "{run}");
        for tag in ["images", "similarity", "cls", "components"] {
            assert_eq!(count(format!("filmstrip/{tag}").as_bytes()), steps, "{run}: {tag}");
        }
    }
    let refused = folder.run(&["features", "--over", "nowhere", "--out", "x"]);
    assert_eq!(refused.code, 2, "{}", refused.err);
}

#[test]
fn a_trunk_may_have_another_recipe_and_arms_may_leave_it_before_its_end() {
    let folder = Folder::with_micro();
    folder.write("trunk.toml", "extends = \"micro.toml\"\nname = \"trunk\"\n[losses.koleo]\nenabled = false\n");
    let trunk = "[trunk]\nrecipe = \"trunk.toml\"\nfork = 4\n";
    folder.write("suite.toml", &SUITE.replace("[trunk]\n", trunk).replace("seeds = [0, 1]", "seeds = [3]"));
    folder.succeed(&["ablate", "suite.toml", "--out", "out", "--arms", "off,late"]);
    assert!(!metrics(&folder, "out/trunk/seed-3")[0].as_object().expect("an object").contains_key("loss/koleo"));
    let arm = &metrics(&folder, "out/arms/late/seed-3");
    // The first line has what the probe makes of the fork, the second is the first step.
    assert_eq!((&arm[0]["step"], &arm[1]["step"]), (&4.into(), &5.into()));
    assert!(arm[1]["loss/koleo"].is_f64() && arm[1]["loss/gram"].is_f64(), "{}", arm[1]);
    let differences = json(&folder, "out/arms/late/seed-3/parents.json")[0]["differences"].to_string();
    assert!(differences.contains("losses.koleo.enabled: was false, is true"), "{differences}");
}

#[test]
fn a_run_whose_own_recipe_was_changed_by_hand_does_not_go_on() {
    let folder = Folder::with_micro();
    folder.succeed(&train(&["micro.toml", "--out", "run"]));
    fs::remove_file(folder.path("run/result.json")).expect("the run finished");
    fs::remove_dir_all(folder.path("run/checkpoints/step-00000012")).expect("the run finished");
    let recipe = folder.read("run/recipe.toml");
    let changed = recipe.replacen("heads = 2", "heads = 4", 1);
    assert_ne!(recipe, changed);
    folder.write("run/recipe.toml", &changed);
    let ended = folder.run(&["train", "run", "--resume"]);
    assert!(ended.code == 2 && ended.err.contains("backbone.heads: was 2, is 4"), "{}", ended.err);
    folder.write("run/recipe.toml", &recipe);
    folder.succeed(&["train", "run", "--resume"]);
}

#[test]
fn check_knows_that_a_fork_has_no_step_left() {
    let folder = Folder::with_micro();
    folder.succeed(&train(&["micro.toml", "--out", "first", "--set", "steps=6"]));
    let fork = ["recipe", "check", "micro.toml", "--set", "continue_from='first'", "--set"];
    let ended = folder.run(&[&fork[..], &["steps=6"]].concat());
    assert!(ended.code == 2 && ended.err.contains("6 steps are all done: first has done 6"), "{}", ended.err);
    folder.succeed(&[&fork[..], &["steps=7"]].concat());
}
