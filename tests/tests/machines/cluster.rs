//! A suite over several processes: side by side, as a list of commands, as an Indexed Job, as jobs of a real Slurm. However it
//! is run, its numbers are those of one process.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use dinolab_tests::program::{assert_same_weights, root, signal, wait_until, Ended, Folder};
use serde_json::Value;

const SUITE: &str = r#"
name = "lr"
base = "micro.toml"
seeds = [0, 1]
metrics = ["loss/total"]
baseline = "slow"
[[arm]]
name = "slow"
set = { "optimizer.lr" = 1e-3 }
[[arm]]
name = "fast"
set = { "optimizer.lr" = 2e-3 }
"#;

const TRUNK: &str = "[trunk]\nsteps = 7\nset = { \"checkpoint.every\" = 3 }\n[[arm]]";
/// An arm whose second step is not finite.
const SPIKE: &str = r#""losses.toy_spike.plugin" = "toy_spike", "losses.toy_spike.at_step" = 1"#;
const RUNS: [&str; 4] = ["arms/slow/seed-0", "arms/fast/seed-0", "arms/slow/seed-1", "arms/fast/seed-1"];

/// A folder with the suite, changed, and the folder `whole` of its runs by one process.
fn lab(change: impl Fn(&str) -> String) -> Folder {
    let folder = Folder::with_micro();
    folder.write("suite.toml", &change(SUITE));
    folder.succeed(&["ablate", "suite.toml", "--out", "whole"]);
    folder
}

fn ablate<'a>(out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["ablate", "suite.toml", "--out", out], more].concat()
}

fn comparisons(folder: &Folder, out: &str) -> Value {
    let summary: Value = serde_json::from_str(&folder.read(&format!("{out}/summary.json"))).expect("JSON");
    summary["comparisons"].clone()
}

/// The runs and the report in `out` are those of one process.
fn assert_same(folder: &Folder, out: &str) {
    for run in RUNS {
        assert_same_weights(folder, &format!("whole/{run}"), &format!("{out}/{run}"), 12);
        let recipe = |out: &str| {
            let mut recipe: toml::Table = folder.read(&format!("{out}/{run}/recipe.toml")).parse().expect("TOML");
            // Where the trunk lies.
            recipe.remove("continue_from");
            recipe
        };
        assert!(recipe("whole") == recipe(out), "{run} of {out} was run by another recipe");
    }
    assert_eq!(comparisons(folder, "whole"), comparisons(folder, out));
}

/// The processes that `child` started and that run.
fn workers(child: &Child) -> Vec<u32> {
    let path = format!("/proc/{0}/task/{0}/children", child.id());
    let text = fs::read_to_string(path).unwrap_or_default();
    text.split_whitespace().map(|id| id.parse().expect("a number")).collect()
}

#[test]
fn runs_side_by_side_give_the_numbers_and_the_report_of_one_process() {
    let folder = lab(str::to_string);
    let ended = folder.succeed(&ablate("two", &["--parallel", "2"]));
    assert_same(&folder, "two");
    assert!(ended.out.contains("report: two/report.html"), "{}", ended.out);
    assert!(folder.read("two/arms/fast/seed-1/run.log").contains("loss/total"), "its log lies in the run's folder");
    assert!(!folder.path("two/trials").exists(), "trials that went well leave nothing");
    let again = folder.succeed(&ablate("two", &["--parallel", "2"]));
    assert!(!again.err.contains("steps in"), "nothing is done twice: {}", again.err);
}

#[test]
fn arms_side_by_side_wait_for_their_trunk() {
    let folder = lab(|suite| suite.replacen("[[arm]]", TRUNK, 1));
    folder.succeed(&ablate("three", &["--parallel", "3"]));
    assert_same(&folder, "three");
    for seed in 0..2 {
        assert_same_weights(&folder, &format!("whole/trunk/seed-{seed}"), &format!("three/trunk/seed-{seed}"), 7);
    }
}

