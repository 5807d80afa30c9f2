//! Images on their way into crops: decoding, folders and tables, augmentation, masks.

mod augmentations;
mod broken_images;
mod channels;
mod cut_outs;
mod decoding;
mod folder;
mod masks;
mod packed;
mod photographs;
mod pipeline;
