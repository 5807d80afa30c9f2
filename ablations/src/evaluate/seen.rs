//! A trained model that remembers what it saw: probes of one evaluation look at the same images, and a later evaluation goes on
//! from the files of one that was stopped.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use dinolab_core::contract::{Features, Grid, ImageSize};
use dinolab_core::files::write_file;
use dinolab_core::train::Trained;
use dinolab_core::{DType, Error, Result, Tensor};
use safetensors::tensor::{Dtype, TensorView};
use safetensors::SafeTensors;

/// Bytes of features that are remembered.
const MOST: usize = 2 << 30;

/// Features by the hash of an image's pixels, for as many images as there is room for.
pub struct Seen<'a> {
    trained: &'a Trained,
    /// Where they are kept.
    folder: PathBuf,
    known: RefCell<Known>,
}

#[derive(Default)]
struct Known {
    images: BTreeMap<Hash, Features>,
    bytes: usize,
}

type Hash = [u8; 32];

impl<'a> Seen<'a> {
    /// What lies below `folder` of these weights at this size.
    ///
    /// # Errors
    /// If the weights cannot be brought to the host.
    pub fn open(trained: &'a Trained, folder: &Path, size: ImageSize) -> Result<Self> {
        let folder = folder.join(format!("{}@{size}", &trained.fingerprint()?[..24]));
        let mut known = Known::default();
        let files = std::fs::read_dir(&folder).into_iter().flatten().flatten().map(|entry| entry.path());
        let mut files: Vec<PathBuf> =
            files.filter(|path| path.extension().is_some_and(|e| e == "safetensors")).collect();
        files.sort();
        // A broken one is computed anew.
        for (hashes, features) in files.iter().filter_map(|path| read(&std::fs::read(path).ok()?)) {
            known.add(&hashes, (0..hashes.len()).map(|row| one(&features, row)).collect::<Result<_>>()?);
        }
        Ok(Self { trained, folder, known: RefCell::new(known) })
    }

    /// Takes away the files of these weights at this size.
    ///
    /// # Errors
    /// If they cannot be removed.
    pub fn forget(&self) -> Result<()> {
        match self.folder.exists() {
            true => std::fs::remove_dir_all(&self.folder).map_err(Error::io("remove", &self.folder)),
            false => Ok(()),
        }
    }

    /// [`Trained::features`] of pixels `[B, channels, h, w]`.
    ///
    /// # Errors
    /// As there, or if they cannot be kept.
    pub fn features(&self, pixels: &Tensor) -> Result<Features> {
        let images: Vec<Tensor> = (0..pixels.dim(0)).map(|i| pixels.narrow(i, 1)).collect::<Result<_>>()?;
        let hashes: Vec<Hash> = images.iter().map(Tensor::hash).collect();
        let unknown: Vec<usize> =
            (0..images.len()).filter(|&i| !self.known.borrow().images.contains_key(&hashes[i])).collect();
        let mut new = BTreeMap::new();
        if !unknown.is_empty() {
            let images: Vec<&Tensor> = unknown.iter().map(|&i| &images[i]).collect();
            let found = self.trained.features(&Tensor::cat(&images)?)?;
            for (row, &i) in unknown.iter().enumerate() {
                new.insert(i, one(&found, row)?);
            }
            let hashes: Vec<Hash> = unknown.iter().map(|&i| hashes[i]).collect();
            let room = self.known.borrow().bytes + found.bytes() <= MOST;
            if room {
                self.keep(&hashes, &found)?;
                self.known.borrow_mut().add(&hashes, new.values().cloned().collect());
            }
        }
        let known = self.known.borrow();
        let all: Vec<Features> =
            (0..hashes.len()).map(|i| new.get(&i).unwrap_or_else(|| &known.images[&hashes[i]]).clone()).collect();
        join(&all)
    }

    /// Writes features of several images.
    fn keep(&self, hashes: &[Hash], features: &Features) -> Result<()> {
        std::fs::create_dir_all(&self.folder).map_err(Error::io("create", &self.folder))?;
        let parts = parts(features);
        let hex: Vec<String> = hashes.iter().map(|hash| blake3::Hash::from(*hash).to_hex().to_string()).collect();
        let about = [("images".to_string(), hex.join(" ")), ("height".into(), features.grid.height.to_string())];
        let bytes = safetensors::serialize(parts.into_iter().map(view), Some(about.into_iter().collect()));
        let name = blake3::hash(hex.join(" ").as_bytes()).to_hex();
        write_file(&self.folder.join(&name[..24]).with_extension("safetensors"), &bytes.expect("tensors with names"))
    }
}

