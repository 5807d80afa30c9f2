//! The program on several processes, joined by the MPI libraries that are here: Open MPI (Debian's `openmpi-bin`) and MPICH
//! (`pip install mpich`), the latter by its own binary interface and by the standard's; and by `torchrun`'s store.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use dinolab_plugins as _;
use dinolab_tests::emulator;
use dinolab_tests::program::{assert_same_weights, json, metrics, root, signal, wait_until, Ended, Folder};

/// A launcher, and the library that its processes open.
struct Mpi {
    name: &'static str,
    launcher: PathBuf,
    library: Option<PathBuf>,
    /// The signal that it hands on as it is.
    stops_by: &'static str,
}

/// Those that are here; says which are not.
fn found() -> Vec<Mpi> {
    let python = std::env::var_os("DINOLAB_PYTHON").map(PathBuf::from);
    let environment = python.unwrap_or_else(|| root().join("target/python/bin/python"));
    let environment = environment.parent().and_then(|bin| bin.parent()).expect("bin/python").to_path_buf();
    let mpich = |library: &str| Some(environment.join("lib").join(library));
    let hydra = || environment.join("bin/mpiexec");
    let all = [
        Mpi { name: "Open MPI", launcher: "mpirun".into(), library: None, stops_by: "USR2" },
        Mpi { name: "MPICH", launcher: hydra(), library: mpich("libmpi.so.12"), stops_by: "TERM" },
        Mpi { name: "MPI ABI", launcher: hydra(), library: mpich("libmpi_abi.so.1"), stops_by: "TERM" },
    ];
    let works = |mpi: &Mpi| {
        let ends = |command: &mut Command| command.arg("--version").output().is_ok_and(|o| o.status.success());
        let here = mpi.library.as_ref().is_none_or(|library| library.exists());
        let found = here && ends(&mut Command::new(&mpi.launcher));
        if !found {
            println!("skipped: {} is not here: apt-get install openmpi-bin, and pip install mpich", mpi.name);
        }
        found
    };
    all.into_iter().filter(works).collect()
}

impl Mpi {
    /// The program on `world` processes, not yet started.
    fn command(&self, folder: &Folder, world: usize, args: &[&str]) -> Command {
        let mut command = Command::new(&self.launcher);
        command.args(["-n", &world.to_string(), env!("CARGO_BIN_EXE_with_plugins")]).args(args);
        command.current_dir(folder.path("")).stdin(Stdio::null()).env("RAYON_NUM_THREADS", "1");
        // As root and on two cores, on this machine alone.
        let open_mpi = [
            ("OMPI_ALLOW_RUN_AS_ROOT", "1"),
            ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"),
            ("OMPI_MCA_rmaps_base_oversubscribe", "1"),
            ("OMPI_MCA_hwloc_base_binding_policy", "none"),
            ("OMPI_MCA_mpi_yield_when_idle", "1"),
            ("OMPI_MCA_pml", "ob1"),
            ("OMPI_MCA_btl", "self,vader"),
            ("OMPI_MCA_oob_tcp_if_include", "lo"),
            ("UCX_NET_DEVICES", "lo"),
        ];
        command.envs(open_mpi);
        if let Some(library) = &self.library {
            command.env("DINOLAB_MPI", library);
        }
        command
    }

    fn run(&self, folder: &Folder, world: usize, args: &[&str]) -> Ended {
        self.command(folder, world, args).output().expect("the launcher starts").into()
    }

    fn start(&self, folder: &Folder, world: usize, args: &[&str]) -> Child {
        let mut command = self.command(folder, world, args);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the launcher starts")
    }
}

/// A run of four shards, with all losses.
fn run<'a>(out: &'a str, sets: &[&'a str]) -> Vec<&'a str> {
    run_on("cpu", out, sets)
}

fn run_on<'a>(device: &'a str, out: &'a str, sets: &[&'a str]) -> Vec<&'a str> {
    let all = ["batch.micro_batches=4", "batch.shards=4", "losses.gram.enabled=true", "losses.koleo.enabled=false"];
    let named = |set: &&str| !sets.iter().any(|own| own.split('=').next() == set.split('=').next());
    let sets = all
        .into_iter()
        .filter(named)
        .chain(["probes.cls_patch_cosine={ enabled = true, every = 5 }"])
        .chain(sets.iter().copied());
    ["train", "micro.toml", "--device", device, "--resume", "--out", out]
        .into_iter()
        .chain(sets.flat_map(|set| ["--set", set]))
        .collect()
}

