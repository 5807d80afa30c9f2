//! Names for what is being computed, for diagnoses: which layer, and the first operation whose result is not finite.

use std::cell::RefCell;

use super::Tensor;
use crate::tensor::DType;

thread_local! {
    static SCOPES: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
    static WATCH: RefCell<Option<Watch>> = const { RefCell::new(None) };
}

#[derive(Default)]
struct Watch {
    first: Option<String>,
}

/// Leaves its scope when dropped.
#[must_use = "the scope ends when the guard is dropped"]
pub struct ScopeGuard(());

/// Enters a named scope (`"blocks.3"`); operations inside are reported under it.
pub fn enter(name: impl Into<String>) -> ScopeGuard {
    SCOPES.with_borrow_mut(|s| s.push(name.into()));
    ScopeGuard(())
}

impl Drop for ScopeGuard {
    fn drop(&mut self) {
        SCOPES.with_borrow_mut(Vec::pop);
    }
}

/// The scopes from the outermost in, joined by dots.
pub fn current() -> String {
    SCOPES.with_borrow(|s| s.join("."))
}

/// Runs `f` and reports the first operation, forward or backward, whose result was not finite.
pub fn first_non_finite<R>(f: impl FnOnce() -> R) -> (R, Option<String>) {
    WATCH.set(Some(Watch::default()));
    let result = f();
    let watch = WATCH.take();
    (result, watch.and_then(|w| w.first))
}

/// Called on every result; looks at values only while [`first_non_finite`] runs.
pub(crate) fn observe(what: impl FnOnce() -> String, value: &Tensor) {
    WATCH.with_borrow_mut(|watch| {
        let Some(watch) = watch.as_mut() else { return };
        if watch.first.is_some() {
            return;
        }
        let value = &value.to(super::Device::Cpu);
        let finite = match value.dtype() {
            DType::F32 => value.as_slice::<f32>().iter().all(|x| x.is_finite()),
            DType::F64 => value.as_slice::<f64>().iter().all(|x| x.is_finite()),
            DType::BF16 => value.as_slice::<half::bf16>().iter().all(|x| x.is_finite()),
            DType::U32 => true,
        };
        if !finite {
            watch.first = Some(what());
        }
    });
}