#[test]
fn a_broken_arm_stops_runs_side_by_side_before_they_begin() {
    let folder = Folder::with_micro();
    let broken = SUITE.replace("\"optimizer.lr\" = 2e-3", SPIKE);
    folder.write("suite.toml", &broken);
    let ended = folder.run(&ablate("out", &["--parallel", "2"]));
    assert_eq!(ended.code, 2, "{}{}", ended.out, ended.err);
    for part in ["fast", "is not finite", "no run was begun", "--smoke-steps 0"] {
        assert!(ended.err.contains(part), "no `{part}` in {}", ended.err);
    }
    assert!(!folder.path("out/arms").exists());
}

#[test]
fn a_signal_stops_all_that_run_side_by_side_and_they_go_on() {
    let folder = lab(|suite| suite.replace("seeds =", "set.steps = 120\nseeds ="));
    let args = ablate("two", &["--parallel", "2"]);
    let mut child = folder.start(&args);
    let saved = |run: &str| folder.path(&format!("two/{run}/checkpoints")).exists();
    wait_until(&mut child, || saved(RUNS[0]) && saved(RUNS[1]));
    let running = workers(&child);
    signal(&child, "TERM");
    let ended: Ended = child.wait_with_output().expect("it was started").into();
    assert_eq!(ended.code, 75, "{}{}", ended.out, ended.err);
    assert!(ended.out.contains("0 of 4 runs are finished; go on with the same command"), "{}", ended.out);
    assert!(running.len() == 2 && running.iter().all(|id| !Path::new(&format!("/proc/{id}/exe")).exists()));
    let status = folder.succeed(&ablate("two", &["--status"])).out;
    assert!(status.contains("0 finished, 2 begun, 2 pending, 0 failed"), "{status}");
    folder.succeed(&args);
    for run in RUNS {
        assert_same_weights(&folder, &format!("whole/{run}"), &format!("two/{run}"), 120);
    }
}

/// Runs the suite of long runs on two processes and kills one of them.
fn kill_a_worker(folder: &Folder, args: &[&str]) -> Ended {
    let mut child = folder.start(args);
    wait_until(&mut child, || folder.path("two/arms/slow/seed-0/checkpoints").exists());
    let slow = |id: &u32| {
        let line = fs::read_to_string(format!("/proc/{id}/cmdline")).unwrap_or_default();
        line.contains("arms/slow/seed-0")
    };
    let victim = workers(&child).into_iter().find(slow).expect("the first run goes on");
    assert!(Command::new("kill").args(["-KILL", &victim.to_string()]).status().expect("there is kill").success());
    child.wait_with_output().expect("it was started").into()
}

#[test]
fn a_process_that_dies_is_told_and_its_run_goes_on_when_it_is_tried_again() {
    let long = |suite: &str| suite.replace("seeds =", "set.steps = 120\nseeds =");
    let folder = lab(long);
    let args = ablate("two", &["--parallel", "2"]);
    let ended = kill_a_worker(&folder, &args);
    assert_eq!(ended.code, 1, "{}{}", ended.out, ended.err);
    assert!(ended.err.contains("failed: arms/slow/seed-0") && ended.err.contains("signal 9"), "{}", ended.err);
    assert!(folder.path("two/arms/fast/seed-1/result.json").exists(), "the others went on");
    assert_eq!(folder.run(&args).code, 1, "it stays failed");
    folder.succeed(&[&args[..], &["--retry-failed"]].concat());
    assert_same_weights(&folder, "whole/arms/slow/seed-0", "two/arms/slow/seed-0", 120);

    // With a budget it is tried again by itself, and the report says so.
    fs::remove_dir_all(folder.path("two")).expect("it is there");
    folder.write("suite.toml", &long(SUITE).replace("seeds =", "retries = 1\nseeds ="));
    let ended = kill_a_worker(&folder, &args);
    assert_eq!(ended.code, 0, "{}{}", ended.out, ended.err);
    assert_same_weights(&folder, "whole/arms/slow/seed-0", "two/arms/slow/seed-0", 120);
    assert!(folder.read("two/summary.md").contains("slow seed 0 was tried again after: its process ended by signal 9"));
}

