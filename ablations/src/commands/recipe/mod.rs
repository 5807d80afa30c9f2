//! `dinolab recipe show|check|diff|schema|explain`.

mod diff;
mod explain;
mod schema;
mod show;

use std::fmt::{Display, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use dinolab_core::checkpoint;
use dinolab_core::contract::DataContext;
use dinolab_core::recipe::{describe, Overrides, Recipe};
use dinolab_core::resolved::{cost, fit, summary_of_data, Resolved};
use dinolab_core::text::{self, printable};
use dinolab_core::Result;

use crate::cli::{SetArgs, BAD_INPUT};
use crate::stages::StagesFile;
use crate::style;
use crate::suite::SuiteFile;

/// The commands.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Print a recipe with every default filled in and where each value comes from.
    Show(show::Args),
    /// Check recipes without running anything.
    Check {
        /// Recipes, or folders of runs.
        #[arg(required = true)]
        paths: Vec<PathBuf>,
        /// Overrides.
        #[command(flatten)]
        set: SetArgs,
        /// Print parameters, operations an image and memory by component. Nothing is allocated.
        #[arg(long)]
        cost: bool,
        /// Number of processes that share a step: also print the memory of each process and the data that they
        /// exchange.
        #[arg(long, requires = "cost", value_name = "N")]
        ranks: Option<usize>,
        /// Compute throughput of one process, used to estimate the time of a step.
        #[arg(long, requires = "ranks", value_name = "TFLOP/S", value_parser = rate)]
        tflops: Option<f64>,
        /// Bandwidth at which a process receives data, for the same estimate.
        #[arg(long, requires = "ranks", value_name = "GB/S", value_parser = rate)]
        link: Option<f64>,
    },
    /// Print what differs between two recipes; of two runs also code, data and metrics.
    Diff {
        /// A recipe, or the folder of a run.
        a: PathBuf,
        /// Another.
        b: PathBuf,
    },
    /// Print the JSON schema of recipes (all plugins included), suites or stages, for editors.
    Schema {
        /// Of what.
        #[arg(value_enum, default_value = "recipe")]
        of: SchemaOf,
    },
    /// Show one key: its value, where the value comes from, and what reads it.
    Explain {
        /// A dotted key: `losses.gram.weight`.
        key: String,
        /// A recipe, or the folder of a run.
        path: PathBuf,
        /// Overrides.
        #[command(flatten)]
        set: SetArgs,
    },
}

/// Files that have a schema.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum SchemaOf {
    /// One run.
    Recipe,
    /// An ablation.
    Suite,
    /// A chain of stages.
    Stages,
}

/// Runs one of the commands.
pub fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Show(args) => show::run(&args)?,
        Command::Check { paths, set, cost, ranks, tflops, link } => {
            let cost = cost.then_some(Asked { ranks, tflops, link });
            let failed = paths.iter().filter(|path| !check(path, &set.overrides(), cost)).count();
            return Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::from(BAD_INPUT) });
        }
        Command::Diff { a, b } => diff::run(&a, &b)?,
        Command::Schema { of } => {
            let schema = match of {
                SchemaOf::Recipe => schema::for_editors(),
                SchemaOf::Suite => describe::schema_of::<SuiteFile>(),
                SchemaOf::Stages => describe::schema_of::<StagesFile>(),
            };
            let text = serde_json::to_string_pretty(&schema).expect("a schema is plain data");
            style::print(&(text + "\n"));
        }
        Command::Explain { key, path, set } => explain::run(&key, &path, &set.overrides())?,
    }
    Ok(ExitCode::SUCCESS)
}

/// A rate, by which something is divided.
fn rate(text: &str) -> std::result::Result<f64, String> {
    let rate: f64 = text.parse().map_err(|_| "it is a number".to_string())?;
    if rate.is_finite() && rate > 0.0 {
        Ok(rate)
    } else {
        Err("it is a number above 0".into())
    }
}

/// What is asked about the cost of a recipe.
#[derive(Clone, Copy)]
struct Asked {
    ranks: Option<usize>,
    tflops: Option<f64>,
    link: Option<f64>,
}

