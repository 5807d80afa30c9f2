//! `dinolab bench`: what a recipe's step costs.

use std::process::ExitCode;
use std::time::Instant;

use dinolab_core::data::Loader;
use dinolab_core::step::Learner;
use dinolab_core::{recipe, tensor, train, Error, Result};
use serde::Serialize;

use crate::cli::RecipeArgs;

/// What it is given.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// Steps that are timed
    #[arg(long, default_value_t = 20)]
    steps: u64,
    /// Steps before that, not timed
    #[arg(long, default_value_t = 3)]
    warmup: u64,
    /// One JSON object instead of a table
    #[arg(long)]
    json: bool,
}

/// What was measured. The step is timed on batches that are ready, so that data and compute are told apart.
#[derive(Debug, Serialize)]
struct Measured {
    recipe: String,
    device: &'static str,
    threads: usize,
    batch: usize,
    steps: u64,
    ms_median: f64,
    ms_min: f64,
    ms_max: f64,
    images_per_s: f64,
    /// Time to read and augment one step's images, all loader threads working and nothing else.
    data_ms: f64,
    /// Model operations an image, by the formula of the book's performance chapter.
    gflop_per_image: f64,
    gflop_per_s: f64,
    /// Most tensor memory that was ever live.
    peak_mib: f64,
    /// From the start of the command to the end of the first step.
    first_step_s: f64,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<ExitCode> {
    let begin = Instant::now();
    if args.steps == 0 {
        return Err(Error::user("--steps 0 measures nothing", "ask for at least one step"));
    }
    let resolved = args.recipe.resolve()?;
    let recipe = &resolved.recipe;
    let mut learner = Learner::new(recipe)?;
    let mut spec = train::loader_spec(recipe, &learner, 0);
    spec.total_steps = args.warmup + args.steps;
    let (dataset, _) = train::datasets(recipe)?;
    // A few batches, used in turn.
    let mut loader = Loader::new(dataset, spec)?;
    let mut ready = Vec::new();
    let reading = Instant::now();
    for step in loader.by_ref().take(4) {
        ready.push(step?.batches);
    }
    let data_ms = reading.elapsed().as_secs_f64() * 1e3 / ready.len() as f64;
    drop(loader);
    let (mut times, mut first_step_s) = (Vec::new(), None);
    for step in 0..args.warmup + args.steps {
        let start = Instant::now();
        let report = learner.step(step, &ready[step as usize % ready.len()], false)?;
        let ms = start.elapsed().as_secs_f64() * 1e3;
        first_step_s.get_or_insert_with(|| begin.elapsed().as_secs_f64());
        if let Some(what) = report.non_finite {
            let help = "a benchmark of broken numbers means nothing: check the recipe with a short `dinolab train`";
            return Err(Error::user(format!("{what} is not finite at step {step}"), help));
        }
        if step >= args.warmup {
            times.push(ms);
        }
    }
    times.sort_by(f64::total_cmp);
    let median = times[times.len() / 2];
    let cost = recipe::cost::cost(recipe)?;
    let images_per_s = recipe.batch.size as f64 * 1e3 / median;
    let measured = Measured {
        recipe: recipe.name.clone(),
        device: "cpu",
        threads: rayon::current_num_threads(),
        batch: recipe.batch.size,
        steps: args.steps,
        ms_median: median,
        ms_min: times[0],
        ms_max: times[times.len() - 1],
        images_per_s,
        data_ms,
        gflop_per_image: cost.flops_per_image / 1e9,
        gflop_per_s: cost.flops_per_image * images_per_s / 1e9,
        peak_mib: tensor::memory_stats().peak as f64 / f64::from(1 << 20),
        first_step_s: first_step_s.unwrap_or_default(),
    };
    if args.json {
        println!("{}", serde_json::to_string(&measured).expect("plain data"));
        return Ok(ExitCode::SUCCESS);
    }
    let m = &measured;
    println!("{} on {} with {} threads, batch {}", m.recipe, m.device, m.threads, m.batch);
    println!("  step        {:.1} ms median of {} ({:.1} to {:.1})", m.ms_median, m.steps, m.ms_min, m.ms_max);
    println!("  throughput  {:.1} images/s", m.images_per_s);
    println!("  data        {:.1} ms a step, when nothing else runs", m.data_ms);
    println!("  model       {:.3} GFLOP an image, {:.1} GFLOP/s", m.gflop_per_image, m.gflop_per_s);
    println!("  memory      {:.0} MiB of tensors at the peak", m.peak_mib);
    println!("  first step  {:.2} s after the start", m.first_step_s);
    Ok(ExitCode::SUCCESS)
}
