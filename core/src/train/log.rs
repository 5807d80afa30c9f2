//! What a run writes while it runs: `metrics.jsonl` (the source of truth), `messages.jsonl`, TensorBoard events.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tensorboard_rs::summary_writer::SummaryWriter;

use crate::checkpoint::write_file;
use crate::data::Batch;
use crate::recipe::Recipe;
use crate::step::{Learner, Report};
use crate::{Error, Result, Tensor};

use super::folder::RunFolder;

/// The open files of a run's log.
pub(super) struct Log {
    metrics: Lines,
    messages: Lines,
    tensorboard: Option<SummaryWriter>,
}

/// A file of JSON objects, one a line.
struct Lines {
    path: PathBuf,
    file: BufWriter<File>,
}

impl Lines {
    /// Opens for appending; lines of steps after `start` are dropped, since those steps will be done again. Gives the
    /// last line that was kept.
    fn open(path: PathBuf, start: u64) -> Result<(Self, Option<Value>)> {
        let mut last = None;
        if path.exists() {
            let text = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
            let mut kept = String::new();
            for line in text.lines() {
                // A line cut off by a kill does not parse, and is dropped with the rest.
                let Ok(value) = serde_json::from_str::<Value>(line) else { break };
                if value["step"].as_u64().is_none_or(|s| s > start) {
                    break;
                }
                kept += line;
                kept.push('\n');
                last = Some(value);
            }
            write_file(&path, kept.as_bytes())?;
        }
        let file = File::options().create(true).append(true).open(&path).map_err(Error::io("write", &path))?;
        Ok((Self { path, file: BufWriter::new(file) }, last))
    }

    fn put(&mut self, object: &Map<String, Value>) -> Result<()> {
        let text = serde_json::to_string(object).expect("plain data");
        writeln!(self.file, "{text}").and_then(|()| self.file.flush()).map_err(Error::io("write", &self.path))
    }
}

impl Log {
    /// Opens the log of a run that has done `start` steps; gives it and the seconds those steps took.
    pub(super) fn open(folder: &RunFolder, recipe: &Recipe, start: u64) -> Result<(Self, f64)> {
        let (metrics, last) = Lines::open(folder.path().join("metrics.jsonl"), start)?;
        let (messages, _) = Lines::open(folder.path().join("messages.jsonl"), start)?;
        let seconds = last.and_then(|l| l["throughput/seconds"].as_f64()).unwrap_or(0.0);
        let tensorboard =
            if recipe.log.tensorboard { open_tensorboard(&folder.path().join("tensorboard"))? } else { None };
        Ok((Self { metrics, messages, tensorboard }, seconds))
    }

    pub(super) fn step(
        &mut self,
        step: u64,
        report: &Report,
        scores: &BTreeMap<String, f64>,
        rates: &[(&str, f64)],
    ) -> Result<()> {
        let mut numbers: Vec<(String, f64)> = report.losses.iter().map(|(k, v)| (k.clone(), *v)).collect();
        numbers.push(("lr".into(), report.lr));
        numbers.push(("weight_decay".into(), report.weight_decay));
        numbers.extend(report.grad_norms.iter().map(|(m, v)| (format!("grad_norm/{m}"), *v)));
        if let Some(health) = &report.health {
            numbers.push(("health/feature_std".into(), health.feature_std));
            numbers.push(("health/effective_rank".into(), health.effective_rank));
            numbers.push(("health/cls_patch_cosine".into(), health.cls_patch_cosine));
            for (loss, marginal, sharpness) in &health.targets {
                numbers.push((format!("health/{loss}/marginal_entropy"), *marginal));
                numbers.push((format!("health/{loss}/target_entropy"), *sharpness));
            }
        }
        numbers.extend(rates.iter().map(|(k, v)| (k.to_string(), *v)));
        numbers.extend(scores.iter().map(|(k, v)| (k.clone(), *v)));
        let mut line = Map::new();
        line.insert("step".into(), step.into());
        // JSON has no NaN: a number that is not finite becomes null.
        line.extend(numbers.iter().map(|(k, v)| (k.clone(), serde_json::json!(v))));
        self.metrics.put(&line)?;
        self.tensorboard(|writer| {
            for (name, value) in &numbers {
                writer.add_scalar(name, *value as f32, step as usize);
            }
        });
        Ok(())
    }

    pub(super) fn warning(&mut self, step: u64, kind: &str, text: &str) -> Result<()> {
        let object = serde_json::json!({ "step": step, "kind": kind, "text": text });
        self.messages.put(object.as_object().expect("an object was just made"))
    }

