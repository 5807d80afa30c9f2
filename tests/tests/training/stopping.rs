//! Runs and suites that are stopped, killed, or out of disk, at moments drawn at random: nothing that was saved is lost, and
//! what goes on ends as if nothing had happened.
//!
//! `MOMENTS=200` makes the tests that draw moments take as many of each kind; by default they take a few.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use dinolab_core::checkpoint;
use dinolab_core::rng::{Rng, Stream};
use dinolab_tests::program::{assert_same_weights, json, metrics, signal, wait_until, Ended, Folder};

/// How many moments are tried.
fn moments(few: u64) -> u64 {
    let given = std::env::var("MOMENTS").map(|text| text.parse().expect("MOMENTS is a number"));
    given.unwrap_or(few)
}

/// A run that logs, measures and saves at steps that do not coincide.
const RUN: [&str; 14] = [
    "train",
    "micro.toml",
    "--set",
    "steps=40",
    "--set",
    "log.every=3",
    "--set",
    "checkpoint.every=4",
    "--set",
    "losses.gram.enabled=true",
    "--set",
    "probes.cls_patch_cosine={ enabled = true, every = 10 }",
    "--resume",
    "--out",
];

fn run(out: &str) -> Vec<&str> {
    RUN.into_iter().chain([out]).collect()
}

/// A run that went on is the one that was never stopped: weights, log and result, and nothing is left behind. Its
/// checkpoints are the newest of those of the whole run and of the one at step `stopped`, if a signal made it save there.
fn assert_same_run(folder: &Folder, whole: &str, other: &str, stopped: Option<u64>) {
    assert_same_weights(folder, whole, other, 40);
    assert_eq!(metrics(folder, whole), metrics(folder, other), "{other}");
    let result = |run: &str| json(folder, &format!("{run}/result.json"))["metrics"].clone();
    assert_eq!(result(whole), result(other), "{other}");
    let names = |run: &str| {
        let entries = fs::read_dir(folder.path(run).join("checkpoints")).expect("the run finished");
        let mut names: Vec<_> = entries.map(|e| e.expect("it can be read").file_name()).collect();
        names.sort();
        names
    };
    let mut expected = names(whole);
    let kept = expected.len();
    expected.extend(stopped.map(|step| format!("step-{step:08}").into()));
    expected.sort();
    expected.dedup();
    assert_eq!(expected[expected.len() - kept..], names(other), "{other}");
}

/// The steps of the newest whole checkpoint.
fn saved(run: &Path) -> u64 {
    checkpoint::load_newest(run).expect("checkpoints are whole").map_or(0, |(newest, passed)| {
        assert!(passed.is_empty(), "a broken checkpoint was left");
        newest.step
    })
}

/// How long it takes to its end.
fn time(folder: &Folder, args: &[&str]) -> Duration {
    let begin = Instant::now();
    folder.succeed(args);
    begin.elapsed()
}

fn draw(seed: u64, index: u64) -> f64 {
    Rng::new(seed, Stream::Plugin, 0, index).uniform(0.0, 1.0)
}

/// Starts the program with its output thrown away.
fn start(folder: &Folder, args: &[&str]) -> Child {
    let mut command = folder.command(args);
    command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().expect("the program starts")
}

#[test]
fn a_run_killed_at_any_moment_goes_on_to_the_same_bits() {
    let folder = Folder::with_micro();
    let mut takes = time(&folder, &run("whole"));
    let (mut kills, mut runs) = (0, 0);
    while kills < moments(8) {
        let out = format!("killed-{runs}");
        let mut before = 0;
        loop {
            let mut child = start(&folder, &run(&out));
            if kills < moments(8) {
                kill_within(&mut child, &mut takes, draw(1, kills));
            }
            let status = child.wait().expect("it was started");
            kills += u64::from(status.signal() == Some(9));
            let now = saved(&folder.path(&out));
            assert!(now >= before, "{out}: {before} steps were saved, and {now} after a kill");
            before = now;
            if status.success() {
                break;
            }
            assert_eq!(status.signal(), Some(9), "{out} failed by itself after {now} steps");
        }
        assert_same_run(&folder, "whole", &out, None);
        fs::remove_dir_all(folder.path(&out)).expect("it is there");
        runs += 1;
    }
    println!("{kills} kills over {runs} runs");
}

