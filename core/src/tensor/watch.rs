//! The first operation whose result is not finite, for diagnoses.

use std::cell::RefCell;

use super::{greatest, Tensor};

thread_local! {
    static WATCH: RefCell<Option<Watch>> = const { RefCell::new(None) };
}

#[derive(Default)]
struct Watch {
    first: Option<String>,
}

/// Ends the watch, however what is watched ends.
struct Watching;

impl Drop for Watching {
    fn drop(&mut self) {
        WATCH.set(None);
    }
}

/// Runs `f` and reports the first operation, forward or backward, whose result was not finite.
pub fn first_non_finite<R>(f: impl FnOnce() -> R) -> (R, Option<String>) {
    WATCH.set(Some(Watch::default()));
    let _watching = Watching;
    let result = f();
    (result, WATCH.take().and_then(|w| w.first))
}

/// Called on every result; looks at values only while [`first_non_finite`] runs.
pub(crate) fn observe(what: impl FnOnce() -> String, value: &Tensor) {
    WATCH.with_borrow_mut(|watch| {
        let Some(watch) = watch.as_mut() else { return };
        if watch.first.is_some() {
            return;
        }
        // Where the number cannot be had, the error shows at the operation that comes next.
        let finite = greatest(value).map_or(true, f64::is_finite);
        if !finite {
            watch.first = Some(what());
        }
    });
}
