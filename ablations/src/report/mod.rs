//! The report of a suite: `summary.json` for programs, `summary.md` for pasting, `report.html` for reading.

mod compute;
pub mod expectation;
pub(crate) mod html;
mod look;
mod markdown;
mod pictures;
pub(crate) mod plots;
mod reproduction;
mod run;
mod stages;
mod summary;
mod warnings;

use std::path::{Path, PathBuf};

use dinolab_core::files::write_file;
use dinolab_core::{checkpoint, Device, Error, Result};

pub use compute::Compute;
pub use look::look;
pub use reproduction::Reproduction;
pub use run::{run_page, waiting_page};
pub use stages::{stages_page, StageRow};
pub use summary::{
    ArmSummary, Comparison, EventSummary, Provenance, RunSummary, SeedDifference, SeriesSummary, Summary, TrunkSummary,
    Verdict,
};

use crate::filmstrip::{filmstrip, to_tensorboard, Filmstrip};
use crate::pictures::PatchView;
pub(crate) use crate::style::duration;
use crate::suite::{lock_folder, Plan, RunRecord, Status, TRUNK};

/// What a trained run sees in the held-out images, given its folder: [`look()`].
pub type Look<'a> = &'a dyn Fn(&Path) -> Result<Vec<PatchView>>;

/// Writes `summary.json`, `summary.md` and `report.html` into the suite's folder, from the runs that are there.
///
/// Returns the summary and the path of the report. Pictures are drawn for the first seed that all arms finished.
///
/// # Errors
/// If a run's files cannot be read, or the outputs not be written. A run without pictures is a warning.
pub fn write(plan: &Plan, provenance: Provenance, look: Look<'_>) -> Result<(Summary, PathBuf)> {
    let mut gallery = Gallery::default();
    let report = plan.out.join("report.html");
    let (records, summary, page, _lock) = loop {
        let records = records(plan)?;
        let mut summary = Summary::new(plan, &records, provenance.clone());
        gallery.update(plan, &records, look, None);
        summary.warnings.extend(gallery.problems.iter().cloned());
        if let Some(film) = &gallery.film {
            let given = to_tensorboard(film, &gallery.runs);
            summary.warnings.extend(given.err().map(|error| format!("TensorBoard has no filmstrip: {error}")));
        }
        let page = html::page(plan, &records, &summary, &gallery, false)?;
        let lock = lock_folder(plan)?;
        // Pictures take a while: another process may have ended a run and written a report of it, which is not to be lost.
        if endings(plan)? == records.iter().map(|record| record.status.clone()).collect::<Vec<_>>() {
            break (records, summary, page, lock);
        }
    };
    let json = serde_json::to_string_pretty(&summary).expect("a summary is plain data");
    let pictures = markdown::pictures(plan, &records, &summary);
    let folder = plan.out.join(markdown::PICTURES);
    std::fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
    for (name, svg) in &pictures {
        write_file(&plan.out.join(name), svg.as_bytes())?;
    }
    for (path, text) in [
        (plan.out.join("summary.json"), json + "\n"),
        (plan.out.join("summary.md"), markdown::page(&summary, &pictures)),
        (report.clone(), page),
    ] {
        write_file(&path, text.as_bytes())?;
    }
    Ok((summary, report))
}

/// The report as it would be now, as a page that asks for its newer self. `gallery` keeps the pictures from one to the next;
/// they are made on the CPU, because a GPU is the training's.
///
/// # Errors
/// If a run's files cannot be read.
pub fn live_page(plan: &Plan, provenance: Provenance, gallery: &mut Gallery) -> Result<String> {
    let records = records(plan)?;
    let mut summary = Summary::new(plan, &records, provenance);
    let device = Some(Device::Cpu);
    gallery.update(plan, &records, &|run| look(run, device), device);
    summary.warnings.extend(gallery.problems.iter().cloned());
    html::page(plan, &records, &summary, gallery, true)
}

/// How far every run is.
fn endings(plan: &Plan) -> Result<Vec<Status>> {
    plan.all_runs().map(|run| Status::of(&plan.out.join(&run.dir))).collect()
}

fn records(plan: &Plan) -> Result<Vec<RunRecord>> {
    plan.all_runs().map(|run| RunRecord::read(run, &plan.out)).collect()
}

/// Pictures of one seed.
struct Pictures {
    seed: u64,
    rows: Vec<pictures::PictureRow>,
}

