//! Where tensors are, and how they get from one place to another.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;

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

/// Whether this thread records a step.
pub(crate) fn is_recording() -> bool {
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
    let bytes = from.len() * from.dtype().size();
    match (to.gpu(), from.gpu()) {
        (None, None) => to.bytes_mut().copy_from_slice(from.as_bytes()),
        // Replayed, the copy would read what lies there by then.
        (Some(_), None) if is_recording() => cannot_record(|| "numbers come from the host inside the step".into()),
        (Some(gpu), None) => {
            assert!(to.is_unique(), "only an unshared tensor is written to");
            gpu.upload(to.device_address(), from.as_bytes())?;
        }
        (None, Some(_)) if is_recording() => {
            cannot_record(|| "the host looks at values inside the step".into());
            to.fill_zero();
        }
        (None, Some(gpu)) => gpu.download(to.bytes_mut(), from.device_address())?,
        (Some(gpu), Some(other)) if gpu.ordinal() == other.ordinal() => {
            assert!(to.is_unique(), "only an unshared tensor is written to");
            gpu.copy(to.device_address(), from.device_address(), bytes)?;
        }
        (Some(_), Some(_)) => copy(to, &from.to(Device::Cpu))?,
    }
    Ok(())
}

impl Tensor {
    /// The GPU that holds the elements, if one does.
    pub fn gpu(&self) -> Option<&'static Gpu> {
        match &*self.buffer {
            Buffer::Cpu(_) => None,
            Buffer::Cuda(buffer) => Some(buffer.gpu()),
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
    let (at, bytes) = (at * size, range.start * size..range.end * size);
    let device = |tensor: &Tensor, at: usize| tensor.device_address() + at as u64;
    match (to.gpu(), from.gpu()) {
        _ if range.is_empty() => Ok(()),
        (Some(gpu), Some(_)) => gpu.copy(device(to, at), device(from, bytes.start), bytes.len()),
        (Some(gpu), None) => gpu.upload(device(to, at), &from.as_bytes()[bytes]),
        (None, Some(gpu)) => {
            let from = device(from, bytes.start);
            gpu.download(&mut to.bytes_mut()[at..][..bytes.len()], from)
        }
        (None, None) => {
            let from = &from.as_bytes()[bytes];
            to.bytes_mut()[at..][..from.len()].copy_from_slice(from);
            Ok(())
        }
    }
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
