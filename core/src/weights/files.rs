//! Safetensors files as they lie on the disk: one file, or the shards of an index.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};

use crate::{Error, Result};

/// Named tensors of one or several memory-mapped safetensors files. Nothing is read before it is asked for.
pub struct TensorFiles {
    path: PathBuf,
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

/// Names of a folder's files in the Hugging Face layout, in the order in which they are looked for.
const IN_FOLDER: [&str; 2] = ["model.safetensors.index.json", "model.safetensors"];

impl TensorFiles {
    /// Opens a safetensors file, the index of a sharded one (`*.index.json`), or a folder that holds either under its
    /// usual name.
    ///
    /// # Errors
    /// If there is no such file, a shard is missing, or a file is cut off.
    pub fn open(path: &Path) -> Result<Self> {
        let file = match path.is_dir() {
            false => path.to_path_buf(),
            true => IN_FOLDER.iter().map(|name| path.join(name)).find(|file| file.exists()).ok_or_else(|| {
                let problem = format!("this folder has no {}", IN_FOLDER.join(" and no "));
                Error::content(path, problem, "name a safetensors file, or a folder with one under that name")
            })?,
        };
        let mut all = Self { path: file.clone(), maps: Vec::new(), tensors: BTreeMap::new() };
        if file.extension().is_some_and(|e| e == "json") {
            for shard in shards(&file)? {
                all.add(&shard)?;
            }
        } else {
            all.add(&file)?;
        }
        Ok(all)
    }

    fn add(&mut self, path: &Path) -> Result<()> {
        let file = File::open(path).map_err(Error::io("read", path))?;
        // SAFETY: the map is only read, as bytes, which have no invalid values. A file that another process changes
        // meanwhile gives other bytes, one that it cuts off ends this process: nothing in it is trusted as a pointer.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))?;
        let broken =
            |e| Error::content(path, format!("not a whole safetensors file ({e})"), "copy or download it again");
        let parsed = SafeTensors::deserialize(&map).map_err(broken)?;
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
}

/// The files that an index names.
fn shards(index: &Path) -> Result<Vec<PathBuf>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = std::fs::read_to_string(index).map_err(Error::io("read", index))?;
    let wrong = |e: serde_json::Error| {
        let help = "an index has a table `weight_map` from tensor to file; or name the safetensors file itself";
        Error::content(index, format!("not the index of a sharded file ({e})"), help)
    };
    let index_of: Index = serde_json::from_str(&text).map_err(wrong)?;
    let mut files: Vec<PathBuf> = index_of.weight_map.into_values().map(|file| index.with_file_name(file)).collect();
    files.sort();
    files.dedup();
    if let Some(missing) = files.iter().find(|file| !file.exists()) {
        let problem = format!("the shard {} is not there", missing.display());
        return Err(Error::content(index, problem, "download all shards into the folder of the index"));
    }
    Ok(files)
}
