//! Layers of a recipe: `extends` chain < file < environment < `--set` < overrides of a suite, merged into one value
//! that remembers where every key came from.
//!
//! Tables are merged key by key; everything else (lists too) is replaced. A layer that gives a table another `plugin`
//! drops the keys of the plugin below, which the new one may not know.
//!
//! `extends` is relative to the file that says it. Every other path in a recipe is relative to the working directory,
//! so that a recipe means the same wherever its file lies.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use figment::providers::{Env, Format, Toml};
use figment::value::{Dict, Value};
use figment::Provider;

use super::beside::{BackboneConfig, OwnKeys};
use super::describe::Guide;
use super::entries::{Entry, LossEntry, ProbeEntry};
use super::expected::{self, Expected};
use super::old_names;
use super::read::read_text;
use super::schema::{CropConfig, OptimizerConfig};
use crate::contract::{Augmentation, Masking, Optimizer};
use crate::problem::{Origin, Problem, SourceFile};
use crate::registry;
use crate::text::printable;
use crate::{Error, Result};

/// What follows the prefix of keys in a variable's name, if it has it.
fn behind_prefix(variable: &str) -> Option<&str> {
    let (prefix, rest) = variable.split_at_checked(ENV_PREFIX.len())?;
    prefix.eq_ignore_ascii_case(ENV_PREFIX).then_some(rest)
}

/// Whether a variable's name has the prefix of keys and an empty part, which figment passes over.
fn is_cut(variable: &str) -> bool {
    behind_prefix(variable).is_some_and(|key| key.split("__").any(str::is_empty))
}

/// Variables of this prefix set keys: `DINOLAB_OPTIMIZER__LR=1e-3`.
pub const ENV_PREFIX: &str = "DINOLAB_";

/// Variables of this prefix that are no keys: where compiled kernels are kept, waiting after every launch, and what tests
/// are told.
const NO_KEYS: [&str; 9] = ["cache", "cuda_sync", "fuzz", "golden", "mpi", "python", "ranks", "timeout", "write_table"];

/// Variables of the environment that set keys, with their values, in the order of their names.
pub fn key_variables() -> Vec<(String, String)> {
    let is_key = |key: &str| !NO_KEYS.iter().any(|no_key| key.eq_ignore_ascii_case(no_key));
    let sets_a_key = |name: &str| behind_prefix(name).is_some_and(is_key);
    let variables = std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value)));
    let variables = variables.filter(|(name, _)| sets_a_key(name));
    let mut all: Vec<_> = variables.map(|(name, value)| (name, value.to_string_lossy().into_owned())).collect();
    all.sort();
    all
}

/// The version of what recipes say. Files that dinolab writes have it as `schema`; it is no key of a recipe, and a file
/// without one is of this version.
pub const SCHEMA: i64 = 1;

/// Fails, with the reason, if the value of the key `schema` is not a version that this program reads.
pub(crate) fn check_schema(schema: Option<&toml::Value>) -> Result<(), String> {
    match schema.map(toml::Value::as_integer) {
        None | Some(Some(SCHEMA)) => Ok(()),
        Some(Some(newer @ SCHEMA..)) => Err(format!(
            "this file is of version {newer}, and dinolab {} reads version {SCHEMA}: use the dinolab that wrote it, or a \
            newer one",
            env!("CARGO_PKG_VERSION")
        )),
        Some(_) => Err(format!("expected the version of the file, {SCHEMA}")),
    }
}

/// What overrides a file.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// `a.b=c`, as typed after `--set`; the value is TOML, or a bare word that is taken as text.
    pub sets: Vec<String>,
    /// Whether `DINOLAB_...` variables count.
    pub env: bool,
}

/// Parts of a key at most: no table is deeper.
const DEEPEST: usize = 64;