/// Whether processes of this program still run with this word among their arguments.
fn running(word: &str) -> Vec<u32> {
    let processes = fs::read_dir("/proc").expect("Linux").filter_map(Result::ok);
    let numbered = processes.filter_map(|p| p.file_name().to_str()?.parse().ok());
    let of_run = |id: &u32| {
        let read = |name: &str| fs::read_to_string(format!("/proc/{id}/{name}")).unwrap_or_default();
        let args: Vec<String> = read("cmdline").split('\0').map(String::from).collect();
        let dead = read("stat").rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z'));
        !dead && args[0].contains("with_plugins") && args.iter().any(|arg| arg == word)
    };
    numbered.filter(of_run).collect()
}

#[test]
fn processes_write_the_files_of_one() {
    let folder = Folder::with_micro();
    let mpis = found();
    if mpis.is_empty() {
        return;
    }
    folder.succeed(&run("one", &[]));
    for mpi in &mpis {
        for world in [2, 4] {
            let out = format!("{}-{world}", mpi.name.replace(' ', "-"));
            let ended = mpi.run(&folder, world, &run(&out, &[]));
            assert_eq!(ended.code, 0, "{} on {world}: {}{}", mpi.name, ended.out, ended.err);
            assert_same_weights(&folder, "one", &out, 12);
            assert_eq!(metrics(&folder, "one"), metrics(&folder, &out), "{} on {world}", mpi.name);
            // One process speaks.
            assert_eq!(ended.out.matches("finished 12 steps").count(), 1, "{}", ended.out);
        }
    }
}

/// Norms and losses of the engine's sums are those of ours within rounding, on CPUs in both widths and on emulated GPUs; and a rank
/// with another choice, or an engine without sums, is refused.
#[test]
fn gradients_that_the_engine_adds_are_equal_within_rounding() {
    let folder = Folder::with_micro();
    let near = |one: &str, other: &str, tolerance: f64| {
        for (a, b) in metrics(&folder, one).iter().zip(metrics(&folder, other)) {
            for name in ["grad_norm/backbone", "loss/total"] {
                let [a, b] = [a, &b].map(|line| line[name].as_f64().unwrap_or_else(|| panic!("no {name} in {line}")));
                assert!((a / b - 1.0).abs() < tolerance, "{other}: {name} is {b}, expected {a}");
            }
        }
        let run = json(&folder, &format!("{other}/run.json"));
        assert!(run["ranks"]["engine"].as_str().is_some_and(|e| e.contains("adds gradients")), "{run}");
    };
    let mpis = found();
    for (precision, tolerance) in [("f32", 1e-4), ("f64", 1e-12)] {
        let (one, set) = (format!("one-{precision}"), format!("precision={precision}"));
        let sets = ["steps=4", "log.every=1", set.as_str()];
        if !mpis.is_empty() {
            folder.succeed(&run(&one, &sets));
        }
        for mpi in &mpis {
            let out = format!("{}-{precision}", mpi.name.replace(' ', "-"));
            let ended = mpi.run(&folder, 2, &[&run(&out, &sets)[..], &["--reduce", "engine"]].concat());
            assert_eq!(ended.code, 0, "{}: {}{}", mpi.name, ended.out, ended.err);
            near(&one, &out, tolerance);
        }
    }
    let Some(mpi) = mpis.first() else { return };
    let args = run("refused", &["steps=1"]);
    if let Some(mut command) = torchrun(&folder, 2, &[&args[..], &["--reduce", "engine"]].concat()) {
        let ended: Ended = command.output().expect("torchrun starts").into();
        assert!(ended.code != 0 && ended.err.contains("moves bytes and adds no numbers"), "{}", ended.err);
    }
    let mut command = mpi.command(&folder, 1, &args);
    command.args(["--reduce", "engine", ":", "-n", "1", env!("CARGO_BIN_EXE_with_plugins")]).args(&args);
    let ended: Ended = command.output().expect("the launcher starts").into();
    assert!(ended.code != 0 && ended.err.contains("--reduce of rank 1 is not that of rank 0"), "{}", ended.err);
    if emulator::has_gpu() {
        return;
    }
    let sets = ["steps=4", "log.every=1", "batch.micro_batches=2", "batch.shards=2", "precision=f32"];
    let Some(mut alone) =
        emulator::emulate(&mut folder.command(&run_on("cuda", "alone", &sets)), &[]).map(|c| c.output())
    else {
        return;
    };
    assert!(alone.as_mut().expect("it starts").status.success());
    let args = [&run_on("cuda", "engine", &sets)[..], &["--reduce", "engine"]].concat();
    let mut both = mpi.command(&folder, 2, &args);
    let ended: Ended = emulator::emulate(&mut both, &[]).expect("as before").output().expect("it starts").into();
    assert_eq!(ended.code, 0, "{}{}", ended.out, ended.err);
    near("alone", "engine", 1e-4);
}

