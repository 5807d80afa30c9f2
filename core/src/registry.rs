//! Plugins by name: registration, look-up, and plugin tables in recipes.
//!
//! A plugin is a config struct, an `impl` of its contract, and one line:
//!
//! ```
//! use dinolab_core::contract::{At, Scheduler};
//! use dinolab_core::{plugin, registry};
//!
//! /// Halves every so many steps.
//! #[derive(Debug, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
//! #[serde(deny_unknown_fields)]
//! struct HalfLife {
//!     /// Value at step 0.
//!     start: f64,
//!     /// Steps until it has halved.
//!     every: u64,
//! }
//!
//! impl Scheduler for HalfLife {
//!     fn value(&self, at: At) -> f64 {
//!         self.start * 0.5f64.powf(at.step as f64 / self.every as f64)
//!     }
//! }
//!
//! plugin!(Scheduler, "half_life", HalfLife);
//!
//! let entry = registry::find::<dyn Scheduler>("half_life").unwrap();
//! assert_eq!(entry.summary(), "Halves every so many steps.");
//! ```
//!
//! A plugin that needs something of the run to be built (a width, a parameter builder) names a function instead:
//! `plugin!(Backbone, "vit", VitConfig, Vit::build)` with `fn build(config: VitConfig, context: &mut
//! BackboneContext<'_>) -> Result<Box<dyn Backbone>>`. `plugin!(default Masking, "block", Block)` registers the plugin that a
//! table of its kind means when it names none.
//!
//! Registration happens before `main` (crate `inventory`), for every crate that is linked in. Order is not defined
//! there, so everything here is sorted by name, and a name used twice is an error of [`check`].

mod schedule;

use std::collections::BTreeSet;
use std::fmt;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::contract::{
    Augmentation, Backbone, BackboneContext, CropContext, DataContext, Dataset, Loss, LossContext, Masking, Optimizer,
    PosEncoding, Probe, Scheduler, TeacherPolicy,
};
use crate::problem::Nested;
use crate::{Error, Result};

/// A kind of plugin: implemented for every `dyn Contract`.
pub trait Kind: 'static {
    /// Its name on the command line and in messages: `loss`.
    const NAME: &'static str;
    /// What is known when a plugin of this kind is built.
    type Context<'a>;
    /// All registered plugins of this kind, unsorted.
    fn registrations() -> Box<dyn Iterator<Item = &'static Registration<Self>>>;
}

macro_rules! kinds {
    ($($contract:ident, $name:literal, $context:ty;)*) => {$(
        impl Kind for dyn $contract {
            const NAME: &'static str = $name;
            type Context<'a> = $context;
            fn registrations() -> Box<dyn Iterator<Item = &'static Registration<Self>>> {
                Box::new(inventory::iter::<Registration<dyn $contract>>.into_iter())
            }
        }
        inventory::collect!(Registration<dyn $contract>);
    )*

        /// The names of all kinds.
        pub const KINDS: &[&str] = &[$($name),*];

        /// All plugins of all kinds, by kind and name.
        pub fn all() -> Vec<PluginInfo> {
            let mut all = Vec::new();
            $(all.extend(plugins::<dyn $contract>().into_iter().map(Registration::info));)*
            all
        }

        /// The crates that register plugins.
        pub fn crates() -> BTreeSet<&'static str> {
            let mut all = BTreeSet::new();
            $(all.extend(plugins::<dyn $contract>().iter().filter_map(|plugin| plugin.module.split("::").next()));)*
            all
        }

        /// Fails if two plugins of a kind share a name, or both are what a table without a name means; called once when a
        /// program starts.
        ///
        /// # Errors
        /// Which two.
        pub fn check() -> Result<()> {
            $(check_kind::<dyn $contract>()?;)*
            Ok(())
        }
    };
}

kinds! {
    Backbone, "backbone", BackboneContext<'a>;
    PosEncoding, "pos_encoding", ();
    Loss, "loss", LossContext<'a>;
    Scheduler, "scheduler", ();
    TeacherPolicy, "teacher", ();
    Dataset, "dataset", DataContext;
    Augmentation, "augmentation", CropContext;
    Masking, "masking", ();
    Probe, "probe", ();
    Optimizer, "optimizer", ();
}

