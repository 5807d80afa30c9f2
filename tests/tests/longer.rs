//! Runs that become longer, and runs that go on from others: equal to the bit to what was that long, or one run, from the start.

#[allow(dead_code)]
mod program;

use std::fs;

use program::{assert_same_weights, Folder};
use serde_json::Value;

/// The lines of a run's metrics by step, without what differs from machine to machine.
fn lines(folder: &Folder, run: &str) -> Vec<Value> {
    let text = folder.read(&format!("{run}/metrics.jsonl"));
    let line = |line: &str| {
        let mut line: Value = serde_json::from_str(line).expect("a line is an object");
        line.as_object_mut().expect("an object").retain(|name, _| !name.starts_with("throughput/"));
        line
    };
    text.lines().map(line).collect()
}

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
    assert_eq!(lines(&folder, "whole"), lines(&folder, "run"));
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
