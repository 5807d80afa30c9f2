//! Suites: an ablation as several arms of one recipe, each over the same seeds.
//!
//! [`Suite`] is what the file says, checked and expanded; [`Plan`] is every run it asks for with its resolved recipe;
//! [`execute`](execute()) does the runs that are not done yet; [`RunRecord`]s are what they left on disk. The state of a
//! suite is the state of its run folders, so that nothing can disagree with them.

mod execute;
mod file;
mod plan;
mod progress;
mod record;
mod state;
mod trunk;

pub use execute::{chosen, execute, lock_folder, ExecuteOptions, Tally};
pub use file::{nearest, Arm, Better, Metric, Overrides, Suite, SuiteFile};
pub use plan::{changed_keys, Event, Job, Outcome, Plan, PlannedRun, Prepare, Prepared};
pub use progress::Progress;
pub use record::{RunRecord, RunResult, Series, Status, Warning};
pub use state::Origin;
pub use trunk::{Trunk, TrunkEntry, TRUNK};