/// One registered plugin. Made by [`plugin!`](crate::plugin).
pub struct Registration<K: ?Sized + Kind> {
    /// Its name in recipes.
    pub name: &'static str,
    /// Whether a table of its kind that names no plugin means this one.
    pub default: bool,
    /// The source file that registers it.
    pub file: &'static str,
    /// The module that registers it, its crate first.
    pub module: &'static str,
    /// JSON schema of its config, with docs and defaults.
    pub schema: fn(&mut schemars::SchemaGenerator) -> schemars::Schema,
    /// Reads a table (without `plugin`) and gives it back with every default filled in.
    pub resolve: fn(&figment::value::Value) -> Result<serde_json::Value, figment::Error>,
    /// Builds from a resolved table.
    #[allow(clippy::type_complexity)]
    pub build: fn(serde_json::Value, &mut K::Context<'_>) -> Result<Box<K>>,
}

/// What `dinolab plugins` shows of a plugin.
#[derive(Clone, Debug, Serialize)]
pub struct PluginInfo {
    /// Its kind.
    pub kind: &'static str,
    /// Its name.
    pub name: &'static str,
    /// First paragraph of its doc comment.
    pub summary: String,
    /// The source file that registers it.
    pub file: &'static str,
    /// JSON schema of its config.
    pub schema: schemars::Schema,
}

impl<K: ?Sized + Kind> Registration<K> {
    /// First paragraph of the config's doc comment.
    pub fn summary(&self) -> String {
        let schema = self.root_schema();
        let doc = schema.get("description").and_then(|d| d.as_str()).unwrap_or_default();
        doc.split("\n\n").next().unwrap_or_default().replace('\n', " ")
    }

    fn root_schema(&self) -> schemars::Schema {
        let mut generator = schemars::generate::SchemaSettings::draft07().with(|s| s.inline_subschemas = true);
        generator.meta_schema = None;
        (self.schema)(&mut generator.into_generator())
    }

    fn info(&'static self) -> PluginInfo {
        let schema = self.root_schema();
        PluginInfo { kind: K::NAME, name: self.name, summary: self.summary(), file: self.file, schema }
    }
}

/// All plugins of a kind, by name.
pub fn plugins<K: ?Sized + Kind>() -> Vec<&'static Registration<K>> {
    let mut all: Vec<_> = K::registrations().collect();
    all.sort_by_key(|r| r.name);
    all
}

/// The plugin of that kind and name.
pub fn find<K: ?Sized + Kind>(name: &str) -> Option<&'static Registration<K>> {
    K::registrations().find(|r| r.name == name)
}

/// The plugin that a table of a kind means when it names none; `None` for kinds of which one has to be named.
pub fn default_of<K: ?Sized + Kind>() -> Option<&'static str> {
    K::registrations().find(|r| r.default).map(|r| r.name)
}

fn check_kind<K: ?Sized + Kind>() -> Result<()> {
    let all = plugins::<K>();
    if let Some([one, other, ..]) = all.windows(2).find(|pair| pair[0].name == pair[1].name) {
        let problem = format!("two {} plugins are named `{}`: {} and {}", K::NAME, one.name, one.file, other.file);
        return Err(Error::user(problem, "rename one of them in its plugin! line"));
    }
    let defaults: Vec<_> = all.iter().filter(|r| r.default).collect();
    if let [one, other, ..] = defaults[..] {
        let problem = format!("two {} plugins are the default: {} and {}", K::NAME, one.file, other.file);
        return Err(Error::user(problem, "take `default` out of one's plugin! line"));
    }
    Ok(())
}

