//! A GPU for tests: the machine's own, or the emulator of `tests/emulator` where there is none.
//!
//! A test written with [`gpu_test!`](crate::gpu_test) runs in this process on a real GPU. Without one, its test program
//! starts itself again for this one test, with the emulator's `libcuda`, `libnvrtc` and `libcublasLt` in the loader's path.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, PoisonError};

/// Set in a process that was started to run on the emulator.
const EMULATED: &str = "CUDA_EMULATED";

/// A test that needs a GPU: `gpu_test!(layer_norm_equals_the_cpu, { ... })`.
#[macro_export]
macro_rules! gpu_test {
    ($(#[$attribute:meta])* $name:ident, $body:block) => {
        $(#[$attribute])*
        #[test]
        fn $name() {
            $crate::emulator::on_gpu(concat!(module_path!(), "::", stringify!($name)), || $body);
        }
    };
}

/// Runs a test's body on a GPU. `test` is the test's path, its crate's name first.
pub fn on_gpu(test: &str, body: impl FnOnce()) {
    if is_emulated() || has_gpu() {
        // One at a time: what is launched while another test records a step would be recorded with it.
        static ALONE: Mutex<()> = Mutex::new(());
        let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        body();
    } else if let Some(ended) = run_emulated(test, &[]) {
        assert!(passed(&ended), "failed on the emulator");
    }
}

/// Whether this process was started to run on the emulator.
pub fn is_emulated() -> bool {
    std::env::var_os(EMULATED).is_some()
}

/// Whether a driver can be loaded and finds a device.
pub fn has_gpu() -> bool {
    // SAFETY: this loads the driver's library, if there is one, and unloads it.
    let driver = unsafe { cudarc::driver::sys::is_culib_present() };
    driver && cudarc::driver::CudaContext::device_count().is_ok_and(|count| count > 0)
}

/// Runs one test of this test program again in a process that has the emulator for a GPU, with more environment, and
/// prints what it said. Nothing if the emulator cannot be built here.
pub fn run_emulated(test: &str, environment: &[(&str, &str)]) -> Option<Output> {
    let (_, name) = test.split_once("::").expect("a test's path begins with its crate");
    let mut command = Command::new(std::env::current_exe().expect("a running program has a path"));
    command.args([name, "--exact", "--nocapture"]).env(EMULATED, "1");
    let output = emulate(&mut command, environment)?.output().expect("a running program can be started again");
    print!("{}", String::from_utf8_lossy(&output.stdout));
    eprint!("{}", String::from_utf8_lossy(&output.stderr));
    Some(output)
}

/// Gives a program that is yet to be started the emulator for a GPU: with a driver that has the functions of CUDA 12.0
/// alone if the environment has CUDA_EMULATOR_DRIVER. Nothing if the emulator cannot be built here.
pub fn emulate<'a>(command: &'a mut Command, environment: &[(&str, &str)]) -> Option<&'a mut Command> {
    let libraries = library_path()?;
    let old = environment.iter().any(|(name, _)| *name == "CUDA_EMULATOR_DRIVER").then(|| libraries.join("old"));
    let folders: Vec<PathBuf> = old.into_iter().chain([libraries.clone()]).collect();
    command
        .env("LD_LIBRARY_PATH", before_library_path(folders))
        // Kernels that were compiled for the emulator are nobody else's.
        .env("XDG_CACHE_HOME", libraries.join("cache"))
        .envs(environment.iter().copied());
    Some(command)
}

/// Whether the one test that a process was started for ran and passed.
pub fn passed(ended: &Output) -> bool {
    ended.status.success() && String::from_utf8_lossy(&ended.stdout).contains("1 passed")
}

fn before_library_path(folders: Vec<PathBuf>) -> OsString {
    let others = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    std::env::join_paths(folders.into_iter().chain(std::env::split_paths(&others)))
        .expect("paths of a library path have no colon")
}

/// The folder of the emulator's libraries, built if no build of these sources is there yet. Nothing, with the reason
/// printed, where there is no g++ or another machine than x86-64.
pub fn library_path() -> Option<PathBuf> {
    if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
        println!("skipped: the CUDA emulator needs Linux on x86-64");
        return None;
    }
    if Command::new("g++").arg("--version").output().is_err() {
        println!("skipped: no GPU, and the CUDA emulator needs g++");
        return None;
    }
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("emulator");
    let Some(builds) = target().map(|target| target.join("emulator")) else {
        println!("skipped: the CUDA emulator is built beside the test programs, in cargo's folder");
        return None;
    };
    std::fs::create_dir_all(&builds).expect("the target folder can be written");
    let lock = File::create(builds.join("lock")).expect("the target folder can be written");
    lock.lock().expect("files of the target folder can be locked");
    let folder = builds.join(hash(&sources));
    if !folder.is_dir() {
        // Under another name until it is whole.
        let unfinished = builds.join("unfinished");
        let built = Command::new(sources.join("build.sh")).arg(&unfinished).output().expect("bash runs build.sh");
        assert!(
            built.status.success(),
            "the CUDA emulator does not build:\n{}",
            String::from_utf8_lossy(&built.stderr)
        );
        std::fs::rename(&unfinished, &folder).expect("a folder can be renamed");
    }
    Some(folder)
}

/// Cargo's target folder, in which this program lies, unless it was carried elsewhere.
fn target() -> Option<PathBuf> {
    let program = std::env::current_exe().expect("a running program has a path");
    program.ancestors().find(|folder| folder.join("CACHEDIR.TAG").is_file()).map(Path::to_path_buf)
}

fn hash(folder: &Path) -> String {
    let mut hasher = blake3::Hasher::new();
    for entry in walkdir::WalkDir::new(folder).sort_by_file_name() {
        let entry = entry.expect("the emulator's sources can be read");
        if entry.file_type().is_file() {
            hasher.update(entry.file_name().as_encoded_bytes());
            hasher.update(&std::fs::read(entry.path()).expect("the emulator's sources can be read"));
        }
    }
    hasher.finalize().to_hex()[..16].to_string()
}
