//! The header of a safetensors file, held against the file.

use std::path::Path;

use safetensors::SafeTensors;

use super::json::twice;
use super::Really;
use crate::text::printable;
use crate::{Error, Result};

/// The tensors of a safetensors file, given as its bytes. Every offset lies inside the file, none overlap, shapes and
/// types have the sizes that they claim, and no name is given twice.
///
/// # Errors
/// If it is something else, or damaged.
pub fn parse_safetensors<'a>(path: &Path, bytes: &'a [u8]) -> Result<SafeTensors<'a>> {
    let broken = |what: String| {
        let problem = format!("not a whole safetensors file of {} bytes ({what})", bytes.len());
        Error::content(path, problem, "copy or download it again")
    };
    let parsed = SafeTensors::deserialize(bytes).map_err(|e| match Really::of(bytes) {
        Some(other) => other.error(path, "a safetensors file"),
        None => broken(e.to_string()),
    })?;
    // The library takes the last of two entries of a name.
    let (header, _) = SafeTensors::read_metadata(bytes).map_err(|e| broken(e.to_string()))?;
    if let Some(name) = twice(&bytes[8..8 + header]) {
        return Err(broken(format!("`{}` is in its header twice", printable(name))));
    }
    // So that names can be shown wherever they are met.
    let odd = parsed.names().into_iter().map(|name| (printable(name), name)).find(|(shown, name)| shown != name);
    match odd {
        Some((shown, _)) => Err(broken(format!("`{shown}` is no name of a tensor"))),
        None => Ok(parsed),
    }
}
