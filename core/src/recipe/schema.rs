//! What a recipe says: every table and key, with its default.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::contract::{Backbone, Dataset, Loss, Probe, Schedule, TeacherPolicy};
use crate::registry::{plugin_schema, Chosen, Kind};

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
    pub steps: u64,
    /// Where it runs: `auto` takes a GPU when there is one.
    #[serde(default)]
    pub device: DeviceChoice,
    /// Arithmetic of the step.
    #[serde(default)]
    pub precision: Precision,
    /// Start from these weights (a run folder, a checkpoint folder or a safetensors file): student and teacher.
    /// Optimizer and schedules start anew.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init_from: Option<PathBuf>,
    /// The model: a plugin.
    pub backbone: Chosen<dyn Backbone>,
    /// Where images come from: a plugin.
    pub data: Chosen<dyn Dataset>,
    /// Images a step and how they are read.
    #[serde(default)]
    pub batch: BatchConfig,
    /// Views cut from every image.
    #[serde(default)]
    pub crops: CropConfig,
    /// Which patches are hidden from the student.
    #[serde(default)]
    pub masking: MaskConfig,
    /// What the student is taught: `[losses.<name>]`, `plugin` defaults to the name.
    pub losses: Losses,
    /// How the teacher of DINO and iBOT follows the student: a plugin.
    pub teacher: Chosen<dyn TeacherPolicy>,
    /// The Gram teacher: a plugin. Needed when an enabled loss asks for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gram_teacher: Option<Chosen<dyn TeacherPolicy>>,
    /// How weights are updated.
    #[serde(default)]
    pub optimizer: OptimizerConfig,
    /// What is measured with the weights frozen: `[probes.<name>]`, `plugin` defaults to the name.
    #[serde(default)]
    pub probes: Probes,
    /// What is written while training.
    #[serde(default)]
    pub log: LogConfig,
    /// What is kept of the weights.
    #[serde(default)]
    pub checkpoint: CheckpointConfig,
    /// What happens when a loss or gradient is not finite.
    #[serde(default)]
    pub on_non_finite: OnNonFinite,
}

/// Where a run runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DeviceChoice {
    /// A GPU when there is one, otherwise the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
}

/// Arithmetic of the step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// 32-bit floats.
    #[default]
    F32,
    /// 64-bit floats: for checks, on the CPU.
    F64,
}

/// Images a step and how they are read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BatchConfig {
    /// Images a step.
    pub size: usize,
    /// Parts into which a step's images are split to save memory. Teacher targets (Sinkhorn-Knopp, centring) are
    /// computed over all parts; KoLeo looks for neighbours inside a part.
    pub micro_batches: usize,
    /// Threads that read and augment; 0: one a core.
    pub loader_threads: usize,
    /// Steps prepared ahead.
    pub prefetch: usize,
    /// The run stops when more than this share of samples cannot be read.
    pub max_broken_share: f64,
}

impl Default for BatchConfig {
    fn default() -> Self {
        Self { size: 64, micro_batches: 1, loader_threads: 0, prefetch: 2, max_broken_share: 0.01 }
    }
}

/// Views cut from every image: two global crops, some local ones, with the reference's augmentation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CropConfig {
    /// Side of a global crop in pixels.
    pub global_size: usize,
    /// Area of a global crop as a share of the image's: [least, most].
    pub global_scale: [f64; 2],
    /// Local crops an image.
    pub local_count: usize,
    /// Side of a local crop in pixels.
    pub local_size: usize,
    /// Area of a local crop as a share of the image's: [least, most].
    pub local_scale: [f64; 2],
    /// Whether crops are mirrored half of the time.
    pub horizontal_flip: bool,
    /// One colour distortion for all crops of an image instead of one each.
    pub share_color_jitter: bool,
    /// Local crops are cut from the global ones instead of from the image.
    pub local_from_global: bool,
    /// Whether the Gram teacher's crops are spared the colour distortion of the student's.
    pub gram_without_distortion: bool,
    /// Probability that a crop is blurred: [first global, second global, local]. The default is what the reference
    /// really does; its source asks for [1.0, 0.1, 0.5] (BYOL's values) but applies each with probability 1 - p
    /// (facebookresearch/dinov3 issue 286).
    pub blur: [f64; 3],
    /// Mean of the pixels per channel, in [0, 1].
    pub mean: [f32; 3],
    /// Standard deviation of the pixels per channel, in [0, 1].
    pub std: [f32; 3],
}