/// A recipe as written: layers merged, nothing checked, no defaults.
#[derive(Clone, Debug)]
pub struct RawRecipe {
    value: Dict,
    /// Where every key (tables too) was set last, by dotted path.
    origins: BTreeMap<String, Origin>,
    path: PathBuf,
    /// What the file itself inherits from.
    base: Option<Box<RawRecipe>>,
    /// What the file itself says that runs of it gave.
    expected: Option<Expected>,
    warnings: Vec<Problem>,
}

impl RawRecipe {
    /// Reads a file and what it extends. A folder is a run: its `recipe.toml` is read.
    ///
    /// # Errors
    /// If a file is missing, is not TOML, or extends itself.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = if path.is_dir() { path.join("recipe.toml") } else { path.to_path_buf() };
        let text = read_text(&file).map_err(|e| e.at_path(path, &file))?;
        Self::parse(file, text, &mut Vec::new())
    }

    /// Reads TOML text; `extends` is relative to the working directory.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn from_text(text: &str) -> Result<Self> {
        Self::parse("recipe.toml".into(), text.into(), &mut Vec::new())
    }

    fn parse(path: PathBuf, text: String, chain: &mut Vec<PathBuf>) -> Result<Self> {
        chain.push(path.canonicalize().unwrap_or_else(|_| path.clone()));
        let source = Arc::new(SourceFile { path, text });
        let origins = spans(&source)?;
        let origin = |key: &str| origins.get(key).cloned().unwrap_or(Origin::Default);
        // toml_edit has accepted the text already; what figment may still refuse has no place of its own.
        let profiles = Toml::string(&source.text).data().map_err(|e| Problem::error("", e.to_string()))?;
        let mut value: Dict = profiles.into_values().next().unwrap_or_default();
        let schema = value.remove("schema").map(|v| toml::Value::try_from(v).unwrap_or(toml::Value::Boolean(false)));
        check_schema(schema.as_ref()).map_err(|m| Problem::error("schema", m).at(origin("schema")))?;
        let at = |problem: Problem| {
            let origin = origin(&problem.key);
            Problem { at_value: false, ..problem.at(origin) }
        };
        for (table, what, command) in [("stage", "a chain of stages", "stages"), ("arm", "a suite", "ablate")] {
            if matches!(value.get(table), Some(Value::Array(..))) {
                let problem = at(Problem::error(table, format!("this is the file of {what}, and no recipe")));
                return Err(problem.help(format!("`dinolab {command} {}`", printable(&source.path))).into());
            }
        }
        let expected = value.remove(expected::KEY).map(Expected::of).transpose().map_err(at)?;
        let renamed = old_names::rename(&mut value).map_err(at)?;
        let base = match value.remove("extends") {
            None => None,
            Some(Value::String(_, base)) => {
                let file = source.path.parent().unwrap_or(Path::new("")).join(base);
                let wrong = |m: String| Problem::error("extends", m).at(origin("extends"));
                let text = read_text(&file).map_err(|e| {
                    let Problem { message, help, .. } = e.at_path(&file, &file);
                    Problem { help, ..wrong(message) }
                })?;
                if file.canonicalize().is_ok_and(|f| chain.contains(&f)) {
                    let m = format!("{} extends itself", file.display());
                    return Err(wrong(m).help("remove one `extends` of the circle").into());
                }
                Some(Self::parse(file, text, chain)?)
            }
            Some(_) => {
                let wrong = Problem::error("extends", "expected the path of one recipe, in quotes");
                return Err(wrong.at(origin("extends")).into());
            }
        };
        let mut raw = base.clone().unwrap_or_else(|| Self {
            value: Dict::new(),
            origins: BTreeMap::new(),
            path: PathBuf::new(),
            base: None,
            expected: None,
            warnings: Vec::new(),
        });
        (raw.path, raw.expected) = (source.path.clone(), expected);
        let repeated = raw.merge(value, &origin);
        if let Some(base) = &base {
            // A table that says again which plugin it is of is easier to read.
            let repeated = repeated.into_iter().filter(|key| !key.ends_with(".plugin"));
            raw.warnings.extend(repeated.map(|key| {
                let message = format!("changes nothing: {} says the same already", base.path.display());
                Problem::warning(&key, message).help("remove it, so that it follows the base").at(origin(&key))
            }));
        }
        raw.warnings.extend(renamed.into_iter().map(at));
        raw.base = base.map(Box::new);
        Ok(raw)
    }

    /// With the environment and `--set` on top.
    ///
    /// # Errors
    /// If a `--set` is not `key=value`.
    pub fn with(self, overrides: &Overrides) -> Result<Self> {
        let vars: Vec<(String, String)> = match overrides.env {
            true => {
                let mut names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
                if let Some(name) = names.find(|name| is_cut(name)) {
                    let problem = format!("the variable {name} names no key: a part of it is empty");
                    return Err(Error::user(
                        problem,
                        format!("name one, as in {ENV_PREFIX}OPTIMIZER__LR, or unset it"),
                    ));
                }
                let env = Env::prefixed(ENV_PREFIX).ignore(&NO_KEYS).split("__");
                env.iter().map(|(k, v)| (k.as_str().into(), v)).collect()
            }
            false => Vec::new(),
        };
        self.with_env(vars)?.with_sets(&overrides.sets)
    }

    /// Variables as (dotted key, text).
    fn with_env(self, vars: Vec<(String, String)>) -> Result<Self> {
        let keys = vars.into_iter().map(|(key, text)| {
            let origin = Origin::Env(format!("{ENV_PREFIX}{}", key.to_uppercase().replace('.', "__")));
            let value = parse_value(&text).and_then(|v| Value::serialize(v).map_err(|e| e.to_string()));
            let value = value.map_err(|m| Problem::error(&key, m).at(origin.clone()))?;
            Ok((key, value, origin))
        });
        self.with_keys(keys.collect::<Result<_>>()?)
    }

    fn with_sets(self, sets: &[String]) -> Result<Self> {
        let keys = sets.iter().map(|text| {
            let origin = Origin::Set(text.clone());
            let (key, value) = parse_set(text)?;
            let value = Value::serialize(value).map_err(|e| Problem::error(&key, e.to_string()).at(origin.clone()))?;
            Ok((key, value, origin))
        });
        self.with_keys(keys.collect::<Result<_>>()?)
    }

    /// With these (dotted key, value) pairs on top: an arm of a suite. `by` names it in messages: "arm `off`".
    ///
    /// # Errors
    /// If a key is empty.
    pub fn with_overrides<'a>(
        self,
        by: &str,
        pairs: impl IntoIterator<Item = (&'a str, &'a toml::Value)>,
    ) -> Result<Self> {
        let keys = pairs.into_iter().map(|(key, value)| {
            let origin = Origin::Override(by.to_string());
            let value = Value::serialize(value).map_err(|e| Problem::error(key, e.to_string()).at(origin.clone()))?;
            Ok((key.to_string(), value, origin))
        });
        self.with_keys(keys.collect::<Result<_>>()?)
    }

    /// With one layer of keys on top, the later over the earlier.
    fn with_keys(mut self, mut keys: Vec<(String, Value, Origin)>) -> Result<Self> {
        plugins_first(&mut keys);
        keys.into_iter().try_for_each(|(key, value, origin)| self.set(&key, value, origin))?;
        Ok(self)
    }

    pub(crate) fn set(&mut self, key: &str, value: Value, origin: Origin) -> Result<()> {
        if key.is_empty() || key.split('.').any(str::is_empty) {
            let wrong = Problem::error("", format!("`{key}` is not a dotted key")).at(origin);
            return Err(wrong.help("for example optimizer.lr").into());
        }
        if key.split('.').count() > DEEPEST {
            let wrong = Problem::error("", format!("a key of more than {DEEPEST} parts")).at(origin);
            return Err(wrong.help("for example optimizer.lr").into());
        }
        let new = old_names::new_name(key);
        if new != key {
            self.warnings.push(old_names::note(key, &new).at(origin.clone()));
        }
        let nest = |value, part: &str| Value::from(Dict::from([(part.to_string(), value)]));
        let Value::Dict(_, layer) = new.rsplit('.').fold(value, nest) else {
            unreachable!("a dotted key has at least one part")
        };
        let repeated = self.merge(layer, &|_| origin.clone());
        // An arm of a suite may say what the base says.
        if matches!(origin, Origin::Env(_) | Origin::Set(_)) {
            self.warnings.extend(repeated.into_iter().map(|key| {
                let message = "changes nothing: the recipe says the same already";
                Problem::warning(key, message).at(origin.clone())
            }));
        }
        Ok(())
    }

    /// Puts a layer on top; gives the keys whose value it repeats.
    fn merge(&mut self, layer: Dict, origin: &dyn Fn(&str) -> Origin) -> Vec<String> {
        let mut repeated = Vec::new();
        let below = self.value.clone();
        merge(&mut self.value, layer, "", &below, &mut self.origins, origin, &mut repeated);
        repeated
    }

    /// With a layer below all others; `by` says where it is from.
    pub(crate) fn above(mut self, layer: Dict, by: &Origin) -> Self {
        let (own, origins) = (std::mem::take(&mut self.value), std::mem::take(&mut self.origins));
        self.merge(layer, &|_| by.clone());
        self.merge(own, &|key| origins.get(key).cloned().unwrap_or(Origin::Default));
        self
    }

    /// The file that was read.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The recipe that the file extends, alone.
    pub fn base(&self) -> Option<&RawRecipe> {
        self.base.as_deref()
    }

    /// What the file says that its runs gave: its own table `[measured]`, not that of a recipe that it extends.
    pub fn expected(&self) -> Option<&Expected> {
        self.expected.as_ref()
    }

    /// What was written, merged.
    pub fn value(&self) -> &Dict {
        &self.value
    }

    /// The value of a dotted key, if some layer gave one.
    pub fn get(&self, key: &str) -> Option<&Value> {
        let (first, rest) = key.split_once('.').unwrap_or((key, ""));
        let value = self.value.get(first)?;
        if rest.is_empty() {
            Some(value)
        } else {
            value.find_ref(rest)
        }
    }

    /// Where a dotted key was set: itself, or else the nearest table around it.
    pub fn origin(&self, key: &str) -> Origin {
        let mut key = key;
        loop {
            if let Some(origin) = self.origins.get(key) {
                return origin.clone();
            }
            let Some((table, _)) = key.rsplit_once('.') else { return Origin::Default };
            key = table;
        }
    }

    /// Where exactly this key was set: [`Origin::Default`] if nobody set it.
    pub fn set_by(&self, key: &str) -> Origin {
        self.origins.get(key).cloned().unwrap_or(Origin::Default)
    }

    /// How late the layer of a value comes: one over the other.
    pub(crate) fn layer(&self, origin: &Origin) -> u8 {
        match origin {
            Origin::Default => 0,
            Origin::File { source, .. } if source.path != self.path => 1,
            Origin::File { .. } => 2,
            Origin::Env(_) => 3,
            Origin::Set(_) => 4,
            Origin::Override(_) => 5,
        }
    }

    /// What else than `key` was set by those who came after the layer that set it, or beside it on a command line, where a person
    /// finds it: `--set batch.size=15`, `crops.global_size (a.toml:7)`.
    pub(crate) fn set_over(&self, key: &str) -> Vec<String> {
        let at = self.origin(key);
        let is_table = |key: &str| self.get(key).is_some_and(|value| value.as_dict().is_some());
        let is_later = |name: &str, of: &Origin| {
            // A seed draws, and a name or the number of steps makes nothing unfit.
            let other = !is_table(name) && !["seed", "steps", "name"].contains(&name) && name != key;
            other
                && match (of, &at) {
                    (_, Origin::Default) => false,
                    // A suite gives all of its own at once; a `--set` and a variable are of one key each.
                    (Origin::Override(_), Origin::Override(_)) => true,
                    (Origin::Set(_), Origin::Set(_)) | (Origin::Env(_), Origin::Env(_)) => *of != at,
                    _ => self.layer(of) > self.layer(&at),
                }
        };
        let mut later: Vec<_> = self.origins.iter().filter(|(name, of)| is_later(name, of)).collect();
        later.sort_by_key(|(_, of)| std::cmp::Reverse(self.layer(of)));
        let mut said: Vec<String> = Vec::new();
        for (name, of) in later {
            said.push(match of {
                Origin::Set(_) | Origin::Env(_) => of.to_string(),
                _ => format!("{name} ({of})"),
            });
        }
        said.dedup();
        said
    }

    /// Overrides that change nothing.
    pub(crate) fn warnings(&self) -> &[Problem] {
        &self.warnings
    }
}

