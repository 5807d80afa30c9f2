//! Published weights: which layouts there are, and which backbone reads and writes them.

mod names;
mod processor;

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use dinolab_core::files::{write_file, write_pieces};
use dinolab_core::weights::convert::{from_published, Piece, Rule};
use dinolab_core::weights::{
    check_free, write_folder, JsonTable, ModelInfo, Preprocessing, Source, TensorFiles, MODEL_FILE, WEIGHTS_FILE,
};
use dinolab_core::{Error, Result};
use safetensors::tensor::{Dtype, View};
use serde_json::Value as Json;

use crate::{convnext, vit};
use names::Layout;

/// A model in a published layout.
pub(crate) struct Published {
    /// What it is called, in words.
    pub title: String,
    /// What it is in a recipe.
    pub model: ModelInfo,
    /// What says so: `config.json`.
    pub said_by: &'static str,
    /// Where each of its tensors is.
    pub rules: Vec<Rule>,
    /// Tensors that the layout has no place for, with their shapes: they are zero.
    pub zeros: Vec<(String, Vec<usize>)>,
    /// Tensors of the files that a model does not need: buffers that follow from its configuration.
    pub unused: fn(&str) -> bool,
}

/// What was imported.
#[derive(Clone, Debug)]
pub struct Imported {
    /// What the model is called, in words.
    pub title: String,
    /// Tensors written.
    pub tensors: usize,
    /// Numbers in them.
    pub numbers: usize,
    /// Their types.
    pub dtypes: Vec<Dtype>,
    /// What was assumed, taken off or left out.
    pub notes: Vec<String>,
}

/// Keys of a `config.json` that change nothing: they are of training from scratch, of the library, or of heads.
pub(crate) const HARMLESS: [&str; 38] = [
    "architectures",
    "model_type",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "_name_or_path",
    "_commit_hash",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "attn_implementation",
    "initializer_range",
    "out_features",
    "out_indices",
    "_out_features",
    "_out_indices",
    "stage_names",
    "reshape_hidden_states",
    "apply_layernorm",
    "return_class_token",
    "return_dict",
    "use_return_dict",
    "output_hidden_states",
    "output_attentions",
    "torchscript",
    "chunk_size_feed_forward",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "num_stages",
    "is_encoder_decoder",
    "is_decoder",
    "add_cross_attention",
    "tie_word_embeddings",
    "tie_encoder_decoder",
    "use_bfloat16",
    "use_cache",
    "gradient_checkpointing",
];

/// Makes the weights folder `out` of published files (see [`TensorFiles::open`]), a tensor at a time.
///
/// # Errors
/// If the model is not known, its configuration says something that dinolab does not know, the files do not hold exactly
/// its tensors, finite floats, or `out` cannot be written.
pub fn import(from: &Path, out: &Path) -> Result<Imported> {
    check_free(out)?;
    if let Ok(own @ (Source::Run { .. } | Source::Checkpoint(_) | Source::Weights(_))) = Source::at(from) {
        let help = format!("name it as it is: --set backbone.weights={}", own.path().display());
        return Err(Error::content(from, "these are weights of dinolab already", help));
    }
    let mut notes = Vec::new();
    // Copies of a PyTorch file's tensors are where the result will be.
    let beside = out.ancestors().skip(1).find(|folder| folder.is_dir()).unwrap_or(Path::new("."));
    let mut files = TensorFiles::published(from, beside)?;
    if files.path() != from {
        notes.push(format!("read {}", files.path().display()));
    }
    let layout = names::unwrap(&mut files, &mut notes)?;
    let published = recognise(&files, layout, &mut notes)?;
    let pieces = from_published(&files, &published.rules, published.unused, published.said_by)?;
    let mut dtypes: Vec<Dtype> = pieces.iter().map(|(_, piece)| piece.dtype()).collect();
    dtypes.sort();
    dtypes.dedup();
    let zeros = published.zeros.into_iter().map(|(name, shape)| (name, Tensor::Zeros(shape)));
    let tensors = pieces.into_iter().map(|(name, piece)| (name, Tensor::Read(piece))).chain(zeros).collect();
    let pieces: Vec<(String, Tensor<'_>)> = tensors;
    let imported = Imported {
        title: published.title,
        tensors: pieces.len(),
        numbers: pieces.iter().map(|(_, piece)| piece.shape().iter().product::<usize>()).sum(),
        dtypes,
        notes,
    };
    write_folder(out, |folder| {
        write_pieces(&folder.join(MODEL_FILE), pieces, &[])?;
        let by = format!("Imported by dinolab {} from {}", env!("CARGO_PKG_VERSION"), from.display());
        let lines = [&imported.title, &by].into_iter().chain(&imported.notes);
        let about: String = lines.map(|line| format!("# {}\n", line.replace(char::is_control, " "))).collect();
        write_file(&folder.join(WEIGHTS_FILE), (about + &published.model.to_toml()).as_bytes())
    })?;
    Ok(imported)
}

/// A tensor of an import.
enum Tensor<'a> {
    Read(Piece<'a>),
    Zeros(Vec<usize>),
}

impl View for Tensor<'_> {
    fn dtype(&self) -> Dtype {
        match self {
            Self::Read(piece) => piece.dtype(),
            Self::Zeros(_) => Dtype::F32,
        }
    }
    fn shape(&self) -> &[usize] {
        match self {
            Self::Read(piece) => piece.shape(),
            Self::Zeros(shape) => shape,
        }
    }
    fn data(&self) -> Cow<'_, [u8]> {
        match self {
            Self::Read(piece) => piece.data(),
            Self::Zeros(_) => vec![0; self.data_len()].into(),
        }
    }
    fn data_len(&self) -> usize {
        self.shape().iter().product::<usize>() * self.dtype().bitsize() / 8
    }
}

