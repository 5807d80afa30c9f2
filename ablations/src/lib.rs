//! The program.

pub mod report;
pub mod statistics;
pub mod suite;
