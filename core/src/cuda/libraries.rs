//! The libraries that the back end is made of, as they are found.

use cudarc::{cublaslt, driver, nvrtc};

/// Every function of the driver that the engine calls: cudarc looks one up when it is first called, and panics if it is
/// not there.
const DRIVER_SYMBOLS: &[&str] = &[
    "cuCtxSetCurrent",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDevicePrimaryCtxRetain",
    "cuDeviceTotalMem_v2",
    "cuDriverGetVersion",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventElapsedTime",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuFuncSetAttribute",
    "cuGetErrorString",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuGraphGetNodes",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuInit",
    "cuLaunchKernel",
    "cuMemAddressReserve",
    "cuMemAlloc_v2",
    "cuMemCreate",
    "cuMemFreeHost",
    "cuMemFree_v2",
    "cuMemGetInfo_v2",
    "cuMemHostAlloc",
    "cuMemMap",
    "cuMemRelease",
    "cuMemSetAccess",
    "cuMemUnmap",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemsetD8Async",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuStreamBeginCapture_v2",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamEndCapture",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
];

/// Functions that the engine calls and the driver, which has to be there, does not have.
pub fn missing_in_driver() -> Vec<&'static str> {
    // SAFETY: the symbols are looked up, and not called.
    let has = |name: &str| unsafe { driver::sys::culib().get::<unsafe extern "C" fn()>(name.as_bytes()) }.is_ok();
    DRIVER_SYMBOLS.iter().copied().filter(|name| !has(name)).collect()
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_function_of_the_driver_that_is_called_by_name_is_looked_for() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cuda");
        for entry in std::fs::read_dir(folder).unwrap() {
            let text = std::fs::read_to_string(entry.unwrap().path()).unwrap();
            for (at, _) in text.match_indices("sys::cu") {
                let name: String = text[at + 5..].chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                let is_function = name.as_bytes().get(2).is_some_and(u8::is_ascii_uppercase);
                assert!(!is_function || DRIVER_SYMBOLS.contains(&name.as_str()), "{name} is not in the list");
            }
        }
    }
}
