//! Progress in plain lines, for where a bar cannot be drawn: a log file, a scheduler's output, a dumb terminal.

use std::time::{Duration, Instant};

use crate::style::duration;

/// Says when a line is due: at the first step, and then now and then.
#[derive(Debug)]
pub struct Pulse {
    every: Duration,
    /// When the work began, and how much of it was done then.
    begin: Option<(Instant, u64)>,
    last: Option<Instant>,
}

impl Default for Pulse {
    /// A line a minute.
    fn default() -> Self {
        Self::new(Duration::from_secs(60))
    }
}

impl Pulse {
    /// A line whenever `every` has passed.
    pub fn new(every: Duration) -> Self {
        Self { every, begin: None, last: None }
    }

    /// If a line is due: the time left, in words.
    pub fn due(&mut self, done: u64, total: u64) -> Option<String> {
        let now = Instant::now();
        let (begin, before) = *self.begin.get_or_insert((now, done));
        if self.last.is_some_and(|last| now - last < self.every) {
            return None;
        }
        self.last = Some(now);
        let worked = done.saturating_sub(before);
        if worked == 0 {
            return Some("time left not known yet".into());
        }
        let each = (now - begin).as_secs_f64() / worked as f64;
        Some(format!("about {} left", duration(each * total.saturating_sub(done) as f64)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_due_at_first_and_then_only_now_and_then() {
        let mut pulse = Pulse::default();
        assert!(pulse.due(1, 10).is_some());
        assert!((2..10).all(|done| pulse.due(done, 10).is_none()));
    }

    #[test]
    fn the_time_left_is_that_of_what_is_left() {
        let mut pulse = Pulse::new(Duration::ZERO);
        pulse.due(100, 400);
        std::thread::sleep(Duration::from_millis(100));
        // A step took a tenth of a second: thirty seconds for 299 more.
        let left = pulse.due(101, 400).unwrap();
        assert!(left.starts_with("about 3") && left.ends_with("s left"), "{left}");
    }
}
