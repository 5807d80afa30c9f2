//! The commands, one file each.

pub mod ablate;
pub mod bench;
pub mod doctor;
pub mod check;
pub mod plugins;
pub mod recipe;
pub mod replay;
pub mod train;
