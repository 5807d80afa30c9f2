//! What a recipe says: every table and key, with its default.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize, Serializer};

use super::beside::{BackboneEntry, CropsEntry, OptimizerEntry};
use super::continue_from::ContinueFrom;
use super::entries::{Augmentations, Losses, Probes, Teachers};
use crate::contract::{Dataset, Masking, Schedule, TeacherPolicy};
use crate::registry::Chosen;
use crate::{DType, Device, Error};

/// One run: what is trained, on what, how, and what is measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Short name, used for the run's folder.
    pub name: String,
    /// Everything random in the run is a function of this number.
    #[serde(default)]
    pub seed: u64,
    /// Optimizer steps of the run.
    #[schemars(range(min = 1, max = 1_000_000_000_000_000u64))]
    pub steps: u64,
    /// Where it runs: `auto` takes a GPU when there is one.
    #[serde(default)]
    pub device: DeviceChoice,
    /// Arithmetic of the step.
    #[serde(default)]
    pub precision: Precision,
    /// Initialize student and teacher from these weights (a run, a checkpoint, a weights folder or a safetensors file),
    /// and the heads where the weights include them. Optimizer and schedules start from step 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "path"))]
    pub init_from: Option<PathBuf>,
    /// Which weights of `init_from` initialize both student and teacher; by default each model starts from its own
    /// weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init_role: Option<InitRole>,
    /// Continue from a checkpoint of another run as if it belonged to this run: weights, moments, the losses' state and
    /// the step. `steps` includes the steps of that run. This recipe may differ; anything new in it starts as in a new
    /// run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub continue_from: Option<ContinueFrom>,
    /// The model: a plugin. With `weights`, it may be omitted: they determine the plugin.
    pub backbone: BackboneEntry,
    /// Where images come from: a plugin.
    pub data: Chosen<dyn Dataset>,
    /// Images a step and how they are read.
    #[serde(default)]
    pub batch: BatchConfig,
    /// Views cut from every image, and how they are distorted: sizes and numbers, and a plugin.
    #[serde(default)]
    pub crops: CropsEntry,
    /// More ways to crop and distort every image, `[augmentations.<name>]`, for losses that take their views from them;
    /// `plugin` defaults to the name. Each gives two crops of `crops.global_size`.
    #[serde(default, skip_serializing_if = "Augmentations::is_empty")]
    pub augmentations: Augmentations,
    /// Which patches of the global crops are hidden from the student: a plugin.
    #[serde(default)]
    pub masking: Chosen<dyn Masking>,
    /// What the student is taught: `[losses.<name>]`, `plugin` defaults to the name.
    pub losses: Losses,
    /// How the teacher follows the student: a plugin. Without the table there is none.
    #[serde(default)]
    pub teacher: Chosen<dyn TeacherPolicy>,
    /// Further teachers, `[teachers.<name>]`, for losses that ask for them by name; `plugin` defaults to the name.
    #[serde(default, skip_serializing_if = "Teachers::is_empty")]
    pub teachers: Teachers,
    /// How weights are updated: a plugin, AdamW unless another is named.
    #[serde(default)]
    pub optimizer: OptimizerEntry,
    /// What is measured with the weights frozen: `[probes.<name>]`, `plugin` defaults to the name.
    #[serde(default)]
    pub probes: Probes,
    /// What is written while training.
    #[serde(default)]
    pub log: LogConfig,
    /// What is kept of the weights.
    #[serde(default)]
    pub checkpoint: CheckpointConfig,
    /// Early stopping: end the run when a score stops improving. Without this table the run does all its steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop: Option<StopConfig>,
    /// What happens when a loss or gradient is not finite.
    #[serde(default)]
    pub on_non_finite: OnNonFinite,
    /// Skip the update of steps whose loss jumps. Without this table no step is skipped for its loss.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_spike: Option<SpikeConfig>,
}

/// Which weights of another run a run starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum InitRole {
    /// The trained model.
    Student,
    /// The EMA teacher (the student's average): the reference starts its third stage from it.
    Teacher,
}

