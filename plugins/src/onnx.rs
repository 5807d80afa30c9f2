//! Graphs of ONNX: the messages of `onnx.proto` that an export needs, and a builder of nodes.
//!
//! The messages are stated by hand for `prost` (field numbers of ONNX's own `onnx.proto`, IR version 8), so that nothing is
//! generated when the crate is built.

use std::collections::BTreeMap;

use prost::Message;

/// The set of operators that graphs are of: the first with `LayerNormalization`.
const OPSET: i64 = 17;
/// Version of the format that belongs to it.
const IR_VERSION: i64 = 8;
/// Element types.
const FLOAT: i32 = 1;
const INT64: i32 = 7;

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
#[derive(Debug, Default)]
pub(crate) struct Graph {
    graph: GraphProto,
    /// Lists of whole numbers that the graph has already.
    ints: BTreeMap<Vec<i64>, String>,
}

impl Graph {
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

    /// The file, with facts about the model by name.
    pub(crate) fn encode(mut self, name: &str, facts: &[(&str, String)]) -> Vec<u8> {
        self.graph.name = name.into();
        let metadata =
            facts.iter().map(|(key, value)| StringStringEntryProto { key: (*key).into(), value: value.clone() });
        let model = ModelProto {
            ir_version: IR_VERSION,
            producer_name: "dinolab".into(),
            producer_version: env!("CARGO_PKG_VERSION").into(),
            graph: Some(self.graph),
            opset_import: vec![OperatorSetIdProto { domain: String::new(), version: OPSET }],
            metadata_props: metadata.collect(),
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
