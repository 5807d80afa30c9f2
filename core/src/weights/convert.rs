//! Between dinolab's names and those of a published layout, tensor by tensor.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::path::Path;

use safetensors::tensor::{Dtype, View};

use super::TensorFiles;
use crate::{Error, Result};

/// One of dinolab's tensors, and the tensors of the published layout that lie in it one after the other.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    /// Name in dinolab: `backbone.blocks.0.attn.qkv.weight`.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its parts along the first axis.
    pub parts: Vec<Part>,
}

/// A tensor of a published layout.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// Its name there; `None`: there is none, and this part is zero.
    pub name: Option<String>,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl Rule {
    /// A tensor that is there under another name, in a shape with as many elements.
    pub fn renamed(name: impl Into<String>, shape: &[usize], theirs: impl Into<String>, their_shape: &[usize]) -> Self {
        let part = Part { name: Some(theirs.into()), shape: their_shape.to_vec() };
        Self { name: name.into(), shape: shape.to_vec(), parts: vec![part] }
    }
}

/// A tensor to be written: pieces of mapped files, and zeros.
#[derive(Clone, Debug)]
pub struct Piece<'a> {
    dtype: Dtype,
    shape: Vec<usize>,
    chunks: Vec<Cow<'a, [u8]>>,
}

impl View for Piece<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    /// Only here are the pieces brought together: one tensor at a time is in memory.
    fn data(&self) -> Cow<'_, [u8]> {
        match self.chunks.as_slice() {
            [whole] => Cow::Borrowed(whole),
            chunks => chunks.concat().into(),
        }
    }
    fn data_len(&self) -> usize {
        self.chunks.iter().map(|c| c.len()).sum()
    }
}

/// Everything that does not fit, in one error.
fn refuse(path: &Path, what: &str, problems: Vec<String>, help: &str) -> Result<()> {
    const SHOWN: usize = 24;
    if problems.is_empty() {
        return Ok(());
    }
    let list: String = problems.iter().take(SHOWN).map(|p| format!("\n    {p}")).collect();
    let more = problems.len().saturating_sub(SHOWN);
    let more = if more > 0 { format!("\n    and {more} more") } else { String::new() };
    Err(Error::content(path, format!("{what}: {} problems{list}{more}", problems.len()), help))
}

/// Tensors of a published layout as dinolab's. Every tensor of the files has to be used by a rule, or to be one of
/// `unused`.
///
/// # Errors
/// If tensors are missing, too many, or of another shape: all are listed.
pub fn from_published<'a>(
    files: &'a TensorFiles,
    rules: &[Rule],
    unused: impl Fn(&str) -> bool,
) -> Result<Vec<(String, Piece<'a>)>> {
    let mut problems = Vec::new();
    let mut used = BTreeSet::new();
    let mut pieces = Vec::new();
    for rule in rules {
        let mut dtype = None;
        let mut found = Vec::new();
        for part in &rule.parts {
            let Some(name) = &part.name else {
                found.push(None);
                continue;
            };
            used.insert(name.as_str());
            match files.get(name) {
                None => problems.push(format!("missing {name} {:?}", part.shape)),
                Some(t) if t.shape != part.shape => {
                    problems.push(format!("{name} is {:?}, expected {:?}", t.shape, part.shape));
                }
                Some(t) if !matches!(t.dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16) => {
                    problems.push(format!("{name} is of type {:?}, expected floats of 16, 32 or 64 bits", t.dtype));
                }
                Some(t) if *dtype.get_or_insert(t.dtype) != t.dtype => {
                    problems.push(format!("{name} is of type {:?}, other parts of {} are not", t.dtype, rule.name));
                }
                Some(t) => found.push(Some(t.bytes)),
            }
        }
        let (Some(dtype), true) = (dtype, found.len() == rule.parts.len()) else { continue };
        let chunks = rule.parts.iter().zip(found).map(|(part, bytes)| match bytes {
            Some(bytes) => Cow::Borrowed(bytes),
            None => vec![0; part.shape.iter().product::<usize>() * dtype.bitsize() / 8].into(),
        });
        let piece = Piece { dtype, shape: rule.shape.clone(), chunks: chunks.collect() };
        pieces.push((rule.name.clone(), piece));
    }
    let extra = files.names().filter(|name| !used.contains(name) && !unused(name));
    problems.extend(
        extra.map(|name| format!("not part of the model: {name} {:?}", files.get(name).map_or(&[][..], |t| t.shape))),
    );
    let help = "check that the configuration beside the file is its own, and that the download is whole";
    refuse(files.path(), "not the tensors of this model", problems, help)?;
    Ok(pieces)
}

/// Dinolab's tensors, found in the files as `<prefix><name>`, as those of a published layout. Parts without a name there
/// are left out.
///
/// # Errors
/// If tensors are missing or of another shape: all are listed.
pub fn to_published<'a>(files: &'a TensorFiles, prefix: &str, rules: &[Rule]) -> Result<Vec<(String, Piece<'a>)>> {
    let mut problems = Vec::new();
    let mut pieces = Vec::new();
    for rule in rules {
        let tensor = match files.get(&format!("{prefix}{}", rule.name)) {
            None => {
                problems.push(format!("missing {prefix}{} {:?}", rule.name, rule.shape));
                continue;
            }
            Some(t) if t.shape != rule.shape => {
                problems.push(format!("{prefix}{} is {:?}, expected {:?}", rule.name, t.shape, rule.shape));
                continue;
            }
            Some(t) => t,
        };
        let mut rest = tensor.bytes;
        for part in &rule.parts {
            let (bytes, after) = rest.split_at(part.shape.iter().product::<usize>() * tensor.dtype.bitsize() / 8);
            rest = after;
            if let Some(name) = &part.name {
                let piece =
                    Piece { dtype: tensor.dtype, shape: part.shape.clone(), chunks: vec![Cow::Borrowed(bytes)] };
                pieces.push((name.clone(), piece));
            }
        }
        assert!(rest.is_empty(), "the parts of {} are the whole of it", rule.name);
    }
    refuse(files.path(), "not the tensors of this model", problems, "name a run or weights of the same model")?;
    Ok(pieces)
}

/// The tensors whose names begin with `prefix`, without it.
pub fn without_prefix<'a>(files: &'a TensorFiles, prefix: &str) -> Vec<(String, Piece<'a>)> {
    let inside = files.names().filter_map(|name| Some((name.strip_prefix(prefix)?, files.get(name)?)));
    let piece = |t: super::RawTensor<'a>| Piece {
        dtype: t.dtype,
        shape: t.shape.to_vec(),
        chunks: vec![Cow::Borrowed(t.bytes)],
    };
    inside.map(|(name, tensor)| (name.to_string(), piece(tensor))).collect()
}
