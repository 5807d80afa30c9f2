//! Labels and masks as people have them: folders beside each other, tables, and what is wrong with them.

use std::fs;
use std::path::PathBuf;

use dinolab_core::contract::{DataContext, Dataset, Sample};
use dinolab_core::registry::Chosen;
use dinolab_core::testing::contracts;
use dinolab_core::Result;
use dinolab_plugins as _;
use image::{GrayImage, ImageBuffer, Luma, Rgb, RgbImage};
use serde_json::{json, Value};

/// A folder that is filled by the tests.
struct Lab(tempfile::TempDir);

impl Lab {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary folder"))
    }

    fn path(&self, name: &str) -> PathBuf {
        let path = self.0.path().join(name);
        fs::create_dir_all(path.parent().expect("it is in the folder")).expect("it can be made");
        path
    }

    /// A picture of 6x4 pixels, another one for every name.
    fn image(&self, name: &str) {
        let red = name.bytes().fold(0u8, u8::wrapping_add);
        RgbImage::from_fn(6, 4, |x, y| Rgb([red, 40 * x as u8, 60 * y as u8]))
            .save(self.path(name))
            .expect("a picture");
    }

    /// A grey mask: `value` on the left, 1 on the right, and one pixel that counts nowhere.
    fn mask(&self, name: &str, value: u8) {
        let pixel = |x, y| match (x, y) {
            (5, 3) => 255,
            (0..3, _) => value,
            _ => 1,
        };
        GrayImage::from_fn(6, 4, |x, y| Luma([pixel(x, y)])).save(self.path(name)).expect("a mask");
    }

    /// A grey PNG of 16 bits: 0 at the first pixel, then `unit` more for each.
    fn depth(&self, name: &str, unit: u16) {
        ImageBuffer::from_fn(6, 4, |x, y| Luma([(y as u16 * 6 + x as u16) * unit]))
            .save(self.path(name))
            .expect("a depth");
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, bytes).expect("it can be written");
        path
    }

    /// Three images in two classes with masks.
    fn filled() -> Self {
        let lab = Self::new();
        for (name, value) in [("cat/a", 0), ("cat/b", 2), ("dog/a", 0)] {
            lab.image(&format!("images/{name}.png"));
            lab.mask(&format!("masks/{name}.png"), value);
        }
        lab
    }

    fn open(&self, plugin: &str, table: Value) -> Result<Box<dyn Dataset>> {
        let mut table = table;
        table["plugin"] = plugin.into();
        for key in ["path", "val", "masks", "val_masks", "depth", "val_depth", "root"] {
            if let Some(inside) = table.get(key).and_then(Value::as_str) {
                table[key] = self.0.path().join(inside).to_str().expect("UTF-8").into();
            }
        }
        let chosen: Chosen<dyn Dataset> = serde_json::from_value(table).expect("known keys");
        chosen.build(&mut DataContext { seed: 0 })
    }

    /// What is wrong, or with the first sample that is.
    fn problem(&self, plugin: &str, table: Value) -> String {
        let found = self.open(plugin, table).and_then(|data| {
            let all: Result<Vec<Sample>> = (0..data.len()).map(|i| data.get(i)).collect();
            all.map(drop)
        });
        found.expect_err("it is refused").to_string()
    }
}

fn folder() -> Value {
    json!({ "path": "images", "masks": "masks", "held_out": 0.0 })
}

#[test]
fn masks_beside_images_are_classes_of_pixels() {
    let lab = Lab::filled();
    let data = lab.open("image_folder", folder()).unwrap();
    contracts::dataset(data.as_ref()).unwrap();
    assert_eq!((data.classes(), data.class_names(), data.mask_classes()), (2, vec!["cat".into(), "dog".into()], 3));
    let mask = data.get(1).unwrap().mask.unwrap();
    assert_eq!(mask[..6], [2, 2, 2, 1, 1, 1]);
    assert_eq!(mask[23], 255);
    // Training reads no masks.
    assert_eq!(data.get_image(1).unwrap(), Sample { mask: None, ..data.get(1).unwrap() });
    let summary = data.summary();
    assert!(summary.content.contains("masks of 3 classes"), "{}", summary.content);
    assert!(summary.notes.iter().any(|note| note.contains("3 masks read to count the pixel classes")), "{summary:?}");
    // Names say how many there are; nothing is read before it is asked for.
    let mut named = folder();
    named["mask"] = json!({ "names": ["background", "fur", "grass", "sky"] });
    let data = lab.open("image_folder", named).unwrap();
    assert_eq!((data.mask_classes(), data.mask_class_names()[3].as_str()), (4, "sky"));
    // As ADE20K has it: 0 is nothing, 1 the first class.
    let mut ade = folder();
    ade["mask"] = json!({ "ignore_zero": true });
    let data = lab.open("image_folder", ade).unwrap();
    assert_eq!((data.mask_classes(), &data.get(0).unwrap().mask.unwrap()[..6]), (2, &[255, 255, 255, 0, 0, 0][..]));
}

