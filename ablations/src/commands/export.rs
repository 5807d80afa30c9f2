//! `dinolab export`: the weights of a run for other tools.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use dinolab_core::files::write_file;
use dinolab_core::weights::convert::{self, Piece};
use dinolab_core::weights::{write_folder, ModelInfo, Source, TensorFiles, WEIGHTS_FILE};
use dinolab_core::{Error, Result};
use dinolab_plugins::published;
use safetensors::tensor::{Dtype, View};
use serde_json::{json, Value as Json};

use crate::export::{card, shards};
use crate::read_by::read_by;
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
    /// Whose weights, of a run: by default the teacher's
    #[arg(long)]
    role: Option<Role>,
    /// Split the weights into files of at most so many megabytes, with an index, as Hugging Face does (hf and timm)
    #[arg(long, value_name = "MEGABYTES", value_parser = clap::value_parser!(u64).range(1..))]
    shard_size: Option<u64>,
    /// An eval.json of these weights: its scores go into the model card
    #[arg(long, value_name = "EVAL_JSON")]
    scores: Option<PathBuf>,
    /// The licence of the weights, for the model card; if training started from other weights, give their licence
    #[arg(long, value_parser = clap::builder::NonEmptyStringValueParser::new())]
    license: Option<String>,
}

/// Who reads an export.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Format {
    /// Hugging Face transformers: `DINOv3ViTModel.from_pretrained(DIR)`
    Hf,
    /// onnxruntime and other programs that run ONNX: a ViT or ConvNeXt for images of any size
    Onnx,
    /// Everything that opens safetensors, and dinolab: the backbone and the heads
    Safetensors,
    /// timm: `timm.create_model("local-dir:DIR", pretrained=True)`, a ViT
    Timm,
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
    let shards = args.shard_size.map(|megabytes| megabytes.saturating_mul(1_000_000));
    if shards.is_some() && !matches!(args.format, Format::Hf | Format::Timm) {
        let problem = "--shard-size splits the weights of --format hf and timm only";
        return Err(Error::user(problem, "leave it out; this format is one file"));
    }
    let library = match args.format {
        Format::Hf => "transformers",
        Format::Timm => "timm",
        Format::Onnx => "onnx",
        Format::Safetensors => "dinolab",
    };
    let files = source.stored()?;
    let has_teacher = files.names().any(|name| name.starts_with("teacher."));
    let role = args.role.unwrap_or(Role::Teacher);
    if args.role.is_some() && !source.has_roles() {
        let problem = "these are weights of one model, neither a student nor its teacher";
        return Err(Error::content(source.path(), problem, "leave out --role"));
    }
    if let (Some(scores), Role::Student, true) = (&args.scores, role, has_teacher) {
        let problem =
            "it has scores of the teacher, which is what `dinolab eval` reads of a run, and the student is exported";
        let help = "leave out --scores; or export the student with --format safetensors, and evaluate and export that";
        return Err(Error::content(scores, problem, help));
    }
    let about = card::About {
        source: &source,
        model: &model,
        library,
        scores: args.scores.as_deref(),
        license: args.license.as_deref(),
    };
    // What is wrong with its parts is said before anything is written.
    let card = card::card(&about)?;
    let wide = read_by(&args.run).is_some_and(|read| read.wide);
    let prefix = match role {
        _ if !source.has_roles() => "",
        Role::Teacher if has_teacher => "teacher.",
        Role::Teacher | Role::Student => "student.",
    };
    write_folder(&args.out, |folder| {
        match args.format {
            Format::Hf => write_hf(folder, (&files, prefix), &model, wide, shards)?,
            Format::Timm => {
                let (config, rules) = published::timm(&model)?;
                let pieces = convert::to_published(&files, prefix, &rules)?;
                shards::write(folder, pieces, &[("format", "pt".into())], shards)?;
                write_json(folder, "config.json", &config)?;
            }
            Format::Onnx => {
                write_file(&folder.join("model.onnx"), &published::onnx(&model, &files, prefix)?)?;
                write_json(folder, "preprocessor_config.json", &processor(&model, wide))?;
            }
            Format::Safetensors => {
                shards::write(folder, convert::without_prefix(&files, prefix)?, &[], None)?;
                let from = args.run.display();
                let about = format!("# Exported by dinolab {} from {from}\n", env!("CARGO_PKG_VERSION"));
                write_file(&folder.join(WEIGHTS_FILE), (about + &model.to_toml()).as_bytes())?;
            }
        }
        write_file(&folder.join("README.md"), card.as_bytes())
    })?;
    style::say(&format!("written to {}", args.out.display()));
    Ok(ExitCode::SUCCESS)
}

fn write_hf(
    folder: &Path,
    (files, prefix): (&TensorFiles, &str),
    model: &ModelInfo,
    wide: bool,
    shards: Option<u64>,
) -> Result<()> {
    let (mut config, rules) = published::hugging_face(model)?;
    let pieces = convert::to_published(files, prefix, &rules)?;
    config["image_size"] = model.crops.global_size.into();
    config["dtype"] = dtype_name(&pieces).into();
    shards::write(folder, pieces, &[("format", "pt".into())], shards)?;
    write_json(folder, "config.json", &config)?;
    write_json(folder, "preprocessor_config.json", &processor(model, wide))
}

fn write_json(folder: &Path, name: &str, value: &Json) -> Result<()> {
    let text = serde_json::to_string_pretty(value).expect("plain data");
    write_file(&folder.join(name), (text + "\n").as_bytes())
}

/// How pixels are made: no image is squeezed, the shorter side is brought to the size of a crop, and the middle cut out. Values are
/// `wide` where the run read images of 16 bits.
fn processor(model: &ModelInfo, wide: bool) -> Json {
    let side = model.crops.global_size;
    let greatest = if wide { u16::MAX.into() } else { f64::from(u8::MAX) };
    json!({
        "image_processor_type": "DINOv3ViTImageProcessorFast",
        "image_mean": model.crops.mean,
        "image_std": model.crops.std,
        "do_normalize": true,
        "do_rescale": true,
        "rescale_factor": 1.0 / greatest,
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
