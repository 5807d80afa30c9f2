//! Safetensors files as they lie on the disk, mapped into memory.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};

use super::{parse_safetensors, to_tensor, NamedTensors, Really};
use crate::{Error, Result, Tensor};

/// Named tensors of one or several memory-mapped safetensors files. Nothing is read before it is asked for.
pub struct TensorFiles {
    pub(crate) path: PathBuf,
    files: Vec<PathBuf>,
    maps: Vec<Mmap>,
    tensors: BTreeMap<String, Place>,
    metadata: Vec<BTreeMap<String, String>>,
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
pub(crate) fn floats(dtype: Dtype, bytes: &[u8]) -> Option<impl Iterator<Item = f64> + '_> {
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
    /// None yet, of what lies at `path`.
    pub(crate) fn none_of(path: &Path) -> Self {
        Self { path: path.into(), files: Vec::new(), maps: Vec::new(), tensors: BTreeMap::new(), metadata: Vec::new() }
    }

    /// Adds the tensors of a file.
    ///
    /// # Errors
    /// If it is no safetensors file, or cut off, or has a tensor that an earlier one has.
    pub(crate) fn add(&mut self, path: &Path) -> Result<()> {
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
        let (_, header) = SafeTensors::read_metadata(&map).expect("it was parsed just above");
        let metadata = header.metadata().iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect();
        self.metadata.push(metadata);
        self.files.push(path.into());
        self.maps.push(map);
        Ok(())
    }

    /// The file, or the index.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files.
    pub(crate) fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// All names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether some name begins with `prefix`.
    pub fn has(&self, prefix: &str) -> bool {
        let from = self.tensors.range::<str, _>((std::ops::Bound::Included(prefix), std::ops::Bound::Unbounded));
        from.take(1).any(|(name, _)| name.starts_with(prefix))
    }

    /// The bytes of the tensor of that name.
    pub fn get(&self, name: &str) -> Option<RawTensor<'_>> {
        let place = self.tensors.get(name)?;
        let bytes = &self.maps[place.file][place.bytes.clone()];
        Some(RawTensor { dtype: place.dtype, shape: &place.shape, bytes })
    }

    /// The shape of the tensor of that name.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|place| place.shape.as_slice())
    }

    /// The tensor of that name, read into memory: f16 widens to f32, other integers than u32 and booleans become u32.
    ///
    /// # Errors
    /// If it is of another type.
    pub fn read(&self, name: &str) -> Result<Option<Tensor>> {
        let Some(raw) = self.get(name) else { return Ok(None) };
        to_tensor(&self.path, raw.dtype, raw.shape, raw.bytes).map(Some)
    }

    /// All of them, read into memory.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub(crate) fn read_all(&self) -> Result<NamedTensors> {
        let read = |name: &str| Ok((name.to_string(), self.read(name)?.expect("it has its names")));
        let tensors = self.names().map(read).collect::<Result<_>>()?;
        let metadata = self.metadata.iter().flatten().map(|(key, value)| (key.clone(), value.clone())).collect();
        Ok(NamedTensors { tensors, metadata })
    }

    /// The metadata of each file.
    pub(crate) fn metadata(&self) -> &[BTreeMap<String, String>] {
        &self.metadata
    }

    /// The place of the file that has a tensor, in the order in which they were added.
    pub(crate) fn file_of(&self, name: &str) -> Option<usize> {
        self.tensors.get(name).map(|place| place.file)
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