#[test]
fn a_list_of_commands_does_the_suite_and_its_trunks_come_first() {
    let folder = lab(|suite| suite.replacen("[[arm]]", TRUNK, 1));
    let list = || folder.succeed(&ablate("listed", &["--on", "list"]));
    for (runs, said) in [(2, "when they are done"), (4, "")] {
        let listed = list();
        assert!(listed.err.contains(said), "{}", listed.err);
        let lines: Vec<&str> = listed.out.lines().collect();
        assert_eq!(lines.len(), runs, "{}", listed.out);
        for line in lines {
            let ended = Command::new("sh").args(["-c", line]).current_dir("/").env_remove("DINOLAB_GOLDEN").output();
            assert!(ended.expect("there is a shell").status.success(), "{line}");
        }
    }
    assert!(list().out.contains("nothing to hand over"));

    // A command that waited while the suite was edited does not run another recipe.
    let waiting = folder.succeed(&ablate("edited", &["--on", "list"])).out;
    folder.write("suite.toml", &SUITE.replacen("[[arm]]", &format!("set.batch.size = 6\n{TRUNK}"), 1));
    let edited = Command::new("sh").args(["-c", waiting.lines().next().expect("a line")]).output();
    let edited: Ended = edited.expect("there is a shell").into();
    assert_eq!(edited.code, 2, "{}", edited.err);
    assert!(edited.err.contains("trunk seed 0 has another recipe than when the suite was submitted"), "{}", edited.err);
    folder.write("suite.toml", &SUITE.replacen("[[arm]]", TRUNK, 1));
    folder.succeed(&ablate("listed", &["--report"]));
    assert_same(&folder, "listed");
}

#[test]
fn an_indexed_job_has_an_index_a_run_and_the_codes_that_mean_again_and_never() {
    let folder = Folder::with_micro();
    folder.write("suite.toml", SUITE);
    let args = ["--on", "kubernetes", "--image", "registry/dinolab:1", "--queue", "gpus", "--parallel", "2"];
    let manifest: Value = serde_json::from_str(&folder.succeed(&ablate("out", &args)).out).expect("JSON");
    let here = fs::canonicalize(folder.path(".")).expect("it is there").display().to_string();
    let script = format!(
        "set -- {}; shift \"$JOB_COMPLETION_INDEX\"; exec dinolab ablate {here}/suite.toml --out {here}/out --run \"$1\"",
        RUNS.join(" ")
    );
    let exit = |action: &str, codes: &[u32]| serde_json::json!({ "action": action, "onExitCodes": { "containerName": "dinolab", "operator": "In", "values": codes } });
    let expected = serde_json::json!({
        "apiVersion": "batch/v1", "kind": "Job",
        "metadata": { "generateName": "lr-", "labels": { "kueue.x-k8s.io/queue-name": "gpus" } },
        "spec": {
            "completionMode": "Indexed", "completions": 4, "parallelism": 2, "suspend": true,
            "backoffLimitPerIndex": 6, "podReplacementPolicy": "Failed",
            "podFailurePolicy": { "rules": [
                { "action": "Ignore", "onPodConditions": [{ "type": "DisruptionTarget" }] },
                exit("Ignore", &[75]), exit("FailIndex", &[1, 2]),
            ] },
            "template": { "spec": {
                "restartPolicy": "Never", "terminationGracePeriodSeconds": 120,
                "containers": [{
                    "name": "dinolab", "image": "registry/dinolab:1", "workingDir": here, "command": ["/bin/sh", "-c", script],
                    "resources": {}, "volumeMounts": [{ "name": "work", "mountPath": here }],
                }],
                "volumes": [{ "name": "work", "persistentVolumeClaim": { "claimName": "dinolab" } }],
            } },
        },
    });
    assert_eq!(manifest, expected);
}

/// Programs of the names of Slurm's that do what `scripts` say.
fn fake_slurm(folder: &Folder, scripts: &[(&str, &str)]) -> String {
    let bin = folder.path("bin");
    fs::create_dir_all(&bin).expect("a temporary folder");
    for (name, script) in scripts {
        fs::write(bin.join(name), format!("#!/bin/sh\n{script}\n")).expect("a temporary folder");
        fs::set_permissions(bin.join(name), fs::Permissions::from_mode(0o755)).expect("it was just written");
    }
    format!("{}:{}", bin.display(), std::env::var("PATH").expect("there is a PATH"))
}

