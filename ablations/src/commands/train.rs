//! `dinolab train`: one run, with a progress bar.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use dinolab_core::recipe::Recipe;
use dinolab_core::train::{self, Observer, Outcome, Progress, RunOptions};
use dinolab_core::Result;
use indicatif::{ProgressBar, ProgressStyle};

use crate::cli::{RecipeArgs, RESUMABLE};
use crate::{signals, style};

/// What it is given.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// The run's folder; by default one named like the recipe in runs/
    #[arg(long)]
    out: Option<PathBuf>,
    /// Continue the run in the folder from its newest checkpoint
    #[arg(long)]
    resume: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<ExitCode> {
    let resolved = args.recipe.resolve()?;
    let out = args.out.clone().unwrap_or_else(|| PathBuf::from("runs").join(&resolved.recipe.name));
    let options = RunOptions {
        out: out.clone(),
        resume: args.resume,
        stop: signals::stop_flag()?,
        revision: crate::REVISION.into(),
    };
    let mut bar = Bar::new(ProgressBar::new(resolved.recipe.steps));
    let outcome = train::run(&resolved, &options, &mut bar);
    bar.finish();
    match outcome? {
        Outcome::Finished(result) => {
            for (name, value) in result.metrics.iter().filter(|(n, _)| n.starts_with("probe/") || *n == "loss/total") {
                println!("{name:<40} {value:.4}");
            }
            println!("finished {} steps in {:.0} s; everything is in {}", result.steps, result.seconds, out.display());
            Ok(ExitCode::SUCCESS)
        }
        Outcome::Interrupted { step } => {
            println!("stopped after {step} steps, saved; go on with the same command and --resume");
            Ok(ExitCode::from(RESUMABLE))
        }
    }
}

/// The progress of one run.
pub(crate) struct Bar(ProgressBar);

impl Bar {
    /// On a bar of its own or of several.
    pub(crate) fn new(bar: ProgressBar) -> Self {
        let style = "{prefix}[{elapsed_precise}] {bar:28} {pos}/{len} eta {eta} {wide_msg}";
        bar.set_style(ProgressStyle::with_template(style).expect("the template is fixed").progress_chars("=> "));
        bar.enable_steady_tick(Duration::from_millis(500));
        Self(bar)
    }

    pub(crate) fn finish(&self) {
        self.0.finish();
    }
}

impl Observer for Bar {
    fn started(&mut self, _: &Recipe, step: u64) {
        if step > 0 {
            self.0.suspend(|| eprintln!("continuing after step {step}"));
        }
        self.0.set_position(step);
        self.0.reset_eta();
    }

    fn step(&mut self, p: &Progress<'_>) {
        let losses = p.report.losses.iter().filter(|(name, _)| name.matches('/').count() == 1);
        let losses: Vec<String> =
            losses.map(|(name, v)| format!("{} {v:.3}", name.trim_start_matches("loss/"))).collect();
        let rates = format!("{:.0} img/s, data wait {:.0}%", p.images_per_s, 100.0 * p.data_wait);
        self.0.set_message(format!("{} | {rates}", losses.join(" ")));
        self.0.set_position(p.step);
    }

    fn warning(&mut self, text: &str) {
        self.0.suspend(|| style::warn(text));
    }

    fn probed(&mut self, step: u64, scores: &BTreeMap<String, f64>) {
        let scores: Vec<String> =
            scores.iter().map(|(name, v)| format!("{} {v:.3}", name.trim_start_matches("probe/"))).collect();
        self.0.suspend(|| eprintln!("step {step}: {}", scores.join(", ")));
    }
}
