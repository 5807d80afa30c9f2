//! `webdataset`: images in tar shards.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use dinolab_core::contract::{DataContext, Dataset};
use dinolab_core::files::twice;
use dinolab_core::text::printable;
use dinolab_core::{plugin, Error, Result};
use rayon::prelude::*;

use crate::file_hashes::FileHasher;
use crate::image_folder::{is_image, MaskConfig, Wanted};
use crate::packed::{self, check_classes, files, once, overlap, pixel_classes, unlabelled, All, Labels, Packed, Store};

/// A label is a file of at most so many bytes.
const MOST_LABEL: u64 = 1 << 20;

/// Images in local tar shards, as WebDataset writes them.
///
/// Members whose names are equal up to the first dot are one sample: `000017.jpg` and `000017.cls`. The image is read as `image_folder`
/// reads a file. Its label is the content of `.cls` (a number, below 0: no label, or a name) or a key of `.json`. If `masks` is set, its mask is a member
/// such as `000017.mask.png`. Other members are ignored. By default the distinct labels are the classes: numbers in ascending order,
/// texts in alphabetical order. `classes` overrides this.
///
/// The headers of all shards are read once at the start. After that, each image is read directly from its position, so
/// that images are shuffled across all shards, as in a folder, and a run resumes exactly. A truncated or damaged shard is
/// an error that names the shard and the member.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WebdatasetConfig {
    /// The shards: a `.tar` file, a folder of them, or several by brace expansion, such as `train-{000000..000146}.tar`.
    #[schemars(extend("format" = "path"))]
    pub path: PathBuf,
    /// Other shards whose images are held out for probes, instead of a share of the images in `path`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "path"))]
    pub val: Option<PathBuf>,
    /// Share of the images set aside for probes: the same ones for every seed.
    #[serde(default = "crate::image_folder::default_held_out")]
    #[schemars(extend("minimum" = 0, "exclusiveMaximum" = 1))]
    pub held_out: f64,
    /// The key of `.json` members that has the label, where there is no `.cls`.
    #[serde(default = "default_label")]
    pub label: String,
    /// Names of the classes, in order: labels are their numbers or the names.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub classes: Vec<String>,
    /// Name of the mask members after the first dot, such as `mask.png`: PNG, indexed or grey, with the class of every pixel.
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

fn default_label() -> String {
    "label".into()
}

plugin!(Dataset, "webdataset", WebdatasetConfig, |config: WebdatasetConfig, _: &mut DataContext| {
    open(&config).map(|data| Box::new(data) as Box<dyn Dataset>)
});

/// Where the images of all shards lie.
#[derive(Debug, Default)]
struct Shards {
    files: Vec<PathBuf>,
    /// Of each image.
    places: Vec<Place>,
    /// Offset and length of each image's mask, where there are masks.
    masks: Vec<Option<(u64, u32)>>,
    /// How the names of masks end.
    mask_ending: String,
    /// The names of the images, one after the other.
    names: String,
}

/// Where an image lies.
#[derive(Debug)]
struct Place {
    offset: u64,
    size: u32,
    shard: u32,
    /// Where its name ends in [`Shards::names`].
    name: u64,
}

impl Shards {
    fn shard(&self, number: u32) -> &Path {
        &self.files[number as usize]
    }

    fn name(&self, index: usize) -> &str {
        let from = index.checked_sub(1).map_or(0, |before| self.places[before].name);
        &self.names[from as usize..self.places[index].name as usize]
    }
}

impl Store for Shards {
    fn bytes(&self, index: usize) -> Result<Vec<u8>> {
        let Place { offset, size, shard, .. } = self.places[index];
        read_at(self.shard(shard), offset, size).map_err(Error::io("read", self.place(index)))
    }

    fn place(&self, index: usize) -> PathBuf {
        self.shard(self.places[index].shard).join(self.name(index))
    }