/// Whether a dotted key is `table` or lies in it.
pub fn is_within(key: &str, table: &str) -> bool {
    key.strip_prefix(table).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() {
        key.to_string()
    } else {
        format!("{path}.{key}")
    }
}

/// Brings the plugin of a table before the other keys of the table that are in the same layer: another plugin drops the keys of
/// layers below, not those that were given beside it.
fn plugins_first<A, B>(keys: &mut [(String, A, B)]) {
    for i in 0..keys.len() {
        let Some(table) = keys[i].0.strip_suffix(".plugin") else { continue };
        // A whole table before it is below it.
        let above = |(key, ..): &(String, A, B)| *key == keys[i].0 || is_within(table, key);
        let start = keys[..i].iter().rposition(above).map_or(0, |at| at + 1);
        if let Some(first) = keys[start..i].iter().position(|(key, ..)| is_within(key, table)) {
            keys[start + first..=i].rotate_right(1);
        }
    }
}

/// Puts the table `upper` at `path` of a recipe on top of `lower`; `below` is the whole recipe below.
fn merge(
    lower: &mut Dict,
    upper: Dict,
    path: &str,
    below: &Dict,
    origins: &mut BTreeMap<String, Origin>,
    origin: &dyn Fn(&str) -> Origin,
    repeated: &mut Vec<String>,
) {
    let forget = |origins: &mut BTreeMap<String, Origin>, path: &str| {
        let inside = format!("{path}.");
        origins.retain(|k, _| k != path && !k.starts_with(&inside));
    };
    if switches_plugin(path, lower, &upper) {
        let own = own_keys(path);
        lower.retain(|key, _| {
            own.contains(&key.as_str()) || {
                forget(origins, &join(path, key));
                false
            }
        });
    }
    for (key, value) in upper {
        let path = join(path, &key);
        match (lower.get_mut(&key), value) {
            (Some(Value::Dict(_, table)), Value::Dict(_, upper)) if !chooses_other(&path, table, &upper, below) => {
                merge(table, upper, &path, below, origins, origin, repeated)
            }
            (_, Value::Dict(tag, upper)) => {
                forget(origins, &path);
                let mut table = Dict::new();
                merge(&mut table, upper, &path, below, origins, origin, repeated);
                lower.insert(key, Value::Dict(tag, table));
            }
            (old, value) => {
                if old.is_some_and(|old| same(old, &value)) {
                    repeated.push(path.clone());
                }
                forget(origins, &path);
                lower.insert(key, value);
            }
        }
        origins.insert(path.clone(), origin(&path));
    }
}

