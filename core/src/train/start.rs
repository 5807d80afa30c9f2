//! What is told when a run starts: on what, with what, and where the results go.

use std::fmt;
use std::path::{Path, PathBuf};

use super::RanksInfo;
use crate::contract::{Dataset, Summary};
use crate::cuda::Gpu;
use crate::recipe::Recipe;
use crate::resolved::{cost, summary_of_data};
use crate::step::Learner;
use crate::text::printable;
use crate::{DType, Device, Result};

/// What there is to know of a run that starts or goes on. Shown, it is one line a subject.
#[derive(Clone, Debug, PartialEq)]
pub struct Start {
    /// Steps done.
    pub step: u64,
    /// Steps of the run.
    pub steps: u64,
    /// The run's folder.
    pub out: PathBuf,
    /// What the data are.
    pub data: Summary,
    /// Whether some images are set aside for probes; without, probes see those that are trained on.
    pub held_out: bool,
    /// Images a step.
    pub batch: usize,
    /// What it runs on: the processor with its threads, or the card.
    pub device: String,
    /// The type of features.
    pub precision: DType,
    /// Bytes that the model, its gradients and moments, and a step's tensors are expected to take.
    pub memory: f64,
}

impl Start {
    pub(super) fn of(recipe: &Recipe, learner: &Learner, data: &dyn Dataset, out: &Path, step: u64) -> Result<Self> {
        let threads = rayon::current_num_threads();
        let device = match (learner.device(), RanksInfo::of(learner.ranks())) {
            (Device::Cpu, None) => format!("CPU, {threads} threads"),
            (Device::Cpu, Some(ranks)) => {
                let RanksInfo { world, engine } = ranks;
                format!("CPU, {world} processes with {threads} threads each, joined by {engine}")
            }
            (Device::Cuda(ordinal), _) => format!("cuda:{ordinal}, {}", Gpu::get(ordinal)?.info().name),
        };
        Ok(Self {
            step,
            steps: recipe.steps,
            out: out.into(),
            data: summary_of_data(recipe, data),
            held_out: data.held_out().is_some(),
            batch: recipe.batch.size,
            device,
            precision: learner.features_dtype(),
            memory: cost::shared_on(recipe, learner.device(), learner.ranks().world())?.own.total_memory(),
        })
    }
}

impl fmt::Display for Start {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seen = if self.held_out { "" } else { ", none held out: probes see images that are trained on" };
        writeln!(f, "data     {}{seen}", self.data.content)?;
        for note in &self.data.notes {
            writeln!(f, "         {note}")?;
        }
        let precision = format!("{:?}", self.precision).to_lowercase();
        let gib = self.memory / f64::from(1 << 30);
        writeln!(f, "device   {}, {precision}, about {gib:.2} GiB of memory", self.device)?;
        let from = match self.step {
            0 => format!("{} steps", self.steps),
            step => format!("goes on after step {step} of {}", self.steps),
        };
        writeln!(f, "run      {from}, {} images each", self.batch)?;
        write!(f, "results  {}", printable(&self.out))
    }
}
