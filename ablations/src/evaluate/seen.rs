//! A trained model that remembers what it saw: probes of one evaluation look at the same images.

use std::cell::RefCell;
use std::collections::BTreeMap;

use dinolab_core::contract::Features;
use dinolab_core::train::Trained;
use dinolab_core::{Result, Tensor};

/// Bytes of features that are remembered.
const MOST: usize = 2 << 30;

/// Features by the hash of an image's pixels, for as many images as there is room for.
pub struct Seen<'a> {
    trained: &'a Trained,
    known: RefCell<(BTreeMap<[u8; 32], Features>, usize)>,
}

impl<'a> Seen<'a> {
    /// Nothing yet.
    pub fn new(trained: &'a Trained) -> Self {
        Self { trained, known: RefCell::default() }
    }

    /// [`Trained::features`] of pixels `[B, 3, h, w]`.
    ///
    /// # Errors
    /// As there.
    pub fn features(&self, pixels: &Tensor) -> Result<Features> {
        let images: Vec<Tensor> = (0..pixels.dim(0)).map(|i| pixels.narrow(i, 1)).collect::<Result<_>>()?;
        let hash = |image: &Tensor| {
            let mut hash = blake3::Hasher::new();
            // Equal bytes of another shape are another image.
            hash.update(format!("{:?}", image.shape()).as_bytes()).update(image.as_bytes());
            *hash.finalize().as_bytes()
        };
        let hashes: Vec<[u8; 32]> = images.iter().map(hash).collect();
        let unknown: Vec<usize> =
            (0..images.len()).filter(|&i| !self.known.borrow().0.contains_key(&hashes[i])).collect();
        let mut new = BTreeMap::new();
        if !unknown.is_empty() {
            let images: Vec<&Tensor> = unknown.iter().map(|&i| &images[i]).collect();
            let found = self.trained.features(&Tensor::cat(&images)?)?;
            for (row, &i) in unknown.iter().enumerate() {
                new.insert(i, one(&found, row)?);
            }
        }
        let mut known = self.known.borrow_mut();
        let all: Vec<Features> =
            (0..images.len()).map(|i| new.get(&i).unwrap_or_else(|| &known.0[&hashes[i]]).clone()).collect();
        for (i, features) in new {
            let bytes = bytes(&features);
            if known.1 + bytes <= MOST {
                known.1 += bytes;
                known.0.insert(hashes[i], features);
            }
        }
        join(&all)
    }
}

/// Those of one image, in memory of their own.
fn one(features: &Features, row: usize) -> Result<Features> {
    let of = |x: &Tensor| Ok::<_, dinolab_core::Error>(x.narrow(row, 1)?.to_owned());
    Ok(Features {
        cls: of(&features.cls)?,
        registers: of(&features.registers)?,
        patches: of(&features.patches)?,
        prenorm: of(&features.prenorm)?,
        layers: features.layers.iter().map(of).collect::<Result<_>>()?,
        grid: features.grid,
    })
}

fn bytes(features: &Features) -> usize {
    let Features { cls, registers, patches, prenorm, layers, .. } = features;
    [cls, registers, patches, prenorm].into_iter().chain(layers).map(|x| x.as_bytes().len()).sum()
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
