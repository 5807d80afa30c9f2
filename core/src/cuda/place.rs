//! Where tensors live: host memory, or a GPU.

use std::fmt;
use std::str::FromStr;

use super::device::{self, DeviceGuard};
use super::Gpu;
use crate::{Error, Result};

/// Where a tensor lives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Device {
    /// Host memory.
    #[default]
    Cpu,
    /// A GPU, by its number.
    Cuda(usize),
}

impl Device {
    /// Where this thread makes tensors that no operation makes.
    pub fn current() -> Self {
        device::current()
    }

    /// Makes this thread's tensors here until the guard is dropped.
    pub(crate) fn enter(self) -> DeviceGuard {
        device::enter(self)
    }

    /// Runs `f` with this thread's tensors made here.
    pub fn with<R>(self, f: impl FnOnce() -> R) -> R {
        let _on = self.enter();
        f()
    }

    /// Runs `f` with this thread's tensors made in host memory.
    pub(crate) fn leave<R>(self, f: impl FnOnce() -> R) -> R {
        Self::Cpu.with(f)
    }

    /// The GPU, opened before a tensor could be put on it.
    pub(crate) fn gpu(self) -> Option<&'static Gpu> {
        match self {
            Self::Cpu => None,
            Self::Cuda(ordinal) => Some(Gpu::get(ordinal).expect("a device is opened before tensors are made on it")),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => write!(f, "cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl FromStr for Device {
    type Err = Error;

    /// `cpu`, `cuda`, `cuda:1`, or `auto`: the first GPU if there is one.
    fn from_str(text: &str) -> Result<Self> {
        let ordinal = match text {
            "cpu" => return Ok(Self::Cpu),
            "auto" if devices_for_auto()? == 0 => return Ok(Self::Cpu),
            "auto" | "cuda" => Some(0),
            other => other.strip_prefix("cuda:").and_then(|n| n.parse().ok()),
        };
        let unknown = || Error::user(format!("`{text}` is not a device"), "choose auto, cpu, cuda or cuda:N");
        let ordinal = ordinal.ok_or_else(unknown)?;
        Gpu::get(ordinal).map(|_| Self::Cuda(ordinal))
    }
}

/// A GPU that does not work is no reason to compute on the CPU: that would take a thousand times as long, without a word.
fn devices_for_auto() -> Result<usize> {
    Gpu::count().map_err(|error| {
        let problem = format!("there is a CUDA driver that does not start: {}", error.problem());
        Error::user(problem, "`dinolab doctor` says more; --device cpu runs without a GPU")
    })
}
