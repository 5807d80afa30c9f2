//! Ctrl-C and SIGTERM ask a run to stop at the end of its step; a second one ends the program at once.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use dinolab_core::{Error, Result};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// The flag that turns true when the program is asked to stop.
///
/// # Errors
/// If the handlers cannot be installed.
pub fn stop_flag() -> Result<Arc<AtomicBool>> {
    static FLAG: OnceLock<Arc<AtomicBool>> = OnceLock::new();
    if let Some(stop) = FLAG.get() {
        return Ok(stop.clone());
    }
    let stop = Arc::new(AtomicBool::new(false));
    let install = |signal| -> std::io::Result<()> {
        // In this order: the first signal sets the flag, the second finds it set and exits.
        flag::register_conditional_shutdown(signal, 128 + signal, stop.clone())?;
        flag::register(signal, stop.clone())?;
        Ok(())
    };
    [SIGINT, SIGTERM]
        .into_iter()
        .try_for_each(install)
        .map_err(|e| Error::user(format!("cannot handle signals: {e}"), "run on a system with POSIX signals"))?;
    Ok(FLAG.get_or_init(|| stop).clone())
}
