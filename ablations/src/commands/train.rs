//! `dinolab train`: one run, with a progress bar.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use dinolab_core::recipe::Expected;
use dinolab_core::text::printable;
use dinolab_core::train::{self, Lead, Observer, Outcome, Progress, RunInfo, RunOptions, Start};
use dinolab_core::Result;
use indicatif::{ProgressBar, ProgressStyle};

use crate::cli::{RecipeArgs, RESUMABLE};
use crate::pulse::Pulse;
use crate::report::expectation;
use crate::{ranks, signals, style};

/// What it is given.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// The run's folder; by default one named like the recipe in runs/, or with --resume the run that is named
    #[arg(long)]
    out: Option<PathBuf>,
    /// Continue the run in the folder from its newest checkpoint; --set steps=N makes it longer
    #[arg(long)]
    resume: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<ExitCode> {
    let follow = |comm: &_| train::follow(comm, &|| args.recipe.resolve_quietly(), &signals::stop_flag());
    ranks::run(|lead| train_on(args, lead), follow)
}

fn train_on(args: &Args, lead: &Lead) -> Result<u8> {
    let resolved = args.recipe.resolve()?;
    let out = args.out.clone().unwrap_or_else(|| match args.recipe.path.is_dir() && args.resume {
        true => args.recipe.path.clone(),
        false => PathBuf::from("runs").join(&resolved.recipe.name),
    });
    let options = RunOptions {
        out: out.clone(),
        resume: args.resume,
        stop: signals::stop_flag(),
        revision: crate::REVISION.into(),
    };
    let expected = expectation::of(&args.recipe.path, &resolved);
    let mut bar =
        Bar::new(ProgressBar::new(resolved.recipe.steps), expected.clone().map(|expected| (expected, out.clone())));
    let outcome = train::lead(&resolved, &options, lead, &mut bar);
    bar.bar.finish();
    match outcome? {
        Outcome::Finished(result) => {
            for (name, value) in result.metrics.iter().filter(|(n, _)| n.starts_with("probe/") || *n == "loss/total") {
                style::say(&format!("{name:<40} {value:.4}"));
            }
            if let Some(why) = &result.stopped {
                style::say(&format!("ended before its {} steps: {why}", resolved.recipe.steps));
            }
            if let Some(expected) = &expected {
                let data = RunInfo::read(&out)?.and_then(|info| info.data);
                style::say(&format!(
                    "beside what the recipe says ({} runs on {}, 95% of further ones):",
                    expected.n, expected.on
                ));
                for line in expectation::compare(expected, &result.metrics, data.as_deref()) {
                    style::say(&format!("  {line}"));
                }
            }
            let (steps, seconds) = (result.steps, result.seconds);
            style::say(&format!("finished {steps} steps in {seconds:.0} s; everything is in {}", printable(&out)));
            Ok(0)
        }
        Outcome::Interrupted { step } => {
            style::say(&format!("stopped after {step} steps, saved; go on with the same command and --resume"));
            Ok(RESUMABLE)
        }
    }
}

/// The progress of one run: a bar on a terminal, elsewhere a line now and then.
struct Bar {
    bar: ProgressBar,
    pulse: Pulse,
    /// What is expected of the run, and its folder.
    expected: Option<(Expected, PathBuf)>,
}

impl Bar {
    fn new(bar: ProgressBar, expected: Option<(Expected, PathBuf)>) -> Self {
        let style = "{prefix}[{elapsed_precise}] {bar:28} {pos}/{len} eta {eta} {wide_msg}";
        bar.set_style(ProgressStyle::with_template(style).expect("the template is fixed").progress_chars("=> "));
        bar.enable_steady_tick(Duration::from_millis(500));
        Self { bar, pulse: Pulse::default(), expected }
    }
}

impl Observer for Bar {
    fn started(&mut self, start: &Start) {
        self.bar.suspend(|| style::line(&start.to_string()));
        if let Some(Err(error)) = self.expected.as_ref().map(|(expected, run)| expectation::write(expected, run)) {
            self.bar.suspend(|| style::warn(&error));
        }
        self.bar.set_position(start.step);
        self.bar.reset_eta();
    }

    fn step(&mut self, p: &Progress<'_>) {
        let losses = p.report.losses.iter().filter(|(name, _)| name.matches('/').count() == 1);
        let losses: Vec<String> =
            losses.map(|(name, v)| format!("{} {v:.3}", name.trim_start_matches("loss/"))).collect();
        let rates = format!("{:.0} img/s, data wait {:.0}%", p.images_per_s, 100.0 * p.data_wait);
        let text = format!("{} | {rates}", losses.join(" "));
        if self.bar.is_hidden() {
            if let Some(left) = self.pulse.due(p.step, p.total) {
                style::line(&format!("step {} of {}: {text}, {left}", p.step, p.total));
            }
        }
        self.bar.set_message(text);
        self.bar.set_position(p.step);
    }

    fn warning(&mut self, text: &str) {
        self.bar.suspend(|| style::warn(text));
    }

    fn probed(&mut self, step: u64, scores: &BTreeMap<String, f64>) {
        let scores: Vec<String> =
            scores.iter().map(|(name, v)| format!("{} {v:.3}", name.trim_start_matches("probe/"))).collect();
        self.bar.suspend(|| style::line(&format!("step {step}: {}", scores.join(", "))));
    }
}
