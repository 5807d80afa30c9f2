//! Safetensors files as they lie on the disk: one file, or the shards of an index.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

use memmap2::Mmap;
use safetensors::Dtype;

use super::places::{self, missing};
use super::JsonTable;
use crate::files::{parse_safetensors, Really};
use crate::text::printable;
use crate::{Error, Result};

/// Named tensors of one or several memory-mapped safetensors files. Nothing is read before it is asked for.
pub struct TensorFiles {
    pub(super) path: PathBuf,
    maps: Vec<Mmap>,
    tensors: BTreeMap<String, Place>,
}

/// Where a tensor is.
struct Place {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

/// A tensor's bytes, little-endian and row-major, of any type.
#[derive(Clone, Copy, Debug)]
pub struct RawTensor<'a> {
    /// Type of an element.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: &'a [usize],
    /// Its elements.
    pub bytes: &'a [u8],
}

impl RawTensor<'_> {
    /// Its elements, if they are floats of 16, 32 or 64 bits.
    pub fn values(&self) -> Option<impl Iterator<Item = f64> + '_> {
        floats(self.dtype, self.bytes)
    }

    /// Elements that are infinite or not a number.
    pub fn non_finite(&self) -> usize {
        self.values().map_or(0, |values| values.filter(|x| !x.is_finite()).count())
    }
}

/// The numbers in these bytes, if they are floats of 16, 32 or 64 bits.
pub(super) fn floats(dtype: Dtype, bytes: &[u8]) -> Option<impl Iterator<Item = f64> + '_> {
    let read: fn(&[u8]) -> f64 = match dtype {
        Dtype::F64 => |b| f64::from_le_bytes(b.try_into().expect("8 bytes")),
        Dtype::F32 => |b| f32::from_le_bytes(b.try_into().expect("4 bytes")).into(),
        Dtype::F16 => |b| half::f16::from_le_bytes(b.try_into().expect("2 bytes")).to_f64(),
        Dtype::BF16 => |b| half::bf16::from_le_bytes(b.try_into().expect("2 bytes")).to_f64(),
        _ => return None,
    };
    Some(bytes.chunks_exact(dtype.bitsize() / 8).map(read))
}

impl TensorFiles {
    /// Opens a safetensors file, the index of a sharded one (`*.index.json`), or a folder that holds either: a download in
    /// the Hugging Face layout, or the root of a model in Hugging Face's cache, whose snapshot is taken.
    ///
    /// # Errors
    /// If there is no such file, it is something else, a shard is missing, or a file is cut off.
    pub fn open(path: &Path) -> Result<Self> {
        let file = if path.is_dir() { places::published_in(path)? } else { path.to_path_buf() };
        if places::is_pickle(&file) {
            return Err(places::import_first(&file));
        }
        let mut all = Self { path: file.clone(), maps: Vec::new(), tensors: BTreeMap::new() };
        if file.extension().is_some_and(|e| e == "json") {
            all.add_shards(&file)?;
        } else {
            all.add(&file)?;
        }
        Ok(all)
    }

    /// Opens what was published: as [`open`](Self::open), and PyTorch's own files too, whose tensors are copied, one at a
    /// time, to a file in the folder `beside` that is gone with this.
    ///
    /// # Errors
    /// As [`open`](Self::open), or if a PyTorch file is damaged or holds tensors that have no plain form.
    pub fn published(path: &Path, beside: &Path) -> Result<Self> {
        let file = if path.is_dir() { places::published_in(path)? } else { path.to_path_buf() };
        match places::is_pickle(&file) && missing(&file).is_none() {
            true => Self::unpickle(&file, beside),
            false => Self::open(&file),
        }
    }

    /// Adds the tensors of a file.
    fn add(&mut self, path: &Path) -> Result<()> {
        if let Some(problem) = missing(path) {
            return Err(Error::content(path, problem, "check the path, or download it again"));
        }
        let kind = std::fs::metadata(path).map_err(Error::io("read", path))?;
        if !kind.is_file() {
            return Err(Error::content(path, "this is not a file", "name a safetensors file"));
        }
        if kind.len() == 0 {
            return Err(Really::of(&[]).expect("empty is known").error(path, "a safetensors file"));
        }
        let file = File::open(path).map_err(Error::io("read", path))?;
        // SAFETY: the map is only read, as bytes, which have no invalid values. A file that another process changes
        // meanwhile gives other bytes, one that it cuts off ends this process: nothing in it is trusted as a pointer.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))?;
        let parsed = parse_safetensors(path, &map)?;
        for (name, view) in parsed.iter() {
            let start = view.data().as_ptr() as usize - map.as_ptr() as usize;
            let place = Place {
                file: self.maps.len(),
                dtype: view.dtype(),
                shape: view.shape().to_vec(),
                bytes: start..start + view.data().len(),
            };
            if self.tensors.insert(name.to_string(), place).is_some() {
                let problem = format!("{name} is in an earlier shard already");
                return Err(Error::content(path, problem, "download the shards again"));
            }
        }
        self.maps.push(map);
        Ok(())
    }

