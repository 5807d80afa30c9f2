//! When the Gram teacher is replaced.

use dinolab_core::contract::{At, Follow, Role, TeacherPolicy};
use dinolab_core::registry::Chosen;
use dinolab_plugins as _;
use serde_json::{json, Value};

fn policy(table: Value) -> Box<dyn TeacherPolicy> {
    let chosen: Chosen<dyn TeacherPolicy> = serde_json::from_value(table).unwrap();
    chosen.build(&mut ()).unwrap()
}

/// The steps after which the Gram teacher becomes a copy of the EMA teacher.
fn copies_after(policy: &dyn TeacherPolicy, total: u64) -> Vec<u64> {
    let copy = Follow::Copy(Role::Teacher);
    (0..total).filter(|&step| policy.after_step(At { step, total }) == copy).collect()
}

/// The recipe of the reference's `gram` block. It counts refreshes in multiples of the frequency, a recipe from the
/// first one.
fn gram_anchor(gram: &Value) -> Value {
    let mut recipe = json!({ "plugin": "gram_anchor", "source": { "checkpoint": "given" } });
    if gram["rep_update"] == true {
        let every = gram["update_frequency"].as_u64().expect("a frequency");
        let first = gram["it_first_update"].as_u64().unwrap_or(0).max(1).div_ceil(every) * every;
        recipe["refresh"] = json!({ "every": every, "first": first });
        if let Some(most) = gram["max_updates"].as_u64() {
            recipe["refresh"]["at_most"] = most.into();
        }
    }
    recipe
}

/// Against the reference's loop, written out: `num_gram_updates` is a counter there.
#[test]
fn refreshes_follow_the_rule_of_the_reference() {
    for (first, frequency, most) in [(0u64, 3u64, None), (4, 4, Some(2)), (5, 4, None), (10, 1, Some(3)), (7, 50, None)]
    {
        let gram =
            json!({ "rep_update": true, "it_first_update": first, "update_frequency": frequency, "max_updates": most });
        let mut expected = Vec::new();
        for i in 0..60 {
            let room = most.is_none_or(|most: usize| expected.len() < most);
            if i + 1 >= first && (i + 1) % frequency == 0 && room {
                expected.push(i);
            }
        }
        assert_eq!(copies_after(policy(gram_anchor(&gram)).as_ref(), 60), expected, "{gram}");
    }
}

#[test]
fn a_recipe_cannot_refresh_at_no_distance_or_name_two_sources() {
    for (table, problem) in [
        (json!({ "plugin": "gram_anchor", "refresh": { "every": 0 } }), "a whole number, 1 or more"),
        (json!({ "plugin": "gram_anchor", "refresh": { "at_most": 2 } }), "missing key"),
        (json!({ "plugin": "gram_anchor", "source": "student" }), "not one of the choices"),
        (json!({ "plugin": "gram_anchor", "ckpt": "x" }), "unknown key"),
    ] {
        let error = serde_json::from_value::<Chosen<dyn TeacherPolicy>>(table).unwrap_err().to_string();
        assert!(error.contains(problem), "{error}");
    }
}
