//! Images in larger files: tar shards and Parquet tables, whole and wrong.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use dinolab_core::contract::{DataContext, Dataset};
use dinolab_core::registry::Chosen;
use dinolab_core::testing::contracts;
use dinolab_core::Result;
use dinolab_plugins as _;
use image::{GrayImage, ImageFormat, Luma, Rgb, RgbImage};
use parquet::basic::Compression;
use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use serde_json::{json, Value};

struct Lab(tempfile::TempDir);

impl Lab {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a folder"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn open(&self, plugin: &str, mut table: Value) -> Result<Box<dyn Dataset>> {
        table["plugin"] = plugin.into();
        for key in ["path", "val"] {
            if let Some(inside) = table.get(key).and_then(Value::as_str) {
                table[key] = self.path(inside).to_str().expect("UTF-8").into();
            }
        }
        let chosen: Chosen<dyn Dataset> = serde_json::from_value(table).expect("known keys");
        chosen.build(&mut DataContext { seed: 0 })
    }

    /// Why a dataset is refused; every part has to be said.
    fn refused(&self, plugin: &str, table: Value, parts: &[&str]) {
        let problem = self.open(plugin, table).map(drop).expect_err("it is refused").to_string();
        for part in parts {
            assert!(problem.contains(part), "{part} in {problem}");
        }
    }

    /// A tar file of these members.
    fn tar(&self, name: &str, members: &[(&str, &[u8])]) {
        let mut tar = tar::Builder::new(fs::File::create(self.path(name)).expect("a file"));
        for (member, content) in members {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            tar.append_data(&mut header, member, *content).expect("a member");
        }
        tar.finish().expect("it is written");
    }

    /// A Parquet file in the layout of Hugging Face, three rows a group, a row a page.
    fn table(&self, name: &str, rows: &[(Option<Vec<u8>>, Option<i64>)], names: Option<&[&str]>) {
        let label = if name.starts_with("unsigned") { "label (UINT_64)" } else { "label" };
        let schema = format!(
            "message schema {{ optional group image {{ optional binary bytes; optional binary path (UTF8); }} \
            optional int64 {label}; }}"
        );
        let features = json!({ "image": { "_type": "Image" }, "label": { "_type": "ClassLabel", "names": names } });
        let said = json!({ "info": { "features": features } }).to_string();
        let properties = WriterProperties::builder()
            .set_compression(Compression::SNAPPY)
            .set_data_page_row_count_limit(1)
            .set_write_batch_size(1)
            .set_key_value_metadata(names.map(|_| vec![KeyValue::new("huggingface".into(), said)]))
            .build();
        let file = fs::File::create(self.path(name)).expect("a file");
        let schema = Arc::new(parse_message_type(&schema).expect("a schema"));
        let mut writer = SerializedFileWriter::new(file, schema, Arc::new(properties)).expect("a table");
        for rows in rows.chunks(3) {
            let mut group = writer.next_row_group().expect("a group");
            let text = |bytes: &[u8]| ByteArray::from(bytes.to_vec());
            let images: Vec<ByteArray> = rows.iter().filter_map(|(image, _)| image.as_deref().map(text)).collect();
            let paths: Vec<ByteArray> = rows.iter().map(|_| text(b"a.png")).collect();
            let there: Vec<i16> = rows.iter().map(|(image, _)| 1 + i16::from(image.is_some())).collect();
            for (values, levels) in [(images, there), (paths, vec![2; rows.len()])] {
                let mut column = group.next_column().expect("it writes").expect("a column");
                column.typed::<ByteArrayType>().write_batch(&values, Some(&levels), None).expect("it writes");
                column.close().expect("it writes");
            }
            let labels: Vec<i64> = rows.iter().filter_map(|(_, label)| *label).collect();
            let there: Vec<i16> = rows.iter().map(|(_, label)| i16::from(label.is_some())).collect();
            let mut column = group.next_column().expect("it writes").expect("a column");
            column.typed::<Int64Type>().write_batch(&labels, Some(&there), None).expect("it writes");
            column.close().expect("it writes");
            group.close().expect("it writes");
        }
        writer.close().expect("it writes");
    }
}

