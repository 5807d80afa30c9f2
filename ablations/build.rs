//! Notes the git revision for the record of every run: `abc123`, or `abc123-modified-12ab34cd` where the end is a hash of
//! what was changed, so that two runs of the same changed program can be told from those of two.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

fn main() {
    println!("cargo:rustc-env=PROGRAM_REVISION={}", revision().as_deref().unwrap_or("unknown"));
    let head = git(&["rev-parse", "--git-path", "logs/HEAD"]);
    let sources = ["src", "../core/src", "../plugins/src", "../Cargo.lock"];
    for path in sources.into_iter().chain(head.as_deref()).filter(|path| Path::new(path).exists()) {
        println!("cargo:rerun-if-changed={path}");
    }
}

fn revision() -> Option<String> {
    let head = git(&["rev-parse", "--short=12", "HEAD"])?;
    let changes = git(&["diff", "HEAD"])?;
    if changes.is_empty() {
        return Some(head);
    }
    let mut hash = Command::new("git");
    let mut hash = hash.args(["hash-object", "--stdin"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().ok()?;
    hash.stdin.take()?.write_all(changes.as_bytes()).ok()?;
    let hash = String::from_utf8(hash.wait_with_output().ok()?.stdout).ok()?;
    Some(format!("{head}-modified-{}", hash.get(..8)?))
}

fn git(args: &[&str]) -> Option<String> {
    let out = Command::new("git").args(args).output().ok().filter(|out| out.status.success())?;
    Some(String::from_utf8_lossy(&out.stdout).trim().to_string())
}
