//! The table of all comparisons, and its summary in the book.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use dinolab_core::DType;

use super::golden::{folder, Row};

/// A row as it is printed.
pub fn line(row: &Row) -> String {
    let Row { case, tensor, dtype, error, tolerance } = row;
    format!("{case:22} {tensor:44} {dtype:?} {error:9.1e} {tolerance:9.1e}")
}

/// One tensor in both types.
#[derive(Default)]
struct Pair<'a> {
    f32: Option<&'a Row>,
    f64: Option<&'a Row>,
}

fn cells(row: Option<&Row>) -> String {
    row.map_or_else(|| format!("{:>9} {:>9}", "", ""), |r| format!("{:9.1e} {:9.1e}", r.error, r.tolerance))
}

/// Prints every comparison and the summary. The book's summary has to list the same cases with as many tensors, and
/// errors of the same size; `DINOLAB_WRITE_TABLE=1` writes it anew.
pub fn print_and_check(rows: Vec<&Row>) {
    let mut pairs: BTreeMap<(&str, &str), Pair<'_>> = BTreeMap::new();
    for row in &rows {
        let pair = pairs.entry((&row.case, &row.tensor)).or_default();
        *(if row.dtype == DType::F64 { &mut pair.f64 } else { &mut pair.f32 }) = Some(row);
    }
    let head = format!("{:9} {:>9}", "error", "tolerance");
    let mut text = format!("{:22} {:44} f32 {head} f64 {head}\n", "case", "tensor");
    for ((case, tensor), pair) in &pairs {
        let line = format!("{case:22} {tensor:44}     {}     {}", cells(pair.f32), cells(pair.f64));
        writeln!(text, "{}", line.trim_end()).expect("writing to a string");
    }
    let summary = Summary::of(&rows);
    println!("{text}\n{}", summary.markdown());
    if folder().1 {
        return;
    }
    let chapter = chapter();
    if std::env::var_os("DINOLAB_WRITE_TABLE").is_some() {
        write_into(&chapter, &summary);
    }
    let written = Summary::read(&std::fs::read_to_string(&chapter).expect("the chapter can be read"));
    let again = "write it with DINOLAB_WRITE_TABLE=1 in front of the command";
    let counts = |s: &Summary| s.0.iter().map(|(case, c)| (case.clone(), c.tensors)).collect::<Vec<_>>();
    assert_eq!(counts(&written), counts(&summary), "the table in {} is not this one: {again}", chapter.display());
    for (case, now) in &summary.0 {
        for (stated, now) in written.0[case].worst.iter().zip(&now.worst) {
            // Another processor sums in another order.
            let fits = now.is_none_or(|now| stated.is_some_and(|stated| now <= 4.0 * stated + 1e-12));
            assert!(fits, "{case}: the chapter states {stated:?}, this run has {now:?}: {again}");
        }
    }
}

fn chapter() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../book/src/reference.md")
}

/// What the book says of a case.
#[derive(Default)]
struct Case {
    tensors: usize,
    /// The largest error of an inexact tensor, in f32 and f64.
    worst: [Option<f64>; 2],
}

/// By case.
struct Summary(BTreeMap<String, Case>);

const BEGIN: &str = "| case | tensors | worst in f32 | worst in f64 |\n|---|---|---|---|\n";

impl Summary {
    fn of(rows: &[&Row]) -> Self {
        let mut cases: BTreeMap<String, Case> = BTreeMap::new();
        let mut seen = std::collections::BTreeSet::new();
        for row in rows {
            let case = cases.entry(row.case.clone()).or_default();
            case.tensors += usize::from(seen.insert((&row.case, &row.tensor)));
            let worst = &mut case.worst[usize::from(row.dtype == DType::F64)];
            *worst = Some(worst.map_or(row.error, |w| w.max(row.error)));
        }
        Self(cases)
    }

    fn markdown(&self) -> String {
        let number = |x: Option<f64>| x.map_or("-".to_string(), |x| format!("{x:.1e}"));
        let mut text = BEGIN.to_string();
        for (name, case) in &self.0 {
            let [narrow, wide] = case.worst.map(number);
            writeln!(text, "| `{name}` | {} | {narrow} | {wide} |", case.tensors).expect("writing to a string");
        }
        text
    }

    /// The table in the chapter's text; empty if it has none.
    fn read(chapter: &str) -> Self {
        let lines = chapter.split(BEGIN).nth(1).unwrap_or_default().lines().take_while(|line| line.starts_with('|'));
        let case = |line: &str| {
            let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
            let [name, tensors, narrow, wide] = cells[..] else { panic!("a row of the chapter's table: {line}") };
            let worst = [narrow, wide].map(|x| x.parse().ok());
            (name.trim_matches('`').to_string(), Case { tensors: tensors.parse().expect("a number"), worst })
        };
        Self(lines.map(case).collect())
    }
}

fn write_into(chapter: &Path, summary: &Summary) {
    let text = std::fs::read_to_string(chapter).expect("the chapter can be read");
    let (before, after) = text.split_once(BEGIN).expect("the chapter has a table of cases");
    let after: Vec<&str> = after.lines().skip_while(|line| line.starts_with('|')).collect();
    let text = format!("{before}{}{}\n", summary.markdown(), after.join("\n"));
    std::fs::write(chapter, text).expect("the chapter can be written");
}
