//! NCCL, opened at run time: what GPUs of a run move, on the stream that computes, so that a recorded step has it in it.
//!
//! The processes are joined by a launcher's engine first, which carries NCCL's identifier and all that is on the host. Each has
//! one GPU: NCCL refuses two processes on one.

use std::ffi::{c_char, c_int, c_void, CStr};
use std::ops::Range;

use libloading::os::unix::{Library, Symbol, RTLD_LOCAL, RTLD_NOW};

use super::mpi::why;
use super::Comm;
use crate::cuda::Gpu;
use crate::{DType, Error, Result, Tensor};

/// `ncclUniqueId`, which is handed over by value.
#[repr(C)]
#[derive(Clone, Copy)]
struct Id([c_char; 128]);

/// `ncclInt8`: bytes are moved.
const BYTES: c_int = 0;
/// `ncclFloat32`, and `ncclSum`: the only numbers that are added, and only where the engine's sums are asked for.
const FLOATS: c_int = 7;
const SUM: c_int = 0;
/// The oldest version whose collectives can be recorded with memory of the kind that a step has: 2.18.
const OLDEST: c_int = 21_800;

type GetVersion = unsafe extern "C" fn(*mut c_int) -> c_int;
type GetUniqueId = unsafe extern "C" fn(*mut Id) -> c_int;
type InitRank = unsafe extern "C" fn(*mut *mut c_void, c_int, Id, c_int) -> c_int;
/// `ncclAllGather(sent, received, count, type, comm, stream)`.
type AllGather = unsafe extern "C" fn(u64, u64, usize, c_int, *mut c_void, *mut c_void) -> c_int;
/// `ncclReduceScatter(sent, received, count of a rank, type, operation, comm, stream)`.
type ReduceScatter = unsafe extern "C" fn(u64, u64, usize, c_int, c_int, *mut c_void, *mut c_void) -> c_int;
/// `ncclSend` and `ncclRecv(buffer, count, type, peer, comm, stream)`.
type Move = unsafe extern "C" fn(u64, usize, c_int, c_int, *mut c_void, *mut c_void) -> c_int;
/// `ncclBroadcast(sent, received, count, type, root, comm, stream)`.
type Broadcast = unsafe extern "C" fn(u64, u64, usize, c_int, c_int, *mut c_void, *mut c_void) -> c_int;
/// `ncclGroupStart` and `ncclGroupEnd`.
type Group = unsafe extern "C" fn() -> c_int;
type ErrorString = unsafe extern "C" fn(c_int) -> *const c_char;

/// The GPUs of a run, one a rank.
pub(super) struct Nccl {
    gpu: &'static Gpu,
    comm: *mut c_void,
    world: usize,
    version: c_int,
    all_gather: Symbol<AllGather>,
    reduce_scatter: Symbol<ReduceScatter>,
    send: Symbol<Move>,
    receive: Symbol<Move>,
    broadcast: Symbol<Broadcast>,
    start: Symbol<Group>,
    end: Symbol<Group>,
    error: Symbol<ErrorString>,
    // What the symbols point into.
    _library: Library,
}

// SAFETY: a communicator may be used from any thread, by one at a time: a learner's step is.
unsafe impl Send for Nccl {}
// SAFETY: as above.
unsafe impl Sync for Nccl {}

impl Nccl {
    /// Joins the GPUs of the ranks that `control` joins.
    ///
    /// # Errors
    /// If the library is not there, is too old, or does not join them.
    pub(super) fn join(control: &dyn Comm, gpu: &'static Gpu) -> Result<Self> {
        // A step's memory is mapped by hand, which NCCL cannot register.
        if std::env::var_os("NCCL_GRAPH_REGISTER").is_none() {
            std::env::set_var("NCCL_GRAPH_REGISTER", "0");
        }
        let library = open()?;
        let error: Symbol<ErrorString> = symbol(&library, "ncclGetErrorString")?;
        let check = |what: &str, code: c_int| told(&error, what, code);
        let (get_version, mut version): (Symbol<GetVersion>, _) = (symbol(&library, "ncclGetVersion")?, 0);
        // SAFETY: there is room for the answer.
        check("ncclGetVersion", unsafe { get_version(&mut version) })?;
        if version < OLDEST {
            let problem = format!("NCCL is of version {}, and 2.18 is the oldest that works", words(version));
            return Err(Error::user(problem, "install a newer one: pip install nvidia-nccl-cu13"));
        }
        let mut id = Id([0; 128]);
        if control.rank() == 0 {
            let get: Symbol<GetUniqueId> = symbol(&library, "ncclGetUniqueId")?;
            // SAFETY: there is room for the answer.
            check("ncclGetUniqueId", unsafe { get(&mut id) })?;
        }
        control.broadcast(bytemuck::cast_slice_mut(&mut id.0))?;
        let init: Symbol<InitRank> = symbol(&library, "ncclCommInitRank")?;
        gpu.bind();
        let mut comm = std::ptr::null_mut();
        let (world, rank) = (control.world(), control.rank());
        // SAFETY: the identifier is rank 0's, and there is room for the answer.
        check("ncclCommInitRank", unsafe { init(&mut comm, world as c_int, id, rank as c_int) })?;
        Ok(Self {
            gpu,
            comm,
            world,
            version,
            all_gather: symbol(&library, "ncclAllGather")?,
            reduce_scatter: symbol(&library, "ncclReduceScatter")?,
            send: symbol(&library, "ncclSend")?,
            receive: symbol(&library, "ncclRecv")?,
            broadcast: symbol(&library, "ncclBroadcast")?,
            start: symbol(&library, "ncclGroupStart")?,
            end: symbol(&library, "ncclGroupEnd")?,
            error,
            _library: library,
        })
    }

