//! Trained weights scored on any dataset by any probes, at several image sizes: what `dinolab eval` does.
//!
//! ```text
//! <out>/
//!   eval.json          every score with its interval, and its difference to that of the first weights
//!   eval.html          the same as a page: curves over size, tables
//!   scores/<hash>.json what one of the weights scored at one size: what is there is not measured again
//!   features/<hash>/   features of the weights that are being scored: what is there is not computed again
//! ```

mod bootstrap;
mod page;
mod plan;
mod record;
mod seen;

use std::cell::RefCell;
use std::time::Instant;

use dinolab_core::contract::{at_size, ImageSize, ProbeContext, Score};
use dinolab_core::train::Trained;

pub use page::page;
pub use plan::{Job, Plan, Taken};
pub use record::{
    Difference, Evaluation, PictureRecord, ScoreLine, ScoreRecord, Scored, SizeRecord, SizeScores, WeightsScores,
};
pub use seen::Seen;

/// What one of the weights scores at one size; features go through `seen`. `begun` is told of every probe, and says whether to go on: else there is no
/// record. A probe that fails is a warning, and its scores are missing.
pub fn measure(
    plan: &Plan,
    (job, trained, seen): (&Job, &Trained, &Seen<'_>),
    size: ImageSize,
    begun: &mut dyn FnMut(&str) -> bool,
) -> Option<SizeRecord> {
    let begin = Instant::now();
    let (warnings, pictures) = (RefCell::new(Vec::<(String, Vec<&str>)>::new()), RefCell::new(Vec::new()));
    let mut record = SizeRecord::at(size);
    let drawn_parts = at_size(&plan.train, &plan.test, size);
    for (Taken { name, probe, .. }, drawn) in plan.taken(job, size) {
        if !begun(name) {
            return None;
        }
        // Probes that read the same images meet the same broken ones.
        let warn = |name, text: String| {
            let mut all = warnings.borrow_mut();
            match all.iter_mut().find(|(known, _)| *known == text) {
                Some((_, probes)) if probes.last() == Some(&name) => {}
                Some((_, probes)) => probes.push(name),
                None => all.push((text, vec![name])),
            }
        };
        let [train, test] = if drawn { drawn_parts.clone() } else { [plan.train.clone(), plan.test.clone()] };
        let context = ProbeContext {
            features: &|pixels| seen.features(pixels)?.finite(),
            train: train.as_ref(),
            test: test.as_ref(),
            image_size: size,
            patch_size: trained.backbone.patch_size(),
            normalization: (&trained.normalization.0, &trained.normalization.1),
            seed: plan.data.seed,
            warn: &|text| warn(name, text),
            show: Some(&|picture| pictures.borrow_mut().push(PictureRecord::of(name, &picture))),
        };
        match probe.run(&context) {
            Ok(scores) => record.scores.extend(records(name, &scores)),
            Err(error) => {
                record.failed = true;
                warn(name, format!("could not be taken: {error}"));
            }
        }
    }
    record.seconds = begin.elapsed().as_secs_f64();
    let say = |(text, probes): (String, Vec<&str>)| {
        let s = if probes.len() > 1 { "s" } else { "" };
        format!("probe{s} `{}` at {size} pixels: {text}", probes.join("`, `"))
    };
    record.warnings = warnings.into_inner().into_iter().map(say).collect();
    record.pictures = pictures.into_inner();
    Some(record)
}

fn records(probe: &str, scores: &[Score]) -> Vec<ScoreRecord> {
    let drawn = bootstrap::resample(scores);
    let record = |(score, drawn): (&Score, Vec<f64>)| ScoreRecord {
        of: Scored {
            probe: probe.to_string(),
            score: score.name.to_string(),
            value: Some(score.value).filter(|x| x.is_finite()),
            ci95: bootstrap::interval(drawn.iter().copied()),
            images: score.parts.as_ref().map(|parts| parts.images.len()),
            detail: score.detail,
        },
        // Of single classes the interval is enough.
        drawn: if score.detail { Vec::new() } else { drawn.into_iter().map(Some).collect() },
    };
    scores.iter().zip(drawn).map(record).collect()
}
