//! What a reader must know of a suite before it runs: metrics that are not measured, or not alike, and keys that change nothing.

use dinolab_core::recipe::is_within;
use toml::Value;

use super::plan::{Plan, PlannedRun};

impl Plan {
    /// What of the suite probably does not mean what it says.
    pub(super) fn doubts(&self) -> Vec<String> {
        let mut all = self.metric_warnings();
        all.extend(self.unlike_metrics());
        all.extend(self.idle_follows());
        all.extend(self.idle_sets());
        all.extend(self.idle_rules());
        all
    }

    /// The keys of what `metric` is, in which `arm` differs from the baseline: with any, its values are of two quantities, whose
    /// difference is no result. The total loss is its terms with their weights; a loss is everything that is said of it but its
    /// weight; a probe is its keys, but for when it is taken, and the images that are held out.
    pub fn measured_otherwise(&self, arm: &str, metric: &str) -> Vec<String> {
        let mut parts = metric.split('/');
        let (kind, name) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        // Images that are held out are a share of those that are trained on, unless they have keys of their own.
        let own_images = || {
            let of = |arm: &str| self.recipe_of(arm).get("data").and_then(|data| data.get("val")).is_some();
            of(arm) && of(&self.suite.baseline)
        };
        let (tables, apart) = match (kind, name) {
            ("loss", "total") => (vec!["losses".to_string()], vec![]),
            ("loss", _) => (vec![format!("losses.{name}")], vec!["weight", "enabled"]),
            ("probe", _) if own_images() => (
                vec![format!("probes.{name}"), "data".into()],
                vec!["every", "enabled", "count", "path", "masks", "depth"],
            ),
            ("probe", _) => (vec![format!("probes.{name}"), "data".into()], vec!["every", "enabled", "count"]),
            _ => return Vec::new(),
        };
        // What is said of a loss that neither has is no part of it.
        let idle = |key: &str| {
            let off = |arm: &str, name: &str| !enabled(self.recipe_of(arm), "losses", name);
            let name = key.strip_prefix("losses.").map(|rest| rest.split('.').next().unwrap_or(rest));
            name.is_some_and(|name| off(arm, name) && off(&self.suite.baseline, name))
        };
        let within = |key: &str, table: &String| {
            is_within(key, table) && !apart.iter().any(|own| is_within(key, &format!("{table}.{own}")))
        };
        let defines = |key: &String| tables.iter().any(|table| within(key, table)) && !idle(key);
        self.differences(arm).into_iter().map(|(key, ..)| key).filter(defines).collect()
    }

    /// Metrics that are one thing in the baseline and another in an arm.
    fn unlike_metrics(&self) -> Vec<String> {
        let arms = self.suite.arms.iter().filter(|arm| arm.name != self.suite.baseline);
        let all = arms.flat_map(|arm| self.suite.metrics.iter().map(move |metric| (&arm.name, &metric.name)));
        let unlike = all.filter_map(|(arm, metric)| {
            let keys = self.measured_otherwise(arm, metric);
            (!keys.is_empty()).then(|| {
                format!(
                    "metric `{metric}` is another quantity in {arm} than in the baseline, and gets no verdict: it depends on {}",
                    keys.join(", ")
                )
            })
        });
        unlike.collect()
    }

    /// Keys of `follows` in which no arm differs from the baseline.
    fn idle_follows(&self) -> Vec<String> {
        let arms = self.first_of_each_arm().iter().map(|run| &run.arm);
        let differ: Vec<String> = arms.flat_map(|arm| self.differences(arm)).map(|(key, ..)| key).collect();
        let idle = self.suite.follows.iter().filter(|named| !differ.iter().any(|key| is_within(key, named)));
        idle.map(|named| format!("`follows` names `{named}`, in which no arm differs from the baseline")).collect()
    }

