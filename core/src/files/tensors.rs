//! Files of tensors: a header that is held against the file, and the tensors read and written.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use safetensors::tensor::{Dtype, View};
use safetensors::SafeTensors;

use super::atomic::shared;
use super::json::twice;
use super::{Really, TensorFiles};
use crate::text::printable;
use crate::{DType, Error, Result, Tensor};

/// The tensors of a safetensors file, given as its bytes. Every offset lies inside the file, none overlap, shapes and
/// types have the sizes that they claim, and no name is given twice.
///
/// # Errors
/// If it is something else, or damaged.
pub fn parse_safetensors<'a>(path: &Path, bytes: &'a [u8]) -> Result<SafeTensors<'a>> {
    let broken = |what: String| {
        let problem = format!("not a whole safetensors file of {} bytes ({what})", bytes.len());
        Error::content(path, problem, "copy or download it again")
    };
    let parsed = SafeTensors::deserialize(bytes).map_err(|e| match Really::of(bytes) {
        Some(other) => other.error(path, "a safetensors file"),
        None => broken(e.to_string()),
    })?;
    // The library takes the last of two entries of a name.
    let (header, _) = SafeTensors::read_metadata(bytes).map_err(|e| broken(e.to_string()))?;
    if let Some(name) = twice(&bytes[8..8 + header]) {
        return Err(broken(format!("`{}` is in its header twice", printable(name))));
    }
    // So that names can be shown wherever they are met.
    let odd = parsed.names().into_iter().map(|name| (printable(name), name)).find(|(shown, name)| shown != name);
    match odd {
        Some((shown, _)) => Err(broken(format!("`{shown}` is no name of a tensor"))),
        None => Ok(parsed),
    }
}

/// Named tensors read from a file.
#[derive(Debug, Default)]
pub struct NamedTensors {
    pub(super) tensors: BTreeMap<String, Tensor>,
    /// The file's own metadata.
    pub metadata: BTreeMap<String, String>,
}

struct Bytes<'a>(&'a Tensor);

impl NamedTensors {
    /// Those whose names begin with `prefix`, by the rest of their names.
    pub fn with_prefix(&self, prefix: &str) -> Vec<(String, Tensor)> {
        let all = self.tensors.iter();
        all.filter_map(|(name, tensor)| Some((name.strip_prefix(prefix)?.to_string(), tensor.clone()))).collect()
    }
}

impl From<DType> for Dtype {
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::F32 => Self::F32,
            DType::F64 => Self::F64,
            DType::BF16 => Self::BF16,
            DType::U32 => Self::U32,
        }
    }
}

impl View for Bytes<'_> {
    fn dtype(&self) -> Dtype {
        self.0.dtype().into()
    }
    fn shape(&self) -> &[usize] {
        self.0.shape()
    }
    fn data(&self) -> Cow<'_, [u8]> {
        self.0.as_bytes().into()
    }
    fn data_len(&self) -> usize {
        self.0.as_bytes().len()
    }
}

/// Writes tensors to a safetensors file and flushes it to the disk.
///
/// # Errors
/// If the file cannot be written; a full disk is named as such.
pub fn write_tensors(path: &Path, tensors: &[(String, Tensor)], metadata: &[(&str, String)]) -> Result<()> {
    write_pieces(path, tensors.iter().map(|(name, tensor)| (name, Bytes(tensor))), metadata)
}

/// Writes named pieces to a safetensors file, one after the other, and flushes it to the disk.
///
/// # Errors
/// As [`write_tensors`].
pub fn write_pieces<S: AsRef<str> + Ord + std::fmt::Display, V: View>(
    path: &Path,
    pieces: impl IntoIterator<Item = (S, V)>,
    metadata: &[(&str, String)],
) -> Result<()> {
    let metadata: std::collections::HashMap<_, _> = metadata.iter().map(|(k, v)| (k.to_string(), v.clone())).collect();
    let several = metadata.len() > 1;
    let metadata = Some(metadata).filter(|m| !m.is_empty());
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // The library's own temporary file can be read by its owner alone: it takes the place, and gets the permissions, of an
    // ordinary one.
    let place = shared(0o666).tempfile_in(folder).map_err(Error::io("write", path))?;
    let permissions = place.as_file().metadata().map_err(Error::io("write", path))?.permissions();
    safetensors::serialize_to_file(pieces, metadata, place.path()).map_err(|e| match e {
        safetensors::SafeTensorError::IoError(source) => Error::Io { action: "write", path: path.into(), source },
        other => Error::content(path, other.to_string(), "this is a defect: please report it"),
    })?;
    if several {
        sort_metadata(place.path()).map_err(Error::io("write", path))?;
    }
    fs::set_permissions(place.path(), permissions).map_err(Error::io("write", path))?;
    fs::File::open(place.path()).and_then(|f| f.sync_all()).map_err(Error::io("flush", path))?;
    place.persist(path).map(drop).map_err(|e| Error::io("write", path)(e.error))
}

