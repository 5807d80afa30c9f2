//! The built-in plugins of dinolab, one file each. A program that links this crate (`use dinolab_plugins as _;`) has
//! them all in its registry; nothing here is called by name except by tests, and [`published`], which knows the layouts
//! of published weights.
//!
//! | kind | plugins |
//! |---|---|
//! | backbone | [`vit`], [`convnext`] |
//! | position encoding | [`rope_box`], [`relative_bias_box`], [`learned_absolute`], [`none`] |
//! | loss | [`dino`], [`ibot`], [`koleo`], [`gram`], [`byol`], [`vicreg`], [`barlow_twins`], [`info_nce`], [`sigreg`], [`inpainting`], [`rotation`], [`jigsaw`], [`relative_location`], [`cka`], [`feature_distillation`], [`online_linear`] |
//! | scheduler | [`constant`], [`linear_warmup`], [`linear_warmup_cosine`], [`cosine`], [`step`] |
//! | teacher policy | [`ema`], [`frozen`], [`gram_anchor`], [`no_teacher`] |
//! | dataset | [`scenes`], [`image_folder`], [`manifest`](image_folder::manifest), [`webdataset`], [`parquet`], [`cut_outs`] |
//! | augmentation | [`multi_crop`], [`resized`] |
//! | masking | [`block`], [`random`], [`multi_block`] |
//! | probe | [`knn`], [`linear_classification`], [`few_shot`], [`retrieval`], [`linear_segmentation`], [`knn_segmentation`], [`depth`], [`tracking`], [`patch_similarity`], [`cls_patch_cosine`], [`patch_spread`], [`dse`], [`effective_rank`], [`correspondence`], [`robustness`] |
//! | optimizer | [`adamw`], [`muon`], [`sgd`] |

#![warn(clippy::print_stdout, clippy::print_stderr)]

// Backbones
pub mod convnext;
mod onnx;
pub mod published;
pub mod vit;

// Position encodings
pub mod box_coords;
pub mod learned_absolute;
pub mod none;
pub mod relative_bias_box;
pub mod rope_box;

// Losses
pub mod barlow_twins;
pub mod byol;
pub mod cka;
mod classify;
pub mod dino;
pub mod gram;
pub mod ibot;
pub mod info_nce;
pub mod inpainting;
pub mod jigsaw;
pub mod koleo;
pub mod online_linear;
mod oracle;
pub mod projection_head;
pub mod projector;
pub mod relative_location;
pub mod rotation;
pub mod sigreg;
mod teacher_targets;
mod thirds;
pub mod vicreg;

// Schedulers
pub mod constant;
pub mod cosine;
pub mod linear_warmup;
pub mod linear_warmup_cosine;
pub mod step;

// Teacher policies
pub mod ema;
pub mod frozen;
pub mod gram_anchor;
pub mod no_teacher;

// Optimizers
pub mod adamw;
pub mod muon;
pub mod sgd;

// Datasets
pub mod cut_outs;
mod file_hashes;
pub mod image_folder;
mod packed;
pub mod parquet;
pub mod scenes;
pub mod webdataset;

// Augmentation
pub mod multi_crop;
pub mod resized;

// Masking
pub mod block;
pub mod mask_sizes;
pub mod multi_block;
pub mod random;

// Probes
pub mod cls_patch_cosine;
pub mod correspondence;
pub mod depth;
pub mod dse;
pub mod effective_rank;
pub mod feature_distillation;
pub mod few_shot;
pub mod knn;
pub mod knn_segmentation;
mod lbfgs;
pub mod linear_classification;
mod linear_head;
pub mod linear_segmentation;
pub mod patch_similarity;
pub mod patch_spread;
mod pictures;
pub mod pixels;
mod probe_data;
pub mod retrieval;
pub mod robustness;
mod segmentation;
mod spectrum;
pub mod tracking;
mod windows;
