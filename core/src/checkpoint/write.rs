//! Writing a checkpoint: each rank its files, then one makes a checkpoint of them.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use super::list::{clear, folder_name, prune, Keep, REPLACED};
use super::{Set, State, FOLDER, FORMAT, RECIPE_FILE, SEAL, STATE_FILE};
use crate::files::{
    hash_file, index_name, is_split_name, new_folder, split, split_name, sync_dir, write_file, write_index,
    write_tensors,
};
use crate::recipe::CheckpointConfig;
use crate::{Error, Result, Tensor};

/// What gives the tensors of a checkpoint, some at a time.
pub trait Give {
    /// Steps done, and how many of them were skipped because something was not finite.
    fn steps(&self) -> (u64, u64);

    /// Bytes of the tensors of a set, in order. Those of none are given by rank 0.
    fn bytes(&self, set: Set) -> Vec<u64>;

    /// Tensors of a set by their places, in host memory, if this rank keeps them. Of several ranks all have to ask for the same.
    ///
    /// # Errors
    /// If the device or a rank fails.
    fn tensors(&self, set: Set, places: Range<usize>, keep: bool) -> Result<Vec<(String, Tensor)>>;
}

/// What a checkpoint holds, in host memory.
pub struct Content {
    /// Steps done.
    pub step: u64,
    /// Steps whose update was skipped because something was not finite.
    pub skipped: u64,
    /// Weights by role and name.
    pub model: Vec<(String, Tensor)>,
    /// Moments and the losses' state.
    pub optimizer: Vec<(String, Tensor)>,
}

impl Content {
    fn of(&self, set: Set) -> &[(String, Tensor)] {
        match set {
            Set::Model => &self.model,
            Set::Optimizer => &self.optimizer,
        }
    }
}

impl Give for Content {
    fn steps(&self) -> (u64, u64) {
        (self.step, self.skipped)
    }

    fn bytes(&self, set: Set) -> Vec<u64> {
        self.of(set).iter().map(|(_, tensor)| tensor.as_bytes().len() as u64).collect()
    }

    fn tensors(&self, set: Set, places: Range<usize>, _keep: bool) -> Result<Vec<(String, Tensor)>> {
        Ok(self.of(set)[places].to_vec())
    }
}

/// Writes a checkpoint into `run`. Then removes earlier ones that are not to be kept, and those of later
/// steps: the run will do these steps again.
///
/// # Errors
/// If it cannot be written; earlier checkpoints stay as they are.
pub fn save(run: &Path, from: &dyn Give, keep: Keep) -> Result<Saved> {
    let saving = Saving::begin(run)?;
    let written = write(saving.folder(), from, CheckpointConfig::default().file_bytes(), (0, 1))??;
    saving.finish(from.steps(), written, keep)
}

/// Whether a set of these tensors is in several files of at most `most` bytes.
pub(crate) fn is_split(from: &dyn Give, most: u64) -> bool {
    Set::ALL.iter().any(|set| split(&from.bytes(*set), most).len() > 1)
}

/// A checkpoint that is being written.
pub struct Saving {
    run: PathBuf,
    building: TempDir,
    left: Vec<String>,
}

/// A checkpoint that was written.
#[derive(Debug)]
pub struct Saved {
    /// Its folder.
    pub folder: PathBuf,
    /// What is to be said of old ones that cannot be removed.
    pub left: Vec<String>,
}

/// A file of a checkpoint that was written.
#[derive(Debug, Serialize, Deserialize)]
pub struct Written {
    name: String,
    hash: String,
    bytes: u64,
    tensors: Vec<String>,
}

/// Writes the files of one rank, given with the number of ranks, into `folder`: of a set that is in one file, rank 0's. Every rank has
/// to write its own at the same time, whatever happens to its disk: such an error is inside.
///
/// # Errors
/// If tensors cannot be given.
pub fn write(folder: &Path, from: &dyn Give, most: u64, (rank, world): (usize, usize)) -> Result<Result<Vec<Written>>> {
    let (step, skipped) = from.steps();
    let mut done: Result<Vec<Written>> = Ok(Vec::new());
    for set in Set::ALL {
        let files = split(&from.bytes(set), most);
        // The last has what rank 0 alone has.
        let owner = |i: usize| (files.len() - 1 - i) % world;
        // As many at a time as there are ranks: all write at once.
        for begin in (0..files.len()).step_by(world) {
            let mut own = None;
            for i in begin..files.len().min(begin + world) {
                let keep = owner(i) == rank && done.is_ok();
                let tensors = from.tensors(set, files[i].clone(), keep)?;
                if keep {
                    own = Some((split_name(set.stem(), i, files.len()), tensors));
                }
            }
            if let (Some((name, tensors)), Ok(written)) = (own, &mut done) {
                match write_one(folder, name, &tensors, set.metadata(step, skipped)) {
                    Ok(file) => written.push(file),
                    Err(error) => done = Err(error),
                }
            }
        }
    }
    Ok(done)
}