/// Where a run runs: `auto` (the first GPU if there is one, otherwise the CPU), `cpu`, `cuda`, or `cuda:N`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(extend("pattern" = "^(auto|cpu|cuda(:[0-9]+)?)$"))]
pub struct DeviceChoice(String);

impl Default for DeviceChoice {
    fn default() -> Self {
        Self("auto".into())
    }
}

impl TryFrom<String> for DeviceChoice {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let number = |text: &str| text.parse::<usize>().is_ok();
        let known = ["auto", "cpu", "cuda"].contains(&text.as_str());
        match known || text.strip_prefix("cuda:").is_some_and(number) {
            true => Ok(Self(text)),
            false => Err(format!("`{text}` is not a device: choose auto, cpu, cuda or cuda:N")),
        }
    }
}

impl From<DeviceChoice> for String {
    fn from(choice: DeviceChoice) -> Self {
        choice.0
    }
}

/// Arithmetic of the step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// `bf16` on a GPU, `f32` on the CPU.
    #[default]
    Auto,
    /// GPU only: features and matrix products in bfloat16; sums, master weights, moments and EMA in 32 bits.
    Bf16,
    /// 32-bit floats; on a GPU, products take TF32 tensor cores (10 bits of mantissa).
    Tf32,
    /// 32-bit floats.
    F32,
    /// 64-bit floats: for checks, on the CPU.
    F64,
}

impl Precision {
    /// Why it cannot be had on a CPU, or on a GPU.
    fn refuses(self, on_cpu: bool) -> Option<&'static str> {
        match (on_cpu, self) {
            (false, Self::F64) => Some("f64 is for checks on the CPU"),
            (true, Self::Bf16 | Self::Tf32) => Some("it is for GPUs, and this run is on the CPU"),
            _ => None,
        }
    }
}

impl Recipe {
    /// Where the run runs, opened.
    ///
    /// # Errors
    /// If there is no such device here, or it does not know the recipe's precision.
    pub fn device(&self) -> crate::Result<Device> {
        let device: Device = self.device.0.parse()?;
        let Some(problem) = self.precision.refuses(device == Device::Cpu) else { return Ok(device) };
        let precision = serde_json::to_string(&self.precision).expect("a name");
        let help = "set precision = \"auto\", or choose another device";
        Err(Error::user(format!("precision = {precision}: {problem}"), help))
    }

    /// All teachers by their keys: `teacher`, `teachers.<name>`.
    pub fn all_teachers(&self) -> Vec<(String, &Chosen<dyn TeacherPolicy>)> {
        let named = self.teachers.0.iter().map(|(name, entry)| (format!("teachers.{name}"), entry));
        [("teacher".to_string(), &self.teacher)].into_iter().chain(named).collect()
    }

    /// Why the precision cannot be had on the device that the recipe names; `None` too if it leaves the device open.
    pub(crate) fn wrong_precision(&self) -> Option<&'static str> {
        match self.device.0.as_str() {
            "auto" => None,
            device => self.precision.refuses(device == "cpu"),
        }
    }

    /// The type of features on a device.
    pub fn dtype(&self, device: Device) -> DType {
        match (self.precision, device) {
            (Precision::F64, _) => DType::F64,
            (Precision::Bf16, _) | (Precision::Auto, Device::Cuda(_)) => DType::BF16,
            _ => DType::F32,
        }
    }
}

/// Images a step and how they are read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BatchConfig {
    /// Images a step.
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub size: usize,
    /// Parts into which a step's images are split to save memory. Teacher targets (Sinkhorn-Knopp, centring) are
    /// computed over all parts; losses that compare images compare only images of the same part.
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub micro_batches: usize,
    /// Groups of micro-batches. Each group is summed separately, then the sums are added in a fixed order. So this many
    /// processes, or this number divided by a power of two, can share a step and give the same bits. A power of two that
    /// divides `micro_batches`.
    #[schemars(range(min = 1, max = 65536))]
    pub shards: usize,
    /// Threads that read and augment; 0: one a core.
    #[schemars(range(max = 1024))]
    pub loader_threads: usize,
    /// Steps prepared ahead.
    #[schemars(range(max = 1024))]
    pub prefetch: usize,
    /// The run stops when more than this share of samples cannot be read.
    #[schemars(range(min = 0, max = 1))]
    pub max_broken_share: f64,
}

