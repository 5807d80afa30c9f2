//! From a dataset to batches: order, crops, colour distortion, masks, and the threads that prepare them.
//!
//! Everything here is a pure function of (seed, step): the same bits for any number of threads, and after a resume.
//!
//! - [`Order`]: which sample is read when.
//! - [`CropMaker`]: makes the crops of an image by a plan, which an augmentation draws as plain numbers. A device that has
//!   the image applies the same plan.
//! - [`Masks`]: which patches are hidden from the student, drawn by a plugin.
//! - [`Batch`]: what a step gets. [`Pipeline`] makes the batches of any step, [`Loader`] makes them ahead of time.

mod augment;
mod batch;
mod blur;
mod color;
mod deal;
mod gpu;
mod loader;
mod masks;
mod order;
mod pipeline;
mod resize;
mod value;

pub use augment::{CropMaker, Views};
pub use batch::{views_of_images, Batch, StepBatches};
pub use gpu::DeviceBatches;
pub use loader::Loader;
pub use masks::Masks;
pub use order::Order;
pub use pipeline::{BrokenSample, LoaderSpec, Pipeline};
