//! `summary.md`: the table and the verdicts, for an issue or a lab book.

use super::html::{axis, curve_of, drawn_lines, forest_of, happened, marks};
use super::{duration, number, p_text, rounded_to, Summary};
use crate::statistics::Estimate;
use crate::suite::{Plan, RunRecord};

/// The folder of its drawings, in the suite's.
pub(super) const PICTURES: &str = "summary";

/// The drawings of the page by their paths in the suite's folder: differences and curves of what decides.
pub(super) fn pictures(plan: &Plan, records: &[RunRecord], summary: &Summary) -> Vec<(String, String)> {
    let lines = drawn_lines(summary);
    let happened = happened(&summary.events, &lines);
    let marks = marks(&happened);
    let mut all = Vec::new();
    for metric in &plan.suite.metrics {
        let file = |what: &str| format!("{PICTURES}/{what}-{}.svg", metric.name.replace('/', "-"));
        all.extend(forest_of(summary, &metric.name).map(|svg| (file("differences"), svg)));
        let curve = curve_of(&metric.name, records, &lines, (axis(records), &marks), None);
        all.extend(curve.map(|svg| (file("curve"), svg)));
    }
    all
}

/// The page, with these drawings.
pub(super) fn page(summary: &Summary, pictures: &[(String, String)]) -> String {
    let mut text = format!("# {}\n\n", summary.suite);
    if !summary.description.is_empty() {
        text += &format!("{}\n\n", summary.description.trim());
    }
    for comparison in summary.headlines() {
        text += &format!("- {}\n", comparison.sentence);
    }
    text += "\n## Arms\n\nMean over seeds with its 95% interval.\n\n";
    text += &row(["arm".to_string(), "runs".to_string()].into_iter().chain(summary.metrics.iter().cloned()));
    text += &row(std::iter::repeat_n("---".to_string(), summary.metrics.len() + 2));
    for arm in &summary.arms {
        let finished = arm.runs.iter().filter(|r| r.status == "finished").count();
        let cells = summary.metrics.iter().map(|m| estimate_text(&arm.metrics[m]));
        let name = if arm.name == summary.baseline { format!("{} (baseline)", arm.name) } else { arm.name.clone() };
        text += &row([name, format!("{finished}/{}", arm.runs.len())].into_iter().chain(cells));
    }
    text += &format!("\n## Differences to {}\n\nWithin a seed, with 95% interval.\n\n", summary.baseline);
    let head = ["arm", "metric", "difference", "95% interval", "p", "p (Holm)", "pairs", "verdict"];
    text += &row(head.iter().map(|h| h.to_string()));
    text += &row(head.iter().map(|_| "---".to_string()));
    for c in &summary.comparisons {
        let p = |p: Option<f64>| p.map_or("–".to_string(), |p| p_text(p).replace("p = ", "").replace("p < ", "< "));
        let show = rounded_to(c.paired.ci95);
        let ci = c.paired.ci95.map_or("–".to_string(), |[a, b]| format!("{} to {}", show(a), show(b)));
        let difference = c.paired.difference.map_or("–".to_string(), &show);
        let verdict = verdict_word(c.verdict).to_string();
        let (arm, metric) = (c.arm.clone(), c.metric.clone());
        let n = c.paired.n.to_string();
        text += &row([arm, metric, difference, ci, p(c.paired.p_value), p(c.p_holm), n, verdict].into_iter());
    }
    for (path, _) in pictures {
        let title = path.trim_start_matches(PICTURES).trim_matches('/').trim_end_matches(".svg");
        text += &format!("\n![{title}]({path})\n");
    }
    if !summary.reproduction.is_empty() {
        text += "\n## Beside what the suite's file says\n\n";
        for r in &summary.reproduction {
            text += &format!("- {}\n", r.sentence());
        }
    }
    if !summary.warnings.is_empty() {
        text += "\n## Read this before believing the numbers\n\n";
        for warning in &summary.warnings {
            text += &format!("- {}\n", warning.replace('\n', " "));
        }
    }
    let p = &summary.provenance;
    let revision = p.revision.as_ref().map_or(String::new(), |r| format!(" ({r})"));
    let hours = Some(summary.compute.words()).filter(|words| !words.is_empty());
    let hours = hours.map_or(String::new(), |words| format!(" ({words}, probes not counted)"));
    text +=
        &format!("\nAll finished runs took {}{hours}; dinolab {}{revision}.\n", duration(summary.seconds), p.version);
    text += &format!("\n```sh\n{}\n```\n", p.command);
    text
}

/// An estimate as `mean ± half interval (standard deviation)`.
pub(super) fn estimate_text(e: &Estimate) -> String {
    match (e.mean, e.ci95) {
        (Some(mean), Some([low, high])) => {
            let show = rounded_to(e.ci95);
            let std = e.std.map(|std| format!(" ({})", show(std))).unwrap_or_default();
            format!("{} ± {}{std}", show(mean), show((high - low) / 2.0))
        }
        (Some(mean), None) => number(mean),
        _ => "–".into(),
    }
}

/// A verdict in a word.
pub(super) fn verdict_word(verdict: super::Verdict) -> &'static str {
    match verdict {
        super::Verdict::Higher => "higher",
        super::Verdict::Lower => "lower",
        super::Verdict::Suggestive => "suggestive",
        super::Verdict::Inconclusive => "inconclusive",
        super::Verdict::NoInterval => "no interval",
        super::Verdict::Unlike => "not comparable",
    }
}

fn row(cells: impl Iterator<Item = String>) -> String {
    let cells: Vec<String> = cells.map(|c| c.replace('|', "\\|")).collect();
    format!("| {} |\n", cells.join(" | "))
}
