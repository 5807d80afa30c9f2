//! Where a suite's file sets a key: what is wrong with a recipe of an arm is told at the line that says so.

use std::collections::BTreeMap;
use std::sync::Arc;

use dinolab_core::problem::{Origin, Problem, SourceFile};
use dinolab_core::recipe::{is_within, read_text};
use dinolab_core::Error;
use toml_edit::{Document, Item, Key, TableLike, Value};

use super::file::{Overrides, Suite};
use super::trunk::TRUNK;

/// What is wrong with the recipes of arms, as one error: each problem once, with the arms that have it where not all do.
/// `typed` is what the command line sets.
pub(super) fn explained(suite: &Suite, typed: &Overrides, refused: Vec<(&str, Error)>) -> Error {
    let places = Places::of(suite, typed);
    let mut found: Vec<(Problem, Vec<&str>)> = Vec::new();
    let mut others = Vec::new();
    for (arm, error) in refused {
        let Error::Recipe(recipe) = error else {
            others.push(error);
            continue;
        };
        for mut problem in recipe.0 {
            if let Origin::Override(_) = problem.origin {
                problem.origin = places.place(arm, &problem.key).unwrap_or(problem.origin);
            }
            match found.iter_mut().find(|(known, _)| *known == problem) {
                Some((_, arms)) => arms.push(arm),
                None => found.push((problem, vec![arm])),
            }
        }
    }
    if found.is_empty() {
        return others.swap_remove(0);
    }
    let with_arms = |(mut problem, arms): (Problem, Vec<&str>)| {
        if arms.len() < suite.arms.len() {
            let names = arms.join("`, `");
            problem.message += &format!(" (arm{} `{names}`)", if arms.len() > 1 { "s" } else { "" });
        }
        problem
    };
    found
        .into_iter()
        .map(with_arms)
        .chain(others.into_iter().map(|e| Problem::error("", e.to_string())))
        .collect::<Vec<_>>()
        .into()
}

/// The place of every dotted key in a suite's file, by the table that sets it.
#[derive(Default)]
struct Places {
    /// `set` of an arm, or of the trunk.
    of_arm: BTreeMap<String, BTreeMap<String, Origin>>,
    /// What all arms share: `[grid]` over the command line over `[set]`.
    shared: [BTreeMap<String, Origin>; 3],
}

impl Places {
    /// Those of the file as it is now; none if it cannot be read.
    fn of(suite: &Suite, typed: &Overrides) -> Self {
        let mut places = Self::default();
        let [grid, set, common] = &mut places.shared;
        set.extend(typed.iter().map(|(key, value)| (key.clone(), Origin::Set(format!("{key}={value}")))));
        let Ok(text) = read_text(&suite.path) else { return places };
        let source = Arc::new(SourceFile { path: suite.path.clone(), text });
        let Ok(document) = Document::parse(source.text.as_str()) else { return places };
        for (table, into) in [("grid", grid), ("set", common)] {
            let table = document.get(table).and_then(Item::as_table_like);
            table.into_iter().for_each(|table| walk("", table, &source, into));
        }
        let trunk = document.get("trunk").and_then(Item::as_table_like).map(|trunk| (TRUNK, trunk));
        let arms = document.get("arm").and_then(Item::as_array_of_tables).into_iter().flatten();
        let arms = arms.filter_map(|arm| Some((arm.get("name")?.as_str()?, arm as &dyn TableLike)));
        for (name, table) in arms.chain(trunk) {
            let set = table.get("set").and_then(Item::as_table_like);
            let of_arm = places.of_arm.entry(name.into()).or_default();
            set.into_iter().for_each(|set| walk("", set, &source, of_arm));
        }
        places
    }

    /// Where `key` of an arm's recipe is set: itself, the nearest table around it, or the first key inside.
    fn place(&self, arm: &str, key: &str) -> Option<Origin> {
        let around = std::iter::successors(Some(key), |key| Some(key.rsplit_once('.')?.0));
        let layers = || self.of_arm.get(arm).into_iter().chain(&self.shared);
        let inside = || layers().flatten().find(|(name, _)| is_within(name, key)).map(|(_, origin)| origin);
        around.into_iter().find_map(|key| layers().find_map(|keys| keys.get(key))).or_else(inside).cloned()
    }
}

fn walk(path: &str, table: &dyn TableLike, source: &Arc<SourceFile>, into: &mut BTreeMap<String, Origin>) {
    for (name, item) in table.iter() {
        let key = table.key(name).and_then(Key::span).unwrap_or(0..0);
        let value = item.as_value().filter(|v| !v.is_inline_table()).and_then(Value::span).unwrap_or(key.clone());
        let path = if path.is_empty() { name.to_string() } else { format!("{path}.{name}") };
        item.as_table_like().into_iter().for_each(|table| walk(&path, table, source, into));
        into.insert(path, Origin::File { source: source.clone(), key, value });
    }
}