#[test]
fn checkpoints_in_several_files_are_written_by_all_and_read_by_any_number() {
    let folder = Folder::with_micro();
    let Some(mpi) = found().into_iter().next() else { return };
    let sets = ["backbone.dim=128", "checkpoint.file_mb=1"];
    folder.succeed(&run("one", &sets));
    for (world, steps) in [(4, "steps=4"), (2, "steps=12")] {
        let ended = mpi.run(&folder, world, &run("several", &[&sets[..], &[steps]].concat()));
        assert_eq!(ended.code, 0, "{}{}", ended.out, ended.err);
    }
    let files = |run: &str| -> BTreeMap<PathBuf, Vec<u8>> {
        let all = fs::read_dir(folder.path(run).join("checkpoints/step-00000012")).expect("it was written");
        let all = all.map(|entry| entry.expect("it is there").path());
        all.map(|path| (path.file_name().expect("a file").into(), fs::read(&path).expect("it can be read"))).collect()
    };
    let (one, several) = (files("one"), files("several"));
    assert!(one.len() > 9, "{:?}", one.keys());
    assert!(one.keys().eq(several.keys()) && one == several);
}

/// On the emulated driver and NCCL, started by either kind of launcher: steps that are recorded and replayed, and those of logged steps, which are not.
#[test]
fn processes_on_gpus_write_the_files_of_one() {
    let folder = Folder::with_micro();
    let Some(mpi) = found().into_iter().next() else { return };
    if emulator::has_gpu() {
        println!("skipped: processes on real GPUs need one each");
        return;
    }
    let sets = [
        "steps=6",
        "batch.micro_batches=2",
        "batch.shards=2",
        "log.every=3",
        "precision=bf16",
        "losses.koleo.enabled=true",
    ];
    // All that a rank has of its part alone: lower halves, of a teacher that is averaged too, and moments in both forms.
    let eight_bit = [
        "optimizer.moments=8bit",
        "optimizer.shard_teachers=true",
        "backbone.dim=64",
        "teachers.gram={ plugin = \"ema\", momentum = 0.9 }",
    ];
    // An image a rank: ranks have other numbers of masked patches, so that kinds of steps come again at other times.
    let uneven = [
        "steps=12",
        "log.every=12",
        "batch.size=4",
        "batch.micro_batches=4",
        "batch.shards=4",
        "losses.koleo.enabled=false",
    ];
    // A head so large that the first rank updates all of the backbone, and thus of a further teacher that is averaged.
    let large = ["losses.dino.head.prototypes=8000", "teachers.gram={ plugin = \"ema\", momentum = 0.9 }"];
    for (kind, world, more) in [("f32", 2, &large[..]), ("8bit", 2, &eight_bit), ("uneven", 4, &uneven)] {
        let (one, several) = (format!("one-{kind}"), format!("several-{kind}"));
        let sets = [&sets, more].concat();
        let mut alone = folder.command(&run_on("cuda", &one, &sets));
        let Some(alone) = emulator::emulate(&mut alone, &[]) else { return };
        let ended: Ended = alone.output().expect("it starts").into();
        assert_eq!(ended.code, 0, "{}{}", ended.out, ended.err);
        let args = run_on("cuda", &several, &sets);
        let by_torchrun = if kind == "8bit" { torchrun(&folder, 2, &args) } else { None };
        let mut all = by_torchrun.unwrap_or_else(|| mpi.command(&folder, world, &args));
        let ended: Ended = emulator::emulate(&mut all, &[]).expect("as before").output().expect("it starts").into();
        assert_eq!(ended.code, 0, "{}{}", ended.out, ended.err);
        assert!(!ended.err.contains("not recorded"), "{}", ended.err);
        assert_same_weights(&folder, &one, &several, if kind == "uneven" { 12 } else { 6 });
        assert_eq!(metrics(&folder, &one), metrics(&folder, &several));
        let run = json(&folder, &format!("{several}/run.json"));
        assert!(
            run["ranks"]["world"] == world && run["ranks"]["engine"].as_str().is_some_and(|e| e.contains("NCCL 2.23"))
        );
    }
    let mut doctor = mpi.command(&folder, 2, &["doctor"]);
    let ended: Ended = emulator::emulate(&mut doctor, &[]).expect("as before").output().expect("it starts").into();
    assert!(ended.code == 0 && ended.out.contains("sum over GPUs") && ended.out.contains("NCCL"), "{}", ended.out);
}