#[test]
fn a_palette_is_not_looked_at_and_few_bits_are_unpacked() {
    let lab = Lab::new();
    lab.image("images/a.png");
    for bits in [png::BitDepth::Two, png::BitDepth::Four, png::BitDepth::Eight] {
        let (mut bytes, per) = (Vec::new(), 8 / bits as usize);
        let values = [0u8, 1, 2, 3, 2, 1];
        let mut encoder = png::Encoder::new(&mut bytes, 6, 4);
        encoder.set_color(png::ColorType::Indexed);
        encoder.set_depth(bits);
        encoder.set_palette(vec![200, 0, 0, 0, 200, 0, 0, 0, 200, 9, 9, 9]);
        let row = values
            .chunks(per)
            .map(|chunk| chunk.iter().enumerate().fold(0u8, |byte, (i, v)| byte | v << (8 - bits as usize * (i + 1))));
        let rows = row.collect::<Vec<u8>>().repeat(4);
        encoder.write_header().unwrap().write_image_data(&rows).unwrap();
        lab.write("masks/a.png", &bytes);
        let data = lab.open("image_folder", folder()).unwrap();
        assert_eq!(data.get(0).unwrap().mask.unwrap(), values.repeat(4), "{bits:?}");
    }
}

#[test]
fn another_folder_is_held_out_with_the_classes_of_the_first() {
    let lab = Lab::filled();
    lab.image("val/dog/x.png");
    lab.image("val/dog/y.png");
    lab.mask("val_masks/dog/x.png", 0);
    lab.mask("val_masks/dog/y.png", 0);
    let table = json!({ "path": "images", "masks": "masks", "val": "val", "val_masks": "val_masks" });
    let data = lab.open("image_folder", table.clone()).unwrap();
    let held_out = data.held_out().unwrap();
    assert_eq!((data.len(), held_out.len(), held_out.get(0).unwrap().label), (3, 2, Some(1)));
    assert_eq!(held_out.get(1).unwrap().mask.unwrap()[3], 1);
    lab.image("val/fox/z.png");
    lab.mask("val_masks/fox/z.png", 0);
    let problem = lab.problem("image_folder", table);
    assert!(problem.contains("class `fox`") && problem.contains("images does not have"), "{problem}");
    let problem = lab.problem("image_folder", json!({ "path": "images", "masks": "masks", "val": "val" }));
    assert!(problem.contains("one of the folders") && problem.contains("data.val_masks"), "{problem}");
}

#[test]
fn what_is_wrong_with_masks_is_named_with_the_file() {
    let refused = |break_it: &dyn Fn(&Lab), table: Value, parts: &[&str]| {
        let lab = Lab::filled();
        break_it(&lab);
        let mut all = folder();
        all.as_object_mut().unwrap().extend(table.as_object().unwrap().clone());
        let problem = lab.problem("image_folder", all);
        for part in parts {
            assert!(problem.contains(part), "{part} in {problem}");
        }
    };
    let names = json!({ "mask": { "names": ["a", "b", "c"] } });
    let remove = |lab: &Lab| fs::remove_file(lab.path("masks/cat/b.png")).unwrap();
    refused(&remove, json!({}), &["1 of 3 images have no mask here: cat/b.png"]);
    let larger = |lab: &Lab| GrayImage::new(4, 6).save(lab.path("masks/cat/b.png")).unwrap();
    refused(&larger, json!({}), &["masks/cat/b.png", "4x6", "6x4", "images/cat/b.png"]);
    refused(
        &|lab| lab.mask("masks/cat/b.png", 7),
        names.clone(),
        &["masks/cat/b.png", "pixel (0, 0)", "value 7", "3 classes"],
    );
    refused(&|lab| lab.image("masks/cat/b.png"), names.clone(), &["masks/cat/b.png", "Rgb", "indexed or grey"]);
    refused(&|lab| drop(lab.write("masks/cat/b.png", "no PNG")), names.clone(), &["masks/cat/b.png"]);
    refused(&|lab| lab.image("images/cat/a.jpg"), names.clone(), &["two images", "cat/a.jpg", "cat/a.png"]);
    refused(&|_| (), json!({ "masks": "nowhere" }), &["nowhere", "no such folder", "data.masks"]);
    refused(&|_| (), json!({ "mask": { "ignore": 9 } }), &["class 255", "data.mask.ignore"]);
    refused(&|_| (), json!({ "val_masks": "masks" }), &["data.val_masks without data.val"]);
    // A cut file is found where it is read.
    let cut = |lab: &Lab| {
        let path = lab.path("masks/cat/b.png");
        let bytes = fs::read(&path).unwrap();
        fs::write(path, &bytes[..bytes.len() - 20]).unwrap();
    };
    refused(&cut, names, &["masks/cat/b.png"]);
    // One that nobody asks for is said.
    let lab = Lab::filled();
    lab.mask("masks/cat/z.png", 0);
    let notes = lab.open("image_folder", folder()).unwrap().summary().notes;
    assert!(notes.iter().any(|note| note.contains("1 file of") && note.contains("belong to no image")), "{notes:?}");
}

