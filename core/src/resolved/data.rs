//! A recipe and its data: what it asks of them, and what a user may not expect.

use super::check::{channels_of, probes};
use crate::contract::{Annotation, Dataset, Summary};
use crate::params::ParamBuilder;
use crate::problem::Problem;
use crate::recipe::Recipe;
use crate::step::{build_backbone, declare};

/// What the recipe asks of its data and this dataset does not have.
pub(super) fn check(recipe: &Recipe, data: &dyn Dataset) -> Vec<Problem> {
    let built = probes(recipe).into_iter().filter_map(|(name, _, probe)| Some((name, probe.ok()?)));
    let lacking = built.flat_map(|(name, probe)| {
        probe.lacks(data).into_iter().map(move |what| lacking(recipe, format!("probes.{name}"), what, data))
    });
    let channels = channels_of(recipe, data.channels());
    lacking
        .chain(channels)
        .chain(labels(recipe, data))
        .chain(fields(recipe, data))
        .chain(too_small(recipe, data))
        .collect()
}

/// What the data are, and what a user may not expect of them, and of the recipe with them.
pub fn summary_of_data(recipe: &Recipe, data: &dyn Dataset) -> Summary {
    let Summary { content, mut notes } = data.summary();
    let (batch, there) = (recipe.batch.size, data.len());
    if batch > there {
        notes.push(format!("a batch of {batch} images has some of the {there} more than once"));
    }
    if data.classes() == 1 {
        notes.push(
            "all labels are of one class: what tells classes apart is right without having learned anything".into(),
        );
    }
    Summary { content, notes }
}

/// Notes of the data that are told where something is missing: datasets begin with what folders are taken for.
const MOST_NOTES: usize = 2;

/// What has the table `key` needs what the dataset does not have.
fn lacking(recipe: &Recipe, key: String, what: Annotation, data: &dyn Dataset) -> Problem {
    let (what, dataset) = (what.name(), recipe.data.name());
    let notes: String = data.summary().notes.iter().take(MOST_NOTES).map(|note| format!("\n  data: {note}")).collect();
    let help = format!("set {key}.enabled = false, or choose data with {what}{notes}");
    Problem::error(key, format!("needs {what}, and the dataset `{dataset}` gives none")).help(help)
}

/// Losses that learn from labels which the dataset does not have, or has of more classes or fewer.
fn labels(recipe: &Recipe, data: &dyn Dataset) -> Vec<Problem> {
    let Ok(model) = declare(recipe) else { return Vec::new() };
    let wrong = model.losses.iter().filter_map(|loss| {
        let (asked, there) = (loss.needs.classes?, data.classes());
        let key = format!("losses.{}", loss.name);
        if there == 0 {
            return Some(lacking(recipe, key, Annotation::Labels, data));
        }
        let message = format!("tells {asked} classes apart, and the data has {there}");
        let help = format!("set {key}.classes = {there}");
        (asked != there).then(|| Problem::error(key, message).help(help))
    });
    wrong.collect()
}

/// Losses that read fields which the dataset does not have.
fn fields(recipe: &Recipe, data: &dyn Dataset) -> Vec<Problem> {
    let Ok(model) = declare(recipe) else { return Vec::new() };
    let there: Vec<String> = data.fields().into_iter().map(|field| field.name).collect();
    let asked = model.losses.iter().flat_map(|l| l.needs.fields.iter().map(move |field| (&l.name, field)));
    let missing = asked.filter(|(_, field)| !there.contains(field)).map(|(loss, field)| {
        let has = if there.is_empty() { "none".to_string() } else { there.join(", ") };
        let message = format!("reads the field `{field}`; of fields the dataset `{}` has {has}", recipe.data.name());
        let help = format!("set losses.{loss}.enabled = false, or choose data with that field");
        Problem::error(format!("losses.{loss}"), message).help(help)
    });
    missing.collect()
}

/// Generated images may be too small for a patch; of a folder's only those are, and the loader names them.
fn too_small(recipe: &Recipe, data: &dyn Dataset) -> Option<Problem> {
    if data.fingerprint().is_some() {
        return None;
    }
    let patch = build_backbone(recipe, &mut ParamBuilder::new()).ok()?.patch_size();
    let sample = data.get(0).ok()?;
    let message = format!("images of {}x{} pixels are smaller than a patch of {patch}", sample.width, sample.height);
    (sample.width.min(sample.height) < patch).then(|| Problem::error("data", message).help("make larger images"))
}
