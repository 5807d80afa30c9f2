//! The device: found, opened once, shared by everything that computes on it.

use std::cell::Cell;
use std::sync::{Mutex, OnceLock, PoisonError};

use cudarc::driver::{result, sys};

use super::arena::{Arena, ArenaStats};
use super::blas::Blas;
use super::buffer::Pinned;
use super::kernels::Kernels;
use super::profile::Recorder;
use super::source;
use super::{check, Failure};
use crate::scope;
use crate::{Device, Error, Result};

/// What is known of a device before anything runs on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuInfo {
    /// As the driver calls it: `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// Compute capability, (9, 0) for an H100.
    pub capability: (i32, i32),
    /// Memory in bytes.
    pub memory: usize,
    /// Multiprocessors.
    pub multiprocessors: i32,
    /// The cache that all of them share (L2), in bytes.
    pub cache: usize,
    /// What kernels are compiled for: `sm_90a` for an H100. `compute_90` for a device that NVRTC does not know, on which
    /// the driver goes on from there.
    pub arch: String,
    /// The CUDA version that the driver supports, (13, 0).
    pub driver: (i32, i32),
    /// NVRTC's version.
    pub nvrtc: (i32, i32),
}

/// A device with its compute stream, memory, kernels and matrix products. One a device and process, never closed.
pub struct Gpu {
    ordinal: usize,
    info: GpuInfo,
    context: sys::CUcontext,
    stream: sys::CUstream,
    /// What lives from step to step, and what a step uses: apart, so that a recorded step's memory is its own.
    pub(super) lasting: Arena,
    pub(super) step: Arena,
    pub(super) kernels: Mutex<Kernels>,
    blas: OnceLock<Blas>,
    pub(super) recorder: Mutex<Option<Recorder>>,
    launched: Mutex<Vec<&'static str>>,
    pub(super) pinned: Mutex<Pinned>,
    sync_every_launch: bool,
}

// SAFETY: the driver's handles may be used from any thread on which their context is current, which `bind` sees to.
unsafe impl Send for Gpu {}
// SAFETY: as above; everything mutable is behind a lock.
unsafe impl Sync for Gpu {}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Gpu({}, {})", self.ordinal, self.info.name)
    }
}

/// Devices that were opened, by ordinal.
static OPEN: Mutex<Vec<&'static Gpu>> = Mutex::new(Vec::new());

thread_local! {
    static BOUND: Cell<Option<usize>> = const { Cell::new(None) };
    static CURRENT: Cell<Device> = const { Cell::new(Device::Cpu) };
    static IN_STEP: Cell<bool> = const { Cell::new(false) };
}

/// Until it is dropped, tensors of this thread are made on another device.
#[must_use = "the device is left when the guard is dropped"]
pub(crate) struct DeviceGuard(Device);

impl Drop for DeviceGuard {
    fn drop(&mut self) {
        CURRENT.set(self.0);
    }
}

/// Makes tensors of this thread on `device` from now on, until the guard is dropped.
pub(crate) fn enter(device: Device) -> DeviceGuard {
    DeviceGuard(CURRENT.replace(device))
}

/// Where this thread makes tensors.
pub(crate) fn current() -> Device {
    CURRENT.get()
}

/// Until it is dropped, device memory of this thread comes from the step's arena.
#[must_use = "the step ends when the guard is dropped"]
pub(crate) struct StepGuard(bool);

impl Drop for StepGuard {
    fn drop(&mut self) {
        IN_STEP.set(self.0);
    }
}

/// Takes device memory from the step's arena until the guard is dropped.
pub(crate) fn step_scope() -> StepGuard {
    StepGuard(IN_STEP.replace(true))
}

/// Takes device memory of what outlives the step from where it lasts, until the guard is dropped.
pub(crate) fn lasting_scope() -> StepGuard {
    StepGuard(IN_STEP.replace(false))
}

/// Whether this thread is inside a step.
pub(crate) fn in_step() -> bool {
    IN_STEP.get()
}

/// How many devices there are; 0 without a driver. Fails with a driver that does not start.
fn count() -> Result<usize, Failure> {
    // SAFETY: only looks for the library.
    if !unsafe { sys::is_culib_present() } {
        return Ok(0);
    }
    let failed = |call| move |e: cudarc::driver::DriverError| Failure { call, result: e.0 };
    let counted = result::init().map_err(failed("cuInit"));
    match counted.and_then(|()| result::device::get_count().map_err(failed("cuDeviceGetCount"))) {
        Ok(n) => Ok(usize::try_from(n).unwrap_or(0)),
        Err(Failure { result: sys::CUresult::CUDA_ERROR_NO_DEVICE, .. }) => Ok(0),
        Err(failure) => Err(failure),
    }
}

