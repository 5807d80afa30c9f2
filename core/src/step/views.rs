//! What losses draw for images, and the crops of their views.

use crate::contract::{BatchImage, CropBox, Crops, Draws, Grid, ImageContext, ImageDraws, Loss, Tile, View};
use crate::data::Batch;
use crate::rng::{Rng, Stream};
use crate::{Error, Result, Tensor};

use super::{Declared, DeclaredLoss, GLOBALS};

/// What a loss draws for the images of a micro-batch: numbers one image after the other, and the plan of
/// [`Tensor::tiles`] of every view.
///
/// # Errors
/// If images have different amounts of numbers, or a tile does not lie in a global crop: the loss is wrong.
pub(super) fn draw_images(
    declared: &DeclaredLoss,
    (seed, step): (u64, u64),
    sources: &[BatchImage],
    (global_size, patch_size): (usize, usize),
) -> Result<(Vec<f64>, Vec<Vec<u32>>)> {
    let views = declared.loss.views(global_size)?;
    let side = global_size / patch_size;
    let grid = Grid { height: side, width: side };
    let of_image = |image: &BatchImage| {
        // No loss has a name with a slash in it.
        let mut rng = Rng::named(seed, Stream::Loss, step, &format!("{}/{}", declared.name, image.place));
        declared.loss.draw_image(&mut ImageContext { image, global_size, grid, rng: &mut rng })
    };
    let drawn: Vec<ImageDraws> = sources.iter().map(of_image).collect();
    for image in &drawn {
        hold(&declared.name, declared.loss.as_ref(), &views, image, drawn[0].numbers.len(), global_size)?;
    }
    let images = sources.len();
    let plan = |(v, view): (usize, &View)| {
        let of_crop = view.tiles * view.tiles;
        let crops = (0..view.crops).flat_map(|crop| (0..images).map(move |image| (crop, image)));
        let rows = crops.flat_map(|(crop, image)| {
            let tiles = &drawn[image].tiles[v][crop * of_crop..][..of_crop];
            tiles.iter().flat_map(move |t| [t.crop * images + image, t.x, t.y, t.turns].map(|n| n as u32))
        });
        rows.collect()
    };
    let plans = views.iter().enumerate().map(plan).collect();
    Ok((drawn.into_iter().flat_map(|image| image.numbers).collect(), plans))
}

/// Fails unless what was drawn for an image is what its views are made of.
fn hold(
    name: &str,
    loss: &dyn Loss,
    views: &[View],
    drawn: &ImageDraws,
    numbers: usize,
    global_size: usize,
) -> Result<()> {
    let wrong = |problem: String| {
        let help = format!("this is a fault of the plugin: mend `draw_image` or `views` of {loss:?}");
        Err(Error::user(format!("the loss `{name}` drew {problem}"), help))
    };
    if drawn.numbers.len() != numbers {
        return wrong(format!("{} numbers for one image and {numbers} for another", drawn.numbers.len()));
    }
    let (counts, asked) = (drawn.tiles.iter().map(Vec::len), views.iter().map(View::tiles_of_image));
    let (counts, asked): (Vec<usize>, Vec<usize>) = (counts.collect(), asked.collect());
    if counts != asked {
        return wrong(format!("{counts:?} tiles for its views, which have {asked:?}"));
    }
    for (view, tiles) in views.iter().zip(&drawn.tiles) {
        let inside = |t: &Tile| {
            let ends = [t.x, t.y].iter().all(|start| start.saturating_add(view.tile_size) <= global_size);
            ends && t.crop < GLOBALS && t.turns < 4
        };
        if let Some(tile) = tiles.iter().find(|t| !inside(t)) {
            let size = view.tile_size;
            return wrong(format!(
                "{tile:?} of {size} pixels: it has to lie in one of {GLOBALS} crops of {global_size}"
            ));
        }
    }
    Ok(())
}

/// What is wrong with the views of a loss that sees global crops of `global_size` pixels, if anything: they have to be whole
/// numbers of patches, and what it draws for an image has to be what they are made of.
pub(crate) fn check_views(declared: &DeclaredLoss, model: &Declared, global_size: usize) -> Result<()> {
    let (patch, smallest) = (model.backbone.patch_size(), model.backbone.smallest_crop());
    for view in declared.loss.views(global_size)? {
        let size = view.size();
        if view.crops == 0 || size == 0 || size % patch != 0 || size < smallest {
            let problem = format!("the loss `{}` asks for {} crops of {size} pixels a side", declared.name, view.crops);
            let help = format!("it has to be a multiple of the {patch} pixels of a patch, at least {smallest}");
            return Err(Error::user(problem, help));
        }
    }
    let whole = CropBox { width: 1.0, height: 1.0, ..CropBox::default() };
    let image = |place| BatchImage { index: place, place, globals: vec![whole; GLOBALS], locals: Vec::new() };
    draw_images(declared, (0, 0), &[0, 1, 2, 3].map(image), (global_size, patch)).map(drop)
}

/// The crops of those views of every loss that a model sees.
pub(super) fn crops(
    model: &Declared,
    batch: &Batch,
    draws: &Draws,
    sees: fn(&View) -> bool,
) -> Result<Vec<Vec<Crops>>> {
    let of_loss = |(i, declared): (usize, &DeclaredLoss)| {
        let views = declared.loss.views(batch.global.dim(2))?;
        let seen = views.iter().enumerate().filter(|(_, view)| sees(view));
        let cut = |(v, view): (usize, &View)| {
            crops_of(view, declared, batch)?.tiles(&draws.tiles(i, v)?, view.tiles, view.tile_size)
        };
        seen.map(|view| cut(view).map(Crops::global)).collect()
    };
    model.losses.iter().enumerate().map(of_loss).collect()
}

/// The crops that a view is cut from.
fn crops_of<'a>(view: &View, declared: &DeclaredLoss, batch: &'a Batch) -> Result<&'a Tensor> {
    let Some(name) = &view.augmentation else { return Ok(&batch.global) };
    let found = batch.further.iter().find(|(further, _)| further == name);
    found.map(|(_, crops)| crops).ok_or_else(|| {
        let problem = format!(
            "the loss `{}` has a view of the augmentation `{name}`, of which there are no crops",
            declared.name
        );
        Error::user(problem, format!("add a table [augmentations.{name}]"))
    })
}

/// What loss `i` drew for the images: `[B, numbers]`; `None` if that is nothing.
pub(super) fn image_draws(draws: &Draws, i: usize, images: usize) -> Result<Option<Tensor>> {
    let drawn = draws.of_images(i)?;
    drawn.map(|numbers| numbers.reshape(&[images, numbers.len() / images])).transpose()
}
