//! Files of JSON objects, one a line: written so that a kill costs at most the last line, read so that nothing is lost
//! without a word.

use std::fs::{self, File};
use std::io::{BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::files::write_file;
use crate::{Error, Result};

/// What is in a file of JSON objects.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Lines {
    /// The objects, in order.
    pub objects: Vec<Map<String, Value>>,
    /// Numbers of the lines that are no object, counted from 1. A last line that was cut by a kill is not among them.
    pub damaged: Vec<usize>,
    /// Whether the last line was cut.
    pub cut: bool,
}

impl Lines {
    /// Reads a file; nothing if there is none.
    ///
    /// # Errors
    /// If the file is there and cannot be read.
    pub fn read(path: &Path) -> Result<Self> {
        match fs::read(path) {
            Ok(bytes) => Ok(Self::parse(&bytes)),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(Self::default()),
            Err(e) => Err(Error::io("read", path)(e)),
        }
    }

    fn parse(bytes: &[u8]) -> Self {
        let mut lines = Self::default();
        for (i, line) in bytes.split_inclusive(|&byte| byte == b'\n').enumerate() {
            match serde_json::from_slice(line) {
                Ok(object) => lines.objects.push(object),
                Err(_) if !line.ends_with(b"\n") => lines.cut = true,
                Err(_) => lines.damaged.push(i + 1),
            }
        }
        lines
    }

    /// What is wrong with the file, if something is.
    pub fn problem(&self) -> Option<String> {
        let list = |lines: &[usize]| lines.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let damaged = match self.damaged.as_slice() {
            [] => None,
            [one] => Some(format!("line {one} is damaged")),
            few if few.len() <= 5 => Some(format!("lines {} are damaged", list(few))),
            many => Some(format!("{} lines are damaged, the first of them {}", many.len(), list(&many[..5]))),
        };
        let cut = self.cut.then(|| "the last line was cut".to_string());
        Some([damaged, cut].into_iter().flatten().collect::<Vec<_>>().join(" and ")).filter(|text| !text.is_empty())
    }
}

/// A file of JSON objects that is being written, by step.
pub(super) struct Writer {
    path: PathBuf,
    file: BufWriter<File>,
}

/// A file that was opened to go on.
pub(super) struct Opened {
    pub(super) writer: Writer,
    /// The line of the last step that was kept.
    pub(super) last: Option<Map<String, Value>>,
    /// What was wrong with the file, and where it was put.
    pub(super) problem: Option<String>,
}

impl Writer {
    /// Opens for appending; lines of steps after `start` are dropped, since those steps will be done again. A file with
    /// lines that are no steps of this run is kept beside, under the name of the file and `.damaged`.
    pub(super) fn open(path: PathBuf, start: u64, once_a_step: bool) -> Result<Opened> {
        let mut last = None;
        let mut problem = None;
        if path.exists() {
            let bytes = fs::read(&path).map_err(Error::io("read", &path))?;
            let mut lines = Lines::parse(&bytes);
            let (mut kept, mut before, mut strange) = (String::new(), None, 0);
            for object in lines.objects.drain(..) {
                let step = object.get("step").and_then(Value::as_u64);
                let follows = step.is_some_and(|step| before.is_none_or(|b| b < step || (b == step && !once_a_step)));
                if !follows {
                    strange += 1;
                    continue;
                }
                before = step;
                if step.is_some_and(|step| step <= start) {
                    kept += &serde_json::to_string(&object).expect("plain data");
                    kept.push('\n');
                    last = Some(object);
                }
            }
            let keep_aside = !lines.damaged.is_empty() || strange > 0;
            let strange = (strange > 0).then(|| format!("{strange} lines are of no step of this run"));
            problem = [lines.problem(), strange].into_iter().flatten().reduce(|a, b| format!("{a} and {b}"));
            if let (Some(text), Some(name)) = (&mut problem, path.file_name()) {
                *text = format!("{}: {text}; what is whole is kept", name.to_string_lossy());
                if keep_aside {
                    let aside = path.with_extension("jsonl.damaged");
                    write_file(&aside, &bytes)?;
                    *text += &format!(", and the file as it was is {}", aside.display());
                }
            }
            if kept.as_bytes() != bytes {
                write_file(&path, kept.as_bytes())?;
            }
        }
        let file = append(&path)?;
        Ok(Opened { writer: Self { path, file }, last, problem })
    }