/// Registers a plugin: `plugin!(Contract, "name", Config)` when the config is the plugin itself, or
/// `plugin!(Contract, "name", Config, build_function)`; with `default` before the contract, the plugin of tables that name
/// none. See [`registry`](crate::registry).
#[macro_export]
macro_rules! plugin {
    ($contract:ident, $name:literal, $config:ty $(, $build:expr)?) => {
        $crate::plugin!(@register false, $contract, $name, $config $(, $build)?);
    };
    (default $contract:ident, $name:literal, $config:ty $(, $build:expr)?) => {
        $crate::plugin!(@register true, $contract, $name, $config $(, $build)?);
    };
    (@register $default:literal, $contract:ident, $name:literal, $config:ty) => {
        $crate::plugin!(@register $default, $contract, $name, $config, |config: $config, _: &mut _| {
            Ok(Box::new(config) as Box<dyn $crate::contract::$contract>)
        });
    };
    (@register $default:literal, $contract:ident, $name:literal, $config:ty, $build:expr) => {
        $crate::inventory::submit! {
            $crate::registry::Registration::<dyn $crate::contract::$contract> {
                name: $name,
                default: $default,
                file: file!(),
                module: module_path!(),
                schema: <$config as $crate::schemars::JsonSchema>::json_schema,
                resolve: $crate::registry::resolve_config::<$config>,
                build: |value, context| ($build)($crate::registry::read_config::<$config>($name, value)?, context),
            }
        }
    };
}

/// Used by [`plugin!`](crate::plugin): reads a config and writes it back with defaults.
pub fn resolve_config<C: Serialize + for<'de> Deserialize<'de>>(
    table: &figment::value::Value,
) -> Result<serde_json::Value, figment::Error> {
    let config: C = table.deserialize()?;
    serde_json::to_value(&config).map_err(|e| figment::Error::from(e.to_string()))
}

/// Used by [`plugin!`](crate::plugin): reads a resolved config.
pub fn read_config<C: for<'de> Deserialize<'de>>(name: &str, value: serde_json::Value) -> Result<C> {
    // Through figment, not serde_json, so that nested plugin tables see one kind of deserializer.
    figment::value::Value::serialize(&value)
        .and_then(|v| v.deserialize())
        .map_err(|e| Error::user(format!("plugin `{name}`: {e}"), "this is what was saved; was it edited by hand?"))
}

/// A plugin chosen in a recipe: a table with `plugin = "name"` (which may be left out where the kind has a default) and the
/// plugin's own keys.
///
/// Reading it checks the name and every key; [`build`](Self::build) makes the plugin.
pub struct Chosen<K: ?Sized + Kind> {
    name: String,
    /// The plugin's own keys, every default filled in.
    config: serde_json::Value,
    kind: std::marker::PhantomData<fn() -> K>,
}

impl<K: ?Sized + Kind> Chosen<K> {
    /// The plugin's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The plugin's keys, every default filled in.
    pub fn config(&self) -> &serde_json::Value {
        &self.config
    }

    /// Builds the plugin.
    pub fn build(&self, context: &mut K::Context<'_>) -> Result<Box<K>> {
        let entry = find::<K>(&self.name).expect("the name was checked when the table was read");
        (entry.build)(self.config.clone(), context)
    }

    /// Reads a table whose `plugin` key may be missing when `default` names one.
    ///
    /// # Errors
    /// If the plugin is not known, or refuses its keys.
    pub fn from_value(value: &figment::value::Value, default: Option<&str>) -> Result<Self, Nested> {
        use figment::value::Value;
        let Some(table) = value.as_dict() else {
            let expected = format!("a table with `plugin = \"...\"` ({})", K::NAME);
            return Err(Nested::wrong_type(value, &expected));
        };
        let mut rest = table.clone();
        let known = || plugins::<K>().iter().map(|r| r.name.to_string()).collect();
        let name = match (rest.remove("plugin"), default) {
            (Some(Value::String(_, name)), _) => name,
            (Some(other), _) => return Err(Nested::wrong_type(&other, "the name of a plugin").under("plugin")),
            (None, Some(default)) => default.to_string(),
            (None, None) => return Err(Nested::missing("plugin", known())),
        };
        let Some(entry) = find::<K>(&name) else {
            return Err(Nested::unknown_plugin(K::NAME, &name, known()));
        };
        let config = (entry.resolve)(&Value::Dict(value.tag(), rest));
        let config = config.map_err(|e| Nested::of(&e).with_known(["plugin"]))?;
        Ok(Self { name, config, kind: std::marker::PhantomData })
    }
}

