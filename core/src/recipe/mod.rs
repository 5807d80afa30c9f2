//! Recipes: one run, as a TOML file.
//!
//! A [`RawRecipe`] is what files, environment and command line say together; a [`Recipe`] is that as a type, with every default
//! filled in. This room knows plugins by their tables alone: a recipe that is to be run is
//! [resolved](crate::resolved::Resolved), and so held against the model that it declares.

mod beside;
mod continue_from;
pub mod describe;
mod entries;
mod expected;
mod layers;
mod old_names;
mod ranges;
mod read;
mod schema;
#[cfg(test)]
pub(crate) mod test_plugins;
mod toml_text;
mod typed;

pub use beside::*;
pub use continue_from::ContinueFrom;
pub use entries::*;
pub use expected::{Curve, Expected, Spread, MOST_RUNS};
pub use layers::{is_within, key_variables, parse_set, Overrides, RawRecipe, ENV_PREFIX, SCHEMA};
pub use schema::*;
pub use toml_text::toml_value;

pub(crate) use layers::check_schema;
pub(crate) use ranges::check_tables;
pub use read::{read_text, NoText};
pub(crate) use toml_text::bare;
pub(crate) use typed::Typed;