    /// Rules of `[[drop]]` that begin to hold when all runs are done.
    fn idle_rules(&self) -> Vec<String> {
        let steps =
            |run: &PlannedRun| run.prepared.recipe().get("steps").and_then(Value::as_integer).unwrap_or(i64::MAX);
        let most = self.first_of_each_arm().iter().map(steps).max().unwrap_or(i64::MAX);
        let idle = self.suite.drop.iter().filter(|rule| i64::try_from(rule.after).is_ok_and(|after| after > most));
        idle.map(|rule| {
            format!("a rule of [[drop]] holds from step {} on, and no arm has more than {most}", rule.after)
        })
        .collect()
    }

    /// Keys of losses and probes that an arm sets, and that are off in it.
    fn idle_sets(&self) -> Vec<String> {
        let idle = |run: &PlannedRun| {
            let set = &self.suite.arm(&run.arm).expect("it is an arm of the suite").set;
            let of_arm = set.iter().filter_map(|(key, value)| {
                let (table, rest) = key.split_once('.').filter(|(table, _)| ["losses", "probes"].contains(table))?;
                let (name, own) = rest.split_once('.').map_or((rest, None), |(name, own)| (name, Some(own)));
                let says_more = match own {
                    Some(own) => !["enabled", "plugin"].contains(&own),
                    None => value.as_table().is_some_and(|t| t.keys().any(|k| !["enabled", "plugin"].contains(&k.as_str()))),
                };
                (says_more && !enabled(run.prepared.recipe(), table, name)).then(|| {
                    format!(
                        "arm `{}` sets {key}, which nothing reads: {table}.{name} is off in it; set {table}.{name}.enabled = true, or \
                         leave the key out",
                        run.arm
                    )
                })
            });
            of_arm.collect::<Vec<_>>()
        };
        self.first_of_each_arm().iter().flat_map(idle).collect()
    }

    /// Metrics that no probe or loss of an arm's recipe will give. The smoke runs check the exact names.
    fn metric_warnings(&self) -> Vec<String> {
        // With `sizes` a score has one of them in its name.
        let sized = |recipe: &toml::Table, name: &str, metric: &str| {
            let sizes = recipe.get("probes").and_then(|t| t.get(name)).and_then(|t| t.get("sizes"));
            let sizes = sizes.and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
            let has = |size: &str| sizes.iter().any(|v| v.as_str() == Some(size) || v.to_string() == size);
            metric.rsplit_once('@').map_or(sizes.is_empty(), |(_, size)| has(size))
        };
        let missing = |run: &&PlannedRun, metric: &str| {
            let mut parts = metric.split('/');
            match (parts.next(), parts.next()) {
                (Some("probe"), Some(name)) => {
                    let recipe = run.prepared.recipe();
                    !enabled(recipe, "probes", name) || !sized(recipe, name, metric)
                }
                (Some("loss"), Some(name)) => name != "total" && !enabled(run.prepared.recipe(), "losses", name),
                _ => false,
            }
        };
        let warning = |metric: &str| {
            let without = self.first_of_each_arm().iter().filter(|run| missing(run, metric));
            let arms: Vec<&str> = without.map(|run| run.arm.as_str()).collect();
            let which = if arms.len() == self.suite.arms.len() { "any arm".to_string() } else { arms.join(", ") };
            (!arms.is_empty()).then(|| format!("metric `{metric}` is not measured by {which}"))
        };
        // A rule may be of a loss that some arms do not have.
        let of_rules =
            self.suite.drop.iter().filter_map(|rule| warning(&rule.metric).filter(|w| w.ends_with("any arm")));
        let mut all: Vec<String> = self.suite.metrics.iter().filter_map(|m| warning(&m.name)).chain(of_rules).collect();
        all.dedup();
        all
    }
}

/// Whether a recipe has a loss or probe of this name that is on.
fn enabled(recipe: &toml::Table, table: &str, name: &str) -> bool {
    let entry = recipe.get(table).and_then(|t| t.get(name));
    entry.is_some_and(|e| e.get("enabled").and_then(Value::as_bool) != Some(false))
}