    fn mask(&self, index: usize) -> Result<Option<Vec<u8>>> {
        let Some((offset, size)) = self.masks.get(index).and_then(Option::as_ref) else { return Ok(None) };
        let bytes = read_at(self.shard(self.places[index].shard), *offset, *size);
        bytes.map(Some).map_err(Error::io("read", self.mask_place(index)))
    }

    fn mask_place(&self, index: usize) -> PathBuf {
        let (sample, _) = sample_of(self.name(index)).expect("the name of a sample");
        self.shard(self.places[index].shard).join(format!("{sample}.{}", self.mask_ending))
    }
}

/// Reads the headers of all shards, and labels; no image is read.
fn open(config: &WebdatasetConfig) -> Result<Packed<Shards>> {
    let wanted = Wanted::new(config.channels, config.bits, config.background);
    check_classes(&config.classes)?;
    let mut notes = Vec::new();
    let mut shards = once(files(&config.path, "tar", "data.path")?, &mut notes);
    let first = shards.len();
    if let Some(val) = &config.val {
        let val = once(files(val, "tar", "data.val")?, &mut notes);
        notes.extend(overlap(&shards, &val));
        shards.extend(val);
    }
    let found: Vec<Shard> =
        shards.par_iter().map(|path| index(path, config, wanted.takes_arrays())).collect::<Result<_>>()?;
    let (mut store, mut labels) = (Shards::default(), Labels::default());
    let (mut train, mut no_image) = (0, 0);
    let mut hasher = FileHasher::default();
    for (number, (path, shard)) in shards.iter().zip(found).enumerate() {
        hasher.written(path);
        let hash = &mut hasher.content;
        hash.update(path.file_name().unwrap_or_default().as_encoded_bytes()).update(&[0]);
        for Found { name, offset, size, mask, label } in shard.images {
            hash.update(name.as_bytes()).update(&[0]).update(&offset.to_le_bytes()).update(&size.to_le_bytes());
            hash.update(label.as_deref().unwrap_or_default().as_bytes()).update(&[0]);
            labels.push(label);
            if config.masks.is_some() {
                let (offset, size) = mask.unwrap_or_default();
                hash.update(&offset.to_le_bytes()).update(&size.to_le_bytes());
                store.masks.push(mask);
            }
            store.names += &name;
            store.places.push(Place { offset, size, shard: number as u32, name: store.names.len() as u64 });
        }
        no_image += shard.no_image;
        notes.extend(shard.note);
        if number + 1 == first {
            train = store.places.len();
        }
    }
    let count = store.places.len();
    if train == 0 || (config.val.is_some() && train == count) {
        let (path, key) = if train == 0 {
            (&config.path, "data.path")
        } else {
            (config.val.as_ref().unwrap_or(&config.path), "data.val")
        };
        let help = format!("name shards in {key} whose members are images, such as 000017.jpg");
        return Err(Error::content(path, "the shards hold no image", help));
    }
    if no_image > 0 {
        notes.push(format!("{no_image} samples without an image passed over"));
    }
    store.files = shards;
    store.mask_ending = config.masks.clone().unwrap_or_default();
    let (labels, classes) = labels.classes(&config.classes).map_err(|(index, label)| {
        let problem = format!("its label `{label}` is none of the {} classes", config.classes.len());
        Error::content(
            store.place(index),
            problem,
            "correct data.classes, or leave it out to have all labels as classes",
        )
    })?;
    notes.extend(unlabelled(&labels));
    if let Some(val) = &config.val {
        notes.push(format!("the images of {} are held out for probes", printable(val)));
    }
    let masks = match &config.masks {
        None => None,
        Some(ending) => {
            let none = store.masks.iter().filter(|mask| mask.is_none()).count();
            if none == count {
                let help = "set data.masks to what follows the first dot in the names of masks, or leave it out";
                return Err(Error::content(&config.path, format!("no image has a member .{ending}"), help));
            }
            let masks = pixel_classes(&store, &config.mask, count)?;
            notes.extend(masks.note());
            notes.extend(packed::without(none, count, "mask"));
            Some(masks)
        }
    };
    let all = All { store, labels, classes, masks, notes, hashes: hasher.finish(), wanted };
    Packed::new(all, train, config.held_out, &config.path)
}

