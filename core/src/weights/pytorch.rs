//! PyTorch's own files (`.pth`, `.pt`): pickles, of which the tensors are read as data. Nothing in them is executed.

use std::borrow::Cow;
use std::cell::RefCell;
use std::io;
use std::path::Path;

use pytorch_reader::{DType, PytorchReader, Tensor};
use safetensors::tensor::View;
use safetensors::Dtype;

use super::TensorFiles;
use crate::files::write_pieces;
use crate::files::Really;
use crate::{Error, Result};

/// A tensor that is read when it is written.
struct Lazy<'a> {
    tensor: &'a Tensor,
    /// What went wrong first: a view of safetensors has no words for it.
    failed: &'a RefCell<Option<io::Error>>,
}

impl View for Lazy<'_> {
    fn dtype(&self) -> Dtype {
        match self.tensor.dtype() {
            DType::F64 => Dtype::F64,
            DType::F32 => Dtype::F32,
            DType::F16 => Dtype::F16,
            DType::BF16 => Dtype::BF16,
            DType::I64 => Dtype::I64,
            DType::I32 => Dtype::I32,
            DType::I16 => Dtype::I16,
            DType::I8 => Dtype::I8,
            DType::U64 => Dtype::U64,
            DType::U32 => Dtype::U32,
            DType::U16 => Dtype::U16,
            DType::U8 => Dtype::U8,
            DType::Bool => Dtype::BOOL,
        }
    }

    fn shape(&self) -> &[usize] {
        self.tensor.shape()
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let bytes = self.tensor.read().unwrap_or_else(|error| {
            self.failed.borrow_mut().get_or_insert(error);
            vec![0; self.tensor.byte_len()]
        });
        bytes.into()
    }

    fn data_len(&self) -> usize {
        self.tensor.byte_len()
    }
}

impl TensorFiles {
    /// The tensors of a PyTorch file: see [`published`](Self::published).
    pub(super) fn unpickle(path: &Path, beside: &Path) -> Result<Self> {
        let wrong = |problem: String| {
            let help =
                "download it again; or let PyTorch read it (`weights_only=True`) and save its tensors with safetensors";
            Error::content(path, format!("as a PyTorch file: {problem}"), help)
        };
        let reader = PytorchReader::new(path).map_err(|e| match Really::at(path) {
            Some(other) if !other.is_pytorch() => other.error(path, "a PyTorch file"),
            _ => wrong(e.to_string()),
        })?;
        if reader.is_empty() {
            return Err(wrong("there is no tensor in it".into()));
        }
        let failed = RefCell::new(None);
        let copy = tempfile::tempdir_in(beside).map_err(Error::io("write", beside))?;
        let file = copy.path().join("tensors.safetensors");
        let lazy = reader.tensors().iter().map(|(name, tensor)| (name, Lazy { tensor, failed: &failed }));
        write_pieces(&file, lazy, &[])?;
        if let Some(error) = failed.into_inner() {
            return Err(wrong(error.to_string()));
        }
        // What is mapped stays readable when the file is gone.
        let mut files = Self::open(&file)?;
        files.path = path.into();
        Ok(files)
    }
}
