//! TensorBoard's event files: `metrics.jsonl` again, pictures of crops and histograms, for looking at.
//!
//! A file is a sequence of records: length (8 bytes), checksum of these, data, checksum of the data; all numbers
//! little-endian, checksums CRC-32C, rotated and offset. The data are protocol buffers. Messages, records and checksums are
//! tensorboard-rs's; its `SummaryWriter` is not used, because a full disk ends its thread, and with it the run, by a panic.

use std::fs::{self, File};
use std::io::{BufReader, BufWriter, Read};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use protobuf::wire_format::WireType;
use protobuf::{CodedInputStream, Message, ProtobufResult};
use tensorboard_proto::event::{Event, SessionLog, SessionLog_SessionStatus};
use tensorboard_proto::summary::Summary;
use tensorboard_proto::tensor::TensorProto;
use tensorboard_proto::tensor_shape::TensorShapeProto;
use tensorboard_proto::types::DataType;
use tensorboard_rs::masked_crc32c::masked_crc32c;
use tensorboard_rs::record_writer::RecordWriter;
use tensorboard_rs::summary;

use crate::{Error, Result};

/// What the name of an event file begins with.
const PREFIX: &str = "events.out.tfevents.";
/// Bytes of a record beside its data.
const FRAME: u64 = 16;

/// A number under a name.
pub(super) fn number(tag: &str, value: f64) -> Summary {
    summary::scalar(tag, value as f32)
}

/// A line of text under a name.
pub(super) fn text(tag: &str, text: &str) -> Summary {
    let mut shape = TensorShapeProto::new();
    shape.mut_dim().push_default().set_size(1);
    let mut tensor = TensorProto::new();
    tensor.set_dtype(DataType::DT_STRING);
    tensor.set_tensor_shape(shape);
    tensor.mut_string_val().push(text.as_bytes().to_vec());
    let mut summary = Summary::new();
    let value = summary.mut_value().push_default();
    value.set_tag(tag.into());
    value.mut_metadata().mut_plugin_data().set_plugin_name("text".into());
    value.set_tensor(tensor);
    summary
}

/// A picture of `width` times `height` RGB pixels.
pub(super) fn picture(tag: &str, rgb: &[u8], width: usize, height: usize) -> Summary {
    // `summary::image` takes width before height for the pixels, and the other way round for the two fields.
    let mut summary = summary::image(tag, rgb, &[3, width, height]);
    let image = summary.mut_value()[0].mut_image();
    image.set_width(width as i32);
    image.set_height(height as i32);
    summary
}

/// 60 equal buckets between the least and the greatest value; `None` if a value is not finite.
pub(super) fn histogram(tag: &str, values: &[f64]) -> Option<Summary> {
    const BUCKETS: usize = 60;
    let (least, most) = values.iter().fold((f64::MAX, f64::MIN), |(l, h), &x| (l.min(x), h.max(x)));
    if values.iter().any(|x| !x.is_finite()) || values.is_empty() {
        return None;
    }
    let width = ((most - least) / BUCKETS as f64).max(1e-12);
    let mut counts = vec![0.0; BUCKETS];
    for x in values {
        counts[(((x - least) / width) as usize).min(BUCKETS - 1)] += 1.0;
    }
    let limits: Vec<f64> = (1..=BUCKETS).map(|i| least + width * i as f64).collect();
    let (sum, squares) = values.iter().fold((0.0, 0.0), |(s, q), x| (s + x, q + x * x));
    Some(summary::histogram_raw(tag, least, most, values.len() as f64, sum, squares, &limits, &counts))
}

/// A picture of a step, for [`write_pictures`].
pub struct StepPicture<'a> {
    /// Steps done.
    pub step: u64,
    /// The name that it is shown under.
    pub tag: &'a str,
    /// RGB, row-major.
    pub rgb: &'a [u8],
    /// Pixels a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
}

/// Writes an event file of pictures, steps ascending, into a folder of its own, in place of what was there.
///
/// # Errors
/// If it cannot be written.
pub fn write_pictures(folder: &Path, pictures: &[StepPicture<'_>]) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).map_err(Error::io("remove", folder))?;
    }
    let (mut events, _) = Events::open(folder, 0)?;
    for part in pictures.chunk_by(|a, b| a.step == b.step) {
        events.write(part[0].step, part.iter().map(|p| picture(p.tag, p.rgb, p.width, p.height)).collect())?;
    }
    Ok(())
}

