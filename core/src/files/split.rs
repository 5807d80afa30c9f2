//! Tensors in one file, or in several with an index, as Hugging Face splits them.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use serde_json::json;

use super::write_file;
use crate::Result;

/// Places of tensors, of so many bytes each, that go into one file together: a file has at most `most` bytes, or one tensor. There
/// is one file at least.
pub fn split(bytes: &[u64], most: u64) -> Vec<Range<usize>> {
    let (mut files, mut start, mut filled) = (Vec::new(), 0, 0u64);
    for (i, bytes) in bytes.iter().enumerate() {
        filled = filled.saturating_add(*bytes);
        if filled > most && start < i {
            files.push(start..i);
            (start, filled) = (i, *bytes);
        }
    }
    files.push(start..bytes.len());
    files
}

/// The name of file `i` of `count`: `model.safetensors`, or `model-00001-of-00003.safetensors`.
pub fn split_name(stem: &str, i: usize, count: usize) -> String {
    match count {
        1 => format!("{stem}.safetensors"),
        _ => format!("{stem}-{:05}-of-{count:05}.safetensors", i + 1),
    }
}

/// Whether `name` is one that [`split_name`] gives.
pub(crate) fn is_split_name(stem: &str, name: &str) -> bool {
    let Some(rest) = name.strip_prefix(stem).and_then(|rest| rest.strip_suffix(".safetensors")) else { return false };
    let number = |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok()).flatten();
    let numbers = rest.strip_prefix('-').and_then(|rest| rest.split_once("-of-"));
    let numbers = numbers.and_then(|(i, count)| Some((number(i)?, number(count)?)));
    rest.is_empty() || numbers.is_some_and(|(i, count): (usize, usize)| i > 0 && split_name(stem, i - 1, count) == name)
}

/// The name of the index of files that are several.
pub fn index_name(stem: &str) -> String {
    format!("{stem}.safetensors.index.json")
}

/// Writes the index: the file of each tensor, and the bytes of all.
///
/// # Errors
/// If it cannot be written.
pub fn write_index(folder: &Path, stem: &str, file_of: &BTreeMap<String, String>, bytes: u64) -> Result<()> {
    let index = json!({ "metadata": { "total_size": bytes }, "weight_map": file_of });
    let text = serde_json::to_string_pretty(&index).expect("plain data") + "\n";
    write_file(&folder.join(index_name(stem)), text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_are_hugging_faces() {
        assert_eq!(split_name("model", 0, 1), "model.safetensors");
        assert_eq!(split_name("model", 1, 12), "model-00002-of-00012.safetensors");
        for name in ["model.safetensors", "model-00001-of-00002.safetensors", "model-123456-of-123456.safetensors"] {
            assert!(is_split_name("model", name), "{name}");
        }
        for name in
            ["models.safetensors", "model-1-of-2.safetensors", "model-00000-of-00002.safetensors", "model-.safetensors"]
        {
            assert!(!is_split_name("model", name), "{name}");
        }
    }

    proptest! {
        #[test]
        fn files_are_all_tensors_in_order_and_none_is_too_large(
            bytes in proptest::collection::vec(0u64..100, 0..40), most in 1u64..300
        ) {
            let files = split(&bytes, most);
            let mut end = 0;
            for file in &files {
                prop_assert!(file.start == end && (!file.is_empty() || bytes.is_empty()));
                end = file.end;
                let sum: u64 = bytes[file.clone()].iter().sum();
                prop_assert!(sum <= most || file.len() == 1);
                prop_assert!(end == bytes.len() || sum + bytes[end] > most, "the next one had room");
            }
            prop_assert_eq!(end, bytes.len());
        }
    }
}
