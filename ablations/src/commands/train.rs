//! `dinolab train`: one run, with a progress bar.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use dinolab_core::recipe::Expected;
use dinolab_core::resolved::Resolved;
use dinolab_core::text::printable;
use dinolab_core::train::{self, Lead, Observer, Outcome, Progress, RunInfo, RunOptions, Start, StudentRun};
use dinolab_core::{checkpoint, Error, Result};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::cli::{self, RecipeArgs, RESUMABLE};
use crate::pulse::Pulse;
use crate::report::expectation;
use crate::{ranks, signals, style};

/// What it is given.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// The run's folder; by default one named like the recipe in runs/, or with --resume the run that is named
    #[arg(long)]
    out: Option<PathBuf>,
    /// Also train this student of the same frozen teacher; data are read and the teacher is run once for all students; can be given
    /// several times
    #[arg(long, value_name = "RECIPE", conflicts_with = "out")]
    with: Vec<PathBuf>,
    /// Steps of the run, in place of the recipe's
    #[arg(long)]
    steps: Option<u32>,
    /// Continue the run in the folder from its newest checkpoint; --steps makes it longer
    #[arg(long)]
    resume: bool,
    /// Who adds the gradients of several processes
    #[arg(long, value_enum, default_value_t)]
    reduce: ranks::Reduce,
}

impl Args {
    /// Whether several students train side by side.
    pub fn has_students(&self) -> bool {
        !self.with.is_empty()
    }
}

/// Runs the command.
pub fn run(args: &Args) -> Result<ExitCode> {
    let args = &Args { recipe: args.recipe.clone().with_steps(args.steps), ..args.clone() };
    let follow = |comm: &_| train::follow(comm, &|| args.recipe.resolve_quietly(), &signals::stop_flag());
    ranks::run(args.reduce, |lead| if args.has_students() { students(args, lead) } else { one(args, lead) }, follow)
}

fn one(args: &Args, lead: &Lead) -> Result<u8> {
    let run = Run::of(args, &args.recipe.path, args.recipe.resolve()?);
    let mut bar = run.bar(ProgressBar::new(run.resolved.recipe.steps));
    let outcome = train::lead(&run.resolved, &run.options, lead, &mut bar);
    bar.bar.finish();
    run.ended(&outcome?)
}

/// Students of one frozen teacher, side by side.
fn students(args: &Args, lead: &Lead) -> Result<u8> {
    if lead.comm().world() > 1 {
        let help = "start it without a launcher, or train each student by itself on all processes";
        return Err(Error::user("--with: several processes cannot train several students together", help));
    }
    let paths = [&args.recipe.path].into_iter().chain(&args.with);
    let runs: Vec<Run> = paths
        .map(|path| {
            let resolved = args.recipe.resolve_other(path)?;
            resolved.warnings.iter().for_each(style::warn);
            Ok(Run::of(args, path, resolved))
        })
        .collect::<Result<_>>()?;
    for (i, run) in runs.iter().enumerate() {
        if let Some(other) = runs[..i].iter().find(|other| other.options.out == run.options.out) {
            let problem = format!("two students would be the run {}", printable(&other.options.out));
            return Err(Error::user(problem, "give each recipe a `name` of its own"));
        }
    }
    let bars = MultiProgress::new();
    let width = runs.iter().map(|run| run.resolved.recipe.name.len()).max().unwrap_or(0);
    let mut watchers: Vec<Bar> = runs
        .iter()
        .map(|run| {
            let name = format!("{:<width$} ", run.resolved.recipe.name);
            run.bar(bars.add(ProgressBar::new(run.resolved.recipe.steps)).with_prefix(name))
        })
        .collect();
    let of_runs = runs.iter().zip(&mut watchers);
    let outcomes = train::run_students(
        of_runs.map(|(Run { resolved, options, .. }, bar)| StudentRun { resolved, options, observer: bar }).collect(),
    );
    watchers.iter().for_each(|watcher| watcher.bar.finish());
    let mut code = 0;
    for (run, outcome) in runs.iter().zip(outcomes?) {
        style::say(&format!("{}:", run.resolved.recipe.name));
        let ended = outcome.and_then(|outcome| run.ended(&outcome)).unwrap_or_else(|error| {
            style::error(&error);
            cli::exit_code(&error)
        });
        // A run that failed matters more than one that can go on.
        code = match (code, ended) {
            (before, 0) => before,
            (0 | RESUMABLE, ended) => ended,
            (before, _) => before,
        };
    }
    Ok(code)
}