#[test]
fn a_job_without_a_number_is_an_error_and_what_was_submitted_before_is_cancelled() {
    let folder = Folder::with_micro();
    folder.write("suite.toml", SUITE);
    let path = fake_slurm(
        &folder,
        &[
            ("sbatch", "case \"$*\" in *runs.sh) ;; *) echo 17 ;; esac"),
            ("scancel", "echo \"$@\" > cancelled"),
            ("scontrol", "echo 'MaxArraySize            = 1001'"),
        ],
    );
    let ended = folder.run_with(&[("PATH", &path)], &ablate("out", &["--on", "slurm"]));
    assert_eq!(ended.code, 2, "{}{}", ended.out, ended.err);
    assert!(ended.err.contains("sbatch runs.sh: it gave no number of a job"), "{}", ended.err);
    assert_eq!(folder.read("cancelled").trim(), "17");
}

#[test]
fn a_dry_run_shows_scripts_and_chunks_and_submits_nothing() {
    let folder = Folder::with_micro();
    folder.write("suite.toml", SUITE);
    let path = fake_slurm(&folder, &[("scontrol", "echo 'MaxArraySize            = 3'"), ("sbatch", "exit 1")]);
    let args =
        ["--on", "slurm", "--dry-run", "--slurm", "time=1:00:00", "--slurm", "signal=USR2@60", "--parallel", "2"];
    let ended = folder.run_with(&[("PATH", &path)], &ablate("out", &args));
    assert_eq!(ended.code, 0, "{}", ended.err);
    for part in [
        "#SBATCH --time=1:00:00",
        "#SBATCH --signal=USR2@60",
        "#SBATCH --requeue",
        "srun -K ",
        "--parsable --array=0-1%2 ",
        "--parsable --array=0-2%2 --dependency=afterok:<job 1> --kill-on-invalid-dep=yes",
        "--parsable --array=0-0%2 --dependency=afterok:<job 1>,afterany:<job 2> --kill-on-invalid-dep=yes",
        "runs.sh 3    # <job 3>",
        "--dependency=afterok:<job 1>,afterany:<job 2>:<job 3>",
    ] {
        assert!(ended.out.contains(part), "no `{part}` in\n{}", ended.out);
    }
    assert!(!ended.out.contains("USR2@120"), "an option of the user's replaces the default");
    let path = fake_slurm(&folder, &[("scontrol", "echo 'MaxArraySize            = 1'"), ("sbatch", "exit 1")]);
    let one = folder.run_with(&[("PATH", &path)], &ablate("out", &["--on", "slurm", "--dry-run"])).out;
    assert!(one.contains("trial.sh 1    # <job 2>") && one.contains("runs.sh 3    # <job 6>"), "{one}");
    assert!(!folder.path("out").exists());
}

#[test]
fn an_option_that_a_scheduler_takes_no_notice_of_is_refused() {
    let folder = Folder::with_micro();
    folder.write("suite.toml", SUITE);
    for (args, said) in [
        (&["--on", "list", "--parallel", "2"][..], "--parallel is"),
        (&["--on", "list", "--image", "x"], "--image is of Kubernetes' jobs"),
        (&["--on", "slurm", "--queue", "x"], "--queue is of Kubernetes' jobs"),
        (&["--on", "slurm", "--fail-fast"], "--fail-fast is"),
        (&["--on", "list", "--slurm", "time=1"], "--slurm is of Slurm's jobs"),
        (&["--on", "slurm", "--slurm", "comment=a\nb"], "an option of sbatch"),
        (&["--report", "--arms", "slow"], "cannot be used with"),
    ] {
        let ended = folder.run(&ablate("out", args));
        assert!(ended.code == 2 && ended.err.contains(said), "{args:?}: {} {}", ended.code, ended.err);
        assert!(!folder.path("out").exists(), "{args:?}");
    }
    let ended = folder.run(&ablate("o\nut", &["--on", "list"]));
    assert!(ended.code == 2 && ended.err.contains("has to be one line"), "{}", ended.err);
}

