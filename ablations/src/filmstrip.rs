//! The filmstrip: what several runs see of the same held-out images at every step whose checkpoint was kept.
//!
//! Columns are steps, rows are runs. An image has strips of the similarity of all patches to a marked one, of the cosine of
//! every patch to CLS with the histogram of these cosines, and of the first three principal components as colours. All
//! components are of one basis, that of all steps of all runs together: equal colours mean equal directions.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use dinolab_core::checkpoint;
use dinolab_core::train::{write_pictures, StepPicture};
use dinolab_core::{Device, Error, Result};
use image::imageops::overlay;
use image::RgbImage;
use minijinja::value::Serde;
use minijinja::{context, Environment, Value};
use serde::{Serialize, Serializer};

use crate::features::{Held, Seen};
use crate::pictures::{data_uri, map, principal_scores, scaled, to_colors, viridis, PatchView};

/// The strips of a page that knows how to show them.
pub const STRIPS: &str = include_str!("filmstrip_strips.html");
const PAGE: &str = include_str!("filmstrip.html");
/// Columns at most: of more steps, some spread evenly over them, the first and the last among them.
const MOST: usize = 12;
/// Pixels between the images of a sheet.
const GAP: u32 = 2;
/// Bins of a histogram, from cosine -1 to 1.
const BINS: usize = 40;

/// What all runs see, image by image.
#[derive(Clone, Debug, Serialize)]
pub struct Filmstrip {
    /// Steps done, ascending: the columns.
    pub steps: Vec<u64>,
    /// The images.
    pub images: Vec<FilmImage>,
}

/// One image.
#[derive(Clone, Debug, Serialize)]
pub struct FilmImage {
    /// It.
    #[serde(serialize_with = "as_data")]
    pub image: RgbImage,
    /// Left, top, width and height of the marked patch in percent of the image.
    pub reference: [f64; 4],
    /// One a run.
    pub rows: Vec<FilmRow>,
}

/// One run.
#[derive(Clone, Debug, Serialize)]
pub struct FilmRow {
    /// Its name.
    pub name: String,
    /// One a column; none where the run kept no checkpoint of the step.
    pub cells: Vec<Option<FilmCell>>,
}

/// What a run sees of an image after so many steps.
#[derive(Clone, Debug, Serialize)]
pub struct FilmCell {
    /// Cosine to the marked patch, 0 dark to 1 bright.
    #[serde(serialize_with = "as_data")]
    pub similarity: RgbImage,
    /// Its mean over patches: high means that locality is lost.
    pub mean_similarity: f64,
    /// Cosine of every patch to CLS, 0 dark to 1 bright.
    #[serde(serialize_with = "as_data")]
    pub cls: RgbImage,
    /// Its mean over patches.
    pub mean_cls: f64,
    /// The path of an SVG of 40 by 10: how many patches have which cosine to CLS, from -1 to 1.
    pub histogram: String,
    /// Principal components as colours.
    #[serde(serialize_with = "as_data")]
    pub components: RgbImage,
}

