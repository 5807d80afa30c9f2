//! A suite over several processes: side by side on one machine, or as jobs of a scheduler.
//!
//! The unit is one run of the plan, done by a process of its own (`dinolab ablate SUITE --run arms/on/seed-0`). What is
//! done and what is left is read from the run folders and nowhere else, so that any of these ways goes on with what
//! another began.

mod board;
mod job;
mod kubernetes;
mod parallel;
mod slot;
mod slurm;
mod status;

pub use job::Jobs;
pub use parallel::execute;
pub use slot::{Slot, PROGRAM};
pub use slurm::Submission;
pub use status::table;

use std::path::{Path, PathBuf};

use dinolab_core::{Device, Error, Result};

use crate::style::{self, shell};
use crate::suite::{claim, untried, Plan, PlannedRun, TRUNK};

/// What the command line says of it.
#[derive(Debug, Default, clap::Args)]
#[command(next_help_heading = "Several processes and machines")]
pub struct Args {
    /// Do so many runs at a time: as processes on this machine, each on a GPU of its own or on its share of the CPU's cores,
    /// or as jobs (--on)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub parallel: Option<u16>,
    /// Give the runs to a scheduler; with --dry-run show what it would be given
    #[arg(long, value_name = "SCHEDULER")]
    pub on: Option<Scheduler>,
    /// An option of sbatch, such as --slurm time=24:00:00 --slurm gpus=1 --slurm exclusive
    #[arg(long, value_name = "KEY=VALUE", requires = "on", value_parser = option_of_sbatch)]
    pub slurm: Vec<String>,
    /// Kubernetes: the image of the container
    #[arg(long, requires = "on", required_if_eq("on", "kubernetes"))]
    pub image: Option<String>,
    /// Kubernetes: the claim of the volume on which the working directory lies; default: dinolab
    #[arg(long, requires = "on")]
    pub claim: Option<String>,
    /// Kubernetes: the queue of Kueue
    #[arg(long, requires = "on")]
    pub queue: Option<String>,
    /// Show how far every run is, and what Slurm says of it
    #[arg(long, conflicts_with_all = ["on", "dry_run", "arms", "seeds"])]
    pub status: bool,
    /// Take the suite's jobs out of Slurm's queue; those that run save and stop
    #[arg(long, conflicts_with_all = ["on", "status", "dry_run", "arms", "seeds"])]
    pub cancel: bool,
    /// Do this run and no other, without a report: what a process of --parallel or a job does
    #[arg(long, value_name = "FOLDER", conflicts_with_all = ["arms", "seeds", "dry_run", "parallel", "on"])]
    pub run: Option<PathBuf>,
    /// Try the arms and run nothing
    #[arg(long, conflicts_with_all = ["run", "dry_run", "parallel", "on"])]
    pub trial: bool,
    /// Write the report of what is done and run nothing
    #[arg(long, conflicts_with_all = ["run", "trial", "dry_run", "parallel", "on", "arms", "seeds"])]
    pub report: bool,
}

fn option_of_sbatch(text: &str) -> Result<String, String> {
    let name = text.split('=').next().unwrap_or_default();
    let fits = name.starts_with(|c: char| c.is_ascii_alphabetic())
        && !name.contains(char::is_whitespace)
        && !text.contains(char::is_control);
    fits.then(|| text.into())
        .ok_or_else(|| "expected an option of sbatch without its dashes, such as time=24:00:00".into())
}

/// Who runs what it is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Scheduler {
    /// Job arrays of Slurm.
    Slurm,
    /// One command a line on stdout, for HyperQueue, GNU parallel, PBS and others.
    List,
    /// The manifest of an Indexed Job on stdout, for kubectl create -f -
    Kubernetes,
}

/// How a suite is handed over.
#[derive(Debug)]
pub struct Handover<'a> {
    /// What the command line says.
    pub args: &'a Args,
    /// Show it, and hand nothing over.
    pub dry: bool,
    /// Failed runs too.
    pub retry_failed: bool,
    /// End at the first failure, which no scheduler does.
    pub fail_fast: bool,
    /// Steps of trials.
    pub smoke_steps: u64,
    /// What runs compute on.
    pub device: Device,
}