/// A Slurm of this test's own.
struct Slurm {
    folder: tempfile::TempDir,
}

impl Slurm {
    /// `None`, with a message, where there is none to start.
    fn start() -> Option<Self> {
        let found = |name: &str| {
            let path = std::env::var_os("PATH").unwrap_or_default();
            std::env::split_paths(&path).any(|folder| folder.join(name).exists())
        };
        if let Some(missing) = ["munged", "slurmctld", "slurmd", "sbatch", "srun"].into_iter().find(|name| !found(name))
        {
            println!("skipped: there is no {missing}; `apt-get install slurmctld slurmd slurm-client munge` brings it");
            return None;
        }
        let user = Command::new("id").arg("-u").output().expect("there is an id command");
        if user.stdout.trim_ascii() != b"0" {
            println!("skipped: the daemons of a Slurm of its own are started by root only");
            return None;
        }
        let folder = tempfile::Builder::new().prefix("s").tempdir_in("/tmp").expect("a temporary folder");
        let port = 17_000 + 2 * (std::process::id() % 5_000);
        let slurm = Self { folder };
        let up = slurm.script("up").arg(port.to_string()).output().expect("there is bash");
        assert!(up.status.success(), "{}", String::from_utf8_lossy(&up.stderr));
        Some(slurm)
    }

    fn script(&self, what: &str) -> Command {
        let mut command = Command::new(root().join("tests/slurm.sh"));
        command.arg(what).arg(self.folder.path());
        command
    }

    fn conf(&self) -> String {
        self.folder.path().join("slurm.conf").display().to_string()
    }

    fn ask(&self, program: &str, args: &[&str]) -> String {
        let output = Command::new(program).args(args).env("SLURM_CONF", self.conf()).output();
        String::from_utf8(output.expect("Slurm is installed").stdout).expect("text")
    }

    /// The program with this Slurm, which has to succeed.
    fn ablate(&self, folder: &Folder, out: &str, more: &[&str]) -> Ended {
        let ended = folder.run_with(&[("SLURM_CONF", &self.conf())], &ablate(out, more));
        assert_eq!(ended.code, 0, "{}{}", ended.out, ended.err);
        ended
    }

