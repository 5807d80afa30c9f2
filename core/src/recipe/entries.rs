//! Losses, teachers, augmentations and probes of a recipe: named plugin tables, some with keys of the recipe's own beside the
//! plugin's.

use std::collections::BTreeMap;
use std::fmt;

use schemars::{JsonSchema, SchemaGenerator};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::describe::DEFINITIONS;
use crate::contract::{Augmentation, ImageSize, Loss, Probe, Schedule, TeacherPolicy};
use crate::problem::Nested;
use crate::registry::{entry_schema, plugin_schema, plugins, Chosen, Kind};

/// A loss in a recipe: the plugin's own keys and these.
#[derive(Clone, Debug, PartialEq)]
pub struct LossEntry {
    /// Whether it is computed at all.
    pub enabled: bool,
    /// What it is multiplied by in the total.
    pub weight: Schedule,
    /// The plugin.
    pub loss: Chosen<dyn Loss>,
}

/// A probe in a recipe: the plugin's own keys and these.
#[derive(Clone, Debug, PartialEq)]
pub struct ProbeEntry {
    /// Whether it is run at all.
    pub enabled: bool,
    /// Steps between runs; 0: only at the end.
    pub every: u64,
    /// What images are brought to, in turn: every score then has the size in its name. None: the size of global crops.
    pub sizes: Vec<ImageSize>,
    /// The plugin.
    pub probe: Chosen<dyn Probe>,
}

/// Named tables of plugins: `[losses.<name>]`, `[teachers.<name>]`, `[augmentations.<name>]`, `[probes.<name>]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Table<E>(pub BTreeMap<String, E>);

/// `[losses.<name>]`.
pub type Losses = Table<LossEntry>;
/// `[teachers.<name>]`.
pub type Teachers = Table<Chosen<dyn TeacherPolicy>>;
/// `[augmentations.<name>]`.
pub type Augmentations = Table<Chosen<dyn Augmentation>>;
/// `[probes.<name>]`.
pub type Probes = Table<ProbeEntry>;

