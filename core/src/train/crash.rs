//! What is known of a run that ended by an error or a panic: `crash/step-<n>.json`, for whoever looks into it.

use std::path::PathBuf;

use serde_json::json;

use crate::files::write_file;
use crate::resolved::Resolved;

use super::folder::{RunFolder, RunInfo};
use super::log::Log;

/// Writes the report of a run that ended in the step after `step` steps, whose batch held `samples`; gives its path. A report that cannot
/// be written is left out: what went wrong is said anyway.
pub(super) fn write(
    folder: &RunFolder,
    resolved: &Resolved,
    log: &Log,
    step: u64,
    samples: &[String],
    message: &str,
) -> Option<PathBuf> {
    let crashes = folder.path().join("crash");
    std::fs::create_dir_all(&crashes).ok()?;
    let path = crashes.join(format!("step-{:08}.json", step + 1));
    let report = json!({
        "message": message,
        "step": step + 1,
        "samples": samples,
        "last_metrics": log.last(),
        "run": RunInfo::read(folder.path()).ok().flatten(),
        "recipe": resolved.to_toml(),
    });
    let text = serde_json::to_string_pretty(&report).expect("plain data");
    write_file(&path, text.as_bytes()).ok()?;
    Some(path)
}