/// What a shard holds.
struct Shard {
    images: Vec<Found>,
    /// Samples without one.
    no_image: usize,
    note: Option<String>,
}

/// An image in a shard.
struct Found {
    name: String,
    offset: u64,
    size: u32,
    mask: Option<(u64, u32)>,
    label: Option<String>,
}

/// The members of one sample.
#[derive(Default)]
struct Sample {
    image: Option<(String, Range<u64>)>,
    mask: Option<(String, Range<u64>)>,
    cls: Option<(String, Range<u64>)>,
    json: Option<(String, Range<u64>)>,
}

/// The sample that a member belongs to, and the rest of its name, after the first dot.
fn sample_of(name: &str) -> Option<(&str, &str)> {
    let folder = name.rfind('/').map_or(0, |at| at + 1);
    let dot = name[folder..].find('.').map(|at| folder + at).filter(|&at| at > folder)?;
    Some((&name[..dot], &name[dot + 1..]))
}

/// Reads the headers of a shard, and labels; `arrays` says whether arrays are images.
fn index(path: &Path, config: &WebdatasetConfig, arrays: bool) -> Result<Shard> {
    let mut file = File::open(path).map_err(Error::io("read", path))?;
    let length = file.metadata().map_err(Error::io("read", path))?.len();
    let mut head = Vec::new();
    (&mut file).take(4).read_to_end(&mut head).map_err(Error::io("read", path))?;
    if head.starts_with(b"\x1f\x8b") || head.starts_with(b"\x28\xb5\x2f\xfd") || head.starts_with(b"\xfd7zX") {
        let help = "unpack it first (gunzip, unzstd, unxz): images are read from their places, which a compressed shard does not have";
        return Err(Error::content(path, "the shard is compressed", help));
    }
    let mut samples: Vec<Sample> = Vec::new();
    let mut groups: BTreeMap<String, usize> = BTreeMap::new();
    let (mut end, mut last) = (0, String::new());
    let damaged = |last: &str, problem: String| {
        let after = if last.is_empty() { String::new() } else { format!(" after the member {last}") };
        Error::content(
            path,
            format!("{problem}{after}"),
            "copy or download the shard again, or leave it out of the list",
        )
    };
    file.rewind().map_err(Error::io("read", path))?;
    let mut archive = tar::Archive::new(&file);
    // Shards that were put together as files (`cat`) have marks of the end between them.
    archive.set_ignore_zeros(true);
    for entry in archive.entries_with_seek().map_err(Error::io("read", path))? {
        let entry = entry.map_err(|e| damaged(&last, format!("the shard is damaged: {e}")))?;
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let range = entry.raw_file_position()..entry.raw_file_position().saturating_add(entry.size());
        if range.end > length {
            let problem = format!("the shard is cut short in the member {}", printable(&name));
            return Err(damaged("", problem));
        }
        end = range.end.next_multiple_of(512);
        let kind = entry.header().entry_type();
        if (kind.is_hard_link() || kind.is_symlink()) && sample_of(&name).is_some() {
            let problem = format!("the member {} is a link to another, and has no content", printable(&name));
            return Err(Error::content(
                path,
                problem,
                "pack the files themselves: tar --hard-dereference --dereference",
            ));
        }
        if kind.is_file() {
            if let Some((sample_name, ending)) = sample_of(&name) {
                let at = *groups.entry(sample_name.to_string()).or_insert_with(|| {
                    samples.push(Sample::default());
                    samples.len() - 1
                });
                let sample = &mut samples[at];
                let slot = match ending.to_lowercase().as_str() {
                    _ if config.masks.as_deref() == Some(ending) => Some(&mut sample.mask),
                    "cls" => Some(&mut sample.cls),
                    "json" => Some(&mut sample.json),
                    ending if is_image(ending, arrays) => Some(&mut sample.image),
                    _ => None,
                };
                if let Some(slot) = slot {
                    if let Some((other, _)) = slot {
                        let problem = format!("the sample {sample_name} has two of a kind: {other} and {name}");
                        return Err(Error::content(path, problem, "give every sample one image and one label"));
                    }
                    *slot = Some((name.clone(), range));
                }
            }
        }
        last = printable(&name);
    }
    if length == 0 {
        let help = "fetch it again, or leave it out";
        return Err(Error::content(path, "it is empty, as an unfinished download leaves it: no tar file is", help));
    }
    let note = (end >= length)
        .then(|| format!("{} has no mark at its end: it may be cut short between two members", printable(path)));
    let mut shard = Shard { images: Vec::new(), no_image: 0, note };
    let size_of = |name: &str, range: &Range<u64>| -> Result<u32> {
        let help = "cut it into tiles, or leave it out";
        u32::try_from(range.end - range.start)
            .map_err(|_| Error::content(path.join(name), "it is larger than 4 GB", help))
    };
    for Sample { image, mask, cls, json } in samples {
        let Some((name, range)) = image else {
            shard.no_image += 1;
            continue;
        };
        let size = size_of(&name, &range)?;
        let mask = match mask {
            Some((name, range)) => Some((range.start, size_of(&name, &range)?)),
            None => None,
        };
        let label = match (cls, json) {
            (Some(cls), _) => Some(text(&mut file, path, cls)?),
            (None, Some(json)) => of_json(&mut file, path, json, &config.label)?,
            (None, None) => None,
        };
        shard.images.push(Found { name, offset: range.start, size, mask, label });
    }
    Ok(shard)
}

