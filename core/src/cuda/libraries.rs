//! The libraries that the back end is made of, as they are found.

use cudarc::{cublaslt, driver, nvrtc};

/// A library that is looked for at run time.
#[derive(Clone, Debug)]
pub struct Library {
    /// What it is, and its file.
    pub name: &'static str,
    /// Its version, if it is there.
    pub version: Option<String>,
    /// What to do if it is not.
    pub remedy: &'static str,
}

/// Looks for all of them.
pub fn libraries() -> [Library; 3] {
    // SAFETY: these only look for the libraries; versions are asked of libraries that are there, into locals.
    unsafe {
        let driver = driver::sys::is_culib_present().then(|| {
            let mut version = 0;
            match driver::sys::cuDriverGetVersion(&mut version) {
                driver::sys::CUresult::CUDA_SUCCESS => format!("CUDA {}.{}", version / 1000, version % 1000 / 10),
                failed => format!("{failed:?}"),
            }
        });
        let nvrtc = nvrtc::sys::is_culib_present().then(|| {
            let (mut major, mut minor) = (0, 0);
            match nvrtc::sys::nvrtcVersion(&mut major, &mut minor) {
                nvrtc::sys::nvrtcResult::NVRTC_SUCCESS => format!("{major}.{minor}"),
                failed => format!("{failed:?}"),
            }
        });
        let blas = cublaslt::sys::is_culib_present().then(|| {
            let version = cublaslt::sys::cublasLtGetVersion();
            format!("{}.{}.{}", version / 10000, version / 100 % 100, version % 100)
        });
        [
            Library { name: "driver (libcuda.so.1)", version: driver, remedy: "install NVIDIA's driver, 525 or newer" },
            Library {
                name: "NVRTC (libnvrtc.so)",
                version: nvrtc,
                remedy: "pip install nvidia-cuda-nvrtc, and put its lib folder on LD_LIBRARY_PATH",
            },
            Library {
                name: "cuBLASLt (libcublasLt.so)",
                version: blas,
                remedy: "pip install nvidia-cublas, and put its lib folder on LD_LIBRARY_PATH",
            },
        ]
    }
}
