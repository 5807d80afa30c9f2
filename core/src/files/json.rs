//! JSON in which a key is given twice: readers take the last and say nothing.

use std::collections::BTreeSet;
use std::fmt;

use serde::de::{DeserializeSeed, MapAccess, SeqAccess, Visitor};
use serde::Deserializer;

/// The first key that some table of this JSON has twice, which readers pass over. Text that is not JSON has none.
pub fn twice(json: &[u8]) -> Option<String> {
    /// Reads a value and forgets it, but for keys.
    struct Walk<'a>(&'a mut Option<String>);

    impl<'de> DeserializeSeed<'de> for Walk<'_> {
        type Value = ();
        fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
            deserializer.deserialize_any(self)
        }
    }

    impl<'de> Visitor<'de> for Walk<'_> {
        type Value = ();
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("JSON")
        }
        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
            let mut seen = BTreeSet::new();
            while let Some(key) = map.next_key::<String>()? {
                map.next_value_seed(Walk(self.0))?;
                if !seen.insert(key.clone()) {
                    self.0.get_or_insert(key);
                }
            }
            Ok(())
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
            while list.next_element_seed(Walk(self.0))?.is_some() {}
            Ok(())
        }
        fn visit_bool<E>(self, _: bool) -> Result<(), E> {
            Ok(())
        }
        fn visit_i64<E>(self, _: i64) -> Result<(), E> {
            Ok(())
        }
        fn visit_u64<E>(self, _: u64) -> Result<(), E> {
            Ok(())
        }
        fn visit_f64<E>(self, _: f64) -> Result<(), E> {
            Ok(())
        }
        fn visit_str<E>(self, _: &str) -> Result<(), E> {
            Ok(())
        }
        fn visit_unit<E>(self) -> Result<(), E> {
            Ok(())
        }
    }

    let mut found = None;
    // What is not JSON is refused by who reads it.
    let _ = Walk(&mut found).deserialize(&mut serde_json::Deserializer::from_slice(json));
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_given_twice_is_found_at_any_depth() {
        assert_eq!(twice(br#"{"a": 1, "b": [{"c": 1, "d": {}, "c": 2}]}"#), Some("c".into()));
        assert_eq!(twice(br#"{"a": {"a": 1}, "b": [{"a": 1}, {"a": 2}], "c": null}"#), None);
        assert_eq!(twice(b"{"), None);
    }
}
