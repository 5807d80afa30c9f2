//! Where the time of a step goes: every operation on the CPU, every launch on a GPU.

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

/// What one kind of operation or launch cost.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct ProfileRow {
    /// Operation, kernel or matrix product.
    pub name: String,
    /// How often it ran.
    pub launches: usize,
    /// Milliseconds, all of them together.
    pub ms: f64,
    /// Floating-point operations, where they are told; on a CPU those of matrix products.
    pub flops: f64,
    /// Bytes of memory touched, where a launch says them.
    pub bytes: f64,
}

/// The parts of a piece of work, by kind, longest first.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct Profile {
    /// One row a kind.
    pub rows: Vec<ProfileRow>,
}

impl Profile {
    pub(crate) fn add(&mut self, name: &str, ms: f64, flops: f64, bytes: f64) {
        let at = self.rows.iter().position(|r| r.name == name).unwrap_or_else(|| {
            self.rows.push(ProfileRow { name: name.to_string(), ..ProfileRow::default() });
            self.rows.len() - 1
        });
        let row = &mut self.rows[at];
        row.launches += 1;
        row.ms += ms;
        row.flops += flops;
        row.bytes += bytes;
    }

    /// Milliseconds of all together.
    pub fn ms(&self) -> f64 {
        self.rows.iter().map(|row| row.ms).sum()
    }

    pub(crate) fn longest_first(mut self) -> Self {
        self.rows.sort_by(|a, b| b.ms.total_cmp(&a.ms));
        self
    }

    /// Runs `f`, whose operations are this thread's, with each of them timed on the CPU. What one operation asks of another is
    /// the other's time; what is no operation is the row `other`.
    pub fn on_cpu<R>(f: impl FnOnce() -> R) -> (Self, R) {
        ACTIVE.store(true, Ordering::Relaxed);
        RUNNING.set(Some(Running::default()));
        let result = {
            let _all = part("other");
            f()
        };
        ACTIVE.store(false, Ordering::Relaxed);
        let done = RUNNING.take().expect("put there above").done;
        (done.longest_first(), result)
    }
}

/// Whether any thread takes a profile.
static ACTIVE: AtomicBool = AtomicBool::new(false);
/// Operations of matrix products, on all threads.
static FLOPS: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static RUNNING: RefCell<Option<Running>> = const { RefCell::new(None) };
}

#[derive(Default)]
struct Running {
    done: Profile,
    /// Those that have begun, the innermost last.
    begun: Vec<Begun>,
}

struct Begun {
    name: &'static str,
    gradient: bool,
    start: Instant,
    flops: u64,
    /// Milliseconds and operations of what it asked of others.
    of_others: (f64, u64),
}

/// Ends its part when dropped.
#[must_use = "the part ends when the guard is dropped"]
pub(crate) struct Part(());

/// Begins a part of what is profiled, if anything is.
pub(crate) fn part(name: &'static str) -> Option<Part> {
    begin(name, false)
}

/// The same of an operation's gradient.
pub(crate) fn gradient_part(operation: &'static str) -> Option<Part> {
    begin(operation, true)
}

fn begin(name: &'static str, gradient: bool) -> Option<Part> {
    if !ACTIVE.load(Ordering::Relaxed) {
        return None;
    }
    RUNNING.with_borrow_mut(|running| {
        let flops = FLOPS.load(Ordering::Relaxed);
        running.as_mut()?.begun.push(Begun { name, gradient, start: Instant::now(), flops, of_others: (0.0, 0) });
        Some(Part(()))
    })
}

impl Drop for Part {
    fn drop(&mut self) {
        RUNNING.with_borrow_mut(|running| {
            let Some(Running { done, begun }) = running else { return };
            let Some(Begun { name, gradient, start, flops, of_others }) = begun.pop() else { return };
            let (ms, flops) = (start.elapsed().as_secs_f64() * 1e3, FLOPS.load(Ordering::Relaxed) - flops);
            let (ms_of_others, flops_of_others) = of_others;
            let name = if gradient { format!("gradient of {name}") } else { name.to_string() };
            done.add(&name, ms - ms_of_others, (flops - flops_of_others) as f64, 0.0);
            if let Some(Begun { of_others, .. }) = begun.last_mut() {
                of_others.0 += ms;
                of_others.1 += flops;
            }
        });
    }
}

/// Operations of a matrix product that begins.
pub(crate) fn flops(count: usize) {
    if ACTIVE.load(Ordering::Relaxed) {
        FLOPS.fetch_add(count as u64, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Tensor};

    #[test]
    fn every_operation_has_its_own_time_and_products_have_operations() {
        let x = Tensor::full(&[64, 64], DType::F32, 0.5).unwrap();
        let (profile, ms) = Profile::on_cpu(|| {
            let start = Instant::now();
            let y = x.matmul(&x).unwrap().matmul(&x).unwrap();
            y.sum().unwrap();
            start.elapsed().as_secs_f64() * 1e3
        });
        let row = |name: &str| {
            profile.rows.iter().find(|row| row.name == name).unwrap_or_else(|| panic!("{name}: {profile:?}"))
        };
        assert_eq!((row("matmul").launches, row("matmul").flops), (2, 4.0 * 64f64.powi(3)));
        assert_eq!(row("other").flops, 0.0);
        let all: f64 = profile.rows.iter().map(|row| row.ms).sum();
        assert!(all >= ms && profile.rows.iter().all(|row| row.ms >= 0.0), "{profile:?} of {ms} ms");
        assert!(part("after it").is_none(), "nothing is kept when nobody asks");
    }
}