    pub(super) fn put(&mut self, object: &Map<String, Value>) -> Result<()> {
        let text = serde_json::to_string(object).expect("plain data");
        writeln!(self.file, "{text}").and_then(|()| self.file.flush()).map_err(Error::io("write", &self.path))
    }

    /// Puts `object` in the place of the last line.
    pub(super) fn replace_last(&mut self, object: &Map<String, Value>) -> Result<()> {
        let bytes = fs::read(&self.path).map_err(Error::io("read", &self.path))?;
        let before = bytes.split_inclusive(|&byte| byte == b'\n').rev().skip(1).map(<[u8]>::len).sum();
        let line = serde_json::to_string(object).expect("plain data") + "\n";
        write_file(&self.path, &[&bytes[..before], line.as_bytes()].concat())?;
        self.file = append(&self.path)?;
        Ok(())
    }

    /// Everything so far is on the disk.
    pub(super) fn sync(&mut self) -> Result<()> {
        self.file.flush().and_then(|()| self.file.get_ref().sync_data()).map_err(Error::io("flush", &self.path))
    }
}

fn append(path: &Path) -> Result<BufWriter<File>> {
    File::options().create(true).append(true).open(path).map(BufWriter::new).map_err(Error::io("write", path))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn line(step: u64) -> Map<String, Value> {
        // A number of 17 digits, as a loss in 32 bits has.
        json!({ "step": step, "loss/total": f64::from(5.9649f32 / step as f32) }).as_object().unwrap().clone()
    }

    fn written(path: &Path, steps: std::ops::RangeInclusive<u64>) -> Vec<u8> {
        let mut writer = Writer::open(path.into(), 0, true).unwrap().writer;
        steps.for_each(|step| writer.put(&line(step)).unwrap());
        fs::read(path).unwrap()
    }

    #[test]
    fn numbers_come_back_to_the_bit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        written(&path, 1..=500);
        let lines = Lines::read(&path).unwrap();
        assert_eq!(lines.objects, (1..=500).map(line).collect::<Vec<_>>());
        assert_eq!(lines.problem(), None);
    }

    #[test]
    fn a_line_of_a_step_that_will_be_done_again_is_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        written(&path, 1..=9);
        let opened = Writer::open(path.clone(), 6, true).unwrap();
        assert_eq!((opened.last, opened.problem), (Some(line(6)), None));
        assert_eq!(Lines::read(&path).unwrap().objects, (1..=6).map(line).collect::<Vec<_>>());
    }

    #[test]
    fn the_last_line_can_be_replaced_and_followed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        written(&path, 1..=2);
        let mut writer = Writer::open(path.clone(), 2, true).unwrap().writer;
        let mut more = line(2);
        more.insert("probe/knn/top1".into(), 0.5.into());
        writer.replace_last(&more).unwrap();
        writer.put(&line(3)).unwrap();
        assert_eq!(Lines::read(&path).unwrap().objects, [line(1), more, line(3)]);
    }

    proptest! {
        /// A file cut at any byte, with a byte changed and strange lines behind: what is whole is kept in order, and
        /// whatever else was there is said.
        #[test]
        fn damaged_lines_are_left_out_and_said(cut in 0usize..300, flip in 0usize..300, bit in 0u8..8, tail: Vec<u8>) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("metrics.jsonl");
            let whole = written(&path, 1..=5);
            let mut bytes = whole[..cut.min(whole.len())].to_vec();
            if let Some(byte) = bytes.get_mut(flip) {
                *byte ^= 1 << bit;
            }
            bytes.extend(&tail);
            fs::write(&path, &bytes).unwrap();
            let before = Lines::read(&path).unwrap();
            let opened = Writer::open(path.clone(), 5, true).unwrap();
            let after = Lines::read(&path).unwrap();
            prop_assert_eq!(after.problem(), None);
            let steps: Vec<u64> = after.objects.iter().filter_map(|o| o["step"].as_u64()).collect();
            prop_assert!(steps.len() == after.objects.len() && steps.is_sorted_by(|a, b| a < b));
            if before.problem().is_some() || after.objects.len() < before.objects.len() {
                let all_later = before.objects.iter().all(|o| o.get("step").is_some_and(Value::is_u64));
                prop_assert!(opened.problem.is_some() || all_later, "{before:?}");
            }
            if !before.damaged.is_empty() {
                prop_assert_eq!(fs::read(path.with_extension("jsonl.damaged")).unwrap(), bytes);
            }
        }
    }
}