impl Default for BatchConfig {
    fn default() -> Self {
        Self { size: 64, micro_batches: 1, shards: 1, loader_threads: 0, prefetch: 2, max_broken_share: 0.01 }
    }
}

impl BatchConfig {
    /// Images of a micro-batch.
    pub fn images(&self) -> usize {
        self.size / self.micro_batches.max(1)
    }
}

/// The usual mistake about the pixels' mean and standard deviation.
const BY_255: &str = "pixels are in [0, 1] here: divide numbers that are meant for 0 to 255 by 255";

/// The crops of every image, for every augmentation: two global crops, some local crops, and the crops of teachers that
/// have their own crop size.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CropConfig {
    /// Side of a global crop in pixels.
    #[schemars(range(min = 1, max = 16384))]
    pub global_size: usize,
    /// Local crops an image.
    #[schemars(range(max = 1000))]
    pub local_count: usize,
    /// Side of a local crop in pixels.
    #[schemars(range(min = 1, max = 16384))]
    pub local_size: usize,
    /// Sets of sizes that replace `global_size`, `local_size` and a teacher's `crop_size`: every step draws one set
    /// with a probability given by its share. Empty: the sizes never change. High-resolution adaptation trains on
    /// several sizes at once.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub resolutions: Vec<Resolution>,
    /// Whether teachers' own crops are made without the colour distortion of the student's crops.
    pub teacher_without_distortion: bool,
    /// Mean of the pixels per channel, in [0, 1]: one number for every channel of the images. The default is ImageNet's, for RGB.
    #[serde(serialize_with = "as_written")]
    #[schemars(length(min = 1), inner(range(min = 0, max = 1)), extend("x-help" = BY_255))]
    pub mean: Vec<f32>,
    /// Standard deviation of the pixels per channel, in [0, 1]; as `mean`.
    #[serde(serialize_with = "as_written")]
    #[schemars(length(min = 1), inner(range(min = 0.001, max = 1)), extend("x-help" = BY_255))]
    pub std: Vec<f32>,
}

impl Default for CropConfig {
    fn default() -> Self {
        Self {
            global_size: 256,
            local_count: 8,
            local_size: 112,
            resolutions: Vec::new(),
            teacher_without_distortion: false,
            mean: vec![0.485, 0.456, 0.406],
            std: vec![0.229, 0.224, 0.225],
        }
    }
}

/// Crop sizes of some of the steps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Resolution {
    /// Share of the steps, relative to the other resolutions.
    #[schemars(extend("exclusiveMinimum" = 0, "maximum" = 1_000_000, "x-help" = "remove sizes that are never drawn"))]
    pub share: f64,
    /// Side of a global crop in pixels.
    #[schemars(range(min = 1, max = 16384))]
    pub global_size: usize,
    /// Side of a local crop in pixels.
    #[schemars(range(min = 1, max = 16384))]
    pub local_size: usize,
    /// Side of teachers' own crops in pixels, where they have any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 16384))]
    pub teacher_size: Option<usize>,
}

impl CropConfig {
    /// Channels of the images: as many as `mean` has numbers.
    pub fn channels(&self) -> usize {
        self.mean.len()
    }

    /// Every set of sizes with its share; `teacher` is the size of teachers' own crops.
    pub fn variants(&self, teacher: Option<usize>) -> Vec<Resolution> {
        let (global_size, local_size) = (self.global_size, self.local_size);
        match self.resolutions.is_empty() {
            true => vec![Resolution { share: 1.0, global_size, local_size, teacher_size: teacher }],
            // A run whose teachers have no crops of their own cuts none.
            false => {
                let own = |r: &Resolution| Resolution {
                    teacher_size: teacher.map(|own| r.teacher_size.unwrap_or(own)),
                    ..r.clone()
                };
                self.resolutions.iter().map(own).collect()
            }
        }
    }
}

