//! Exact copies among images.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::PathBuf;

use dinolab_core::text::printable;
use rayon::prelude::*;

use super::listing::files;

/// Of more files that are as long as another, no copies are looked for: it would take longer than it is worth.
const MOST: usize = 20_000;
/// Bytes at the beginning of a file that tell most files apart.
const HEAD: u64 = 4096;

/// Says which files are exact copies of others, if any are. Only files as long as another are read.
pub(super) fn note(paths: &[PathBuf], sizes: &[u64]) -> Option<String> {
    let candidates = alike((0..paths.len()).filter(|&i| sizes[i] > 0).map(|i| (sizes[i], i)));
    if candidates.iter().map(Vec::len).sum::<usize>() > MOST {
        return Some(format!("more than {MOST} images are as long as another: copies among them are not looked for"));
    }
    let heads = refine(&candidates, paths, HEAD);
    let copies = refine(&heads, paths, u64::MAX);
    let [first, second, ..] = copies.first()?[..] else { return None };
    let n = copies.iter().map(|group| group.len() - 1).sum::<usize>();
    let (copy, of) = (printable(&paths[second]), printable(&paths[first]));
    Some(match n {
        1 => format!("an image is an exact copy of another: {copy} of {of}"),
        n => format!("{} are exact copies of others, such as {copy} of {of}", files(n)),
    })
}

/// Groups of at least two, in order of their first.
fn alike<K: Ord>(keyed: impl Iterator<Item = (K, usize)>) -> Vec<Vec<usize>> {
    let mut groups: BTreeMap<K, Vec<usize>> = BTreeMap::new();
    keyed.for_each(|(key, i)| groups.entry(key).or_default().push(i));
    let mut groups: Vec<Vec<usize>> = groups.into_values().filter(|group| group.len() > 1).collect();
    groups.sort();
    groups
}

/// Groups divided by the content of their files. One that cannot be read is no copy.
fn refine(groups: &[Vec<usize>], paths: &[PathBuf], most: u64) -> Vec<Vec<usize>> {
    let hash = |i: usize| {
        let mut hash = blake3::Hasher::new();
        let file = File::open(&paths[i]).ok()?;
        std::io::copy(&mut file.take(most), &mut hash).ok()?;
        Some((*hash.finalize().as_bytes(), i))
    };
    let split = |group: &Vec<usize>| alike(group.iter().filter_map(|&i| hash(i)));
    let mut groups: Vec<Vec<usize>> = groups.par_iter().flat_map_iter(split).collect();
    groups.sort();
    groups
}
