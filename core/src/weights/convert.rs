//! Between dinolab's names and those of a published layout, tensor by tensor.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::path::Path;

use safetensors::tensor::{Dtype, View};

use crate::files::{floats, RawTensor, TensorFiles};
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

/// A tensor to be written: pieces of mapped files, and zeros, of one type.
#[derive(Clone, Debug)]
pub struct Piece<'a> {
    dtype: Dtype,
    shape: Vec<usize>,
    chunks: Vec<Chunk<'a>>,
}

/// A part of a tensor to be written.
#[derive(Clone, Copy, Debug)]
enum Chunk<'a> {
    /// As it lies in a file, of whatever float type.
    Stored(Dtype, &'a [u8]),
    /// So many zeros.
    Zeros(usize),
}

impl<'a> Piece<'a> {
    fn whole(dtype: Dtype, shape: &[usize], bytes: &'a [u8]) -> Self {
        Self { dtype, shape: shape.to_vec(), chunks: vec![Chunk::Stored(dtype, bytes)] }
    }
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
        match self.chunks[..] {
            [Chunk::Stored(dtype, bytes)] if dtype == self.dtype => Cow::Borrowed(bytes),
            ref chunks => {
                let mut bytes = Vec::with_capacity(self.data_len());
                chunks.iter().for_each(|chunk| chunk.write(self.dtype, &mut bytes));
                bytes.into()
            }
        }
    }
    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

impl Chunk<'_> {
    /// Its elements as `dtype`, which holds each of them exactly.
    fn write(&self, dtype: Dtype, out: &mut Vec<u8>) {
        match *self {
            Self::Zeros(n) => out.resize(out.len() + n * dtype.bitsize() / 8, 0),
            Self::Stored(from, bytes) if from == dtype => out.extend(bytes),
            Self::Stored(from, bytes) => {
                let values = floats(from, bytes).expect("only floats are pieces");
                match dtype {
                    Dtype::F64 => values.for_each(|x| out.extend(x.to_le_bytes())),
                    _ => values.for_each(|x| out.extend((x as f32).to_le_bytes())),
                }
            }
        }
    }
}

/// The narrowest float type that holds the numbers of both: f32 for the two of 16 bits.
fn widest(a: Dtype, b: Dtype) -> Dtype {
    match (a, b) {
        (a, b) if a == b => a,
        (Dtype::F64, _) | (_, Dtype::F64) => Dtype::F64,
        _ => Dtype::F32,
    }
}

/// What keeps a tensor from being a weight: its type, or what is in it.
fn unfit(name: &str, tensor: &RawTensor<'_>) -> Option<String> {
    if tensor.values().is_none() {
        return Some(format!("{name} is of type {:?}, expected floats of 16, 32 or 64 bits", tensor.dtype));
    }
    let (bad, all) = (tensor.non_finite(), tensor.shape.iter().product::<usize>());
    (bad > 0).then(|| format!("{name} has {bad} of {all} numbers that are not finite (NaN or infinite)"))
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

/// Tensors of a published layout as dinolab's, in their own float type; parts of other types than their neighbours in the
/// widest of them. Every tensor of the files has to be used by a rule, or to be one of
/// `unused`. `said_by` names what describes the model, for messages.
///
/// # Errors
/// If tensors are missing, too many, of another shape, no floats or not finite: all are listed.
pub fn from_published<'a>(
    files: &'a TensorFiles,
    rules: &[Rule],
    unused: impl Fn(&str) -> bool,
    said_by: &str,
) -> Result<Vec<(String, Piece<'a>)>> {
    let mut problems = Vec::new();
    let mut used = BTreeSet::new();
    let mut pieces = Vec::new();
    for rule in rules {
        let mut dtype = None;
        let mut chunks = Vec::new();
        for part in &rule.parts {
            let Some(name) = &part.name else {
                chunks.push(Chunk::Zeros(part.shape.iter().product()));
                continue;
            };
            used.insert(name.as_str());
            match files.get(name) {
                None => problems.push(format!("missing {name} {:?}", part.shape)),
                Some(t) if t.shape != part.shape => {
                    problems.push(format!("{name} is {:?}, expected {:?}", t.shape, part.shape));
                }
                Some(t) => match unfit(name, &t) {
                    Some(problem) => problems.push(problem),
                    None => {
                        dtype = Some(dtype.map_or(t.dtype, |other| widest(other, t.dtype)));
                        chunks.push(Chunk::Stored(t.dtype, t.bytes));
                    }
                },
            }
        }
        let (Some(dtype), true) = (dtype, chunks.len() == rule.parts.len()) else { continue };
        pieces.push((rule.name.clone(), Piece { dtype, shape: rule.shape.clone(), chunks }));
    }
    let extra = files.names().filter(|name| !used.contains(name) && !unused(name));
    problems.extend(
        extra.map(|name| format!("not part of the model: {name} {:?}", files.get(name).map_or(&[][..], |t| t.shape))),
    );
    let help =
        "take weights that were trained to the end and saved whole, in floats, with the configuration that belongs \
        to them";
    refuse(files.path(), &format!("not the tensors of the model that {said_by} says"), problems, help)?;
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
        if let Some(problem) = unfit(&rule.name, &tensor) {
            problems.push(problem);
            continue;
        }
        let mut rest = tensor.bytes;
        for part in &rule.parts {
            let (bytes, after) = rest.split_at(part.shape.iter().product::<usize>() * tensor.dtype.bitsize() / 8);
            rest = after;
            if let Some(name) = &part.name {
                pieces.push((name.clone(), Piece::whole(tensor.dtype, &part.shape, bytes)));
            }
        }
        assert!(rest.is_empty(), "the parts of {} are the whole of it", rule.name);
    }
    refuse(
        files.path(),
        "not the tensors of this model",
        problems,
        "take an earlier checkpoint of the run, or weights of the model that the folder says",
    )?;
    Ok(pieces)
}

/// The tensors whose names begin with `prefix`, without it.
///
/// # Errors
/// If one is not of floats, or not finite.
pub fn without_prefix<'a>(files: &'a TensorFiles, prefix: &str) -> Result<Vec<(String, Piece<'a>)>> {
    let inside = files.names().filter_map(|name| Some((name.strip_prefix(prefix)?, files.get(name)?)));
    let inside: Vec<(&str, RawTensor<'a>)> = inside.collect();
    let problems = inside.iter().filter_map(|(name, tensor)| unfit(name, tensor)).collect();
    refuse(files.path(), "these are no weights to be used", problems, "take an earlier checkpoint of the run")?;
    Ok(inside.into_iter().map(|(name, t)| (name.to_string(), Piece::whole(t.dtype, t.shape, t.bytes))).collect())
}
