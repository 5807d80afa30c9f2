//! Operations, losses and optimizers against independent statements.

mod dfdx_loss;
mod losses;
mod methods;
mod optimizers;
mod transformer;