/// Whether a table with one key of several that could be chosen has another one above it: `{ range = .. }` above `{ base = .. }`.
fn chooses_other(path: &str, lower: &Dict, upper: &Dict, whole: &Dict) -> bool {
    let apart = lower.len() == 1 && upper.len() == 1 && lower.keys().ne(upper.keys());
    apart && Guide::default().is_choice(whole, path)
}

/// Tables of plugin tables whose names are those of their plugins unless they say another.
const NAMED: [&str; 4] = ["losses", "teachers", "augmentations", "probes"];

/// Keys of a plugin table that are the recipe's, not the plugin's.
fn own_keys(path: &str) -> &'static [&'static str] {
    match path {
        "backbone" => return BackboneConfig::KEYS,
        "crops" => return CropConfig::KEYS,
        "optimizer" => return OptimizerConfig::KEYS,
        _ => {}
    }
    match path.split_once('.') {
        Some(("losses", name)) if !name.contains('.') => LossEntry::OWN,
        Some(("probes", name)) if !name.contains('.') => ProbeEntry::OWN,
        _ => &[],
    }
}

fn switches_plugin(path: &str, lower: &Dict, upper: &Dict) -> bool {
    let default = match path {
        "crops" => registry::default_of::<dyn Augmentation>(),
        "masking" => registry::default_of::<dyn Masking>(),
        "optimizer" => registry::default_of::<dyn Optimizer>(),
        // The plugin of `[losses.x]` is x unless another is named.
        _ => path.split_once('.').filter(|(table, _)| NAMED.contains(table)).map(|(_, name)| name),
    };
    let below = lower.get("plugin").and_then(Value::as_str).or(if lower.is_empty() { None } else { default });
    matches!((below, upper.get("plugin").and_then(Value::as_str)), (Some(below), Some(above)) if below != above)
}

