//! MPI, opened at run time: nothing of it is needed to build, and one program runs on every cluster.
//!
//! There are three binary interfaces, told apart by the library's name: that of Open MPI, whose handles are addresses of its
//! symbols; that of MPICH and its kin, whose handles are numbers; and the standard's own (MPI 5.0, section 20), whose
//! handles are small numbers. Of each a dozen functions are called, by one thread at a time.

use std::ffi::{c_char, c_int, c_void, CStr};
use std::ops::Range;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use libloading::os::unix::{Library, Symbol, RTLD_GLOBAL, RTLD_NOW};

use super::watch::Inside;
use super::{Comm, Launch, Launcher, Reduction};
use crate::{DType, Error, Result};

/// A handle of MPI: an address or a number. Where the library expects an `int`, it reads the lower half of the register.
type Handle = usize;
/// `MPI_Init_thread(argc, argv, required, provided)`.
type InitThread = unsafe extern "C" fn(*mut c_int, *mut c_void, c_int, *mut c_int) -> c_int;
/// `MPI_Comm_rank` and `MPI_Comm_size`.
type Ask = unsafe extern "C" fn(Handle, *mut c_int) -> c_int;
/// `MPI_Allgather` and `MPI_Alltoall`.
type Collective = unsafe extern "C" fn(*const c_void, c_int, Handle, *mut c_void, c_int, Handle, Handle) -> c_int;
/// `MPI_Allgatherv(sent, count, type, received, counts, displacements, type, comm)`.
type GatherUneven = unsafe extern "C" fn(
    *const c_void,
    c_int,
    Handle,
    *mut c_void,
    *const c_int,
    *const c_int,
    Handle,
    Handle,
) -> c_int;
/// `MPI_Reduce_scatter_block(sent, received, count, type, operation, comm)`.
type Reduce = unsafe extern "C" fn(*const c_void, *mut c_void, c_int, Handle, Handle, Handle) -> c_int;
/// `MPI_Ibcast(buffer, count, type, root, comm, request)`.
type Ibcast = unsafe extern "C" fn(*mut c_void, c_int, Handle, c_int, Handle, *mut u64) -> c_int;
/// `MPI_Test(request, flag, status)`.
type Test = unsafe extern "C" fn(*mut u64, *mut c_int, *mut c_void) -> c_int;
/// `MPI_Abort` and `MPI_Comm_set_errhandler`, whose second argument is an `int` or a handle.
type WithComm = unsafe extern "C" fn(Handle, Handle) -> c_int;
/// `MPI_Finalize`.
type Finalize = unsafe extern "C" fn() -> c_int;
/// `MPI_Error_string(code, text, length)`.
type ErrorString = unsafe extern "C" fn(c_int, *mut c_char, *mut c_int) -> c_int;
/// `MPI_Get_library_version(text, length)`.
type Version = unsafe extern "C" fn(*mut c_char, *mut c_int) -> c_int;

/// Room for the longest text of any library (`MPI_MAX_LIBRARY_VERSION_STRING` is 8,192 in MPICH).
const LONGEST_TEXT: usize = 16 * 1024;
/// How long a rank that waits for an order looks without sleeping, and how long it sleeps then.
const AWAKE: Duration = Duration::from_millis(2);
const ASLEEP: Duration = Duration::from_micros(200);
/// The time in which a launcher passes on what a process said.
const HEARD: Duration = Duration::from_millis(200);
/// Names of the library that is used in place of those that are looked for.
const LIBRARY: &str = "DINOLAB_MPI";

/// The processes of a launcher, joined by MPI.
pub struct Mpi {
    library: Library,
    name: PathBuf,
    version: String,
    everyone: Handle,
    handles: Handles,
    reduction: Reduction,
    size: usize,
    rank: usize,
    all_gather: Symbol<Collective>,
    gather_uneven: Symbol<GatherUneven>,
    all_to_all: Symbol<Collective>,
    reduce: Symbol<Reduce>,
    broadcast: Symbol<Ibcast>,
    test: Symbol<Test>,
    /// The collective that this rank is in.
    inside: Inside,
}

/// What differs between binary interfaces.
struct Handles {
    world: Handle,
    byte: Handle,
    float: Handle,
    double: Handle,
    /// `MPI_SUM`.
    sum: Handle,
    errors_return: Handle,
    /// `MPI_THREAD_SERIALIZED`.
    serialized: c_int,
}