/// A `.npy` file of `kind`.
fn array<T: npyz::AutoSerialize + Copy>(shape: &[u64], numbers: &[T]) -> Vec<u8> {
    use npyz::WriterBuilder;
    let mut bytes = Vec::new();
    let mut writer = npyz::WriteOptions::new().default_dtype().shape(shape).writer(&mut bytes).begin_nd().unwrap();
    writer.extend(numbers.iter().copied()).unwrap();
    writer.finish().unwrap();
    bytes
}

#[test]
fn depth_beside_images_is_in_metres_and_0_where_it_is_not_known() {
    let lab = Lab::filled();
    lab.depth("depth/cat/a.png", 1000);
    let floats: Vec<f32> = (0..24).map(|i| [f32::NAN, -1.0, f32::INFINITY, 2.5][i.min(3)]).collect();
    lab.write("depth/cat/b.npy", array(&[4, 6], &floats));
    lab.write("depth/dog/a.npy", array(&[4, 6, 1], &[3000u16; 24]));
    let table = json!({ "path": "images", "held_out": 0.0, "depth": "depth" });
    let data = lab.open("image_folder", table.clone()).unwrap();
    contracts::dataset(data.as_ref()).unwrap();
    assert!(data.has_depth() && data.summary().content.contains("depth"));
    let depth = |data: &dyn Dataset, index: usize| data.get(index).unwrap().depth.unwrap();
    assert_eq!(depth(data.as_ref(), 0), (0..24u8).map(f32::from).collect::<Vec<_>>());
    assert_eq!(depth(data.as_ref(), 1), [&[0.0; 3][..], &[2.5; 21]].concat());
    assert_eq!(depth(data.as_ref(), 2), [3.0; 24]);
    // KITTI's unit; floats are metres whatever the unit is.
    let mut kitti = table.clone();
    kitti["depth_scale"] = json!(1.0 / 256.0);
    let kitti = lab.open("image_folder", kitti).unwrap();
    assert_eq!(depth(kitti.as_ref(), 0)[1], 1000.0 / 256.0);
    assert_eq!(depth(kitti.as_ref(), 1)[3], 2.5);
    // The same by a table, where an image may have none.
    lab.write(
        "all.jsonl",
        "{\"path\": \"images/cat/a.png\", \"depth\": \"depth/cat/a.png\"}\n{\"path\": \"images/dog/a.png\"}\n",
    );
    let table = lab.open("manifest", json!({ "path": "all.jsonl", "held_out": 0.0 })).unwrap();
    assert_eq!((depth(table.as_ref(), 0)[23], table.get(1).unwrap().depth), (23.0, None));
    // What is wrong is named with its file.
    let problem = |change: &dyn Fn(&Lab)| {
        let lab = Lab::filled();
        ["cat/a", "cat/b", "dog/a"].iter().for_each(|name| lab.depth(&format!("depth/{name}.png"), 1));
        change(&lab);
        lab.problem("image_folder", json!({ "path": "images", "held_out": 0.0, "depth": "depth" }))
    };
    let remove = |lab: &Lab| fs::remove_file(lab.path("depth/cat/b.png")).unwrap();
    type Case<'a> = (&'a dyn Fn(&Lab), &'a [&'a str]);
    let cases: [Case<'_>; 5] = [
        (&remove, &["1 of 3 images have no depth here: cat/b.png", "PNG or .npy"]),
        (&|lab| lab.image("depth/cat/b.png"), &["depth/cat/b.png", "Rgb", "16 bits"]),
        (&|lab| GrayImage::new(4, 6).save(lab.path("depth/cat/b.png")).unwrap(), &["depth/cat/b.png", "4x6", "6x4"]),
        (&|lab| drop(lab.write("depth/cat/b.png", "no PNG")), &["depth/cat/b.png"]),
        (
            &|lab| {
                remove(lab);
                lab.write("depth/cat/b.npy", array(&[2, 4, 3], &[1.0f32; 24]));
            },
            &["depth/cat/b.npy", "[2, 4, 3]", "[height, width]"],
        ),
    ];
    for (change, parts) in cases {
        let problem = problem(change);
        for part in parts {
            assert!(problem.contains(part), "{part} in {problem}");
        }
    }
}

