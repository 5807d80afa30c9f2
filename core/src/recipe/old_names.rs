//! Keys as earlier versions spelt them: recipes and runs of theirs are read, and a note gives the new name.

use figment::value::{Dict, Value};

use crate::problem::{Problem, Severity};

/// Tables and keys: the old dotted name and the new one.
const RENAMED: [(&str, &str); 2] =
    [("gram_teacher", "teachers.gram"), ("crops.gram_without_distortion", "crops.teacher_without_distortion")];

/// A key of the tables in the list `crops.resolutions`.
const OF_RESOLUTIONS: (&str, &str) = ("gram_size", "teacher_size");

/// A dotted key by its new name.
pub(super) fn new_name(key: &str) -> String {
    let renamed = RENAMED.iter().find_map(|(old, new)| {
        let rest = key.strip_prefix(old)?;
        (rest.is_empty() || rest.starts_with('.')).then(|| format!("{new}{rest}"))
    });
    renamed.unwrap_or_else(|| key.into())
}

/// What there is to say of a key that was written by its old name.
pub(super) fn note(old: &str, new: &str) -> Problem {
    let message = format!("is the new name of `{old}`");
    Problem { severity: Severity::Note, ..Problem::warning(new, message).help("write the new name") }
}

/// Gives the keys of a layer their new names; notes say which.
///
/// # Errors
/// If a key is there by both names.
pub(super) fn rename(layer: &mut Dict) -> Result<Vec<Problem>, Problem> {
    let mut notes = Vec::new();
    for (old, new) in RENAMED {
        let Some(value) = take(layer, old) else { continue };
        if !put(layer, new, value) {
            return Err(Problem::error(new, format!("is there twice: `{old}` is its old name")).help("remove one"));
        }
        notes.push(note(old, new));
    }
    let Some(Value::Dict(_, crops)) = layer.get_mut("crops") else { return Ok(notes) };
    let Some(Value::Array(_, resolutions)) = crops.get_mut("resolutions") else { return Ok(notes) };
    let (old, new) = OF_RESOLUTIONS;
    for resolution in resolutions {
        let Value::Dict(_, table) = resolution else { continue };
        if let Some(value) = table.remove(old) {
            table.insert(new.into(), value);
            notes.push(Problem { key: "crops.resolutions".into(), ..note(old, new) });
        }
    }
    notes.dedup();
    Ok(notes)
}

/// Takes a dotted key out of nested tables.
fn take(table: &mut Dict, key: &str) -> Option<Value> {
    match key.split_once('.') {
        None => table.remove(key),
        Some((first, rest)) => match table.get_mut(first)? {
            Value::Dict(_, inner) => take(inner, rest),
            _ => None,
        },
    }
}

/// Puts a value at a dotted key; false if there is one already.
fn put(table: &mut Dict, key: &str, value: Value) -> bool {
    match key.split_once('.') {
        None => table.insert(key.into(), value).is_none(),
        Some((first, rest)) => match table.entry(first.into()).or_insert_with(|| Value::from(Dict::new())) {
            Value::Dict(_, inner) => put(inner, rest, value),
            _ => false,
        },
    }
}

#[cfg(test)]
mod tests {
    use crate::recipe::RawRecipe;

    #[test]
    fn old_names_mean_the_new_keys_and_are_noted() {
        let text = "[gram_teacher]\nplugin = \"test_slow\"\n[crops]\ngram_without_distortion = true\n\
            resolutions = [{ share = 1.0, gram_size = 3 }]";
        let raw = RawRecipe::from_text(text).unwrap();
        assert_eq!(raw.get("teachers.gram.plugin").and_then(|v| v.as_str()), Some("test_slow"));
        assert_eq!(raw.get("crops.teacher_without_distortion").and_then(|v| v.to_bool()), Some(true));
        assert!(raw.get("gram_teacher").is_none() && format!("{:?}", raw.get("crops")).contains("teacher_size"));
        let place = raw.set_by("teachers.gram.plugin").line_column();
        assert_eq!(place.map(|(line, _)| line), Some(2));
        assert_eq!(raw.warnings().len(), 3);
        assert!(raw.warnings()[0].to_string().contains("teachers.gram: is the new name of `gram_teacher`"));
    }

    #[test]
    fn a_key_by_both_names_is_refused() {
        let error =
            RawRecipe::from_text("[gram_teacher]\nplugin = \"a\"\n[teachers.gram]\nplugin = \"b\"").unwrap_err();
        assert!(error.to_string().contains("is there twice: `gram_teacher` is its old name"), "{error}");
    }
}
