//! Rooms of core that use each other are read as one: there are none. What counts are the modules directly under `core/src`; tests inside them do not.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// What the crate's root hands on, by its room.
const HANDED_ON: [(&str, &str); 5] =
    [("Tensor", "tensor"), ("DType", "dtype"), ("Device", "cuda"), ("Error", "error"), ("Result", "error")];

/// A file without comments and without the tests at its end.
fn code(path: &Path) -> String {
    let text = std::fs::read_to_string(path).expect("the sources can be read");
    let text = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default().to_string();
    text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

/// The crate's root as a file may name it without `crate`: what climbs so far uses other rooms too.
fn climb_to_root(file: &Path) -> String {
    "super::".repeat(file.components().count() - usize::from(file.ends_with("mod.rs")))
}

/// The first names after every `crate::`, also of lists in braces.
fn used(code: &str) -> Vec<String> {
    let word = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let names = |after: &str| match after.strip_prefix('{') {
        Some(list) => list.split('}').next().unwrap_or_default().split(',').map(|name| word(name.trim())).collect(),
        None => vec![word(after)],
    };
    code.split("crate::").skip(1).flat_map(names).collect()
}

#[test]
fn no_two_rooms_use_each_other() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../core/src");
    let room_of = |path: &Path| {
        let first = path.strip_prefix(&root).expect("inside").components().next().expect("a name");
        first.as_os_str().to_str().expect("UTF-8").trim_end_matches(".rs").to_string()
    };
    let files = walkdir::WalkDir::new(&root).into_iter().map(|entry| entry.expect("readable").into_path());
    let files: Vec<_> = files.filter(|path| path.extension().is_some_and(|e| e == "rs")).collect();
    let rooms: BTreeSet<String> = files.iter().map(|path| room_of(path)).filter(|room| room != "lib").collect();
    let mut uses: BTreeMap<(String, String), BTreeSet<String>> = BTreeMap::new();
    let of_tests = |path: &Path| {
        let name = path.file_name().expect("a file").to_string_lossy().into_owned();
        name.ends_with("_tests.rs") || name == "test_plugins.rs"
    };
    for path in files.iter().filter(|path| !of_tests(path)) {
        let room = room_of(path);
        let climb = climb_to_root(path.strip_prefix(&root).expect("inside"));
        for name in used(&code(path).replace(&climb, "crate::")) {
            let handed_on = HANDED_ON.iter().find(|(known, _)| *known == name).map(|(_, room)| room.to_string());
            let other = handed_on.unwrap_or(name);
            if room != "lib" && other != room && rooms.contains(&other) {
                uses.entry((room.clone(), other)).or_default().insert(path.display().to_string());
            }
        }
    }
    assert!(uses.contains_key(&("step".to_string(), "tensor".to_string())), "the sources are read");
    let both = uses.keys().filter(|(a, b)| a < b && uses.contains_key(&(b.clone(), a.clone())));
    let files = |a: &str, b: &str| format!("{:#?}", uses[&(a.to_string(), b.to_string())]);
    let why: Vec<String> =
        both.map(|(a, b)| format!("{a} uses {b} in {}, and {b} {a} in {}", files(a, b), files(b, a))).collect();
    assert!(why.is_empty(), "rooms that use each other:\n{}", why.join("\n"));
}
