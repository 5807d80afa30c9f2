//! Suites: an ablation as several arms of one recipe, each over the same seeds.
//!
//! [`Suite`] is what the file says, checked and expanded; [`Plan`] is every run it asks for with its resolved recipe;
//! [`execute`](execute()) does the runs that are not done yet; [`RunRecord`]s are what they left on disk. The state of a
//! suite is the state of its run folders, so that nothing can disagree with them.

mod changes;
mod claims;
mod doubts;
mod execute;
mod file;
mod grid_names;
mod locks;
mod options;
mod places;
mod plan;
mod progress;
mod record;
mod retry;
mod rules;
mod state;
mod trial;
mod trunk;

pub use changes::changed_keys;
pub use claims::{check_unchanged, not_of_others};
pub(crate) use execute::record_failure_of;
pub use execute::{chosen, claim, execute, execute_run, has_trunk, try_arms};
pub(crate) use file::{beside, check_name, overrides, put_over, says};
pub use file::{nearest, Arm, Better, Metric, Overrides, Suite, SuiteFile, SuiteMeasured};
pub use locks::lock_folder;
pub use options::{ExecuteOptions, LostIn, Tally};
pub use plan::{Event, Job, Outcome, Plan, PlannedRun, Prepare, Prepared};
pub(crate) use progress::bar_style;
pub use progress::Progress;
pub use record::{RunRecord, RunResult, Series, Status, Warning};
pub use retry::{Attempt, OnOutOfMemory};
pub(crate) use retry::{Budget, Next};
pub use rules::{DropRule, DROPPED};
pub use state::Origin;
pub use trial::{untried, Tried};
pub use trunk::{keeps, named_steps, walk, Trunk, TrunkEntry, TRUNK};
