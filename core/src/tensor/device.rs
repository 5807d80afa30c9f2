//! Where tensors are, and how they get from one place to another.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use super::storage::Buffer;
use super::Tensor;
use crate::cuda::{self, Gpu};
use crate::{scope, DType, Device, Error, Result};

/// Runs `f`; a device that is full is its error (see [`Tensor::uninit`], which cannot fail).
///
/// # Errors
/// Those of `f`, and that the device is full.
pub fn catch_out_of_memory<R>(f: impl FnOnce() -> Result<R>) -> Result<R> {
    // Nothing that `f` was changing is looked at afterwards: the error ends the run.
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)) {
        Ok(done) => done,
        Err(payload) => match payload.downcast::<Error>() {
            Ok(error) => Err(*error),
            Err(other) => std::panic::resume_unwind(other),
        },
    }
}

/// Numbers that host code gave to a step, by content: a step that runs again finds them on the device. Bounded, since
/// numbers that change from step to step would pile up.
const MOST_CONSTANTS: usize = 4096;

/// What is known of the step that is being recorded.
#[derive(Default)]
struct Recording {
    /// Why it cannot be recorded.
    reason: Option<String>,
    /// The constants that it reads.
    constants: Vec<Tensor>,
}

thread_local! {
    static CONSTANTS: RefCell<HashMap<(usize, DType, blake3::Hash), Tensor>> = RefCell::default();
    static RECORDING: RefCell<Option<Recording>> = const { RefCell::new(None) };
}

/// A tensor of host bytes on the current GPU.
pub(super) fn constant(bytes: &[u8], shape: &[usize], dtype: DType) -> Result<Tensor> {
    let upload = || -> Result<Tensor> {
        let out = Tensor::uninit(shape, dtype);
        let gpu = out.gpu().expect("called on a GPU");
        gpu.upload(out.device_address(), bytes)?;
        Ok(out)
    };
    if !cuda::in_step() || bytes.is_empty() {
        return upload();
    }
    let Device::Cuda(ordinal) = Device::current() else { unreachable!("called on a GPU") };
    let key = (ordinal, dtype, blake3::hash(bytes));
    let known = CONSTANTS.with_borrow(|c| c.get(&key).cloned());
    if let Some(known) = known {
        RECORDING.with_borrow_mut(|r| r.iter_mut().for_each(|r| r.constants.push(known.clone())));
        return Ok(known.view(0, shape));
    }
    if is_recording() {
        cannot_record(|| "numbers computed on the host change from step to step".into());
        return Ok(Tensor::uninit(shape, dtype));
    }
    // Not in the step's memory: what is free there may be what a recorded step writes to whenever it is replayed.
    let lasting = cuda::lasting_scope();
    let made = upload()?;
    drop(lasting);
    CONSTANTS.with_borrow_mut(|c| {
        if c.len() == MOST_CONSTANTS {
            c.clear();
        }
        c.insert(key, made.clone());
    });
    Ok(made)
}

/// Whether this thread records a step, which reads the same memory again whenever it is replayed: what a plugin keeps from step to
/// step, and gives here, it has to keep for good.
pub fn is_recording() -> bool {
    RECORDING.with_borrow(Option::is_some)
}

/// Notes why the step being recorded cannot be (the first reason stays).
pub(crate) fn cannot_record(why: impl FnOnce() -> String) {
    RECORDING.with_borrow_mut(|r| {
        if let Some(Recording { reason: reason @ None, .. }) = r {
            let scope = scope::current();
            *reason = Some(if scope.is_empty() { why() } else { format!("{scope}: {}", why()) });
        }
    });
}

/// Runs `f` as a recording; gives the constants that it reads, which have to live as long as it does, or the reason why it
/// cannot be one.
pub(crate) fn recording<R>(f: impl FnOnce() -> R) -> (R, std::result::Result<Vec<Tensor>, String>) {
    RECORDING.set(Some(Recording::default()));
    let result = f();
    let Recording { reason, constants } = RECORDING.take().unwrap_or_default();
    (result, reason.map_or(Ok(constants), Err))
}

/// Copies elements between tensors of equal length and type, wherever they are.
pub(super) fn copy(to: &mut Tensor, from: &Tensor) -> Result<()> {
    match (to.gpu(), from.gpu()) {
        // Replayed, the copy would read what lies there by then.
        (Some(_), None) if is_recording() => {
            cannot_record(|| "numbers come from the host inside the step".into());
            return Ok(());
        }
        (None, Some(_)) if is_recording() => {
            cannot_record(|| "the host looks at values inside the step".into());
            to.fill_zero();
            return Ok(());
        }
        (Some(gpu), Some(other)) if gpu.ordinal() != other.ordinal() => return copy(to, &from.to(Device::Cpu)),
        (Some(_), _) => assert!(to.is_unique(), "only an unshared tensor is written to"),
        (None, _) => {}
    }
    copy_elements(to, 0, from, 0..from.len())
}

