//! Suites inside this process, and their statistics. No test here starts a program: for a moment a new process holds the locks
//! that this one holds.

mod execution;
mod fuzz;
mod lab;
mod plan;
mod report;
mod statistics;