fn write_one(folder: &Path, name: String, tensors: &[(String, Tensor)], metadata: (&str, String)) -> Result<Written> {
    let path = folder.join(&name);
    write_tensors(&path, tensors, &[metadata])?;
    let bytes = tensors.iter().map(|(_, tensor)| tensor.as_bytes().len() as u64).sum();
    let hash = hash_file(&path)?;
    Ok(Written { name, hash, bytes, tensors: tensors.iter().map(|(name, _)| name.clone()).collect() })
}

impl Saving {
    /// Makes a folder for the files of a checkpoint of `run`, which is gone with this if it is not finished.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn begin(run: &Path) -> Result<Self> {
        let folder = run.join(FOLDER);
        fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
        let left = clear(run)?;
        Ok(Self { run: run.into(), building: new_folder(&folder)?, left })
    }

    /// Where the files are [written](write()).
    pub fn folder(&self) -> &Path {
        self.building.path()
    }

    /// Makes a checkpoint of these files, after so many steps and skipped ones, as [`save`] does.
    ///
    /// # Errors
    /// As [`save`].
    pub fn finish(self, (step, skipped): (u64, u64), written: Vec<Written>, keep: Keep) -> Result<Saved> {
        let Self { run, building, mut left } = self;
        let folder = run.join(FOLDER);
        let target = folder.join(folder_name(step));
        let mut files: BTreeMap<String, String> =
            written.iter().map(|file| (file.name.clone(), file.hash.clone())).collect();
        for stem in Set::ALL.map(Set::stem) {
            let of_set: Vec<&Written> = written.iter().filter(|file| is_split_name(stem, &file.name)).collect();
            if of_set.len() > 1 {
                let places = of_set.iter().flat_map(|f| f.tensors.iter().map(|name| (name.clone(), f.name.clone())));
                write_index(building.path(), stem, &places.collect(), of_set.iter().map(|file| file.bytes).sum())?;
                let index = index_name(stem);
                files.insert(index.clone(), hash_file(&building.path().join(index))?);
            }
        }
        if let Some(text) = sealed_recipe(&run)? {
            write_file(&building.path().join(RECIPE_FILE), text.as_bytes())?;
        }
        let state = State { format: FORMAT, dinolab: env!("CARGO_PKG_VERSION").into(), step, skipped, files };
        write_file(
            &building.path().join(STATE_FILE),
            serde_json::to_string_pretty(&state).expect("plain data").as_bytes(),
        )?;
        sync_dir(building.path())?;
        if target.exists() {
            // The same step was written before. It stays a checkpoint, under another name, until the new one is in its place.
            let old = folder.join(format!("{}{REPLACED}", folder_name(step)));
            fs::rename(&target, &old).map_err(Error::io("replace", &target))?;
        }
        fs::rename(building.keep(), &target).map_err(Error::io("write", &target))?;
        sync_dir(&folder)?;
        left.extend(prune(&run, step, keep)?);
        Ok(Saved { folder: target, left })
    }
}

/// The recipe of a run as a checkpoint keeps it.
fn sealed_recipe(run: &Path) -> Result<Option<String>> {
    let file = run.join(RECIPE_FILE);
    if !file.exists() {
        return Ok(None);
    }
    let text = fs::read_to_string(&file).map_err(Error::io("read", &file))?;
    let wrong =
        |e: toml::de::Error| Error::content(&file, e.message(), "put back the recipe that the run was started with");
    let text = text.parse::<toml::Table>().map_err(wrong)?.to_string();
    Ok(Some(format!("{SEAL}{}\n{text}", blake3::hash(text.as_bytes()).to_hex())))
}

#[cfg(test)]
mod tests {
    use super::super::load;
    use super::*;
    use crate::files::TensorFiles;

    /// Five tensors a set, of 12 bytes each.
    fn several() -> Content {
        let list = |set: &str| -> Vec<(String, Tensor)> {
            (0..5).map(|i| (format!("{set}.{i}"), Tensor::from_slice(&[i as f32; 3], &[3]).unwrap())).collect()
        };
        Content { step: 7, skipped: 1, model: list("student"), optimizer: list("exp_avg") }
    }

