//! What the program prints, and where nobody can read it: a pipe that is closed, a device that is full, a log file.

use std::fs::File;
use std::io::Read;
use std::process::Stdio;

use dinolab_tests::program::{root, Ended, Folder};

/// A suite of two short runs.
const SUITE: &str = r#"
name = "lr"
base = "micro.toml"
seeds = [0]
metrics = ["loss/total"]
baseline = "low"
[[arm]]
name = "low"
set = { "optimizer.lr" = 1e-3 }
[[arm]]
name = "high"
set = { "optimizer.lr" = 2e-3 }
"#;

/// Commands whose work is in a folder, or is to tell whether all is well: output is not what they are run for.
const WORK: [&[&str]; 6] = [
    &["train", "micro.toml", "--set", "probes.cls_patch_cosine={ enabled = true, every = 3 }", "--out"],
    &["ablate", "suite.toml", "--out"],
    &["features", "photos", "--weights", "run", "--out"],
    &["import", "published", "--out"],
    &["export", "run", "--format", "safetensors", "--out"],
    &["new", "plugin", "some_loss", "--kind", "loss", "--out"],
];

/// Commands whose product is what they print.
const PRODUCT: [&[&str]; 10] = [
    &["recipe", "show", "micro.toml"],
    &["recipe", "show", "micro.toml", "--timeline"],
    &["recipe", "schema"],
    &["recipe", "check", "--cost", "micro.toml"],
    &["recipe", "diff", "micro.toml", "run"],
    &["plugins", "--json"],
    &["ablate", "suite.toml", "--dry-run"],
    &["completions", "bash"],
    &["check", "gelu", "--cases", "1"],
    &["--help"],
];

fn folder() -> Folder {
    let folder = Folder::with_micro();
    folder.write("suite.toml", SUITE);
    folder.add_photos("photos");
    folder.succeed(&["train", "micro.toml", "--out", "run"]);
    std::os::unix::fs::symlink(root().join("tests/golden/hf_mlp"), folder.path("published"))
        .expect("a temporary folder");
    folder
}

/// A pipe that nobody reads.
fn closed() -> Stdio {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    writer.into()
}

fn full() -> Stdio {
    File::options().write(true).open("/dev/full").expect("the device is there").into()
}

#[test]
fn a_bench_says_where_the_time_of_a_step_goes() {
    let folder = Folder::with_micro();
    let bench = ["bench", "micro.toml", "--device", "cpu", "--steps", "2"];
    let measured: serde_json::Value =
        serde_json::from_str(&folder.succeed(&[&bench[..], &["--json"]].concat()).out).expect("one object");
    let rows = measured["profile"]["rows"].as_array().expect("a list");
    let of = |row: &serde_json::Value, key: &str| row[key].as_f64().expect("a number");
    let row = |name: &str| rows.iter().find(|row| row["name"] == name).unwrap_or_else(|| panic!("{name}: {measured}"));
    for name in ["linear", "gradient of linear", "attention"] {
        assert!(of(row(name), "ms") > 0.0 && of(row(name), "flops") > 0.0, "{measured}");
    }
    // Products are all that a model's operations count, whoever asks for them.
    let counted: f64 = rows.iter().map(|row| of(row, "flops")).sum();
    let model = 1e9 * of(&measured, "gflop_per_image") * of(&measured, "batch");
    assert!((counted / model - 1.0).abs() < 0.2, "{counted} operations of {model}: {measured}");
    let table = folder.succeed(&bench).out;
    assert!(table.contains("operation by operation") && table.contains("gradient of attention"), "{table}");
}

#[test]
fn output_that_nobody_can_read_ends_no_work() {
    let folder = folder();
    for (i, args) in WORK.into_iter().enumerate() {
        for (place, out, err) in [("closed", closed(), closed()), ("full", full(), full())] {
            let name = format!("{place}-{i}");
            let mut command = folder.command(&[args, &[&name]].concat());
            let status = command.stdout(out).stderr(err).status().expect("the program starts");
            assert_eq!(status.code(), Some(0), "{args:?} into a {place} output");
            assert!(folder.path(&name).is_dir(), "{args:?} into a {place} output");
        }
    }
}

