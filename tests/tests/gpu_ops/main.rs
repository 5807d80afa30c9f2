//! Operations, losses, optimizers and steps on a GPU: the machine's own, or the emulator.

mod attention;
mod data;
mod losses;
mod optimizers;
mod own_kernel;
mod products;
mod step;
mod students;
