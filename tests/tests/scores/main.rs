//! Probes, `dinolab eval`, suites and their statistics.

mod dense_scores;
mod evaluate;
mod expected;
mod probes;
mod statistics;
mod suite;
mod suite_fuzz;
