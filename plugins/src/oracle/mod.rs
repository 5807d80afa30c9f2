//! The losses once more, in dfdx, from their papers' formulas: what `dinolab check` holds the fast ones to.

mod feature_distillation;
mod gram;
mod koleo;
mod prototypes;
mod supervised;
mod two_crops;
mod views;
