//! Suites whose process loses its GPU: another goes on from the newest checkpoint, with the same bits.

use std::fs;
use std::path::Path;

use dinolab_tests::emulator;
use dinolab_tests::program::{Ended, Folder};

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

/// The weights at the end of a suite's runs.
fn weights(out: &Path) -> Vec<Vec<u8>> {
    let of = |arm| out.join(format!("arms/{arm}/seed-0/checkpoints/step-00000006/model.safetensors"));
    ["plain", "decayed"]
        .map(of)
        .into_iter()
        .map(|path| fs::read(&path).unwrap_or_else(|e| panic!("{path:?}: {e}")))
        .collect()
}

#[test]
fn a_suite_goes_on_in_another_process_with_the_same_bits() {
    if emulator::has_gpu() {
        println!("skipped: a real GPU is not lost on purpose");
        return;
    }
    let folder = Folder::with_micro();
    folder.write("two.toml", SUITE);
    // Some launches into the first run, at its first picture, into the second run, and with a process for each run.
    let runs: [(&str, u32, &[&str]); 5] = [
        ("whole", 0, &[]),
        ("early", 900, &[]),
        ("between", 1800, &[]),
        ("late", 2600, &[]),
        ("side", 900, &["--parallel", "2"]),
    ];
    for (out, launches, more) in runs {
        let stop = folder.path("stop");
        if launches > 0 {
            fs::write(&stop, launches.to_string()).unwrap();
        }
        let args = ["ablate", "two.toml", "--device", "cuda", "--out", out, "--smoke-steps", "0"];
        let mut command = folder.command(&[&args[..], more].concat());
        let stop = [("CUDA_EMULATOR_STOP", stop.to_str().unwrap())];
        let Some(command) = emulator::emulate(&mut command, &stop) else { return };
        let ended: Ended = command.output().expect("it starts").into();
        assert_eq!(ended.code, 0, "{out}: {}{}", ended.out, ended.err);
        let tries: Vec<String> = ["plain", "decayed"]
            .map(|arm| {
                fs::read_to_string(folder.path(&format!("{out}/arms/{arm}/seed-0/attempts.json"))).unwrap_or_default()
            })
            .into();
        assert_eq!(launches > 0, tries.iter().any(|t| t.contains("CUDA_ERROR_LAUNCH_FAILED")), "{out}: {tries:?}");
        assert!(weights(&folder.path(out)) == weights(&folder.path("whole")), "{out}");
        if launches > 0 {
            assert!(folder.read(&format!("{out}/summary.md")).contains("tried again"), "{out}: the report says so");
        }
    }
}

#[test]
fn a_run_that_always_loses_the_gpu_fails_and_the_others_go_on() {
    if emulator::has_gpu() {
        println!("skipped: a real GPU is not lost on purpose");
        return;
    }
    let folder = Folder::with_micro();
    folder.write("two.toml", SUITE);
    let failure = "CUDA_ERROR_LAUNCH_FAILED";
    let attempt = format!("{{ \"error\": \"{failure}\" }}");
    let dir = folder.path("out/arms/plain/seed-0");
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("attempts.json"), format!("[{attempt}, {attempt}, {attempt}]")).unwrap();
    fs::write(folder.path("stop"), "300").unwrap();
    let mut command = folder.command(&["ablate", "two.toml", "--device", "cuda", "--out", "out", "--smoke-steps", "0"]);
    let stop = folder.path("stop");
    let Some(command) = emulator::emulate(&mut command, &[("CUDA_EMULATOR_STOP", stop.to_str().unwrap())]) else {
        return;
    };
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