impl Mpi {
    /// Joins the processes of `launch`.
    ///
    /// # Errors
    /// If no library is found, or one that does not belong to the launcher.
    pub fn join(launch: &Launch, reduction: Reduction) -> Result<Self> {
        let (library, name) = open(launch)?;
        let handles = handles(&library, &name)?;
        let init: Symbol<InitThread> = symbol(&library, "MPI_Init_thread")?;
        let mut provided = 0;
        // SAFETY: null stands for the arguments of the program, which MPI allows; `provided` outlives the call.
        let code = unsafe { init(std::ptr::null_mut(), std::ptr::null_mut(), handles.serialized, &mut provided) };
        check(&library, "MPI_Init_thread", code)?;
        let quiet: Symbol<WithComm> = symbol(&library, "MPI_Comm_set_errhandler")?;
        // SAFETY: both are handles of this library.
        check(&library, "MPI_Comm_set_errhandler", unsafe { quiet(handles.world, handles.errors_return) })?;
        let ask = |what: &'static str| -> Result<usize> {
            let ask: Symbol<Ask> = symbol(&library, what)?;
            let mut answer = 0;
            // SAFETY: a handle of this library, and room for the answer.
            check(&library, what, unsafe { ask(handles.world, &mut answer) })?;
            Ok(answer as usize)
        };
        let (rank, size) = (ask("MPI_Comm_rank")?, ask("MPI_Comm_size")?);
        if (rank, size) != (launch.rank, launch.world) {
            let problem = format!(
                "{} started rank {} of {}, and the library {} says that this is rank {rank} of {size}",
                launch.launcher,
                launch.rank,
                launch.world,
                name.display()
            );
            return Err(Error::user(problem, format!("it is not the launcher's: name that one with {LIBRARY}=path")));
        }
        let [all_gather, all_to_all] = [symbol(&library, "MPI_Allgather")?, symbol(&library, "MPI_Alltoall")?];
        let gather_uneven = symbol(&library, "MPI_Allgatherv")?;
        let (broadcast, test) = (symbol(&library, "MPI_Ibcast")?, symbol(&library, "MPI_Test")?);
        let (version, everyone) = (version(&library)?, handles.world);
        let reduce = symbol(&library, "MPI_Reduce_scatter_block")?;
        Ok(Self {
            library,
            name,
            version,
            everyone,
            handles,
            reduction,
            size,
            rank,
            all_gather,
            gather_uneven,
            all_to_all,
            reduce,
            broadcast,
            test,
            inside: Inside::default(),
        })
    }

    fn collective(
        &self,
        what: &'static str,
        call: &Symbol<Collective>,
        (sent, received): (&[u8], &mut [u8]),
        count: usize,
    ) -> Result<()> {
        let count = count_of(count)?;
        let (from, to) = (sent.as_ptr().cast(), received.as_mut_ptr().cast());
        self.inside.enter(what);
        // SAFETY: `sent` and `received` hold `count` bytes for each rank, or `sent` those of this rank: the callers ask.
        let code = unsafe { call(from, count, self.handles.byte, to, count, self.handles.byte, self.everyone) };
        self.inside.leave();
        check(&self.library, what, code)
    }
}

