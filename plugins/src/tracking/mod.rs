//! Probe `tracking`: do patch features carry an object's mask from frame to frame?

mod films;
mod propagate;
mod scores;

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;

use dinolab_core::contract::{ImageSize, Parts, Picture, Probe, ProbeContext, Score};
use dinolab_core::{plugin, Error, Result, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::pictures;
use crate::pixels::{normalized, rgb};
use films::{Films, Frame};

/// Objects tracked through films by their mask in the first frame, with nothing trained.
///
/// The labels of a patch are the weighted labels of the `top_k` most similar patches (cosine s, weights `exp(s /
/// temperature)`). Candidates are the patches of the first frame and of the `last_frames` before its own that lie within
/// `radius` patches of its place. This is the label propagation of DINO (arXiv:2104.14294, section 4.2.2) as in its released
/// code: labels are propagated as shares, resized bilinearly to pixels, rescaled to [0, 1] for each object, and the greatest
/// share gives the prediction. Scores over objects, each the mean over the frames with a mask but the first and the last, as
/// the toolkit of DAVIS takes them (Perazzi et al., CVPR 2016): `j`, the intersection over union; `f`, the F-measure of the
/// contour within 0.8% of the diagonal; `j_and_f`, the mean of the two.
///
/// Films are drawn scenes whose objects move over the ground and each other, at the size at which the model sees them; or those
/// of a folder, in the layout of DAVIS.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Tracking {
    /// Folder with a sub-folder of frames for every film, in the order of their names. Without, films are drawn.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frames: Option<PathBuf>,
    /// Folder with the same sub-folders, of masks that are named as their frames: indexed or grey PNG, 0 the background, every
    /// other value an object, 255 nothing. The first frame has to have one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub masks: Option<PathBuf>,
    /// Films: how many are drawn, or the first ones of the folder.
    #[schemars(range(max = 100_000))]
    pub films: NonZeroUsize,
    /// Frames of a film that is drawn.
    #[schemars(range(min = 3, max = 1000))]
    pub length: usize,
    /// Number of previous frames, besides the first frame, from which a patch takes labels.
    #[schemars(range(max = 1000))]
    pub last_frames: usize,
    /// Patches whose labels it takes.
    #[schemars(range(max = 1_000_000))]
    pub top_k: NonZeroUsize,
    /// How many patches away they may be, along each side.
    #[schemars(range(max = 100_000))]
    pub radius: usize,
    /// Temperature of their weights.
    #[schemars(extend(
        "exclusiveMinimum" = 0,
        "maximum" = 1000,
        "x-help" = "labels are weighted by exp(similarity / temperature): give a positive number"
    ))]
    pub temperature: f64,
}

impl Default for Tracking {
    fn default() -> Self {
        let number = |n| NonZeroUsize::new(n).expect("defaults are positive");
        Self {
            frames: None,
            masks: None,
            films: number(16),
            length: 12,
            last_frames: 7,
            top_k: number(5),
            radius: 12,
            temperature: 0.1,
        }
    }
}

/// Sums over frames of an object: J, F, and how many there are.
type Tracked = [f64; 3];

impl Tracking {
    /// The objects of a film, each with its sums, and the answers for all frames.
    fn track(&self, context: &ProbeContext<'_>, frames: &[Frame]) -> Result<(Vec<Tracked>, Vec<Vec<u8>>)> {
        let size = context.image_size;
        let pixels: Vec<f32> =
            frames.iter().flat_map(|frame| normalized(&frame.image, context.normalization)).collect();
        let pixels = Tensor::from_slice(&pixels, &[frames.len(), 3, size.height, size.width])?;
        let mut grid = None;
        let mut patches = Vec::new();
        for first in (0..frames.len()).step_by(BATCH) {
            let features = (context.features)(&pixels.narrow(first, BATCH.min(frames.len() - first))?)?;
            patches.push(features.patches.detach().cast(dinolab_core::DType::F32)?.l2_normalize(1e-12)?);
            grid = Some(features.grid);
        }
        let grid = grid.expect("a film has frames");
        let patches = Tensor::cat(&patches.iter().collect::<Vec<_>>())?;
        let first = frames[0].objects.as_ref().expect("a film begins with a mask");
        let labels = 1 + first.iter().copied().filter(|&object| object != 255).max().map_or(0, usize::from);
        let carried = propagate::propagate(self, &patches, first, size, grid, labels)?;
        let answers: Vec<Vec<u8>> =
            carried.iter().map(|shares| propagate::answers(shares, size, grid, labels)).collect();
        let present: Vec<u8> = (1..labels as u8).filter(|object| first.contains(object)).collect();
        let mut tracked = vec![[0.0; 3]; present.len()];
        for (frame, answer) in frames.iter().zip(&answers).take(frames.len() - 1).skip(1) {
            let Some(objects) = &frame.objects else { continue };
            for (object, sums) in present.iter().zip(&mut tracked) {
                let mask = |of: &[u8]| of.iter().map(|label| label == object).collect::<Vec<bool>>();
                let (truth, given) = (mask(objects), mask(answer));
                let f = scores::contour(&truth, &given, size);
                sums.iter_mut().zip([scores::overlap(&truth, &given), f, 1.0]).for_each(|(sum, x)| *sum += x);
            }
        }
        Ok((tracked, answers))
    }
}