fn same(a: &Value, b: &Value) -> bool {
    match (a.to_num(), b.to_num()) {
        (Some(a), Some(b)) => a.to_actual() == b.to_actual(),
        (None, None) => a == b,
        _ => false,
    }
}

/// A `--set`: `a.b=c` as key and value.
///
/// # Errors
/// If it is not `key=value`, or the value begins as TOML and is none.
pub fn parse_set(text: &str) -> Result<(String, toml::Value)> {
    let origin = Origin::Set(text.into());
    let Some((key, value)) = text.split_once('=') else {
        let wrong = Problem::error("", "expected `key=value`").at(origin);
        return Err(wrong.help("for example --set optimizer.lr=1e-3").into());
    };
    let value = parse_value(value).map_err(|m| Problem::error(key, m).at(origin))?;
    Ok((key.trim().into(), value))
}

/// TOML, or a bare word taken as text.
fn parse_value(text: &str) -> Result<toml::Value, String> {
    let text = text.trim();
    match format!("value = {text}").parse::<toml::Table>() {
        Ok(mut table) if table.len() == 1 => Ok(table.remove("value").expect("the only key")),
        Err(e) if text.starts_with(['[', '{', '"', '\'']) => Err(format!("`{text}` is not TOML: {}", e.message())),
        _ => Ok(text.into()),
    }
}

