//! `dinolab features`: what trained weights see in images.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc::sync_channel;
use std::time::Instant;

use dinolab_core::train::Trained;
use dinolab_core::{Error, Result};
use dinolab_plugins::image_folder;
use image::RgbImage;
use indicatif::{ProgressBar, ProgressStyle};

use crate::features::{fit, see, write_features, write_pictures, Format, Maps, Seen, Sheets, Size, Viewer};
use crate::pictures::align_signs;
use crate::style;

/// Largest window by default, in sides of the crops that the model was trained on.
const WINDOW: usize = 4;

/// What it is given.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Images, or folders of images.
    #[arg(required = true)]
    images: Vec<PathBuf>,
    /// The weights: a run, a checkpoint inside one, or imported weights.
    #[arg(long, required_unless_present = "compare")]
    weights: Option<PathBuf>,
    /// Two weights, side by side on the same images.
    #[arg(long, num_args = 2, value_names = ["A", "B"], conflicts_with = "weights")]
    compare: Vec<PathBuf>,
    /// The folder that everything is written to.
    #[arg(long, default_value = "features")]
    out: PathBuf,
    /// Longer side in pixels to which images are resized; without, they stay as they are.
    #[arg(long)]
    size: Option<usize>,
    /// Most pixels a side that the model sees at once; larger images are seen window by window. By default four times the
    /// side of the crops that it was trained on.
    #[arg(long)]
    window: Option<usize>,
    /// A patch whose similarity to all others is drawn; may be given several times. By default the middle one.
    #[arg(long = "patch", value_name = "ROW,COL", value_parser = parse_patch)]
    patches: Vec<(usize, usize)>,
    /// How features are written.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "safetensors")]
    format: Vec<Format>,
    /// Write features only.
    #[arg(long)]
    no_pictures: bool,
}

fn parse_patch(text: &str) -> Result<(usize, usize), String> {
    let parsed = text.split_once(',').and_then(|(r, c)| Some((r.trim().parse().ok()?, c.trim().parse().ok()?)));
    parsed.ok_or_else(|| "expected ROW,COL, counted in patches from 0, such as 7,12".into())
}