    /// What it is, for a person.
    pub(super) fn name(&self) -> String {
        format!("NCCL {}", words(self.version))
    }

    /// Every rank's bytes, in order of rank: `all` is as many times as long as `own`. Both are on this rank's GPU.
    pub(super) fn all_gather(&self, own: &Tensor, all: &Tensor) -> Result<()> {
        let bytes = bytes_of(own);
        assert_eq!(bytes_of(all), bytes * self.world, "as much from every rank");
        let (from, to, stream) = (own.device_address(), all.device_address(), self.gpu.stream().cast());
        // SAFETY: both lie in memory of the GPU of the communicator, and work of its stream alone writes there.
        let code = unsafe { (self.all_gather)(from, to, bytes, BYTES, self.comm, stream) };
        told(&self.error, "ncclAllGather", code)
    }

    /// Of `all`, range r is what rank r has; afterwards all have all. One broadcast a range, in one group.
    pub(super) fn gather_ranges(&self, all: &Tensor, ranges: &[Range<usize>]) -> Result<()> {
        let (size, stream) = (all.dtype().size(), self.gpu.stream().cast());
        // SAFETY: as in `all_gather`; all ranks send and receive at the same places.
        unsafe {
            told(&self.error, "ncclGroupStart", (self.start)())?;
            for (rank, range) in ranges.iter().enumerate().filter(|(_, range)| !range.is_empty()) {
                let at = all.device_address() + (range.start * size) as u64;
                let code = (self.broadcast)(at, at, range.len() * size, BYTES, rank as c_int, self.comm, stream);
                told(&self.error, "ncclBroadcast", code)?;
            }
            told(&self.error, "ncclGroupEnd", (self.end)())
        }
    }

    /// Of pieces of equal length in f32, `sum` is NCCL's sum over ranks of those for this one.
    pub(super) fn reduce_scatter(&self, pieces: &Tensor, sum: &Tensor) -> Result<()> {
        assert!(pieces.len() == sum.len() * self.world && sum.dtype() == DType::F32, "as much for every rank");
        let (from, to, stream) = (pieces.device_address(), sum.device_address(), self.gpu.stream().cast());
        // SAFETY: as in `all_gather`.
        let code = unsafe { (self.reduce_scatter)(from, to, sum.len(), FLOATS, SUM, self.comm, stream) };
        told(&self.error, "ncclReduceScatter", code)
    }

    /// Of pieces of equal length, piece r goes to rank r; `received` is what the others have for this one.
    pub(super) fn exchange(&self, pieces: &Tensor, received: &Tensor) -> Result<()> {
        let piece = bytes_of(pieces) / self.world;
        assert!(
            bytes_of(received) == bytes_of(pieces) && piece * self.world == bytes_of(pieces),
            "as much for every rank"
        );
        let (from, to, stream) = (pieces.device_address(), received.device_address(), self.gpu.stream().cast());
        // SAFETY: as in `all_gather`; every send has its receive, in one group.
        unsafe {
            told(&self.error, "ncclGroupStart", (self.start)())?;
            for peer in 0..self.world {
                let at = (peer * piece) as u64;
                let sent = (self.send)(from + at, piece, BYTES, peer as c_int, self.comm, stream);
                told(&self.error, "ncclSend", sent)?;
                let received = (self.receive)(to + at, piece, BYTES, peer as c_int, self.comm, stream);
                told(&self.error, "ncclRecv", received)?;
            }
            told(&self.error, "ncclGroupEnd", (self.end)())
        }
    }
}

impl std::fmt::Debug for Nccl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of {} GPUs", self.name(), self.world)
    }
}

fn bytes_of(tensor: &Tensor) -> usize {
    tensor.len() * tensor.dtype().size()
}

/// A version as NVIDIA writes it.
fn words(version: c_int) -> String {
    format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
}

fn open() -> Result<Library> {
    let mut reasons = Vec::new();
    for name in ["libnccl.so.2", "libnccl.so"] {
        // SAFETY: the library's initialisers may run.
        match unsafe { Library::open(Some(name), RTLD_NOW | RTLD_LOCAL) } {
            Ok(library) => return Ok(library),
            Err(error) => reasons.push(format!("\n  {name}: {}", why(&error))),
        }
    }
    let problem = format!("several processes are on GPUs, and no library of NCCL joins them:{}", reasons.concat());
    Err(Error::user(problem, "pip install nvidia-nccl-cu13, and put its lib folder into LD_LIBRARY_PATH"))
}

fn symbol<T>(library: &Library, name: &str) -> Result<Symbol<T>> {
    // SAFETY: `T` is the type that nccl.h gives the function.
    unsafe { library.get::<T>(name.as_bytes()) }
        .map_err(|e| Error::user(format!("the library of NCCL lacks a function: {e}"), "install NCCL 2.18 or newer"))
}

/// Fails unless `code` is ncclSuccess.
fn told(error: &Symbol<ErrorString>, what: &str, code: c_int) -> Result<()> {
    if code == 0 {
        return Ok(());
    }
    // SAFETY: it gives a text that is never freed.
    let text = unsafe { CStr::from_ptr(error(code)) }.to_string_lossy();
    let help = "NCCL_DEBUG=WARN says more; each process needs a GPU of its own";
    Err(Error::user(format!("{what} failed: {text} ({code})"), help))
}
