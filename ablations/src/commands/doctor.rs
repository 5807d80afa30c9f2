//! `dinolab doctor`: whether the GPU engine works here, part by part. The first thing to run on a machine with a GPU.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use dinolab_core::comm::{host, Comm, Launch, Ranks, Shards};
use dinolab_core::cuda::{self, Gpu};
use dinolab_core::data::Pipeline;
use dinolab_core::recipe::{Overrides, RawRecipe, Recipe};
use dinolab_core::resolved::Resolved;
use dinolab_core::rng::{Rng, Stream};
use dinolab_core::step::{Learner, Report};
use dinolab_core::testing::{tolerance, OpOracle};
use dinolab_core::text;
use dinolab_core::train::{self, Lead};
use dinolab_core::{DType, Device, Error, Result, Tensor};

use crate::{ranks, style};

/// The recipe whose step is held against the CPU: small, with every loss.
const STEP: &str = include_str!("../../../recipes/tiny.toml");
const SMALL: [&str; 6] = [
    "batch.size=4",
    "crops.local_count=2",
    "losses.gram.enabled=true",
    "teachers.gram.first_step=0",
    "optimizer.freeze_last_layer_steps=1",
    "batch.loader_threads=1",
];
/// Steps compared: by the last, the first update has changed the weights and the step was recorded and replayed.
const STEPS: u64 = 4;

/// What it is given.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Which GPU; 0 if not said
    #[arg(long, value_name = "N")]
    gpu: Option<usize>,
}

/// Runs the command: prints what was found and checked. Fails if anything did. Of several ranks it is what joins them, and their
/// GPUs, that is checked.
pub fn run(args: &Args) -> Result<ExitCode> {
    if Launch::detect()?.is_some() {
        let work = |comm: &Arc<dyn Comm>| ranks_of(comm);
        let lead = |lead: &Lead| {
            if args.gpu.is_some() {
                let problem = "--gpu is of one process, and a launcher gives each of several a GPU of its own";
                return Err(Error::user(problem, "leave it out; without a launcher a GPU is checked whole"));
            }
            lead.share(|| work(lead.comm())).map(|text| style::print(&text)).map(|()| 0)
        };
        return ranks::run(ranks::Reduce::default(), lead, |comm| train::join_in(comm, || work(comm).map(drop)));
    }
    let mut failures = 0;
    let libraries = cuda::libraries();
    let rows = libraries.iter().map(|l| match &l.version {
        Some(version) => vec![l.name.into(), version.clone()],
        None => vec![l.name.into(), format!("missing: {}", l.remedy)],
    });
    style::print(&style::table(rows));
    let missing = libraries.iter().filter(|l| l.version.is_none()).count();
    if missing > 0 {
        style::print(&format!(
            "\n{missing} of {} libraries are missing; without them runs are on the CPU (--device cpu)\n",
            libraries.len()
        ));
        return Ok(ExitCode::FAILURE);
    }
    let absent = cuda::missing_in_driver();
    if !absent.is_empty() {
        let problem = format!("the driver lacks functions that the engine calls: {}", absent.join(", "));
        return Err(Error::user(problem, "update NVIDIA's driver to 525 or newer, or run with --device cpu"));
    }
    let ordinal = args.gpu.unwrap_or(0);
    let gpu = Gpu::get(ordinal)?;
    let info = gpu.info();
    let (major, minor) = info.capability;
    style::print(&style::table([
        vec!["device".into(), format!("{} ({} of {})", info.name, ordinal, Gpu::count()?)],
        vec!["architecture".into(), format!("{} (compute capability {major}.{minor})", info.arch)],
        vec!["multiprocessors".into(), info.multiprocessors.to_string()],
        vec!["memory".into(), text::bytes(info.memory as f64)],
    ]));
    kernels(gpu)?;
    failures += operations(Device::Cuda(ordinal));
    for (precision, limit) in [("f32", 1e-3), ("bf16", 3e-2)] {
        failures += step(ordinal, precision, limit)?;
    }
    if failures > 0 {
        style::print(&format!("\n{failures} checks failed: report them with this output\n"));
        return Ok(ExitCode::FAILURE);
    }
    style::print("\nall is well\n");
    Ok(ExitCode::SUCCESS)
}