/// Writes f32 as the shortest decimals that mean it: 0.485, not 0.48500001430511475.
pub(crate) fn as_written<S: Serializer>(values: &[f32], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(values.iter().map(|x| x.to_string().parse::<f64>().expect("a printed number is a number")))
}

/// What every optimizer has: rates, decay and clipping, by the reference's parameter groups.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerConfig {
    /// Learning rate.
    #[schemars(extend("minimum" = 0, "maximum" = 100))]
    pub lr: Schedule,
    /// Learning rate of the last layer of every head; by default `lr`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minimum" = 0, "maximum" = 100))]
    pub last_layer_lr: Option<Schedule>,
    /// Decoupled weight decay; none on biases, norms and LayerScale.
    #[schemars(extend("minimum" = 0, "maximum" = 1000))]
    pub weight_decay: Schedule,
    /// The gradient of each sub-model (backbone, every head) is scaled down to at most this L2 norm; 0: no clipping.
    #[schemars(range(min = 0, max = 1e9))]
    pub clip_grad: f64,
    /// Learning rate of block i of n is multiplied by this to the power n - i (embeddings: n + 1).
    #[schemars(extend("exclusiveMinimum" = 0, "maximum" = 1))]
    pub layerwise_decay: f64,
    /// Learning rate of the patch embedding is multiplied by this as well.
    #[schemars(range(min = 0, max = 100))]
    pub patch_embed_lr_mult: f64,
    /// The last layer of every head is frozen for this many steps (its moments are still updated); then it uses
    /// `last_layer_lr`.
    pub freeze_last_layer_steps: u64,
    /// How AdamW's moments are kept; by default `f32`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub moments: Option<MomentStorage>,
    /// On a GPU with features in bf16: keep the lower halves of weights and teachers, which only updates read, in pinned host memory.
    /// This takes 2 bytes per number of each off the GPU and moves 4 over the bus in every step. No result changes.
    pub offload: bool,
    /// On a GPU: keep the moments that take 32 bits in pinned host memory, which only updates read. This takes 8 bytes per weight off
    /// the GPU with `moments = "f32"` and moves 16 over the bus in every step. No result changes.
    pub offload_moments: bool,
    /// Of several processes each keeps its part of the teachers' weights alone; a layer is gathered when the teacher's forward pass
    /// comes to it, and let go behind it (ZeRO stage 3 for teachers, Rajbhandari et al., arXiv:1910.02054). This takes the teachers'
    /// bytes off all but one process a number, and moves those of a teacher's features once a micro-batch. No result changes. A
    /// `frozen` model that is learned from stays whole, and a teacher that no loss asks has no health measured.
    pub shard_teachers: bool,
    /// When weights are updated; by default `whole`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub update: Option<UpdateOrder>,
}

/// When weights are updated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum UpdateOrder {
    /// When all gradients are known.
    #[default]
    Whole,
    /// On a GPU: each layer as soon as its gradients are known, whose memory is then free (4 bytes per weight). `clip_grad` clips by
    /// the norm of the last step, because this step's is not known yet; a gradient that is not finite ends the run, because other
    /// layers are updated already. For AdamW and one micro-batch. On a CPU the same numbers, with all gradients kept.
    Fused,
}

/// What the optimizer's moments take of memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum MomentStorage {
    /// As wide as the weights: 8 bytes a weight.
    #[default]
    #[serde(rename = "f32")]
    F32,
    /// Moments of matrices with at least 4,096 numbers are stored in eight bits, in blocks of 256 with one scale each:
    /// 2.03 bytes per weight (Dettmers et al., arXiv:2110.02861). Vectors and prototypes keep 32 bits.
    #[serde(rename = "8bit")]
    EightBit,
}

