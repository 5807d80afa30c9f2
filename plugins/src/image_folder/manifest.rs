//! `manifest`: images that a table lists.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use dinolab_core::contract::{DataContext, Dataset};
use dinolab_core::files::twice;
use dinolab_core::text::printable;
use dinolab_core::{plugin, Error, Result};

use super::depth::Depths;
use super::labels::{in_order, Labelled, TEST, TRAIN};
use super::masks::{MaskConfig, Masks};
use super::{Beside, Files, ImageFolder, Wanted};
use crate::packed::{is_none, unlabelled, without, written};

/// The columns that are known.
const COLUMNS: [&str; 5] = ["path", "label", "split", "mask", "depth"];

/// Images that a CSV file or a file of JSON lines names, with label, part, mask and depth.
///
/// The columns (or keys) are `path` and, optionally, `label`, `split`, `mask` and `depth`; other columns are ignored and reported. Paths
/// are relative to `root`. Labels are text or whole numbers: the distinct labels are the classes, numbers in ascending order, texts in
/// alphabetical order; an empty label, or a number below 0, means no label. `split` is `train` (`training`), or one of `val`, `valid`, `validation` and `test`
/// (`testing`), which are held out for probes. Images, masks and depths are read as `image_folder` does.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ManifestConfig {
    /// The table: a `.csv` file whose first line names the columns, or a `.jsonl` file with an object a line.
    #[schemars(extend("format" = "path"))]
    pub path: PathBuf,
    /// The folder that paths in the table are relative to. Default: the folder of the table.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "path"))]
    pub root: Option<PathBuf>,
    /// Share of the images set aside for probes: the same ones for every seed. Ignored if the column `split` divides the
    /// images.
    #[serde(default = "super::default_held_out")]
    #[schemars(extend("minimum" = 0, "exclusiveMaximum" = 1))]
    pub held_out: f64,
    /// Channels of an image. With 3, every file is converted to RGB; with any other number, every file must have exactly this many
    /// channels. `crops.mean` and `crops.std` need one number per channel.
    #[serde(default = "super::default_channels")]
    #[schemars(range(min = 1, max = 1024))]
    pub channels: usize,
    /// Bits per value: 8 rounds 16-bit files to 8 bits, 16 keeps them unchanged; 8-bit files stay 8-bit. Default: 8 for 3 channels, 16
    /// for any other number of channels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = [8, 16]))]
    pub bits: Option<u8>,
    /// Background colour for transparent images: red, green and blue, 0 to 255.
    #[serde(default = "super::default_background")]
    #[schemars(extend("x-with" = { "channels": 3 }))]
    pub background: [u8; 3],
    /// What the values of masks mean.
    #[serde(default)]
    pub mask: MaskConfig,
    /// Metres of a unit of depth in PNG files and arrays of whole numbers. Arrays of floats hold metres.
    #[serde(default = "super::default_depth_scale")]
    #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0))]
    pub depth_scale: f64,
}

plugin!(Dataset, "manifest", ManifestConfig, |config: ManifestConfig, _: &mut DataContext| {
    open(&config).map(|folder| Box::new(folder) as Box<dyn Dataset>)
});

/// A line of the table.
struct Row {
    /// Its number in the file, from 1.
    line: usize,
    path: PathBuf,
    label: Option<String>,
    split: Option<String>,
    mask: Option<PathBuf>,
    depth: Option<PathBuf>,
}

