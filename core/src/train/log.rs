//! What a run writes while it runs: `metrics.jsonl` (the source of truth), `messages.jsonl`, TensorBoard events.

use std::collections::BTreeMap;

use serde_json::{Map, Value};
use tensorboard_proto::summary::Summary;

use crate::data::Batch;
use crate::recipe::Recipe;
use crate::step::{Learner, Report};
use crate::{Result, Tensor};

use super::events::{self, Events};
use super::folder::RunFolder;
use super::lines::Writer;
use super::timeline::{RunEvent, Timeline};

/// The open files of a run's log.
pub(super) struct Log {
    metrics: Writer,
    messages: Writer,
    timeline: Timeline,
    events: Option<Events>,
    /// The newest line of `metrics.jsonl`.
    last: Map<String, Value>,
}

impl Log {
    /// Opens the log of a run that has done `start` steps; gives it and what was wrong with its files.
    pub(super) fn open(folder: &RunFolder, recipe: &Recipe, start: u64) -> Result<(Self, Vec<String>)> {
        let metrics = Writer::open(folder.path().join("metrics.jsonl"), start, true)?;
        let messages = Writer::open(folder.path().join("messages.jsonl"), start, false)?;
        let (timeline, problem) = Timeline::open(folder.path(), start)?;
        let mut problems: Vec<String> = [metrics.problem, messages.problem, problem].into_iter().flatten().collect();
        let mut log = Self {
            metrics: metrics.writer,
            messages: messages.writer,
            timeline,
            events: None,
            last: metrics.last.unwrap_or_default(),
        };
        if recipe.log.tensorboard {
            match Events::open(&folder.path().join("tensorboard"), start) {
                Ok((events, damaged)) => {
                    log.events = Some(events);
                    let lost =
                        "it was damaged: what could not be read is taken out; metrics.jsonl has the same numbers";
                    problems.extend(damaged.iter().map(|path| format!("{}: {lost}", path.display())));
                }
                Err(error) => problems.push(format!("TensorBoard gets nothing: {error}")),
            }
        }
        Ok((log, problems))
    }

    /// The newest line of `metrics.jsonl`; empty before the first.
    pub(super) fn last(&self) -> &Map<String, Value> {
        &self.last
    }

    /// The line of `step`, if that is the newest.
    pub(super) fn line_of(&self, step: u64) -> Option<&Map<String, Value>> {
        Some(&self.last).filter(|line| line.get("step").and_then(Value::as_u64) == Some(step))
    }

    /// Seconds spent in the steps that are logged.
    pub(super) fn seconds(&self) -> f64 {
        self.last.get("throughput/seconds").and_then(Value::as_f64).unwrap_or(0.0)
    }

    /// Losses and scores of `step`, if it was logged.
    pub(super) fn measured(&self, step: u64) -> BTreeMap<String, f64> {
        let wanted = |name: &str| name.starts_with("loss/") || name.starts_with("probe/");
        let line = self.line_of(step).into_iter().flatten();
        line.filter(|(name, _)| wanted(name))
            .filter_map(|(name, value)| Some((name.clone(), value.as_f64()?)))
            .collect()
    }

    /// Writes the line of a step. What is said is a failure of TensorBoard's files, which ends no run.
    pub(super) fn step(
        &mut self,
        step: u64,
        report: &Report,
        scores: &BTreeMap<String, f64>,
        rates: &[(&str, f64)],
    ) -> Result<Option<String>> {
        let mut numbers = report.numbers();
        numbers.extend(rates.iter().map(|(k, v)| (k.to_string(), *v)));
        numbers.extend(scores.iter().map(|(k, v)| (k.clone(), *v)));
        let mut line = Map::new();
        line.insert("step".into(), step.into());
        // JSON has no NaN: a number that is not finite becomes null.
        line.extend(numbers.iter().map(|(k, v)| (k.clone(), serde_json::json!(v))));
        self.metrics.put(&line)?;
        self.last = line;
        Ok(self.show(step, numbers.iter().map(|(name, value)| events::number(name, *value)).collect()))
    }

    /// Adds scores to the line of `step`, the newest: they were due when the run was stopped.
    pub(super) fn add_scores(&mut self, step: u64, scores: &BTreeMap<String, f64>) -> Result<Option<String>> {
        let known = self.line_of(step).is_some();
        let mut line = if known { self.last.clone() } else { Map::from_iter([("step".to_string(), step.into())]) };
        line.extend(scores.iter().map(|(k, v)| (k.clone(), serde_json::json!(v))));
        match known {
            true => self.metrics.replace_last(&line)?,
            false => self.metrics.put(&line)?,
        }
        self.last = line;
        Ok(self.show(step, scores.iter().map(|(name, value)| events::number(name, *value)).collect()))
    }

