//! Ranks that are threads of one process: every test of ranks without a launcher.

use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use super::Comm;
use crate::{Error, Result};

/// A rank that is a thread.
#[derive(Debug)]
pub struct Threads {
    rank: usize,
    meeting: Arc<Meeting>,
}

#[derive(Debug)]
struct Meeting {
    world: usize,
    state: Mutex<State>,
    all_here: Condvar,
}

/// What ranks have brought to the meeting of this number, and what those of the last one brought.
#[derive(Debug, Default)]
struct State {
    number: u64,
    brought: Vec<Option<Vec<u8>>>,
    last: Arc<Vec<Vec<u8>>>,
    failed: bool,
}

/// `world` ranks, one for each thread. A rank that is dropped ends the meeting for all others.
pub fn threads(world: usize) -> Vec<Threads> {
    let state = Mutex::new(State { brought: vec![None; world], ..State::default() });
    let meeting = Arc::new(Meeting { world, state, all_here: Condvar::new() });
    (0..world).map(|rank| Threads { rank, meeting: meeting.clone() }).collect()
}

impl Threads {
    /// Brings `own` and waits for what all others bring.
    fn meet(&self, own: &[u8]) -> Result<Arc<Vec<Vec<u8>>>> {
        let Meeting { world, state, all_here } = self.meeting.as_ref();
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        state.brought[self.rank] = Some(own.to_vec());
        if state.brought.iter().all(Option::is_some) {
            state.last = Arc::new(state.brought.iter_mut().filter_map(Option::take).collect());
            state.number += 1;
            state.brought = vec![None; *world];
            all_here.notify_all();
            return Ok(state.last.clone());
        }
        let number = state.number;
        while state.number == number {
            if state.failed {
                let problem = format!("rank {} waits for a rank that has ended", self.rank);
                return Err(Error::user(problem, "see what that rank says"));
            }
            state = all_here.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(state.last.clone())
    }
}

impl Comm for Threads {
    fn world(&self) -> usize {
        self.meeting.world
    }
    fn rank(&self) -> usize {
        self.rank
    }
    fn all_gather(&self, own: &[u8], all: &mut [u8]) -> Result<()> {
        all.copy_from_slice(&self.meet(own)?.concat());
        Ok(())
    }
    fn gather_ranges(&self, all: &mut [u8], ranges: &[Range<usize>]) -> Result<()> {
        let brought = self.meet(&all[ranges[self.rank].clone()])?;
        ranges.iter().zip(brought.iter()).for_each(|(range, bytes)| all[range.clone()].copy_from_slice(bytes));
        Ok(())
    }
    fn exchange(&self, pieces: &[u8], received: &mut [u8]) -> Result<()> {
        let piece = pieces.len() / self.meeting.world;
        let of_rank = |bytes: &Vec<u8>| bytes[self.rank * piece..][..piece].to_vec();
        received.copy_from_slice(&self.meet(pieces)?.iter().map(of_rank).collect::<Vec<_>>().concat());
        Ok(())
    }
    fn broadcast(&self, bytes: &mut [u8]) -> Result<()> {
        let own: &[u8] = if self.rank == 0 { bytes } else { &[] };
        let all = self.meet(own)?;
        bytes.copy_from_slice(&all[0]);
        Ok(())
    }
    fn abort(&self) {
        self.meeting.state.lock().unwrap_or_else(PoisonError::into_inner).failed = true;
        self.meeting.all_here.notify_all();
    }
    fn engine(&self) -> String {
        "threads".into()
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.abort();
    }
}
