//! Commands that several processes run together, started by torchrun, mpirun, mpiexec or srun.

use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::Duration;

use dinolab_core::comm::{self, host, Comm, Launch, Launcher, Reduction};
use dinolab_core::train::Lead;
use dinolab_core::{Error, Result};

use crate::{cli, signals, style};

/// Who adds the gradients of several processes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Reduce {
    /// Dinolab, in the order of the shards: the same bits on any number of processes
    #[default]
    Ordered,
    /// MPI or NCCL, by its algorithm for the network: results depend on the number of processes, within rounding
    Engine,
}

impl From<Reduce> for Reduction {
    fn from(reduce: Reduce) -> Self {
        match reduce {
            Reduce::Ordered => Self::Ordered,
            Reduce::Engine => Self::Engine,
        }
    }
}

/// Runs `lead`, on rank 0 or in a process that is alone, and `follow` on the other ranks; both give the program's exit code. A
/// rank that fails says so, and ends all.
///
/// # Errors
/// If a process that is alone fails, or the processes cannot be joined.
pub fn run(
    reduce: Reduce,
    lead: impl FnOnce(&Lead) -> Result<u8>,
    follow: impl FnOnce(&Arc<dyn Comm>) -> Result<u8>,
) -> Result<ExitCode> {
    let Some(launch) = Launch::detect()? else {
        if reduce == Reduce::Engine {
            style::warn("nothing reads --reduce: this is one process");
        }
        return lead(&Lead::alone()).map(ExitCode::from);
    };
    choose_gpu(&launch);
    let patience = patience()?;
    let comm = comm::join(&launch, reduce.into())?;
    watch(comm.clone(), patience, launch.launcher);
    share_cores(comm.as_ref())?;
    let guarded = |work: &mut dyn FnMut() -> Result<u8>| match catch_unwind(AssertUnwindSafe(work)) {
        Ok(ended) => ended,
        Err(payload) => {
            // What a panic says was printed; an error of a device is said by whoever catches it.
            comm.abort();
            resume_unwind(payload)
        }
    };
    let code = if comm.rank() == 0 {
        let leader = Lead::new(comm.clone());
        let mut lead = Some(lead);
        let ended = guarded(&mut || lead.take().expect("called once")(&leader));
        let code = ended.unwrap_or_else(|error| {
            style::error(&error);
            cli::exit_code(&error)
        });
        leader.end(code);
        code
    } else {
        let mut follow = Some(follow);
        guarded(&mut || follow.take().expect("called once")(&comm)).unwrap_or_else(|error| {
            style::error_of(&format!("rank {} of {} on {}:", comm.rank(), comm.world(), host()), &error);
            comm.abort();
            cli::exit_code(&error)
        })
    };
    comm.leave();
    Ok(ExitCode::from(code))
}

/// Gives this rank a GPU of its own where it sees several. What it sees has to be said before the driver is loaded.
fn choose_gpu(launch: &Launch) {
    const VISIBLE: &str = "CUDA_VISIBLE_DEVICES";
    let Some(rank) = launch.local_rank else { return };
    let seen: Vec<String> = match std::env::var(VISIBLE) {
        Ok(list) => list.split(',').map(String::from).collect(),
        // The driver's list; where there is none, there is no GPU.
        Err(_) => {
            let listed = std::fs::read_dir("/proc/driver/nvidia/gpus").map_or(0, Iterator::count);
            (0..listed).map(|gpu| gpu.to_string()).collect()
        }
    };
    // A scheduler may have shown each rank its own. Too few are NCCL's to refuse.
    if seen.len() > 1 {
        std::env::set_var(VISIBLE, &seen[rank % seen.len()]);
    }
}

/// Seconds that ranks wait for one that does not come.
const TIMEOUT: &str = "DINOLAB_TIMEOUT";
const DEFAULT_TIMEOUT: u64 = 600;

fn patience() -> Result<Duration> {
    let Ok(text) = std::env::var(TIMEOUT) else { return Ok(Duration::from_secs(DEFAULT_TIMEOUT)) };
    let wrong = |_| Error::user(format!("{TIMEOUT} = {text:?} in the environment"), "it is a number of seconds");
    text.parse().map(Duration::from_secs).map_err(wrong)
}

/// What is left of that after `torchrun` has asked this rank to stop: it does so too when another has died, and waits for
/// half a minute.
const AFTER_STOP: Duration = Duration::from_secs(12);