    pub(super) fn warning(&mut self, step: u64, kind: &str, text: &str) -> Result<()> {
        let object = serde_json::json!({ "step": step, "kind": kind, "text": text });
        self.messages.put(object.as_object().expect("an object was just made"))
    }

    /// Writes something that happened; TensorBoard shows it as a text under `events/<kind>`.
    pub(super) fn event(&mut self, event: &RunEvent) -> Result<Option<String>> {
        let new = self.timeline.put(event)?;
        let shown = || vec![events::text(&format!("events/{}", event.kind), &event.text)];
        Ok(if new { self.show(event.step, shown()) } else { None })
    }

    /// Everything so far is on the disk.
    pub(super) fn sync(&mut self) -> Result<()> {
        self.metrics.sync()?;
        self.messages.sync()
    }

    /// The crops of the first images, one row an image: what the model is really fed.
    pub(super) fn crops(&mut self, batches: &[Batch], recipe: &Recipe) -> Option<String> {
        let batch = batches.first().filter(|_| self.events.is_some())?;
        let (rgb, width, height) = contact_sheet(batch, recipe);
        self.show(0, vec![events::picture("crops", &rgb, width, height)])
    }

    /// Distribution of every sub-model's weights and gradients.
    ///
    /// # Errors
    /// If the device fails.
    pub(super) fn histograms(&mut self, step: u64, learner: &Learner, gradients: &Tensor) -> Result<Option<String>> {
        let layout = &learner.model().layout;
        // Of several ranks, rounded to what a step computes with where this one has no more.
        let numbers = learner.weights().student.to_host()?;
        let mut values = Vec::new();
        for module in layout.modules() {
            let range = layout.range_of(&format!("{module}."));
            let of_weights = numbers.view(range.start, &[range.len()]);
            let gradients = gradients.view(range.start, &[range.len()]);
            for (what, numbers) in [("weights", of_weights), ("gradients", gradients)] {
                values.extend(events::histogram(&format!("{what}/{module}"), &numbers.to_f64_vec()));
            }
        }
        Ok(self.show(step, values))
    }

    /// Hands values to TensorBoard. After a failure, which is given, it gets no more: the numbers are in JSON as well.
    fn show(&mut self, step: u64, values: Vec<Summary>) -> Option<String> {
        let error = self.events.as_mut()?.write(step, values).err()?;
        self.events = None;
        Some(format!("TensorBoard gets nothing from here on: {error}"))
    }
}

/// Up to four images with all their crops as one picture: RGB, width, height.
fn contact_sheet(batch: &Batch, recipe: &Recipe) -> (Vec<u8>, usize, usize) {
    const GAP: usize = 2;
    let (images, channels) = (batch.images(), recipe.crops.channels());
    let kinds: Vec<(&Tensor, usize)> =
        [Some(&batch.global), batch.local.as_ref()].into_iter().flatten().map(|t| (t, t.dim(0) / images)).collect();
    let width: usize = kinds.iter().map(|(t, n)| n * (t.dim(3) + GAP)).sum();
    let row = kinds.iter().map(|(t, _)| t.dim(2)).max().unwrap_or(0) + GAP;
    let height = row * images.min(4);
    let mut sheet = vec![255u8; 3 * width * height];
    for image in 0..images.min(4) {
        let mut left = 0;
        for (crops, count) in &kinds {
            let (h, w) = (crops.dim(2), crops.dim(3));
            let host = crops.to(crate::Device::Cpu).cast(crate::DType::F32).expect("crops are real");
            let data = host.as_slice::<f32>();
            for crop in 0..*count {
                let base = (crop * images + image) * channels * h * w;
                for (i, shown) in (0..h * w).flat_map(|i| (0..3).map(move |c| (i, c))) {
                    // Of three channels or more the first three; of fewer the first, as grey.
                    let channel = if channels < 3 { 0 } else { shown };
                    let value =
                        data[base + channel * h * w + i] * recipe.crops.std[channel] + recipe.crops.mean[channel];
                    let (y, x) = (image * row + i / w, left + i % w);
                    sheet[3 * (y * width + x) + shown] = (value * 255.0).clamp(0.0, 255.0) as u8;
                }
                left += w + GAP;
            }
        }
    }
    (sheet, width, height)
}