const TABLE: &str = "path,label,split,mask,photographer
images/cat/a.png,10,train,masks/cat/a.png,x
images/cat/b.png,9,val,masks/cat/b.png,y
images/dog/a.png,,train,,z
";

#[test]
fn tables_in_both_formats_say_the_same() {
    let lab = Lab::filled();
    lab.write("all.csv", TABLE);
    let lines = [
        json!({ "path": "images/cat/a.png", "label": 10, "split": "train", "mask": "masks/cat/a.png" }),
        json!({ "path": "images/cat/b.png", "label": "9", "split": "VAL", "mask": "masks/cat/b.png", "photographer": "y" }),
        json!({ "path": "images/dog/a.png", "label": -1, "split": "train" }),
    ];
    lab.write("all.jsonl", lines.map(|line| line.to_string()).join("\n"));
    for table in ["all.csv", "all.jsonl"] {
        let data = lab.open("manifest", json!({ "path": table })).unwrap();
        contracts::dataset(data.as_ref()).unwrap();
        // As numbers: 9 comes before 10.
        assert_eq!((data.class_names(), data.mask_classes()), (vec!["9".into(), "10".into()], 3), "{table}");
        let held_out = data.held_out().unwrap();
        let labels = [data.get(0), data.get(1), held_out.get(0)].map(|sample| sample.unwrap().label);
        assert_eq!((data.len(), labels), (2, [Some(1), None, Some(0)]), "{table}");
        assert_eq!(data.get(0).unwrap().mask.unwrap()[..4], [0, 0, 0, 1]);
        assert!(data.get(1).unwrap().mask.is_none(), "{table}");
        let notes = data.summary().notes.join("\n");
        assert!(notes.contains("`photographer`") && notes.contains("known: path, label, split, mask"), "{notes}");
        let moved = lab.write(&format!("tables/{table}"), fs::read(lab.path(table)).unwrap());
        let inside = format!("tables/{}", moved.file_name().unwrap().to_str().unwrap());
        assert!(lab.problem("manifest", json!({ "path": inside })).contains("data.root"));
        assert!(lab.open("manifest", json!({ "path": inside, "root": "" })).is_ok());
    }
    // Another label is other data.
    let print = |text: &str| {
        lab.write("all.csv", text);
        lab.open("manifest", json!({ "path": "all.csv" })).unwrap().fingerprint()
    };
    assert_ne!(print(TABLE), print(&TABLE.replace(",10,", ",8,")));
}

#[test]
fn what_is_wrong_with_a_table_is_named_with_its_line() {
    let lab = Lab::filled();
    let refused = |name: &str, text: &[u8], parts: &[&str]| {
        lab.write(name, text);
        let problem = lab.problem("manifest", json!({ "path": name }));
        for part in parts {
            assert!(problem.contains(part), "{part} in {problem}");
        }
    };
    let with = |from: &str, to: &str| TABLE.replace(from, to).into_bytes();
    refused("t.csv", &with("cat/b.png,9", "cat/c.png,9"), &["t.csv", "line 3", "there is no file", "cat/c.png"]);
    refused("t.csv", &with("masks/cat/b", "masks/cat/c"), &["line 3", "masks/cat/c.png"]);
    refused("t.csv", &with("images/dog/a", "images/cat/a"), &["line 4", "named in line 2 already"]);
    refused("t.csv", &with(",val,", ",vall,"), &["line 3", "`vall`", "train, or val or test"]);
    refused("t.csv", &with(",val,", ",train,"), &["`split` puts all images into one part"]);
    refused("t.csv", &with("path,label", "file,label"), &["line 2", "there is no `path`"]);
    refused("t.csv", &with("label,split", "path,split"), &["two columns are named `path`"]);
    refused("t.csv", &with(",,train,,z", ",train"), &["t.csv", "4"]);
    refused("t.csv", b"path\n", &["no line"]);
    refused("t.csv", b"path\nimages/\xff.png\n", &["line 2", "not UTF-8"]);
    refused("t.csv", b"path,label\nimages/cat/a.png,\"cat\nimages/dog/a.png,dog\n", &["line 2", "`cat`", "quote"]);
    refused("t.txt", TABLE.as_bytes(), &["t.txt", ".csv or a .jsonl"]);
    refused("t.jsonl", b"{\"path\": \"images/cat/a.png\", \"label\": 1.5}", &["line 1", "`label` is 1.5"]);
    let twice = b"{\"path\": \"images/cat/a.png\", \"label\": 1, \"label\": 2}";
    refused("t.jsonl", twice, &["line 1", "`label` is given twice"]);
    refused("t.jsonl", b"\n{\"path\": ", &["line 2"]);
}
