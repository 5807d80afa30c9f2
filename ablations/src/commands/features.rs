//! `dinolab features`: what trained weights see in images.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::sync::mpsc::sync_channel;
use std::time::Instant;

use dinolab_core::contract::Sample;
use dinolab_core::files::write_file;
use dinolab_core::text::{self, printable};
use dinolab_core::train::Trained;
use dinolab_core::{Error, Result};
use dinolab_plugins::image_folder::{self, Wanted, BACKGROUND};
use indicatif::{ProgressBar, ProgressStyle};

use crate::cli::RESUMABLE;
use crate::features::{
    self, fit, read_back, see, sides, write_features, write_pictures, Format, Input, Maps, Record, Seen, Sheets, Size,
    Viewer,
};
use crate::filmstrip::{self, filmstrip};
use crate::pictures::align_signs;
use crate::pulse::Pulse;
use crate::read_by::read_by;
use crate::{signals, style};

/// Largest window by default, in sides of the crops that the model was trained on.
const WINDOW: usize = 4;

/// What it is given.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Images, or folders of images.
    #[arg(required_unless_present = "over")]
    images: Vec<PathBuf>,
    /// The weights: a run, a checkpoint inside one, or imported weights.
    #[arg(long, required_unless_present_any = ["compare", "over"])]
    weights: Option<PathBuf>,
    /// Instead of images and weights: show what a run saw in its held-out images at every kept checkpoint; several runs may
    /// be given, one row each.
    #[arg(long, value_name = "RUN", num_args = 1.., conflicts_with_all = [
        "images", "weights", "compare", "size", "window", "patches", "bits", "background", "format", "no_pictures",
    ])]
    over: Vec<PathBuf>,
    /// Two weights, side by side on the same images.
    #[arg(long, num_args = 2, value_names = ["A", "B"], conflicts_with = "weights")]
    compare: Vec<PathBuf>,
    /// The folder that everything is written to.
    #[arg(long, default_value = "features")]
    out: PathBuf,
    /// Resize images so that their longer side has this many pixels; by default they are not resized.
    #[arg(long)]
    size: Option<usize>,
    /// Largest side in pixels that the model is given at once; larger images are processed in windows. By default four
    /// times the side of the crops that it was trained on.
    #[arg(long)]
    window: Option<usize>,
    /// A patch whose similarity to all others is drawn; may be given several times. By default the middle one.
    #[arg(long = "patch", value_name = "ROW,COL", value_parser = parse_patch)]
    patches: Vec<(usize, usize)>,
    /// Bits per value, 8 or 16. Default: as the run read its data; for other weights, 8 for RGB and 16 for other channels.
    #[arg(long, value_parser = parse_bits)]
    bits: Option<u8>,
    /// Background colour for transparent images: red, green and blue, 0 to 255. Default: the background of the run's data, or
    /// white.
    #[arg(long, value_name = "R,G,B", value_parser = parse_colour)]
    background: Option<Colour>,
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

fn parse_bits(text: &str) -> Result<u8, String> {
    text.parse().ok().filter(|bits| [8, 16].contains(bits)).ok_or_else(|| "expected 8 or 16".into())
}

/// Red, green and blue.
#[derive(Clone, Copy, Debug)]
struct Colour([u8; 3]);