/// The strips of these runs (name, folder), computed on a device, or else on a GPU when there is one; none if together they kept
/// fewer than `least` steps.
///
/// # Errors
/// If a checkpoint cannot be read, or runs hold out other images or cut them into other patches.
pub fn filmstrip(runs: &[(String, PathBuf)], least: usize, device: Option<Device>) -> Result<Option<Filmstrip>> {
    let kept: Vec<Vec<(u64, PathBuf)>> = runs.iter().map(|(_, run)| kept(run)).collect::<Result<_>>()?;
    let all: BTreeSet<u64> = kept.iter().flatten().map(|(step, _)| *step).collect();
    let steps = spread(&all.into_iter().collect::<Vec<_>>());
    if steps.len() < least.max(1) {
        return Ok(None);
    }
    // By run, step and image.
    let mut seen: Vec<Vec<Option<Vec<Seen>>>> = Vec::new();
    for ((_, run), kept) in runs.iter().zip(&kept) {
        let held = Held::of(run)?;
        let at =
            |step: &u64| kept.iter().find(|(s, _)| s == step).map(|(_, path)| held.see_with(path, device)).transpose();
        seen.push(steps.iter().map(at).collect::<Result<_>>()?);
    }
    let flat: Vec<&Vec<Seen>> = seen.iter().flatten().flatten().collect();
    check_alike(&flat)?;
    let views: Vec<PatchView> = flat.iter().flat_map(|images| images.iter().map(|seen| seen.view.clone())).collect();
    let colors = to_colors(&principal_scores(&views)?);
    let mut colors = colors.as_slice();
    let mut cells: Vec<Vec<Option<Vec<FilmCell>>>> = Vec::new();
    for of_run in &seen {
        let mut draw = |seen: &Seen| {
            let (mine, rest) = colors.split_at(seen.view.patches());
            colors = rest;
            cell(seen, mine)
        };
        cells.push(of_run.iter().map(|images| Some(images.as_ref()?.iter().map(&mut draw).collect())).collect());
    }
    let Some(first) = flat.first() else { return Ok(None) };
    let image = |(i, seen): (usize, &Seen)| {
        let row = |((name, _), cells): (&(String, PathBuf), &Vec<Option<Vec<FilmCell>>>)| {
            let cells = cells.iter().map(|images| Some(images.as_ref()?[i].clone())).collect();
            FilmRow { name: name.clone(), cells }
        };
        let rows = runs.iter().zip(&cells).map(row).collect();
        FilmImage { image: seen.view.image.clone(), reference: seen.view.frame(seen.view.reference()), rows }
    };
    Ok(Some(Filmstrip { images: first.iter().enumerate().map(image).collect(), steps }))
}

fn as_data<S: Serializer>(image: &RgbImage, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&data_uri(image))
}

/// Gives TensorBoard the strip of every run, as pictures over steps beside the run's own numbers:
/// `<run>/tensorboard/filmstrip`. `runs` are those that the strips are of; one whose recipe asks for no TensorBoard gets none.
///
/// # Errors
/// If a file cannot be written.
pub fn to_tensorboard(strip: &Filmstrip, runs: &[(String, PathBuf)]) -> Result<()> {
    type Part = fn(&FilmCell) -> &RgbImage;
    let kinds: [(&str, Part); 3] = [
        ("filmstrip/similarity", |cell| &cell.similarity),
        ("filmstrip/cls", |cell| &cell.cls),
        ("filmstrip/components", |cell| &cell.components),
    ];
    let shown = |(_, (_, run)): &(usize, &(String, PathBuf))| run.join("tensorboard").is_dir();
    for (i, (_, run)) in runs.iter().enumerate().filter(shown) {
        let mut sheets = Vec::new();
        for (column, step) in strip.steps.iter().enumerate() {
            let seen = strip.images.iter().map(|image| Some((&image.image, image.rows[i].cells[column].as_ref()?)));
            let Some(seen) = seen.collect::<Option<Vec<_>>>() else { continue };
            sheets.push((*step, "filmstrip/images", side_by_side(seen.iter().map(|(image, _)| (*image).clone()))));
            for (kind, part) in &kinds {
                let maps = seen.iter().map(|(image, cell)| scaled(part(cell), image.dimensions()));
                sheets.push((*step, *kind, side_by_side(maps)));
            }
        }
        let pictures: Vec<StepPicture<'_>> = sheets.iter().map(picture).collect();
        write_pictures(&run.join("tensorboard/filmstrip"), &pictures)?;
    }
    Ok(())
}

