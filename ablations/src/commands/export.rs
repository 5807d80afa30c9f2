//! `dinolab export`: the weights of a run for other tools.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use dinolab_core::checkpoint::{write_file, write_pieces};
use dinolab_core::weights::convert::{self, Piece};
use dinolab_core::weights::{write_folder, ModelInfo, Source, TensorFiles, MODEL_FILE, WEIGHTS_FILE};
use dinolab_core::Result;
use dinolab_plugins::published;
use safetensors::tensor::{Dtype, View};
use serde_json::{json, Value as Json};

use crate::style;

/// What it is given.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A run, a checkpoint of one, or a weights folder
    run: PathBuf,
    /// Who reads it
    #[arg(long)]
    format: Format,
    /// The folder to make
    #[arg(long)]
    out: PathBuf,
    /// Whose weights, of a run
    #[arg(long, default_value = "teacher")]
    role: Role,
}

/// Who reads an export.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Format {
    /// Hugging Face transformers: `DINOv3ViTModel.from_pretrained(DIR)`
    Hf,
    /// onnxruntime and other programs that run ONNX: a ViT for images of any size
    Onnx,
    /// Everything that opens safetensors, and dinolab: the backbone and the heads
    Safetensors,
}

/// A model of a run.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Role {
    /// The EMA teacher, which is what is evaluated; of a run without one, the student
    Teacher,
    /// The model that is trained
    Student,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<ExitCode> {
    let source = Source::at(&args.run)?;
    let model = source.known_model()?;
    let files = TensorFiles::open(&source.model_file()?)?;
    let prefix = match (source.has_roles(), args.role) {
        (false, _) => "",
        (true, Role::Teacher) if files.names().any(|name| name.starts_with("teacher.")) => "teacher.",
        (true, Role::Teacher) => "student.",
        (true, Role::Student) => "student.",
    };
    write_folder(&args.out, |folder| match args.format {
        Format::Hf => write_hf(folder, &files, prefix, &model),
        Format::Onnx => {
            write_file(&folder.join("model.onnx"), &published::onnx(&model, &files, prefix)?)?;
            write_json(folder, "preprocessor_config.json", &processor(&model))
        }
        Format::Safetensors => {
            write_pieces(&folder.join(MODEL_FILE), convert::without_prefix(&files, prefix)?, &[])?;
            let from = args.run.display();
            let about = format!("# Exported by dinolab {} from {from}\n", env!("CARGO_PKG_VERSION"));
            write_file(&folder.join(WEIGHTS_FILE), (about + &model.to_toml()).as_bytes())
        }
    })?;
    style::say(&format!("written to {}", args.out.display()));
    Ok(ExitCode::SUCCESS)
}

fn write_hf(folder: &Path, files: &TensorFiles, prefix: &str, model: &ModelInfo) -> Result<()> {
    let (mut config, rules) = published::hugging_face(&model.backbone)?;
    let pieces = convert::to_published(files, prefix, &rules)?;
    config["image_size"] = model.crops.global_size.into();
    config["dtype"] = dtype_name(&pieces).into();
    write_pieces(&folder.join(MODEL_FILE), pieces, &[("format", "pt".into())])?;
    write_json(folder, "config.json", &config)?;
    write_json(folder, "preprocessor_config.json", &processor(model))
}

fn write_json(folder: &Path, name: &str, value: &Json) -> Result<()> {
    let text = serde_json::to_string_pretty(value).expect("plain data");
    write_file(&folder.join(name), (text + "\n").as_bytes())
}

/// How pixels are made: no image is squeezed, the shorter side is brought to the size of a crop, and the middle cut out.
fn processor(model: &ModelInfo) -> Json {
    let side = model.crops.global_size;
    json!({
        "image_processor_type": "DINOv3ViTImageProcessorFast",
        "image_mean": model.crops.mean,
        "image_std": model.crops.std,
        "do_normalize": true,
        "do_rescale": true,
        "rescale_factor": 1.0 / 255.0,
        "do_resize": true,
        "size": { "shortest_edge": side },
        "do_center_crop": true,
        "crop_size": { "height": side, "width": side },
    })
}

/// The type that most tensors have, as transformers calls it.
fn dtype_name(pieces: &[(String, Piece<'_>)]) -> &'static str {
    let mut counts: BTreeMap<Dtype, usize> = BTreeMap::new();
    pieces.iter().for_each(|(_, piece)| *counts.entry(piece.dtype()).or_default() += 1);
    match counts.into_iter().max_by_key(|&(_, count)| count).map(|(dtype, _)| dtype) {
        Some(Dtype::BF16) => "bfloat16",
        Some(Dtype::F16) => "float16",
        Some(Dtype::F64) => "float64",
        _ => "float32",
    }
}
