//! `dinolab recipe explain KEY PATH`: value, origin, reader, type, default and documentation of one key.

use std::path::Path;

use dinolab_core::problem::{nearest, Origin, Problem};
use dinolab_core::recipe::{describe::Guide, toml_value, Overrides};
use dinolab_core::resolved::Resolved;
use dinolab_core::text::printable;
use dinolab_core::{Error, Result};

use crate::style::{self, shell};

/// A dotted key as a JSON pointer.
fn pointer_of(key: &str) -> String {
    format!("/{}", key.replace('.', "/"))
}

/// Runs the command.
pub(super) fn run(key: &str, path: &Path, overrides: &Overrides) -> Result<()> {
    if Path::new(key).exists() && !path.exists() {
        let help = format!("the key comes first: dinolab recipe explain {} {}", shell(&printable(path)), shell(key));
        return Err(Error::user(format!("{}: there is no such recipe", printable(path)), help));
    }
    let resolved = Resolved::load(path, overrides)?;
    let guide = Guide::default();
    // The resolved recipe names every plugin, also those that were defaults.
    let value = resolved.dict();
    let unknown = |siblings: Vec<String>| {
        let names = siblings.iter().map(String::as_str);
        let meant = nearest(key, names.clone()).map(|n| format!("did you mean `{n}`? ")).unwrap_or_default();
        let help = match siblings.is_empty() {
            true => "what is there has no keys inside".to_string(),
            false => format!("{meant}known: {}", names.collect::<Vec<_>>().join(", ")),
        };
        Err(Problem::error(key, "no such key in this recipe").help(help).into())
    };
    let Some(known) = guide.key(&value, key) else { return unknown(guide.siblings(&value, key)) };
    // A loss, teacher or probe that the recipe does not have, and no plugin has the name of.
    let mut parts = key.split('.');
    if let (Some(table), Some(name), false) = (parts.next(), parts.next(), known.reader.contains(" plugin ")) {
        let named = resolved.value.get(table).and_then(serde_json::Value::as_object);
        let named = named.filter(|named| {
            ["losses", "teachers", "augmentations", "probes"].contains(&table) && !named.contains_key(name)
        });
        if let Some(named) = named {
            return unknown(named.keys().map(|name| format!("{table}.{name}")).collect());
        }
    }
    let pointer = pointer_of(key);
    let from = match (resolved.raw.set_by(key), resolved.value.pointer(&pointer)) {
        (Origin::Default, Some(v)) if v.is_object() => "the keys inside".to_string(),
        // What nobody set, and is not what the key's reader takes by itself.
        (Origin::Default, Some(v)) if !v.is_null() && known.default.as_ref() != Some(v) => {
            let preset = key.rsplit_once('.').map(|(table, _)| format!("{table}.preset"));
            let chosen = preset.as_ref().and_then(|preset| resolved.value.pointer(&pointer_of(preset))?.as_str());
            match preset.as_ref().zip(chosen) {
                Some((key, chosen)) => format!("the preset {chosen}, chosen by {}", resolved.raw.set_by(key)),
                None => format!("{}, from other keys", known.reader),
            }
        }
        (origin, _) => origin.to_string(),
    };
    let style = style::out();
    let row = |name: &str, text: String| vec![style.dim(name), text];
    let mut rows = vec![
        row("key", style.bold(key)),
        row("value", resolved.value.pointer(&pointer).map_or("none".into(), toml_value)),
        row("from", from),
        row("read by", known.reader),
        row("type", known.kind),
        row("default", known.default.as_ref().map_or("none".into(), toml_value)),
    ];
    rows.extend(known.doc.map(|doc| row("doc", doc)));
    style::print(&style::table(rows));
    Ok(())
}