#[test]
fn a_signal_stops_all_and_any_number_goes_on() {
    let folder = Folder::with_micro();
    let long = ["steps=40", "checkpoint.every=100"];
    for mpi in found() {
        let out = format!("stopped-{}", mpi.name.replace(' ', "-"));
        let args = run(&out, &long);
        let log = folder.path(&format!("{out}/metrics.jsonl"));
        let mut child = mpi.start(&folder, 4, &args);
        wait_until(&mut child, || fs::read_to_string(&log).is_ok_and(|text| text.lines().count() >= 3));
        signal(&child, mpi.stops_by);
        let ended: Ended = child.wait_with_output().expect("it ends").into();
        assert_eq!(ended.code, 75, "{}: {}{}", mpi.name, ended.out, ended.err);
        assert!(ended.out.contains("saved; go on"), "{}", ended.out);
        let ended = mpi.run(&folder, 2, &args);
        assert_eq!(ended.code, 0, "{}: {}{}", mpi.name, ended.out, ended.err);
        if !folder.path("whole").exists() {
            folder.succeed(&run("whole", &long));
        }
        assert_same_weights(&folder, "whole", &out, 40);
    }
}

#[test]
fn a_process_that_dies_ends_all_and_nothing_saved_is_lost() {
    let folder = Folder::with_micro();
    for mpi in found() {
        let out = format!("killed-{}", mpi.name.replace(' ', "-"));
        let args = run(&out, &["steps=4000", "checkpoint.every=2"]);
        let mut child = mpi.start(&folder, 2, &args);
        let saved = folder.path(&format!("{out}/checkpoints/step-00000004"));
        wait_until(&mut child, || saved.exists());
        let processes = running(&out);
        assert_eq!(processes.len(), 2, "{}: {processes:?}", mpi.name);
        let killed = Command::new("kill").args(["-KILL", &processes[1].to_string()]).status();
        assert!(killed.expect("there is a kill command").success());
        let begin = Instant::now();
        let ended: Ended = child.wait_with_output().expect("it ends").into();
        assert!(ended.code != 0 && begin.elapsed() < Duration::from_secs(20), "{}: {}", mpi.name, ended.code);
        let begin = Instant::now();
        while !running(&out).is_empty() {
            assert!(begin.elapsed() < Duration::from_secs(20), "{}: processes are left", mpi.name);
            std::thread::sleep(Duration::from_millis(50));
        }
        let newest = fs::read_dir(folder.path(&format!("{out}/checkpoints"))).expect("it saved");
        let steps = newest.filter_map(|e| e.ok()?.file_name().to_str()?.strip_prefix("step-")?.parse::<u64>().ok());
        let done = steps.max().expect("it saved") + 2;
        let on = run(&out, &[]).into_iter().chain(["--set", Box::leak(format!("steps={done}").into_boxed_str())]);
        let ended = folder.run(&on.collect::<Vec<_>>());
        assert_eq!(ended.code, 0, "{}: {}{}", mpi.name, ended.out, ended.err);
        assert_eq!(json(&folder, &format!("{out}/result.json"))["steps"], done);
    }
}

