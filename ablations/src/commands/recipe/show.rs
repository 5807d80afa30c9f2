//! `dinolab recipe show PATH`: the resolved recipe, what it changes of its base, or its timeline.

use std::fmt::Write as _;
use std::path::PathBuf;

use dinolab_core::contract::{At, Schedule};
use dinolab_core::recipe::{describe, RawRecipe};
use dinolab_core::resolved::Resolved;
use dinolab_core::{Error, Result};
use textplots::{Chart, LabelBuilder, LabelFormat, Plot, Shape};

use crate::cli::SetArgs;
use crate::report::number;
use crate::style;

/// Arguments of `dinolab recipe show`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A recipe, or the folder of a run.
    path: PathBuf,
    #[command(flatten)]
    set: SetArgs,
    /// Only what differs from the recipe that this one extends.
    #[arg(long, conflicts_with = "timeline")]
    diff_base: bool,
    /// Draw every schedule and list what happens to the teachers, over the run.
    #[arg(long)]
    timeline: bool,
}

/// Runs the command.
pub(super) fn run(args: &Args) -> Result<()> {
    let raw = RawRecipe::load(&args.path)?.with(&args.set.overrides())?;
    if args.diff_base {
        let Some(base) = raw.base() else {
            let message = format!("{} extends nothing", args.path.display());
            return Err(Error::user(message, "compare two recipes with `dinolab recipe diff A B`"));
        };
        let json = |raw: &RawRecipe| serde_json::to_value(raw.value()).expect("a recipe is plain data");
        let changes = super::diff::changes(&json(base), &json(&raw));
        style::print(&changes.unwrap_or_else(|| "no difference\n".into()));
        return Ok(());
    }
    let resolved = Resolved::of(raw)?;
    resolved.warnings.iter().for_each(style::warn);
    style::print(&if args.timeline { timeline(&resolved)? } else { resolved.to_toml() });
    Ok(())
}

/// Schedules as charts (constant ones as numbers), then what happens to the teachers.
fn timeline(resolved: &Resolved) -> Result<String> {
    let style = style::out();
    let total = resolved.recipe.steps;
    let (moving, constant): (Vec<_>, Vec<_>) =
        describe::schedules(&resolved.value).into_iter().partition(|(_, schedule)| range(schedule, total).is_some());
    let mut text = format!("{}\n", style.bold(&format!("{} steps", total)));
    text += &style::table(
        constant.iter().map(|(key, s)| vec![key.clone(), format!("{} throughout", s.at(At { step: 0, total }))]),
    );
    for (key, schedule) in &moving {
        let (least, most) = range(schedule, total).unwrap_or_default();
        let points: Vec<(f32, f32)> =
            samples(total).map(|step| (step as f32, schedule.at(At { step, total }) as f32)).collect();
        writeln!(text, "\n{}  {} .. {}", style.bold(key), number(least), number(most)).expect("writing to a string");
        let mut chart = Chart::new_with_y_range(140, 32, 0.0, total as f32, least as f32, most as f32);
        let line = Shape::Lines(&points);
        // textplots' own labels have one decimal, which says nothing of a learning rate.
        let label = || LabelFormat::Custom(Box::new(|x| number(f64::from(x))));
        let drawn = chart.lineplot(&line).x_label_format(label()).y_label_format(label());
        drawn.axis();
        drawn.figures();
        writeln!(text, "{}", drawn.to_string().trim_end_matches('\n')).expect("writing to a string");
    }
    for (key, chosen) in resolved.recipe.all_teachers() {
        let events = chosen.build(&mut ())?.events(total);
        if !events.is_empty() {
            writeln!(text, "\n{} ({})", style.bold(&key), chosen.name()).expect("writing to a string");
            text += &style::table(events.into_iter().map(|(step, what)| vec![format!("  step {step}"), what]));
        }
    }
    Ok(text)
}

/// Steps that a chart of 140 points needs.
fn samples(total: u64) -> impl Iterator<Item = u64> {
    let n = total.clamp(1, 281);
    (0..n).map(move |i| ((i as u128 * (total.max(1) - 1) as u128) / (n.max(2) - 1) as u128) as u64)
}

/// Least and most over the run; `None` if it never changes.
fn range(schedule: &Schedule, total: u64) -> Option<(f64, f64)> {
    let values = schedule.landmarks(total).into_iter().map(|step| schedule.at(At { step, total }));
    let (least, most) = values.fold((f64::MAX, f64::MIN), |(a, b), x| (a.min(x), b.max(x)));
    (least < most).then_some((least, most))
}
