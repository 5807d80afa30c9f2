//! How the images of a run are read.

use std::path::Path;

use dinolab_core::resolved::Resolved;
use dinolab_core::weights::Source;
use dinolab_plugins::image_folder::{Wanted, BACKGROUND};

/// How the run of these weights read its images, where it read files: `None` of weights alone, or where images are drawn.
pub(crate) fn read_by(weights: &Path) -> Option<Wanted> {
    let source = Source::at(weights).ok().filter(Source::has_roles)?;
    let recipe = Resolved::of_source(&source).ok()?.recipe;
    let keys = recipe.data.config();
    let number = |key: &str| keys.get(key).and_then(serde_json::Value::as_u64);
    let channels = usize::try_from(number("channels")?).ok()?;
    let bits = number("bits").and_then(|bits| u8::try_from(bits).ok());
    let background = keys.get("background").and_then(|colour| serde_json::from_value(colour.clone()).ok());
    Some(Wanted::new(channels, bits, background.unwrap_or(BACKGROUND)))
}