#[test]
fn a_process_that_hangs_is_told_by_those_that_wait_and_ends_all() {
    let folder = Folder::with_micro();
    let Some(mpi) = found().into_iter().next() else { return };
    for device in ["cpu", "cuda"] {
        let out = format!("hangs-{device}");
        // On GPUs most steps move nothing through the engine.
        let sets = ["steps=4000", "checkpoint.every=2", "checkpoint.keep_every=2", "log.every=4000", "precision=f32"];
        let args = run_on(device, &out, &[&sets[..], &["batch.micro_batches=2", "batch.shards=2"]].concat());
        let mut command = mpi.command(&folder, 2, &args);
        command.env("DINOLAB_TIMEOUT", "2").stdout(Stdio::piped()).stderr(Stdio::piped());
        let emulated = device == "cuda";
        if emulated && (emulator::has_gpu() || emulator::emulate(&mut command, &[]).is_none()) {
            continue;
        }
        let mut child = command.spawn().expect("the launcher starts");
        let saved = folder.path(&format!("{out}/checkpoints/step-00000002"));
        wait_until(&mut child, || saved.exists());
        let processes = running(&out);
        let rank_of = |id: &u32| {
            let environment = fs::read_to_string(format!("/proc/{id}/environ")).expect("it runs");
            environment.split('\0').any(|v| v == "OMPI_COMM_WORLD_RANK=1" || v == "PMI_RANK=1")
        };
        let follower = processes.iter().find(|id| rank_of(id)).expect("rank 1 runs").to_string();
        assert!(Command::new("kill").args(["-STOP", &follower]).status().expect("there is a kill command").success());
        let begin = Instant::now();
        let ended: Ended = child.wait_with_output().expect("it ends").into();
        // One that was stopped ends when it is killed.
        drop(Command::new("kill").args(["-KILL", &follower]).status());
        assert!(ended.code != 0 && begin.elapsed() < Duration::from_secs(20), "{}", ended.code);
        assert!(ended.err.contains("rank 0 of 2 on") && ended.err.contains("has waited"), "{}", ended.err);
    }
}

#[test]
fn what_processes_move_is_what_the_cost_says() {
    let folder = Folder::with_micro();
    let Some(mpi) = found().into_iter().next() else { return };
    // So large that the rest of a block of the norm is little of it.
    let model = ["backbone.dim=192", "backbone.depth=4", "backbone.heads=3"];
    let sets = ["batch.micro_batches=2", "batch.shards=2", "losses.koleo.enabled=false"];
    for more in [&[][..], &["optimizer.shard_teachers=true", "losses.gram.enabled=true", "teachers.gram.first_step=0"]]
    {
        let sets: Vec<&str> =
            sets.into_iter().chain(model).chain(more.iter().copied()).flat_map(|set| ["--set", set]).collect();
        let bench = ["bench", "micro.toml", "--device", "cpu", "--steps", "3", "--json"];
        let ended = mpi.run(&folder, 2, &[&bench[..], &sets].concat());
        assert_eq!(ended.code, 0, "{}{}", ended.out, ended.err);
        let line = ended.out.lines().find(|line| line.starts_with('{')).expect("one object");
        let measured =
            serde_json::from_str::<serde_json::Value>(line).expect("JSON")["ranks"]["mib"].as_f64().expect("a number");
        let sets = ["device=cpu"].into_iter().chain(model).chain(more.iter().copied()).map(String::from).collect();
        let overrides = dinolab_core::recipe::Overrides { sets, env: false };
        let raw = dinolab_core::recipe::RawRecipe::load(folder.path("micro.toml")).expect("a recipe");
        let mut recipe =
            dinolab_core::resolved::Resolved::of(raw.with(&overrides).expect("a recipe")).expect("a recipe").recipe;
        (recipe.batch.micro_batches, recipe.batch.shards) = (2, 2);
        let expected =
            dinolab_core::resolved::cost::shared(&recipe, 2).expect("two share it").received / f64::from(1 << 20);
        assert!((measured / expected - 1.0).abs() < 0.05, "{measured} MiB of {expected}");
    }
}