fn parse_colour(text: &str) -> Result<Colour, String> {
    let values: Option<Vec<u8>> = text.split(',').map(|v| v.trim().parse().ok()).collect();
    let colour = values.and_then(|values| values.try_into().ok()).map(Colour);
    colour.ok_or_else(|| "expected R,G,B, each from 0 to 255, such as 255,255,255".into())
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
    if !args.over.is_empty() {
        return over(&args.over, &args.out);
    }
    let stop = signals::stop_flag();
    let models = models(args)?;
    let wanted = wanted(args, &models)?;
    let (images, notes) = features::images(&args.images, wanted.takes_arrays())?;
    notes.iter().for_each(style::warn);
    let mut record = Record::open(&args.out, &made_with(args, &models, &wanted)?)?;
    let inputs = features::name(images, &record);
    let before = inputs.iter().filter(|input| record.has(&input.path)).count();
    if before > 0 {
        style::say(&format!("{before} of {} images are done already; going on with the others", inputs.len()));
    }
    let mut pages = (!args.no_pictures).then(|| Pages::new(args, &models));
    let bar = ProgressBar::new(inputs.len() as u64);
    let template = "{bar:28} {pos}/{len} images, {per_sec}, eta {eta} {wide_msg}";
    bar.set_style(ProgressStyle::with_template(template).expect("the template is fixed").progress_chars("=> "));
    let (mut pulse, begin) = (Pulse::default(), Instant::now());
    let (mut done, mut patches, mut skipped) = (0usize, 0usize, 0usize);
    let todo: Vec<bool> = inputs.iter().map(|input| !record.has(&input.path)).collect();
    // The next images are decoded while one is computed.
    let (sender, receiver) = sync_channel(2);
    std::thread::scope(|scope| -> Result<()> {
        let (inputs, todo) = (&inputs, &todo);
        let decoder = scope.spawn(move || {
            let read = |(input, &todo): (&Input, &bool)| todo.then(|| image_folder::read_as(&input.path, &wanted));
            // The receiver is gone when the run has failed, or is asked to stop.
            inputs
                .iter()
                .zip(todo)
                .map(read)
                .map(|image| sender.send(image))
                .take_while(std::result::Result::is_ok)
                .count();
        });
        for (input, image) in inputs.iter().zip(&receiver) {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            bar.set_message(printable(&input.name));
            let seen = match image {
                // What was made before is shown again, if it is still there.
                None if pages.is_none() => Ok(Vec::new()),
                None => again(input, &models, args).or_else(|_| {
                    let image = image_folder::read_as(&input.path, &wanted)?;
                    look(&image, input, &models, args)
                }),
                Some(image) => image.and_then(|image| look(&image, input, &models, args)).and_then(|seen| {
                    record.add(&input.path, &input.name)?;
                    done += 1;
                    patches += seen.iter().map(|(s, _)| s.view.patches()).sum::<usize>();
                    Ok(seen)
                }),
            };
            match (seen, &mut pages) {
                (Ok(seen), Some(pages)) => pages.add(input, &seen)?,
                (Ok(_), None) => {}
                // A broken image is named and left out; a disk that is full ends the run.
                (Err(error @ (Error::Content { .. } | Error::Io { action: "read", .. })), _) => {
                    skipped += 1;
                    bar.suspend(|| style::warn(format!("skipped: {error}")));
                }
                (Err(error), _) => return Err(error),
            }
            bar.inc(1);
            if bar.is_hidden() {
                if let Some(left) = pulse.due(bar.position(), inputs.len() as u64) {
                    style::line(&format!("{} of {} images, {left}", bar.position(), inputs.len()));
                }
            }
        }
        drop(receiver);
        decoder.join().map_err(|_| Error::user("the thread that reads images ended early", "please report it"))
    })?;
    bar.finish_and_clear();
    if stop.load(Ordering::Relaxed) {
        let done = before + done;
        style::say(&format!("stopped: {done} of {} images are done; go on with the same command", inputs.len()));
        return Ok(ExitCode::from(RESUMABLE));
    }
    if before + done == 0 {
        return Err(Error::user("none of the images could be used", "see the warnings above"));
    }
    let seconds = begin.elapsed().as_secs_f64();
    let rates = format!("{:.1} images/s, {:.0} patches/s", done as f64 / seconds, patches as f64 / seconds);
    let broken = if skipped > 0 { format!(", {skipped} skipped") } else { String::new() };
    let out = printable(&args.out);
    style::say(&format!("{done} images in {seconds:.1} s ({rates}){broken}; everything is in {out}"));
    pages.map_or(Ok(()), Pages::finish)?;
    Ok(ExitCode::SUCCESS)
}

/// Writes the filmstrip of some runs.
fn over(runs: &[PathBuf], out: &Path) -> Result<ExitCode> {
    let named: Vec<(String, PathBuf)> = runs.iter().map(|run| (printable(run), run.clone())).collect();
    let Some(strip) = filmstrip(&named, 1, None)? else {
        let problem = "there is no checkpoint in these runs";
        return Err(Error::content(&runs[0], problem, "name the folder of a run that was trained"));
    };
    if strip.steps.len() == 1 {
        style::warn("only one step is kept: train with checkpoint.keep_every to see features over time");
    }
    std::fs::create_dir_all(out).map_err(Error::io("create", out))?;
    let path = out.join("filmstrip.html");
    write_file(&path, filmstrip::page(&strip).as_bytes())?;
    if let Err(error) = filmstrip::to_tensorboard(&strip, &named) {
        style::warn(format!("TensorBoard has no filmstrip: {error}"));
    }
    style::say(&format!("{} steps of {} runs are in {}", strip.steps.len(), runs.len(), printable(&path)));
    Ok(ExitCode::SUCCESS)
}