    /// Everything so far is on its way to the disk.
    pub(super) fn flush(&mut self) -> Result<()> {
        for lines in [&mut self.metrics, &mut self.messages] {
            lines
                .file
                .flush()
                .and_then(|()| lines.file.get_ref().sync_data())
                .map_err(Error::io("flush", &lines.path))?;
        }
        Ok(())
    }

    /// The crops of the first images, one row an image: what the model is really fed.
    pub(super) fn crops(&mut self, batches: &[Batch], recipe: &Recipe) {
        let Some(batch) = batches.first() else { return };
        let (data, side) = contact_sheet(batch, recipe);
        self.tensorboard(|writer| writer.add_image("crops", &data, &[3, side, side], 0));
    }

    /// Distribution of every sub-model's weights and gradients.
    pub(super) fn histograms(&mut self, step: u64, learner: &Learner) {
        let layout = &learner.model().layout;
        let weights = learner.weights();
        for module in layout.modules() {
            let range = layout.range_of(&format!("{module}."));
            for (what, flat) in [("weights", &weights.student), ("gradients", weights.grads())] {
                let values = flat.view(range.start, &[range.len()]).to_f64_vec();
                let tag = format!("{what}/{module}");
                self.tensorboard(|writer| histogram(writer, &tag, &values, step));
            }
        }
    }

    /// The TensorBoard crate panics when it cannot write; that must not end a run whose metrics are in JSON as well.
    fn tensorboard(&mut self, f: impl FnOnce(&mut SummaryWriter)) {
        let Some(writer) = &mut self.tensorboard else { return };
        if catch_unwind(AssertUnwindSafe(|| f(writer))).is_err() {
            // Its own Drop panics as well once its thread is gone.
            std::mem::forget(self.tensorboard.take());
        }
    }
}

fn open_tensorboard(path: &Path) -> Result<Option<SummaryWriter>> {
    fs::create_dir_all(path).map_err(Error::io("create", path))?;
    Ok(catch_unwind(|| SummaryWriter::new(path)).ok())
}

/// 60 equal buckets between the least and the greatest value.
fn histogram(writer: &mut SummaryWriter, tag: &str, values: &[f64], step: u64) {
    const BUCKETS: usize = 60;
    let (low, high) = values.iter().fold((f64::MAX, f64::MIN), |(l, h), &x| (l.min(x), h.max(x)));
    if !(low.is_finite() && high.is_finite()) {
        return;
    }
    let width = ((high - low) / BUCKETS as f64).max(1e-12);
    let mut counts = vec![0.0; BUCKETS];
    for x in values {
        counts[(((x - low) / width) as usize).min(BUCKETS - 1)] += 1.0;
    }
    let limits: Vec<f64> = (1..=BUCKETS).map(|i| low + width * i as f64).collect();
    let (sum, squares) = values.iter().fold((0.0, 0.0), |(s, q), x| (s + x, q + x * x));
    writer.add_histogram_raw(tag, low, high, values.len() as f64, sum, squares, &limits, &counts, step as usize);
}

/// Up to four images with all their crops as one square RGB picture.
fn contact_sheet(batch: &Batch, recipe: &Recipe) -> (Vec<u8>, usize) {
    const GAP: usize = 2;
    let images = batch.images();
    let kinds: Vec<(&Tensor, usize)> =
        [Some(&batch.global), batch.local.as_ref()].into_iter().flatten().map(|t| (t, t.dim(0) / images)).collect();
    let width: usize = kinds.iter().map(|(t, n)| n * (t.dim(3) + GAP)).sum();
    let row = kinds.iter().map(|(t, _)| t.dim(2)).max().unwrap_or(0) + GAP;
    let side = width.max(row * images.min(4));
    let mut sheet = vec![255u8; 3 * side * side];
    for image in 0..images.min(4) {
        let mut left = 0;
        for (crops, count) in &kinds {
            let (h, w) = (crops.dim(2), crops.dim(3));
            let host = crops.cast(crate::DType::F32).expect("crops are real").to(crate::Device::Cpu);
            let data = host.as_slice::<f32>();
            for crop in 0..*count {
                let base = (crop * images + image) * 3 * h * w;
                for (i, channel) in (0..h * w).flat_map(|i| (0..3).map(move |c| (i, c))) {
                    let value =
                        data[base + channel * h * w + i] * recipe.crops.std[channel] + recipe.crops.mean[channel];
                    let (y, x) = (image * row + i / w, left + i % w);
                    sheet[3 * (y * side + x) + channel] = (value * 255.0).clamp(0.0, 255.0) as u8;
                }
                left += w + GAP;
            }
        }
    }
    (sheet, side)
}
