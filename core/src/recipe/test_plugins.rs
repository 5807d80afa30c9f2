//! Small plugins that the tests of this module name in recipes.

use serde::{Deserialize, Serialize};

use crate::contract::*;
use crate::contract::{BackboneContext, CropContext, LossContext};
use crate::params::{Init, ParamSpec, Params};
use crate::registry::Chosen;
use crate::rng::Rng;
use crate::{plugin, Error, Result, Tensor};

macro_rules! config {
    ($(#[$meta:meta])* $name:ident { $($(#[$field_meta:meta])* $field:ident: $type:ty = $default:expr,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Serialize, Deserialize, schemars::JsonSchema)]
        #[serde(deny_unknown_fields, default)]
        pub(super) struct $name { $($(#[$field_meta])* $field: $type,)* }
        impl Default for $name {
            fn default() -> Self { Self { $($field: $default,)* } }
        }
    };
}

config! {
    /// A line from one number to another.
    Ramp {
        /// Value at step 0.
        from: f64 = 0.0,
        /// Value at the end.
        to: f64 = 1.0,
    }
}
impl Scheduler for Ramp {
    fn value(&self, at: At) -> f64 {
        self.from + (self.to - self.from) * at.step as f64 / at.total as f64
    }
}
plugin!(Scheduler, "test_ramp", Ramp);

config! {
    /// Coordinates in a box.
    Box_ {
        /// Largest factor of a random rescale.
        rescale: f64 = 2.0,
    }
}
impl PosEncoding for Box_ {}
plugin!(PosEncoding, "test_box", Box_);

config! {
    /// One matrix.
    Matrix {
        /// Width.
        dim: usize = 8,
        /// Attention heads.
        heads: usize = 2,
        /// Side of a patch in pixels.
        patch_size: usize = 16,
        /// Where patches are.
        pos_encoding: Chosen<dyn PosEncoding> =
            Chosen::from_value(&figment::value::Dict::new().into(), Some("test_box")).expect("all keys have defaults"),
    }
}
impl Matrix {
    fn build(self, context: &mut BackboneContext<'_>) -> Result<Box<dyn Backbone>> {
        if !self.dim.is_multiple_of(self.heads) {
            return Err(Error::user(format!("width {} is not {} equal heads", self.dim, self.heads), "change heads"));
        }
        context.params.add("weight", &[self.dim, 3 * self.patch_size * self.patch_size], Init::Zeros);
        Ok(Box::new(self))
    }
}
impl Backbone for Matrix {
    fn dim(&self) -> usize {
        self.dim
    }
    fn patch_size(&self) -> usize {
        self.patch_size
    }
    fn forward(&self, _: &Params<'_>, _: &[Crops], _: Mode<'_>) -> Result<Vec<Features>> {
        Ok(Vec::new())
    }
    /// One operation and one kept number a patch, and its features.
    fn cost(&self, crops: &[(usize, Grid)]) -> Cost {
        let patches = crops.iter().map(|(n, grid)| (n * grid.patches()) as f64).sum();
        Cost { forward_flops: patches, activations: patches, features: patches * self.dim as f64, ..Cost::default() }
    }
}
plugin!(Backbone, "test_matrix", Matrix, Matrix::build);

macro_rules! loss {
    ($config:ident, $name:literal, $needs:expr) => {
        loss!($config, $name, $needs, |config: $config, _: &mut LossContext<'_>| Ok(Box::new(config) as Box<dyn Loss>));
    };
    ($config:ident, $name:literal, $needs:expr, $build:expr) => {
        impl Loss for $config {
            fn needs(&self) -> Needs {
                ($needs)(self)
            }
            fn compute(&self, _: &Params<'_>, _: &Outputs<'_>, c: &StepContext<'_>) -> Result<LossValue> {
                Ok(LossValue::of(Tensor::scalar(0.0, c.dtype)))
            }
        }
        plugin!(Loss, $name, $config, $build);
    };
}

config! {
    /// Compares CLS tokens.
    Cls {
        /// Softness of the teacher.
        temperature: Schedule = Schedule::constant(0.07),
        /// The projection head.
        head: TestHead = TestHead::default(),
    }
}
config! {
    /// A linear layer to prototypes.
    TestHead {
        /// Layers.
        #[schemars(range(min = 1, max = 100))]
        layers: usize = 2,
        /// Width.
        #[schemars(range(min = 1, max = 10_000_000))]
        bottleneck: usize = 2,
        /// Prototypes.
        #[schemars(range(min = 2, max = 2_147_483_647))]
        prototypes: usize = 8,
    }
}
impl Cls {
    fn build(self, context: &mut LossContext<'_>) -> Result<Box<dyn Loss>> {
        context.params.add("weight", &[self.head.prototypes, self.head.bottleneck], Init::Zeros);
        Ok(Box::new(self))
    }
}
loss!(
    Cls,
    "test_cls",
    |c: &Cls| {
        let targets = Some(TargetSpec { width: c.head.prototypes, distribution: true, features: false });
        Needs { targets, ..Needs::default() }
    },
    Cls::build
);

config! {
    /// Compares masked patches.
    Masked {
        /// Softness of the student.
        student_temperature: f64 = 0.1,
    }
}
loss!(Masked, "test_masked", |_: &Masked| Needs { masks: true, ..Needs::default() });

config! {
    /// Pushes images apart.
    Spread {
        /// Neighbours.
        top_k: usize = 1,
    }
}
loss!(Spread, "test_spread", |s: &Spread| Needs { min_batch: s.top_k + 1, ..Needs::default() });

config! {
    /// Compares with a teacher of its own.
    Compared {
        /// Whether negative similarities count.
        negatives: bool = true,
    }
}
loss!(Compared, "test_compared", |_: &Compared| Needs { teachers: vec!["slow".into()], ..Needs::default() });

/// Reads its keys carelessly: unknown ones pass.
#[derive(Debug, Serialize, Deserialize, schemars::JsonSchema)]
pub(super) struct Careless {
    /// A number.
    #[serde(default)]
    number: f64,
}
loss!(Careless, "test_careless", |_: &Careless| Needs::default());

config! {
    /// Hides the first patches of every crop.
    First {
        /// Share of the patches.
        #[schemars(range(min = 0, max = 1))]
        share: f64 = 0.5,
        /// Two shares that mean nothing.
        #[schemars(inner(range(min = 0, max = 1)), extend("x-ascending" = true))]
        ratio: [f64; 2] = [0.0, 1.0],
    }
}
impl First {
    fn of_crop(&self, grid: Grid) -> usize {
        (grid.patches() as f64 * self.share) as usize
    }
}
impl Masking for First {
    fn masked(&self, crops: usize, grid: Grid) -> usize {
        crops * self.of_crop(grid)
    }
    fn share(&self, _: Grid) -> f64 {
        self.share
    }
    fn unmasked(&self, _: usize, grid: Grid) -> Option<Unmasked> {
        let reason = format!("{} of {} patches is less than one", self.share, grid.patches());
        (self.of_crop(grid) == 0).then(|| Unmasked { key: "share", reason, help: "use at least 0.1".into() })
    }
    fn draw(&self, _: &mut Rng, crops: usize, grid: Grid) -> Vec<Vec<bool>> {
        vec![(0..grid.patches()).map(|patch| patch < self.of_crop(grid)).collect(); crops]
    }
}
plugin!(default Masking, "test_first", First);

config! {
    /// The whole image, over and over.
    Whole {
        /// A range that means nothing.
        #[schemars(extend("items" = { "type": "number", "exclusiveMinimum": 0, "maximum": 1 }, "x-ascending" = true))]
        local_scale: [f64; 2] = [0.5, 1.0],
        /// Three numbers that mean nothing.
        #[schemars(inner(range(min = 0, max = 1)))]
        blur: [f64; 3] = [0.0; 3],
        /// Whether local crops may not be larger than global ones.
        nested: bool = false,
    }
}
impl Whole {
    fn build(self, crops: &mut CropContext) -> Result<Box<dyn Augmentation>> {
        let CropContext { global_size, local_size, local_count, .. } = *crops;
        if self.nested && local_count > 0 && local_size > global_size {
            return Err(Error::user(format!("{local_size} is more than {global_size}"), "set crops.nested = false"));
        }
        Ok(Box::new(self))
    }
}
impl Augmentation for Whole {
    fn plan(&self, (width, height): (usize, usize), _: &dyn Fn(u64) -> Rng) -> ImagePlan {
        let cut = Cut::Image { area: Rect { x: 0, y: 0, width, height }, flip: false };
        let crop = CropPlan { cut, color: ColorPlan::default(), blur: None, solarize: None };
        ImagePlan { shared_color: None, globals: [crop; 2], locals: Vec::new() }
    }
}
plugin!(default Augmentation, "test_whole", Whole, Whole::build);

config! {
    /// There is no teacher.
    NoTeacher {}
}
impl TeacherPolicy for NoTeacher {
    fn exists(&self) -> bool {
        false
    }
    fn start(&self) -> Role {
        Role::Student
    }
    fn after_step(&self, _: At) -> Follow {
        Follow::Keep
    }
}
plugin!(default TeacherPolicy, "test_no_teacher", NoTeacher);

config! {
    /// Hides nothing.
    Nothing {}
}
impl Masking for Nothing {
    fn masked(&self, _: usize, _: Grid) -> usize {
        0
    }
    fn share(&self, _: Grid) -> f64 {
        0.0
    }
    fn unmasked(&self, _: usize, _: Grid) -> Option<Unmasked> {
        Some(Unmasked { key: "plugin", reason: "it hides nothing".into(), help: "choose another".into() })
    }
    fn draw(&self, _: &mut Rng, crops: usize, grid: Grid) -> Vec<Vec<bool>> {
        vec![vec![false; grid.patches()]; crops]
    }
}
plugin!(Masking, "test_a_nothing", Nothing);

config! {
    /// Follows slowly, on crops of a size of its own.
    Slow {
        /// Share that stays.
        momentum: Schedule = Schedule::constant(0.99),
        /// Side of its own crops; 0: those of the student.
        crop_size: usize = 0,
    }
}
impl TeacherPolicy for Slow {
    fn start(&self) -> Role {
        Role::Student
    }
    fn after_step(&self, at: At) -> Follow {
        Follow::Ema { momentum: self.momentum.at(at) }
    }
    fn crop_size(&self) -> Option<usize> {
        (self.crop_size > 0).then_some(self.crop_size)
    }
}
plugin!(TeacherPolicy, "test_slow", Slow);

config! {
    /// Grey images.
    Greys {
        /// How many.
        count: usize = 10,
    }
}
impl Dataset for Greys {
    fn len(&self) -> usize {
        self.count
    }
    fn get(&self, _: usize) -> Result<Sample> {
        Ok(Sample { width: 64, height: 64, pixels: vec![0u8; 3 * 64 * 64].into(), ..Sample::default() })
    }
}
plugin!(Dataset, "test_greys", Greys);

config! {
    /// Wants labels.
    Knn {
        /// Neighbours.
        k: usize = 20,
    }
}
impl Probe for Knn {
    fn run(&self, _: &ProbeContext<'_>) -> Result<Vec<Score>> {
        Ok(Vec::new())
    }
    fn needs(&self) -> &'static [Annotation] {
        &[Annotation::Labels]
    }
}
plugin!(Probe, "test_knn", Knn);

config! {
    /// The optimizer of a recipe that names none.
    Adam {
        /// Decay of the moments.
        #[schemars(extend("items" = { "type": "number", "minimum": 0, "exclusiveMaximum": 1 }))]
        betas: [f64; 2] = [0.9, 0.999],
        /// Added to the root.
        #[schemars(range(min = 1e-20, max = 1000))]
        eps: f64 = 1e-8,
    }
}
config! {
    /// Goes along the gradient.
    Plain {
        /// Share that stays.
        momentum: f64 = 0.9,
    }
}
macro_rules! optimizer {
    ([$($kind:tt)*] $config:ident, $name:literal, $moments:expr) => {
        impl Optimizer for $config {
            fn moments(&self) -> &[&'static str] {
                $moments
            }
            fn direction(&self, param: &ParamUpdate<'_>) -> Result<Direction> {
                Ok(Direction { direction: param.gradient.clone(), moments: param.moments.clone() })
            }
            fn reach(&self, _: &ParamSpec, _: At, _: u64) -> Reach {
                Reach { memory: 1.0, share: 1.0, gain: 1.0, most: 0.0 }
            }
        }
        plugin!($($kind)*, $name, $config);
    };
}
optimizer!([default Optimizer] Adam, "adamw", &["mean", "square"]);
optimizer!([Optimizer] Plain, "test_plain", &["mean"]);

/// A small recipe that is right.
pub(crate) const RECIPE: &str = r#"name = "small"
steps = 100
[backbone]
plugin = "test_matrix"
[data]
plugin = "test_greys"
[teacher]
plugin = "test_slow"
[losses.test_cls]
"#;

/// [`RECIPE`] with more text after it.
pub(crate) fn with(more: &str) -> String {
    format!("{RECIPE}{more}\n")
}
