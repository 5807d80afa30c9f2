//! Runs of the trainer: steps, teachers, ranks, resumed, extended and stopped runs.

mod distillation;
mod end_to_end;
mod engine;
mod gram_teacher;
mod longer;
mod ranks;
mod rewind;
mod stages;
mod stopping;
mod teachers;
mod views;