impl Comm for Mpi {
    fn world(&self) -> usize {
        self.size
    }
    fn rank(&self) -> usize {
        self.rank
    }
    fn all_gather(&self, own: &[u8], all: &mut [u8]) -> Result<()> {
        assert_eq!(all.len(), own.len() * self.size, "as much from every rank");
        self.collective("MPI_Allgather", &self.all_gather, (own, all), own.len())
    }
    fn gather_ranges(&self, all: &mut [u8], ranges: &[Range<usize>]) -> Result<()> {
        assert!(
            ranges.len() == self.size && ranges.iter().all(|range| range.end <= all.len()),
            "one range of each rank"
        );
        let own = all[ranges[self.rank].clone()].to_vec();
        let counts: Vec<c_int> = ranges.iter().map(|range| count_of(range.len())).collect::<Result<_>>()?;
        let starts: Vec<c_int> = ranges.iter().map(|range| count_of(range.start)).collect::<Result<_>>()?;
        self.inside.enter("MPI_Allgatherv");
        let (from, to, byte) = (own.as_ptr().cast(), all.as_mut_ptr().cast(), self.handles.byte);
        let (counts_at, starts_at) = (counts.as_ptr(), starts.as_ptr());
        // SAFETY: `all` holds what every rank brings at its place, as asserted, and `own` what this one brings.
        let code = unsafe {
            (self.gather_uneven)(from, counts[self.rank], byte, to, counts_at, starts_at, byte, self.everyone)
        };
        self.inside.leave();
        check(&self.library, "MPI_Allgatherv", code)
    }
    fn exchange(&self, pieces: &[u8], received: &mut [u8]) -> Result<()> {
        assert!(pieces.len() == received.len() && pieces.len().is_multiple_of(self.size), "as much for every rank");
        self.collective("MPI_Alltoall", &self.all_to_all, (pieces, received), pieces.len() / self.size)
    }
    fn broadcast(&self, bytes: &mut [u8]) -> Result<()> {
        let (count, mut request, mut done) = (count_of(bytes.len())?, 0u64, 0);
        // Larger than the status of any library.
        let mut status = [0u64; 16];
        // SAFETY: `bytes` outlives the request, which is waited for below.
        let code = unsafe {
            (self.broadcast)(bytes.as_mut_ptr().cast(), count, self.handles.byte, 0, self.everyone, &mut request)
        };
        check(&self.library, "MPI_Ibcast", code)?;
        let start = Instant::now();
        loop {
            // SAFETY: the request is that of the call above, and there is room for the answers.
            let code = unsafe { (self.test)(&mut request, &mut done, status.as_mut_ptr().cast()) };
            check(&self.library, "MPI_Test", code)?;
            if done != 0 {
                return Ok(());
            }
            if start.elapsed() > AWAKE {
                std::thread::sleep(ASLEEP);
            }
        }
    }
    fn reduction(&self) -> Reduction {
        self.reduction
    }
    fn reduce_scatter(&self, pieces: &[u8], dtype: DType, sum: &mut [u8]) -> Result<()> {
        assert_eq!(pieces.len(), sum.len() * self.size, "as much for every rank");
        let number = match dtype {
            DType::F32 => self.handles.float,
            DType::F64 => self.handles.double,
            other => return Err(Error::shape("mpi", format!("no sums of {other:?}"))),
        };
        let count = count_of(sum.len() / dtype.size())?;
        self.inside.enter("MPI_Reduce_scatter_block");
        let (from, to) = (pieces.as_ptr().cast(), sum.as_mut_ptr().cast());
        // SAFETY: `sum` holds `count` numbers, and `pieces` as many for each rank.
        let code = unsafe { (self.reduce)(from, to, count, number, self.handles.sum, self.everyone) };
        self.inside.leave();
        check(&self.library, "MPI_Reduce_scatter_block", code)
    }
    fn abort(&self) {
        // A launcher that is told to end all may drop what this process said a moment ago.
        std::thread::sleep(HEARD);
        if let Ok(abort) = symbol::<WithComm>(&self.library, "MPI_Abort") {
            // SAFETY: a handle of this library; it ends the process.
            unsafe { abort(self.everyone, 1) };
        }
    }
    fn leave(&self) {
        if let Ok(finalize) = symbol::<Finalize>(&self.library, "MPI_Finalize") {
            // SAFETY: it is the last call.
            unsafe { finalize() };
        }
    }
    fn engine(&self) -> String {
        self.version.clone()
    }
    fn enter(&self, what: &'static str) {
        self.inside.enter(what);
    }
    fn leave_call(&self) {
        self.inside.leave();
    }
    fn waits(&self) -> Option<(&'static str, Duration)> {
        self.inside.waits()
    }
}

impl std::fmt::Debug for Mpi {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Mpi(rank {} of {}, {})", self.rank, self.size, self.name.display())
    }
}