/// Ends this rank when it has waited too long for another: one that hangs would keep all for ever. Every rank that waits says
/// so; the one that says nothing is the one to look at.
fn watch(comm: Arc<dyn Comm>, patience: Duration, launcher: Launcher) {
    let stop = signals::stop_flag();
    let look = move || loop {
        std::thread::sleep(Duration::from_millis(500));
        let stops = launcher == Launcher::Torchrun && stop.load(Ordering::Relaxed);
        let patience = if stops { patience.min(AFTER_STOP) } else { patience };
        if let Some((what, since)) = comm.waits().filter(|(_, since)| *since > patience) {
            let seconds = since.as_secs();
            let problem = format!(
                "rank {} of {} on {} has waited {seconds} s in {what} for a rank that does not come",
                comm.rank(),
                comm.world(),
                host()
            );
            let help = format!(
                "look at the rank that does not say so; if it is only slow, give it more seconds with {TIMEOUT}"
            );
            style::error(&Error::user(problem, help));
            std::process::exit(1);
        }
    };
    let named = std::thread::Builder::new().name("watchdog".into());
    // Without it a rank that hangs is the launcher's to end.
    drop(named.spawn(look));
}

/// Gives this rank its share of the cores that it may use, with as many others as may use one of them too.
fn share_cores(comm: &dyn Comm) -> Result<()> {
    let own = Cores::own();
    let mut all = vec![0; Cores::BYTES * comm.world()];
    comm.all_gather(&own.bytes(), &mut all)?;
    let sharing = all.chunks_exact(Cores::BYTES).filter(|other| own.overlap(other)).count();
    compute_here(sharing)
}

/// Makes this thread one of those that compute, so that an operation begins where it is asked for: from another thread, one of
/// them has to be woken first, and that thread at the end. They are as many as RAYON_NUM_THREADS says, or a share of the cores that
/// so many processes may use.
///
/// # Errors
/// If RAYON_NUM_THREADS is no number of threads.
pub(crate) fn compute_here(sharing: usize) -> Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = asked_threads()?.unwrap_or((cores / sharing.max(1)).max(1));
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
    // By itself it could not do what a thread asks for that it waits for.
    let pool = if threads > 1 { pool.use_current_thread() } else { pool };
    // It fails where there are threads already, which then are as many as they are.
    let _ = pool.build_global();
    Ok(())
}

/// More than any machine has cores.
const MOST_THREADS: usize = 4096;

/// How many threads the environment asks for, if it does.
///
/// # Errors
/// If that is no number of threads.
pub(crate) fn asked_threads() -> Result<Option<usize>> {
    const KEY: &str = "RAYON_NUM_THREADS";
    let Some(text) = std::env::var_os(KEY) else { return Ok(None) };
    match text.to_str().and_then(|text| text.parse().ok()).filter(|&threads| threads <= MOST_THREADS) {
        Some(0) => Ok(None),
        Some(threads) => Ok(Some(threads)),
        None => {
            let problem = format!("{KEY} = {text:?} in the environment is no number of threads");
            Err(Error::user(problem, format!("set it to a whole number up to {MOST_THREADS}, or unset it: one a core")))
        }
    }
}

/// As many cores as a machine may have.
const CORES: usize = 1 << 13;

/// The cores that a process may use.
struct Cores {
    /// A hash of the machine's name.
    machine: [u8; 32],
    /// A bit a core.
    cores: [u8; CORES / 8],
}

impl Cores {
    const BYTES: usize = 32 + CORES / 8;

    fn own() -> Self {
        let mut cores = [u8::MAX; CORES / 8];
        // SAFETY: it writes as many bytes as it is told of, or none.
        #[cfg(target_os = "linux")]
        unsafe {
            libc::sched_getaffinity(0, cores.len(), cores.as_mut_ptr().cast());
        }
        Self { machine: *blake3::hash(host().as_bytes()).as_bytes(), cores }
    }

    fn bytes(&self) -> Vec<u8> {
        [&self.machine[..], &self.cores].concat()
    }

    /// Whether the process of these bytes may use one of the cores too.
    fn overlap(&self, other: &[u8]) -> bool {
        let (machine, cores) = other.split_at(self.machine.len());
        *machine == self.machine && self.cores.iter().zip(cores).any(|(a, b)| a & b != 0)
    }
}
