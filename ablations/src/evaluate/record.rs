//! Scores as files have them.

use dinolab_core::contract::{ImageSize, Panel, Picture};
use dinolab_core::files::write_file;
use dinolab_core::{Error, Result};
use image::imageops::thumbnail;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;
use std::path::Path;

use super::bootstrap::interval;
use super::Plan;
use crate::pictures::{data_uri, map};

/// What one of the weights scored at one size.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SizeRecord {
    /// What images were brought to: a side in pixels, or "width x height".
    pub size: ImageSize,
    /// How long it took.
    pub seconds: f64,
    /// Every score of every probe.
    pub scores: Vec<ScoreRecord>,
    /// What a score does not show.
    pub warnings: Vec<String>,
    /// Whether a probe could not be taken.
    pub failed: bool,
    /// What scores are made of, to look at.
    pub pictures: Vec<PictureRecord>,
}

/// A [`Picture`] as pages have it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PictureRecord {
    /// The probe's name.
    pub probe: String,
    /// What of.
    pub caption: String,
    /// Label and PNG, as a data URI, of every image.
    pub panels: Vec<(String, String)>,
}

/// Width in pixels that an image of a page has at most.
const WIDE: u32 = 192;

impl PictureRecord {
    /// Of a probe's picture.
    pub fn of(probe: &str, picture: &Picture) -> Self {
        let panel = |panel: &Panel| {
            let image = map(panel.width, panel.rgb.chunks_exact(3).map(|p| [p[0], p[1], p[2]]));
            let (width, height) = image.dimensions();
            let small = width.min(WIDE);
            let image = if small < width { thumbnail(&image, small, (height * small / width).max(1)) } else { image };
            (panel.label.clone(), data_uri(&image))
        };
        let panels = picture.panels.iter().map(panel).collect();
        Self { probe: probe.into(), caption: picture.caption.clone(), panels }
    }
}

/// One score.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Scored {
    /// The probe's name.
    pub probe: String,
    /// Its score's.
    pub score: String,
    /// The score; none if it is not finite.
    pub value: Option<f64>,
    /// 95% bootstrap interval over test images, if it is put together from images.
    pub ci95: Option<[f64; 2]>,
    /// Test images that it is put together from.
    pub images: Option<usize>,
    /// Whether it is one of many, as of one class.
    pub detail: bool,
}

/// One score, with what differences to it are found by.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ScoreRecord {
    /// The score.
    #[serde(flatten)]
    pub of: Scored,
    /// The score of every draw of test images; none where it is not finite.
    pub drawn: Vec<Option<f64>>,
}

/// `eval.json`.
#[derive(Clone, Debug, Serialize)]
pub struct Evaluation {
    /// Version of the program.
    pub dinolab: &'static str,
    /// Its git revision.
    pub revision: &'static str,
    /// The table of the dataset, and what it holds.
    pub data: Json,
    /// What it holds, in words.
    pub content: String,
    /// The seed by which samples are drawn.
    pub seed: u64,
    /// The tables of the probes.
    pub probes: Json,
    /// Scores of the weights, in the order in which they were named.
    pub weights: Vec<WeightsScores>,
}

/// Scores of one of the weights.
#[derive(Clone, Debug, Serialize)]
pub struct WeightsScores {
    /// Where they are.
    pub name: String,
    /// BLAKE3 of their file.
    pub hash: String,
    /// What model they are of.
    pub model: Json,
    /// By size.
    pub sizes: Vec<SizeScores>,
}

/// Scores at one size.
#[derive(Clone, Debug, Serialize)]
pub struct SizeScores {
    /// What images were brought to: a side in pixels, or "width x height".
    pub size: ImageSize,
    /// How long it took.
    pub seconds: f64,
    /// What a score does not show.
    pub warnings: Vec<String>,
    /// Every score of every probe.
    pub scores: Vec<ScoreLine>,
}

/// One score, and how it differs.
#[derive(Clone, Debug, Serialize)]
pub struct ScoreLine {
    /// The score.
    #[serde(flatten)]
    pub of: Scored,
    /// To the same score of the first weights at the same size.
    pub difference: Option<Difference>,
}

/// A difference of scores on the same images.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Difference {
    /// These less the first weights'.
    pub value: f64,
    /// 95% bootstrap interval: both are scored on the same draws of test images.
    pub ci95: [f64; 2],
}

impl Difference {
    /// Whether its interval leaves out zero.
    pub fn is_clear(&self) -> bool {
        self.ci95[0] > 0.0 || self.ci95[1] < 0.0
    }
}

