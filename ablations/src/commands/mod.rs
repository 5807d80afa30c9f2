//! The commands, one file each.

pub mod plugins;
pub mod recipe;
