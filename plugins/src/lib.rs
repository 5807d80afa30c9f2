//! Plugins.

pub mod dataset_image_folder;
pub mod dataset_scenes;
