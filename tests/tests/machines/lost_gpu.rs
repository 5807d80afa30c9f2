//! Suites whose process loses its GPU: another goes on from the newest checkpoint, with the same bits.

use std::fs;
use std::process::{Command, Stdio};

use dinolab_tests::emulator;
use dinolab_tests::program::{assert_same_weights, signal, wait_until, Ended, Folder};

const SUITE: &str = r#"
name = "two"
base = "micro.toml"
seeds = [0]
metrics = ["loss/total"]
baseline = "plain"

[set]
steps = 6
"checkpoint.every" = 2

[[arm]]
name = "plain"

[[arm]]
name = "decayed"
set = { "optimizer.weight_decay" = 0.3 }
"#;

/// The suite in `folder`, to be started on the emulator, whose launches the file `stop` there counts down. Nothing where there is a GPU,
/// which is not lost on purpose, or no emulator.
fn ablate(folder: &Folder, out: &str, more: &[&str]) -> Option<Command> {
    if emulator::has_gpu() {
        println!("skipped: a real GPU is not lost on purpose");
        return None;
    }
    let mut command = folder.command(&[&["ablate", "two.toml", "--device", "cuda", "--out", out], more].concat());
    let stop = folder.path("stop");
    emulator::emulate(&mut command, &[("CUDA_EMULATOR_STOP", stop.to_str().expect("a UTF-8 path"))])?;
    Some(command)
}

#[test]
fn a_suite_goes_on_in_another_process_with_the_same_bits() {
    let folder = Folder::with_micro();
    folder.write("two.toml", SUITE);
    // Into the first run, at its first picture, into the second run, with a process for each run, and in the trial of an arm.
    let runs: [(&str, u32, &[&str]); 6] = [
        ("whole", 0, &["--smoke-steps", "0"]),
        ("early", 900, &["--smoke-steps", "0"]),
        ("between", 1800, &["--smoke-steps=0"]),
        ("late", 2600, &["--smoke-steps", "0"]),
        ("side", 900, &["--smoke-steps", "0", "--parallel", "2"]),
        ("trial", 400, &["--smoke-steps", "2"]),
    ];
    for (out, launches, more) in runs {
        if launches > 0 {
            folder.write("stop", &launches.to_string());
        }
        let Some(mut command) = ablate(&folder, out, more) else { return };
        let ended: Ended = command.output().expect("it starts").into();
        assert_eq!(ended.code, 0, "{out}: {}{}", ended.out, ended.err);
        let tries = ["plain", "decayed"].map(|arm| {
            fs::read_to_string(folder.path(&format!("{out}/arms/{arm}/seed-0/attempts.json"))).unwrap_or_default()
        });
        let of_run = launches > 0 && out != "trial";
        assert_eq!(of_run, tries.iter().any(|t| t.contains("CUDA_ERROR_LAUNCH_FAILED")), "{out}: {tries:?}");
        assert_eq!(out == "trial", ended.err.contains("its trial lost the GPU"), "{out}: {}{}", ended.out, ended.err);
        for arm in ["plain", "decayed"] {
            assert_same_weights(&folder, &format!("{out}/arms/{arm}/seed-0"), &format!("whole/arms/{arm}/seed-0"), 6);
        }
        if of_run {
            assert!(folder.read(&format!("{out}/summary.md")).contains("tried again"), "{out}: the report says so");
        }
    }
}

#[test]
fn a_run_that_always_loses_the_gpu_fails_and_the_others_go_on() {
    let folder = Folder::with_micro();
    folder.write("two.toml", SUITE);
    let failure = "CUDA_ERROR_LAUNCH_FAILED";
    let attempt = format!("{{ \"error\": \"{failure}\", \"lost_gpu\": true }}");
    let dir = folder.path("out/arms/plain/seed-0");
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("attempts.json"), format!("[{}]", vec![attempt; 10].join(", "))).unwrap();
    folder.write("stop", "300");
    let Some(mut command) = ablate(&folder, "out", &["--smoke-steps", "0"]) else { return };
    let ended: Ended = command.output().expect("it starts").into();
    assert_eq!(ended.code, 1, "{}{}", ended.out, ended.err);
    assert!(
        ended.err.contains("failed: arms/plain/seed-0") && ended.err.contains(failure),
        "{}{}",
        ended.out,
        ended.err
    );
    assert!(folder.path("out/arms/decayed/seed-0/result.json").is_file());
}

#[test]
fn a_request_to_stop_is_not_lost_with_the_gpu() {
    let folder = Folder::with_micro();
    folder.write("two.toml", &SUITE.replace("steps = 6", "steps = 4000"));
    let Some(mut command) = ablate(&folder, "out", &["--smoke-steps", "0"]) else { return };
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
    let log = folder.path("out/arms/plain/seed-0/metrics.jsonl");
    wait_until(&mut child, || fs::read_to_string(&log).is_ok_and(|text| text.lines().count() > 1));
    signal(&child, "TERM");
    folder.write("stop", "1");
    let ended: Ended = child.wait_with_output().expect("it ends").into();
    assert_eq!(ended.code, 75, "{}{}", ended.out, ended.err);
}
