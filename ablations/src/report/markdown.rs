//! `summary.md`: the table and the verdicts, for an issue or a lab book.

use super::{duration, number, p_text, rounded_to, Summary};
use crate::statistics::Estimate;

/// The page.
pub(super) fn page(summary: &Summary) -> String {
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
    if !summary.warnings.is_empty() {
        text += "\n## Read this before believing the numbers\n\n";
        for warning in &summary.warnings {
            text += &format!("- {}\n", warning.replace('\n', " "));
        }
    }
    let p = &summary.provenance;
    let revision = p.revision.as_ref().map_or(String::new(), |r| format!(" ({r})"));
    text += &format!("\nAll runs took {}; dinolab {}{revision}.\n", duration(summary.seconds), p.version);
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
    }
}

fn row(cells: impl Iterator<Item = String>) -> String {
    let cells: Vec<String> = cells.map(|c| c.replace('|', "\\|")).collect();
    format!("| {} |\n", cells.join(" | "))
}