/// Where every key of a file is.
fn spans(source: &Arc<SourceFile>) -> Result<BTreeMap<String, Origin>> {
    let at = |key: std::ops::Range<usize>, value| Origin::File { source: source.clone(), key, value };
    let document = toml_edit::Document::parse(source.text.as_str()).map_err(|e| {
        let span = e.span().unwrap_or(0..0);
        Problem::error("", e.message().trim().replace('\n', "; ")).at(at(span.clone(), span))
    })?;
    let mut found = BTreeMap::new();
    let mut tables: Vec<(String, &dyn toml_edit::TableLike)> = vec![(String::new(), document.as_table())];
    while let Some((path, table)) = tables.pop() {
        for (name, item) in table.iter() {
            let key = table.key(name).and_then(toml_edit::Key::span).unwrap_or(0..0);
            // The span of a table is its header, or everything between braces: the key says more.
            let value = item.as_value().filter(|v| !v.is_inline_table()).and_then(toml_edit::Value::span);
            let origin = at(key.clone(), value.unwrap_or(key));
            let path = join(&path, name);
            if name.contains('.') || name.is_empty() {
                return Err(Problem::error(path, "a name cannot be empty or contain a dot").at(origin).into());
            }
            if let Some(table) = item.as_table_like() {
                tables.push((path.clone(), table));
            }
            found.insert(old_names::new_name(&path), origin);
        }
    }
    Ok(found)
}

#[cfg(test)]
#[path = "layers_tests.rs"]
mod tests;
