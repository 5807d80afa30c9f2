//! A plugin's table with keys that it has whatever the plugin: the backbone's, the crops', the optimizer's.

use std::borrow::Cow;
use std::fmt;
use std::ops::Deref;
use std::path::PathBuf;

use schemars::{JsonSchema, SchemaGenerator};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::schema::{CropConfig, OptimizerConfig, Resolution};
use crate::contract::{Augmentation, Backbone, CropContext, Optimizer};
use crate::problem::Nested;
use crate::registry::{default_of, plugin_schema, Chosen, Kind};

/// Keys that a plugin's table has whatever the plugin.
pub trait OwnKeys: Serialize + for<'de> Deserialize<'de> + JsonSchema {
    /// The contract of the plugin.
    type Plugin: ?Sized + Kind;
    /// The table.
    const TABLE: &'static str;
    /// The keys.
    const KEYS: &'static [&'static str];
}

/// A plugin and the keys beside its own; read as those keys.
pub struct Beside<C: OwnKeys> {
    /// The recipe's own keys.
    pub own: C,
    /// The plugin and its keys.
    pub plugin: Chosen<C::Plugin>,
}

/// Where a backbone starts from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BackboneConfig {
    /// Start from these weights of a backbone (what `dinolab import` or `dinolab export` wrote, a run, a checkpoint or a
    /// safetensors file): student and teacher, heads new. If `plugin` is left out the model is theirs too, and so is every
    /// key that is not written.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "path"))]
    pub weights: Option<PathBuf>,
}

/// `[backbone]`.
pub type BackboneEntry = Beside<BackboneConfig>;
/// `[crops]`.
pub type CropsEntry = Beside<CropConfig>;
/// `[optimizer]`.
pub type OptimizerEntry = Beside<OptimizerConfig>;

impl OwnKeys for BackboneConfig {
    type Plugin = dyn Backbone;
    const TABLE: &'static str = "backbone";
    const KEYS: &'static [&'static str] = &["weights"];
}

impl OwnKeys for CropConfig {
    type Plugin = dyn Augmentation;
    const TABLE: &'static str = "crops";
    const KEYS: &'static [&'static str] =
        &["global_size", "local_count", "local_size", "resolutions", "teacher_without_distortion", "mean", "std"];
}

impl OwnKeys for OptimizerConfig {
    type Plugin = dyn Optimizer;
    const TABLE: &'static str = "optimizer";
    const KEYS: &'static [&'static str] = &[
        "lr",
        "last_layer_lr",
        "weight_decay",
        "clip_grad",
        "layerwise_decay",
        "patch_embed_lr_mult",
        "freeze_last_layer_steps",
        "moments",
        "offload",
        "offload_moments",
        "shard_teachers",
        "update",
    ];
}

impl CropsEntry {
    /// What an augmentation is built with for crops of these sizes.
    pub(crate) fn context(&self, sizes: &Resolution, patch_size: usize) -> CropContext {
        let Resolution { global_size, local_size, .. } = *sizes;
        CropContext { global_size, local_size, local_count: self.local_count, patch_size, channels: self.channels() }
    }

    /// Builds the augmentation for crops of these sizes.
    ///
    /// # Errors
    /// If the plugin refuses its configuration, or does not go with the sizes.
    pub fn build(&self, sizes: &Resolution, patch_size: usize) -> crate::Result<(Box<dyn Augmentation>, CropContext)> {
        let mut context = self.context(sizes, patch_size);
        Ok((self.plugin.build(&mut context)?, context))
    }
}

impl<C: OwnKeys + Clone> Clone for Beside<C> {
    fn clone(&self) -> Self {
        Self { own: self.own.clone(), plugin: self.plugin.clone() }
    }
}

impl<C: OwnKeys + fmt::Debug> fmt::Debug for Beside<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct(C::TABLE).field("own", &self.own).field("plugin", &self.plugin).finish()
    }
}

impl<C: OwnKeys + PartialEq> PartialEq for Beside<C> {
    fn eq(&self, other: &Self) -> bool {
        self.own == other.own && self.plugin == other.plugin
    }
}

impl<C: OwnKeys> Deref for Beside<C> {
    type Target = C;

    fn deref(&self) -> &C {
        &self.own
    }
}

impl<C: OwnKeys + Default> Default for Beside<C>
where
    Chosen<C::Plugin>: Default,
{
    fn default() -> Self {
        Self { own: C::default(), plugin: Chosen::default() }
    }
}