/// A picture whose red is `number`.
fn picture(number: u8) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    RgbImage::from_pixel(8, 4, Rgb([number, 20, 30])).write_to(&mut bytes, ImageFormat::Png).expect("it is encoded");
    bytes.into_inner()
}

/// The red of every image, with its label.
fn seen(data: &dyn Dataset) -> Vec<(u8, Option<u32>)> {
    (0..data.len()).map(|i| data.get(i).map(|sample| (sample.rgb()[0], sample.label)).expect("it is read")).collect()
}

fn two_shards() -> Lab {
    let lab = Lab::new();
    let [a, b, c, d] = [10, 20, 30, 40].map(picture);
    lab.tar(
        "train-00.tar",
        &[("x/0.png", &a), ("x/0.cls", b"2\n"), ("x/0.seg.png", b"?"), ("x/1.PNG", &b), ("x/1.cls", b"10")],
    );
    // The label before the image, and members of a sample apart.
    lab.tar(
        "train-01.tar",
        &[("0.json", b"{\"label\": 2, \"width\": 8}"), ("1.png", &d), ("0.png", &c), ("readme", b"?")],
    );
    lab.tar("val-00.tar", &[("0.png", &picture(50)), ("0.cls", b"10"), ("1.cls", b"2")]);
    lab
}

#[test]
fn shards_are_one_list_of_images_with_labels() {
    let lab = two_shards();
    let data = lab.open("webdataset", json!({ "path": "train-{00..01}.tar", "val": "val-00.tar" })).unwrap();
    contracts::dataset(data.as_ref()).unwrap();
    assert_eq!(seen(data.as_ref()), [(10, Some(0)), (20, Some(1)), (30, Some(0)), (40, None)]);
    assert_eq!(data.class_names(), ["2", "10"]);
    assert_eq!(seen(data.held_out().unwrap().as_ref()), [(50, Some(1))]);
    assert!(data.describe(1).ends_with("train-00.tar/x/1.PNG"), "{}", data.describe(1));
    let summary = data.summary();
    assert_eq!(summary.content, "4 images in 2 classes (2 2, 10 1), 1 more held out for probes");
    let notes = summary.notes.join("\n");
    for part in ["1 of 5 images have no label", "1 samples without an image"] {
        assert!(notes.contains(part), "{part} in {notes}");
    }
    // A folder of shards, names of classes, a share that is held out.
    let names: Vec<String> = (0..11).map(|i| format!("class {i}")).collect();
    let data = lab.open("webdataset", json!({ "path": "", "held_out": 0.4, "classes": names })).unwrap();
    assert_eq!((data.len(), data.held_out().unwrap().len(), data.classes()), (3, 2, 11));
    let labels = |data: &dyn Dataset| seen(data).into_iter().filter_map(|(_, label)| label).collect::<Vec<_>>();
    let mut all = [labels(data.as_ref()), labels(data.held_out().unwrap().as_ref())].concat();
    all.sort_unstable();
    assert_eq!(all, [2, 2, 10, 10]);
    // What is read says which data it was.
    let of = |path: &str| lab.open("webdataset", json!({ "path": path, "held_out": 0.0 })).unwrap().fingerprint();
    assert_ne!(of("train-00.tar"), of("train-01.tar"));
    assert_eq!(of("train-00.tar"), of("train-{00..00}.tar"));
}

