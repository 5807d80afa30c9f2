//! TensorBoard's event files: `metrics.jsonl` again, pictures of crops and histograms, for looking at.
//!
//! A file is a sequence of records: length (8 bytes), checksum of these, data, checksum of the data; all numbers
//! little-endian, checksums CRC-32C, rotated and offset. The data are protocol buffers; the messages here name the fields
//! that are used.

use std::fs::{self, File};
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use prost::Message;

use crate::{Error, Result};

/// What the name of an event file begins with.
const PREFIX: &str = "events.out.tfevents.";
/// Bytes of a record beside its data.
const FRAME: u64 = 16;

#[derive(Clone, PartialEq, Message)]
struct Event {
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(string, optional, tag = "3")]
    file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    summary: Option<Summary>,
    #[prost(message, optional, tag = "7")]
    session: Option<Session>,
}

/// A run that goes on says so with status 1: TensorBoard then forgets what it has seen of this step and later.
#[derive(Clone, PartialEq, Message)]
struct Session {
    #[prost(int32, tag = "1")]
    status: i32,
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    values: Vec<Tagged>,
}

/// A number, a picture or a histogram under a name.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Tagged {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, optional, tag = "2")]
    number: Option<f32>,
    #[prost(message, optional, tag = "4")]
    picture: Option<Picture>,
    #[prost(message, optional, tag = "5")]
    histogram: Option<Histogram>,
}

#[derive(Clone, PartialEq, Message)]
struct Picture {
    #[prost(int32, tag = "1")]
    height: i32,
    #[prost(int32, tag = "2")]
    width: i32,
    /// 3: RGB.
    #[prost(int32, tag = "3")]
    colorspace: i32,
    #[prost(bytes = "vec", tag = "4")]
    png: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct Histogram {
    #[prost(double, tag = "1")]
    least: f64,
    #[prost(double, tag = "2")]
    most: f64,
    #[prost(double, tag = "3")]
    count: f64,
    #[prost(double, tag = "4")]
    sum: f64,
    #[prost(double, tag = "5")]
    sum_of_squares: f64,
    #[prost(double, repeated, tag = "6")]
    limits: Vec<f64>,
    #[prost(double, repeated, tag = "7")]
    counts: Vec<f64>,
}

impl Tagged {
    pub(super) fn of_number(tag: &str, value: f64) -> Self {
        Self { tag: tag.into(), number: Some(value as f32), ..Self::default() }
    }

    /// An RGB picture.
    pub(super) fn of_picture(tag: &str, picture: &image::RgbImage) -> Self {
        let mut png = std::io::Cursor::new(Vec::new());
        picture.write_to(&mut png, image::ImageFormat::Png).expect("memory takes what is written");
        let (height, width) = (picture.height() as i32, picture.width() as i32);
        let picture = Picture { height, width, colorspace: 3, png: png.into_inner() };
        Self { tag: tag.into(), picture: Some(picture), ..Self::default() }
    }

    /// 60 equal buckets between the least and the greatest value; `None` if a value is not finite.
    pub(super) fn of_values(tag: &str, values: &[f64]) -> Option<Self> {
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
        let limits = (1..=BUCKETS).map(|i| least + width * i as f64).collect();
        let (sum, sum_of_squares) = values.iter().fold((0.0, 0.0), |(s, q), x| (s + x, q + x * x));
        let histogram = Histogram { least, most, count: values.len() as f64, sum, sum_of_squares, limits, counts };
        Some(Self { tag: tag.into(), histogram: Some(histogram), ..Self::default() })
    }
}

/// The event file of this part of a run.
pub(super) struct Events {
    path: PathBuf,
    file: BufWriter<File>,
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
        let mut events = Self { path, file: BufWriter::new(file) };
        events.put(&Event { file_version: Some("brain.Event:2".into()), ..Event::default() })?;
        if start > 0 {
            events.put(&Event { step: start as i64 + 1, session: Some(Session { status: 1 }), ..Event::default() })?;
        }
        Ok((events, damaged))
    }

    /// Writes values of a step.
    pub(super) fn write(&mut self, step: u64, values: Vec<Tagged>) -> Result<()> {
        self.put(&Event { step: step as i64, summary: Some(Summary { values }), ..Event::default() })
    }

    fn put(&mut self, event: &Event) -> Result<()> {
        let wall_time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64());
        let data = Event { wall_time, ..event.clone() }.encode_to_vec();
        let length = (data.len() as u64).to_le_bytes();
        let parts = [&length[..], &checksum(&length), &data, &checksum(&data)].concat();
        self.file.write_all(&parts).and_then(|()| self.file.flush()).map_err(Error::io("write", &self.path))
    }
}

/// The number in the name of an event file.
fn number_of(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.strip_prefix(PREFIX)?.split('.').next()?.parse().ok()
}

fn checksum(bytes: &[u8]) -> [u8; 4] {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
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
        let event = if checksum(data)[..] == *check { Event::decode(data).ok() } else { None };
        match event {
            None => damaged = true,
            Some(event) if u64::try_from(event.step).is_ok_and(|step| step <= start) => kept.extend(record),
            Some(_) => {}
        }
    }
    if kept.len() as u64 != length {
        crate::checkpoint::write_file(path, &kept)?;
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
                let event = Event::decode(&record[12..record.len() - 4]).unwrap();
                found.extend(event.summary.into_iter().flat_map(|s| s.values).map(|v| (event.step, v.tag)));
            }
        }
        found
    }

    fn write(folder: &Path, start: u64, steps: std::ops::RangeInclusive<u64>) {
        let (mut events, _) = Events::open(folder, start).unwrap();
        steps.for_each(|step| events.write(step, vec![Tagged::of_number("loss", step as f64)]).unwrap());
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
        let histogram = Tagged::of_values("weights", &values).unwrap().histogram.unwrap();
        assert_eq!(histogram.counts.iter().sum::<f64>(), 1000.0);
        assert_eq!((histogram.least, histogram.count), (-100.0, 1000.0));
        assert!(Tagged::of_values("weights", &[1.0, f64::NAN]).is_none());
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
