//! Links between pages of the book lead somewhere.

use std::path::{Path, PathBuf};

/// All Markdown files below a folder.
fn pages(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).expect("the book is there") {
        let path = entry.expect("it can be read").path();
        if path.is_dir() {
            found.extend(pages(&path));
        } else if path.extension().is_some_and(|e| e == "md") {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// The headings of a page as mdBook names them in links.
fn anchors(page: &str) -> Vec<String> {
    let headings = page.lines().filter_map(|line| line.strip_prefix('#').map(|l| l.trim_start_matches('#').trim()));
    let anchor = |heading: &str| {
        let kept = heading.to_lowercase().replace(' ', "-");
        kept.chars().filter(|c| c.is_alphanumeric() || "-_".contains(*c)).collect()
    };
    headings.map(anchor).collect()
}

/// Targets of `[text](target)` outside of code.
fn links(page: &str) -> Vec<String> {
    let prose: String = page.split("```").step_by(2).collect();
    let prose: String = prose.split('`').step_by(2).collect();
    let target =
        |part: &str| part.split_once(')').map(|(target, _)| target.split(' ').next().unwrap_or("").to_string());
    prose.split("](").skip(1).filter_map(target).collect()
}

#[test]
fn every_link_of_the_book_leads_somewhere() {
    let book = Path::new(env!("CARGO_MANIFEST_DIR")).join("../book/src");
    let mut broken = Vec::new();
    let mut checked = 0;
    for page in pages(&book) {
        let text = std::fs::read_to_string(&page).expect("it was listed");
        for link in links(&text).into_iter().filter(|l| !l.contains("://")) {
            checked += 1;
            let (file, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let target = if file.is_empty() { page.clone() } else { page.parent().expect("a folder").join(file) };
            let heading = |text: String| anchor.is_empty() || anchors(&text).iter().any(|a| a == anchor);
            let leads = match target.extension() {
                Some(e) if e == "md" => std::fs::read_to_string(&target).is_ok_and(heading),
                _ => target.is_file(),
            };
            if !leads {
                broken.push(format!("{}: {link}", page.display()));
            }
        }
    }
    assert!(checked > 30, "links are found: {checked}");
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}