impl Default for CropConfig {
    fn default() -> Self {
        Self {
            global_size: 256,
            global_scale: [0.32, 1.0],
            local_count: 8,
            local_size: 112,
            local_scale: [0.05, 0.32],
            horizontal_flip: true,
            share_color_jitter: false,
            local_from_global: false,
            gram_without_distortion: false,
            blur: [0.0, 0.9, 0.5],
            mean: [0.485, 0.456, 0.406],
            std: [0.229, 0.224, 0.225],
        }
    }
}

/// Which patches of the global crops are hidden from the student, by the reference's block-wise sampler.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MaskConfig {
    /// Share of the global crops that are masked at all.
    pub probability: f64,
    /// Share of patches masked in those, spread evenly over [least, most].
    pub ratio: [f64; 2],
    /// Shift every mask around the torus by a random amount.
    pub random_circular_shift: bool,
}

impl Default for MaskConfig {
    fn default() -> Self {
        Self { probability: 0.5, ratio: [0.1, 0.5], random_circular_shift: false }
    }
}

/// AdamW with the reference's parameter groups.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerConfig {
    /// Learning rate.
    pub lr: Schedule,
    /// Decoupled weight decay; none on biases, norms and LayerScale.
    pub weight_decay: Schedule,
    /// Decay of the first and second moment.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// The gradient of each sub-model (backbone, every head) is scaled down to at most this L2 norm; 0: no clipping.
    pub clip_grad: f64,
    /// Learning rate of block i of n is multiplied by this to the power n - i (embeddings: n + 1).
    pub layerwise_decay: f64,
    /// Learning rate of the patch embedding is multiplied by this as well.
    pub patch_embed_lr_mult: f64,
    /// The last layer of every head does not move for this many steps (its moments do).
    pub freeze_last_layer_steps: u64,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            lr: Schedule::constant(1e-3),
            weight_decay: Schedule::constant(0.04),
            betas: [0.9, 0.999],
            eps: 1e-8,
            clip_grad: 3.0,
            layerwise_decay: 0.9,
            patch_embed_lr_mult: 0.2,
            freeze_last_layer_steps: 0,
        }
    }
}

/// What is written while training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// Steps between lines of `metrics.jsonl`.
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
    /// Steps between checkpoints; 0: only at the end and on interruption.
    pub every: u64,
    /// Checkpoints kept, newest first.
    pub keep: usize,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        Self { every: 0, keep: 2 }
    }
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
}

/// A loss in a recipe: the plugin's own keys and these.
#[derive(Clone, Debug, PartialEq)]
pub struct LossEntry {
    /// Whether it is computed at all.
    pub enabled: bool,
    /// What it is multiplied by in the total.
    pub weight: Schedule,
    /// The plugin.
    pub loss: Chosen<dyn Loss>,
}

/// A probe in a recipe: the plugin's own keys and these.
#[derive(Clone, Debug, PartialEq)]
pub struct ProbeEntry {
    /// Whether it is run at all.
    pub enabled: bool,
    /// Steps between runs; 0: only at the end.
    pub every: u64,
    /// The plugin.
    pub probe: Chosen<dyn Probe>,
}

/// Named tables of plugins: `[losses.<name>]`, `[probes.<name>]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Table<E>(pub BTreeMap<String, E>);

/// `[losses.<name>]`.
pub type Losses = Table<LossEntry>;
/// `[probes.<name>]`.
pub type Probes = Table<ProbeEntry>;

impl<E> Default for Table<E> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

