//! `dinolab bench`: what a recipe's step costs.

mod ceilings;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use dinolab_core::comm::{Comm, Ranks, Traffic};
use dinolab_core::cuda::Gpu;
use dinolab_core::data::{Batch, Loader};
use dinolab_core::profile::Profile;
use dinolab_core::recipe::Recipe;
use dinolab_core::resolved::{cost, Resolved};
use dinolab_core::step::{Learner, Peers, Report};
use dinolab_core::train::{self, Lead};
use dinolab_core::{tensor, Device, Error, Result};
use serde::Serialize;

use crate::cli::RecipeArgs;
use crate::{ranks, style};
use ceilings::Ceiling;

/// What it is given.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// Steps that are timed
    #[arg(long, default_value_t = 20)]
    steps: u32,
    /// Steps before that, not timed
    #[arg(long, default_value_t = 3)]
    warmup: u32,
    /// One JSON object instead of a table
    #[arg(long)]
    json: bool,
    /// Who adds the gradients of several processes
    #[arg(long, value_enum, default_value_t)]
    reduce: ranks::Reduce,
}

/// Steps whose parts are timed; the quickest is told of.
const PROFILED: u64 = 3;
/// Steps read to time the data pipeline.
const READ: usize = 4;

/// What was measured. The step is timed on batches that are ready, so that data and compute are told apart; on a GPU on
/// one batch that is there already.
#[derive(Debug, Serialize)]
struct Measured {
    recipe: String,
    device: String,
    precision: String,
    threads: usize,
    batch: usize,
    steps: u64,
    /// On a GPU by the device's clock.
    ms_median: f64,
    ms_min: f64,
    ms_max: f64,
    images_per_s: f64,
    /// Time to make one step's batches, all loader threads working and nothing else.
    data_ms: f64,
    /// Model operations an image, by the formula of the book's performance chapter.
    gflop_per_image: f64,
    tflop_per_s: f64,
    /// Share of that.
    mfu: Option<f64>,
    /// Most tensor memory that was ever live.
    peak_gib: f64,
    /// From the start of the command to the end of the first step.
    first_step_s: f64,
    /// Why the step was not replayed as one graph, if it was not.
    eager: Option<String>,
    /// What the machine could do at most, where that is known.
    ceiling: Option<Ceiling>,
    /// Where the time of a step goes.
    profile: Profile,
    /// What several processes moved, if there were several.
    ranks: Option<Shared>,
}

/// A step that is shared by processes.
#[derive(Debug, Serialize)]
struct Shared {
    world: usize,
    engine: String,
    /// Of a step, on rank 0: what came from other ranks, in how many calls, and the time in these, with waiting for ranks
    /// that are late.
    mib: f64,
    calls: f64,
    ms: f64,
}

impl Shared {
    fn of(ranks: &Ranks, before: Traffic, steps: u64) -> Option<Self> {
        let (now, steps) = (ranks.traffic(), steps as f64);
        (ranks.world() > 1).then(|| Self {
            world: ranks.world(),
            engine: ranks.engine(),
            mib: (now.bytes - before.bytes) as f64 / f64::from(1 << 20) / steps,
            calls: (now.calls - before.calls) as f64 / steps,
            ms: (now.time - before.time).as_secs_f64() * 1e3 / steps,
        })
    }
}

/// Runs the command. On several ranks all do the same, and the first tells.
pub fn run(args: &Args) -> Result<ExitCode> {
    let begin = Instant::now();
    let follow = |comm: &Arc<dyn Comm>| {
        train::join_in(comm, || measure(args, &args.recipe.resolve_quietly()?, comm, begin).map(drop))
    };
    let lead = |lead: &Lead| {
        if args.steps == 0 {
            return Err(Error::user("--steps 0 measures nothing", "ask for at least one step"));
        }
        let resolved = args.recipe.resolve()?;
        lead.check(&resolved.recipe)?;
        let measured = lead.share(|| measure(args, &resolved, lead.comm(), begin))?;
        style::print(&match args.json {
            true => serde_json::to_string(&measured).expect("plain data") + "\n",
            false => measured.table(),
        });
        Ok(0)
    };
    ranks::run(args.reduce, lead, follow)
}

