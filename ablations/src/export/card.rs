//! The model card of an export: `README.md` as Hugging Face reads it.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use dinolab_core::recipe::Recipe;
use dinolab_core::resolved::Resolved;
use dinolab_core::text::printable;
use dinolab_core::weights::{ModelInfo, Source};
use dinolab_core::{Error, Result};
use serde_json::Value as Json;

/// The runs that are followed to where a training began: more go in a circle.
const LONGEST: usize = 100;

/// What a card is about.
pub struct About<'a> {
    /// Where the weights are from.
    pub source: &'a Source,
    /// What model they are of.
    pub model: &'a ModelInfo,
    /// The library that reads the export.
    pub library: &'a str,
    /// An `eval.json` that has scores of them.
    pub scores: Option<&'a Path>,
    /// Their licence.
    pub license: Option<&'a str>,
}

/// Licences that Hugging Face's Hub knows by these names.
const OF_THE_HUB: [&str; 22] = [
    "afl-3.0",
    "agpl-3.0",
    "apache-2.0",
    "bsd-2-clause",
    "bsd-3-clause",
    "cc-by-4.0",
    "cc-by-nc-4.0",
    "cc-by-nc-nd-4.0",
    "cc-by-nc-sa-4.0",
    "cc-by-nd-4.0",
    "cc-by-sa-4.0",
    "cc0-1.0",
    "eupl-1.2",
    "gpl-2.0",
    "gpl-3.0",
    "isc",
    "lgpl-3.0",
    "mit",
    "mpl-2.0",
    "openrail",
    "unlicense",
    "wtfpl",
];

/// The text of the card.
///
/// # Errors
/// If the recipe of a run or the scores cannot be read, or these are of other weights.
pub fn card(about: &About<'_>) -> Result<String> {
    let recipe = about.source.has_roles().then(|| Resolved::of_source(about.source)).transpose()?;
    let began = recipe.as_ref().map(|resolved| began(&resolved.recipe, 0)).transpose()?.flatten();
    let scores = about.scores.map(|file| scores(file, &about.source.hash()?)).transpose()?;
    let license = match about.license {
        Some(license) if OF_THE_HUB.contains(&license) => format!("license: {license}\n"),
        // Text of JSON is text of YAML.
        Some(license) => format!("license: other\nlicense_name: {}\n", serde_json::Value::from(license)),
        None => String::new(),
    };
    let mut text = format!(
        "---\nlibrary_name: {}\npipeline_tag: image-feature-extraction\n{license}tags:\n- dinov3\n- self-supervised\n- dinolab\n---\n\n",
        about.library
    );
    let name = recipe.as_ref().map_or_else(|| printable(about.source.path()), |r| r.recipe.name.clone());
    let (version, revision) = (env!("CARGO_PKG_VERSION"), crate::build());
    let command = crate::given::command();
    write!(
        text,
        "# {name}\n\nFeatures of images, learned without labels. Exported by dinolab {version} ({revision}) with\n\n    {command}\n\n\
        BLAKE3 of the weights that it was made of: `{}`.\n\n## Model\n\n```toml\n{}```\n",
        about.source.hash()?,
        about.model.to_toml()
    )
    .expect("writing to a string");
    text += "\n## Licence\n\n";
    text += &match (about.license, &began) {
        (Some(license), _) => format!("{license}\n"),
        (None, Some(from)) => format!(
            "Not said. The training began from the weights {}, whose licence holds for these too.\n",
            printable(from)
        ),
        (None, None) if recipe.is_some() => "Not said. The training began from random weights.\n".into(),
        (None, None) => "Not said. That of the weights that were imported holds for these too.\n".into(),
    };
    if let Some(scores) = scores {
        text += &scores;
    }
    if let Some(recipe) = recipe {
        write!(text, "\n## Training: data and recipe\n\n```toml\n{}```\n", recipe.to_toml())
            .expect("writing to a string");
    }
    Ok(text)
}

/// The weights from which the training began that ended with a run of this recipe; `None` if it began from random ones.
fn began(recipe: &Recipe, runs: usize) -> Result<Option<PathBuf>> {
    let continued = recipe.continue_from.as_ref().map(|from| from.path());
    let named = continued.or_else(|| recipe.init_from.clone()).or_else(|| recipe.backbone.weights.clone());
    let Some(from) = named else { return Ok(None) };
    match Source::at(&from).ok().filter(Source::has_roles) {
        Some(run) if runs < LONGEST => began(&Resolved::of_source(&run)?.recipe, runs + 1),
        _ => Ok(Some(from)),
    }
}

/// The scores of these weights as a table.
fn scores(file: &Path, hash: &str) -> Result<String> {
    let text = std::fs::read_to_string(file).map_err(Error::io("read", file))?;
    let help = "name the eval.json that `dinolab eval` wrote for these weights";
    let eval: Json = serde_json::from_str(&text).map_err(|e| Error::content(file, format!("not JSON: {e}"), help))?;
    let list = |value: &Json, key: &str| value[key].as_array().cloned().unwrap_or_default();
    let weights = list(&eval, "weights");
    let Some(of_these) = weights.iter().find(|w| w["hash"] == hash) else {
        let others = weights.iter().filter_map(|w| w["name"].as_str()).collect::<Vec<_>>().join(", ");
        let problem = format!("it has scores of {others}, none of them the weights that are exported");
        return Err(Error::content(file, problem, help));
    };
    let mut table = format!(
        "\n## Scores\n\nOn {}, with 95% intervals over test images.\n\n| score | pixels | value |\n|---|---|---|\n",
        eval["content"].as_str().unwrap_or("the data of the evaluation")
    );
    for size in list(of_these, "sizes") {
        for score in list(&size, "scores").iter().filter(|s| s["detail"] != true) {
            let number = |value: &Json| value.as_f64().map_or("-".into(), |x| format!("{x:.4}"));
            let interval = match &score["ci95"] {
                Json::Array(ends) if ends.len() == 2 => format!(" [{}, {}]", number(&ends[0]), number(&ends[1])),
                _ => String::new(),
            };
            let [probe, name] = ["probe", "score"].map(|key| score[key].as_str().unwrap_or_default());
            let pixels = size["size"].as_str().map_or_else(|| size["size"].to_string(), String::from);
            writeln!(table, "| {probe}/{name} | {pixels} | {}{interval} |", number(&score["value"]))
                .expect("writing to a string");
        }
    }
    Ok(table)
}
