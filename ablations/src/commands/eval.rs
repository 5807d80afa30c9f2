//! `dinolab eval`: trained weights, scored.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::Ordering;

use dinolab_core::contract::ImageSize;
use dinolab_core::files::write_file;
use dinolab_core::text::printable;
use dinolab_core::train::Trained;
use dinolab_core::{Error, Result};
use indicatif::{ProgressBar, ProgressStyle};

use crate::cli::{SetArgs, RESUMABLE};
use crate::evaluate::{measure, page, Evaluation, Plan, Seen, SizeRecord};
use crate::pulse::Pulse;
use crate::{signals, style};

/// What it is given.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The weights: runs, checkpoints (RUN@400), or folders that `dinolab import` or `dinolab export` wrote
    #[arg(required = true)]
    weights: Vec<PathBuf>,
    /// What they are scored on: a recipe, a run, or a TOML file with the table [data] and perhaps [probes]
    #[arg(long, value_name = "RECIPE_OR_TABLE")]
    data: PathBuf,
    /// The probes, by name; default: the probes of the recipe, or every probe that the data allows (labels, masks,
    /// depth)
    #[arg(long, value_delimiter = ',')]
    probes: Vec<String>,
    /// Image sizes, such as 64,96x64 (width x height); default: the sizes in the probes' tables, or the size of the crops that
    /// the weights were trained on
    #[arg(long, value_delimiter = ',')]
    sizes: Vec<ImageSize>,
    /// The folder that everything is written to
    #[arg(long, default_value = "eval")]
    out: PathBuf,
    /// Save the features of all images in the folder `features`, so that further probes do not need to process the
    /// images again
    #[arg(long)]
    keep_features: bool,
    /// Print eval.json in place of the table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    set: SetArgs,
}

/// Makes the folder, or opens one in which this command began before.
fn open(out: &Path) -> Result<()> {
    std::fs::create_dir_all(out).map_err(Error::io("create", out))?;
    let begun = ["scores", "features"].iter().any(|name| out.join(name).is_dir());
    if !begun && std::fs::read_dir(out).map_err(Error::io("list", out))?.next().is_some() {
        let problem = "this folder is not empty, and no scores were written to it before";
        return Err(Error::content(out, problem, "name another with --out, or remove it"));
    }
    Ok(())
}

/// Runs the command.
pub fn run(args: &Args) -> Result<ExitCode> {
    let stop = signals::stop_flag();
    let plan = Plan::new(&args.data, &args.set.overrides(), &args.probes, &args.weights, &args.sizes)?;
    let summary = plan.train.summary();
    style::line(&summary.content);
    summary.notes.iter().for_each(style::note);
    open(&args.out)?;
    let file = |job, size| args.out.join("scores").join(plan.key(job, size)).with_extension("json");
    let all: usize = plan.jobs.iter().map(|job| job.sizes.len()).sum();
    let probes = plan.jobs.iter().flat_map(|job| job.sizes.iter().map(|&size| plan.taken(job, size).count()));
    let bar = ProgressBar::new(probes.sum::<usize>() as u64);
    let template = "{bar:28} {pos}/{len} probes, eta {eta} {wide_msg}";
    bar.set_style(ProgressStyle::with_template(template).expect("the template is fixed").progress_chars("=> "));
    let mut pulse = Pulse::default();
    let (mut records, mut before) = (Vec::new(), 0usize);
    for job in &plan.jobs {
        let mut trained = None;
        let mut of_sizes = Vec::new();
        for &size in &job.sizes {
            let path = file(job, size);
            if let Some(record) = SizeRecord::read(&path) {
                before += 1;
                bar.inc(plan.taken(job, size).count() as u64);
                of_sizes.push(record);
                continue;
            }
            if trained.is_none() {
                trained = Some(Trained::open(&job.path)?);
            }
            let trained = trained.as_ref().expect("it was just opened");
            let seen = Seen::open(trained, &args.out.join("features"), size)?;
            let mut begun = |probe: &str| {
                let text = format!("{} at {size}: {probe}", job.name());
                if bar.is_hidden() {
                    if let Some(left) = pulse.due(bar.position(), bar.length().unwrap_or(0)) {
                        style::line(&format!("{text}, {left}"));
                    }
                }
                bar.set_message(text);
                let go_on = !stop.load(Ordering::Relaxed);
                bar.inc(u64::from(go_on));
                go_on
            };
            let Some(record) = measure(&plan, (job, trained, &seen), size, &mut begun) else {
                bar.finish_and_clear();
                style::say("stopped: what was scored is kept; go on with the same command");
                return Ok(ExitCode::from(RESUMABLE));
            };
            record.warnings.iter().for_each(|text| bar.suspend(|| style::warn(format!("{}: {text}", job.name()))));
            // What failed is tried again by the next command.
            if !record.failed {
                record.write(&path)?;
                if !args.keep_features {
                    seen.forget()?;
                }
            }
            of_sizes.push(record);
        }
        records.push(of_sizes);
    }
    bar.finish_and_clear();
    if before > 0 {
        style::line(&format!("{before} of {all} scorings of weights at a size were done before"));
    }
    let evaluation = Evaluation::new(&plan, &records);
    let text = serde_json::to_string_pretty(&evaluation).expect("plain data") + "\n";
    write_file(&args.out.join("eval.json"), text.as_bytes())?;
    write_file(&args.out.join("eval.html"), page(&evaluation, &records).as_bytes())?;
    style::print(&if args.json { text } else { table(&evaluation) });
    style::line(&format!("everything is in {}", printable(&args.out)));
    let failed = records.iter().flatten().any(|record| record.failed);
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Scores by rows, weights by columns.
fn table(evaluation: &Evaluation) -> String {
    let weights = &evaluation.weights;
    let head = ["score", "pixels"].map(String::from).into_iter().chain(weights.iter().map(|w| w.name.clone()));
    let mut rows = vec![head.collect::<Vec<_>>()];
    for name in evaluation.scores(false) {
        for size in evaluation.sizes() {
            let cells = weights.iter().map(|w| w.at(&name, size).map_or("-".into(), |line| line.text()));
            rows.push([format!("{}/{}", name.0, name.1), size.to_string()].into_iter().chain(cells).collect());
        }
    }
    let mut text = style::table(rows);
    if weights.len() > 1 {
        text += &format!("* differs from {}: the 95% interval of the difference leaves out 0\n", weights[0].name);
    }
    text
}