/// Who sits where, whether a sum over the ranks has the bits that one process gives it, and how fast bytes move.
fn ranks_of(comm: &Arc<dyn Comm>) -> Result<String> {
    const COUNT: usize = 1 << 22;
    const TIMES: u32 = 5;
    let (world, rank) = (comm.world(), comm.rank());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = rayon::current_num_threads();
    let crowded = if threads > cores { ": more threads than cores, see the launcher's --bind-to" } else { "" };
    let places = comm.gather_text(&format!("{}, {threads} threads on {cores} cores{crowded}", host()))?;
    // Numbers of many sizes, whose sum depends on its order.
    let part = |rank: usize| {
        let mut rng = Rng::new(rank as u64, Stream::Probe, 0, 0);
        let numbers: Vec<f32> = (0..COUNT).map(|_| (rng.uniform(-3.0, 3.0).exp() * rng.normal()) as f32).collect();
        Tensor::from_slice(&numbers, &[COUNT])
    };
    let expected = Shards::one().sum((0..world).map(part).collect::<Result<_>>()?)?;
    let own = part(rank)?;
    // The least time of a sum over ranks, in seconds, where the numbers are.
    let sum_of = |ranks: &Ranks, device: Device| -> Result<f64> {
        let (mut right, mut best) = (true, f64::INFINITY);
        for _ in 0..TIMES {
            let mut sum = own.to(device).to_owned();
            let begin = Instant::now();
            ranks.sum(&mut sum)?;
            let sum = sum.to(Device::Cpu);
            best = best.min(begin.elapsed().as_secs_f64());
            right &= sum.as_bytes() == expected.as_bytes();
        }
        match comm.gather_text(if right { "" } else { "wrong" })?.iter().all(String::is_empty) {
            true => Ok(best),
            false => {
                let problem = format!("{} gives a sum over {world} ranks other bits than one process", ranks.engine());
                Err(Error::user(problem, "report this with the versions of launcher and library"))
            }
        }
    };
    let told = |name: &str, seconds: f64| {
        // A rank has its share of all numbers from the others, and then the sums of theirs.
        let bytes = (COUNT * size_of::<f32>()) as f64;
        let gb = 2.0 * bytes * (world - 1) as f64 / world as f64 / seconds / 1e9;
        let (mib, ms) = (bytes / f64::from(1 << 20), seconds * 1e3);
        let sum = format!("{mib:.0} MiB in {ms:.1} ms, {gb:.2} GB/s received a rank; the bits of one process");
        vec![name.into(), sum]
    };
    let ranks = Ranks::new(comm.clone(), world)?;
    let mut rows: Vec<Vec<String>> =
        places.into_iter().enumerate().map(|(rank, place)| vec![format!("rank {rank}"), place]).collect();
    rows.push(vec!["joined by".into(), comm.engine()]);
    rows.push(told("sum over ranks", sum_of(&ranks, Device::Cpu)?));
    let gpu = Gpu::get(0).ok();
    let with_gpu = comm.gather_text(gpu.map_or("", |gpu| &gpu.info().name))?;
    let count = with_gpu.iter().filter(|name| !name.is_empty()).count();
    if let Some(gpu) = gpu.filter(|_| count == world) {
        // Processes on one GPU, or without NCCL, may still share a run on their processors.
        let joined = ranks.on(gpu);
        let why = joined.as_ref().map_or_else(Error::problem, |_| String::new());
        match (joined, comm.gather_text(&why)?.into_iter().find(|why| !why.is_empty())) {
            (Ok(ranks), None) => {
                rows.push(vec!["GPUs joined by".into(), ranks.engine()]);
                rows.push(told("sum over GPUs", sum_of(&ranks, Device::Cuda(gpu.ordinal()))?));
            }
            (_, why) => rows.push(vec!["GPUs".into(), format!("not checked: {}", why.unwrap_or_default())]),
        }
    } else {
        rows.push(vec!["GPUs".into(), format!("not checked: {count} of {world} processes see one")]);
    }
    Ok(style::table(rows) + "\nall is well\n")
}

