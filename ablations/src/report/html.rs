//! `report.html`: one file with everything in it, no script and no request; and what the pages of
//! `dinolab watch` and `dinolab eval` share with it.

use std::collections::{BTreeMap, BTreeSet};

use dinolab_core::recipe::Curve;
use dinolab_core::Result;
use minijinja::value::Serde;
use minijinja::{context, Environment, Value};
use plotters::style::RGBColor;

use super::markdown::{estimate_text, verdict_word};
use super::plots::{bounds, color, css, curves, forest, Band, ForestRow, Mark, Point, Points, TRUNK_COLOR};
use super::{duration, number, p_text, rounded_to, Comparison, EventSummary, Gallery, Reproduction, Summary, Verdict};
use crate::filmstrip::STRIPS;
use crate::suite::{Better, Plan, RunRecord, Series, TRUNK};

const TEMPLATE: &str = include_str!("template.html");
/// What pages are made of.
const PARTS: [(&str, &str); 5] = [
    ("head.html", include_str!("head.html")),
    ("style.css", include_str!("style.css")),
    ("curves.html", include_str!("curves.html")),
    ("strips.html", STRIPS),
    ("live.html", include_str!("live.html")),
];

/// A page's template, and all that it may include.
pub(crate) fn environment(name: &'static str, template: &'static str) -> Environment<'static> {
    let mut environment = Environment::new();
    for (name, text) in PARTS.into_iter().chain([(name, template)]) {
        environment.add_template(name, text).expect("the template is well formed");
    }
    environment
}

/// The page; a live one asks for its newer self.
pub(super) fn page(
    plan: &Plan,
    records: &[RunRecord],
    summary: &Summary,
    gallery: &Gallery,
    live: bool,
) -> Result<String> {
    let colors = arm_colors(summary);
    let arms: Vec<Value> = summary
        .arms
        .iter()
        .zip(&colors)
        .map(|(arm, &color)| {
            let finished = arm.runs.iter().filter(|r| r.status == "finished").count();
            let scores: Vec<String> = summary.metrics.iter().map(|m| estimate_text(&arm.metrics[m])).collect();
            context! {
                name => arm.name.as_str(), color => css(color), baseline => arm.name == summary.baseline, scores,
                finished, planned => arm.runs.len(), runs => Value::from(Serde(&arm.runs)),
                seconds => arm.seconds.map(duration), speed => arm.steps_per_second.map(number),
                changes => plan.differences(&arm.name),
            }
        })
        .collect();
    let arm_color = |name: &str| color_of(summary, &colors, name);
    let metrics: Vec<Value> = plan
        .suite
        .metrics
        .iter()
        .map(|metric| {
            let comparisons: Vec<&Comparison> =
                summary.comparisons.iter().filter(|c| c.metric == metric.name).collect();
            context! {
                name => metric.name.as_str(), parts => metric.name.split('/').map(String::from).collect::<Vec<_>>(),
                better => if metric.better == Better::Higher { "higher is better" } else { "lower is better" },
                forest => forest_of(summary, &metric.name).map(Value::from_safe_string),
                comparisons => comparisons.into_iter().map(|c| comparison(c, metric.better)).collect::<Vec<_>>(),
            }
        })
        .collect();
    let headlines: Vec<Value> = summary
        .headlines()
        .map(|c| {
            let (verdict, worth) = (verdict_word(c.verdict), worth(c, summary.better[&c.metric]));
            context! { sentence => c.sentence.as_str(), verdict, worth, color => css(arm_color(&c.arm)) }
        })
        .collect();
    let lines = drawn_lines(summary);
    let happened = happened(&summary.events, &lines);
    let curve_groups = curve_groups(&summary.metrics, records, &lines, &marks(&happened), &BTreeMap::new());
    let lines: Vec<Value> =
        lines.iter().map(|(name, color)| context! { name => *name, color => css(*color) }).collect();
    let happened: Vec<Value> = happened.iter().map(Happened::shown).collect();
    let (pictures, film) = (gallery.pictures.as_ref(), gallery.film.as_ref());
    let environment = environment("report.html", TEMPLATE);
    let page = environment.get_template("report.html").expect("it was added above").render(context! {
        summary => Value::from(Serde(summary)), arms, metrics, headlines, curve_groups, lines, happened, live,
        total_time => duration(summary.seconds), compute => summary.compute.words(), reproduction => reproduction(summary), filmstrip => film.map(|film| Value::from(Serde(film))),
        pictures => pictures.map(|p| context! { seed => p.seed, rows => Value::from(Serde(&p.rows)) }),
    });
    Ok(page.expect("the template asks for nothing that it is not given"))
}

