//! The optimizer of a recipe: a plugin's own keys beside those that every optimizer has.

use std::ops::Deref;

use schemars::{JsonSchema, SchemaGenerator};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{Nested, OptimizerConfig};
use crate::contract::Optimizer;
use crate::registry::{default_of, plugin_schema, Chosen};

/// The optimizer in a recipe: the plugin's own keys and those of every optimizer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OptimizerEntry {
    /// Rates, decay and clipping.
    pub config: OptimizerConfig,
    /// The plugin.
    pub plugin: Chosen<dyn Optimizer>,
}

impl OptimizerEntry {
    /// The keys that every optimizer has.
    pub const OWN: &'static [&'static str] = &[
        "lr",
        "last_layer_lr",
        "weight_decay",
        "clip_grad",
        "layerwise_decay",
        "patch_embed_lr_mult",
        "freeze_last_layer_steps",
    ];
}

impl Deref for OptimizerEntry {
    type Target = OptimizerConfig;

    fn deref(&self) -> &OptimizerConfig {
        &self.config
    }
}

impl Serialize for OptimizerEntry {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let own = serde_json::to_value(&self.config).map_err(serde::ser::Error::custom)?;
        let mut table = serde_json::Map::new();
        table.insert("plugin".into(), self.plugin.name().into());
        for keys in [&own, self.plugin.config()] {
            table.extend(keys.as_object().cloned().unwrap_or_default());
        }
        table.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for OptimizerEntry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use figment::value::{Dict, Value};
        let read = |value: Value| -> Result<Self, Nested> {
            let Value::Dict(tag, table) = value else { return Err(Nested::wrong_type(&value, "a table")) };
            let (own, rest): (Dict, Dict) = table.into_iter().partition(|(k, _)| Self::OWN.contains(&k.as_str()));
            let plugin = Chosen::from_value(&Value::Dict(tag, rest), default_of::<dyn Optimizer>());
            let plugin = plugin.map_err(|e| e.with_known(Self::OWN.iter().copied()))?;
            Ok(Self { config: Value::Dict(tag, own).deserialize().map_err(|e| Nested::of(&e))?, plugin })
        };
        read(<Value as Deserialize>::deserialize(deserializer)?).map_err(|e| D::Error::custom(e.encode()))
    }
}

impl JsonSchema for OptimizerEntry {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "optimizer".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> schemars::Schema {
        let own = OptimizerConfig::json_schema(generator).to_value();
        let own = own.get("properties").and_then(|p| p.as_object()).cloned().unwrap_or_default();
        plugin_schema::<dyn Optimizer>(generator, &own, default_of::<dyn Optimizer>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::test_plugins::{with, RECIPE};
    use crate::recipe::{describe, RawRecipe, Resolved};

    #[test]
    fn the_keys_of_every_optimizer_are_those_of_its_table() {
        let schema = describe::schema_of::<OptimizerConfig>();
        let mut keys: Vec<&String> = schema["properties"].as_object().unwrap().keys().collect();
        let mut own = OptimizerEntry::OWN.to_vec();
        keys.sort();
        own.sort_unstable();
        assert_eq!(keys, own);
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
        let set = |key: &str| super::super::Overrides { sets: vec![key.into()], env: false };
        let raw = RawRecipe::from_text(&base).unwrap().with(&set("optimizer.plugin=test_plain")).unwrap();
        let resolved = raw.resolve().unwrap();
        assert_eq!(resolved.value["optimizer"]["lr"], 0.5);
        let raw = RawRecipe::from_text(&base).unwrap().with(&set("optimizer.plugin=adamw")).unwrap();
        assert_eq!(raw.resolve().unwrap().value["optimizer"]["eps"], 1e-7);
    }
}