impl Tensor {
    /// The GPU that holds the elements, if one does.
    pub fn gpu(&self) -> Option<&'static Gpu> {
        match &*self.buffer {
            Buffer::Cpu(_) => None,
            Buffer::Cuda(buffer) => Some(buffer.gpu()),
        }
    }

    /// The bytes, if they are in host memory: of those that kernels read in place, once the GPU has done its work.
    fn bytes_on_host(&self) -> Result<Option<&[u8]>> {
        let bytes = self.offset * self.dtype.size()..(self.offset + self.len()) * self.dtype.size();
        Ok(match &*self.buffer {
            Buffer::Cpu(_) => Some(self.as_bytes()),
            Buffer::Cuda(buffer) => buffer.on_host()?.map(|all| &all[bytes]),
        })
    }

    /// As [`bytes_on_host`](Self::bytes_on_host), to be written.
    fn bytes_on_host_mut(&mut self) -> Result<Option<&mut [u8]>> {
        let bytes = self.offset * self.dtype.size()..(self.offset + self.len()) * self.dtype.size();
        match &*self.buffer {
            Buffer::Cpu(_) => return Ok(Some(self.bytes_mut())),
            Buffer::Cuda(buffer) if buffer.on_host()?.is_none() => return Ok(None),
            Buffer::Cuda(_) => {}
        }
        match Arc::get_mut(&mut self.buffer).expect("only an unshared tensor is written to") {
            Buffer::Cuda(buffer) => Ok(buffer.on_host_mut()?.map(|all| &mut all[bytes])),
            Buffer::Cpu(_) => unreachable!("it returned above"),
        }
    }

    /// The address of the first element in device memory.
    ///
    /// # Panics
    /// If the tensor is not on a GPU.
    pub fn device_address(&self) -> u64 {
        match &*self.buffer {
            Buffer::Cpu(_) => panic!("a kernel was given a tensor in host memory"),
            Buffer::Cuda(buffer) => buffer.address() + (self.offset * self.dtype.size()) as u64,
        }
    }

    /// An untracked tensor with the same elements on `device`; this one if it is there already.
    ///
    /// # Panics
    /// If the device fails: what it is asked here it always can do.
    pub fn to(&self, device: Device) -> Tensor {
        if self.device() == device {
            return self.detach();
        }
        let mut out = device.with(|| Self::uninit(&self.shape, self.dtype));
        if let Err(error) = copy(&mut out, self) {
            cuda::unwind(error);
        }
        out
    }
}

/// Copies elements of a tensor to another of its type, from `at` on: on one device, or from and to the host.
pub(crate) fn copy_elements(to: &mut Tensor, at: usize, from: &Tensor, range: Range<usize>) -> Result<()> {
    let size = from.dtype().size();
    debug_assert_eq!(to.dtype(), from.dtype());
    if range.is_empty() {
        return Ok(());
    }
    let (at, bytes) = (at * size..(at + range.len()) * size, range.start * size..range.end * size);
    let device = |tensor: &Tensor, at: usize| Some((tensor.gpu()?, tensor.device_address() + at as u64));
    let places = (device(to, at.start), device(from, bytes.start));
    let from = from.bytes_on_host()?.map(|from| &from[bytes.clone()]);
    match (to.bytes_on_host_mut()?.map(|to| &mut to[at]), from, places) {
        (Some(to), Some(from), _) => to.copy_from_slice(from),
        (Some(to), None, (_, Some((gpu, from)))) => gpu.download(to, from)?,
        (None, Some(from), (Some((gpu, to)), _)) => gpu.upload(to, from)?,
        (None, None, (Some((gpu, to)), Some((_, from)))) => gpu.copy(to, from, bytes.len())?,
        _ => unreachable!("what is not on the host is on a GPU"),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_as_on_the_command_line() {
        assert_eq!("cpu".parse::<Device>().unwrap(), Device::Cpu);
        assert_eq!(Device::Cuda(1).to_string(), "cuda:1");
        assert!("gpu".parse::<Device>().unwrap_err().to_string().contains("cuda:N"));
    }

    #[test]
    fn only_the_first_reason_why_a_step_cannot_be_recorded_is_kept() {
        let ((), why) = recording(|| {
            cannot_record(|| "first".into());
            cannot_record(|| "second".into());
        });
        assert_eq!(why.unwrap_err(), "first");
        assert!(!is_recording());
    }
}
