//! `parquet`: images in the tables of Hugging Face datasets.

use std::fs::File;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dinolab_core::contract::{DataContext, Dataset};
use dinolab_core::text::printable;
use dinolab_core::{plugin, Error, Result};
use parquet::basic::{Compression, ConvertedType, LogicalType, Type};
use parquet::column::reader::{get_column_reader, ColumnReader, ColumnReaderImpl};
use parquet::data_type::DataType;
use parquet::errors::ParquetError;
use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader};
use parquet::file::serialized_reader::SerializedPageReader;
use rayon::prelude::*;
use serde_json::Value;

use crate::file_hashes::FileHasher;
use crate::image_folder::labels::{TEST, TRAIN};
use crate::image_folder::{MaskConfig, Wanted};
use crate::packed::{self, check_classes, files, once, overlap, pixel_classes, unlabelled, All, Labels, Packed, Store};

const HELP: &str = "copy or download the file again, or leave it out";

/// Images in local Parquet files, in the layout of Hugging Face datasets.
///
/// An image is a cell of a column that holds files: a struct of `bytes` and `path`, or bytes alone. It is read as `image_folder`
/// reads a file. Columns and class names come from the files' metadata (`huggingface`), unless recipe keys set them. A label is
/// a whole number (below 0: no label) or text. Without class names, the distinct labels are the classes.
///
/// Compressed columns must use Snappy (as Hugging Face does). Metadata and labels are read once at the start. After that, each
/// image is read directly from its position, so that images are shuffled across all files and a run resumes exactly.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ParquetConfig {
    /// The files: a `.parquet` file, several by brace expansion, such as `train-{00000..00004}-of-00005.parquet`, or a folder of
    /// them. If a folder has both, `train-*` is the training data and `validation-*` or `test-*` is held out.
    #[schemars(extend("format" = "path"))]
    pub path: PathBuf,
    /// Other files whose images are held out for probes, instead of a share of the images in `path`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "path"))]
    pub val: Option<PathBuf>,
    /// Share of the images set aside for probes: the same ones for every seed.
    #[serde(default = "crate::image_folder::default_held_out")]
    #[schemars(extend("minimum" = 0, "exclusiveMaximum" = 1))]
    pub held_out: f64,
    /// The column of images. By default the first column that the metadata describe as images, or `image`, or `img`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// The column of labels. By default the first column that the metadata describe as labels, or `label` if it exists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// Names of the classes, in order: labels are their numbers or the names.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub classes: Vec<String>,
    /// The column of masks: PNG, indexed or grey, with the class of every pixel. Without, there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub masks: Option<String>,
    /// What the values of masks mean.
    #[serde(default)]
    #[schemars(extend("x-with" = { "masks": null }))]
    pub mask: MaskConfig,
    /// Channels of an image. With 3, every file is converted to RGB; with any other number, every file must have exactly this many
    /// channels. `crops.mean` and `crops.std` need one number per channel.
    #[serde(default = "crate::image_folder::default_channels")]
    #[schemars(range(min = 1, max = 1024))]
    pub channels: usize,
    /// Bits per value: 8 rounds 16-bit files to 8 bits, 16 keeps them unchanged; 8-bit files stay 8-bit. Default: 8 for 3 channels, 16
    /// for any other number of channels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = [8, 16]))]
    pub bits: Option<u8>,
    /// Background colour for transparent images: red, green and blue, 0 to 255.
    #[serde(default = "crate::image_folder::default_background")]
    #[schemars(extend("x-with" = { "channels": 3 }))]
    pub background: [u8; 3],
}

plugin!(Dataset, "parquet", ParquetConfig, |config: ParquetConfig, _: &mut DataContext| {
    open(&config).map(|data| Box::new(data) as Box<dyn Dataset>)
});

/// Where the images of all tables lie.
#[derive(Debug, Default)]
struct Tables {
    tables: Vec<Table>,
    /// The row groups of all tables, in order.
    groups: Vec<Group>,
    /// The name of the column of masks.
    mask_name: String,
}

/// A file.
#[derive(Debug)]
struct Table {
    path: PathBuf,
    about: ParquetMetaData,
    /// Its column of images.
    image: usize,
    /// Its column of masks.
    mask: Option<usize>,
}

impl Table {
    /// How many rows have no mask, where the file counts them.
    fn without_mask(&self) -> Option<u64> {
        let Some(leaf) = self.mask else { return Some(0) };
        self.about.row_groups().iter().map(|group| group.column(leaf).statistics()?.null_count_opt()).sum()
    }
}

/// A part of a table.
#[derive(Debug)]
struct Group {
    /// The number of its first image.
    first: usize,
    /// Its first row in the table.
    row: usize,
    table: usize,
    /// Its place in the table.
    number: usize,
}