impl Known {
    fn add(&mut self, hashes: &[Hash], images: Vec<Features>) {
        for (hash, features) in hashes.iter().zip(images) {
            let bytes = features.bytes();
            if self.bytes + bytes <= MOST && self.images.insert(*hash, features).is_none() {
                self.bytes += bytes;
            }
        }
    }
}

/// The tensors of features, by name.
fn parts(features: &Features) -> Vec<(String, &Tensor)> {
    let Features { cls, registers, patches, prenorm, layers, .. } = features;
    let named = [("cls", cls), ("registers", registers), ("patches", patches), ("prenorm", prenorm)];
    let layers = layers.iter().enumerate().map(|(i, layer)| (format!("layer.{i}"), layer));
    named.into_iter().map(|(name, tensor)| (name.to_string(), tensor)).chain(layers).collect()
}

/// A tensor as a file has it.
fn view((name, tensor): (String, &Tensor)) -> (String, TensorView<'_>) {
    let dtype = if tensor.dtype() == DType::F64 { Dtype::F64 } else { Dtype::F32 };
    (name, TensorView::new(dtype, tensor.shape().to_vec(), tensor.as_bytes()).expect("a tensor has its bytes"))
}

/// What [`Seen::keep`] wrote; none if it is broken.
fn read(bytes: &[u8]) -> Option<(Vec<Hash>, Features)> {
    let (_, header) = SafeTensors::read_metadata(bytes).ok()?;
    let about = header.metadata().as_ref()?;
    let hash = |hex: &str| blake3::Hash::from_hex(hex).ok().map(|hash| *hash.as_bytes());
    let hashes: Vec<Hash> = about.get("images")?.split(' ').map(hash).collect::<Option<_>>()?;
    let tensors = SafeTensors::deserialize(bytes).ok()?;
    let tensor = |name: &str| {
        let view = tensors.tensor(name).ok()?;
        let numbers = view.data();
        match view.dtype() {
            Dtype::F64 => {
                let numbers = numbers.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().expect("eight bytes")));
                Tensor::from_slice(&numbers.collect::<Vec<_>>(), view.shape()).ok()
            }
            _ => {
                let numbers = numbers.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("four bytes")));
                Tensor::from_slice(&numbers.collect::<Vec<_>>(), view.shape()).ok()
            }
        }
    };
    let patches = tensor("patches")?;
    let height: usize = about.get("height")?.parse().ok()?;
    let grid = Grid { height, width: patches.dim(1).checked_div(height)? };
    let layers = (0..).map_while(|i| tensor(&format!("layer.{i}"))).collect();
    let features = Features {
        cls: tensor("cls")?,
        registers: tensor("registers")?,
        prenorm: tensor("prenorm")?,
        patches,
        layers,
        grid,
    };
    parts(&features).iter().all(|(_, tensor)| tensor.dim(0) == hashes.len()).then_some((hashes, features))
}

/// Those of one image, in memory of their own.
fn one(features: &Features, row: usize) -> Result<Features> {
    let of = |x: &Tensor| Ok::<_, Error>(x.narrow(row, 1)?.to_owned());
    Ok(Features {
        cls: of(&features.cls)?,
        registers: of(&features.registers)?,
        patches: of(&features.patches)?,
        prenorm: of(&features.prenorm)?,
        layers: features.layers.iter().map(of).collect::<Result<_>>()?,
        grid: features.grid,
    })
}

/// Those of several images, which are of one grid.
fn join(all: &[Features]) -> Result<Features> {
    let cat = |of: &dyn Fn(&Features) -> &Tensor| Tensor::cat(&all.iter().map(of).collect::<Vec<_>>());
    Ok(Features {
        cls: cat(&|f| &f.cls)?,
        registers: cat(&|f| &f.registers)?,
        patches: cat(&|f| &f.patches)?,
        prenorm: cat(&|f| &f.prenorm)?,
        layers: (0..all[0].layers.len()).map(|i| cat(&|f| &f.layers[i])).collect::<Result<_>>()?,
        grid: all[0].grid,
    })
}
