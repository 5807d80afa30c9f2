//! Graphs of ONNX: the messages of `onnx.proto` that an export needs, and a builder of nodes.
//!
//! The messages are stated by hand for `prost` (field numbers of ONNX's own `onnx.proto`, IR version 8), so that nothing is
//! generated when the crate is built.

use std::collections::BTreeMap;
use std::f64::consts::SQRT_2;

use dinolab_core::params::ParamSpec;
use dinolab_core::weights::{Preprocessing, TensorFiles};
use dinolab_core::{Error, Result};
use prost::Message;

/// The set of operators that graphs are of: the first with `LayerNormalization`.
const OPSET: i64 = 17;
/// Version of the format that belongs to it.
const IR_VERSION: i64 = 8;
/// Element types.
const FLOAT: i32 = 1;
const INT64: i32 = 7;

/// Bytes that a file of protocol buffers may have.
const MOST_BYTES: usize = i32::MAX as usize;
/// The end of an axis, however long.
pub(crate) const END: i64 = i64::MAX;

/// Fails if a model with these parameters is too large for one file.
///
/// # Errors
/// If it is.
pub(crate) fn check_size(specs: &[ParamSpec]) -> Result<()> {
    let bytes = specs.iter().map(|spec| 4 * spec.shape.iter().product::<usize>()).sum::<usize>();
    if bytes <= MOST_BYTES {
        return Ok(());
    }
    let problem = format!("an ONNX file has at most 2 GiB, and the weights of this model in f32 {bytes} bytes");
    Err(Error::user(problem, "export it with --format hf or safetensors"))
}

#[derive(Clone, PartialEq, Message)]
struct ModelProto {
    #[prost(int64, tag = "1")]
    ir_version: i64,
    #[prost(string, tag = "2")]
    producer_name: String,
    #[prost(string, tag = "3")]
    producer_version: String,
    #[prost(message, optional, tag = "7")]
    graph: Option<GraphProto>,
    #[prost(message, repeated, tag = "8")]
    opset_import: Vec<OperatorSetIdProto>,
    #[prost(message, repeated, tag = "14")]
    metadata_props: Vec<StringStringEntryProto>,
}

#[derive(Clone, PartialEq, Message)]
struct OperatorSetIdProto {
    #[prost(string, tag = "1")]
    domain: String,
    #[prost(int64, tag = "2")]
    version: i64,
}

#[derive(Clone, PartialEq, Message)]
struct StringStringEntryProto {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(string, tag = "2")]
    value: String,
}

#[derive(Clone, PartialEq, Message)]
struct GraphProto {
    #[prost(message, repeated, tag = "1")]
    node: Vec<NodeProto>,
    #[prost(string, tag = "2")]
    name: String,
    #[prost(message, repeated, tag = "5")]
    initializer: Vec<TensorProto>,
    #[prost(message, repeated, tag = "11")]
    input: Vec<ValueInfoProto>,
    #[prost(message, repeated, tag = "12")]
    output: Vec<ValueInfoProto>,
}

#[derive(Clone, PartialEq, Message)]
struct NodeProto {
    #[prost(string, repeated, tag = "1")]
    input: Vec<String>,
    #[prost(string, repeated, tag = "2")]
    output: Vec<String>,
    #[prost(string, tag = "3")]
    name: String,
    #[prost(string, tag = "4")]
    op_type: String,
    #[prost(message, repeated, tag = "5")]
    attribute: Vec<AttributeProto>,
}

#[derive(Clone, PartialEq, Message)]
struct AttributeProto {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(float, optional, tag = "2")]
    f: Option<f32>,
    #[prost(int64, optional, tag = "3")]
    i: Option<i64>,
    #[prost(bytes = "vec", optional, tag = "4")]
    s: Option<Vec<u8>>,
    #[prost(int64, repeated, tag = "8")]
    ints: Vec<i64>,
    #[prost(int32, tag = "20")]
    r#type: i32,
}

