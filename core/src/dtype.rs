//! Types of elements.

/// The type of a tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// 32-bit floats: the default on the CPU, master weights everywhere.
    F32,
    /// 64-bit floats: for checks on the CPU.
    F64,
    /// bfloat16: storage and compute on a GPU; storage only on the CPU.
    BF16,
    /// Unsigned 32-bit integers: row indices.
    U32,
}

impl DType {
    /// The type of sums, losses and factors beside features of this type: f32 beside bf16, otherwise the same.
    pub const fn wide(self) -> Self {
        match self {
            Self::BF16 => Self::F32,
            other => other,
        }
    }

    /// Bytes per element.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 | Self::U32 => 4,
            Self::F64 => 8,
            Self::BF16 => 2,
        }
    }
}
