//! Finds identifiers in a JSON document with a streaming parser: it builds no tree, and stores only the
//! hashes of the identifiers.

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use std::borrow::Cow;
use std::fmt;

use super::kind::{Kind, Named};

/// A field and the kind of identifier in it. `name` matches the field anywhere, `parent.name` directly in
/// `parent` (list levels are ignored), `.name` in the document itself.
pub(super) type Field = (&'static str, Kind);

/// Maximum length of an identifier; the longest are signed URLs and tokens.
const IDENTIFIER_BYTES_MAX: usize = 4 * 1024;

/// Maximum number of values examined in one document. A mebibyte of the provider's responses has about
/// forty thousand; one of empty strings has a third of a million, and would block a worker.
const MAX_VALUES: usize = 65_536;

/// Maximum number of identifiers in one document. The provider's largest pages have a thousand entries
/// with a few identifiers each.
const MAX_IDENTIFIERS: usize = 4_096;

/// The fields to be found, by name.
#[derive(Clone, Debug, Default)]
pub(super) struct Fields {
    /// Sorted by name; fields with the same name are in the order of the table.
    sorted: Vec<FieldRule>,
    /// One bit per length of a name, the last one for all longer names.
    lengths: u64,
}

#[derive(Clone, Copy, Debug)]
struct FieldRule {
    name: &'static str,
    /// The name of the containing field; `None` for any.
    parent: Option<&'static str>,
    kind: Kind,
}

impl Fields {
    pub(super) fn of(fields: impl IntoIterator<Item = Field>) -> Self {
        let rule = |(field, kind): Field| match field.split_once('.') {
            Some((parent, name)) => FieldRule { name, parent: Some(parent), kind },
            None => FieldRule { name: field, parent: None, kind },
        };
        let mut sorted: Vec<FieldRule> = fields.into_iter().map(rule).collect();
        sorted.sort_by_key(|rule| rule.name);
        let lengths = sorted.iter().fold(0, |bits, rule| bits | length_bit(rule.name));
        Self { sorted, lengths }
    }

    /// The kind of identifier in the field `name` of the field `parent`.
    fn kind_of(&self, parent: &str, name: &str) -> Option<Kind> {
        if self.lengths & length_bit(name) == 0 {
            return None;
        }
        let first = self.sorted.partition_point(|rule| rule.name < name);
        let mut with_name = self.sorted.get(first..)?.iter().take_while(|rule| rule.name == name);
        with_name.find(|rule| rule.parent.is_none_or(|wanted| wanted == parent)).map(|rule| rule.kind)
    }
}

fn length_bit(name: &str) -> u64 {
    1 << name.len().min(63)
}

/// Returns the identifiers in these fields of a document, in its order; `identify` maps kind and text to
/// the identifier. A truncated document yields the identifiers before the truncation; one with more than
/// [`MAX_VALUES`] values or [`MAX_IDENTIFIERS`] identifiers yields those before the limit.
pub(super) fn find(
    document: &[u8],
    fields: &Fields,
    mut identify: impl FnMut(Kind, &str) -> Option<Named>,
) -> Vec<Named> {
    let mut search =
        Search { fields, identifiers: Vec::new(), values_left: MAX_VALUES, identify: &mut identify };
    let mut reader = serde_json::Deserializer::from_slice(document);
    let position = FieldPosition { search: &mut search, parent: "", name: "", kind: None };
    // Identifiers found in a malformed document are valid, too.
    let _ = position.deserialize(&mut reader);
    search.identifiers
}

struct Search<'a> {
    fields: &'a Fields,
    identifiers: Vec<Named>,
    /// Number of values that may still be examined.
    values_left: usize,
    /// Maps the kind and the text to an identifier.
    identify: &'a mut dyn FnMut(Kind, &str) -> Option<Named>,
}

/// The position of a value in a document: its field, the field around that, and the kind of identifier in
/// it.
struct FieldPosition<'a, 'b, 'n> {
    search: &'a mut Search<'b>,
    parent: &'n str,
    name: &'n str,
    kind: Option<Kind>,
}

