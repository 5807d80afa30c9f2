//! Recipes: one run, as a TOML file.
//!
//! A [`RawRecipe`] is what files, environment and command line say together; a [`Resolved`] recipe is that, checked,
//! typed, with every default filled in. Nothing is allocated on the way, so a 7B recipe resolves in milliseconds.

mod beside;
mod changes;
mod check;
mod continue_from;
pub mod cost;
pub mod describe;
mod entries;
mod expected;
mod layers;
mod length;
mod measured;
mod old_names;
mod ranges;
mod resolved;
mod schema;
mod sizes;
#[cfg(test)]
mod test_plugins;
mod unread;

pub use beside::*;
pub use changes::{changes, Change};
pub use continue_from::ContinueFrom;
pub use entries::*;
pub use expected::{Curve, Expected, Spread};
pub(crate) use layers::check_schema;
pub use layers::{parse_set, Overrides, RawRecipe, ENV_PREFIX, SCHEMA};
pub use length::Seam;
pub use measured::Measured;
pub use resolved::{toml_value, Resolved};
pub use schema::*;
pub use sizes::{fit, Fit};

pub(crate) use ranges::check_tables;
