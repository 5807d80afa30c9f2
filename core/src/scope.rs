//! Names for what is being computed, for diagnoses: which layer.

use std::cell::RefCell;

thread_local! {
    static SCOPES: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
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