/// One of the weights that images are seen with.
struct Model {
    trained: Trained,
    path: PathBuf,
    /// Sub-folder of an image's folder; none if there is only one model.
    folder: &'static str,
    /// Most patches a side.
    window: usize,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<ExitCode> {
    let models = models(args)?;
    let inputs = inputs(&args.images)?;
    claim(&args.out)?;
    let mut sheets = Sheets::new(&args.out);
    let mut viewer = Viewer::new(&args.out, models.iter().map(|m| m.path.display().to_string()).collect());
    let bar = ProgressBar::new(inputs.len() as u64);
    let template = "{bar:28} {pos}/{len} images, {per_sec}, eta {eta} {wide_msg}";
    bar.set_style(ProgressStyle::with_template(template).expect("the template is fixed").progress_chars("=> "));
    let begin = Instant::now();
    let (mut done, mut patches, mut skipped) = (0usize, 0usize, 0usize);
    // The next images are decoded while one is computed.
    let (sender, receiver) = sync_channel(2);
    std::thread::scope(|scope| -> Result<()> {
        let decoder = scope.spawn(|| {
            // The receiver is gone when the run has failed.
            inputs
                .iter()
                .map(|i| sender.send((i, image_folder::read(&i.path))))
                .take_while(std::result::Result::is_ok)
                .count();
            drop(sender);
        });
        for (input, image) in receiver {
            bar.set_message(input.name.clone());
            let seen = image.and_then(|image| look(&image, input, &models, args));
            match seen {
                Ok(seen) => {
                    done += 1;
                    patches += seen.iter().map(|(s, _)| s.view.patches()).sum::<usize>();
                    if !args.no_pictures {
                        seen.iter().try_for_each(|(seen, maps)| sheets.add(seen, maps))?;
                        viewer.add(&input.name, &seen);
                    }
                }
                // A broken image is named and left out; a disk that is full ends the run.
                Err(error @ (Error::Content { .. } | Error::Io { action: "read", .. })) => {
                    skipped += 1;
                    bar.suspend(|| style::warn(format!("skipped: {error}")));
                }
                Err(error) => return Err(error),
            }
            bar.inc(1);
        }
        decoder.join().map_err(|_| Error::user("the thread that reads images ended early", "please report it"))
    })?;
    bar.finish_and_clear();
    if done == 0 {
        return Err(Error::user("none of the images could be used", "see the warnings above"));
    }
    let seconds = begin.elapsed().as_secs_f64();
    let rates = format!("{:.1} images/s, {:.0} patches/s", done as f64 / seconds, patches as f64 / seconds);
    let broken = if skipped > 0 { format!(", {skipped} skipped") } else { String::new() };
    style::say(&format!("{done} images in {seconds:.1} s ({rates}){broken}; everything is in {}", args.out.display()));
    if !args.no_pictures {
        sheets.finish()?;
        let (page, left_out) = viewer.finish()?;
        if left_out > 0 {
            style::warn(format!("{} shows the first images only; {left_out} are left out", page.display()));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn models(args: &Args) -> Result<Vec<Model>> {
    let paths: Vec<&PathBuf> = args.weights.iter().chain(&args.compare).collect();
    let folders: &[&'static str] = if paths.len() == 1 { &[""] } else { &["a", "b"] };
    let open = |(path, folder): (&&PathBuf, &&'static str)| {
        let trained = Trained::open(path)?;
        let side = args.window.unwrap_or(WINDOW * trained.global_size);
        let (window, least) = (side / trained.backbone.patch_size(), trained.backbone.smallest_crop());
        if side < least {
            let problem = format!("a window of {side} pixels is too small: the model sees at least {least} a side");
            return Err(Error::user(problem, "raise --window"));
        }
        Ok(Model { trained, path: path.to_path_buf(), folder, window })
    };
    paths.iter().zip(folders).map(open).collect()
}

/// An image to look at.
struct Input {
    path: PathBuf,
    /// Its path below the folder that was named, without an extension: where its files go.
    name: String,
}

/// All images that were named, or lie in folders that were; no two have the same name.
fn inputs(named: &[PathBuf]) -> Result<Vec<Input>> {
    let mut inputs = Vec::new();
    let mut names = BTreeSet::new();
    for root in named {
        let (base, paths) = match root.is_dir() {
            true => (root.as_path(), image_folder::list(root)?),
            false if root.exists() => (root.parent().unwrap_or(Path::new("")), vec![root.clone()]),
            false => return Err(Error::content(root, "does not exist", "name images or folders of images")),
        };
        for path in paths {
            let stem = path.strip_prefix(base).unwrap_or(&path).with_extension("").display().to_string();
            let numbered = (1..).map(|n| if n == 1 { stem.clone() } else { format!("{stem}-{n}") });
            let name = numbered.into_iter().find(|n| names.insert(n.clone())).expect("there are enough numbers");
            inputs.push(Input { path, name });
        }
    }
    Ok(inputs)
}

/// Makes the output folder, which must be empty: nothing is overwritten.
fn claim(out: &Path) -> Result<()> {
    std::fs::create_dir_all(out).map_err(Error::io("create", out))?;
    if std::fs::read_dir(out).map_err(Error::io("list", out))?.next().is_some() {
        return Err(Error::content(out, "this folder is not empty", "name another with --out, or remove it"));
    }
    Ok(())
}

/// One image as every model sees it; features and pictures are written. Signs of components follow the first model's where
/// grids agree, so that colours can be compared.
fn look(image: &RgbImage, input: &Input, models: &[Model], args: &Args) -> Result<Vec<(Seen, Maps)>> {
    let size = args.size.map_or(Size::Native, Size::Long);
    let mut all: Vec<(Seen, Maps)> = Vec::new();
    for model in models {
        let patch = model.trained.backbone.patch_size();
        let least = model.trained.backbone.smallest_crop();
        let whole = |image: &RgbImage| image.width().min(image.height()) as usize >= least;
        let fitted = fit(image, size, patch).filter(whole).ok_or_else(|| {
            let (width, height) = image.dimensions();
            let problem = format!("{width}x{height} pixels are too few: the model sees at least {least} a side");
            Error::content(&input.path, problem, "enlarge it with --size")
        })?;
        let seen = see(&model.trained, fitted, model.window)?;
        let folder = args.out.join(&input.name).join(model.folder);
        std::fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
        let metadata = [
            ("image", input.path.display().to_string()),
            ("weights", model.path.display().to_string()),
            ("patch_size", patch.to_string()),
            ("pixels", format!("{}x{}", seen.view.image.width(), seen.view.image.height())),
        ];
        args.format.iter().try_for_each(|&format| write_features(&folder, &seen, format, &metadata))?;
        let mut maps = Maps::default();
        if !args.no_pictures {
            maps = seen.maps(&chosen(&seen, &args.patches, &input.path)?)?;
            if let Some((_, first)) = all.first().filter(|(_, m)| m.scores.len() == maps.scores.len()) {
                align_signs(&mut maps.scores, &first.scores);
            }
            write_pictures(&folder, &seen, &maps)?;
        }
        all.push((seen, maps));
    }
    Ok(all)
}

/// The chosen patches by index; the middle one if none was chosen.
fn chosen(seen: &Seen, patches: &[(usize, usize)], path: &Path) -> Result<Vec<usize>> {
    let (height, width) = (seen.view.height, seen.view.width);
    if patches.is_empty() {
        return Ok(vec![seen.view.reference()]);
    }
    if let Some((row, column)) = patches.iter().find(|(row, column)| *row >= height || *column >= width) {
        let problem = format!("there is no patch {row},{column}: it has {height} rows and {width} columns");
        return Err(Error::content(path, problem, "choose --patch within it, or --size so that all images have it"));
    }
    Ok(patches.iter().map(|(row, column)| row * width + column).collect())
}