impl Asked {
    fn answer(self, recipe: &Recipe) -> Result<String> {
        let Some(ranks) = self.ranks else { return cost::cost(recipe).map(|cost| cost_table(&cost)) };
        let shared = cost::shared(recipe, ranks)?;
        let flops = shared.own.flops_per_image * shared.images as f64;
        let compute = self.tflops.map(|tflops| flops / (tflops * 1e12));
        let moving = self.link.map(|link| shared.received / (link * 1e9));
        let time = |what: String, seconds: Option<f64>| match seconds {
            Some(seconds) => format!("{what}, {:.3} ms", seconds * 1e3),
            None => what,
        };
        let row = |name: &str, value: String| vec![format!("  {name}"), value];
        let mut rows = vec![
            row("images", shared.images.to_string()),
            row("operations", time(format!("{}FLOP", style::si(flops)), compute)),
            row("received", time(text::bytes(shared.received), moving)),
        ];
        if let (Some(compute), Some(moving)) = (compute, moving) {
            let share = 100.0 * moving / (compute + moving);
            rows.push(row("moving's share", format!("{share:.1}%, where nothing overlaps")));
        }
        let title = style::out().bold(&format!("a step, each of {ranks} processes"));
        Ok(format!("{}{title}\n{}\n", cost_table(&shared.own), style::table(rows)))
    }
}

/// Prints what is wrong with one recipe, or that it is right.
fn check(path: &Path, overrides: &Overrides, cost: Option<Asked>) -> bool {
    let checked = Resolved::load(path, overrides).and_then(|resolved| {
        resolved.warnings.iter().for_each(style::warn);
        // The recipe of a run has every key there is.
        if !path.is_dir() {
            resolved.notes.iter().for_each(style::note);
        }
        length(path, &resolved)?;
        resolved.check_sources()?.iter().for_each(style::warn);
        let recipe = &resolved.recipe;
        let warn = |what: &dyn Display| style::warn(format!("{}: {what}", path.display()));
        match recipe.data.build(&mut DataContext { seed: recipe.seed }) {
            Ok(data) => {
                resolved.check_data(data.as_ref())?;
                summary_of_data(recipe, data.as_ref())
                    .notes
                    .iter()
                    .for_each(|note| style::note(format!("data: {note}")));
            }
            // Data and memory may be those of another machine than the one where recipes are written.
            Err(error) if !data_are_here(&resolved) => warn(&format!("data: {error}")),
            Err(error) => return Err(error),
        }
        match recipe.device() {
            Ok(device) => fit(recipe, device, cost.and_then(|asked| asked.ranks).unwrap_or(1))?
                .into_iter()
                .for_each(|fit| warn(&fit.into_error())),
            Err(error) => warn(&error),
        }
        let cost = cost.map(|asked| asked.answer(&resolved.recipe)).transpose()?;
        Ok((resolved, cost))
    });
    match checked {
        Ok((resolved, cost)) => {
            style::print(&format!("{}  {}  {}\n", style::out().green("ok"), printable(path), &resolved.hash[..16]));
            cost.iter().for_each(|text| style::print(text));
            true
        }
        Err(error) => {
            style::error(&error);
            false
        }
    }
}

/// Whether everything is there that the paths in `[data]` name; a pattern names nothing.
fn data_are_here(resolved: &Resolved) -> bool {
    let table = resolved.value.get("data").and_then(serde_json::Value::as_object).into_iter().flatten();
    let paths = table.filter(|(key, _)| resolved.is_path(&format!("data.{key}")));
    paths.filter_map(|(_, value)| value.as_str()).all(|path| Path::new(path).exists())
}

/// Says which numbers follow another curve when the run is made longer; of a run whose steps are set anew, by how much.
fn length(path: &Path, resolved: &Resolved) -> Result<()> {
    let before = if path.is_dir() { Some(Resolved::load(path, &Overrides::default())?.recipe.steps) } else { None };
    if let Some(before) = before.filter(|before| *before != resolved.recipe.steps) {
        let done = checkpoint::newest_step(path)?.unwrap_or(0);
        resolved.seams(before, done).iter().for_each(style::warn);
        return Ok(());
    }
    let keys = resolved.depends_on_length();
    if !keys.is_empty() {
        let text = "the length of the run shapes these: made longer, it is not the run that was as long from the start";
        style::note(format!("{}: {text}", keys.join(", ")));
    }
    Ok(())
}

fn cost_table(cost: &cost::RunCost) -> String {
    let style = style::out();
    let mut text = format!("\n{}\n", style.bold("parameters"));
    let row = |name: &str, value: String| vec![format!("  {name}"), value];
    let modules = cost.modules.iter().map(|(name, n)| row(name, style::si(*n as f64)));
    text += &style::table(modules.chain([row("together", style::si(cost.parameters() as f64))]));
    let flops = style::si(cost.flops_per_image);
    write!(text, "\n{} {flops}FLOP an image\n", style.bold("operations")).expect("writing to a string");
    write!(text, "\n{}\n", style.bold("memory")).expect("writing to a string");
    let memory = cost.memory.iter().map(|(name, bytes)| row(name, text::bytes(*bytes)));
    text += &style::table(memory.chain([row("together", text::bytes(cost.total_memory()))]));
    if cost.pinned > 0.0 {
        text += &format!("and {} of pinned host memory\n", text::bytes(cost.pinned));
    }
    text + "\n"
}