/// The event file of this part of a run.
pub(super) struct Events {
    path: PathBuf,
    file: RecordWriter<BufWriter<File>>,
}

impl Events {
    /// Opens a new file in `folder` for a run that has done `start` steps. Events of later steps, which will be done
    /// again, are taken out of the files that are there; so are records that are cut or damaged, whose files are given.
    pub(super) fn open(folder: &Path, start: u64) -> Result<(Self, Vec<PathBuf>)> {
        fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        let mut files = Vec::new();
        for entry in fs::read_dir(folder).map_err(Error::io("list", folder))? {
            let path = entry.map_err(Error::io("list", folder))?.path();
            files.extend(Some(path).filter(|p| number_of(p).is_some() && p.is_file()));
        }
        files.sort();
        let mut damaged = Vec::new();
        for file in &files {
            if keep_until(file, start)? {
                damaged.push(file.clone());
            }
        }
        // TensorBoard reads files in the order of their names, which begin with the second of their making.
        let newest = files.iter().filter_map(|f| number_of(f)).max();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let number = newest.map_or(now, |newest| now.max(newest.saturating_add(1)));
        let path = folder.join(format!("{PREFIX}{number:010}.dinolab"));
        let file = File::create(&path).map_err(Error::io("create", &path))?;
        let mut events = Self { path, file: RecordWriter::new(BufWriter::new(file)) };
        let mut version = Event::new();
        version.set_file_version("brain.Event:2".into());
        events.put(0, version)?;
        if start > 0 {
            // TensorBoard forgets what it has seen of this step and later ones.
            let mut session = SessionLog::new();
            session.set_status(SessionLog_SessionStatus::START);
            let mut event = Event::new();
            event.set_session_log(session);
            events.put(start + 1, event)?;
        }
        Ok((events, damaged))
    }

    /// Writes what a step gave.
    pub(super) fn write(&mut self, step: u64, summaries: Vec<Summary>) -> Result<()> {
        let mut all = Summary::new();
        all.set_value(summaries.into_iter().flat_map(|mut summary| summary.take_value()).collect());
        let mut event = Event::new();
        event.set_summary(all);
        self.put(step, event)
    }

    fn put(&mut self, step: u64, mut event: Event) -> Result<()> {
        event.set_wall_time(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64()));
        event.set_step(step as i64);
        let data = event.write_to_bytes().expect("memory takes what is written");
        self.file.write(&data).and_then(|()| self.file.flush()).map_err(Error::io("write", &self.path))
    }
}

/// The number in the name of an event file.
fn number_of(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.strip_prefix(PREFIX)?.split('.').next()?.parse().ok()
}

fn checksum(bytes: &[u8]) -> [u8; 4] {
    masked_crc32c(bytes).to_le_bytes()
}

/// The step of an encoded event. Its other fields are passed over, not decoded: who writes a file decides how deeply they
/// are nested.
fn step_of(data: &[u8]) -> ProtobufResult<Option<u64>> {
    let mut fields = CodedInputStream::from_bytes(data);
    while !fields.eof()? {
        match fields.read_tag_unpack()? {
            (2, WireType::WireTypeVarint) => return Ok(u64::try_from(fields.read_int64()?).ok()),
            (_, WireType::WireTypeStartGroup | WireType::WireTypeEndGroup) => return Ok(None),
            (_, other) => fields.skip_field(other)?,
        }
    }
    Ok(Some(0))
}

/// Leaves the whole records of steps up to `start` in a file; gives whether there were damaged ones.
fn keep_until(path: &Path, start: u64) -> Result<bool> {
    let length = fs::metadata(path).map_err(Error::io("read", path))?.len();
    let mut file = BufReader::new(File::open(path).map_err(Error::io("read", path))?);
    let mut kept: Vec<u8> = Vec::new();
    let (mut at, mut damaged) = (0, false);
    while at < length {
        let Some(record) = record(&mut file, length - at).map_err(Error::io("read", path))? else {
            // Without a length, where the next record begins cannot be known.
            damaged = true;
            break;
        };
        at += record.len() as u64;
        let (data, check) = record[12..].split_at(record.len() - FRAME as usize);
        let step = if checksum(data)[..] == *check { step_of(data).ok().flatten() } else { None };
        match step {
            None => damaged = true,
            Some(step) if step <= start => kept.extend(record),
            Some(_) => {}
        }
    }
    if kept.len() as u64 != length {
        crate::files::write_file(path, &kept)?;
    }
    Ok(damaged)
}

