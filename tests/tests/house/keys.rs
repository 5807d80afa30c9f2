//! A key of a plugin that no code reads would be accepted, saved and ignored: every key has to be read in the plugin's
//! own source.

use std::path::Path;

use dinolab_core::registry;
use serde_json::Value as Json;

// The plugins register themselves when they are linked in.
use dinolab_plugins as _;

/// The source of a plugin: its file, or all files of its folder.
fn source(file: &Path) -> String {
    let folder = file.parent().expect("a file is in a folder");
    let of_its_own = folder.file_name().is_some_and(|name| name != "src");
    let files = if of_its_own { walkdir::WalkDir::new(folder) } else { walkdir::WalkDir::new(file) };
    let files = files.into_iter().map(|entry| entry.expect("the repository can be read").into_path());
    let files = files.filter(|path| path.extension().is_some_and(|ending| ending == "rs"));
    files.map(|path| std::fs::read_to_string(path).expect("sources are text")).collect()
}

/// Whether `text` reads a field: `.key`, not as the beginning of a longer name or of a call.
fn reads(text: &str, key: &str) -> bool {
    text.match_indices(&format!(".{key}")).any(|(at, found)| {
        let next = text[at + found.len()..].chars().next().unwrap_or(' ');
        !(next.is_alphanumeric() || next == '_' || next == '(')
    })
}

#[test]
fn every_key_of_a_plugin_is_read_by_its_code() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests' crate is in the workspace");
    let mut looked_at = 0;
    let mut unread = Vec::new();
    for plugin in registry::all() {
        let text = source(&root.join(plugin.file));
        let keys = plugin.schema.as_value().get("properties").and_then(Json::as_object).into_iter().flatten();
        for (key, _) in keys {
            looked_at += 1;
            if !reads(&text, key) {
                unread.push(format!("{} {}: {key}", plugin.kind, plugin.name));
            }
        }
    }
    assert!(looked_at > 100, "only {looked_at} keys were found");
    assert!(unread.is_empty(), "nothing in the plugin's source reads\n{}", unread.join("\n"));
}