/// A plugin table with keys of the recipe's own beside the plugin's.
pub trait Entry: Sized + fmt::Debug {
    /// The contract of the plugin.
    type Plugin: ?Sized + Kind;
    /// The recipe's own keys, with their schemas.
    fn extra() -> serde_json::Map<String, serde_json::Value>;
    /// From the recipe's own keys (those present) and the plugin.
    fn read(own: figment::value::Dict, plugin: Chosen<Self::Plugin>) -> Result<Self, figment::Error>;
    /// The recipe's own keys, and the plugin.
    fn parts(&self) -> (Vec<(&'static str, serde_json::Value)>, &Chosen<Self::Plugin>);
}

fn take<T: for<'de> Deserialize<'de>>(own: &figment::value::Dict, key: &str, default: T) -> Result<T, figment::Error> {
    own.get(key).map_or(Ok(default), |v| v.deserialize().map_err(|e: figment::Error| e.with_path(key)))
}

impl Entry for LossEntry {
    type Plugin = dyn Loss;

    fn extra() -> serde_json::Map<String, serde_json::Value> {
        let mut extra = serde_json::Map::new();
        let enabled = "Whether the loss is computed at all.";
        extra.insert("enabled".into(), serde_json::json!({"type": "boolean", "default": true, "description": enabled}));
        let weight = "What it is multiplied by in the total: a number or a scheduler.";
        extra.insert(
            "weight".into(),
            serde_json::json!({"type": ["number", "object"], "default": 1.0, "description": weight}),
        );
        extra
    }

    fn read(own: figment::value::Dict, loss: Chosen<dyn Loss>) -> Result<Self, figment::Error> {
        let weight = take(&own, "weight", Schedule::constant(1.0))?;
        Ok(Self { enabled: take(&own, "enabled", true)?, weight, loss })
    }

    fn parts(&self) -> (Vec<(&'static str, serde_json::Value)>, &Chosen<dyn Loss>) {
        let weight = serde_json::to_value(&self.weight).expect("a schedule is plain data");
        (vec![("enabled", self.enabled.into()), ("weight", weight)], &self.loss)
    }
}

impl Entry for ProbeEntry {
    type Plugin = dyn Probe;

    fn extra() -> serde_json::Map<String, serde_json::Value> {
        let mut extra = serde_json::Map::new();
        let enabled = "Whether the probe is run at all.";
        extra.insert("enabled".into(), serde_json::json!({"type": "boolean", "default": true, "description": enabled}));
        let every = "Steps between runs; 0: only at the end.";
        extra.insert(
            "every".into(),
            serde_json::json!({"type": "integer", "minimum": 0, "default": 0, "description": every}),
        );
        extra
    }

    fn read(own: figment::value::Dict, probe: Chosen<dyn Probe>) -> Result<Self, figment::Error> {
        Ok(Self { enabled: take(&own, "enabled", true)?, every: take(&own, "every", 0)?, probe })
    }

    fn parts(&self) -> (Vec<(&'static str, serde_json::Value)>, &Chosen<dyn Probe>) {
        (vec![("enabled", self.enabled.into()), ("every", self.every.into())], &self.probe)
    }
}

impl<E: Entry> Serialize for Table<E> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, entry)| {
            let (own, plugin) = entry.parts();
            let mut table = serde_json::Map::new();
            table.insert("plugin".into(), plugin.name().into());
            table.extend(own.into_iter().map(|(k, v)| (k.to_string(), v)));
            if let Some(config) = plugin.config().as_object() {
                table.extend(config.clone());
            }
            (name, table)
        }))
    }
}

impl<'de, E: Entry> Deserialize<'de> for Table<E> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use figment::value::{Dict, Value};
        let tables = <BTreeMap<String, Value> as Deserialize>::deserialize(deserializer)?;
        let keys = E::extra();
        let read = |(name, value): (String, Value)| -> Result<(String, E), figment::Error> {
            let Value::Dict(tag, table) = value else {
                let kind = figment::error::Kind::InvalidType(value.to_actual(), "a table".into());
                return Err(figment::Error::from(kind).with_path(&name));
            };
            let (own, rest): (Dict, Dict) = table.into_iter().partition(|(k, _)| keys.contains_key(k));
            let entry = Chosen::from_value(&Value::Dict(tag, rest), Some(&name)).and_then(|p| E::read(own, p));
            Ok((name.clone(), entry.map_err(|e| e.with_path(&name))?))
        };
        let entries: Result<BTreeMap<String, E>, figment::Error> = tables.into_iter().map(read).collect();
        entries.map(Self).map_err(|e| D::Error::custom(crate::registry::Nested::encode(&e)))
    }
}

impl<E: Entry> JsonSchema for Table<E> {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        format!("table_of_{}", E::Plugin::NAME).into()
    }

    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        let entry = plugin_schema::<E::Plugin>(generator, &E::extra(), None);
        schemars::json_schema!({ "type": "object", "additionalProperties": entry })
    }
}