/// Kills a program after a share of the time that it takes; that time is found to be less when it ends before.
fn kill_within(child: &mut Child, takes: &mut Duration, share: f64) {
    std::thread::sleep(takes.mul_f64(share));
    match child.try_wait().expect("it was started") {
        None => child.kill().expect("it runs"),
        Some(_) => *takes = takes.mul_f64(0.8),
    }
}

const SUITE: &str = r#"
name = "lr"
base = "micro.toml"
seeds = [0, 1]
metrics = ["loss/total", "probe/cls_patch_cosine/mean"]
baseline = "lr=0.001"
[set]
probes.cls_patch_cosine.enabled = true
[[arm]]
name = "lr=0.001"
set = { "optimizer.lr" = 1e-3 }
[[arm]]
name = "lr=0.002"
set = { "optimizer.lr" = 2e-3 }
"#;

fn ablate(out: &str) -> [&str; 4] {
    ["ablate", "suite.toml", "--out", out]
}

#[test]
fn a_run_killed_after_its_last_checkpoint_and_before_an_older_one_was_removed_removes_it_later() {
    let folder = Folder::with_micro();
    let keeps =
        |keep: &str| folder.succeed(&[&run("run")[..], &["--set", &format!("checkpoint.keep={keep}")]].concat());
    keeps("3");
    // What such a kill leaves: one checkpoint more, and no result.
    fs::remove_file(folder.path("run/result.json")).expect("the run finished");
    keeps("2");
    let mut left: Vec<_> = fs::read_dir(folder.path("run/checkpoints"))
        .expect("the run finished")
        .map(|e| e.unwrap().file_name())
        .collect();
    left.sort();
    assert_eq!(left, ["step-00000036", "step-00000040"]);
}

#[test]
fn a_suite_killed_at_any_moment_goes_on_to_the_same_report() {
    killed_suite(SUITE, &[]);
}

#[test]
fn a_suite_whose_trunk_is_killed_at_any_moment_goes_on_to_the_same_report() {
    let trunk = "[trunk]\nsteps = 7\nset = { \"checkpoint.every\" = 3 }\n[[arm]]";
    killed_suite(&SUITE.replacen("[[arm]]", trunk, 1), &[0, 1]);
}

/// A suite of [`SUITE`]'s arms, killed as often as asked for; `trunks` are the seeds that have one.
fn killed_suite(suite: &str, trunks: &[u64]) {
    let folder = Folder::with_micro();
    folder.write("suite.toml", suite);
    let mut takes = time(&folder, &ablate("whole"));
    let (mut kills, mut suites) = (0, 0);
    while kills < moments(6) {
        let out = format!("killed-{suites}");
        loop {
            let mut child = start(&folder, &ablate(&out));
            if kills < moments(6) {
                kill_within(&mut child, &mut takes, draw(2, kills));
            }
            let status = child.wait().expect("it was started");
            kills += u64::from(status.signal() == Some(9));
            if status.success() {
                break;
            }
            assert_eq!(status.signal(), Some(9), "{out} failed by itself");
        }
        let summary = |out: &str| {
            let mut summary = json(&folder, &format!("{out}/summary.json"));
            // Times and the command differ.
            for arm in summary["arms"].as_array_mut().expect("a list") {
                arm.as_object_mut().expect("a table").retain(|key, _| !key.contains("second"));
                // Recipes of arms say where their trunk lies.
                for run in arm["runs"].as_array_mut().expect("a list").iter_mut().filter(|_| !trunks.is_empty()) {
                    run["recipe_hash"].take();
                }
            }
            let kept = |key: &String| !["seconds", "compute", "provenance"].contains(&key.as_str());
            summary.as_object_mut().expect("a table").retain(|key, _| kept(key));
            // That a run was resumed is said, and is all that differs.
            summary["events"].as_array_mut().expect("a list").retain(|event| event["kind"] != "resume");
            summary
        };
        assert_eq!(summary("whole"), summary(&out));
        for (arm, seed) in [("lr=0.001", 0), ("lr=0.001", 1), ("lr=0.002", 0), ("lr=0.002", 1)] {
            let run = |out: &str| format!("{out}/arms/{arm}/seed-{seed}");
            assert_same_weights(&folder, &run("whole"), &run(&out), 12);
            assert_eq!(metrics(&folder, &run("whole")), metrics(&folder, &run(&out)));
        }
        for seed in trunks {
            let run = |out: &str| format!("{out}/trunk/seed-{seed}");
            assert_same_weights(&folder, &run("whole"), &run(&out), 7);
        }
        let left: Vec<_> =
            fs::read_dir(folder.path(&out)).expect("it is there").map(|e| e.unwrap().file_name()).collect();
        assert!(!left.iter().any(|name| name.to_string_lossy().starts_with('.')), "{left:?}");
        fs::remove_dir_all(folder.path(&out)).expect("it is there");
        suites += 1;
    }
    println!("{kills} kills over {suites} suites");
}