/// The file of that name beside the weights; beside what they are a link to, if there is none.
pub(crate) fn beside(weights: &Path, name: &str) -> Option<PathBuf> {
    let real = weights.canonicalize().unwrap_or_default();
    let mut files = [weights, &real].into_iter().map(|path| path.with_file_name(name));
    files.find(|file| file.symlink_metadata().is_ok())
}

/// Recognises a model by its tensors' names, and reads the `config.json` beside the files where that layout has one.
///
/// # Errors
/// If it is no model that dinolab has, or its configuration asks for something that dinolab does not do.
fn recognise(files: &TensorFiles, layout: Option<Layout>, notes: &mut Vec<String>) -> Result<Published> {
    let config = beside(files.path(), "config.json").map(|file| JsonTable::read(&file)).transpose()?;
    if layout == Some(Layout::ReferenceVit) && files.get("blocks.0.gamma_1").is_some() {
        return match config {
            Some(config) if config.peek("architecture").is_some() => vit::timm::read(files, config, notes),
            _ => {
                let problem = "these are weights of timm, and no config.json of timm beside them says of which model";
                Err(Error::content(files.path(), problem, "download config.json into the same folder"))
            }
        };
    }
    if let Some(config) = &config {
        known_model_type(config)?;
    }
    let Some(layout) = layout else { return Err(names::foreign(files)) };
    if layout == Layout::ReferenceVit {
        if names::is_foreign(files) {
            return Err(names::foreign(files));
        }
        if let Some(config) = &config {
            let problem =
                "the tensors have the names of the PyTorch reference, and config.json is of Hugging Face's layout";
            let help = format!("move one of {} and config.json into another folder", files.path().display());
            return Err(Error::content(config.file(), problem, help));
        }
        return vit::original::read(files, notes);
    }
    let Some(config) = config else {
        let problem = "there is no config.json beside it, which says what model it is of";
        let help = format!("download config.json (and {}) into the same folder", processor::FILE);
        return Err(Error::content(files.path(), problem, help));
    };
    let of_layout = match layout {
        Layout::HfConvNext => convnext::hugging_face::MODEL_TYPE,
        _ => vit::hf::MODEL_TYPE,
    };
    if config.peek("model_type") != Some(of_layout) {
        let problem = format!("the tensors beside it are of a model of type {of_layout}");
        return Err(config.wrong("model_type", problem, "take the config.json that belongs to the weights"));
    }
    match layout {
        Layout::HfConvNext => convnext::hugging_face::read(files, config, notes),
        _ => vit::hf::read(files, config, notes),
    }
}

/// Fails unless `config.json` is of a model that dinolab has.
fn known_model_type(config: &JsonTable) -> Result<()> {
    let known = [vit::hf::MODEL_TYPE, convnext::hugging_face::MODEL_TYPE];
    match config.peek("model_type") {
        Some(model_type) if known.contains(&model_type) => Ok(()),
        None if config.peek("architecture").is_some() => {
            let name = config.peek("architecture").unwrap_or_default();
            let problem = format!("these are weights of timm (`{name}`), which is no DINOv3 that dinolab reads");
            let help = "dinolab reads timm's vit_..._dinov3, and ViT and ConvNeXt of `facebook/dinov3-...`";
            Err(config.wrong("architecture", problem, help))
        }
        None => {
            Err(config.wrong("model_type", "missing in this file", "take the config.json that belongs to the weights"))
        }
        Some(other) => {
            let known = known.map(|name| format!("`{name}`")).join(", ");
            let problem = match other {
                "dinov2" | "dinov2_with_registers" => {
                    format!("`{other}` is DINOv2, with a learned table of positions; known: {known}")
                }
                _ => format!("`{other}` is no model that dinolab has; known: {known}"),
            };
            Err(config.wrong("model_type", problem, names::DINOV3))
        }
    }
}

/// The pixels that a model was trained on: size from its configuration, normalisation from the image processor beside the
/// files.
///
/// # Errors
/// If the configuration or the processor says something that dinolab does not know.
pub(crate) fn pixels(
    files: &TensorFiles,
    config: &mut JsonTable,
    channels: usize,
    notes: &mut Vec<String>,
) -> Result<Preprocessing> {
    let global_size = side(config, "image_size")?;
    let global_size = global_size.unwrap_or_else(|| {
        notes.push("config.json has no `image_size`: 224 is assumed as the side of global crops".into());
        224
    });
    if !(1..=1 << 16).contains(&global_size) {
        return Err(config.wrong(
            "image_size",
            format!("{global_size} is no side of an image"),
            "published models have 224",
        ));
    }
    let pixels = Preprocessing { global_size, ..Preprocessing::default() };
    processor::pixels(files.path(), pixels, channels, false, notes)
}

