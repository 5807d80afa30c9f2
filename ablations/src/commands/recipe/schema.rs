//! `dinolab recipe schema`: what an editor completes and checks files with.

use dinolab_core::recipe::describe;
use serde_json::{json, Value as Json};

/// The schema as an editor needs it: what a file says is checked, what it leaves out only where it extends no other
/// recipe, which may say it. (`dinolab recipe check` sees the whole chain.)
pub(super) fn for_editors() -> Json {
    let mut schema = describe::schema();
    let required = schema.get("required").cloned();
    relax(&mut schema);
    if let Some(root) = schema.as_object_mut() {
        root.insert("if".into(), json!({ "not": { "required": ["extends"] } }));
        root.insert("then".into(), json!({ "required": required }));
    }
    schema
}

/// No key is required, except that a loss or probe that is not named after its plugin says which it is.
fn relax(schema: &mut Json) {
    match schema {
        Json::Object(map) => {
            let named = map.get("x-kind").is_some_and(|kind| kind == "loss" || kind == "probe");
            if let Some(Json::Array(required)) = map.get_mut("required") {
                required.retain(|key| named && key == "plugin");
            }
            map.values_mut().for_each(relax);
        }
        Json::Array(list) => list.iter_mut().for_each(relax),
        _ => {}
    }
}