impl Tables {
    /// The group of an image, and the image's row in it.
    fn find(&self, index: usize) -> (&Group, usize) {
        let group = &self.groups[self.groups.partition_point(|group| group.first <= index) - 1];
        (group, index - group.first)
    }

    fn table(&self, index: usize) -> &Table {
        &self.tables[self.find(index).0.table]
    }

    /// What is in a column of the row of an image.
    fn cell(&self, index: usize, leaf: usize) -> Result<Option<Vec<u8>>> {
        let (group, row) = self.find(index);
        let Table { path, about, .. } = &self.tables[group.table];
        let damaged = |problem: String| Error::content(self.place(index), problem, HELP);
        let file = Arc::new(File::open(path).map_err(Error::io("read", path))?);
        let read = || -> Result<Option<Vec<u8>>, ParquetError> {
            let ColumnReader::ByteArrayColumnReader(mut column) = column(file, about, group.number, leaf)? else {
                unreachable!("the type was checked")
            };
            column.skip_records(row)?;
            let (mut defined, mut values) = (Vec::new(), Vec::new());
            column.read_records(1, Some(&mut defined), None, &mut values)?;
            Ok(values.pop().map(|bytes| bytes.data().to_vec()))
        };
        // Readers are written for damaged files, but one that panics must not end a run of days.
        let found = std::panic::catch_unwind(AssertUnwindSafe(read));
        found.map_err(|_| damaged("its reader panicked".into()))?.map_err(|e| damaged(e.to_string()))
    }
}

impl Store for Tables {
    fn bytes(&self, index: usize) -> Result<Vec<u8>> {
        let help = "embed the images: `dataset.to_parquet` of a dataset whose images were read, or use the files with `image_folder`";
        let none = || Error::content(self.place(index), "the cell has no bytes of an image", help);
        self.cell(index, self.table(index).image)?.ok_or_else(none)
    }

    fn place(&self, index: usize) -> PathBuf {
        let (group, row) = self.find(index);
        self.tables[group.table].path.join(format!("row {}", group.row + row))
    }

    fn mask(&self, index: usize) -> Result<Option<Vec<u8>>> {
        self.table(index).mask.map_or(Ok(None), |leaf| self.cell(index, leaf))
    }

    fn mask_place(&self, index: usize) -> PathBuf {
        self.place(index).join(&self.mask_name)
    }
}

/// Reads what the files say of themselves, and labels; no image is read.
fn open(config: &ParquetConfig) -> Result<Packed<Tables>> {
    let (train_files, test_files, mut notes) = parts(config)?;
    let first = train_files.len();
    let paths: Vec<PathBuf> = [train_files, test_files].concat();
    let found: Vec<Found> = paths.par_iter().map(|path| look(path, config)).collect::<Result<_>>()?;
    let (mut store, mut labels, mut names) = (Tables::default(), Labels::default(), config.classes.clone());
    let mut hasher = FileHasher::default();
    let (mut count, mut train) = (0, 0);
    for (number, (path, found)) in paths.into_iter().zip(found).enumerate() {
        if names.is_empty() {
            names.clone_from(&found.names);
        } else if config.classes.is_empty() && !found.names.is_empty() && found.names != names {
            let other = printable(&store.tables[0].path);
            let help = "use files of one dataset, or name the classes in data.classes";
            return Err(Error::content(path, format!("its classes are others than those of {other}"), help));
        }
        hasher.add(Path::new(path.file_name().unwrap_or_default()), &path);
        let mut row = 0;
        for (group, about) in found.about.row_groups().iter().enumerate() {
            store.groups.push(Group { first: count, row, table: number, number: group });
            row += about.num_rows() as usize;
            count += about.num_rows() as usize;
        }
        for label in found.labels {
            hasher.content.update(label.as_deref().unwrap_or_default().as_bytes()).update(&[0]);
            labels.push(label);
        }
        store.groups.retain(|group| group.first < count);
        store.tables.push(Table { path, about: found.about, image: found.image, mask: found.mask });
        if number + 1 == first {
            train = count;
        }
    }
    if train == 0 {
        return Err(Error::content(&config.path, "the files have no row", "name files with images in data.path"));
    }
    if store.tables.len() > first && train == count {
        let path = config.val.as_ref().unwrap_or(&config.path);
        return Err(Error::content(path, "the files that are held out have no row", "name files with images, or none"));
    }
    let (labels, classes) = labels.classes(&names).map_err(|(index, label)| {
        let problem = format!("its label `{label}` is none of the {} classes", names.len());
        Error::content(store.place(index), problem, "name all classes in data.classes")
    })?;
    notes.extend(unlabelled(&labels));
    let masks = match &config.masks {
        None => None,
        Some(name) => {
            hasher.content.update(name.as_bytes());
            store.mask_name.clone_from(name);
            let masks = pixel_classes(&store, &config.mask, count)?;
            notes.extend(masks.note());
            let none: Option<u64> = store.tables.iter().map(Table::without_mask).sum();
            notes.extend(none.and_then(|none| packed::without(none as usize, count, "mask")));
            Some(masks)
        }
    };
    let wanted = Wanted::new(config.channels, config.bits, config.background);
    let all = All { store, labels, classes, masks, notes, hashes: hasher.finish(), wanted };
    Packed::new(all, train, config.held_out, &config.path)
}