fn measure(args: &Args, resolved: &Resolved, comm: &Arc<dyn Comm>, begin: Instant) -> Result<Measured> {
    let recipe = &resolved.recipe;
    let what = format!("{} for {} and {} steps", resolved.hash, args.warmup, args.steps);
    comm.hold_same("the recipe", &what)?;
    let mut learner = Learner::new_with(recipe, Peers::of(comm.as_ref()))?;
    learner.join(comm.clone())?;
    let gpu = match learner.device() {
        Device::Cpu => None,
        Device::Cuda(ordinal) => Some(Gpu::get(ordinal)?),
    };
    let ready = first_step(recipe, &learner)?;
    let (warmup, steps) = (u64::from(args.warmup), u64::from(args.steps));
    let (mut times, mut first_step_s, mut before) = (Vec::new(), None, Traffic::default());
    for step in 0..warmup + steps {
        if step == warmup {
            before = learner.ranks().traffic();
        }
        let (report, ms) = timed(gpu, || learner.step(step, &ready, false))?;
        first_step_s.get_or_insert_with(|| begin.elapsed().as_secs_f64());
        if let Some(what) = report.non_finite {
            let help = "a benchmark of broken numbers means nothing: check the recipe with a short `dinolab train`";
            return Err(Error::user(format!("{what} is not finite at step {step}"), help));
        }
        if step >= warmup {
            times.push(ms);
        }
    }
    let peak = match gpu {
        None => tensor::memory_stats().peak,
        Some(gpu) => gpu.memory().iter().map(|arena| arena.peak).sum(),
    };
    let shared = Shared::of(learner.ranks(), before, steps);
    let first = warmup + steps;
    let profiles: Result<Vec<Profile>> = (first..first + PROFILED).map(|step| learner.profile(step, &ready)).collect();
    let profile = profiles?.into_iter().min_by(|a, b| a.ms().total_cmp(&b.ms())).expect("there are some");
    times.sort_by(f64::total_cmp);
    let median = times[times.len() / 2];
    let cost = cost::cost(recipe)?;
    let images_per_s = recipe.batch.size as f64 * 1e3 / median;
    let tflop_per_s = cost.flops_per_image * images_per_s / 1e12;
    let ceiling = match gpu {
        Some(gpu) => ceilings::ceiling(&gpu.info().name),
        None => Some(ceilings::of_cpu()?),
    };
    Ok(Measured {
        recipe: recipe.name.clone(),
        device: gpu.map_or("cpu".into(), |gpu| gpu.info().name.clone()),
        precision: format!("{:?}", learner.features_dtype()).to_lowercase(),
        threads: rayon::current_num_threads(),
        batch: recipe.batch.size,
        steps,
        ms_median: median,
        ms_min: times[0],
        ms_max: times[times.len() - 1],
        images_per_s,
        data_ms: data_ms(recipe, &learner)?,
        gflop_per_image: cost.flops_per_image / 1e9,
        tflop_per_s,
        ceiling,
        // Of all processes, each of which has its own.
        mfu: ceiling.map(|c| tflop_per_s / (c.tflops * comm.world() as f64)),
        peak_gib: peak as f64 / f64::from(1 << 30),
        first_step_s: first_step_s.unwrap_or_default(),
        eager: learner.eager_reason().map(String::from),
        profile,
        ranks: shared,
    })
}

impl Measured {
    fn table(&self) -> String {
        let m = self;
        let mfu = m.mfu.map_or(String::new(), |mfu| match m.device.as_str() {
            "cpu" => format!(", {:.0}% of what one large product reaches", 100.0 * mfu),
            _ => format!(", {:.1}% MFU", 100.0 * mfu),
        });
        let mut text = format!(
            "{} on {} in {} with {} threads, batch {}\n\
             \x20 step        {:.2} ms median of {} ({:.2} to {:.2})\n\
             \x20 throughput  {:.1} images/s\n\
             \x20 data        {:.1} ms a step, when nothing else runs\n\
             \x20 model       {:.3} GFLOP an image, {:.3} TFLOP/s{mfu}\n\
             \x20 memory      {:.3} GiB of tensors at the peak\n\
             \x20 first step  {:.2} s after the start\n",
            m.recipe,
            m.device,
            m.precision,
            m.threads,
            m.batch,
            m.ms_median,
            m.steps,
            m.ms_min,
            m.ms_max,
            m.images_per_s,
            m.data_ms,
            m.gflop_per_image,
            m.tflop_per_s,
            m.peak_gib,
            m.first_step_s
        );
        if let Some(Shared { world, engine, mib, calls, ms }) = &m.ranks {
            text += &format!("  processes   {world}, joined by {engine}");
            // What GPUs move is on their streams, and in the step's time.
            if *mib > 0.1 {
                let share = 100.0 * ms / m.ms_median;
                text += &format!(": {mib:.1} MiB a step in {calls:.0} calls, {ms:.2} ms ({share:.0}%)");
            }
            text += "\n";
        }
        text += &match &m.eager {
            _ if m.device == "cpu" => "  operation by operation:\n".to_string(),
            None => "  replayed as one graph; launch by launch:\n".to_string(),
            Some(reason) => format!("  not replayed as a graph ({reason}); launch by launch:\n"),
        };
        text + &ceilings::table(&m.profile, m.ceiling)
    }
}

/// Milliseconds of a step: by the device's clock where there is one.
fn timed(gpu: Option<&'static Gpu>, step: impl FnOnce() -> Result<Report>) -> Result<(Report, f64)> {
    let Some(gpu) = gpu else {
        let start = Instant::now();
        let report = step()?;
        return Ok((report, start.elapsed().as_secs_f64() * 1e3));
    };
    let mut report = None;
    let ms = gpu.time(|| step().map(|r| report = Some(r)))?;
    Ok((report.expect("the step gave one"), ms))
}

fn loader(recipe: &Recipe, learner: &Learner, steps: usize) -> Result<Loader> {
    let mut spec = train::loader_spec(recipe, learner, 0);
    spec.total_steps = steps as u64;
    Loader::new(train::datasets(recipe)?.0, spec)
}

/// The first step's batches, in memory of their own.
fn first_step(recipe: &Recipe, learner: &Learner) -> Result<Vec<Batch>> {
    let first = loader(recipe, learner, 1)?.next().expect("the loader makes one step")?;
    Ok(first.batches.iter().map(|batch| batch.map(tensor::Tensor::to_owned)).collect())
}

/// Milliseconds a step of the data pipeline alone.
fn data_ms(recipe: &Recipe, learner: &Learner) -> Result<f64> {
    // What is prepared ahead takes memory that is there from then on: it is not timed.
    let ahead = recipe.batch.prefetch + 1;
    let mut steps = loader(recipe, learner, ahead + READ)?;
    let mut read = |count: usize| steps.by_ref().take(count).try_for_each(|step| step.map(drop));
    read(ahead)?;
    let start = Instant::now();
    read(READ)?;
    if let Device::Cuda(ordinal) = learner.device() {
        Gpu::get(ordinal)?.synchronize()?;
    }
    Ok(start.elapsed().as_secs_f64() * 1e3 / READ as f64)
}