    #[test]
    fn what_is_too_large_for_a_file_is_split_and_the_files_are_the_same_of_however_many_ranks() {
        let mut written: Vec<BTreeMap<String, Vec<u8>>> = Vec::new();
        for world in [1, 2, 3, 7] {
            let run = tempfile::tempdir().unwrap();
            let saving = Saving::begin(run.path()).unwrap();
            let of_rank = |rank| write(saving.folder(), &several(), 24, (rank, world)).unwrap().unwrap();
            let parts: Vec<Vec<Written>> = (0..world).map(of_rank).collect();
            assert!(parts.iter().take(3).all(|part| !part.is_empty()), "none of the first writes nothing");
            let path = saving.finish((7, 1), parts.into_iter().flatten().collect(), Keep::newest(1)).unwrap().folder;
            let checkpoint = load(&path).unwrap();
            for (set, files) in [("student", &checkpoint.model), ("exp_avg", &checkpoint.optimizer)] {
                let third = files.read(&format!("{set}.3")).unwrap().expect("it is in the second file");
                assert_eq!((third.to_f64_vec(), files.names().count()), (vec![3.0; 3], 5));
            }
            let all = fs::read_dir(&path).unwrap().map(|e| e.unwrap());
            written.push(all.map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap())).collect());
        }
        let names: Vec<&String> = written[0].keys().collect();
        assert_eq!(names.len(), 2 * 4 + 1, "{names:?}");
        assert!(written.iter().all(|files| *files == written[0]));
        // Others find the tensors by the index.
        let run = tempfile::tempdir().unwrap();
        written[0].iter().for_each(|(name, bytes)| fs::write(run.path().join(name), bytes).unwrap());
        let read = TensorFiles::open(&run.path().join("model.safetensors.index.json")).unwrap();
        assert_eq!(read.names().count(), 5);
    }

    #[test]
    fn a_split_file_that_is_changed_or_gone_is_named() {
        let run = tempfile::tempdir().unwrap();
        let saving = Saving::begin(run.path()).unwrap();
        let written = write(saving.folder(), &several(), 24, (0, 1)).unwrap().unwrap();
        let path = saving.finish((7, 1), written, Keep::newest(1)).unwrap().folder;
        for name in
            ["model-00002-of-00003.safetensors", "optimizer-00003-of-00003.safetensors", "model.safetensors.index.json"]
        {
            let file = path.join(name);
            let bytes = fs::read(&file).unwrap();
            fs::write(&file, &bytes[..bytes.len() - 1]).unwrap();
            let changed = load(&path).err().unwrap().to_string();
            assert!(changed.contains(name) && changed.contains("hash"), "{changed}");
            fs::remove_file(&file).unwrap();
            assert!(load(&path).err().unwrap().to_string().contains(name));
            fs::write(&file, bytes).unwrap();
        }
        load(&path).unwrap();
        // A file that `state.json` does not list is as good as gone.
        let state = fs::read_to_string(path.join(STATE_FILE)).unwrap();
        let less: Vec<&str> = state.lines().filter(|line| !line.contains("model-00002")).collect();
        fs::write(path.join(STATE_FILE), less.join("\n")).unwrap();
        assert!(load(&path).err().unwrap().to_string().contains(STATE_FILE));
    }

    #[test]
    fn a_rank_whose_disk_is_full_says_so_when_all_have_written() {
        let gone = tempfile::tempdir().unwrap().path().join("gone");
        let asked = std::cell::Cell::new(0);
        struct Counted<'a>(Content, &'a std::cell::Cell<usize>);
        impl Give for Counted<'_> {
            fn steps(&self) -> (u64, u64) {
                self.0.steps()
            }
            fn bytes(&self, set: Set) -> Vec<u64> {
                self.0.bytes(set)
            }
            fn tensors(&self, set: Set, places: Range<usize>, keep: bool) -> Result<Vec<(String, Tensor)>> {
                self.1.set(self.1.get() + 1);
                self.0.tensors(set, places, keep)
            }
        }
        let failed = write(&gone, &Counted(several(), &asked), 24, (0, 2)).unwrap().unwrap_err();
        assert!(failed.to_string().contains("gone"), "{failed}");
        assert_eq!(asked.get(), 6, "the other rank needs what this one has of every file");
    }
}