/// A run of this command.
struct Run {
    resolved: Resolved,
    options: RunOptions,
    /// What its recipe says that it gives.
    expected: Option<Expected>,
}

impl Run {
    fn of(args: &Args, path: &Path, resolved: Resolved) -> Self {
        let named = || match path.is_dir() && args.resume {
            true => path.to_path_buf(),
            false => PathBuf::from("runs").join(&resolved.recipe.name),
        };
        let options = RunOptions {
            out: args.out.clone().unwrap_or_else(named),
            resume: args.resume,
            stop: signals::stop_flag(),
            revision: crate::build().into(),
            save_within: None,
        };
        if options.resume && checkpoint::newest_step(&options.out).is_ok_and(|step| step.is_none()) {
            style::note(format!(
                "{} has no checkpoint to resume from: the run begins at step 0",
                printable(&options.out)
            ));
        }
        let expected = expectation::of(path, &resolved);
        Self { resolved, options, expected }
    }

    fn bar(&self, bar: ProgressBar) -> Bar {
        Bar::new(bar, self.expected.clone().map(|expected| (expected, self.options.out.clone())))
    }

    /// Says how it ended; gives the exit code.
    fn ended(&self, outcome: &Outcome) -> Result<u8> {
        let Self { resolved, options: RunOptions { out, .. }, expected } = self;
        let result = match outcome {
            Outcome::Finished(result) => result,
            Outcome::Interrupted { step } => {
                style::say(&format!("stopped after {step} steps, saved; go on with the same command and --resume"));
                return Ok(RESUMABLE);
            }
        };
        for (name, value) in result.metrics.iter().filter(|(n, _)| n.starts_with("probe/") || *n == "loss/total") {
            style::say(&format!("{name:<40} {value:.4}"));
        }
        if let Some(why) = &result.stopped {
            style::say(&format!("ended before its {} steps: {why}", resolved.recipe.steps));
        }
        if let Some(expected) = expected {
            let data = RunInfo::read(out)?.and_then(|info| info.data);
            let Expected { n, on, .. } = expected;
            style::say(&format!("beside what the recipe says ({n} runs on {on}, 95% of further ones):"));
            for line in expectation::compare(expected, &result.metrics, data.as_deref()) {
                style::say(&format!("  {line}"));
            }
        }
        let (steps, seconds) = (result.steps, result.seconds);
        if result.skipped > 0 {
            style::say(&format!("{} of the updates were skipped: messages.jsonl says why", result.skipped));
        }
        style::say(&format!("finished {steps} steps in {seconds:.0} s; everything is in {}", printable(out)));
        Ok(0)
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

    /// A text above the bars, of whose run it is before every line.
    fn line(&self, text: &str) {
        let of = self.bar.prefix();
        self.bar.suspend(|| text.lines().for_each(|line| style::line(&format!("{of}{line}"))));
    }
}

impl Observer for Bar {
    fn started(&mut self, start: &Start) {
        self.line(&start.to_string());
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
                self.line(&format!("step {} of {}: {text}, {left}", p.step, p.total));
            }
        }
        self.bar.set_message(text);
        self.bar.set_position(p.step);
    }

    fn note(&mut self, text: &str) {
        let of = self.bar.prefix();
        self.bar.suspend(|| style::note(format!("{of}{text}")));
    }

    fn warning(&mut self, text: &str) {
        let of = self.bar.prefix();
        self.bar.suspend(|| style::warn(format!("{of}{text}")));
    }

    fn probed(&mut self, step: u64, scores: &BTreeMap<String, f64>) {
        let scores: Vec<String> =
            scores.iter().map(|(name, v)| format!("{} {v:.3}", name.trim_start_matches("probe/"))).collect();
        self.line(&format!("step {step}: {}", scores.join(", ")));
    }
}
