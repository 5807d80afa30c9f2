//! What a dataset of files is known by, although their content is not read.

use std::path::Path;
use std::time::UNIX_EPOCH;

use blake3::Hasher;

/// Hashes of files.
#[derive(Clone, Debug)]
pub(crate) struct Hashes {
    /// Of their names, their lengths and what else a dataset knows of them.
    pub content: String,
    /// Of when they were last written.
    pub written: String,
}

/// Hashes in the making.
#[derive(Default)]
pub(crate) struct FileHasher {
    /// What [`Hashes::content`] is of.
    pub content: Hasher,
    written: Hasher,
}

impl FileHasher {
    /// Adds the file at `path`, which is called `name` wherever the data lie; gives its length. One that cannot be read is of length
    /// 0: it is named when it is read.
    pub fn add(&mut self, name: &Path, path: &Path) -> u64 {
        let size = self.written(path);
        self.content.update(name.as_os_str().as_encoded_bytes()).update(&[0]).update(&size.to_le_bytes());
        size
    }

    /// Adds when the file at `path` was written, and nothing else of it; gives its length.
    pub fn written(&mut self, path: &Path) -> u64 {
        let found = std::fs::metadata(path);
        let size = found.as_ref().map_or(0, std::fs::Metadata::len);
        let written = found.and_then(|found| found.modified()).unwrap_or(UNIX_EPOCH);
        self.written.update(&written.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos().to_le_bytes());
        size
    }

    pub fn finish(self) -> Hashes {
        let [content, written] = [self.content, self.written].map(|hash| hash.finalize().to_hex().to_string());
        Hashes { content, written }
    }
}