/// The pictures of a report.
#[derive(Default)]
pub struct Gallery {
    /// What arms see at the end.
    pictures: Option<Pictures>,
    /// What they saw over time.
    film: Option<Filmstrip>,
    /// The runs that the filmstrip is of, by name and folder.
    runs: Vec<(String, PathBuf)>,
    /// The checkpoints that all this was made of.
    made_of: Vec<PathBuf>,
    /// Why there is none.
    problems: Vec<String>,
}

impl Gallery {
    /// Draws the first seed that all arms finished, unless its checkpoints are those that were drawn before.
    fn update(&mut self, plan: &Plan, records: &[RunRecord], look: Look<'_>, device: Option<Device>) {
        let Some(seed) = complete(plan, records) else { return };
        let mine = records.iter().filter(|r| r.seed == seed);
        let runs: Vec<(String, PathBuf)> = mine.map(|r| (r.arm.clone(), plan.out.join(&r.dir))).collect();
        let made_of: Vec<PathBuf> =
            runs.iter().flat_map(|(_, run)| checkpoint::list(run).unwrap_or_default()).collect();
        if self.made_of == made_of && !made_of.is_empty() {
            return;
        }
        *self = Self { runs, made_of, ..Self::default() };
        match draw(plan, records, seed, look) {
            Ok(pictures) => self.pictures = Some(pictures),
            Err(error) => self.problems.push(format!("there are no pictures: {error}")),
        }
        match filmstrip(&self.runs, FILM_STEPS, device) {
            Ok(film) => self.film = film,
            Err(error) => self.problems.push(format!("there are no pictures over time: {error}")),
        }
    }
}

/// Steps that have to be kept for pictures over time.
const FILM_STEPS: usize = 3;

fn draw(plan: &Plan, records: &[RunRecord], seed: u64, look: Look<'_>) -> Result<Pictures> {
    let views: Vec<Vec<PatchView>> =
        of_arms(records, seed).map(|r| look(&plan.out.join(&r.dir))).collect::<Result<_>>()?;
    let shape = |v: &Vec<PatchView>| v.iter().map(|p| (p.height, p.width)).collect::<Vec<_>>();
    if views.iter().any(|v| shape(v) != shape(&views[0])) {
        return Err(Error::user("arms have different patch grids", "compare their pictures by hand"));
    }
    if views.iter().any(|v| v.iter().zip(&views[0]).any(|(a, b)| a.image != b.image)) {
        return Err(Error::user("arms hold out different images", "compare their pictures by hand"));
    }
    Ok(Pictures { seed, rows: pictures::rows(&views)? })
}

/// The first seed that all arms finished.
fn complete(plan: &Plan, records: &[RunRecord]) -> Option<u64> {
    let finished = |seed: u64| of_arms(records, seed).count();
    plan.suite.seeds.iter().copied().find(|&seed| finished(seed) == plan.suite.arms.len())
}

/// The finished runs of a seed, but for its trunk.
fn of_arms(records: &[RunRecord], seed: u64) -> impl Iterator<Item = &RunRecord> {
    records.iter().filter(move |r| r.seed == seed && r.arm != TRUNK && r.result().is_some())
}

/// A number with four significant digits, without an exponent where it is readable without one.
pub(crate) fn number(value: f64) -> String {
    if value == 0.0 || !value.is_finite() {
        return if value == 0.0 { "0".into() } else { format!("{value}") };
    }
    let magnitude = value.abs().log10().floor() as i32;
    let text = match magnitude {
        -4..=4 => format!("{value:.*}", (3 - magnitude).max(0) as usize),
        _ => return format!("{value:.2e}"),
    };
    if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.').to_string()
    } else {
        text
    }
}

/// How to print numbers that come with an interval: to the digits that the interval's half width, itself rounded to two
/// significant digits, gives a meaning to.
pub(crate) fn rounded_to(ci95: Option<[f64; 2]>) -> impl Fn(f64) -> String {
    let half = ci95.map_or(0.0, |[low, high]| (high - low) / 2.0);
    let digits = if half > 0.0 { 1 - half.log10().floor() as i32 } else { i32::MAX };
    move |value: f64| {
        match digits {
            0..=7 => format!("{value:.*}", digits as usize),
            i32::MIN..0 => format!("{value:.0}"),
            _ => number(value),
        }
        .replacen('-', "−", 1)
    }
}

/// A p-value as papers print it.
pub(crate) fn p_text(p: f64) -> String {
    if p < 0.001 {
        "p < 0.001".into()
    } else {
        format!("p = {p:.3}")
    }
}
