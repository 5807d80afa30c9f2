//! The book has a page on every built-in plugin, made from its doc comment and its schema; this test holds the pages to
//! both. After a change: `UPDATE_BOOK=1 cargo test --release -p dinolab-tests --test plugin_pages`.
//!
//! Formulas become MathML here, which browsers draw without a script; figures are drawn by the plugins themselves.

#[path = "plugin_pages/content.rs"]
mod content;
#[path = "plugin_pages/figures.rs"]
mod figures;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use dinolab::commands::plugins::keys;
use dinolab_core::registry::{self, PluginInfo};
use dinolab_tests::program::root;
use serde_json::Value as Json;

/// A formula as MathML.
fn math(latex: &str) -> String {
    let storage = pulldown_latex::Storage::new();
    let config =
        pulldown_latex::RenderConfig { display_mode: pulldown_latex::config::DisplayMode::Block, ..Default::default() };
    let mut out = String::new();
    pulldown_latex::push_mathml(&mut out, pulldown_latex::Parser::new(latex, &storage), config)
        .expect("a string grows");
    assert!(!out.contains("merror"), "{latex}: {out}");
    // A blank line would end the HTML block.
    out.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("\n")
}

/// How a recipe chooses the plugin.
fn example(plugin: &PluginInfo) -> String {
    if let Some(example) = content::example(plugin.kind, plugin.name) {
        return example.trim().to_string();
    }
    let (name, plugin_key) = (plugin.name, format!("plugin = \"{}\"", plugin.name));
    match plugin.kind {
        "loss" => format!("[losses.{name}]\nweight = 1.0"),
        "probe" => format!("[probes.{name}]\nevery = 100"),
        "pos_encoding" => format!("[backbone.pos_encoding]\n{plugin_key}"),
        "teacher" => format!("[teacher]\n{plugin_key}"),
        "dataset" => format!("[data]\n{plugin_key}"),
        "backbone" => format!("[backbone]\n{plugin_key}"),
        "optimizer" => format!("[optimizer]\n{plugin_key}\nlr = 1e-3"),
        "augmentation" => format!("[crops]\n{plugin_key}"),
        "masking" => format!("[masking]\n{plugin_key}"),
        _ => format!("[optimizer]\nlr = {{ {plugin_key} }}"),
    }
}

/// The page of a plugin.
fn page(plugin: &PluginInfo, figure: Option<&str>) -> String {
    let schema = plugin.schema.as_value();
    let doc = schema.get("description").and_then(Json::as_str).expect("every plugin says what it is");
    let mut page = "<!-- Made by tests/tests/plugin_pages.rs; change the plugin, not this. -->\n\n".to_string();
    let mut put = |text: String| page += &text;
    put(format!("# {}\n\n", plugin.name));
    put(format!("*{}*, in `{}`\n\n{doc}\n", plugin.kind.replace('_', " "), plugin.file));
    if let Some(latex) = content::formula(plugin.kind, plugin.name) {
        put(format!("\n{}\n", math(latex)));
    }
    if let Some(caption) = figure {
        put(format!("\n![{caption}](figures/{}.svg)\n\n{caption}\n", plugin.name));
    }
    put(format!("\n## In a recipe\n\n```toml\n{}\n```\n\n## Keys\n\n", example(plugin)));
    let mut rows = Vec::new();
    keys(schema, "", &mut rows);
    if rows.is_empty() {
        put("It has none.\n".into());
        return page;
    }
    put("| key | type | default | |\n|---|---|---|---|\n".into());
    for row in rows {
        let [key, kind, default, doc] = row.try_into().expect("a row has four columns");
        let cell = |text: &str| text.replace('|', "\\|");
        let code = |text: String| if text == "required" || text == "none" { text } else { format!("`{text}`") };
        put(format!("| `{key}` | {} | {} | {} |\n", cell(&kind), cell(&code(default)), cell(&doc)));
    }
    page
}

/// All pages and figures by their place in the book.
fn pages() -> BTreeMap<String, String> {
    let mut files = BTreeMap::new();
    for kind in registry::KINDS {
        let title = content::title(kind);
        let mut list = format!(
            "# {title}\n\nThe contract: [{}](../contracts/{kind}.md).\n\n| name | what |\n|---|---|\n",
            content::singular(kind)
        );
        for plugin in registry::all().iter().filter(|p| p.kind == *kind) {
            writeln!(list, "| [{0}]({kind}/{0}.md) | {1} |", plugin.name, plugin.summary.replace('|', "\\|"))
                .expect("a string grows");
        }
        files.insert(format!("plugins/{kind}.md"), list);
    }
    for plugin in registry::all() {
        let figure = figures::of(plugin.kind, plugin.name);
        let folder = format!("plugins/{}", plugin.kind);
        let text = page(&plugin, figure.as_ref().map(|f| f.caption));
        files.insert(format!("{folder}/{}.md", plugin.name), text);
        if let Some(figure) = figure {
            files.insert(format!("{folder}/figures/{}.svg", plugin.name), figure.svg);
        }
    }
    files
}

/// The part of the table of contents that lists the plugins.
fn contents() -> String {
    let mut text = String::new();
    let mut last = "";
    for plugin in registry::all() {
        if plugin.kind != last {
            writeln!(text, "  - [{}](plugins/{}.md)", content::title(plugin.kind), plugin.kind)
                .expect("a string grows");
            last = plugin.kind;
        }
        writeln!(text, "    - [{0}](plugins/{1}/{0}.md)", plugin.name, plugin.kind).expect("a string grows");
    }
    text
}

#[test]
fn the_page_of_every_plugin_says_what_the_plugin_says() {
    let book = root().join("book/src");
    let stale = "is stale: UPDATE_BOOK=1 cargo test --release -p dinolab-tests --test plugin_pages";
    let update = std::env::var_os("UPDATE_BOOK").is_some();
    for (place, text) in pages() {
        let path = book.join(&place);
        if update {
            std::fs::create_dir_all(path.parent().expect("it lies in a folder")).unwrap();
            std::fs::write(&path, &text).unwrap();
        }
        assert!(std::fs::read_to_string(&path).is_ok_and(|found| found == text), "{place} {stale}");
    }
    let path = book.join("SUMMARY.md");
    let summary = std::fs::read_to_string(&path).unwrap();
    let kept = |line: &&str| !line.trim_start().starts_with("- [") || !line.contains("](plugins/");
    let kept: Vec<&str> = summary.lines().filter(kept).collect();
    let listed: String = kept
        .iter()
        .flat_map(|line| [format!("{line}\n"), if line.contains("(plugins.md)") { contents() } else { String::new() }])
        .collect();
    if update {
        std::fs::write(&path, &listed).unwrap();
    }
    assert_eq!(std::fs::read_to_string(&path).unwrap(), listed, "SUMMARY.md {stale}");
}

#[test]
fn there_is_no_page_of_a_plugin_that_is_gone() {
    let made = pages();
    let folder = root().join("book/src/plugins");
    for kind in registry::KINDS {
        for entry in std::fs::read_dir(folder.join(kind)).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let place = format!("plugins/{kind}/{name}");
            assert!(Path::new(&name).extension().is_none() || made.contains_key(&place), "{place}");
        }
    }
}