/// The program on processes that `torchrun` starts, if it is here.
fn torchrun(folder: &Folder, world: usize, args: &[&str]) -> Option<Command> {
    let python = std::env::var_os("DINOLAB_PYTHON").map(PathBuf::from);
    let launcher = python.unwrap_or_else(|| root().join("target/python/bin/python")).with_file_name("torchrun");
    if !launcher.exists() {
        println!("skipped: torchrun is not here: pip install torch");
        return None;
    }
    let mut command = Command::new(launcher);
    let world = world.to_string();
    command.args(["--standalone", "--no-python", "--nproc-per-node", &world, env!("CARGO_BIN_EXE_with_plugins")]);
    command.args(args).current_dir(folder.path("")).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.env("RAYON_NUM_THREADS", "1");
    Some(command)
}

#[test]
fn torchrun_starts_processes_that_stop_go_on_and_end_together() {
    let folder = Folder::with_micro();
    let args = run("torchrun", &["steps=40", "checkpoint.every=100"]);
    let Some(mut command) = torchrun(&folder, 4, &args) else { return };
    let log = folder.path("torchrun/metrics.jsonl");
    let mut child = command.spawn().expect("torchrun starts");
    wait_until(&mut child, || fs::read_to_string(&log).is_ok_and(|text| text.lines().count() >= 3));
    signal(&child, "TERM");
    let ended: Ended = child.wait_with_output().expect("it ends").into();
    assert!(ended.out.contains("saved; go on"), "{}{}", ended.out, ended.err);
    let ended: Ended = torchrun(&folder, 2, &args).expect("as before").output().expect("torchrun starts").into();
    assert_eq!(ended.code, 0, "{}{}", ended.out, ended.err);
    assert_eq!(json(&folder, "torchrun/run.json")["ranks"]["engine"], "torchrun's store");
    folder.succeed(&run("whole", &["steps=40", "checkpoint.every=100"]));
    assert_same_weights(&folder, "whole", "torchrun", 40);
    // One that fails says why, and one that dies takes the others with it.
    let begin = Instant::now();
    let mut wrong = torchrun(&folder, 2, &run("wrong", &["batch.shards=1"])).expect("as before");
    let ended: Ended = wrong.output().expect("torchrun starts").into();
    assert!(ended.code != 0 && ended.err.contains("2 processes cannot share batch.shards = 1"), "{}", ended.err);
    assert!(begin.elapsed() < Duration::from_secs(20));
    let mut dies = torchrun(&folder, 2, &run("dies", &["steps=4000", "checkpoint.every=2"])).expect("as before");
    let mut child = dies.spawn().expect("torchrun starts");
    let saved = folder.path("dies/checkpoints/step-00000004");
    wait_until(&mut child, || saved.exists());
    let processes = running("dies");
    let killed = Command::new("kill").args(["-KILL", &processes[1].to_string()]).status();
    assert!(killed.expect("there is a kill command").success());
    let begin = Instant::now();
    let ended: Ended = child.wait_with_output().expect("it ends").into();
    assert!(ended.code != 0 && begin.elapsed() < Duration::from_secs(20), "{:?} {}", begin.elapsed(), ended.err);
}

