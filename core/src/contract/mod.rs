//! The contracts: traits, one a file, implemented by registered plugins.
//!
//! | kind | trait | in a recipe |
//! |---|---|---|
//! | backbone | [`Backbone`] | `[backbone]` |
//! | position encoding | [`PosEncoding`] | `[backbone.pos_encoding]` |
//! | loss | [`Loss`] | `[losses.<name>]` |
//! | scheduler | [`Scheduler`] | wherever a number may change over time |
//! | teacher policy | [`TeacherPolicy`] | `[teacher]`, `[teachers.<name>]` |
//! | dataset | [`Dataset`] | `[data]` |
//! | augmentation | [`Augmentation`] | `[crops]` |
//! | masking | [`Masking`] | `[masking]` |
//! | probe | [`Probe`] | `[probes.<name>]` |
//! | optimizer | [`Optimizer`] | `[optimizer]` |
//!
//! Shapes use these letters: `B` images, `G` global crops an image, `L` local crops an image, `P` patches, `R`
//! register tokens, `N = 1 + R + P` tokens, `D` width, `H` heads, `K` prototypes, `M` masked patches.

mod augmentation;
mod backbone;
mod dataset;
mod image_size;
mod loss;
mod masking;
mod optimizer;
mod pixels;
mod plan;
mod pos_encoding;
mod probe;
mod scalars;
mod scheduler;
mod teacher_policy;
mod view;

pub use augmentation::{Augmentation, CropContext, WHOLE_IMAGE};
pub use backbone::{Backbone, BackboneContext, Cost, Crops, Draws, Features, Mode};
pub use dataset::{at_size, DataContext, Dataset, FieldSpec, Sample, Summary};
pub use image_size::ImageSize;
pub use loss::{
    Loss, LossContext, LossCost, LossRows, LossValue, ModelOutputs, NamedTeacher, Needs, Outputs, State, StateSpec,
    StepContext, TargetSpec, Targets,
};
pub use masking::{Masking, Unmasked};
pub use optimizer::{Direction, Optimizer, ParamUpdate, Reach};
pub use pixels::Pixels;
pub use plan::{ColorPlan, CropPlan, Cut, ImagePlan, Jitter, JitterOp, Rect};
pub use pos_encoding::{Grid, PosContext, PosEncoding, PosTables};
pub use probe::{Annotation, Combine, Panel, Parts, Picture, Probe, ProbeContext, Score};
pub(crate) use scalars::Feed;
pub use scheduler::{At, Schedule, Scheduler};
pub use teacher_policy::{Follow, Role, TeacherPolicy};
pub use view::{BatchImage, CropBox, ImageContext, ImageDraws, SeenBy, Tile, View};