/// The library that belongs to the launcher.
fn open(launch: &Launch) -> Result<(Library, PathBuf)> {
    let own = std::env::var_os(LIBRARY);
    let names: Vec<PathBuf> = match (own.clone(), launch.launcher) {
        (Some(own), _) => vec![own.into()],
        (None, Launcher::OpenMpi) => vec!["libmpi.so.40".into()],
        (None, Launcher::Mpich) => ["libmpi.so.12", "libmpich.so.12", "libmpi_abi.so.1"].map(PathBuf::from).to_vec(),
        (None, Launcher::Slurm | Launcher::Torchrun) => {
            ["libmpi.so.40", "libmpi.so.12", "libmpich.so.12", "libmpi_abi.so.1"].map(PathBuf::from).to_vec()
        }
    };
    let mut reasons = Vec::new();
    for name in names {
        // Open MPI opens libraries of its own, which look for its symbols among those of all.
        // SAFETY: an MPI library's initialisers may run.
        match unsafe { Library::open(Some(&name), RTLD_NOW | RTLD_GLOBAL) } {
            Ok(library) => return Ok((library, name)),
            Err(error) => reasons.push(format!("\n  {}: {}", name.display(), why(&error))),
        }
    }
    let problem = format!(
        "{} started {} processes, and no library of MPI joins them:{}",
        launch.launcher,
        launch.world,
        reasons.concat()
    );
    let help = match own {
        Some(_) => format!("let {LIBRARY} name the launcher's own libmpi, or remove it"),
        None => format!("put the launcher's library where the system looks, or name it with {LIBRARY}=path"),
    };
    Err(Error::user(problem, help))
}

/// What the system says of a library that cannot be opened.
pub(super) fn why(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

/// The handles of a library, whose interface its name and symbols tell.
fn handles(library: &Library, name: &std::path::Path) -> Result<Handles> {
    let address = |symbol: &str| -> Option<Handle> {
        // SAFETY: its address alone is taken.
        unsafe { library.get::<*const c_void>(symbol.as_bytes()) }.ok().map(|found| found.into_raw() as usize)
    };
    if let Some(world) = address("ompi_mpi_comm_world") {
        let names = ["byte", "float", "double", "op_sum", "errors_return"];
        let [Some(byte), Some(float), Some(double), Some(sum), Some(errors_return)] =
            names.map(|name| address(&format!("ompi_mpi_{name}")))
        else {
            return Err(Error::content(name, "some symbols of Open MPI are missing", "install Open MPI 4 or newer"));
        };
        return Ok(Handles { world, byte, float, double, sum, errors_return, serialized: 2 });
    }
    let of_standard = name.file_name().is_some_and(|file| file.to_string_lossy().starts_with("libmpi_abi"));
    Ok(match of_standard {
        true => Handles {
            world: 0x101,
            byte: 0x247,
            float: 0x210,
            double: 0x214,
            sum: 0x21,
            errors_return: 0x143,
            serialized: 2048,
        },
        false => Handles {
            world: 0x4400_0000,
            byte: 0x4c00_010d,
            float: 0x4c00_040a,
            double: 0x4c00_080b,
            sum: 0x5800_0003,
            errors_return: 0x5400_0001,
            serialized: 2,
        },
    })
}

fn symbol<T>(library: &Library, name: &str) -> Result<Symbol<T>> {
    // SAFETY: `T` is the type that the standard gives the function.
    unsafe { library.get::<T>(name.as_bytes()) }.map_err(|error| {
        Error::user(format!("the library of MPI is too old: {error}"), "install one of MPI 3 or newer")
    })
}

fn count_of(bytes: usize) -> Result<c_int> {
    c_int::try_from(bytes).map_err(|_| Error::shape("mpi", format!("{bytes} bytes are too many for one call")))
}

/// Fails unless `code` is MPI_SUCCESS.
fn check(library: &Library, what: &str, code: c_int) -> Result<()> {
    if code == 0 {
        return Ok(());
    }
    let describe: Symbol<ErrorString> = symbol(library, "MPI_Error_string")?;
    // SAFETY: there is room for the longest text.
    let text = text_of(|text, length| unsafe { describe(code, text, length) });
    Err(Error::user(format!("{what} failed: {text}"), "see what the other ranks say, and how long they lived"))
}

/// The first line of what the library says it is, with what follows a comma left out.
fn version(library: &Library) -> Result<String> {
    let version: Symbol<Version> = symbol(library, "MPI_Get_library_version")?;
    // SAFETY: there is room for the longest text.
    let text = text_of(|text, length| unsafe { version(text, length) });
    let line = text.lines().next().unwrap_or_default();
    Ok(line.split(',').next().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" "))
}

fn text_of(fill: impl FnOnce(*mut c_char, *mut c_int) -> c_int) -> String {
    let (mut text, mut length) = (vec![0u8; LONGEST_TEXT], 0);
    fill(text.as_mut_ptr().cast(), &mut length);
    let text = CStr::from_bytes_until_nul(&text).map(|text| text.to_string_lossy().into_owned());
    text.unwrap_or_default()
}
