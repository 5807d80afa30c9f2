//! The program.

pub mod statistics;
pub mod suite;