/// The commands of the book's page on processes, as they are written there.
#[test]
fn the_book_s_commands_work() {
    let page = fs::read_to_string(root().join("book/src/processes.md")).expect("the page");
    let mut commands: Vec<&str> = page.lines().filter(|line| line.starts_with("mpirun ")).collect();
    commands.dedup();
    assert!(commands.len() >= 4, "{commands:?}");
    let folder = Folder::new();
    std::os::unix::fs::symlink(root().join("recipes"), folder.path("recipes")).expect("a folder of its own");
    let Some(mpi) = found().into_iter().find(|mpi| mpi.name == "Open MPI") else { return };
    for line in commands {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [_, "-n", world, "dinolab", args @ ..] = &words[..] else { panic!("{line}") };
        let mut command = mpi.command(&folder, world.parse().expect("a number"), args);
        // The same commands on less.
        command.envs([("DINOLAB_STEPS", "4"), ("DINOLAB_BATCH__SIZE", "8"), ("DINOLAB_DATA__COUNT", "64")]);
        let ended: Ended = command.output().expect("the launcher starts").into();
        assert_eq!(ended.code, 0, "{line}: {}{}", ended.out, ended.err);
        let told = match args[0] {
            "doctor" => "the bits of one process",
            "bench" => "MiB a step in",
            _ => "finished 4 steps",
        };
        assert_eq!(ended.out.matches(told).count(), 1, "{line}: {}{}", ended.out, ended.err);
    }
}

#[test]
fn what_is_wrong_is_said_once_and_nobody_waits() {
    let folder = Folder::with_micro();
    for mpi in found() {
        let say = |args: &[&str], code: i32, words: &[&str]| {
            let begin = Instant::now();
            let ended = mpi.run(&folder, 2, args);
            let said = format!("{} {args:?}: {}{}", mpi.name, ended.out, ended.err);
            assert!(ended.code == code && begin.elapsed() < Duration::from_secs(20), "{} {said}", ended.code);
            words.iter().for_each(|word| assert_eq!(ended.err.matches(word).count(), 1, "`{word}` in {said}"));
        };
        say(&run("x", &["batch.shards=1"]), 2, &["2 processes cannot share batch.shards = 1"]);
        say(&run("x", &["batch.shard=1"]), 2, &["did you mean"]);
        say(&["ablate", "suite.toml"], 2, &["2 processes of a command that is one process's work"]);
        say(&["doctor", "--gpu", "1"], 2, &["--gpu is of one process"]);
        // Ranks with other arguments, or another command.
        let words = |command: &str| command.split(' ').map(String::from).collect::<Vec<_>>();
        let both = |first: &str, second: &str, word: &str| {
            let mut command = mpi.command(&folder, 1, &words(first).iter().map(String::as_str).collect::<Vec<_>>());
            command.args([":", "-n", "1", env!("CARGO_BIN_EXE_with_plugins")]).args(words(second));
            let begin = Instant::now();
            let ended: Ended = command.output().expect("the launcher starts").into();
            let said = format!("{} {second}: {}{}", mpi.name, ended.out, ended.err);
            assert!(ended.code != 0 && begin.elapsed() < Duration::from_secs(20) && said.contains(word), "{said}");
            assert!(!said.contains("panicked"), "{said}");
        };
        let bench = "bench micro.toml --device cpu --steps 2 --set batch.micro_batches=2 --set batch.shards=2";
        both(bench, &format!("{bench} --set optimizer.plugin=muon"), "the recipe of rank 1 is not that of rank 0");
        let train =
            "train micro.toml --device cpu --set steps=2 --set batch.micro_batches=2 --set batch.shards=2 --out y";
        both(train, "doctor", "another command");
    }
    // The library of another launcher: every process would be alone.
    let [open_mpi, mpich, ..] = &found()[..] else { return };
    let mut wrong = mpich.command(&folder, 2, &run("x", &[]));
    let ended: Ended = wrong.env("DINOLAB_MPI", "libmpi.so.40").output().expect("it starts").into();
    assert!(ended.code != 0 && ended.err.contains("says that this is rank 0 of 1"), "{}", ended.err);
    let mut none = open_mpi.command(&folder, 2, &run("x", &[]));
    let ended: Ended = none.env("DINOLAB_MPI", "/nowhere/libmpi.so").output().expect("it starts").into();
    assert!(ended.code != 0 && ended.err.contains("no library of MPI joins them"), "{}", ended.err);
}
