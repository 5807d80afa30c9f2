//! The real program, run in a folder of its own.

use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// A run of a second: a two-block ViT on few small crops, with all losses but Gram, and no probe.
pub const MICRO: &str = r#"
extends = "RECIPES/tiny.toml"
name = "micro"
steps = 12
[backbone]
dim = 32
depth = 2
heads = 2
[data]
count = 64
held_out = 16
size = 48
[batch]
size = 4
[crops]
global_size = 32
local_size = 16
local_count = 2
[losses.dino]
head = { hidden = 32, bottleneck = 16, prototypes = 32 }
[losses.ibot]
head = { hidden = 32, bottleneck = 16, prototypes = 32 }
[teachers.gram]
first_step = 4
refresh = { every = 4 }
crop_size = 48
[optimizer]
lr = 1e-3
freeze_last_layer_steps = 0
[log]
every = 1
[checkpoint]
every = 4
[probes]
knn = { enabled = false }
linear_segmentation = { enabled = false }
patch_similarity = { enabled = false }
cls_patch_cosine = { enabled = false }
"#;

/// The repository's root.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests' crate is in the workspace").to_path_buf()
}

/// The program with the tests' own plugins, which cargo builds beside the test programs.
pub fn with_plugins() -> PathBuf {
    let own = std::env::current_exe().expect("a running program has a path");
    own.ancestors().nth(2).expect("test programs lie in target/release/deps").join("with_plugins")
}

/// A Python that has these modules: that of `DINOLAB_PYTHON`, of `target/python`, or `python3`. Says so when it
/// has not.
pub fn python(modules: &str) -> Option<PathBuf> {
    let own = root().join("target/python/bin/python");
    let given = std::env::var_os("DINOLAB_PYTHON").map(PathBuf::from);
    let python = given.or(own.exists().then_some(own)).unwrap_or_else(|| "python3".into());
    // It looks for them without importing them, which takes seconds.
    let look = "import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, sys.argv[1:])))";
    let found = Command::new(&python).args(["-c", look]).args(modules.split(", ")).output();
    if found.is_ok_and(|o| o.status.success()) {
        return Some(python);
    }
    println!("skipped: {} does not have {modules}; name one that has with DINOLAB_PYTHON", python.display());
    None
}