/// The next record of a file that has `left` bytes; `None` if its length is damaged, or more than what is left.
fn record(file: &mut impl Read, left: u64) -> std::io::Result<Option<Vec<u8>>> {
    let mut record = Vec::new();
    file.by_ref().take(12).read_to_end(&mut record)?;
    let Some((length, check)) = record.split_at_checked(8) else { return Ok(None) };
    let data = u64::from_le_bytes(length.try_into().expect("eight bytes"));
    if checksum(length)[..] != *check || data > left.saturating_sub(FRAME) {
        return Ok(None);
    }
    file.by_ref().take(data + 4).read_to_end(&mut record)?;
    Ok(Some(record))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Steps and names of the numbers in all event files of a folder, in TensorBoard's order.
    fn numbers(folder: &Path) -> Vec<(i64, String)> {
        let mut files: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
        files.sort();
        let mut found = Vec::new();
        for path in files {
            let bytes = fs::read(path).unwrap();
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let left = rest.len() as u64;
                let record = record(&mut rest, left).unwrap().expect("a whole record");
                let event = Event::parse_from_bytes(&record[12..record.len() - 4]).unwrap();
                let values = event.get_summary().get_value();
                found.extend(values.iter().map(|v| (event.get_step(), v.get_tag().to_string())));
            }
        }
        found
    }

    fn write(folder: &Path, start: u64, steps: std::ops::RangeInclusive<u64>) {
        let (mut events, _) = Events::open(folder, start).unwrap();
        steps.for_each(|step| events.write(step, vec![number("loss", step as f64)]).unwrap());
    }

    #[test]
    fn steps_that_are_done_again_are_there_once_and_in_order() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), 0, 1..=9);
        write(folder.path(), 4, 5..=12);
        write(folder.path(), 12, 13..=15);
        let steps: Vec<i64> = numbers(folder.path()).into_iter().map(|(step, _)| step).collect();
        assert_eq!(steps, (1..=15).collect::<Vec<_>>());
    }

    #[test]
    fn the_checksum_is_that_of_tensorflow() {
        // The length of the first record of a file written by TensorFlow: 24 bytes.
        assert_eq!(checksum(&24u64.to_le_bytes()), [0xa3, 0x7f, 0x4b, 0x22]);
    }

    #[test]
    fn a_histogram_counts_every_value_once() {
        let values: Vec<f64> = (0..1000).map(|i| f64::from(i) * 0.37 - 100.0).collect();
        let summary = histogram("weights", &values).unwrap();
        let histogram_of = summary.get_value()[0].get_histo();
        assert_eq!(histogram_of.get_bucket().iter().sum::<f64>(), 1000.0);
        assert_eq!((histogram_of.get_min(), histogram_of.get_num()), (-100.0, 1000.0));
        assert!(histogram("weights", &[1.0, f64::NAN]).is_none());
    }

    proptest! {
        /// A file cut at any byte, with any byte changed, or with anything behind it: whole records of the steps that were
        /// done stay, later ones go, and damage is said.
        #[test]
        fn damaged_event_files_are_mended_and_said(cut in 0usize..400, flip in 0usize..400, bit in 0u8..8, tail: Vec<u8>) {
            let folder = tempfile::tempdir().unwrap();
            write(folder.path(), 0, 1..=5);
            let path = fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
            let whole = fs::read(&path).unwrap();
            let mut bytes = whole[..cut.min(whole.len())].to_vec();
            if let Some(byte) = bytes.get_mut(flip) {
                *byte ^= 1 << bit;
            }
            bytes.extend(&tail);
            fs::write(&path, &bytes).unwrap();
            let (_, damaged) = Events::open(folder.path(), 3).unwrap();
            let kept = numbers(folder.path());
            prop_assert!(kept.iter().all(|(step, tag)| *step <= 3 && tag == "loss"));
            if bytes == whole {
                prop_assert_eq!((kept.len(), damaged.len()), (3, 0));
            } else if kept.len() < 3 && cut >= whole.len() {
                prop_assert_eq!(damaged.len(), 1);
            }
        }
    }
}
