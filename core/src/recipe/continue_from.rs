//! The key `continue_from`: a checkpoint of another run, as a table or as a path.

use std::path::{Path, PathBuf};

use figment::value::Value;
use schemars::{JsonSchema, SchemaGenerator};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

use crate::problem::Nested;

/// The checkpoint that a run goes on from: `{ run = "runs/a", step = 400 }`, or the path of a run or of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ContinueFrom {
    /// A run, or a checkpoint of one.
    pub run: PathBuf,
    /// The step of the run; its newest checkpoint if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step: Option<u64>,
}

impl ContinueFrom {
    /// The same as one path: `runs/a@400`.
    pub fn path(&self) -> PathBuf {
        let Some(step) = self.step else { return self.run.clone() };
        let mut path = self.run.components().as_path().as_os_str().to_os_string();
        path.push(format!("@{step}"));
        path.into()
    }
}

/// What the table says.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Table {
    /// A run, or a checkpoint of one.
    #[schemars(extend("format" = "path"))]
    run: PathBuf,
    /// The step of the run; its newest checkpoint if not given.
    #[serde(default)]
    step: Option<u64>,
}

impl<'de> Deserialize<'de> for ContinueFrom {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match <Value as Deserialize>::deserialize(deserializer)? {
            Value::String(_, path) => Ok(Self { run: Path::new(&path).into(), step: None }),
            table => {
                let table: Table = table.deserialize().map_err(|e| D::Error::custom(Nested::of(&e).encode()))?;
                Ok(Self { run: table.run, step: table.step })
            }
        }
    }
}

impl JsonSchema for ContinueFrom {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "continue_from".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> schemars::Schema {
        let mut path = String::json_schema(generator);
        path.insert("format".into(), "path".into());
        schemars::json_schema!({ "anyOf": [path, Table::json_schema(generator)] })
    }
}