impl SizeRecord {
    /// Of nothing yet.
    pub fn at(size: ImageSize) -> Self {
        let (scores, warnings, pictures) = (Vec::new(), Vec::new(), Vec::new());
        Self { size, seconds: 0.0, scores, warnings, failed: false, pictures }
    }

    /// What was measured before; none if it was not, or the file is broken.
    pub fn read(path: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(path).ok()?).ok()
    }

    /// Keeps it, whole or not at all.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let folder = path.parent().expect("it has a folder");
        std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        write_file(path, serde_json::to_string(self).expect("plain data").as_bytes())
    }

    /// With differences to what the first weights scored at this size.
    fn lines(&self, first: Option<&Self>) -> SizeScores {
        let line = |score: &ScoreRecord| {
            let theirs = first.and_then(|first| first.find(&score.of));
            ScoreLine { of: score.of.clone(), difference: theirs.and_then(|theirs| score.less(theirs)) }
        };
        let scores = self.scores.iter().map(line).collect();
        SizeScores { size: self.size, seconds: self.seconds, warnings: self.warnings.clone(), scores }
    }

    fn find(&self, like: &Scored) -> Option<&ScoreRecord> {
        self.scores.iter().find(|s| s.of.probe == like.probe && s.of.score == like.score)
    }
}

impl ScoreRecord {
    /// The difference to a score of other weights on the same images.
    fn less(&self, other: &Self) -> Option<Difference> {
        if self.of.images != other.of.images {
            return None;
        }
        let pairs = self.drawn.iter().zip(&other.drawn).filter_map(|(a, b)| Some((*a)? - (*b)?));
        Some(Difference { value: self.of.value? - other.of.value?, ci95: interval(pairs)? })
    }
}

impl Evaluation {
    /// Of these records, by weights and size.
    pub fn new(plan: &Plan, records: &[Vec<SizeRecord>]) -> Self {
        let of_first = |size: ImageSize| records[0].iter().find(|record| record.size == size);
        let weights = plan.jobs.iter().zip(records).enumerate().map(|(i, (job, records))| {
            let sizes = records.iter().map(|record| record.lines(of_first(record.size).filter(|_| i > 0))).collect();
            let model = serde_json::to_value(&job.model).expect("tables are plain data");
            WeightsScores { name: job.name(), hash: job.hash.clone(), model, sizes }
        });
        Self {
            dinolab: env!("CARGO_PKG_VERSION"),
            revision: crate::build(),
            data: serde_json::to_value(&plan.data.data).expect("a table is plain data"),
            content: plan.train.summary().content,
            seed: plan.data.seed,
            probes: plan.probes(),
            weights: weights.collect(),
        }
    }

    /// All sizes, ascending.
    pub fn sizes(&self) -> Vec<ImageSize> {
        let mut all: Vec<ImageSize> = self.weights.iter().flat_map(|w| w.sizes.iter().map(|s| s.size)).collect();
        all.sort_by_key(|size| (size.pixels(), size.width));
        all.dedup();
        all
    }

    /// Probe and name of all scores, in the order in which they were taken; those of single classes or the others.
    pub fn scores(&self, detail: bool) -> Vec<(String, String)> {
        let mut all = Vec::new();
        for line in self.weights.iter().flat_map(|w| &w.sizes).flat_map(|s| &s.scores).filter(|l| l.of.detail == detail)
        {
            let name = (line.of.probe.clone(), line.of.score.clone());
            if !all.contains(&name) {
                all.push(name);
            }
        }
        all
    }
}

impl WeightsScores {
    /// A score at a size.
    pub fn at(&self, (probe, score): &(String, String), size: ImageSize) -> Option<&ScoreLine> {
        let sizes = self.sizes.iter().find(|s| s.size == size)?;
        sizes.scores.iter().find(|line| line.of.probe == *probe && line.of.score == *score)
    }
}

impl ScoreLine {
    /// The score with its interval in the digits that they have a meaning to; a star where it differs from the first weights'.
    pub fn text(&self) -> String {
        let Some(value) = self.of.value else { return "not finite".into() };
        let show = crate::report::rounded_to(self.of.ci95);
        let range = self.of.ci95.map_or(String::new(), |[low, high]| format!(" [{}, {}]", show(low), show(high)));
        let star = if self.difference.is_some_and(|d| d.is_clear()) { " *" } else { "" };
        format!("{}{range}{star}", show(value))
    }
}