/// As [`pixels`], of weights without a configuration.
///
/// # Errors
/// As [`pixels`].
pub(crate) fn pixels_of_size(
    files: &TensorFiles,
    global_size: usize,
    channels: usize,
    satellite: bool,
    notes: &mut Vec<String>,
) -> Result<Preprocessing> {
    processor::pixels(
        files.path(),
        Preprocessing { global_size, ..Preprocessing::default() },
        channels,
        satellite,
        notes,
    )
}

/// The side of a square, which may be written twice.
///
/// # Errors
/// If it is something else.
pub(crate) fn side(config: &mut JsonTable, key: &'static str) -> Result<Option<usize>> {
    #[derive(serde::Deserialize)]
    #[serde(untagged, expecting = "a whole number, or a list of two")]
    enum Side {
        One(usize),
        Two([usize; 2]),
    }
    match config.take(key)? {
        None => Ok(None),
        Some(Side::One(side)) => Ok(Some(side)),
        Some(Side::Two([height, width])) if height == width => Ok(Some(width)),
        Some(Side::Two(sides)) => {
            Err(config.wrong(key, format!("{sides:?} is no square"), "only squares are known here"))
        }
    }
}

/// Fails unless images can have so many channels.
///
/// # Errors
/// If there is none, or more than a recipe may have.
pub(crate) fn check_channels(config: &JsonTable, channels: usize) -> Result<()> {
    match (1..=1024).contains(&channels) {
        true => Ok(()),
        false => Err(config.wrong("num_channels", format!("{channels} is not from 1 to 1024"), "RGB has 3")),
    }
}

/// Fails unless `layer_norm_eps` can be added to a variance of 32 bits.
///
/// # Errors
/// If it is not positive there, or larger than any variance.
pub(crate) fn check_eps(config: &JsonTable, eps: f64) -> Result<()> {
    match (f64::from(f32::MIN_POSITIVE)..=1.0).contains(&eps) {
        true => Ok(()),
        false => {
            let help = "published models have 1e-5 or 1e-6";
            Err(config.wrong("layer_norm_eps", format!("{eps} is not between 0 and 1"), help))
        }
    }
}

/// Fails unless the files can hold these tensors: sizes of a configuration are not believed before.
///
/// # Errors
/// If a size is 0, or a tensor would have more numbers than all files together.
pub(crate) fn check_sizes(files: &TensorFiles, path: &Path, sizes: &[(&str, &[usize])]) -> Result<()> {
    let most = files.elements();
    for (keys, shape) in sizes {
        let numbers = shape.iter().try_fold(1usize, |all, n| all.checked_mul(*n));
        if numbers.is_none_or(|numbers| numbers == 0 || numbers > most) {
            let shape = shape.iter().map(usize::to_string).collect::<Vec<_>>().join(" x ");
            let problem = format!("{keys}: {shape} numbers, where the tensors have {most} in all");
            return Err(Error::content(path, problem, "take the configuration that belongs to the weights"));
        }
    }
    Ok(())
}

/// The files of a backbone in the Hugging Face layout: `config.json`, and where each tensor goes.
///
/// # Errors
/// If that layout cannot express the backbone.
pub fn hugging_face(model: &ModelInfo) -> Result<(Json, Vec<Rule>)> {
    match model.backbone.name() {
        "vit" => vit::hf::write(model),
        "convnext" => convnext::hugging_face::write(model),
        other => {
            let problem = format!("the Hugging Face layout has no place for the backbone `{other}`");
            Err(Error::user(problem, "export it with --format safetensors"))
        }
    }
}

/// The files of a backbone in timm's layout: `config.json`, and where each tensor goes.
///
/// # Errors
/// If that layout cannot express the backbone.
pub fn timm(model: &ModelInfo) -> Result<(Json, Vec<Rule>)> {
    match model.backbone.name() {
        "vit" => vit::timm::write(model),
        other => {
            let problem = format!("timm's layout has no place for the backbone `{other}`");
            Err(Error::user(problem, "export it with --format safetensors"))
        }
    }
}

/// The ONNX file of a model whose tensors are in `files` as `<prefix>backbone.<name>`.
///
/// # Errors
/// If the backbone is none that is written as ONNX, or its tensors are not there.
pub fn onnx(model: &ModelInfo, files: &TensorFiles, prefix: &str) -> Result<Vec<u8>> {
    match model.backbone.name() {
        "vit" => vit::onnx::write(model, files, prefix),
        "convnext" => convnext::onnx::write(model, files, prefix),
        other => {
            let problem = format!("the backbone `{other}` is not written as ONNX");
            Err(Error::user(problem, "`vit` and `convnext` are; export this one with --format safetensors"))
        }
    }
}