#[derive(Clone, PartialEq, Message)]
struct TensorProto {
    #[prost(int64, repeated, tag = "1")]
    dims: Vec<i64>,
    #[prost(int32, tag = "2")]
    data_type: i32,
    #[prost(string, tag = "8")]
    name: String,
    #[prost(bytes = "vec", tag = "9")]
    raw_data: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct ValueInfoProto {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, optional, tag = "2")]
    r#type: Option<TypeProto>,
}

#[derive(Clone, PartialEq, Message)]
struct TypeProto {
    #[prost(message, optional, tag = "1")]
    tensor_type: Option<TensorTypeProto>,
}

#[derive(Clone, PartialEq, Message)]
struct TensorTypeProto {
    #[prost(int32, tag = "1")]
    elem_type: i32,
    #[prost(message, optional, tag = "2")]
    shape: Option<TensorShapeProto>,
}

#[derive(Clone, PartialEq, Message)]
struct TensorShapeProto {
    #[prost(message, repeated, tag = "1")]
    dim: Vec<DimensionProto>,
}

#[derive(Clone, PartialEq, Message)]
struct DimensionProto {
    #[prost(int64, optional, tag = "1")]
    dim_value: Option<i64>,
    #[prost(string, optional, tag = "2")]
    dim_param: Option<String>,
}

/// An attribute of a node.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Attribute<'a> {
    /// A number.
    Float(f64),
    /// A whole number.
    Int(i64),
    /// Whole numbers.
    Ints(&'a [i64]),
    /// A word.
    Word(&'static str),
}

/// A length of an axis: known, or named and known when the graph runs.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Dim {
    /// Known.
    Is(usize),
    /// Named.
    Any(&'static str),
}

/// A graph in the making. Values are called by the names that its methods give.
pub(crate) struct Graph<'a> {
    graph: GraphProto,
    /// Lists of whole numbers that the graph has already.
    ints: BTreeMap<Vec<i64>, String>,
    files: &'a TensorFiles,
    prefix: String,
}

impl<'a> Graph<'a> {
    /// An empty one, of a model whose tensors are in `files` as `<prefix><name>`.
    pub(crate) fn of(files: &'a TensorFiles, prefix: String) -> Self {
        Self { graph: GraphProto::default(), ints: BTreeMap::new(), files, prefix }
    }