impl Gpu {
    /// The number of devices that could be opened; 0 where there is no driver. Asks the driver once.
    ///
    /// # Errors
    /// If there is a driver that does not start: there may be devices.
    pub fn count() -> Result<usize> {
        static COUNT: OnceLock<Result<usize, Failure>> = OnceLock::new();
        Ok((*COUNT.get_or_init(count))?)
    }

    /// Device `ordinal`, opened when it is first asked for.
    ///
    /// # Errors
    /// If the driver, a library or the device is missing, or too old.
    pub fn get(ordinal: usize) -> Result<&'static Gpu> {
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(gpu) = open.iter().find(|g| g.ordinal == ordinal) {
            gpu.bind();
            return Ok(gpu);
        }
        let gpu: &'static Gpu = Box::leak(Box::new(Self::open(ordinal)?));
        open.push(gpu);
        Ok(gpu)
    }

    fn open(ordinal: usize) -> Result<Self> {
        // SAFETY: only looks for the library.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::user(
                "no CUDA driver: libcuda.so was not found",
                "install NVIDIA's driver, or run with --device cpu",
            ));
        }
        let failed = |call| move |e: cudarc::driver::DriverError| Error::from(Failure { call, result: e.0 });
        result::init().map_err(failed("cuInit"))?;
        let n = Self::count()?;
        if ordinal >= n {
            let problem = format!("there is no GPU {ordinal}: the driver sees {n}");
            return Err(Error::user(
                problem,
                "choose --device cuda:0 ... or cpu; CUDA_VISIBLE_DEVICES may hide devices",
            ));
        }
        let nvrtc = source::version()?;
        let device = result::device::get(ordinal as i32).map_err(failed("cuDeviceGet"))?;
        let attribute = |a| {
            // SAFETY: `device` was just given by the driver.
            unsafe { result::device::get_attribute(device, a) }.map_err(failed("cuDeviceGetAttribute"))
        };
        use sys::CUdevice_attribute as A;
        let capability = (
            attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        let name = result::device::get_name(device).map_err(failed("cuDeviceGetName"))?;
        if capability < (8, 0) {
            let problem = format!("{name} has compute capability {}.{}; 8.0 is the least", capability.0, capability.1);
            return Err(Error::user(problem, "use an A100, RTX 30 or newer, or run with --device cpu"));
        }
        let mut driver = 0;
        // SAFETY: an out-pointer to a local.
        check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&mut driver) })?;
        let driver = (driver / 1000, driver % 1000 / 10);
        if let Some((name, version)) = libraries_of(nvrtc).into_iter().find(|(_, version)| driver.0 < version.0) {
            let problem = format!(
                "the driver supports CUDA {}.{}, the library {name} is of {}.{}",
                driver.0, driver.1, version.0, version.1
            );
            return Err(Error::user(
                problem,
                "update the driver, or put libraries of the driver's version on LD_LIBRARY_PATH",
            ));
        }
        // SAFETY: `device` is valid; the context is current from here on.
        let (context, memory) = unsafe {
            let context = result::primary_ctx::retain(device).map_err(failed("cuDevicePrimaryCtxRetain"))?;
            result::ctx::set_current(context).map_err(failed("cuCtxSetCurrent"))?;
            (context, result::device::total_mem(device).map_err(failed("cuDeviceTotalMem"))?)
        };
        BOUND.set(Some(ordinal));
        let stream =
            result::stream::create(result::stream::StreamKind::NonBlocking).map_err(failed("cuStreamCreate"))?;
        let multiprocessors = attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let cache = usize::try_from(attribute(A::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?).unwrap_or(0);
        let arch = source::architecture(capability)?;
        Ok(Self {
            ordinal,
            info: GpuInfo { name, capability, memory, multiprocessors, cache, arch, driver, nvrtc },
            context,
            stream,
            lasting: Arena::new(ordinal, memory)?,
            step: Arena::new(ordinal, memory)?,
            kernels: Mutex::default(),
            blas: OnceLock::new(),
            recorder: Mutex::default(),
            launched: Mutex::default(),
            pinned: Mutex::default(),
            sync_every_launch: std::env::var_os("DINOLAB_CUDA_SYNC").is_some_and(|v| v == "1"),
        })
    }

    /// What is known of the device.
    pub fn info(&self) -> &GpuInfo {
        &self.info
    }

    /// Whether every launch is waited for: `DINOLAB_CUDA_SYNC`.
    pub(crate) fn waits_for_every_launch(&self) -> bool {
        self.sync_every_launch
    }

    /// Its number.
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// Makes the device's context current on this thread.
    pub(crate) fn bind(&self) {
        if BOUND.get() != Some(self.ordinal) {
            // SAFETY: the context is never released.
            let bound = unsafe { result::ctx::set_current(self.context) };
            if let Err(e) = bound {
                unwind(Failure { call: "cuCtxSetCurrent", result: e.0 }.into());
            }
            BOUND.set(Some(self.ordinal));
        }
    }

    pub(crate) fn stream(&self) -> sys::CUstream {
        self.bind();
        self.stream
    }

    /// Runs a launch, remembered for diagnoses and timed where a profile is being made.
    pub(super) fn timed(
        &self,
        name: &'static str,
        work: (f64, f64),
        launch: impl FnOnce() -> Result<(), Failure>,
    ) -> Result<()> {
        self.bind();
        let mut recorder = self.recorder.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(recorder) = recorder.as_mut() {
            recorder.before(self.stream, name, work)?;
        }
        launch()?;
        if let Some(recorder) = recorder.as_mut() {
            recorder.after(self.stream)?;
        }
        if self.sync_every_launch {
            // SAFETY: the stream is alive.
            unsafe { result::stream::synchronize(self.stream) }.map_err(|e| {
                let error = Error::from(Failure { call: name, result: e.0 });
                Error::user(format!("kernel {name}, in {}: {error}", scope::current()), "mend that kernel")
            })?;
        } else {
            let mut launched = self.launched.lock().unwrap_or_else(PoisonError::into_inner);
            if !launched.contains(&name) {
                launched.push(name);
            }
        }
        Ok(())
    }

    /// Waits until all work given so far is done.
    ///
    /// # Errors
    /// If something went wrong since the last time; the message names the kernels that ran.
    pub fn synchronize(&self) -> Result<()> {
        self.bind();
        // SAFETY: the stream is alive.
        let done = unsafe { result::stream::synchronize(self.stream) };
        let mut launched = self.launched.lock().unwrap_or_else(PoisonError::into_inner);
        let names = std::mem::take(&mut *launched).join(", ");
        done.map_err(|e| {
            let failure = Failure { call: "cuStreamSynchronize", result: e.0 };
            let (problem, help) = match Error::from(failure) {
                Error::User { problem, help } => (problem, help),
                other => (other.to_string(), String::new()),
            };
            Error::user(format!("{problem}; one of these kernels, or a matrix product, failed: {names}"), help)
        })
    }

    /// Matrix products.
    pub(super) fn blas(&'static self) -> Result<&'static Blas> {
        if self.blas.get().is_none() {
            let blas = Blas::new(self)?;
            // Another thread may have been faster; then this one is dropped.
            let _ = self.blas.set(blas);
        }
        Ok(self.blas.get().expect("set just above"))
    }

    /// Memory for tensors: what lasts, and what steps use.
    pub fn memory(&self) -> [ArenaStats; 2] {
        [self.lasting.stats(), self.step.stats()]
    }

    /// Starts a new measurement of the peaks.
    pub fn reset_peaks(&self) {
        self.lasting.reset_peak();
        self.step.reset_peak();
    }
}

/// Ends what cannot return the error; [`catch`](crate::tensor::catch_out_of_memory) turns it back into a result. A fault of
/// a kernel shows in whatever call comes next, in those too that can always do what they are asked.
pub(crate) fn unwind(error: Error) -> ! {
    std::panic::resume_unwind(Box::new(error))
}

/// The CUDA versions of the libraries that are there beside the driver.
fn libraries_of(nvrtc: (i32, i32)) -> Vec<(&'static str, (i32, i32))> {
    use cudarc::cublaslt::sys as blas;
    let mut versions = vec![("NVRTC", nvrtc)];
    // SAFETY: the version is asked of a library that is there.
    if unsafe { blas::is_culib_present() } {
        // SAFETY: as above.
        let version = unsafe { blas::cublasLtGetVersion() } as i32;
        versions.push(("cuBLASLt", (version / 10000, version / 100 % 100)));
    }
    versions
}