/// Runs a script of `tests/`, which has to succeed, and gives what it prints.
pub fn script(python: &Path, name: &str, args: &[&Path]) -> String {
    let output = Command::new(python).arg(root().join("tests").join(name)).args(args).output().expect("Python starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// How the program ended and what it said.
#[derive(Debug)]
pub struct Ended {
    /// The exit code, or 128 and the number of the signal that ended it.
    pub code: i32,
    /// What it printed.
    pub out: String,
    /// What it said of errors and progress.
    pub err: String,
}

impl From<Output> for Ended {
    fn from(output: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("the program prints UTF-8");
        let signal = || 128 + output.status.signal().expect("it ended by exiting or by a signal");
        Self { code: output.status.code().unwrap_or_else(signal), out: text(output.stdout), err: text(output.stderr) }
    }
}

/// A temporary folder in which the program runs.
pub struct Folder(tempfile::TempDir);

impl Default for Folder {
    fn default() -> Self {
        Self(tempfile::tempdir().expect("a temporary folder"))
    }
}

impl Folder {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// A folder with [`MICRO`] as micro.toml.
    pub fn with_micro() -> Self {
        let folder = Self::new();
        let recipes = root().join("recipes");
        folder.write("micro.toml", &MICRO.replace("RECIPES", recipes.to_str().expect("a UTF-8 path")));
        folder
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The photographs of `tests/photos` in the folder `name`.
    pub fn add_photos(&self, name: &str) {
        std::fs::create_dir(self.path(name)).expect("the folder can be written");
        for entry in std::fs::read_dir(root().join("tests/photos")).expect("the repository is whole") {
            let photo = entry.expect("it can be read").path();
            let target = self.path(name).join(photo.file_name().expect("it is a file"));
            std::fs::copy(&photo, target).expect("it can be copied");
        }
    }

    /// Writes a file; gives its name as a path.
    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        std::fs::write(self.path(name), text).expect("the folder can be written");
        PathBuf::from(name)
    }

    /// The text of a file.
    pub fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// The program with arguments, not yet started.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(with_plugins());
        command.args(args).current_dir(self.0.path()).stdin(Stdio::null());
        // The tests' own variable; to the program it is a recipe's key.
        command.env_remove("DINOLAB_GOLDEN");
        // What is ignored at the start stays ignored: these tests may run under `nohup`, or behind `&` of a script.
        // SAFETY: signal(2) may be called between fork and exec.
        unsafe {
            command.pre_exec(|| {
                for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGUSR1, libc::SIGUSR2, libc::SIGTERM] {
                    libc::signal(signal, libc::SIG_DFL);
                }
                Ok(())
            })
        };
        command
    }

    /// Runs the program to its end.
    pub fn run(&self, args: &[&str]) -> Ended {
        self.command(args).output().expect("the program starts").into()
    }

    /// Runs the program to its end with more environment.
    pub fn run_with(&self, env: &[(&str, &str)], args: &[&str]) -> Ended {
        self.command(args).envs(env.iter().copied()).output().expect("the program starts").into()
    }

    /// Runs the program, which has to succeed.
    pub fn succeed(&self, args: &[&str]) -> Ended {
        let ended = self.run(args);
        assert_eq!(ended.code, 0, "{args:?}: {}{}", ended.out, ended.err);
        ended
    }

    /// Starts the program.
    pub fn start(&self, args: &[&str]) -> Child {
        self.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts")
    }
}

/// Names and bytes of the files of a run's checkpoint of `step`.
pub fn final_weights(folder: &Folder, run: &str, step: u64) -> Vec<(String, Vec<u8>)> {
    let path = folder.path(run).join(format!("checkpoints/step-{step:08}"));
    ["model.safetensors", "optimizer.safetensors", "state.json"]
        .map(|name| (name.into(), std::fs::read(path.join(name)).unwrap_or_else(|e| panic!("{run}: {name}: {e}"))))
        .into()
}

/// Asserts that checkpoints of two runs are equal to the bit.
pub fn assert_same_weights(folder: &Folder, one: &str, other: &str, step: u64) {
    for ((name, a), (_, b)) in final_weights(folder, one, step).iter().zip(final_weights(folder, other, step)) {
        assert!(*a == b, "{name} of {one} and {other} differ");
    }
}

/// Waits until `ready` holds, for a minute at most and as long as the program runs.
pub fn wait_until(child: &mut Child, ready: impl Fn() -> bool) {
    let begin = Instant::now();
    while !ready() {
        assert!(child.try_wait().expect("it was started").is_none(), "the program ended too early");
        assert!(begin.elapsed() < Duration::from_secs(60), "nothing happened for a minute");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Sends a signal: `TERM`.
pub fn signal(child: &Child, name: &str) {
    let sent = Command::new("kill").args([&format!("-{name}"), &child.id().to_string()]).status();
    assert!(sent.expect("there is a kill command").success());
}

/// The lines of a run's metrics without what differs from machine to machine.
pub fn metrics(folder: &Folder, run: &str) -> Vec<Value> {
    let text = folder.read(&format!("{run}/metrics.jsonl"));
    let line = |line: &str| {
        let mut line: Value = serde_json::from_str(line).expect("a line is an object");
        line.as_object_mut().expect("an object").retain(|name, _| !name.starts_with("throughput/"));
        line
    };
    text.lines().map(line).collect()
}

/// A file of JSON.
pub fn json(folder: &Folder, name: &str) -> Value {
    serde_json::from_str(&folder.read(name)).expect("JSON")
}