/// The colour of every arm, in order.
pub(super) fn arm_colors(summary: &Summary) -> Vec<RGBColor> {
    let baseline = summary.arms.iter().position(|a| a.name == summary.baseline).expect("the baseline is an arm");
    (0..summary.arms.len()).map(|i| color(i, baseline)).collect()
}

fn color_of(summary: &Summary, colors: &[RGBColor], name: &str) -> RGBColor {
    colors[summary.arms.iter().position(|a| a.name == name).expect("comparisons are of arms")]
}

/// What is drawn as a curve: the trunk and the arms, with their colours.
pub(super) fn drawn_lines(summary: &Summary) -> Vec<(&str, RGBColor)> {
    let trunk = summary.trunk.iter().map(|_| (TRUNK, TRUNK_COLOR));
    trunk.chain(summary.arms.iter().map(|arm| arm.name.as_str()).zip(arm_colors(summary))).collect()
}

/// The differences of all arms in a metric, as a drawing; none without pairs.
pub(super) fn forest_of(summary: &Summary, metric: &str) -> Option<String> {
    let colors = arm_colors(summary);
    let row = |c: &Comparison| {
        let seeds = c.per_seed.iter().map(|s| s.difference).collect();
        let (label, color) = (c.arm.clone(), color_of(summary, &colors, &c.arm));
        Some(ForestRow { label, color, difference: c.paired.difference?, ci95: c.paired.ci95, seeds })
    };
    let rows: Vec<ForestRow> = summary.comparisons.iter().filter(|c| c.metric == metric).filter_map(row).collect();
    (!rows.is_empty()).then(|| forest(&rows))
}

/// A metric of all that is drawn over steps, as a drawing; none where it was measured once.
pub(super) fn curve_of(
    metric: &str,
    records: &[RunRecord],
    colors: &[(&str, RGBColor)],
    (steps, marks): ((f64, f64), &[Mark]),
    expected: Option<&Curve>,
) -> Option<String> {
    let band = |&(arm, color): &(&str, RGBColor)| {
        let runs: Vec<&Series> = records.iter().filter(|r| r.arm == arm).filter_map(|r| r.curves.get(metric)).collect();
        Band { color, points: Points::over(&runs).0 }
    };
    let bands: Vec<Band> = colors.iter().map(band).filter(|b| !b.points.is_empty()).collect();
    let expected: Vec<Point> = expected.into_iter().flat_map(expected_points).collect();
    // What was measured once is in the tables.
    bands.iter().any(|b| b.points.len() > 1).then(|| curves(&bands, steps, marks, &expected))
}

fn expected_points(curve: &Curve) -> impl Iterator<Item = Point> + '_ {
    let values = curve.mean.iter().zip(&curve.sd);
    curve.steps.iter().zip(values).map(|(&step, (&mean, &std))| Point { step: step as f64, mean, std, n: 1 })
}

/// The steps that any of these runs logged: the first and the last.
pub(super) fn axis(records: &[RunRecord]) -> (f64, f64) {
    bounds(records.iter().flat_map(|r| r.curves.values().flatten()).map(|(step, _)| *step as f64))
}

/// What the suite's head says, beside what it gave.
fn reproduction(summary: &Summary) -> Vec<Value> {
    let row = |r: &Reproduction| {
        let show = rounded_to(r.within95);
        context! {
            arm => r.arm.as_str(), metric => r.metric.as_str(), here => show(r.here), said => show(r.said), n => r.n,
            within => r.within95.map(|[low, high]| format!("{} … {}", show(low), show(high))),
            agrees => r.agrees.map_or("unknown", |agrees| if agrees { "as said" } else { "other than said" }),
        }
    };
    summary.reproduction.iter().map(row).collect()
}