/// What everything in the output folder is made with.
fn made_with(args: &Args, models: &[Model], wanted: &Wanted) -> Result<serde_json::Map<String, serde_json::Value>> {
    let weights = models.iter().map(|model| model.trained.fingerprint()).collect::<Result<Vec<_>>>()?;
    let made_with = serde_json::json!({
        "weights": weights,
        "size": args.size,
        "window": models.iter().map(|model| model.window).collect::<Vec<_>>(),
        "patch": args.patches,
        "format": args.format,
        "pictures": !args.no_pictures,
        "background": wanted.background,
        "wide": wanted.wide,
    });
    match made_with {
        serde_json::Value::Object(made_with) => Ok(made_with),
        _ => unreachable!("it is written as an object"),
    }
}

/// The sheets and the page, in the making.
struct Pages {
    sheets: Sheets,
    viewer: Viewer,
}

impl Pages {
    fn new(args: &Args, models: &[Model]) -> Self {
        let names = models.iter().map(|model| printable(&model.path)).collect();
        Self { sheets: Sheets::new(&args.out), viewer: Viewer::new(&args.out, names) }
    }

    fn add(&mut self, input: &Input, seen: &[(Seen, Maps)]) -> Result<()> {
        seen.iter().try_for_each(|(seen, maps)| self.sheets.add(seen, maps))?;
        self.viewer.add(&input.name, seen);
        Ok(())
    }

    fn finish(self) -> Result<()> {
        self.sheets.finish()?;
        let (page, left_out) = self.viewer.finish()?;
        if left_out > 0 {
            style::warn(format!("{} shows the first images only; {left_out} are left out", printable(&page)));
        }
        Ok(())
    }
}