/// The text of a small member.
fn text(file: &mut File, shard: &Path, (name, range): (String, Range<u64>)) -> Result<String> {
    let place = shard.join(name);
    if range.end - range.start > MOST_LABEL {
        let problem = format!("{} bytes are no label", range.end - range.start);
        return Err(Error::content(place, problem, "a .cls holds a number or a name, a .json an object"));
    }
    let bytes = read(file, range).map_err(Error::io("read", &place))?;
    String::from_utf8(bytes)
        .map_err(|_| Error::content(place, "this is not UTF-8", "a label is a number or a name in UTF-8"))
}

/// The label in a `.json`; none if it has no such key.
fn of_json(file: &mut File, shard: &Path, member: (String, Range<u64>), key: &str) -> Result<Option<String>> {
    let place = shard.join(&member.0);
    let text = text(file, shard, member)?;
    let help = format!("write an object, with a number or a name as `{key}`, or set data.label to the key that has it");
    let object: serde_json::Map<String, serde_json::Value> =
        serde_json::from_str(&text).map_err(|e| Error::content(&place, e.to_string(), &help))?;
    if twice(text.as_bytes()).is_some_and(|name| name == key) {
        return Err(Error::content(place, format!("`{key}` is given twice"), help));
    }
    match object.get(key) {
        None | Some(serde_json::Value::Null) => Ok(None),
        Some(serde_json::Value::String(name)) => Ok(Some(name.clone())),
        Some(serde_json::Value::Number(number)) if number.is_i64() || number.is_u64() => Ok(Some(number.to_string())),
        Some(other) => Err(Error::content(place, format!("`{key}` is {other}"), help)),
    }
}

fn read_at(path: &Path, offset: u64, size: u32) -> std::io::Result<Vec<u8>> {
    read(&mut File::open(path)?, offset..offset + u64::from(size))
}

fn read(file: &mut File, range: Range<u64>) -> std::io::Result<Vec<u8>> {
    file.seek(SeekFrom::Start(range.start))?;
    let mut bytes = vec![0; (range.end - range.start) as usize];
    file.read_exact(&mut bytes)?;
    Ok(bytes)
}