/// Compiles all kernels, or finds them in the cache; then finds them again.
fn kernels(gpu: &'static Gpu) -> Result<()> {
    let sources = cuda::sources();
    let begin = Instant::now();
    let compiled = gpu.load_all(&sources)?;
    let first = begin.elapsed().as_secs_f64();
    let begin = Instant::now();
    cuda::compile(&sources, &gpu.info().arch)?;
    let again = begin.elapsed().as_secs_f64();
    let cached = compiled.iter().filter(|c| c.cached).count();
    let text = format!(
        "{} sources: {} compiled, {cached} from the cache, in {first:.2} s; again from the cache in {again:.2} s",
        compiled.len(),
        compiled.len() - cached
    );
    style::print(&style::table([vec!["kernels".into(), text]]));
    Ok(())
}

/// Every operation in f32 and bf16; gives the number that failed.
fn operations(device: Device) -> usize {
    style::print("\noperations against the CPU in f64: relative error of the value, of the gradients\n");
    let mut failures = 0;
    let mut rows = vec![["", "f32", "", "bf16", ""].map(String::from).to_vec()];
    for operation in OpOracle::all() {
        let mut row = vec![operation.name.to_string()];
        for dtype in [DType::F32, DType::BF16] {
            let limit = tolerance(dtype);
            let mut mark = |error: f64| {
                let good = error <= limit;
                failures += usize::from(!good);
                format!("{error:.1e}{}", if good { "" } else { " FAILED" })
            };
            match operation.on_device(device, dtype) {
                Ok(error) => row.extend([mark(error.value), mark(error.gradient)]),
                Err(error) => {
                    mark(f64::INFINITY);
                    row.extend([format!("FAILED: {error}"), String::new()]);
                }
            }
        }
        rows.push(row);
    }
    style::print(&style::table(rows));
    failures
}

/// A few whole steps on both, on the same crops; gives the number of quantities that differ by more than `limit`.
fn step(gpu: usize, precision: &str, limit: f64) -> Result<usize> {
    let resolve = |sets: &[String]| -> Result<Recipe> {
        let sets = SMALL.iter().map(ToString::to_string).chain(sets.iter().cloned()).collect();
        Ok(Resolved::of(RawRecipe::from_text(STEP)?.with(&Overrides { sets, env: false })?)?.recipe)
    };
    let on_cpu = resolve(&["device=cpu".into(), "precision=f32".into()])?;
    let on_gpu = resolve(&[format!("device=cuda:{gpu}"), format!("precision={precision}")])?;
    let (mut ours, mut exact) = (Learner::new(&on_gpu)?, Learner::new(&on_cpu)?);
    let (data, _) = train::datasets(&on_cpu)?;
    let pipeline = Pipeline::new(data, train::loader_spec(&on_cpu, &exact, 0))?;
    style::print(&format!("\n{STEPS} training steps in {precision} against the CPU in f32: relative error of\n"));
    let mut worst: Vec<(String, f64)> = Vec::new();
    for step in 0..STEPS {
        let batches = pipeline.step(step)?.batches;
        let (ours, exact) = (ours.step(step, &batches, false)?, exact.step(step, &batches, false)?);
        if let Some(what) = ours.non_finite {
            return Err(Error::user(format!("step {step} in {precision}: {what} is not finite"), "report it"));
        }
        for ((name, got), (_, want)) in quantities(&ours).zip(quantities(&exact)) {
            let error = (got - want).abs() / want.abs().max(1e-2);
            match worst.iter_mut().find(|(n, _)| *n == name) {
                Some((_, most)) => *most = most.max(error),
                None => worst.push((name, error)),
            }
        }
    }
    let failed = |error: f64| error.is_nan() || error > limit;
    let row = |(name, error): &(String, f64)| {
        vec![name.clone(), format!("{error:.1e}{}", if failed(*error) { " FAILED" } else { "" })]
    };
    style::print(&style::table(worst.iter().map(row)));
    match ours.eager_reason() {
        None => style::print("the step was recorded and replayed as one graph\n"),
        Some(reason) => style::print(&format!("the step is not recorded: {reason}\n")),
    }
    Ok(worst.iter().filter(|(_, error)| failed(*error)).count())
}

/// Losses and gradient norms by name.
fn quantities(report: &Report) -> impl Iterator<Item = (String, f64)> + '_ {
    let norms = report.grad_norms.iter().map(|(name, x)| (format!("gradient norm of {name}"), *x));
    report.losses.iter().map(|(name, x)| (name.clone(), *x)).chain(norms)
}