impl Handover<'_> {
    /// Fails if an option is given that this scheduler takes no notice of.
    fn check_options(&self, scheduler: Scheduler) -> Result<()> {
        let (args, kubernetes) = (self.args, scheduler == Scheduler::Kubernetes);
        let idle = [
            ("--slurm", "of Slurm's jobs", scheduler != Scheduler::Slurm && !args.slurm.is_empty()),
            ("--image", "of Kubernetes' jobs", !kubernetes && args.image.is_some()),
            ("--claim", "of Kubernetes' jobs", !kubernetes && args.claim.is_some()),
            ("--queue", "of Kubernetes' jobs", !kubernetes && args.queue.is_some()),
            (
                "--parallel",
                "not of a list: what runs it says how many at a time",
                scheduler == Scheduler::List && args.parallel.is_some(),
            ),
            ("--fail-fast", "not of jobs: a job knows nothing of others", self.fail_fast),
        ];
        match idle.into_iter().find(|(.., given)| *given) {
            Some((option, of, _)) => {
                Err(Error::user(format!("{option} is {of}"), "leave it out, or choose another --on"))
            }
            None => Ok(()),
        }
    }

    /// Gives these runs of `plan`, as far as they are left, to a scheduler.
    ///
    /// # Errors
    /// If the folder belongs to something else or cannot be written, or the scheduler refuses.
    pub fn give(&self, plan: &Plan, runs: &[&PlannedRun], scheduler: Scheduler) -> Result<()> {
        self.check_options(scheduler)?;
        let mut left = job::left(plan, runs, self.retry_failed)?;
        if scheduler == Scheduler::Slurm && !slurm::submitted(&plan.out)?.is_empty() {
            let queued = status::in_queue(&plan.out)?;
            let before = left.len();
            left.retain(|(run, _)| !queued.contains(&run.dir));
            if before > left.len() {
                style::say(&format!("{} runs are in the queue already", before - left.len()));
            }
        }
        if left.is_empty() {
            style::say("nothing to hand over: every run is done, failed (--retry-failed) or in the queue; --report writes the report");
            return Ok(());
        }
        Jobs::new(plan, self.smoke_steps, PROGRAM.into())?.check_lines()?;
        if !self.dry {
            claim(plan)?;
        }
        // A list or a manifest knows no order: trunks come first, and arms when these are done.
        let stages = scheduler != Scheduler::Slurm && left[0].0.arm == TRUNK;
        if stages {
            left.retain(|(run, _)| run.arm == TRUNK);
        }
        let program = match (scheduler, self.dry) {
            (Scheduler::Kubernetes, _) => PathBuf::from("dinolab"),
            (_, true) => plan.out.join("jobs").join(crate::given::program()),
            (_, false) => job::freeze(&plan.out)?,
        };
        let jobs = Jobs::new(plan, self.smoke_steps, program)?;
        let parallel = self.args.parallel.map(usize::from);
        match scheduler {
            Scheduler::Slurm => {
                let options = slurm::Options { sbatch: self.args.slurm.clone(), parallel };
                let folder = slurm::new_folder(jobs.out());
                let untried = untried(plan, &left.iter().map(|(run, _)| *run).collect::<Vec<_>>())?;
                let place = (folder.clone(), slurm::largest_array());
                let submission = Submission::new(plan, &jobs, (&left, &untried), &options, place);
                if self.dry {
                    style::print(&submission.shown());
                } else {
                    let numbers: Vec<String> =
                        submission.submit()?.into_iter().map(|s| format!("{} ({})", s.job, s.script)).collect();
                    style::say(&format!("{} runs submitted as jobs {}", left.len(), numbers.join(", ")));
                    style::say(&format!(
                        "scripts and Slurm's messages are in {}; --status tells how far they are",
                        folder.display()
                    ));
                }
                return Ok(());
            }
            Scheduler::List => {
                let here = shell(&jobs.here().display().to_string());
                for (run, again) in &left {
                    let run = shell(&run.dir.display().to_string());
                    style::print(&format!("cd {here} && {}\n", jobs.run_command(&run, *again)));
                }
            }
            Scheduler::Kubernetes => {
                let image = self.args.image.clone().expect("clap asks for it");
                let (claim, queue) = (self.args.claim.clone().unwrap_or("dinolab".into()), self.args.queue.clone());
                let options = kubernetes::Options { image, claim, queue, parallel, gpu: self.device != Device::Cpu };
                let manifest = kubernetes::manifest(plan, &jobs, &left, &options);
                style::print(&format!("{}\n", serde_json::to_string_pretty(&manifest).expect("plain data")));
            }
        }
        if stages {
            style::note("these are the trunks; when they are done, the same command gives the arms");
        }
        Ok(())
    }
}

/// Takes every job of the suite in `out` that is in Slurm's queue out of it, and says how many they were.
///
/// # Errors
/// If Slurm does not answer.
pub fn cancel(out: &Path) -> Result<usize> {
    let jobs = slurm::submitted(out)?;
    let mut queued: Vec<String> = slurm::queue(&jobs)?.into_iter().map(|queued| queued.job).collect();
    queued.dedup();
    if !queued.is_empty() {
        let help = "`squeue --me` lists what is left";
        slurm::ask("scancel", &queued).map_err(|said| Error::user(format!("scancel: {said}"), help))?;
    }
    Ok(queued.len())
}