fn picture<'a>((step, tag, sheet): &'a (u64, &'static str, RgbImage)) -> StepPicture<'a> {
    let (width, height) = (sheet.width() as usize, sheet.height() as usize);
    StepPicture { step: *step, tag, rgb: sheet.as_raw(), width, height }
}

/// Images of one height in a row.
fn side_by_side(images: impl Iterator<Item = RgbImage>) -> RgbImage {
    let images: Vec<RgbImage> = images.collect();
    let height = images.iter().map(RgbImage::height).max().unwrap_or(0);
    let mut sheet = RgbImage::new(images.iter().map(|image| image.width() + GAP).sum(), height);
    let mut left = 0;
    for image in &images {
        overlay(&mut sheet, image, left, 0);
        left += i64::from(image.width() + GAP);
    }
    sheet
}

/// The page of the strips of some runs.
pub fn page(strip: &Filmstrip) -> String {
    let mut environment = Environment::new();
    environment.add_template("strips.html", STRIPS).expect("the template is well formed");
    environment.add_template("filmstrip.html", PAGE).expect("the template is well formed");
    let template = environment.get_template("filmstrip.html").expect("it was added above");
    let page = template.render(context! { filmstrip => Value::from(Serde(strip)) });
    page.expect("the template asks for nothing that it is not given")
}

/// The kept checkpoints of a run by their steps.
fn kept(run: &Path) -> Result<Vec<(u64, PathBuf)>> {
    Ok(checkpoint::steps(run)?.into_iter().zip(checkpoint::list(run)?).collect())
}

/// At most [`MOST`] of the steps, spread evenly over them, both ends among them.
fn spread(steps: &[u64]) -> Vec<u64> {
    if steps.len() <= MOST {
        return steps.to_vec();
    }
    (0..MOST).map(|i| steps[i * (steps.len() - 1) / (MOST - 1)]).collect()
}

/// Pictures are side by side only where they are of the same images, cut alike.
fn check_alike(all: &[&Vec<Seen>]) -> Result<()> {
    let same = |a: &Seen, b: &Seen| {
        let grid = |seen: &Seen| (seen.view.height, seen.view.width, seen.cls.len());
        grid(a) == grid(b) && a.view.image == b.view.image
    };
    let alike =
        all.iter().all(|images| images.len() == all[0].len() && images.iter().zip(all[0]).all(|(a, b)| same(a, b)));
    match alike {
        true => Ok(()),
        false => {
            let problem =
                "these runs hold out other images, cut them into other patches or have features of other widths";
            Err(Error::user(problem, "show them one by one"))
        }
    }
}

fn cell(seen: &Seen, colors: &[[u8; 3]]) -> FilmCell {
    let view = &seen.view;
    let (similarity, cls) = (view.cosine_to(view.patch(view.reference())), view.cosine_to(&seen.cls));
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let bright = |values: &[f64]| map(view.width, values.iter().map(|&v| viridis(v)));
    FilmCell {
        similarity: bright(&similarity),
        mean_similarity: mean(&similarity),
        cls: bright(&cls),
        mean_cls: mean(&cls),
        histogram: histogram(&cls),
        components: map(view.width, colors.iter().copied()),
    }
}

/// The outline of a histogram of cosines, 40 wide and 10 high, the fullest bin at the top.
fn histogram(values: &[f64]) -> String {
    let mut counts = [0usize; BINS];
    for value in values {
        let share = (value.clamp(-1.0, 1.0) + 1.0) / 2.0;
        counts[((share * BINS as f64) as usize).min(BINS - 1)] += 1;
    }
    let most = counts.iter().copied().max().unwrap_or(1).max(1) as f64;
    let step =
        |(i, count): (usize, &usize)| format!("L{i} {0:.2}L{1} {0:.2}", 10.0 * (1.0 - *count as f64 / most), i + 1);
    format!("M0 10{}L{BINS} 10Z", counts.iter().enumerate().map(step).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_is_full_where_all_cosines_are() {
        let path = histogram(&[0.99, 1.0, 1.0, -1.0]);
        assert!(path.starts_with("M0 10L0 6.67L1 6.67L1 10.00"), "{path}");
        assert!(path.ends_with("L39 0.00L40 0.00L40 10Z"), "{path}");
    }

    #[test]
    fn many_steps_are_thinned_to_some_with_both_ends() {
        let steps: Vec<u64> = (1..=100).collect();
        let shown = spread(&steps);
        assert_eq!((shown.len(), shown[0], shown[MOST - 1]), (MOST, 1, 100));
        assert_eq!(spread(&steps[..5]), [1, 2, 3, 4, 5]);
    }
}