    /// Waits until the queue has nothing of `jobs` left, or `ready` holds.
    fn wait(&self, folder: &Folder, ready: impl Fn() -> bool) {
        let begin = Instant::now();
        while !ready() {
            if begin.elapsed() > Duration::from_secs(240) {
                let mut logs = Command::new("sh");
                logs.args(["-c", "tail -n 20 */jobs/*/*.log */arms/*/*/run.log"]).current_dir(folder.path("."));
                let logs = logs.output().expect("there is a shell");
                let queue = self.ask("squeue", &["-r"]);
                panic!("nothing happened for four minutes:\n{queue}\n{}", String::from_utf8_lossy(&logs.stdout));
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    fn queue(&self) -> String {
        self.ask("squeue", &["-h", "-r", "-o", "%F_%K %T %j %r"])
    }
}

impl Drop for Slurm {
    fn drop(&mut self) {
        // What does not end shows in the tests' machine, and ends with it.
        let _ = self.script("down").status();
    }
}

#[test]
fn a_suite_on_slurm_gives_the_numbers_of_one_process_through_signals_and_second_submissions() {
    let Some(slurm) = Slurm::start() else { return };
    let folder = lab(|suite| suite.replacen("[[arm]]", TRUNK, 1));
    let given = slurm.ablate(&folder, "out", &["--on", "slurm", "--parallel", "2"]);
    // Four arms are two arrays of at most three indexes.
    assert!(given.out.contains("6 runs submitted") && given.out.matches("(runs.sh)").count() == 2, "{}", given.out);
    let again = slurm.ablate(&folder, "out", &["--on", "slurm"]);
    assert!(
        again.out.contains("6 runs are in the queue") || again.out.contains("4 runs are in the queue"),
        "{}",
        again.out
    );
    assert!(again.out.contains("nothing to hand over"), "{}", again.out);
    let status = slurm.ablate(&folder, "out", &["--status"]).out;
    assert!(status.contains("arms/fast/seed-1") && status.contains("PENDING"), "{status}");
    slurm.wait(&folder, || folder.path("out/report.html").exists() && slurm.queue().is_empty());
    assert_same(&folder, "out");
    let again = slurm.ablate(&folder, "out", &["--on", "slurm"]);
    assert!(again.out.contains("nothing to hand over"), "{}", again.out);

    let long = |suite: &str| suite.replace("seeds =", "set.steps = 800\nset.checkpoint.every = 100\nseeds =");
    folder.write("suite.toml", &long(SUITE));
    folder.succeed(&ablate("long", &["--arms", "slow", "--seeds", "0"]));
    let run = "arms/slow/seed-0";
    let goes_on_after = |out: &str, interrupt: &dyn Fn(), signal: &str| {
        slurm.ablate(&folder, out, &["--on", "slurm", "--arms", "slow", "--seeds", "0", "--smoke-steps", "0"]);
        slurm.wait(&folder, || folder.path(&format!("{out}/{run}/checkpoints")).exists());
        interrupt();
        slurm.wait(&folder, || folder.path(&format!("{out}/{run}/result.json")).exists());
        let log = folder.read(&format!("{out}/{run}/run.log"));
        assert!(log.contains(&format!("{signal}: stops once all is saved")), "{log}");
        assert!(folder.read(&format!("{out}/{run}/events.jsonl")).contains("\"resume\""));
        assert_same_weights(&folder, &format!("long/{run}"), &format!("{out}/{run}"), 800);
        slurm.wait(&folder, || slurm.queue().is_empty());
    };
    // Asked to stop, an index saves, puts itself back into the queue and goes on.
    let ask_to_stop = || {
        let queue = slurm.queue();
        let index =
            queue.lines().find(|line| line.contains("RUNNING")).expect("it runs").split(' ').next().expect("a word");
        slurm.ask("scancel", &["--signal=USR2", index]);
    };
    goes_on_after("asked", &ask_to_stop, "SIGUSR2");
    // Preempted, it saves within its grace time, waits in the queue and goes on.
    let preempt = || {
        slurm.ask("sbatch", &["--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]);
    };
    goes_on_after("preempted", &preempt, "SIGTERM");

    // Cancelled, it saves and stays out of the queue.
    slurm.ablate(&folder, "ended", &["--on", "slurm", "--arms", "slow", "--seeds", "0", "--smoke-steps", "0"]);
    slurm.wait(&folder, || folder.path(&format!("ended/{run}/checkpoints")).exists());
    let ended = slurm.ablate(&folder, "ended", &["--cancel"]);
    assert!(ended.out.contains("2 jobs were taken out of the queue"), "{}", ended.out);
    slurm.wait(&folder, || slurm.queue().is_empty());
    std::thread::sleep(Duration::from_secs(1));
    assert!(slurm.queue().is_empty() && !folder.path(&format!("ended/{run}/result.json")).exists());
    let status = slurm.ablate(&folder, "ended", &["--status"]).out;
    assert!(status.contains("not in the queue any more") && status.contains("submitted again"), "{status}");

    // A broken arm stops the others before they start.
    folder.write("suite.toml", &SUITE.replace("\"optimizer.lr\" = 2e-3", SPIKE));
    slurm.ablate(&folder, "broken", &["--on", "slurm"]);
    slurm.wait(&folder, || slurm.queue().is_empty());
    assert!(!folder.path("broken/arms").exists());
    let logs: Vec<PathBuf> =
        fs::read_dir(folder.path("broken/jobs/1")).expect("it was made").map(|e| e.expect("a file").path()).collect();
    let said = |path: &PathBuf| fs::read_to_string(path).is_ok_and(|text| text.contains("is not finite"));
    assert!(logs.iter().any(said), "the trial's log says why: {logs:?}");
}
