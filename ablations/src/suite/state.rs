//! What a suite's folder says of itself: from which file it was made, and which recipe each run was started with.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use dinolab_core::files::write_file;
use dinolab_core::{Error, Result};
use serde::{Deserialize, Serialize};

use super::file::Overrides;
use super::rules::DropRule;
use crate::given::program;
use crate::style::shell;

/// The file in the folder.
const FILE: &str = "suite.json";

/// `suite.json`: what the folder was made from, and which recipe each run of it was started with.
#[derive(Default, Serialize, Deserialize)]
pub(super) struct State {
    pub(super) suite: String,
    #[serde(default)]
    pub(super) origin: Option<Origin>,
    /// The rules that its runs were held to.
    #[serde(default)]
    pub(super) drop: Option<Vec<DropRule>>,
    /// Hash of its recipe by the folder of a run.
    pub(super) runs: BTreeMap<PathBuf, String>,
}

/// What a suite's folder was made from.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Origin {
    /// The suite's file.
    pub file: PathBuf,
    /// What the command line changed in the recipe of all arms.
    pub set: Overrides,
}

impl Origin {
    /// That of the suite's folder `out`; nothing if no suite was begun in it.
    ///
    /// # Errors
    /// If `suite.json` cannot be read, or was written by a version that did not say it.
    pub fn of(out: &Path) -> Result<Option<Self>> {
        let Some(state) = State::read(out)? else { return Ok(None) };
        let unsaid = || {
            let help = "name the suite's file, and this folder with --out";
            Error::content(out, "this suite was begun by a version that did not write down its file", help)
        };
        state.origin.ok_or_else(unsaid).map(Some)
    }

    /// The command that goes on with the suite in `out`.
    pub fn command(&self, out: &Path) -> String {
        let path = |path: &Path| shell(&path.display().to_string());
        let sets = self.set.iter().map(|(key, value)| format!(" --set {}", shell(&format!("{key}={value}"))));
        format!("{} ablate {} --out {}{}", program(), path(&self.file), path(out), sets.collect::<String>())
    }
}

impl State {
    /// That of the suite's folder `out`; nothing if no suite was begun in it.
    pub(super) fn read(out: &Path) -> Result<Option<Self>> {
        let path = out.join(FILE);
        if !path.exists() {
            return Ok(None);
        }
        let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        let help = "use another --out";
        let state = serde_json::from_str(&text);
        state.map(Some).map_err(|e| Error::content(&path, format!("this is not a suite's state: {e}"), help))
    }

    pub(super) fn write(&self, out: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self).map_err(|_| {
            Error::content(out, "the name of a file of this suite is no UTF-8", "give files and folders other names")
        })?;
        write_file(&out.join(FILE), text.as_bytes())
    }
}