    /// Adds the shards of an index, which has to say of every tensor where it is.
    fn add_shards(&mut self, index: &Path) -> Result<()> {
        let mut table = JsonTable::read(index)?;
        let help = "an index has a table `weight_map` from tensor to file; or name the safetensors file itself";
        let weight_map: Option<BTreeMap<String, String>> = table.take("weight_map")?;
        let weight_map = weight_map.ok_or_else(|| table.wrong("weight_map", "missing in this file", help))?;
        table.harmless(&["metadata"]);
        table.finish()?;
        let names: BTreeSet<&String> = weight_map.values().collect();
        let mut inside = Vec::new();
        for name in names {
            self.add(&shard(index, name)?)?;
            inside.push(name);
        }
        let help = "download the index and all shards again, of one version";
        for (tensor, file) in &weight_map {
            let found = self.tensors.get(tensor).map(|place| inside[place.file]);
            if found != Some(file) {
                let where_ = found.map_or("in none of the shards".into(), |other| format!("in {other}"));
                return Err(Error::content(index, format!("{tensor} should be in {file}, and is {where_}"), help));
            }
        }
        match self.tensors.iter().find(|(name, _)| !weight_map.contains_key(*name)) {
            Some((name, place)) => {
                let problem = format!("{name} of {} is not in the index", inside[place.file]);
                Err(Error::content(index, problem, help))
            }
            None => Ok(()),
        }
    }

    /// The file, or the index.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The tensor of that name.
    pub fn get(&self, name: &str) -> Option<RawTensor<'_>> {
        let place = self.tensors.get(name)?;
        let bytes = &self.maps[place.file][place.bytes.clone()];
        Some(RawTensor { dtype: place.dtype, shape: &place.shape, bytes })
    }

    /// Elements of all tensors: no tensor of a model can have more.
    pub fn elements(&self) -> usize {
        self.tensors.values().map(|t| t.shape.iter().product::<usize>()).sum()
    }

    /// Gives every tensor the name that `rename` says; without one it is left out.
    ///
    /// # Errors
    /// If two tensors get the same name.
    pub fn rename(&mut self, rename: impl Fn(&str) -> Option<String>) -> Result<()> {
        let mut origins: BTreeMap<String, String> = BTreeMap::new();
        for (name, place) in std::mem::take(&mut self.tensors) {
            let Some(new) = rename(&name) else { continue };
            if let Some(other) = origins.insert(new.clone(), name.clone()) {
                let problem = format!("{other} and {name} are both {new} of the model");
                return Err(Error::content(&self.path, problem, "save the weights of one model alone"));
            }
            self.tensors.insert(new, place);
        }
        Ok(())
    }
}

/// The shard `name` of an index. What an index names is a plain file beside it: a downloaded index has no business
/// elsewhere. Files may be links as in Hugging Face's cache, where index and shards all lead to one other folder.
fn shard(index: &Path, name: &str) -> Result<PathBuf> {
    let refuse = |problem: String| {
        let help = "shards are files in the folder of their index: download it again, or copy them there";
        Err(Error::content(index, problem, help))
    };
    let plain =
        matches!(Path::new(name).components().collect::<Vec<_>>()[..], [Component::Normal(only)] if only == name);
    if !plain || !name.ends_with(".safetensors") {
        return refuse(format!("it names {name:?} as a shard, which is no safetensors file beside it"));
    }
    let path = index.with_file_name(name);
    if let Some(problem) = missing(&path) {
        let help = "download all shards into the folder of the index";
        return Err(Error::content(index, format!("the shard {} is missing: {problem}", printable(path)), help));
    }
    let real = |path: &Path| path.canonicalize().map_err(Error::io("read", path));
    let folder = real(index.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")))?;
    let home = [Some(folder.as_path()), real(index)?.parent()].contains(&real(&path)?.parent());
    if !home {
        return refuse(format!("the shard {name} is a link that leads out of the folder"));
    }
    Ok(path)
}