impl<'de> DeserializeSeed<'de> for FieldPosition<'_, '_, '_> {
    type Value = Premade;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Premade, D::Error> {
        if self.search.values_left == 0 || self.search.identifiers.len() >= MAX_IDENTIFIERS {
            return Err(D::Error::custom("the limits of the search are reached"));
        }
        self.search.values_left -= 1;
        deserializer.deserialize_any(self)
    }
}

/// Whether a value marks its object as premade, which means that every account has it.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Premade(bool);

const NOT: Premade = Premade(false);

impl<'de> Visitor<'de> for FieldPosition<'_, '_, '_> {
    type Value = Premade;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("anything")
    }

    fn visit_str<E>(self, text: &str) -> Result<Premade, E> {
        if let Some(kind) = self.kind
            && !text.is_empty()
            && text.len() <= IDENTIFIER_BYTES_MAX
            && let Some(named) = (self.search.identify)(kind, text)
        {
            self.search.identifiers.push(named);
        }
        Ok(Premade(text == "premade" && self.name == "category"))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Premade, A::Error> {
        let Self { search, parent, name, kind } = self;
        while seq.next_element_seed(FieldPosition { search: &mut *search, parent, name, kind })?.is_some() {}
        Ok(NOT)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Premade, A::Error> {
        let before = self.search.identifiers.len();
        let mut is_premade = false;
        while let Some(key) = map.next_key::<FieldName<'_>>()? {
            let kind = self.search.fields.kind_of(self.name, &key.0);
            let inner = FieldPosition { search: &mut *self.search, parent: self.name, name: &key.0, kind };
            is_premade |= map.next_value_seed(inner)?.0;
        }
        // Every account has a premade resource, so it has no owner.
        if is_premade {
            self.search.identifiers.truncate(before);
        }
        Ok(NOT)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Premade, E> {
        Ok(NOT)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Premade, E> {
        Ok(NOT)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Premade, E> {
        Ok(NOT)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Premade, E> {
        Ok(NOT)
    }

    fn visit_unit<E>(self) -> Result<Premade, E> {
        Ok(NOT)
    }
}

/// The name of a field, borrowed where possible.
struct FieldName<'de>(Cow<'de, str>);

impl<'de> serde::Deserialize<'de> for FieldName<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct FieldNames;
        impl<'de> Visitor<'de> for FieldNames {
            type Value = FieldName<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a name")
            }

            fn visit_borrowed_str<E>(self, name: &'de str) -> Result<FieldName<'de>, E> {
                Ok(FieldName(Cow::Borrowed(name)))
            }

            fn visit_str<E>(self, name: &str) -> Result<FieldName<'de>, E> {
                Ok(FieldName(Cow::Owned(name.to_owned())))
            }
        }
        deserializer.deserialize_str(FieldNames)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identifiers_in(document: &str) -> Vec<Named> {
        let fields = [("voice_id", Kind::Voice), ("samples.id", Kind::Sample), (".id", Kind::Dictionary)];
        find(document.as_bytes(), &Fields::of(fields), |kind, value| Some(Named::new(kind, value)))
    }

    #[test]
    fn a_field_is_matched_by_its_name_and_its_parent() {
        let document =
            r#"{"id":"d","samples":[{"id":"s","voice_id":"v"}],"other":{"id":"x"},"voice_id":["w"]}"#;
        let expected = [(Kind::Dictionary, "d"), (Kind::Sample, "s"), (Kind::Voice, "v"), (Kind::Voice, "w")];
        assert_eq!(identifiers_in(document), expected.map(|(kind, value)| Named::new(kind, value)));
    }

    #[test]
    fn values_are_examined_up_to_a_maximum() {
        for (before, is_examined) in [(MAX_VALUES - 3, true), (MAX_VALUES - 2, false), (300_000, false)] {
            let empty = vec![r#""""#; before].join(",");
            let document = format!(r#"{{"a":[{empty}],"voice_id":"v"}}"#);
            assert_eq!(identifiers_in(&document).len(), usize::from(is_examined), "{before}");
        }
    }

    #[test]
    fn identifiers_are_found_up_to_a_maximum() {
        let many = vec![r#"{"voice_id":"v"}"#; MAX_IDENTIFIERS + 10].join(",");
        assert_eq!(identifiers_in(&format!("[{many}]")).len(), MAX_IDENTIFIERS);
    }
}