impl<E> Table<E> {
    /// Whether there is no table.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<E> Default for Table<E> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

/// A plugin table with keys of the recipe's own beside the plugin's.
pub trait Entry: Sized + fmt::Debug {
    /// The contract of the plugin.
    type Plugin: ?Sized + Kind;
    /// The recipe's own keys.
    const OWN: &'static [&'static str];
    /// The schemas of the recipe's own keys.
    fn schemas(generator: &mut SchemaGenerator) -> serde_json::Map<String, serde_json::Value>;
    /// From the recipe's own keys (those present) and the plugin.
    fn read(own: figment::value::Dict, plugin: Chosen<Self::Plugin>) -> Result<Self, Nested>;
    /// The recipe's own keys, and the plugin.
    fn parts(&self) -> (Vec<(&'static str, serde_json::Value)>, &Chosen<Self::Plugin>);
}

fn take<T: for<'de> Deserialize<'de>>(own: &figment::value::Dict, key: &str, default: T) -> Result<T, Nested> {
    own.get(key).map_or(Ok(default), |v| v.deserialize().map_err(|e| Nested::of(&e).under(key)))
}

/// The schema of an own key: that of its type, with a doc and a default.
fn own_schema<T: JsonSchema>(
    generator: &mut SchemaGenerator,
    doc: &str,
    default: impl Into<serde_json::Value>,
) -> schemars::Schema {
    let mut schema = T::json_schema(generator);
    schema.insert("description".into(), doc.into());
    schema.insert("default".into(), default.into());
    schema
}

impl Entry for LossEntry {
    type Plugin = dyn Loss;

    const OWN: &'static [&'static str] = &["enabled", "weight"];

    fn schemas(generator: &mut SchemaGenerator) -> serde_json::Map<String, serde_json::Value> {
        let enabled = own_schema::<bool>(generator, "Whether the loss is computed at all.", true);
        let weight = "What it is multiplied by in the total: a number or a scheduler.";
        let mut weight = own_schema::<Schedule>(generator, weight, 1.0);
        weight.insert("minimum".into(), (-1e6).into());
        weight.insert("maximum".into(), 1e6.into());
        [("enabled".into(), enabled.to_value()), ("weight".into(), weight.to_value())].into_iter().collect()
    }

    fn read(own: figment::value::Dict, loss: Chosen<dyn Loss>) -> Result<Self, Nested> {
        let weight = take(&own, "weight", Schedule::constant(1.0))?;
        Ok(Self { enabled: take(&own, "enabled", true)?, weight, loss })
    }

    fn parts(&self) -> (Vec<(&'static str, serde_json::Value)>, &Chosen<dyn Loss>) {
        let weight = serde_json::to_value(&self.weight).expect("a schedule is plain data");
        (vec![("enabled", self.enabled.into()), ("weight", weight)], &self.loss)
    }
}

/// A table without keys beside the plugin's.
impl<K: ?Sized + Kind> Entry for Chosen<K> {
    type Plugin = K;

    const OWN: &'static [&'static str] = &[];

    fn schemas(_: &mut SchemaGenerator) -> serde_json::Map<String, serde_json::Value> {
        serde_json::Map::new()
    }

    fn read(_: figment::value::Dict, plugin: Chosen<K>) -> Result<Self, Nested> {
        Ok(plugin)
    }

    fn parts(&self) -> (Vec<(&'static str, serde_json::Value)>, &Chosen<K>) {
        (Vec::new(), self)
    }
}

impl Entry for ProbeEntry {
    type Plugin = dyn Probe;

    const OWN: &'static [&'static str] = &["enabled", "every", "sizes"];

    fn schemas(generator: &mut SchemaGenerator) -> serde_json::Map<String, serde_json::Value> {
        let enabled = own_schema::<bool>(generator, "Whether the probe is run at all.", true);
        let every = own_schema::<u64>(generator, "Steps between runs; 0: only at the end.", 0);
        let doc = "Sizes that images are brought to, in turn, such as 64 or \"96x64\" (width x height): scores are named with \
            them (`miou@96x64`). None: the size of global crops.";
        let sizes = own_schema::<Vec<ImageSize>>(generator, doc, Vec::<u64>::new());
        [("enabled", enabled), ("every", every), ("sizes", sizes)]
            .map(|(k, v)| (k.into(), v.to_value()))
            .into_iter()
            .collect()
    }

    fn read(own: figment::value::Dict, probe: Chosen<dyn Probe>) -> Result<Self, Nested> {
        let (every, sizes) = (take(&own, "every", 0)?, take(&own, "sizes", Vec::new())?);
        Ok(Self { enabled: take(&own, "enabled", true)?, every, sizes, probe })
    }

    fn parts(&self) -> (Vec<(&'static str, serde_json::Value)>, &Chosen<dyn Probe>) {
        let sizes = serde_json::to_value(&self.sizes).expect("sizes are plain data");
        (vec![("enabled", self.enabled.into()), ("every", self.every.into()), ("sizes", sizes)], &self.probe)
    }
}

impl<E: Entry> Serialize for Table<E> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, entry)| {
            let (own, plugin) = entry.parts();
            let mut table = serde_json::Map::new();
            table.insert("plugin".into(), plugin.name().into());
            table.extend(own.into_iter().map(|(k, v)| (k.to_string(), v)));
            if let Some(config) = plugin.config().as_object() {
                table.extend(config.clone());
            }
            (name, table)
        }))
    }
}

impl<'de, E: Entry> Deserialize<'de> for Table<E> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use figment::value::{Dict, Value};
        let tables = <BTreeMap<String, Value> as Deserialize>::deserialize(deserializer)?;
        let read = |(name, value): (String, Value)| -> Result<(String, E), Nested> {
            let Value::Dict(tag, table) = value else { return Err(Nested::wrong_type(&value, "a table").under(&name)) };
            let (own, rest): (Dict, Dict) = table.into_iter().partition(|(k, _)| E::OWN.contains(&k.as_str()));
            let plugin = Chosen::from_value(&Value::Dict(tag, rest), Some(&name));
            let entry = plugin.map_err(|e| e.with_known(E::OWN.iter().copied())).and_then(|p| E::read(own, p));
            Ok((name.clone(), entry.map_err(|e| e.under(&name))?))
        };
        let entries: Result<BTreeMap<String, E>, Nested> = tables.into_iter().map(read).collect();
        entries.map(Self).map_err(|e| D::Error::custom(e.encode()))
    }
}

impl<E: Entry> JsonSchema for Table<E> {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        format!("table_of_{}", E::Plugin::NAME).into()
    }

    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        let own = E::schemas(generator);
        let any = plugin_schema::<E::Plugin>(generator, &own, None).to_value();
        // A table with the name of a plugin may leave out which it is; it may be another all the same, said once for all.
        let name = format!("table_of_{}", E::Plugin::NAME);
        let reference = serde_json::json!({ "$ref": format!("{DEFINITIONS}{name}") });
        let named = plugins::<E::Plugin>().into_iter().map(|plugin| {
            let own = entry_schema(generator, plugin, &own, true);
            (plugin.name.to_string(), serde_json::json!({ "anyOf": [own, reference] }))
        });
        let named: serde_json::Map<_, _> = named.collect();
        generator.definitions_mut().insert(name, any);
        schemars::json_schema!({ "type": "object", "properties": named, "additionalProperties": reference })
    }
}