/// Whether a difference that was found is for the better; `None` if none was.
fn worth(c: &Comparison, better: Better) -> Option<&'static str> {
    match (c.verdict, better) {
        (Verdict::Higher, Better::Higher) | (Verdict::Lower, Better::Lower) => Some("better"),
        (Verdict::Higher, Better::Lower) | (Verdict::Lower, Better::Higher) => Some("worse"),
        _ => None,
    }
}

fn comparison(c: &Comparison, better: Better) -> Value {
    let show = rounded_to(c.paired.ci95);
    let range = |ci: Option<[f64; 2]>| ci.map(|[a, b]| format!("{} … {}", show(a), show(b)));
    let p_cell = |p: Option<f64>| p.map(|p| p_text(p).replace("p = ", "").replace("p < ", "< "));
    context! {
        arm => c.arm.as_str(), sentence => c.sentence.as_str(), verdict => verdict_word(c.verdict),
        worth => worth(c, better), n => c.paired.n,
        difference => c.paired.difference.map(&show), ci95 => range(c.paired.ci95),
        bootstrap => range(c.paired.bootstrap95), effect => c.paired.effect_size.map(number),
        p => p_cell(c.paired.p_value), p_holm => p_cell(c.p_holm), p_sign => p_cell(c.paired.p_sign_flip),
    }
}

/// Curves by theme: the metrics that decide, other probes, losses, and the rest, which is folded away. All have the same
/// axis and the same lines where something happened; behind some is what was expected.
pub(super) fn curve_groups(
    metrics: &[String],
    records: &[RunRecord],
    colors: &[(&str, RGBColor)],
    marks: &[Mark],
    expected: &BTreeMap<String, Curve>,
) -> Vec<Value> {
    let names: BTreeSet<&String> = records.iter().flat_map(|r| r.curves.keys()).collect();
    let group = |name: &str| match name {
        n if metrics.iter().any(|m| m == n) => 0,
        n if n.starts_with("probe/") => 1,
        n if n.starts_with("loss/") => 2,
        _ => 3,
    };
    let probes = if metrics.is_empty() { "Probes" } else { "Other probes" };
    let titles = ["What decides", probes, "Losses", "Optimisation and throughput"];
    let steps = axis(records);
    let drawn = |name: &&String| {
        let svg = curve_of(name, records, colors, (steps, marks), expected.get(*name))?;
        Some(context! { name => name.as_str(), svg => Value::from_safe_string(svg) })
    };
    let themes = titles.iter().enumerate().map(|(i, title)| {
        let plots: Vec<Value> = names.iter().filter(|n| group(n) == i).filter_map(drawn).collect();
        context! { title => *title, open => i != 3, plots }
    });
    themes.collect()
}

/// Something that happened, in the arms that it happened in.
pub(super) struct Happened<'a> {
    event: &'a EventSummary,
    arms: Vec<&'a str>,
    /// The colour of the arm, if it is one among several.
    color: Option<RGBColor>,
}

impl Happened<'_> {
    /// For a template.
    pub(super) fn shown(&self) -> Value {
        context! { event => Value::from(Serde(self.event)), arms => self.arms.join(", "), color => self.color.map(css) }
    }
}

/// The lines in curves where something happened.
pub(super) fn marks(happened: &[Happened<'_>]) -> Vec<Mark> {
    happened.iter().map(|h| Mark { step: h.event.step as f64, color: h.color }).collect()
}

pub(super) fn happened<'a>(events: &'a [EventSummary], colors: &[(&'a str, RGBColor)]) -> Vec<Happened<'a>> {
    let mut found = Vec::<Happened>::new();
    for event in events {
        let same =
            |h: &&mut Happened| (h.event.step, &h.event.kind, &h.event.text) == (event.step, &event.kind, &event.text);
        match found.iter_mut().find(same) {
            Some(known) => (known.arms, known.color) = ([&known.arms[..], &[event.arm.as_str()]].concat(), None),
            None => {
                let color = colors.iter().find(|(arm, _)| *arm == event.arm).map(|(_, color)| *color);
                found.push(Happened { event, arms: vec![&event.arm], color });
            }
        }
    }
    found
}