#[test]
fn a_product_that_nobody_reads_is_no_failure_and_one_that_is_lost_is() {
    let folder = folder();
    for args in PRODUCT {
        let run = |out: Stdio| -> Ended {
            let child = folder.command(args).stdout(out).stderr(Stdio::piped()).spawn().expect("the program starts");
            child.wait_with_output().expect("it was started").into()
        };
        let ended = run(closed());
        assert_eq!(ended.code, 0, "{args:?} into a closed pipe: {}", ended.err);
        assert!(!ended.err.contains("error"), "{args:?} into a closed pipe: {}", ended.err);
        let ended = run(full());
        assert_eq!(ended.code, 1, "{args:?} into a full device: {}", ended.err);
        assert!(args == ["--help"] || ended.err.contains("cannot write to stdout"), "{args:?}: {}", ended.err);
    }
}

#[test]
fn a_reader_that_goes_away_in_the_middle_does_not_stop_a_run() {
    let folder = Folder::with_micro();
    let args =
        ["train", "micro.toml", "--out", "run", "--set", "probes.cls_patch_cosine={ enabled = true, every = 1 }"];
    let (mut reader, writer) = std::io::pipe().expect("a pipe");
    let mut command = folder.command(&args);
    let mut child = command.stdout(Stdio::null()).stderr(writer).spawn().expect("the program starts");
    drop(command);
    let mut byte = [0];
    reader.read_exact(&mut byte).expect("it says something");
    drop(reader);
    assert_eq!(child.wait().expect("it was started").code(), Some(0));
    assert!(folder.path("run/result.json").exists());
}

#[test]
fn a_log_file_is_told_what_is_run_and_how_far_it_is() {
    let folder = folder();
    let ended = folder.succeed(&["train", "micro.toml", "--out", "told"]);
    for part in
        ["64 images", "16 held out", "CPU", "f32", "GiB of memory", "12 steps", "told", "step 1 of 12: ", " left"]
    {
        assert!(ended.err.contains(part), "no `{part}` in\n{}", ended.err);
    }
    let ended = folder.succeed(&["ablate", "suite.toml", "--out", "suite"]);
    for part in ["64 images", "GiB of memory", "low seed 0: step 1 of 12: ", "0 of 2 runs done", "1 of 2 runs done"] {
        assert!(ended.err.contains(part), "no `{part}` in\n{}", ended.err);
    }
    assert_eq!(ended.err.matches("64 images").count(), 1, "what all runs share is said once:\n{}", ended.err);
}

#[test]
fn names_that_hold_commands_for_a_terminal_are_shown_and_not_sent() {
    let folder = Folder::with_micro();
    for name in ["\x1b[31mred", "two\nlines", "bell\x07"] {
        for args in [
            &["train", "micro.toml", "--out", name][..],
            &["train", name],
            &["recipe", "check", name],
            &["features", name, "--weights", name],
            &["import", name, "--out", "w"],
            &["export", name, "--format", "hf", "--out", "w"],
            &["ablate", name],
        ] {
            let ended = folder.run(args);
            let both = format!("{}{}", ended.out, ended.err);
            assert!(!both.chars().any(|c| c.is_control() && c != '\n'), "{args:?}: {both:?}");
            assert!(!both.contains("two\nlines"), "{args:?}: {both:?}");
        }
    }
}

#[test]
fn train_and_ablate_read_a_set_alike() {
    let folder = folder();
    for set in ["batch.size=[1,", "batch.size=\"4", "nothing", "=1", "steps=1\nseed=2"] {
        let train = folder.run(&["train", "micro.toml", "--out", "never", "--set", set]);
        let ablate = folder.run(&["ablate", "suite.toml", "--out", "never", "--set", set]);
        assert_eq!((train.code, ablate.code), (2, 2), "{set}: {} {}", train.err, ablate.err);
    }
    assert!(!folder.path("never").exists());
}

/// Every place that prints does it through `style`, where nothing can panic.
#[test]
fn nothing_prints_past_the_one_place_for_output() {
    for crate_root in ["core/src/lib.rs", "plugins/src/lib.rs", "ablations/src/lib.rs"] {
        let text = std::fs::read_to_string(root().join(crate_root)).expect("the repository is whole");
        assert!(text.contains("#![warn(clippy::print_stdout, clippy::print_stderr)]"), "{crate_root}");
    }
}
