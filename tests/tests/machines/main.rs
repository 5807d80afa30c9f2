//! What takes time by waiting for others: schedulers, processes side by side, and GPUs that are emulated in processes of their own.

mod cluster;
mod gpu_errors;
mod gpu_memory;
mod lost_gpu;