/// The files to train on, those that are held out, and what to say of them.
fn parts(config: &ParquetConfig) -> Result<(Vec<PathBuf>, Vec<PathBuf>, Vec<String>)> {
    check_classes(&config.classes)?;
    let mut notes = Vec::new();
    let all = once(files(&config.path, "parquet", "data.path")?, &mut notes);
    if let Some(val) = &config.val {
        notes.push(format!("the images of {} are held out for probes", printable(val)));
        let val = once(files(val, "parquet", "data.val")?, &mut notes);
        notes.extend(overlap(&all, &val));
        return Ok((all, val, notes));
    }
    let part = |path: &PathBuf| {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy().to_lowercase();
        stem.split(['-', '_', '.']).next().unwrap_or_default().to_string()
    };
    let of = |names: &[&'static str]| names.iter().copied().find(|name| all.iter().any(|path| part(path) == *name));
    let (Some(train), Some(test)) = (of(&TRAIN), of(&TEST)) else { return Ok((all, Vec::new(), notes)) };
    let those = |name: &str| all.iter().filter(|path| part(path) == name).cloned().collect::<Vec<_>>();
    let (of_train, of_test) = (those(train), those(test));
    notes.push(format!("files {train} are trained on, files {test} are held out for probes"));
    let left = all.len() - of_train.len() - of_test.len();
    if left > 0 {
        notes.push(format!("{left} other files beside them are not used"));
    }
    Ok((of_train, of_test, notes))
}

/// What a file says.
struct Found {
    about: ParquetMetaData,
    image: usize,
    mask: Option<usize>,
    labels: Vec<Option<String>>,
    names: Vec<String>,
}

/// Reads what a file says of itself, and its labels.
fn look(path: &Path, config: &ParquetConfig) -> Result<Found> {
    let file = File::open(path).map_err(Error::io("read", path))?;
    let damaged = |e: ParquetError| Error::content(path, format!("this is no whole Parquet file: {e}"), HELP);
    let about = ParquetMetaDataReader::new().parse_and_finish(&file).map_err(damaged)?;
    let (file, features) = (Arc::new(file), features(&about));
    let schema = about.file_metadata().schema_descr();
    let leaf = |parts: &[&str]| schema.columns().iter().position(|column| column.path().parts() == parts);
    let described = |kind: &str| {
        let is = |(_, feature): &(&String, &Value)| feature.get("_type").and_then(Value::as_str) == Some(kind);
        features.iter().find(is).map(|(name, _)| name.clone())
    };
    let top: Vec<&str> = schema.root_schema().get_fields().iter().map(|field| field.name()).collect();
    let there = || format!("it has {}", top.join(", "));
    let known = |names: &[&str]| names.iter().find(|name| top.contains(name)).map(|name| name.to_string());

    let image = config.image.clone().or_else(|| described("Image")).or_else(|| known(&["image", "img"]));
    let help = "set data.image to the column that has the images";
    let Some(image) = image else {
        return Err(Error::content(path, format!("no column is described as an image: {}", there()), help));
    };
    let readable = |column: usize, name: &str| -> Result<()> {
        let Some(group) = about.row_groups().first() else { return Ok(()) };
        let codec = group.column(column).compression();
        if !matches!(codec, Compression::UNCOMPRESSED | Compression::SNAPPY) {
            let problem = format!("the column `{name}` is compressed by {codec}, and read is what Snappy compressed");
            let help = "write it anew: `pyarrow.parquet.write_table(pyarrow.parquet.read_table(OLD), NEW, compression='snappy')`";
            return Err(Error::content(path, problem, help));
        }
        // What else cannot be read is found here, and not in every row.
        SerializedPageReader::new(file.clone(), group.column(column), group.num_rows() as usize, None)
            .map_err(damaged)
            .map(drop)
    };
    let column_of_files = |name: &str, help: &str| {
        let Some(column) = leaf(&[name, "bytes"]).or_else(|| leaf(&[name])) else {
            return Err(Error::content(path, format!("there is no column `{name}` of bytes: {}", there()), help));
        };
        let about_column = schema.column(column);
        if about_column.physical_type() != Type::BYTE_ARRAY || about_column.max_rep_level() > 0 {
            return Err(Error::content(path, format!("the column `{name}` does not hold a file a row"), help));
        }
        readable(column, name)?;
        Ok(column)
    };
    let image = column_of_files(&image, help)?;
    let help = "set data.masks to the column that has the masks, or leave it out";
    let mask = config.masks.as_deref().map(|name| column_of_files(name, help)).transpose()?;

    let label = config.label.clone().or_else(|| described("ClassLabel")).or_else(|| known(&["label"]));
    let labels = match &label {
        None => vec![None; about.file_metadata().num_rows() as usize],
        Some(label) => {
            let help = "set data.label to a column of whole numbers or texts";
            let Some(column) = leaf(&[label]) else {
                let problem = match top.contains(&label.as_str()) {
                    true => format!("the column `{label}` has columns of its own"),
                    false => format!("there is no column `{label}`: {}", there()),
                };
                return Err(Error::content(path, problem, help));
            };
            readable(column, label)?;
            let none = || Error::content(path, format!("the column `{label}` is no label"), help);
            read_labels(&file, &about, column).map_err(damaged)?.ok_or_else(none)?
        }
    };
    let names = label.and_then(|label| Some(features.get(&label)?.get("names")?.as_array()?.clone()));
    let names = names.unwrap_or_default().iter().filter_map(|name| Some(name.as_str()?.to_string())).collect();
    Ok(Found { about, image, mask, labels, names })
}

/// What `huggingface` in the file says of the columns.
fn features(about: &ParquetMetaData) -> serde_json::Map<String, Value> {
    let said = about.file_metadata().key_value_metadata().into_iter().flatten();
    let said = said.filter(|pair| pair.key == "huggingface").find_map(|pair| pair.value.as_deref());
    let said: Option<Value> = said.and_then(|text| serde_json::from_str(text).ok());
    let features = said.as_ref().and_then(|said| said.get("info")?.get("features")?.as_object());
    features.cloned().unwrap_or_default()
}

/// A column of a row group.
fn column(file: Arc<File>, about: &ParquetMetaData, group: usize, leaf: usize) -> Result<ColumnReader, ParquetError> {
    let group = about.row_group(group);
    let pages = SerializedPageReader::new(file, group.column(leaf), group.num_rows() as usize, None)?;
    Ok(get_column_reader(about.file_metadata().schema_descr().column(leaf), Box::new(pages)))
}

/// The labels of all rows; `None` if the column holds neither whole numbers nor texts.
fn read_labels(
    file: &Arc<File>,
    about: &ParquetMetaData,
    leaf: usize,
) -> Result<Option<Vec<Option<String>>>, ParquetError> {
    let about_column = about.file_metadata().schema_descr().column(leaf);
    if about_column.max_rep_level() > 0 {
        return Ok(None);
    }
    // Whole numbers without a sign are stored in the bits of those with one.
    use ConvertedType::{UINT_16, UINT_32, UINT_64, UINT_8};
    let unsigned = matches!(about_column.converted_type(), UINT_8 | UINT_16 | UINT_32 | UINT_64)
        || matches!(about_column.logical_type_ref(), Some(LogicalType::Integer(integer)) if !integer.is_signed);
    let mut labels = Vec::new();
    for group in 0..about.num_row_groups() {
        let rows = about.row_group(group).num_rows() as usize;
        labels.extend(match column(file.clone(), about, group, leaf)? {
            ColumnReader::Int32ColumnReader(column) => {
                cells(column, rows, |&number| if unsigned { (number as u32).to_string() } else { number.to_string() })?
            }
            ColumnReader::Int64ColumnReader(column) => {
                cells(column, rows, |&number| if unsigned { (number as u64).to_string() } else { number.to_string() })?
            }
            ColumnReader::ByteArrayColumnReader(column) => {
                cells(column, rows, |text| String::from_utf8_lossy(text.data()).into_owned())?
            }
            _ => return Ok(None),
        });
    }
    Ok(Some(labels))
}

/// All cells of a column.
fn cells<T: DataType>(
    mut column: ColumnReaderImpl<T>,
    rows: usize,
    text: impl Fn(&T::T) -> String,
) -> Result<Vec<Option<String>>, ParquetError> {
    let (mut defined, mut values) = (Vec::new(), Vec::new());
    while column.read_records(rows, Some(&mut defined), None, &mut values)?.0 > 0 {}
    let most = defined.iter().copied().max().unwrap_or(0);
    let mut values = values.iter().map(text);
    let cells = match defined.is_empty() {
        true => values.map(Some).collect(),
        false => defined.iter().map(|&level| if level == most { values.next() } else { None }).collect(),
    };
    Ok(cells)
}