/// The kind's default plugin with the defaults of its keys.
///
/// # Panics
/// If no plugin is registered as the default of its kind, or a key of it has no default.
impl<K: ?Sized + Kind> Default for Chosen<K> {
    fn default() -> Self {
        Self::from_value(&figment::value::Dict::new().into(), default_of::<K>())
            .unwrap_or_else(|e| panic!("the default {} plugin is linked in and has defaults: {}", K::NAME, e.message))
    }
}

impl<K: ?Sized + Kind> Clone for Chosen<K> {
    fn clone(&self) -> Self {
        Self { name: self.name.clone(), config: self.config.clone(), kind: std::marker::PhantomData }
    }
}

impl<K: ?Sized + Kind> fmt::Debug for Chosen<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.name, self.config)
    }
}

impl<K: ?Sized + Kind> PartialEq for Chosen<K> {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name && self.config == other.config
    }
}

impl<K: ?Sized + Kind> Serialize for Chosen<K> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut table = serde_json::Map::new();
        table.insert("plugin".into(), self.name.clone().into());
        if let Some(config) = self.config.as_object() {
            table.extend(config.clone());
        }
        table.serialize(serializer)
    }
}

impl<'de, K: ?Sized + Kind> Deserialize<'de> for Chosen<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = <figment::value::Value as Deserialize>::deserialize(deserializer)?;
        Self::from_value(&value, default_of::<K>()).map_err(|e| D::Error::custom(e.encode()))
    }
}

impl<K: ?Sized + Kind> schemars::JsonSchema for Chosen<K> {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        format!("plugin_{}", K::NAME).into()
    }

    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        plugin_schema::<K>(generator, &serde_json::Map::new(), default_of::<K>())
    }
}

/// The schema of a table that chooses a plugin of kind `K`: one alternative a plugin. `extra` keys are allowed beside
/// the plugin's own; `default` is the plugin when `plugin` is missing.
pub fn plugin_schema<K: ?Sized + Kind>(
    generator: &mut schemars::SchemaGenerator,
    extra: &serde_json::Map<String, serde_json::Value>,
    default: Option<&str>,
) -> schemars::Schema {
    let of = |entry| entry_schema::<K>(generator, entry, extra, default == Some(entry.name));
    let alternatives: Vec<serde_json::Value> = plugins::<K>().into_iter().map(of).collect();
    schemars::json_schema!({ "anyOf": alternatives })
}

/// The schema of a table of that plugin, which it has to name unless it is the `default`.
pub(crate) fn entry_schema<K: ?Sized + Kind>(
    generator: &mut schemars::SchemaGenerator,
    entry: &Registration<K>,
    extra: &serde_json::Map<String, serde_json::Value>,
    default: bool,
) -> serde_json::Value {
    let mut schema = (entry.schema)(generator).to_value();
    let Some(object) = schema.as_object_mut() else { return schema };
    object.insert("title".into(), entry.name.into());
    // For `recipe::describe`: who reads which keys.
    object.insert("x-kind".into(), K::NAME.into());
    object.insert("x-own".into(), extra.keys().cloned().collect::<Vec<_>>().into());
    let properties = object.entry("properties").or_insert_with(|| serde_json::json!({}));
    if let Some(properties) = properties.as_object_mut() {
        properties.insert("plugin".into(), serde_json::json!({ "const": entry.name }));
        properties.extend(extra.clone());
    }
    if default {
        // For `recipe::describe`: the one of a table that names none.
        object.insert("x-default".into(), true.into());
    } else {
        let required = object.entry("required").or_insert_with(|| serde_json::json!([]));
        if let Some(required) = required.as_array_mut() {
            required.insert(0, "plugin".into());
        }
    }
    schema
}