impl OptimizerConfig {
    /// Whether each layer is updated as soon as its gradients are known.
    pub fn is_fused(&self) -> bool {
        self.update == Some(UpdateOrder::Fused)
    }
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            lr: Schedule::constant(1e-3),
            last_layer_lr: None,
            weight_decay: Schedule::constant(0.04),
            clip_grad: 3.0,
            layerwise_decay: 0.9,
            patch_embed_lr_mult: 0.2,
            freeze_last_layer_steps: 0,
            moments: None,
            offload: false,
            offload_moments: false,
            shard_teachers: false,
            update: None,
        }
    }
}

/// What is written while training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// Steps between lines of `metrics.jsonl`.
    #[schemars(range(min = 1))]
    pub every: u64,
    /// Whether TensorBoard event files are written too.
    pub tensorboard: bool,
    /// Steps between histograms of parameters and gradients in TensorBoard; 0: none.
    pub histograms_every: u64,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { every: 10, tensorboard: true, histograms_every: 0 }
    }
}

/// What is kept of the weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointConfig {
    /// Steps between checkpoints; 0: only at the end, on interruption and after `minutes`.
    pub every: u64,
    /// Also write a checkpoint after this many minutes, which replaces the previous one of this kind. It limits how much work is
    /// lost if the run is killed. If writing is slow, it takes at most a twentieth of the time. 0: none.
    #[schemars(range(min = 0, max = 1_000_000))]
    pub minutes: f64,
    /// Checkpoints kept, newest first.
    #[schemars(range(min = 1))]
    pub keep: usize,
    /// Steps between checkpoints that are kept forever, besides the newest ones: for later Gram teachers, forks and
    /// pictures over time; 0: none.
    pub keep_every: u64,
    /// Most megabytes (10^6 bytes) of a file; a larger tensor has one alone. More are split as Hugging Face splits them, with an
    /// index, and with `mpirun` or `torchrun` every process writes some of them. Writing takes so much host memory, not that
    /// of the whole model.
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub file_mb: u64,
}

impl CheckpointConfig {
    /// Whether a checkpoint is written after `done` steps.
    pub fn is_due(&self, done: u64) -> bool {
        [self.every, self.keep_every].iter().any(|every| *every > 0 && done.is_multiple_of(*every))
    }

    /// Most bytes of a file.
    pub(crate) fn file_bytes(&self) -> u64 {
        self.file_mb.saturating_mul(1_000_000)
    }
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        Self { every: 0, minutes: 10.0, keep: 2, keep_every: 0, file_mb: 5000 }
    }
}

/// A run ends when a score was not better in so many measurements.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StopConfig {
    /// The score: `probe/<name>/<score>`, as in `metrics.jsonl`, of a probe with `every`.
    pub metric: String,
    /// Consecutive measurements without improvement after which the run ends.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub patience: u64,
    /// Whether less is better.
    #[serde(default)]
    pub lower_is_better: bool,
    /// A score counts as better only if it improves on the best score before it by more than this.
    #[serde(default)]
    #[schemars(range(min = 0, max = 1e9))]
    pub min_delta: f64,
}

/// A step whose total loss jumps is not taken.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SpikeConfig {
    /// A loss is a jump if it exceeds the median of the last `window` steps by more than `factor - 1` times the
    /// absolute value of that median; for a positive median: if it is above `factor` times the median.
    #[serde(default = "spike_factor")]
    #[schemars(extend("exclusiveMinimum" = 1, "maximum" = 1_000_000))]
    pub factor: f64,
    /// Number of previous steps in the median, including steps that were not taken. The first `window` steps are all
    /// taken.
    #[serde(default = "spike_window")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub window: usize,
}

fn spike_factor() -> f64 {
    3.0
}

fn spike_window() -> usize {
    64
}

/// What happens when a loss or gradient is not finite: the weights are never updated with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum OnNonFinite {
    /// Capture the batch and stop.
    #[default]
    Stop,
    /// Capture the batch and go on with the next step, at most this many times in a run.
    Skip(u64),
    /// Capture the batch, go back to the last checkpoint that `checkpoint.every` asked for (or to the start), and continue
    /// from there with the data that come after this batch; at most this many times in a run.
    Rewind(u64),
}
