//! The commands, one file each.

pub mod ablate;
pub mod bench;
pub mod check;
pub mod doctor;
mod dry_run;
pub mod eval;
pub mod export;
pub mod features;
pub mod import;
pub mod new;
pub mod plugins;
mod prepared;
pub mod recipe;
pub mod replay;
pub mod stages;
pub mod train;
pub mod watch;
