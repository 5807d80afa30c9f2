//! Golden files: numbers of the public PyTorch reference, and the comparison with them.
//!
//! A file is found by its name in `tests/golden`, or in the folder that the environment variable `DINOLAB_GOLDEN` names;
//! its shapes, options and tolerances are read from the file itself.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use dinolab_core::tensor::Real;
use dinolab_core::{dispatch_real, DType, Tensor};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// A file of tensors with what its metadata says about them.
pub struct Golden {
    name: String,
    /// The options that the reference ran with.
    pub options: Value,
    tolerances: Value,
    f32_errors: Value,
    kinds: Value,
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, (Vec<usize>, Vec<f64>)>,
}

impl Golden {
    /// The file `<name>.safetensors`; `None` if a folder given by `DINOLAB_GOLDEN` does not have it.
    pub fn open(name: &str) -> Option<Self> {
        let given = std::env::var_os("DINOLAB_GOLDEN").map(PathBuf::from);
        let folder = given.clone().unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden"));
        let path = folder.join(format!("{name}.safetensors"));
        if given.is_some() && !path.exists() {
            eprintln!("{} does not exist: nothing to compare", path.display());
            return None;
        }
        let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let metadata = header.metadata().clone().expect("a golden file has metadata");
        let json = |key: &str| serde_json::from_str(&metadata[key]).unwrap();
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
        Some(Self {
            name: name.into(),
            options: json("options"),
            tolerances: json("tolerances"),
            f32_errors: json("f32_error"),
            kinds: json("kinds"),
            metadata: metadata.into_iter().collect(),
            tensors: tensors.collect(),
        })
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
        &self.tensors.get(tensor).unwrap_or_else(|| panic!("{} has no {tensor}", self.name)).0
    }

    pub fn values(&self, tensor: &str) -> &[f64] {
        &self.tensors.get(tensor).unwrap_or_else(|| panic!("{} has no {tensor}", self.name)).1
    }

    pub fn tensor(&self, tensor: &str, dtype: DType) -> Tensor {
        Tensor::from_f64(self.values(tensor), self.shape(tensor), dtype).unwrap()
    }

    /// The number at a JSON pointer of the options, or `default` where the file does not say.
    pub fn number(&self, pointer: &str, default: Option<f64>) -> f64 {
        let found = self.options.pointer(pointer).and_then(Value::as_f64).or(default);
        found.unwrap_or_else(|| panic!("{}: the options have no {pointer}: {}", self.name, self.options))
    }

    /// Another JSON value of the metadata.
    pub fn metadata(&self, key: &str) -> Value {
        let text = self.metadata.get(key).unwrap_or_else(|| panic!("{} has no {key}", self.name));
        serde_json::from_str(text).unwrap()
    }

    /// Starts a comparison in `dtype`.
    pub fn compare(&self, dtype: DType) -> Comparison<'_> {
        Comparison { golden: self, dtype, seen: BTreeSet::new(), failures: Vec::new() }
    }
}

/// Collects errors, prints them as a table, and fails at the end if one is too large or an output was left out.
pub struct Comparison<'a> {
    golden: &'a Golden,
    dtype: DType,
    seen: BTreeSet<String>,
    failures: Vec<String>,
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
        let case = &self.golden.name;
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
        println!("{case:16} {tensor:28} {:?} {error:9.1e} {tolerance:9.1e}", self.dtype);
        if error.is_nan() || error > tolerance {
            self.failures.push(format!("{tensor}: {error:e} > {tolerance:e}"));
        }
        self.seen.insert(tensor.to_string());
    }

    /// Fails if a tensor was off or an output of the file was not compared.
    pub fn finish(self) {
        let kinds = self.golden.kinds.as_object().expect("kinds are a JSON object");
        let outputs = kinds.iter().filter(|(_, kind)| *kind == "output" || *kind == "grad").map(|(name, _)| name);
        let missed: Vec<_> = outputs.filter(|name| !self.seen.contains(*name)).collect();
        let case = &self.golden.name;
        assert!(missed.is_empty(), "{case}: not compared: {missed:?}");
        assert!(self.failures.is_empty(), "{case} in {:?}: {:#?}", self.dtype, self.failures);
    }
}

/// Runs `compare` on the file `name`, in f32 and in f64.
pub fn for_both_types(name: &str, compare: impl Fn(&Golden, DType, &mut Comparison<'_>)) {
    let Some(golden) = Golden::open(name) else { return };
    for dtype in [DType::F32, DType::F64] {
        let mut comparison = golden.compare(dtype);
        compare(&golden, dtype, &mut comparison);
        comparison.finish();
    }
}
