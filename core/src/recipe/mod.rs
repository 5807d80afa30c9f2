//! Recipes: one run, as a TOML file.

mod schema;

pub use schema::*;

/// A recipe that cannot be used: where and why.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct RecipeError(pub String);
