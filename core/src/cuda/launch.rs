//! Launching a kernel.

use std::ffi::c_void;

use cudarc::driver::sys;

use super::kernels::UNASKED_SHARED;
use super::{check, Gpu};
use crate::{Error, Result};

/// An argument of a kernel, as the bytes that it is passed by.
#[derive(Clone, Copy, Debug)]
pub struct Arg {
    /// Large enough for a struct of four attention segments.
    bytes: [u64; 64],
}

impl Arg {
    /// Any plain value; its Rust layout must be that of the kernel's parameter.
    ///
    /// # Panics
    /// If it is larger than 512 bytes.
    pub fn plain<T: bytemuck::NoUninit>(value: T) -> Self {
        let mut bytes = [0; 64];
        let source = bytemuck::bytes_of(&value);
        bytemuck::cast_slice_mut::<u64, u8>(&mut bytes)[..source.len()].copy_from_slice(source);
        Self { bytes }
    }
}

macro_rules! plain_args {
    ($($t:ty),*) => {$(
        impl From<$t> for Arg {
            fn from(value: $t) -> Self {
                Self::plain(value)
            }
        }
    )*};
}

plain_args!(i32, u32, u64, f32);

/// `size_t`.
impl From<usize> for Arg {
    fn from(value: usize) -> Self {
        Self::plain(value as u64)
    }
}

/// The arguments of a launch: `args![&mut y, &x, n as i32]`. Tensors become addresses.
#[macro_export]
macro_rules! cuda_args {
    ($($arg:expr),* $(,)?) => { &mut [$($crate::cuda::Arg::from($arg)),*] };
}

/// A kernel of a loaded module.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    pub(super) gpu: &'static Gpu,
    pub(super) function: sys::CUfunction,
    pub(super) name: &'static str,
    /// How many arguments it takes, where that is known.
    pub(super) parameters: Option<usize>,
}

/// How a kernel is launched.
#[derive(Clone, Copy, Debug)]
#[must_use = "nothing runs until `launch`"]
pub struct Launch {
    kernel: Kernel,
    grid: [u32; 3],
    threads: u32,
    shared: u32,
    work: (f64, f64),
}

impl Kernel {
    /// `grid` blocks of `threads` threads.
    pub fn grid(self, grid: impl Into<Grid3>, threads: u32) -> Launch {
        Launch { kernel: self, grid: grid.into().0, threads, shared: 0, work: (0.0, 0.0) }
    }

    /// A thread for each of `n` elements, 256 a block.
    pub fn over(self, n: usize) -> Launch {
        self.grid(n.div_ceil(256), 256)
    }

    /// A warp for each of `n` rows, 4 a block.
    pub fn rows(self, n: usize) -> Launch {
        self.grid(n.div_ceil(4), 128)
    }
}

/// Blocks along x, y and z.
#[derive(Clone, Copy, Debug)]
pub struct Grid3([u32; 3]);

impl From<usize> for Grid3 {
    fn from(x: usize) -> Self {
        Self([u32::try_from(x).expect("fewer blocks than 2^32"), 1, 1])
    }
}

impl From<(usize, usize)> for Grid3 {
    fn from((x, y): (usize, usize)) -> Self {
        Self([x as u32, u32::try_from(y).expect("fewer blocks than 2^32"), 1])
    }
}

impl From<(usize, usize, usize)> for Grid3 {
    fn from((x, y, z): (usize, usize, usize)) -> Self {
        Self([x as u32, y as u32, z as u32])
    }
}

impl Launch {
    /// Dynamic shared memory in bytes.
    pub fn shared(self, bytes: usize) -> Self {
        Self { shared: u32::try_from(bytes).expect("shared memory is small"), ..self }
    }

    /// What the profile holds the time against: floating-point operations and bytes of memory touched.
    pub fn work(self, flops: f64, bytes: f64) -> Self {
        Self { work: (flops, bytes), ..self }
    }

    /// Runs it, after all work given before. A launch with no block does nothing.
    ///
    /// # Errors
    /// If the number of arguments is not the kernel's, or the device refuses the launch. What goes wrong inside the kernel shows at a later call (or here, with
    /// DINOLAB_CUDA_SYNC=1).
    pub fn launch(self, args: &mut [Arg]) -> Result<()> {
        let Self { kernel, grid, threads, shared, work } = self;
        if grid.contains(&0) {
            return Ok(());
        }
        // The driver reads as many pointers as the kernel has parameters.
        if let Some(takes) = kernel.parameters.filter(|&takes| takes != args.len()) {
            return Err(Error::shape(kernel.name, format!("the kernel takes {takes} arguments, not {}", args.len())));
        }
        let gpu = kernel.gpu;
        if shared > UNASKED_SHARED {
            gpu.allow_shared(kernel, shared)?;
        }
        let mut pointers: Vec<*mut c_void> = args.iter_mut().map(|a| a.bytes.as_mut_ptr().cast()).collect();
        let [x, y, z] = grid;
        gpu.timed(kernel.name, work, || {
            // SAFETY: the function belongs to a module that is never unloaded; every argument outlives the call, which
            // copies it. Their number was compared above; their sizes are the caller's contract with the kernel's source.
            let result = unsafe {
                let pointers = pointers.as_mut_ptr();
                let null = std::ptr::null_mut();
                sys::cuLaunchKernel(kernel.function, x, y, z, threads, 1, 1, shared, gpu.stream(), pointers, null)
            };
            check(kernel.name, result)
        })
    }
}
