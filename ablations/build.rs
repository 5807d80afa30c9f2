//! Notes the git revision for the record of every run.

use std::process::Command;

fn main() {
    let git = |args: &[&str]| {
        let out = Command::new("git").args(args).output().ok().filter(|o| o.status.success())?;
        Some(String::from_utf8_lossy(&out.stdout).trim().to_string())
    };
    let revision =
        git(&["rev-parse", "--short=12", "HEAD"]).map(|hash| match git(&["status", "--porcelain", "-uno"]) {
            Some(changes) if !changes.is_empty() => format!("{hash}-modified"),
            _ => hash,
        });
    println!("cargo:rustc-env=DINOLAB_REVISION={}", revision.as_deref().unwrap_or("unknown"));
    println!("cargo:rerun-if-changed=../.git/logs/HEAD");
}
