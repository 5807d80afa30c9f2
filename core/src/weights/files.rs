//! Safetensors files that others wrote: one file, or the shards of an index.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use super::places::{self, missing};
use super::JsonTable;
use crate::files::TensorFiles;
use crate::text::printable;
use crate::{Error, Result};

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
        if let Some(problem) = missing(&file) {
            return Err(Error::content(&file, problem, "check the path, or download it again"));
        }
        let mut all = Self::none_of(&file);
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
        if let Some(index) = places::index_of(&file) {
            let problem = "this is one of several files with the weights of a model";
            return Err(Error::content(
                &file,
                problem,
                format!("name their index, {}, or their folder", printable(index)),
            ));
        }
        match places::is_pickle(&file) && missing(&file).is_none() {
            true => Self::unpickle(&file, beside),
            false => Self::open(&file),
        }
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
            let found = self.file_of(tensor).map(|file| inside[file]);
            if found != Some(file) {
                let where_ = found.map_or("in none of the shards".into(), |other| format!("in {other}"));
                return Err(Error::content(index, format!("{tensor} should be in {file}, and is {where_}"), help));
            }
        }
        match self.names().find(|name| !weight_map.contains_key(*name)) {
            Some(name) => {
                let file = inside[self.file_of(name).expect("it has its names")];
                Err(Error::content(index, format!("{name} of {file} is not in the index"), help))
            }
            None => Ok(()),
        }
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
