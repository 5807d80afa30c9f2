//! Weights in and out: checkpoints, Hugging Face, timm, ONNX, files that are damaged.

mod command;
mod convnext;
mod features;
mod foreign;
mod fuzz;
mod hugging_face;
mod onnx;
mod source;
mod timm;
mod walkthrough;