/// A grey picture of 8 x 4 pixels with `number` in its lower half and 1 in its upper.
#[test]
fn a_file_is_read_once_however_often_it_is_named_and_held_out_images_that_are_trained_on_are_told() {
    let lab = Lab::new();
    lab.tar("a.tar", &[("0.png", &picture(10)), ("1.png", &picture(20))]);
    lab.tar("b.tar", &[("2.png", &picture(30)), ("3.png", &picture(40)), ("4.png", &picture(50))]);
    let notes = |mut table: Value| {
        table["held_out"] = 0.0.into();
        let data = lab.open("webdataset", table).expect("two shards");
        (data.len(), data.summary().notes.join("; "))
    };
    let (whole, _) = notes(json!({ "path": "{a,b}.tar" }));
    let (len, said) = notes(json!({ "path": "{a,b,a,a}.tar" }));
    assert!(len == whole && said.contains("a.tar is named twice, and 1 more like it: read once"), "{len}: {said}");
    fs::create_dir(lab.path("links")).unwrap();
    fs::copy(lab.path("a.tar"), lab.path("links/a.tar")).unwrap();
    std::os::unix::fs::symlink("a.tar", lab.path("links/b.tar")).unwrap();
    fs::hard_link(lab.path("links/a.tar"), lab.path("links/c.tar")).unwrap();
    let (len, said) = notes(json!({ "path": "links" }));
    let (once, _) = notes(json!({ "path": "a.tar" }));
    assert!(len == once && said.contains("b.tar is the file"), "{len}: {said}");
    let (_, said) = notes(json!({ "path": "{a,b}.tar", "val": "b.tar", "held_out": 0.0 }));
    assert!(said.contains("b.tar held out for probes and trained on"), "{said}");
    let (_, said) = notes(json!({ "path": "a.tar", "val": "b.tar" }));
    assert!(!said.contains("trained on"), "{said}");
    lab.refused("webdataset", json!({ "path": "a.tar", "classes": ["x", "y", "x"] }), &["names `x` twice"]);
    lab.tar("twice.tar", &[("1.png", &picture(1)), ("1.json", br#"{"label": 0, "label": 1}"#)]);
    lab.refused("webdataset", json!({ "path": "twice.tar", "label": "label" }), &["`label` is given twice", "1.json"]);
}

fn grey(number: u8) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    let image = GrayImage::from_fn(8, 4, |_, y| Luma([if y < 2 { 1 } else { number }]));
    image.write_to(&mut bytes, ImageFormat::Png).expect("it is encoded");
    bytes.into_inner()
}

#[test]
fn masks_lie_in_shards_and_tables() {
    let lab = Lab::new();
    let [a, b, c] = [10, 20, 30].map(picture);
    let members = [("a/0.seg.png", grey(3)), ("a/0.png", a), ("1.png", b), ("1.seg.png", grey(255)), ("2.png", c)];
    lab.tar("a.tar", &members.each_ref().map(|(name, bytes)| (*name, &bytes[..])));
    lab.table("a.parquet", &[3, 255].map(|n| (Some(grey(n)), None)), None);
    let halves = |lower: u8| Some([[1; 16], [lower; 16]].concat());
    let masks = |data: &dyn Dataset| -> Vec<_> { (0..data.len()).map(|i| data.get(i).unwrap().mask).collect() };
    for (plugin, path, ending, mut expected) in [
        ("webdataset", "a.tar", "seg.png", vec![halves(3), halves(255), None]),
        ("parquet", "a.parquet", "image", vec![halves(3), halves(255)]),
    ] {
        let table = json!({ "path": path, "held_out": 0, "masks": ending });
        let data = lab.open(plugin, table.clone()).unwrap();
        contracts::dataset(data.as_ref()).unwrap();
        assert_eq!((data.mask_classes(), masks(data.as_ref())), (4, expected.clone()), "{plugin}");
        let notes = data.summary().notes.join("\n");
        assert!(notes.contains("2 masks read to count the pixel classes: 4"), "{notes}");
        assert!(plugin == "parquet" || notes.contains("1 of 3 images have no mask"), "{notes}");
        assert_eq!(data.get_image(0).unwrap().mask, None);

        let mut named = table.clone();
        named["mask"] = json!({ "ignore_zero": true, "names": ["a", "b", "c"] });
        expected.iter_mut().flatten().for_each(|mask| mask.iter_mut().filter(|v| **v < 255).for_each(|v| *v -= 1));
        let data = lab.open(plugin, named).unwrap();
        assert_eq!((data.mask_class_names().len(), masks(data.as_ref())), (3, expected), "{plugin}");

        let mut few = table.clone();
        few["mask"] = json!({ "names": ["a", "b", "c"] });
        let problem = lab.open(plugin, few).unwrap().get(0).unwrap_err().to_string();
        assert!(problem.contains("pixel (0, 2) has the value 3") && problem.contains(path), "{problem}");
        assert!(problem.contains(ending), "{problem}");
        let mut none = table;
        none["masks"] = "other".into();
        lab.refused(plugin, none, &[path, "other", "data.masks"]);
    }
    // What masks mean is not read where there are none, and that is said.
    let folder = dinolab_tests::program::Folder::with_micro();
    let sets =
        |keys: &[&str]| -> Vec<String> { keys.iter().flat_map(|key| ["--set".into(), key.to_string()]).collect() };
    let check = |keys: &[&str]| {
        let args = [vec!["recipe".into(), "check".into(), "micro.toml".into()], sets(keys)].concat();
        folder.run(&args.iter().map(String::as_str).collect::<Vec<_>>()).err
    };
    for plugin in ["image_folder", "webdataset", "parquet"] {
        let plugin = format!("data.plugin={plugin}");
        let keys = [plugin.as_str(), "data.path=x", "data.mask.ignore_zero=true"];
        let said = "nothing reads data.mask: it is read with masks only";
        assert!(check(&keys).contains(said), "{}", check(&keys));
        assert!(!check(&[&keys[..], &["data.masks=y"]].concat()).contains(said));
    }

    let coloured = [("0.png", picture(1)), ("0.seg.png", picture(1)), ("1.png", picture(1))];
    lab.tar("b.tar", &coloured.each_ref().map(|(name, bytes)| (*name, &bytes[..])));
    lab.refused("webdataset", json!({ "path": "b.tar", "masks": "seg.png" }), &["b.tar/0.seg.png", "no class a pixel"]);
}

#[test]
fn what_is_wrong_with_shards_is_named_with_shard_and_member() {
    let lab = two_shards();
    let refused = |table: Value, parts: &[&str]| lab.refused("webdataset", table, parts);
    let whole = fs::read(lab.path("train-00.tar")).unwrap();
    fs::write(lab.path("cut.tar"), &whole[..600]).unwrap();
    refused(json!({ "path": "cut.tar" }), &["cut.tar", "cut short in the member x/0.png", "copy or download"]);
    let mut damaged = whole.clone();
    damaged[1024 + 3] ^= 1;
    fs::write(lab.path("damaged.tar"), &damaged).unwrap();
    refused(json!({ "path": "damaged.tar" }), &["damaged.tar", "damaged", "after the member x/0.png"]);
    fs::write(lab.path("zipped.tar"), b"\x1f\x8b\x08\0").unwrap();
    refused(json!({ "path": "zipped.tar" }), &["zipped.tar", "compressed", "gunzip"]);
    refused(json!({ "path": "train-{00..02}.tar" }), &["train-02.tar", "no such file", "data.path", "{000..146}"]);
    refused(json!({ "path": "train-00.tar", "val": "val-{00.tar" }), &["no closing", "data.val"]);
    fs::write(lab.path("no-bytes.tar"), "").unwrap();
    refused(json!({ "path": "{train-00,no-bytes}.tar" }), &["no-bytes.tar", "it is empty", "fetch it again"]);
    lab.tar("none.tar", &[("0.cls", b"1")]);
    refused(json!({ "path": "none.tar" }), &["none.tar", "no image", "data.path"]);
    lab.tar("twice.tar", &[("0.png", b"?"), ("0.jpg", b"?")]);
    refused(json!({ "path": "twice.tar" }), &["twice.tar", "0.png", "0.jpg", "one image"]);
    lab.tar("json.tar", &[("0.png", b"?"), ("0.json", b"{\"label\": [1]}")]);
    refused(json!({ "path": "json.tar" }), &["json.tar/0.json", "`label` is [1]", "data.label"]);
    lab.tar("text.tar", &[("0.png", b"?"), ("0.cls", b"\xff")]);
    refused(json!({ "path": "text.tar" }), &["text.tar/0.cls", "UTF-8"]);
    refused(
        json!({ "path": "train-00.tar", "classes": ["a", "b", "c"] }),
        &["train-00.tar/x/1.PNG", "`10`", "3 classes", "data.classes"],
    );
    // A shard that ends between two members is told; an image that is damaged is a broken sample of its own.
    let end = whole.len() - 1024 - (whole.len() - 1024) % 512;
    let last = (0..end).step_by(512).rfind(|&at| whole[at..at + 512].iter().any(|&b| b != 0)).unwrap() + 512;
    fs::write(lab.path("open.tar"), &whole[..last]).unwrap();
    let data = lab.open("webdataset", json!({ "path": "open.tar", "held_out": 0.0 })).unwrap();
    assert!(data.summary().notes.iter().any(|note| note.contains("no mark at its end")), "{:?}", data.summary());
    // Shards that were put together as files have marks of the end between them.
    fs::write(lab.path("joined.tar"), [whole.clone(), fs::read(lab.path("train-01.tar")).unwrap()].concat()).unwrap();
    let images = |path: &str| lab.open("webdataset", json!({ "path": path, "held_out": 0.0 })).unwrap().len();
    assert_eq!(images("joined.tar"), images("train-{00..01}.tar"));
    lab.tar("empty.tar", &[("0.png", &picture(1)), ("0.seg.png", b""), ("1.png", &picture(1))]);
    refused(json!({ "path": "empty.tar", "masks": "seg.png" }), &["empty.tar/0.seg.png"]);
    lab.tar("broken.tar", &[("0.png", &picture(1)), ("1.png", &picture(1)[..50])]);
    let data = lab.open("webdataset", json!({ "path": "broken.tar", "held_out": 0.0 })).unwrap();
    assert!(data.get(0).is_ok());
    let problem = data.get(1).unwrap_err().to_string();
    assert!(problem.contains("broken.tar/1.png") && problem.contains("end of file"), "{problem}");
}

fn rows(labels: &[i64]) -> Vec<(Option<Vec<u8>>, Option<i64>)> {
    labels.iter().enumerate().map(|(i, &label)| (Some(picture(i as u8)), Some(label))).collect()
}

#[test]
fn tables_are_one_list_of_images_with_labels() {
    let lab = Lab::new();
    let names = Some(&["cat", "dog"][..]);
    lab.table("train-0.parquet", &rows(&[0, 1, 0, 1, 1, -1, 0]), names);
    lab.table("train-1.parquet", &rows(&[1, 1]), names);
    lab.table("test-0.parquet", &rows(&[0, 1]), names);
    let data = lab.open("parquet", json!({ "path": "" })).unwrap();
    contracts::dataset(data.as_ref()).unwrap();
    let labels = [0, 1, 0, 1, 1, 9, 0, 1, 1].map(|label| Some(label).filter(|&label| label < 9));
    let expected: Vec<_> = [0, 1, 2, 3, 4, 5, 6, 0, 1].into_iter().zip(labels).collect();
    assert_eq!(seen(data.as_ref()), expected);
    assert_eq!(data.class_names(), ["cat", "dog"]);
    assert_eq!(seen(data.held_out().unwrap().as_ref()), [(0, Some(0)), (1, Some(1))]);
    assert!(data.describe(4).ends_with("train-0.parquet/row 4"), "{}", data.describe(4));
    let notes = data.summary().notes.join("\n");
    assert!(notes.contains("files train are trained on") && notes.contains("1 of 11 images have no label"), "{notes}");
    // Without a description labels are their own names.
    lab.table("plain.parquet", &rows(&[7, 5, 7]), None);
    let data = lab.open("parquet", json!({ "path": "plain.parquet", "held_out": 0.0 })).unwrap();
    assert_eq!((data.class_names(), data.len()), (["5", "7"].map(String::from).to_vec(), 3));
    // Without a sign no label is negative.
    lab.table("unsigned.parquet", &rows(&[-1, 5, -1]), None);
    let data = lab.open("parquet", json!({ "path": "unsigned.parquet", "held_out": 0.0 })).unwrap();
    assert_eq!(data.class_names(), ["5", "18446744073709551615"]);
    assert_eq!(seen(data.as_ref()), [(0, Some(1)), (1, Some(0)), (2, Some(1))]);
}

#[test]
fn tables_of_pyarrow_are_read() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures/parquet");
    let table = json!({ "plugin": "parquet", "path": path });
    let chosen: Chosen<dyn Dataset> = serde_json::from_value(table).unwrap();
    let data = chosen.build(&mut DataContext { seed: 0 }).unwrap();
    assert_eq!(seen(data.as_ref()), (0..10).map(|i| (10 * i, Some(u32::from(i) % 3))).collect::<Vec<_>>());
    assert_eq!(seen(data.held_out().unwrap().as_ref()), [(200, Some(2)), (210, None)]);
    assert_eq!(data.class_names(), ["cat", "dog", "owl"]);
}

#[test]
fn what_is_wrong_with_tables_is_named_with_file_and_row() {
    let lab = Lab::new();
    lab.table("good.parquet", &rows(&[0, 1, 2]), Some(&["a", "b", "c"]));
    let refused = |table: Value, parts: &[&str]| lab.refused("parquet", table, parts);
    let whole = fs::read(lab.path("good.parquet")).unwrap();
    fs::write(lab.path("cut.parquet"), &whole[..whole.len() - 9]).unwrap();
    refused(json!({ "path": "cut.parquet" }), &["cut.parquet", "no whole Parquet file", "copy or download"]);
    fs::write(lab.path("text.parquet"), "hello").unwrap();
    refused(json!({ "path": "text.parquet" }), &["text.parquet", "no whole Parquet file"]);
    refused(json!({ "path": "bad.parquet" }), &["bad.parquet", "no such file", "data.path"]);
    refused(json!({ "path": "good.parquet", "image": "photo" }), &["no column `photo`", "image, label", "data.image"]);
    refused(json!({ "path": "good.parquet", "image": "label" }), &["`label` does not hold a file"]);
    refused(
        json!({ "path": "good.parquet", "label": "image" }),
        &["the column `image` has columns of its own", "data.label"],
    );
    refused(
        json!({ "path": "good.parquet", "classes": ["a", "b"] }),
        &["good.parquet/row 2", "`2`", "2 classes", "data.classes"],
    );
    lab.table("no-rows.parquet", &[], Some(&["a", "b", "c"]));
    refused(json!({ "path": "good.parquet", "val": "no-rows.parquet" }), &["no-rows.parquet", "held out have no row"]);
    lab.table("other.parquet", &rows(&[0]), Some(&["x", "y"]));
    refused(json!({ "path": "{good,other}.parquet" }), &["other.parquet", "others than those of", "good.parquet"]);
    // A cell without an image is a broken sample of its own, as is a damaged one.
    let mut some = rows(&[0, 1, 2]);
    some[1].0 = None;
    some[2].0 = Some(picture(2)[..50].to_vec());
    lab.table("holes.parquet", &some, None);
    let data = lab.open("parquet", json!({ "path": "holes.parquet", "held_out": 0.0 })).unwrap();
    assert_eq!(data.get(0).unwrap().rgb()[0], 0);
    for (row, said) in [(1, "no bytes"), (2, "end of file")] {
        let problem = data.get(row).unwrap_err().to_string();
        assert!(problem.contains(&format!("holes.parquet/row {row}")) && problem.contains(said), "{problem}");
    }
    // No turned bit ends or hangs the program.
    for at in (0..whole.len()).step_by(7) {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x11;
        fs::write(lab.path("damaged.parquet"), damaged).unwrap();
        if let Ok(data) = lab.open("parquet", json!({ "path": "damaged.parquet", "held_out": 0.0 })) {
            (0..data.len()).for_each(|i| drop(data.get(i)));
        }
    }
}
