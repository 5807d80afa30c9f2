//! Golden files: numbers of the public PyTorch reference, and the comparison with them.
//!
//! Files are found in `tests/golden`, or in the folder that the environment variable `DINOLAB_GOLDEN` names. What a file
//! is about, its shapes, options and tolerances are read from the file itself.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use dinolab_core::tensor::Real;
use dinolab_core::{dispatch_real, DType, Tensor};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// The folder of golden files, and whether the environment gave it.
pub fn folder() -> (PathBuf, bool) {
    match std::env::var_os("DINOLAB_GOLDEN") {
        Some(given) => (given.into(), true),
        None => (PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden"), false),
    }
}

/// A file of tensors with what its metadata says about them.
pub struct Golden {
    /// What the file is about: `vit_mlp`.
    pub case: String,
    /// The file.
    pub path: PathBuf,
    /// The options that the reference ran with.
    pub options: Value,
    tolerances: Value,
    f32_errors: Value,
    kinds: Value,
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, (Vec<usize>, Vec<f64>)>,
}

impl Golden {
    /// Every file of the folder, by name.
    pub fn all() -> Vec<PathBuf> {
        let (folder, _) = folder();
        let entries = std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        let paths = entries.map(|entry| entry.unwrap().path());
        let mut paths: Vec<_> = paths.filter(|p| p.extension().is_some_and(|e| e == "safetensors")).collect();
        paths.sort();
        assert!(!paths.is_empty(), "{} has no safetensors files", folder.display());
        paths
    }

    /// What the file is about.
    pub fn case_of(path: &Path) -> String {
        Self::open(path).case
    }

    /// Reads a file.
    pub fn open(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let name = path.display();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap_or_else(|e| panic!("{name}: {e}"));
        let metadata = header.metadata().clone().unwrap_or_else(|| panic!("{name} has no metadata"));
        let text = |key: &str| metadata.get(key).unwrap_or_else(|| panic!("{name}: the metadata has no {key}"));
        let json = |key: &str| serde_json::from_str(text(key)).unwrap_or_else(|e| panic!("{name}: {key}: {e}"));
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensors = file.tensors().into_iter().map(|(tensor, view)| {
            let data = view.data();
            let values = match view.dtype() {
                Dtype::F32 => data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()).into()).collect(),
                Dtype::F64 => data.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect(),
                Dtype::I64 => data.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f64).collect(),
                Dtype::U8 => data.iter().map(|&b| b.into()).collect(),
                other => panic!("{name}: {tensor} is {other:?}"),
            };
            (tensor, (view.shape().to_vec(), values))
        });
        Self {
            case: text("case").clone(),
            path: path.into(),
            options: json("options"),
            tolerances: json("tolerances"),
            f32_errors: json("f32_error"),
            kinds: json("kinds"),
            metadata: metadata.into_iter().collect(),
            tensors: tensors.collect(),
        }
    }

    /// The names of all tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Everything before `suffix` in the names that end so.
    pub fn prefixes<'a>(&'a self, suffix: &'a str) -> impl Iterator<Item = &'a str> {
        self.names().filter_map(move |name| name.strip_suffix(suffix))
    }

    pub fn has(&self, tensor: &str) -> bool {
        self.tensors.contains_key(tensor)
    }

    pub fn shape(&self, tensor: &str) -> &[usize] {
        &self.tensors.get(tensor).unwrap_or_else(|| panic!("{} has no {tensor}", self.case)).0
    }

    pub fn values(&self, tensor: &str) -> &[f64] {
        &self.tensors.get(tensor).unwrap_or_else(|| panic!("{} has no {tensor}", self.case)).1
    }

    pub fn tensor(&self, tensor: &str, dtype: DType) -> Tensor {
        Tensor::from_f64(self.values(tensor), self.shape(tensor), dtype).unwrap()
    }

    /// The number at a JSON pointer of the options, or `default` where the file does not say.
    pub fn number(&self, pointer: &str, default: Option<f64>) -> f64 {
        let found = self.options.pointer(pointer).and_then(Value::as_f64).or(default);
        found.unwrap_or_else(|| panic!("{}: the options have no {pointer}: {}", self.case, self.options))
    }

    /// Another JSON value of the metadata.
    pub fn metadata(&self, key: &str) -> Value {
        let text = self.metadata.get(key).unwrap_or_else(|| panic!("{} has no {key}", self.case));
        serde_json::from_str(text).unwrap()
    }

    /// The tensors that are to be compared.
    fn claims(&self) -> impl Iterator<Item = &str> {
        let kinds = self.kinds.as_object().expect("kinds are a JSON object");
        kinds.iter().filter(|(_, kind)| *kind == "output" || *kind == "grad").map(|(name, _)| name.as_str())
    }

    /// Starts a comparison in `dtype`.
    pub fn compare(&self, dtype: DType) -> Comparison<'_> {
        Comparison { golden: self, dtype, rows: Vec::new() }
    }
}