/// Reads the table; no image is read.
///
/// # Errors
/// If it cannot be read, a line of it is wrong, or a file that it names is not there.
fn open(config: &ManifestConfig) -> Result<ImageFolder> {
    let file = &config.path;
    let folder = || file.parent().unwrap_or(Path::new("")).to_path_buf();
    let root = config.root.clone().unwrap_or_else(folder);
    let mut notes = Vec::new();
    let rows = read(file, &root, &mut notes)?;
    let wrong =
        |row: &Row, problem: String, help: &str| Error::content(file, format!("line {}: {problem}", row.line), help);
    let named = |row: &Row| [Some(row.path.clone()), row.mask.clone(), row.depth.clone()].into_iter().flatten();
    let mut lines: BTreeMap<&PathBuf, usize> = BTreeMap::new();
    for row in &rows {
        if let Some(before) = lines.insert(&row.path, row.line) {
            let problem = format!("{} is named in line {before} already", row.path.display());
            return Err(wrong(row, problem, "name every image once"));
        }
        if let Some(path) = named(row).find(|path| !path.is_file()) {
            let problem = format!("there is no file {}", path.display());
            return Err(wrong(row, problem, "correct the path, or set data.root to where the paths start"));
        }
    }
    let mut parts = [Vec::new(), Vec::new()];
    for (i, row) in rows.iter().enumerate() {
        match row.split.as_deref().map(str::to_lowercase).as_deref() {
            None => parts[0].push(i),
            Some(name) if TRAIN.contains(&name) => parts[0].push(i),
            Some(name) if TEST.contains(&name) => parts[1].push(i),
            Some(name) => {
                let problem = format!("`{name}` is no part of the data");
                return Err(wrong(row, problem, "write train, or val or test"));
            }
        }
    }
    let divided = rows.iter().any(|row| row.split.is_some());
    if divided && parts.iter().any(Vec::is_empty) {
        let problem = "the column `split` puts all images into one part";
        return Err(Error::content(file, problem, "mark some with train and some with val, or leave the column out"));
    }
    let column = |of: fn(&Row) -> &Option<PathBuf>| -> Option<Vec<Option<PathBuf>>> {
        let files: Vec<Option<PathBuf>> = rows.iter().map(|row| of(row).clone()).collect();
        files.iter().any(Option::is_some).then_some(files)
    };
    let (masks, depth) = (column(|row| &row.mask), column(|row| &row.depth));
    let unread = [
        (masks.is_none() && config.mask != MaskConfig::default(), "mask", "there is no column `mask`"),
        (
            depth.is_none() && config.depth_scale != super::default_depth_scale(),
            "depth_scale",
            "there is no column `depth`",
        ),
    ];
    let unread = unread.iter().filter(|(unread, ..)| *unread);
    notes.extend(unread.map(|(_, key, why)| format!("data.{key} is read by nothing: {why}")));
    let (classes, labels) = classes(&rows);
    notes.extend(unlabelled(&labels));
    for (what, files) in [("mask", &masks), ("depth", &depth)] {
        let none = files.iter().flatten().filter(|file| file.is_none()).count();
        notes.extend(without(none, rows.len(), what));
    }
    let labelled = Labelled { labels, classes, split: divided.then_some(parts), notes: Vec::new() };
    let beside = Beside {
        masks: masks.map(|files| Masks::open(&config.mask, files)).transpose()?,
        depth: depth.map(|files| Depths::of(config.depth_scale, files)),
    };
    let paths = rows.into_iter().map(|row| row.path).collect();
    let wanted = Wanted::new(config.channels, config.bits, config.background);
    let mut files = Files::new(&[&root], paths, labelled, beside, notes, wanted);
    // Labels and parts make other data too.
    let table = std::fs::read(file).map_err(Error::io("read", file))?;
    let content = &mut files.hashes.content;
    *content = blake3::hash(&[content.as_bytes(), &table].concat()).to_hex().to_string();
    ImageFolder::of(files, file, config.held_out)
}

/// All labels in order, and the class of every row.
fn classes(rows: &[Row]) -> (Vec<OsString>, Vec<Option<u32>>) {
    let names: BTreeSet<&String> = rows.iter().filter_map(|row| row.label.as_ref()).collect();
    let names = in_order(names.into_iter());
    let place: BTreeMap<&String, u32> = names.iter().enumerate().map(|(i, name)| (*name, i as u32)).collect();
    let labels = rows.iter().map(|row| row.label.as_ref().map(|label| place[label])).collect();
    (names.into_iter().map(OsString::from).collect(), labels)
}

