//! The kernels of a device: compiled, loaded, and found by name.

use std::collections::HashMap;
use std::sync::PoisonError;

use cudarc::driver::{result, sys};

use super::launch::Kernel;
use super::source::{self, Source};
use super::{check, Failure, Gpu};
use crate::{DType, Error, Result};

/// Dynamic shared memory that a launch may have without asking: a block has 48 KiB unasked, static variables included, of
/// which no kernel has 16 KiB.
pub(super) const UNASKED_SHARED: u32 = 32 << 10;

/// Those that were loaded.
#[derive(Default)]
pub(super) struct Kernels {
    modules: HashMap<&'static str, Module>,
    functions: HashMap<(&'static str, &'static str, DType), Kernel>,
    /// The dynamic shared memory that each function may have.
    shared: HashMap<usize, u32>,
}

struct Module(sys::CUmodule);

// SAFETY: as for `Gpu`.
unsafe impl Send for Kernels {}

impl Gpu {
    /// Compiles sources that are not in the cache, in parallel, and loads them.
    ///
    /// # Errors
    /// If one does not compile.
    pub fn load_all(&'static self, sources: &[&'static Source]) -> Result<Vec<source::Compiled>> {
        let compiled = source::compile(sources, &self.info().arch)?;
        let mut kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        for c in &compiled {
            self.load(&mut kernels, c)?;
        }
        Ok(compiled)
    }

    fn load(&self, kernels: &mut Kernels, compiled: &source::Compiled) -> Result<(), Failure> {
        if kernels.modules.contains_key(compiled.name) {
            return Ok(());
        }
        self.bind();
        // SAFETY: the image is machine code for this device, made by NVRTC.
        let module = unsafe { result::module::load_data(compiled.cubin.as_ptr().cast()) };
        let module = module.map_err(|e| Failure { call: "cuModuleLoadData", result: e.0 })?;
        kernels.modules.insert(compiled.name, Module(module));
        Ok(())
    }

    /// Kernel `name` of `source` for a storage type: the function `<name>_f32` or `<name>_bf16` (`_u32`: `<name>`).
    ///
    /// # Errors
    /// If the source does not compile, has no such kernel, or the type has none.
    pub fn kernel(&'static self, source: &'static Source, name: &'static str, dtype: DType) -> Result<Kernel> {
        let mut kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (source.name, name, dtype);
        if let Some(kernel) = kernels.functions.get(&key) {
            return Ok(*kernel);
        }
        let suffix = match dtype {
            DType::F32 => "_f32",
            DType::BF16 => "_bf16",
            DType::U32 => "",
            DType::F64 => {
                let problem = format!("{name} is not implemented for F64 on a GPU");
                return Err(Error::user(
                    problem,
                    "use dtype = \"bf16\" or \"f32\" there; f64 is for checks on the CPU",
                ));
            }
        };
        if !kernels.modules.contains_key(source.name) {
            let compiled = source.compile(&self.info().arch, self.info().nvrtc)?;
            self.load(&mut kernels, &compiled)?;
        }
        let module = kernels.modules[source.name].0;
        let full = std::ffi::CString::new(format!("{name}{suffix}")).expect("kernel names have no zero byte");
        // SAFETY: the module is loaded.
        let function = unsafe { result::module::get_function(module, full) }.map_err(|_| {
            Error::user(format!("{}.cu has no kernel {name}{suffix}", source.name), "see KERNEL in common.cuh")
        })?;
        let parameters = source.parameters(name, &format!("{name}{suffix}"));
        let kernel = Kernel { gpu: self, function, name, parameters };
        kernels.functions.insert(key, kernel);
        Ok(kernel)
    }

    /// Lets a kernel have this much dynamic shared memory.
    pub(super) fn allow_shared(&self, kernel: Kernel, bytes: u32) -> Result<(), Failure> {
        let mut kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        let allowed = kernels.shared.entry(kernel.function as usize).or_insert(UNASKED_SHARED);
        if bytes > *allowed {
            self.bind();
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function belongs to a loaded module.
            let result = unsafe { sys::cuFuncSetAttribute(kernel.function, attribute, bytes as i32) };
            check("cuFuncSetAttribute", result)?;
            *allowed = bytes;
        }
        Ok(())
    }
}
