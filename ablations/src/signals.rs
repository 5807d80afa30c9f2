//! Signals that ask the program to end: Ctrl-C, `kill`, a closed terminal, a scheduler's warning.
//!
//! SIGHUP, SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 mean the same. The first asks a command to save and stop, or ends one that
//! has nothing to save. Of those that follow only SIGINT ends the program at once: a scheduler that asks twice, by a warning
//! and by SIGTERM, still wants what is saved. A signal that was ignored when the program started (`nohup`, a job in a
//! script's background) stays ignored.

use std::ffi::c_int;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use dinolab_core::{Error, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2, SIGXFSZ};
use signal_hook::iterator::Signals;

use crate::style;

/// Signals of a launcher this soon after the first are the same.
const SAME: Duration = Duration::from_secs(10);
/// Exit code of a program that a signal ended at once.
const AT_ONCE: c_int = 130;
/// The signals, with their names.
const ASK: [(c_int, &str); 5] =
    [(SIGHUP, "SIGHUP"), (SIGINT, "SIGINT"), (SIGTERM, "SIGTERM"), (SIGUSR1, "SIGUSR1"), (SIGUSR2, "SIGUSR2")];

/// What a command does when it is asked to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It looks at [`stop_flag`], saves, and says how to go on.
    Save,
    /// It has nothing to save: it ends.
    End,
}

/// The flag that turns true when the program is asked to stop.
pub fn stop_flag() -> Arc<AtomicBool> {
    static FLAG: OnceLock<Arc<AtomicBool>> = OnceLock::new();
    FLAG.get_or_init(Arc::default).clone()
}

/// From here on signals are answered. A process that was `launched` with others gets a signal twice, from the terminal and from
/// its launcher: what comes soon after the first is the same.
///
/// # Errors
/// If the handlers cannot be installed.
pub fn listen(answer: Answer, launched: bool) -> Result<()> {
    let fail = |e| Error::user(format!("cannot handle signals: {e}"), "run on a system with POSIX signals");
    let heard = ASK.iter().map(|(signal, _)| *signal).filter(|&signal| !is_ignored(signal));
    let mut signals = Signals::new(heard).map_err(fail)?;
    // A file that grows beyond `ulimit -f` is an error of the write, not the end of the program.
    signal_hook::flag::register(SIGXFSZ, Arc::default()).map_err(fail)?;
    let stop = stop_flag();
    let answer = move || {
        let mut first: Option<Instant> = None;
        for signal in signals.forever() {
            let name = ASK.iter().find(|(known, _)| *known == signal).map_or("signal", |(_, name)| name);
            if launched && first.is_some_and(|first| first.elapsed() < SAME) {
                continue;
            }
            first.get_or_insert_with(Instant::now);
            let again = stop.swap(true, Ordering::Relaxed);
            match answer {
                Answer::Save if !again => {
                    style::line(&format!("{name}: stops once all is saved; a further SIGINT (Ctrl-C) ends it at once"));
                }
                Answer::Save if signal != SIGINT => {}
                Answer::Save => {
                    style::line(&format!(
                        "{name} again: ended at once; what was saved before is whole, and goes on as after a kill: with \
                        the same command (train: and --resume)"
                    ));
                    signal_hook::low_level::exit(AT_ONCE);
                }
                Answer::End => {
                    style::line(&format!("{name}: ended; nothing of it was kept, run the same command again"));
                    signal_hook::low_level::exit(AT_ONCE);
                }
            }
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(answer).map(drop).map_err(fail)
}

/// Whether a signal is ignored now.
fn is_ignored(signal: c_int) -> bool {
    let mut action = std::mem::MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: with no new action given, the call only writes the present one to the place it is given.
    let known = unsafe { libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) } == 0;
    // SAFETY: the call said that it wrote it.
    known && unsafe { action.assume_init() }.sa_sigaction == libc::SIG_IGN
}