    /// A node with one output.
    pub(crate) fn node(&mut self, op: &str, inputs: &[&str], attributes: &[(&str, Attribute<'_>)]) -> String {
        self.nodes(op, inputs, 1, attributes).remove(0)
    }

    /// A node with several outputs.
    pub(crate) fn nodes(
        &mut self,
        op: &str,
        inputs: &[&str],
        outputs: usize,
        attributes: &[(&str, Attribute<'_>)],
    ) -> Vec<String> {
        let name = format!("{op}_{}", self.graph.node.len());
        let output: Vec<String> =
            (0..outputs).map(|i| if i == 0 { name.clone() } else { format!("{name}_{i}") }).collect();
        let attribute = attributes.iter().map(|&(name, attribute)| {
            let mut proto = AttributeProto { name: name.into(), ..AttributeProto::default() };
            match attribute {
                Attribute::Float(x) => (proto.f, proto.r#type) = (Some(x as f32), 1),
                Attribute::Int(x) => (proto.i, proto.r#type) = (Some(x), 2),
                Attribute::Ints(x) => (proto.ints, proto.r#type) = (x.to_vec(), 7),
                Attribute::Word(x) => (proto.s, proto.r#type) = (Some(x.as_bytes().to_vec()), 3),
            }
            proto
        });
        self.graph.node.push(NodeProto {
            input: inputs.iter().map(ToString::to_string).collect(),
            output: output.clone(),
            name,
            op_type: op.into(),
            attribute: attribute.collect(),
        });
        output
    }

    /// A tensor of the file.
    pub(crate) fn floats(&mut self, name: &str, shape: &[usize], values: impl IntoIterator<Item = f32>) -> String {
        let raw_data = values.into_iter().flat_map(f32::to_le_bytes).collect();
        self.initializer(name.into(), shape, FLOAT, raw_data)
    }

    /// One number.
    pub(crate) fn float(&mut self, value: f64) -> String {
        let name = format!("number_{}", self.graph.initializer.len());
        self.floats(&name, &[], [value as f32])
    }

    /// One whole number.
    pub(crate) fn int(&mut self, value: i64) -> String {
        let name = format!("number_{}", self.graph.initializer.len());
        self.initializer(name, &[], INT64, value.to_le_bytes().to_vec())
    }

    /// A list of whole numbers.
    pub(crate) fn ints(&mut self, values: &[i64]) -> String {
        if let Some(name) = self.ints.get(values) {
            return name.clone();
        }
        let name = format!("list_{}", self.graph.initializer.len());
        let raw_data = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.ints.insert(values.to_vec(), name.clone());
        self.initializer(name, &[values.len()], INT64, raw_data)
    }

    fn initializer(&mut self, name: String, shape: &[usize], data_type: i32, raw_data: Vec<u8>) -> String {
        let dims = shape.iter().map(|&n| n as i64).collect();
        self.graph.initializer.push(TensorProto { dims, data_type, name: name.clone(), raw_data });
        name
    }

    /// What the graph is given.
    pub(crate) fn input(&mut self, name: &str, shape: &[Dim]) {
        self.graph.input.push(value(name, shape));
    }

    /// What the graph gives under a name of its own.
    pub(crate) fn output(&mut self, name: &str, of: &str, shape: &[Dim]) {
        self.graph.node.push(NodeProto {
            input: vec![of.into()],
            output: vec![name.into()],
            name: name.into(),
            op_type: "Identity".into(),
            attribute: Vec::new(),
        });
        self.graph.output.push(value(name, shape));
    }

    /// A tensor of the model under its own name, in f32.
    pub(crate) fn tensor(&mut self, name: &str) -> Result<String> {
        let (shape, values) = self.values(name)?;
        Ok(self.floats(name, &shape, values))
    }

    /// Shape and numbers of a tensor of the model, in f32.
    fn values(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>)> {
        let full = format!("{}{name}", self.prefix);
        let missing = |problem: String| {
            Error::content(
                self.files.path(),
                problem,
                "take an earlier checkpoint of the run, or import the weights again",
            )
        };
        let tensor = self.files.get(&full).ok_or_else(|| missing(format!("missing {full}")))?;
        let values = tensor.values().ok_or_else(|| missing(format!("{full} is of type {:?}", tensor.dtype)))?;
        let values: Vec<f32> = values.map(|x| x as f32).collect();
        if values.iter().any(|x| !x.is_finite()) {
            return Err(missing(format!("{full} has numbers that are not finite in f32")));
        }
        Ok((tensor.shape.to_vec(), values))
    }

    /// `x W^T + b` of a layer; the bias is left out where there is none, and `mask_k` takes that of keys away.
    pub(crate) fn linear(&mut self, name: &str, x: &str, bias: bool, mask_k: bool) -> Result<String> {
        let (shape, values) = self.values(&format!("{name}.weight"))?;
        let (to, from) = (shape[0], shape[1]);
        let turned = (0..from * to).map(|i| values[i % to * from + i / to]);
        let weight = self.floats(&format!("{name}.weight"), &[from, to], turned);
        let y = self.node("MatMul", &[x, &weight], &[]);
        if !bias {
            return Ok(y);
        }
        let (shape, mut values) = self.values(&format!("{name}.bias"))?;
        if mask_k {
            values[to / 3..to / 3 * 2].fill(0.0);
        }
        let bias = self.floats(&format!("{name}.bias"), &shape, values);
        Ok(self.node("Add", &[&y, &bias], &[]))
    }

    /// `x[from..to]` along an axis.
    pub(crate) fn slice(&mut self, x: &str, axis: i64, from: i64, to: i64) -> String {
        let [from, to, axis] = [from, to, axis].map(|n| self.ints(&[n]));
        self.node("Slice", &[x, &from, &to, &axis], &[])
    }

    /// `x` in another shape: 0 keeps a length, -1 is what is left.
    pub(crate) fn reshape(&mut self, x: &str, shape: &[i64]) -> String {
        let shape = self.ints(shape);
        self.node("Reshape", &[x, &shape], &[])
    }

    /// `x / 2 (1 + erf(x / sqrt 2))`.
    pub(crate) fn gelu(&mut self, x: &str) -> String {
        let [root, one, half] = [SQRT_2, 1.0, 0.5].map(|x| self.float(x));
        let scaled = self.node("Div", &[x, &root], &[]);
        let erf = self.node("Erf", &[&scaled], &[]);
        let shifted = self.node("Add", &[&erf, &one], &[]);
        let product = self.node("Mul", &[x, &shifted], &[]);
        self.node("Mul", &[&product, &half], &[])
    }

    /// LayerNorm over the last axis.
    pub(crate) fn layer_norm(&mut self, name: &str, x: &str, eps: f64) -> Result<String> {
        let [weight, bias] = ["weight", "bias"].map(|kind| self.tensor(&format!("{name}.{kind}")));
        let attributes = [("axis", Attribute::Int(-1)), ("epsilon", Attribute::Float(eps))];
        Ok(self.node("LayerNormalization", &[x, &weight?, &bias?], &attributes))
    }

    /// A convolution with weight and bias, and with these attributes.
    pub(crate) fn conv(&mut self, name: &str, x: &str, attributes: &[(&str, Attribute<'_>)]) -> Result<String> {
        let [weight, bias] = ["weight", "bias"].map(|kind| self.tensor(&format!("{name}.{kind}")));
        Ok(self.node("Conv", &[x, &weight?, &bias?], attributes))
    }

    /// A convolution of squares that do not overlap, of so many pixels a side.
    pub(crate) fn patchify(&mut self, name: &str, x: &str, side: usize) -> Result<String> {
        let side = [side as i64; 2];
        self.conv(name, x, &[("kernel_shape", Attribute::Ints(&side)), ("strides", Attribute::Ints(&side))])
    }

    /// The file, with what a program needs to know of the pixels.
    pub(crate) fn encode(mut self, name: &str, pixels: &Preprocessing, patch_size: usize) -> Vec<u8> {
        self.graph.name = name.into();
        let list = |x: &[f32]| x.iter().map(f32::to_string).collect::<Vec<_>>().join(", ");
        let facts = [
            ("pixels", "channels (three are RGB) in [0, 1], less mean, divided by std".to_string()),
            ("mean", list(&pixels.mean)),
            ("std", list(&pixels.std)),
            ("patch_size", patch_size.to_string()),
            ("image_size", pixels.global_size.to_string()),
        ];
        let metadata = facts.map(|(key, value)| StringStringEntryProto { key: key.into(), value });
        let model = ModelProto {
            ir_version: IR_VERSION,
            producer_name: "dinolab".into(),
            producer_version: env!("CARGO_PKG_VERSION").into(),
            graph: Some(self.graph),
            opset_import: vec![OperatorSetIdProto { domain: String::new(), version: OPSET }],
            metadata_props: metadata.into(),
        };
        model.encode_to_vec()
    }
}

fn value(name: &str, shape: &[Dim]) -> ValueInfoProto {
    let dim = shape.iter().map(|dim| match dim {
        Dim::Is(n) => DimensionProto { dim_value: Some(*n as i64), dim_param: None },
        Dim::Any(name) => DimensionProto { dim_value: None, dim_param: Some((*name).into()) },
    });
    let shape = TensorShapeProto { dim: dim.collect() };
    let tensor = TensorTypeProto { elem_type: FLOAT, shape: Some(shape) };
    ValueInfoProto { name: name.into(), r#type: Some(TypeProto { tensor_type: Some(tensor) }) }
}
