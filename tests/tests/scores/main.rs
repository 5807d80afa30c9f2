//! Probes and `dinolab eval`, and what reports say of them.

mod dense_scores;
mod evaluate;
mod expected;
mod probes;