fn models(args: &Args) -> Result<Vec<Model>> {
    let paths: Vec<&PathBuf> = args.weights.iter().chain(&args.compare).collect();
    let folders: &[&'static str] = if paths.len() == 1 { &[""] } else { &["a", "b"] };
    let open = |(path, folder): (&&PathBuf, &&'static str)| {
        let trained = Trained::open(path)?;
        let side = args.window.unwrap_or(WINDOW * trained.global_size);
        let (window, least) = (side / trained.backbone.patch_size(), trained.backbone.smallest_crop());
        if let Some(size) = args.size.filter(|size| *size < least) {
            let problem = format!("images of {size} pixels are too small: the model sees at least {least} a side");
            return Err(Error::user(problem, "raise --size"));
        }
        if side < least {
            let problem = format!("a window of {side} pixels is too small: the model sees at least {least} a side");
            return Err(Error::user(problem, "raise --window"));
        }
        Ok(Model { trained, path: path.to_path_buf(), folder, window })
    };
    paths.iter().zip(folders).map(open).collect()
}

/// What images are read as: what all models see.
fn wanted(args: &Args, models: &[Model]) -> Result<Wanted> {
    let channels = |model: &Model| model.trained.normalization.0.len();
    let first = channels(&models[0]);
    if let Some(other) = models.iter().map(channels).find(|n| *n != first) {
        let problem = format!("one model sees {first} channels and the other {other}");
        return Err(Error::user(problem, "compare models of as many channels"));
    }
    let own: Vec<Wanted> =
        models.iter().map(|m| read_by(&m.path).unwrap_or(Wanted::new(first, None, BACKGROUND))).collect();
    let given = args.bits.map(|bits| bits == 16);
    if given.is_none() && own.iter().any(|other| other.wide != own[0].wide) {
        return Err(Error::user("one model saw 8 bits of a value and the other 16", "say which are kept: --bits 16"));
    }
    if args.background.is_none() && own.iter().any(|other| other.background != own[0].background) {
        let problem = "the models saw transparent pixels on backgrounds of different colours";
        return Err(Error::user(problem, "say which it is: --background"));
    }
    let background = args.background.map_or(own[0].background, |colour| colour.0);
    Ok(Wanted { wide: given.unwrap_or(own[0].wide), background, ..own[0] })
}

/// One image as every model sees it; features and pictures are written. Signs of components follow the first model's where
/// grids agree, so that colours can be compared.
fn look(image: &Sample, input: &Input, models: &[Model], args: &Args) -> Result<Vec<(Seen, Maps)>> {
    let size = args.size.map_or(Size::Native, Size::Long);
    let mut all: Vec<(Seen, Maps)> = Vec::new();
    for model in models {
        let patch = model.trained.backbone.patch_size();
        let least = model.trained.backbone.smallest_crop();
        let whole = |image: &Sample| image.width.min(image.height) >= least;
        affordable(image, size, model, args).map_err(|problem| Error::content(&input.path, problem, "lower --size"))?;
        let fitted = fit(image, size, patch).filter(whole).ok_or_else(|| {
            let (width, height) = (image.width, image.height);
            let problem = format!("{width}x{height} pixels are too few: the model sees at least {least} a side");
            Error::content(&input.path, problem, "enlarge it with --size")
        })?;
        let seen = see(&model.trained, fitted, model.window)?;
        let folder = folder(input, model, args);
        std::fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
        let metadata = [
            ("image", printable(&input.path)),
            ("weights", printable(&model.path)),
            ("patch_size", patch.to_string()),
            ("pixels", format!("{}x{}", seen.view.image.width(), seen.view.image.height())),
        ];
        args.format.iter().try_for_each(|&format| write_features(&folder, &seen, format, &metadata))?;
        let mut maps = Maps::default();
        if !args.no_pictures {
            maps = maps_of(&seen, input, all.first(), args)?;
            write_pictures(&folder, &seen, &maps)?;
        }
        all.push((seen, maps));
    }
    Ok(all)
}

/// What was written of one image before.
fn again(input: &Input, models: &[Model], args: &Args) -> Result<Vec<(Seen, Maps)>> {
    let format = *args.format.first().expect("it has a default");
    let mut all: Vec<(Seen, Maps)> = Vec::new();
    for model in models {
        let seen = read_back(&folder(input, model, args), format)?;
        let maps = maps_of(&seen, input, all.first(), args)?;
        all.push((seen, maps));
    }
    Ok(all)
}

/// Where the files of an image as a model sees it are.
fn folder(input: &Input, model: &Model, args: &Args) -> PathBuf {
    args.out.join(&input.name).join(model.folder)
}

/// What is drawn of an image; signs of components follow the first model's.
fn maps_of(seen: &Seen, input: &Input, first: Option<&(Seen, Maps)>, args: &Args) -> Result<Maps> {
    let mut maps = seen.maps(&chosen(seen, &args.patches, &input.path)?)?;
    if let Some((_, first)) = first.filter(|(_, m)| m.scores.len() == maps.scores.len()) {
        align_signs(&mut maps.scores, &first.scores);
    }
    Ok(maps)
}

/// Fails if there is no memory for an image at its size: what takes it later does not ask.
fn affordable(image: &Sample, size: Size, model: &Model, args: &Args) -> Result<(), String> {
    let patch = model.trained.backbone.patch_size();
    let Some((width, height)) = sides((image.width, image.height), size, patch) else { return Ok(()) };
    let (width, height) = (width as f64, height as f64);
    let pictures = if args.no_pictures { 1.0 } else { 5.0 + args.patches.len().max(1) as f64 };
    // Every picture in 8-bit RGB; four numbers a pixel between the passes of the resize; the features and their sum.
    let pixels = 3.0 * pictures * width * height + 16.0 * height * image.width as f64;
    let patches = width * height / (patch * patch) as f64;
    let bytes = pixels + patches * 20.0 * model.trained.backbone.dim() as f64;
    let known = bytes < isize::MAX as f64 && width.max(height) < f64::from(u32::MAX);
    if known && Vec::<u8>::new().try_reserve_exact(bytes as usize).is_ok() {
        return Ok(());
    }
    Err(format!("at {width}x{height} pixels it takes about {}, more than there is", text::bytes(bytes)))
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