/// Puts the metadata of a safetensors file, which the library writes in random order, into that of its keys: equal content is
/// equal bytes.
fn sort_metadata(path: &Path) -> std::io::Result<()> {
    let mut file = fs::File::options().read(true).write(true).open(path)?;
    let mut length = [0; 8];
    file.read_exact(&mut length)?;
    let mut header = vec![0; u64::from_le_bytes(length) as usize];
    file.read_exact(&mut header)?;
    let mut entries: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&header)?;
    if let Some(serde_json::Value::Object(metadata)) = entries.get_mut("__metadata__") {
        metadata.sort_keys();
    }
    let mut sorted = serde_json::to_vec(&entries)?;
    // Spaces up to a multiple of eight bytes, as before.
    sorted.resize(header.len(), b' ');
    file.seek(SeekFrom::Start(8))?;
    file.write_all(&sorted)
}

/// Reads every tensor of a safetensors file.
///
/// # Errors
/// If the file cannot be read or is cut off.
pub fn read_tensors(path: &Path) -> Result<NamedTensors> {
    let mut file = TensorFiles::none_of(path);
    file.add(path)?;
    file.read_all()
}

/// A tensor of these bytes; f16 widens to f32, other integers than u32 and booleans become u32.
pub(super) fn to_tensor(path: &Path, dtype: Dtype, shape: &[usize], data: &[u8]) -> Result<Tensor> {
    macro_rules! read {
        ($from:ty, $to:ty, $convert:expr) => {{
            let values: Vec<$to> = data
                .chunks_exact(size_of::<$from>())
                .map(|b| $convert(<$from>::from_le_bytes(b.try_into().expect("chunks are exact"))))
                .collect();
            Tensor::from_slice(&values, shape)
        }};
    }
    match dtype {
        Dtype::F32 => read!(f32, f32, |x| x),
        Dtype::F64 => read!(f64, f64, |x| x),
        Dtype::BF16 => read!(u16, half::bf16, half::bf16::from_bits),
        Dtype::F16 => read!(u16, f32, |x| half::f16::from_bits(x).to_f32()),
        Dtype::U32 => read!(u32, u32, |x| x),
        Dtype::I64 if data.chunks_exact(8).all(|b| b[4..] == [0; 4]) => read!(i64, u32, |x| x as u32),
        Dtype::U8 | Dtype::BOOL => read!(u8, u32, u32::from),
        other => {
            let problem = format!("tensors of type {other:?} are not supported, or numbers of it are too large");
            Err(Error::content(path, problem, "take weights in f32, bf16 or f16"))
        }
    }
}

impl NamedTensors {
    /// The tensor of that name.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// All names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether some name begins with `prefix`.
    pub fn has(&self, prefix: &str) -> bool {
        self.names().any(|n| n.starts_with(prefix))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_tensors_and_metadata_are_equal_files() {
        let folder = tempfile::tempdir().unwrap();
        let about: Vec<(&str, String)> =
            ["weights", "image", "size", "a \"b\""].map(|key| (key, format!("{key}/é"))).into();
        let files = [0, 1, 2, 3].map(|i| {
            let path = folder.path().join(i.to_string());
            let tensor = Tensor::from_slice(&[1.0f32, 2.0], &[2]).unwrap();
            write_tensors(&path, &[("x".into(), tensor)], &about).unwrap();
            assert_eq!(read_tensors(&path).unwrap().tensors["x"].to_f64_vec(), [1.0, 2.0]);
            fs::read(path).unwrap()
        });
        assert!(files.iter().all(|file| *file == files[0]));
        let (_, header) = SafeTensors::read_metadata(&files[0]).unwrap();
        assert_eq!(header.metadata().as_ref().unwrap()["size"], "size/é");
    }
}