impl<C: OwnKeys> Serialize for Beside<C> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let own = serde_json::to_value(&self.own).map_err(serde::ser::Error::custom)?;
        let mut table = serde_json::Map::new();
        table.insert("plugin".into(), self.plugin.name().into());
        for keys in [&own, self.plugin.config()] {
            table.extend(keys.as_object().cloned().unwrap_or_default());
        }
        table.serialize(serializer)
    }
}

impl<'de, C: OwnKeys> Deserialize<'de> for Beside<C> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use figment::value::{Dict, Value};
        let read = |value: Value| -> Result<Self, Nested> {
            let Value::Dict(tag, table) = value else { return Err(Nested::wrong_type(&value, "a table")) };
            let (own, rest): (Dict, Dict) = table.into_iter().partition(|(k, _)| C::KEYS.contains(&k.as_str()));
            let plugin = Chosen::from_value(&Value::Dict(tag, rest), default_of::<C::Plugin>());
            let plugin = plugin.map_err(|e| e.with_known(C::KEYS.iter().copied()))?;
            Ok(Self { own: Value::Dict(tag, own).deserialize().map_err(|e| Nested::of(&e))?, plugin })
        };
        read(<Value as Deserialize>::deserialize(deserializer)?).map_err(|e| D::Error::custom(e.encode()))
    }
}

impl<C: OwnKeys> JsonSchema for Beside<C> {
    fn schema_name() -> Cow<'static, str> {
        C::TABLE.into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> schemars::Schema {
        let own = C::json_schema(generator).to_value();
        let own = own.get("properties").and_then(|p| p.as_object()).cloned().unwrap_or_default();
        plugin_schema::<C::Plugin>(generator, &own, default_of::<C::Plugin>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::test_plugins::{with, RECIPE};
    use crate::recipe::{describe, Overrides, RawRecipe};
    use crate::resolved::Resolved;

    #[test]
    fn the_keys_that_a_table_has_of_its_own_are_all_listed() {
        fn hold<C: OwnKeys>() {
            let schema = describe::schema_of::<C>();
            let mut keys: Vec<&String> = schema["properties"].as_object().unwrap().keys().collect();
            let mut own = C::KEYS.to_vec();
            keys.sort();
            own.sort_unstable();
            assert_eq!(keys, own);
        }
        hold::<BackboneConfig>();
        hold::<CropConfig>();
        hold::<OptimizerConfig>();
    }

    #[test]
    fn a_table_without_a_plugin_is_adamw_and_one_of_another_plugin_has_its_keys() {
        let resolve = |text: &str| Resolved::from_text(text).unwrap();
        let plain = resolve(RECIPE);
        assert_eq!(
            (&plain.value["optimizer"]["plugin"], &plain.value["optimizer"]["eps"]),
            (&"adamw".into(), &1e-8.into())
        );
        assert_eq!(resolve(&with("[optimizer]\nplugin = \"adamw\"\nlr = 1e-3")).hash, plain.hash);
        let other = resolve(&with("[optimizer]\nplugin = \"test_plain\"\nlr = 2.0\nmomentum = 0.5"));
        assert_eq!(other.value["optimizer"]["momentum"], 0.5);
        assert!(other.value["optimizer"].get("eps").is_none());
        let error =
            Resolved::from_text(&with("[optimizer]\nplugin = \"test_plain\"\neps = 1e-8")).unwrap_err().to_string();
        assert!(error.contains("optimizer.eps"), "{error}");
    }

    #[test]
    fn another_plugin_above_drops_the_keys_of_the_one_below_and_keeps_those_of_every_optimizer() {
        let base = with("[optimizer]\nlr = 0.5\neps = 1e-7");
        let set = |key: &str| Overrides { sets: vec![key.into()], env: false };
        let raw = RawRecipe::from_text(&base).unwrap().with(&set("optimizer.plugin=test_plain")).unwrap();
        let resolved = Resolved::of(raw).unwrap();
        assert_eq!(resolved.value["optimizer"]["lr"], 0.5);
        let raw = RawRecipe::from_text(&base).unwrap().with(&set("optimizer.plugin=adamw")).unwrap();
        assert_eq!(Resolved::of(raw).unwrap().value["optimizer"]["eps"], 1e-7);
    }
}
