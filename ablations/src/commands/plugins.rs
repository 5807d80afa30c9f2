//! `dinolab plugins [KIND [NAME]] [--json]`: what there is, and every key of it.

use std::fmt::Write as _;
use std::process::ExitCode;

use dinolab_core::problem::nearest;
use dinolab_core::recipe::{describe, toml_value};
use dinolab_core::registry::{self, PluginInfo, KINDS};
use dinolab_core::{Error, Result};
use serde_json::Value as Json;

use crate::style;

/// Arguments of `dinolab plugins`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// backbone, pos_encoding, loss, scheduler, teacher, dataset, augmentation, masking, probe or optimizer.
    kind: Option<String>,
    /// A plugin of that kind: shows its keys.
    name: Option<String>,
    /// As JSON, with the JSON schema of every plugin.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<ExitCode> {
    let mut plugins = registry::all();
    if let Some(kind) = &args.kind {
        if !KINDS.contains(&kind.as_str()) {
            return Err(unknown("kind of plugin", kind, KINDS));
        }
        plugins.retain(|p| p.kind == kind);
    }
    if let Some(name) = &args.name {
        if !plugins.iter().any(|p| p.name == name) {
            let names: Vec<&str> = plugins.iter().map(|p| p.name).collect();
            return Err(unknown(&format!("{} plugin", args.kind.as_deref().unwrap_or_default()), name, &names));
        }
        plugins.retain(|p| p.name == name);
    }
    if args.json {
        let text = serde_json::to_string_pretty(&plugins).expect("schemas are plain data");
        style::print(&(text + "\n"));
    } else if args.name.is_some() {
        plugins.iter().for_each(|p| style::print(&details(p)));
    } else {
        let rows = plugins.iter().map(|p| vec![style::out().dim(p.kind), style::out().bold(p.name), p.summary.clone()]);
        style::print(&style::table(rows));
        style::print(&style::out().dim("\nKeys of a plugin: dinolab plugins KIND NAME\n"));
    }
    Ok(ExitCode::SUCCESS)
}

fn unknown(what: &str, given: &str, known: &[&str]) -> Error {
    let meant = nearest(given, known.iter().copied()).map(|n| format!("did you mean `{n}`? ")).unwrap_or_default();
    Error::user(format!("there is no {what} `{given}`"), format!("{meant}known: {}", known.join(", ")))
}

fn details(plugin: &PluginInfo) -> String {
    let schema = plugin.schema.as_value();
    let style = style::out();
    let mut text = format!("{} {}\n", style.dim(plugin.kind), style.bold(plugin.name));
    if let Some(doc) = schema.get("description").and_then(Json::as_str) {
        writeln!(text, "\n{doc}").expect("writing to a string");
    }
    let mut rows = Vec::new();
    keys(schema, "", &mut rows);
    if rows.is_empty() {
        text.push_str("\nIt has no keys.\n");
    } else {
        let head = ["key", "type", "default", ""].map(|h| style.dim(h)).to_vec();
        write!(text, "\n{}", style::table(std::iter::once(head).chain(rows))).expect("writing to a string");
    }
    writeln!(text, "\n{}", style.dim(&format!("registered in {}", plugin.file))).expect("writing to a string");
    text
}

/// One row a key (name, type, default, documentation); a table of plain keys is listed key by key.
pub fn keys(schema: &Json, path: &str, rows: &mut Vec<Vec<String>>) {
    let required: Vec<&str> =
        schema.get("required").and_then(Json::as_array).into_iter().flatten().filter_map(Json::as_str).collect();
    for (key, field) in schema.get("properties").and_then(Json::as_object).into_iter().flatten() {
        let path = format!("{path}{key}");
        if field.get("properties").is_some() {
            keys(field, &format!("{path}."), rows);
            continue;
        }
        let default = match field.get("default") {
            Some(value) => toml_value(value),
            None if required.contains(&key.as_str()) => "required".into(),
            None => "none".into(),
        };
        let doc = field.get("description").and_then(Json::as_str).unwrap_or_default().replace('\n', " ");
        rows.push(vec![path, describe::kind(field), default, doc]);
    }
}