/// Frames whose features are computed together.
const BATCH: usize = 16;

impl Probe for Tracking {
    fn stamp(&self) -> Option<String> {
        films::stamp(self)
    }

    fn run(&self, context: &ProbeContext<'_>) -> Result<Vec<Score>> {
        let films = Films::of(self, context)?;
        let mut objects: Vec<Vec<f64>> = Vec::new();
        for film in 0..films.len() {
            let frames = films.read(film, context.image_size)?;
            let (tracked, answers) = self.track(context, &frames)?;
            let scored = tracked.into_iter().filter(|sums| sums[2] > 0.0);
            objects.extend(scored.map(|[j, f, n]| vec![j / n, f / n, 1.0]));
            if let Some(show) = context.show.filter(|_| film < pictures::MOST) {
                show(picture(films.name(film), &frames, &answers, context.image_size));
            }
        }
        if objects.is_empty() {
            let help = "give masks of three frames or more of a film, the first among them";
            return Err(Error::user("probe `tracking`: no film has an object to follow", help));
        }
        let objects: Arc<[Vec<f64>]> = objects.into();
        let score = |name: &'static str, of: fn(&[f64]) -> f64| {
            Score::of(name, Parts { images: objects.clone(), score: Arc::new(of) })
        };
        Ok(vec![
            score("j_and_f", |sum| 0.5 * (sum[0] + sum[1]) / sum[2]),
            score("j", |sum| sum[0] / sum[2]),
            score("f", |sum| sum[1] / sum[2]),
        ])
    }

    fn unfit_channels(&self, channels: usize) -> Option<(String, String)> {
        let problem = || format!("films are RGB, and the model sees {channels} channels");
        (channels != 3).then(|| (problem(), "take the probe out".into()))
    }

    fn images(&self) -> usize {
        self.films.get().saturating_mul(self.length)
    }
}

/// The first frame with its mask, the middle one and the last but one with what was carried there.
fn picture(name: String, frames: &[Frame], answers: &[Vec<u8>], size: ImageSize) -> Picture {
    let mut panels = vec![pictures::panel("first frame", rgb(&frames[0].image))];
    panels.extend(frames[0].objects.as_ref().map(|mask| pictures::classes("its mask", mask, size.width)));
    for at in [frames.len() / 2, frames.len() - 2] {
        panels.push(pictures::panel(format!("frame {}", at + 1), rgb(&frames[at].image)));
        panels.extend(frames[at].objects.as_ref().map(|mask| pictures::classes("true", mask, size.width)));
        panels.push(pictures::classes("carried there", &answers[at], size.width));
    }
    Picture { caption: name, panels }
}

plugin!(Probe, "tracking", Tracking, |config: Tracking, _: &mut ()| {
    match config.frames.is_some() == config.masks.is_some() {
        true => Ok(Box::new(config) as Box<dyn Probe>),
        false => {
            let problem = "of `frames` and `masks` one is given: films of a folder need both";
            Err(Error::user(problem, "give both, or neither to have films drawn"))
        }
    }
});

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe_data::testing::{perfect, random, run, Halves};

    #[test]
    fn films_that_changed_are_others() {
        let folder = std::env::temp_dir().join(format!("dinolab-films-{}", std::process::id()));
        std::fs::create_dir_all(folder.join("masks")).unwrap();
        let place = |name: &str| Some(folder.join(name));
        let probe = Tracking { frames: place("frames"), masks: place("masks"), ..Tracking::default() };
        std::fs::write(folder.join("masks/0.png"), b"one").unwrap();
        let before = probe.stamp();
        assert!(before.is_some() && before == probe.stamp() && Tracking::default().stamp().is_none());
        std::fs::write(folder.join("masks/0.png"), b"other").unwrap();
        assert_ne!(probe.stamp(), before);
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn scores_of_drawn_films_are_shares_and_colours_track_better_than_nothing() {
        let data = Halves { len: 1, width: 32, height: 32 };
        let probe = Tracking { films: NonZeroUsize::new(6).unwrap(), ..Tracking::default() };
        let values = |model| run(&probe, &data, &data, model).iter().map(|s| s.value).collect::<Vec<_>>();
        let (red, none) = (values(&perfect), values(&random));
        assert!(red.iter().chain(&none).all(|x| (0.0..=1.0).contains(x)), "{red:?} {none:?}");
        assert!((red[0] - 0.5 * (red[1] + red[2])).abs() < 1e-12);
        assert!(red[1] > none[1], "{red:?} {none:?}");
    }
}