/// A file system of its own in memory, gone with this value.
struct Disk<'a>(&'a Path);

impl<'a> Disk<'a> {
    /// `None`, with a message, where file systems may not be mounted.
    fn mount(path: &'a Path) -> Option<Self> {
        fs::create_dir_all(path).expect("a temporary folder");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=8m", "tmpfs"]).arg(path).output();
        if mounted.is_ok_and(|o| o.status.success()) {
            return Some(Self(path));
        }
        println!("skipped: a file system can be mounted by root only");
        None
    }

    /// Takes all the room but `left` bytes.
    fn fill(&self, left: u64) {
        let mut filler = fs::File::create(self.0.join("filler")).expect("it can be written");
        while std::io::Write::write(&mut filler, &[0; 1 << 14]).is_ok_and(|n| n > 0) {}
        let size = filler.metadata().expect("it was made").len();
        filler.set_len(size.saturating_sub(left)).expect("it is shortened");
    }

    fn free(&self) {
        fs::remove_file(self.0.join("filler")).expect("it was made");
    }
}

impl Drop for Disk<'_> {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg(self.0).status();
        assert!(unmounted.expect("there is umount").success() || std::thread::panicking());
    }
}

#[test]
fn a_disk_that_is_full_at_any_moment_loses_nothing_that_was_saved() {
    let folder = Folder::with_micro();
    folder.succeed(&run("whole"));
    let disk = folder.path("disk");
    let Some(disk) = Disk::mount(&disk) else { return };
    let mut full = 0;
    for moment in 0..20 * moments(4) {
        if full == moments(4) {
            break;
        }
        let out = format!("disk/{moment}");
        let mut child = folder.start(&run(&out));
        // After so many lines of the log, of which there are 14.
        let (lines, log) = ((15.0 * draw(3, moment)) as usize, folder.path(&out).join("metrics.jsonl"));
        while fs::read_to_string(&log).map_or(0, |text| text.lines().count()) < lines {
            if child.try_wait().expect("it was started").is_some() {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let before = saved(&folder.path(&out));
        disk.fill((draw(4, moment) * 400_000.0) as u64);
        let ended: Ended = child.wait_with_output().expect("it was started").into();
        if ended.code != 0 {
            full += 1;
            assert_eq!(ended.code, 1, "{}{}", ended.out, ended.err);
            assert!(ended.err.contains("make room") && ended.err.contains("--resume"), "{}", ended.err);
        }
        assert!(saved(&folder.path(&out)) >= before, "a checkpoint was lost");
        disk.free();
        folder.succeed(&run(&out));
        let copy = format!("copy-{moment}");
        let copied = Command::new("cp").arg("-r").args([folder.path(&out), folder.path(&copy)]).status();
        assert!(copied.expect("there is cp").success());
        assert_same_run(&folder, "whole", &copy, None);
        fs::remove_dir_all(folder.path(&out)).expect("it is there");
        fs::remove_dir_all(folder.path(&copy)).expect("it is there");
    }
    assert_eq!(full, moments(4), "the disk was full too seldom");
    println!("the disk was full at {full} moments");
}

/// Every file of a folder.
fn files(folder: &Path) -> Vec<std::path::PathBuf> {
    let all = walkdir::WalkDir::new(folder).sort_by_file_name().into_iter().map(|e| e.expect("it can be read"));
    all.filter(|e| e.file_type().is_file()).map(walkdir::DirEntry::into_path).collect()
}

#[test]
fn a_run_with_any_byte_of_any_file_damaged_goes_on_or_names_the_file() {
    let folder = Folder::with_micro();
    folder.succeed(&run("whole"));
    let copy = |out: &str| {
        let copied = Command::new("cp").arg("-r").args([folder.path("whole"), folder.path(out)]).status();
        assert!(copied.expect("there is cp").success());
    };
    let mut refused = 0;
    for moment in 0..moments(12) {
        copy("damaged");
        if draw(20, moment) < 0.7 {
            fs::remove_file(folder.path("damaged/result.json")).expect("the run finished");
        }
        let files = files(&folder.path("damaged"));
        let file = &files[(draw(21, moment) * files.len() as f64) as usize];
        let mut bytes = fs::read(file).expect("it can be read");
        let at = (draw(22, moment) * bytes.len() as f64) as usize;
        match (draw(23, moment) * 3.0) as usize {
            0 => bytes.truncate(at),
            1 => bytes.extend(b"\n{\"foreign\": [1, \xff\n"),
            _ => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << (draw(24, moment) * 8.0) as u32),
        }
        fs::write(file, bytes).expect("it can be written");
        let name = file.file_name().expect("a file").to_string_lossy().into_owned();
        let ended = folder.run(&run("damaged"));
        match ended.code {
            0 => assert!(folder.path("damaged/result.json").exists(), "{name}"),
            2 => {
                refused += 1;
                let told = ended.err.contains(&name) || ended.err.contains("other numbers");
                assert!(told, "{name}: {}", ended.err);
            }
            code => panic!("{name} at byte {at}: {code}: {}", ended.err),
        }
        fs::remove_dir_all(folder.path("damaged")).expect("it is there");
    }
    println!("{refused} of {} damaged runs were refused by name", moments(12));
}

#[test]
fn tensorboard_sees_every_step_once_and_in_order_after_a_kill() {
    let folder = Folder::with_micro();
    let args = ["train", "micro.toml", "--set", "steps=60", "--out", "run", "--resume"];
    let mut child = start(&folder, &args);
    wait_until(&mut child, || folder.path("run/checkpoints/step-00000012").exists());
    child.kill().expect("it runs");
    child.wait().expect("it was started");
    folder.succeed(&args);
    let mut steps = Vec::new();
    for file in files(&folder.path("run/tensorboard")) {
        let bytes = fs::read(file).expect("it can be read");
        let mut rest = &bytes[..];
        while rest.len() >= 12 {
            let length = u64::from_le_bytes(rest[..8].try_into().expect("eight bytes")) as usize;
            // The tag of a number, as a string of ten bytes.
            if rest[12..12 + length].windows(12).any(|w| w == b"\x0a\x0aloss/total") {
                // Field 2 of the event, after the nine bytes of the time: the step.
                steps.push(rest[12 + 10]);
            }
            rest = &rest[length + 16..];
        }
    }
    assert_eq!(steps, (1..=60).collect::<Vec<u8>>());
}

/// The signals that ask to stop.
const SIGNALS: [(&str, u32); 5] = [("HUP", 1), ("INT", 2), ("USR1", 10), ("USR2", 12), ("TERM", 15)];

/// Waits until the program answers signals: the first thing it does.
fn wait_for_handlers(child: &mut Child) {
    let status = format!("/proc/{}/status", child.id());
    let catches = |mask: &str| {
        let mask = u64::from_str_radix(mask.trim(), 16).expect("a mask of signals");
        SIGNALS.iter().filter(|(_, number)| mask >> (number - 1) & 1 == 1).count() >= 4
    };
    wait_until(child, || {
        let text = fs::read_to_string(&status).unwrap_or_default();
        text.lines().find_map(|line| line.strip_prefix("SigCgt:")).is_some_and(catches)
    });
}

/// Sends a signal at the given share of the time that the program takes, and gives how it ended.
fn stopped(mut child: Child, name: &str, after: Duration) -> Ended {
    wait_for_handlers(&mut child);
    std::thread::sleep(after);
    if child.try_wait().expect("it was started").is_none() {
        signal(&child, name);
    }
    child.wait_with_output().expect("it was started").into()
}

#[test]
fn every_signal_at_any_moment_saves_a_run_and_says_how_to_go_on() {
    let folder = Folder::with_micro();
    let takes = time(&folder, &run("whole"));
    let mut stops = 0;
    for moment in 0..moments(1) {
        for (i, (name, _)) in SIGNALS.into_iter().enumerate() {
            let out = format!("{name}-{moment}");
            let after = takes.mul_f64(0.7 * draw(5 + i as u64, moment));
            let ended = stopped(folder.start(&run(&out)), name, after);
            if ended.code != 0 {
                stops += 1;
                assert_eq!(ended.code, 75, "{name}: {}{}", ended.out, ended.err);
                assert!(ended.out.contains("go on with the same command and --resume"), "{}", ended.out);
                assert!(ended.err.contains(&format!("SIG{name}")), "{}", ended.err);
            }
            let stopped = (ended.code != 0).then(|| saved(&folder.path(&out)));
            folder.succeed(&run(&out));
            assert_same_run(&folder, "whole", &out, stopped);
            fs::remove_dir_all(folder.path(&out)).expect("it is there");
        }
    }
    assert!(stops > 0, "every run was over before its signal");
}

#[test]
fn every_signal_stops_a_suite_which_says_what_is_done() {
    let folder = Folder::with_micro();
    folder.write("suite.toml", SUITE);
    for (i, (name, _)) in SIGNALS.into_iter().enumerate() {
        let args = ["ablate", "suite.toml", "--out", name, "--set", "steps=60"];
        let ended = stopped(folder.start(&args), name, Duration::from_secs_f64(0.5 * draw(10, i as u64)));
        assert_eq!(ended.code, 75, "{name}: {}{}", ended.out, ended.err);
        assert!(ended.out.contains("runs are finished; go on with the same command"), "{}", ended.out);
    }
}

#[test]
fn what_has_nothing_to_save_ends_with_a_sentence() {
    let folder = Folder::with_micro();
    for (name, _) in SIGNALS {
        let ended =
            stopped(folder.start(&["bench", "micro.toml", "--steps", "1000000"]), name, Duration::from_millis(20));
        assert_eq!(ended.code, 130, "{name}: {}{}", ended.out, ended.err);
        assert!(ended.err.contains("nothing of it was kept"), "{}", ended.err);
    }
}

#[test]
fn a_run_whose_recipe_is_removed_while_it_runs_writes_it_again() {
    let folder = Folder::with_micro();
    let args = [&run("bare")[..], &["--set", "steps=4000"]].concat();
    let mut child = start(&folder, &args);
    wait_until(&mut child, || saved(&folder.path("bare")) >= 4);
    fs::remove_file(folder.path("bare/recipe.toml")).expect("a run has one");
    wait_until(&mut child, || folder.path("bare/recipe.toml").exists());
    let ended = stopped(child, "TERM", Duration::ZERO);
    assert!(ended.code == 75 && folder.read("bare/messages.jsonl").contains("recipe.toml was gone"), "{ended:?}");
    let at = saved(&folder.path("bare"));
    let longer = format!("steps={}", at + 2);
    folder.succeed(&[&run("bare")[..], &["--set", &longer]].concat());
}

#[test]
fn a_second_signal_ends_a_run_at_once_and_loses_nothing_that_was_saved() {
    let folder = Folder::with_micro();
    let args = ["train", "micro.toml", "--set", "steps=2000", "--out", "run"];
    let mut child = folder.start(&args);
    wait_until(&mut child, || folder.path("run/checkpoints/step-00000004").exists());
    // One after the other, faster than a step is saved.
    let id = child.id();
    let both = Command::new("sh").args(["-c", &format!("kill -TERM {id}; kill -INT {id}")]).status();
    assert!(both.expect("there is a shell").success());
    let ended: Ended = child.wait_with_output().expect("it was started").into();
    assert!([75, 130].contains(&ended.code), "{}: {}{}", ended.code, ended.out, ended.err);
    assert!(saved(&folder.path("run")) >= 4);
}

#[test]
fn a_signal_that_was_ignored_at_the_start_stays_ignored() {
    let folder = Folder::with_micro();
    let program = folder.command(&run("run"));
    let mut nohup = Command::new("sh");
    nohup.args(["-c", "trap '' HUP; exec \"$@\"", "sh"]).arg(program.get_program()).args(program.get_args());
    nohup.current_dir(folder.path(".")).stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let mut child = nohup.spawn().expect("there is a shell");
    wait_until(&mut child, || folder.path("run/checkpoints/step-00000004").exists());
    signal(&child, "HUP");
    let ended: Ended = child.wait_with_output().expect("it was started").into();
    assert_eq!(ended.code, 0, "{}{}", ended.out, ended.err);
    assert!(ended.out.contains("finished 40 steps"), "{}", ended.out);
}

#[test]
fn a_run_that_asks_for_no_checkpoints_loses_no_more_than_its_minutes() {
    let folder = Folder::with_micro();
    let train = |steps: u64, out: &str| {
        let steps = format!("steps={steps}");
        let checkpoints = "checkpoint={ minutes = 1e-7, keep = 1 }";
        let args = ["train", "micro.toml", "--set", &steps, "--set", checkpoints, "--resume", "--out", out];
        args.map(String::from)
    };
    let mut child = folder.start(&train(100_000, "killed").each_ref().map(String::as_str));
    let all = || checkpoint::list(&folder.path("killed")).unwrap_or_default();
    wait_until(&mut child, || !all().is_empty());
    let first = all();
    wait_until(&mut child, || all().last() != first.last());
    child.kill().expect("it runs");
    child.wait().expect("it ends");
    let step = saved(&folder.path("killed"));
    assert!(step > 0 && all().len() <= 2, "{:?}", all());
    for out in ["killed", "whole"] {
        folder.succeed(&train(step + 2, out).each_ref().map(String::as_str));
    }
    assert_same_weights(&folder, "killed", "whole", step + 2);
}

#[test]
fn signs_of_failure_are_those_of_the_whole_run() {
    let folder = Folder::with_micro();
    let told = |out: &str, parts: &[u64]| {
        for steps in parts {
            let steps = format!("steps={steps}");
            let sets = [&steps, "log.every=1", "optimizer.lr=0.0", "losses.dino.head.prototype_std=0.001"];
            let run = ["train", "micro.toml", "--device", "cpu", "--resume", "--out", out];
            folder.succeed(&run.into_iter().chain(sets.into_iter().flat_map(|set| ["--set", set])).collect::<Vec<_>>());
        }
        let messages = folder.read(&format!("{out}/messages.jsonl"));
        let messages = messages.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).expect("JSON"));
        let signs = messages.filter(|message| message["kind"] == "uniform");
        signs.map(|message| format!("{} {}", message["step"], message["text"])).collect::<Vec<_>>()
    };
    let whole = told("whole", &[9]);
    assert!(whole.len() == 1 && whole[0].contains("uniform collapse"), "{whole:?}");
    assert_eq!(told("parts", &[4, 6, 9]), whole);
}
