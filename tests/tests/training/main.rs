//! Runs of the program: resumed, extended, forked, stopped, killed and distilled.

mod distillation;
mod end_to_end;
mod held_to;
mod longer;
mod stages;
mod stopping;
