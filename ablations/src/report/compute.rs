//! What a suite's runs took, by what they ran on.

use serde::{Deserialize, Serialize};

use crate::suite::RunRecord;

/// What the finished runs took, probes not counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Compute {
    /// Hours of one GPU.
    pub gpu_hours: f64,
    /// Hours of one core of a CPU, by the threads that runs had.
    pub core_hours: f64,
}

impl Compute {
    pub(super) fn of(records: &[RunRecord]) -> Self {
        let mut all = Self::default();
        for (record, result) in records.iter().filter_map(|r| Some((r, r.result()?))) {
            match record.device.as_deref() {
                Some(device) if device.starts_with("cuda") => all.gpu_hours += result.seconds / 3600.0,
                _ => all.core_hours += result.seconds * record.threads.unwrap_or(1) as f64 / 3600.0,
            }
        }
        all
    }

    /// In words: `0.25 GPU hours`.
    pub fn words(&self) -> String {
        let said = |hours: f64, of: &str| (hours > 0.0).then(|| format!("{} {of} hours", super::number(hours)));
        let all: Vec<String> =
            [said(self.gpu_hours, "GPU"), said(self.core_hours, "core")].into_iter().flatten().collect();
        all.join(" and ")
    }
}
