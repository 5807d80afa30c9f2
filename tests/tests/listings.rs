//! What large datasets cost before the first image is read: time and memory, as every allocation is counted.

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use dinolab_core::contract::{DataContext, Dataset};
use dinolab_core::registry::Chosen;
use dinolab_plugins as _;
use serde_json::{json, Value};

/// Counts what is taken, and the most at once.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);
/// One test at a time: they share the counters.
static TURN: Mutex<()> = Mutex::new(());

// SAFETY: all work is the system's; counters are beside it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        MOST.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller's promises are those that the system asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Opens a dataset: how long it took, and the most bytes at once.
fn open(table: Value) -> (Box<dyn Dataset>, Duration, usize) {
    let (before, start) = (NOW.load(Ordering::Relaxed), Instant::now());
    MOST.store(before, Ordering::Relaxed);
    let chosen: Chosen<dyn Dataset> = serde_json::from_value(table).expect("known keys");
    let data = chosen.build(&mut DataContext { seed: 0 }).expect("it is opened");
    (data, start.elapsed(), MOST.load(Ordering::Relaxed) - before)
}

/// 200,000 names of files, a thousand a folder, in 200 folders.
fn many_files(root: &Path) {
    for class in 0..200 {
        let folder = root.join(format!("n{class:08}"));
        fs::create_dir(&folder).expect("a folder");
        let first = folder.join("n00000000_0.JPEG");
        fs::write(&first, b"\xff\xd8\xff").expect("a file");
        (1..1000).for_each(|i| fs::hard_link(&first, folder.join(format!("n00000000_{i}.JPEG"))).expect("a link"));
    }
}

#[test]
fn a_million_files_would_list_in_seconds_and_under_200_mb() {
    let _turn = TURN.lock().expect("the other test ended well");
    let folder = tempfile::tempdir().expect("a folder");
    many_files(folder.path());
    let (data, took, most) = open(json!({ "plugin": "image_folder", "path": folder.path() }));
    assert_eq!((data.len(), data.classes(), data.held_out().expect("a share").len()), (180_000, 200, 20_000));
    // A fifth of a million. Time is generous: other tests run on the same cores.
    assert!(most < 200_000_000 / 5, "{most} bytes for 200,000 files");
    assert!(took < Duration::from_secs(20), "{took:?} for 200,000 files");
}

#[test]
fn a_hundred_thousand_samples_in_shards_are_indexed_in_seconds_and_under_200_mb() {
    let _turn = TURN.lock().expect("the other test ended well");
    let folder = tempfile::tempdir().expect("a folder");
    for shard in 0..10 {
        let file = fs::File::create(folder.path().join(format!("train-{shard:06}.tar"))).expect("a file");
        let mut tar = tar::Builder::new(BufWriter::new(file));
        for i in 0..10_000 {
            for (ending, content) in [("jpg", &b"\xff\xd8\xff"[..]), ("cls", i.to_string().as_bytes())] {
                let mut header = tar::Header::new_ustar();
                header.set_size(content.len() as u64);
                tar.append_data(&mut header, format!("{shard:03}/{i:08}.{ending}"), content).expect("a member");
            }
        }
        tar.into_inner().and_then(|mut file| file.flush()).expect("it is written");
    }
    let path = folder.path().join("train-{000000..000009}.tar");
    let (data, took, most) = open(json!({ "plugin": "webdataset", "path": path, "held_out": 0.0 }));
    assert_eq!((data.len(), data.classes()), (100_000, 10_000));
    assert!(data.describe(99_999).ends_with("train-000009.tar/009/00009999.jpg"), "{}", data.describe(99_999));
    assert!(most < 50_000_000, "{most} bytes for 100,000 samples");
    assert!(took < Duration::from_secs(20), "{took:?} for 100,000 samples");
}