/// The rows of the table, by the ending of its name.
fn read(file: &Path, root: &Path, notes: &mut Vec<String>) -> Result<Vec<Row>> {
    let bytes = std::fs::read(file).map_err(Error::io("read", file))?;
    let text = String::from_utf8(bytes).map_err(|e| {
        let line = 1 + e.as_bytes()[..e.utf8_error().valid_up_to()].iter().filter(|&&b| b == b'\n').count();
        Error::content(file, format!("line {line}: this is not UTF-8"), "save the table as UTF-8, and name files in it")
    })?;
    let ending = file.extension().map(|e| e.to_string_lossy().to_lowercase());
    let table = match ending.as_deref() {
        Some("csv") => of_csv(file, &text)?,
        Some("jsonl" | "ndjson") => of_json(file, &text)?,
        _ => {
            return Err(Error::content(
                file,
                "this is no table that is known by its ending",
                "name a .csv or a .jsonl file",
            ))
        }
    };
    let mut others: BTreeSet<String> = BTreeSet::new();
    let mut rows = Vec::with_capacity(table.len());
    for (line, mut cells) in table {
        if cells.get("path").is_none_or(String::is_empty) {
            let found: Vec<String> = cells.keys().map(|name| format!("`{name}`")).collect();
            let help = format!(
                "name the image's file in a column `path`; the columns, between commas, are {}",
                found.join(", ")
            );
            return Err(Error::content(file, format!("line {line}: there is no `path`"), help));
        }
        let mut take = |column: &str| cells.remove(column).filter(|cell| !cell.is_empty());
        let path = take("path").expect("it was just seen");
        let label = take("label").and_then(|label| written(&label)).filter(|label| !is_none(label));
        let split = take("split");
        let [mask, depth] = ["mask", "depth"].map(|column| take(column).map(|path| root.join(path)));
        others.extend(cells.into_keys());
        rows.push(Row { line, path: root.join(path), label, split, mask, depth });
    }
    if rows.is_empty() {
        return Err(Error::content(file, "the table has no line", "list images in it, one a line"));
    }
    if !others.is_empty() {
        let others: Vec<String> = others.iter().map(|name| format!("`{name}`")).collect();
        notes.push(format!("columns that are passed over: {}; known: {}", others.join(", "), COLUMNS.join(", ")));
    }
    Ok(rows)
}

type Cells = BTreeMap<String, String>;

fn of_csv(file: &Path, text: &str) -> Result<Vec<(usize, Cells)>> {
    let wrong = |e: csv::Error| {
        Error::content(file, e.to_string(), "every line has as many columns as the first, which names them")
    };
    let mut reader =
        csv::ReaderBuilder::new().trim(csv::Trim::All).from_reader(text.trim_start_matches('\u{feff}').as_bytes());
    let names = reader.headers().map_err(wrong)?.clone();
    if let Some(twice) = names.iter().enumerate().find(|(i, name)| names.iter().take(*i).any(|other| other == *name)) {
        let problem = format!("line 1: two columns are named `{}`", twice.1);
        return Err(Error::content(file, problem, "name every column once"));
    }
    let mut rows = Vec::new();
    for record in reader.records() {
        let record = record.map_err(wrong)?;
        let line = record.position().map_or(0, |at| at.line() as usize);
        // A quote that nobody closes takes the rest of the file into its cell.
        if let Some(cell) = record.iter().find(|cell| cell.contains(['\n', '\r'])) {
            let start: String = cell.lines().next().unwrap_or_default().chars().take(40).collect();
            let problem = format!("line {line}: a cell that begins with `{start}` goes on in the next line");
            return Err(Error::content(file, problem, "close the quote (\") that opens it, or leave both quotes out"));
        }
        rows.push((line, names.iter().zip(&record).map(|(name, cell)| (name.into(), cell.into())).collect()));
    }
    Ok(rows)
}

fn of_json(file: &Path, text: &str) -> Result<Vec<(usize, Cells)>> {
    let mut rows = Vec::new();
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let wrong = |problem: String| {
            let help = "write an object with the keys path, label, split, mask and depth in every line";
            Error::content(file, format!("line {}: {problem}", i + 1), help)
        };
        let object: serde_json::Map<String, serde_json::Value> =
            serde_json::from_str(line).map_err(|e| wrong(e.to_string()))?;
        if let Some(key) = twice(line.as_bytes()) {
            return Err(wrong(format!("`{}` is given twice", printable(key))));
        }
        let mut cells = Cells::new();
        for (key, value) in object {
            let cell = match value {
                serde_json::Value::Null => continue,
                serde_json::Value::String(text) => text,
                serde_json::Value::Number(number) if key == "label" && (number.is_i64() || number.is_u64()) => {
                    number.to_string()
                }
                other if COLUMNS.contains(&key.as_str()) => {
                    return Err(wrong(format!(
                        "`{key}` is {other}, expected text{}",
                        if key == "label" { " or a whole number" } else { "" }
                    )));
                }
                other => other.to_string(),
            };
            cells.insert(key, cell);
        }
        rows.push((i + 1, cells));
    }
    Ok(rows)
}