/// One tensor compared.
#[derive(Clone, Debug)]
pub struct Row {
    pub case: String,
    pub tensor: String,
    pub dtype: DType,
    /// |got - stored| / |stored|, or |got| where all stored numbers are 0; not a number if it was never compared.
    pub error: f64,
    pub tolerance: f64,
}

impl Row {
    pub fn holds(&self) -> bool {
        self.error <= self.tolerance
    }
}

/// Collects errors; at the end, whatever was left out is one too.
pub struct Comparison<'a> {
    golden: &'a Golden,
    dtype: DType,
    rows: Vec<Row>,
}

/// What f64 has to reach: the stored values are rounded to f32.
const F64_TOLERANCE: f64 = 1e-6;

impl Comparison<'_> {
    /// Compares a tensor's elements, whatever its shape.
    pub fn check(&mut self, tensor: &str, got: &Tensor) {
        let got = match got.dtype() {
            DType::U32 => got.to_f64_vec(),
            dtype => {
                dispatch_real!("check", dtype, T => Ok(got.as_slice::<T>().iter().map(|x| x.f64()).collect())).unwrap()
            }
        };
        self.check_values(tensor, &got);
    }

    /// Compares numbers: |got - stored| / |stored|, or |got| where all stored numbers are 0.
    pub fn check_values(&mut self, tensor: &str, got: &[f64]) {
        let case = &self.golden.case;
        let want = self.golden.values(tensor);
        assert_eq!(got.len(), want.len(), "{case}: {tensor} has another length");
        let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
        let size = norm(&mut want.iter().copied());
        let difference = norm(&mut got.iter().zip(want).map(|(a, b)| a - b));
        let stored =
            self.golden.tolerances[tensor].as_f64().unwrap_or_else(|| panic!("{case}: no tolerance of {tensor}"));
        let tolerance = match self.dtype {
            _ if size == 0.0 && stored > 0.0 => 1e-6,
            // A sum that cancels magnifies the rounding of stored inputs; the reference's own f32 error says how much.
            DType::F64 => stored.min(F64_TOLERANCE.max(self.golden.f32_errors[tensor].as_f64().unwrap_or(0.0))),
            _ => stored,
        };
        let error = if size == 0.0 { difference } else { difference / size };
        let (case, tensor) = (case.clone(), tensor.to_string());
        self.rows.push(Row { case, tensor, dtype: self.dtype, error, tolerance });
    }

    /// All rows, and one that does not hold for every output and gradient of the file that was not compared.
    pub fn finish(mut self) -> Vec<Row> {
        let missed = self.golden.claims().filter(|name| !self.rows.iter().any(|row| row.tensor == *name));
        let missed = missed.map(|name| Row {
            case: self.golden.case.clone(),
            tensor: name.into(),
            dtype: self.dtype,
            error: f64::NAN,
            tolerance: 0.0,
        });
        let missed: Vec<Row> = missed.collect();
        self.rows.extend(missed);
        self.rows
    }
}
