//! Finds identifiers in a JSON document with a streaming parser, which builds no tree and keeps only the
//! hashes of the identifiers.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};

use super::kind::{Identifier, ResourceKind};

/// The name of a JSON field, and the kind of identifier in it. `name` matches the field anywhere,
/// `parent.name` directly in `parent` (list levels are ignored), `.name` in the document itself.
pub(super) type Field = (&'static str, ResourceKind);

/// Maximum length of an identifier. The longest identifiers are signed URLs and tokens.
const MAX_IDENTIFIER_BYTES: usize = 4 * 1024;

/// Maximum number of values examined in one document. A mebibyte of the provider's responses contains about
/// 40,000 values. A mebibyte of empty strings contains more than 300,000, which would block a worker.
const MAX_VALUES: usize = 65_536;

/// Maximum number of identifiers in one document. The provider's largest pages contain a thousand entries
/// with a few identifiers each.
const MAX_IDENTIFIERS: usize = 4_096;

/// The fields that contain identifiers, indexed by name.
#[derive(Clone, Debug, Default)]
pub(super) struct Fields {
    /// Sorted by name; fields with the same name are in the order of the table.
    rules: Vec<FieldRule>,
    /// A bit for the length of each name. The highest bit covers all longer names. The bits rule out most
    /// names of a document without a search.
    name_lengths: u64,
}

#[derive(Clone, Copy, Debug)]
struct FieldRule {
    name: &'static str,
    /// The name of the containing field, or `None` for any.
    parent: Option<&'static str>,
    kind: ResourceKind,
}

impl Fields {
    pub(super) fn new(fields: impl IntoIterator<Item = Field>) -> Self {
        let rule = |(field, kind): Field| match field.split_once('.') {
            Some((parent, name)) => FieldRule { name, parent: Some(parent), kind },
            None => FieldRule { name: field, parent: None, kind },
        };
        let mut rules: Vec<FieldRule> = fields.into_iter().map(rule).collect();
        rules.sort_by_key(|rule| rule.name);
        let name_lengths = rules.iter().fold(0, |bits, rule| bits | length_bit(rule.name));
        Self { rules, name_lengths }
    }

    /// Returns the kind of identifier in the field `name` of the field `parent`.
    fn kind(&self, parent: &str, name: &str) -> Option<ResourceKind> {
        if self.name_lengths & length_bit(name) == 0 {
            return None;
        }
        let first = self.rules.partition_point(|rule| rule.name < name);
        let mut same_name = self.rules.get(first..)?.iter().take_while(|rule| rule.name == name);
        same_name.find(|rule| rule.parent.is_none_or(|required| required == parent)).map(|rule| rule.kind)
    }
}

fn length_bit(name: &str) -> u64 {
    1 << name.len().min(63)
}

/// Returns the identifiers in the given `fields` of a document, in document order. `identify` hashes an identifier
/// of a kind, or returns `None` to exclude it. A truncated document yields the identifiers before the
/// truncation. A document with more than [`MAX_VALUES`] values or [`MAX_IDENTIFIERS`] identifiers yields the
/// identifiers before the limit.
pub(super) fn find_identifiers(
    document: &[u8],
    fields: &Fields,
    mut identify: impl FnMut(ResourceKind, &str) -> Option<Identifier>,
) -> Vec<Identifier> {
    let mut search =
        Search { fields, identifiers: Vec::new(), remaining_values: MAX_VALUES, identify: &mut identify };
    let mut deserializer = serde_json::Deserializer::from_slice(document);
    let position = FieldPosition { search: &mut search, parent: "", name: "", kind: None };
    // The identifiers before a syntax error count, so the error is ignored.
    let _ = position.deserialize(&mut deserializer);
    search.identifiers
}

struct Search<'a> {
    fields: &'a Fields,
    identifiers: Vec<Identifier>,
    remaining_values: usize,
    identify: &'a mut dyn FnMut(ResourceKind, &str) -> Option<Identifier>,
}

/// The position of a value in a document. Its visitor returns whether the value marks the containing object
/// as premade, which means that every account has it.
struct FieldPosition<'a, 'b, 'n> {
    search: &'a mut Search<'b>,
    /// The name of the field that contains the field of the value.
    parent: &'n str,
    /// The name of the field of the value.
    name: &'n str,
    /// The kind of identifier in the field.
    kind: Option<ResourceKind>,
}

impl<'de> DeserializeSeed<'de> for FieldPosition<'_, '_, '_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        if self.search.remaining_values == 0 || self.search.identifiers.len() >= MAX_IDENTIFIERS {
            return Err(D::Error::custom("the limits of the search are reached"));
        }
        self.search.remaining_values -= 1;
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for FieldPosition<'_, '_, '_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_str<E>(self, text: &str) -> Result<bool, E> {
        if let Some(kind) = self.kind
            && !text.is_empty()
            && text.len() <= MAX_IDENTIFIER_BYTES
            && let Some(identifier) = (self.search.identify)(kind, text)
        {
            self.search.identifiers.push(identifier);
        }
        Ok(text == "premade" && self.name == "category")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<bool, A::Error> {
        let Self { search, parent, name, kind } = self;
        while seq.next_element_seed(FieldPosition { search: &mut *search, parent, name, kind })?.is_some() {}
        Ok(false)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<bool, A::Error> {
        let count_before = self.search.identifiers.len();
        let mut is_premade = false;
        while let Some(FieldName(name)) = map.next_key()? {
            let kind = self.search.fields.kind(self.name, &name);
            let field = FieldPosition { search: &mut *self.search, parent: self.name, name: &name, kind };
            is_premade |= map.next_value_seed(field)?;
        }
        // A premade resource has no owner, because every account has it.
        if is_premade {
            self.search.identifiers.truncate(count_before);
        }
        Ok(false)
    }

    fn visit_bool<E>(self, _: bool) -> Result<bool, E> {
        Ok(false)
    }

    fn visit_i64<E>(self, _: i64) -> Result<bool, E> {
        Ok(false)
    }

    fn visit_u64<E>(self, _: u64) -> Result<bool, E> {
        Ok(false)
    }

    fn visit_f64<E>(self, _: f64) -> Result<bool, E> {
        Ok(false)
    }

    fn visit_unit<E>(self) -> Result<bool, E> {
        Ok(false)
    }
}

/// The name of a field, borrowed from the document unless it has escapes.
#[derive(Deserialize)]
struct FieldName<'a>(#[serde(borrow)] Cow<'a, str>);

#[cfg(test)]
mod tests {
    use super::*;

    fn identifiers_in(document: &str) -> Vec<Identifier> {
        let fields = [
            ("voice_id", ResourceKind::Voice),
            ("samples.id", ResourceKind::Sample),
            (".id", ResourceKind::Dictionary),
        ];
        find_identifiers(document.as_bytes(), &Fields::new(fields), |kind, value| {
            Some(Identifier::new(kind, value))
        })
    }

    #[test]
    fn a_field_is_matched_by_its_name_and_its_parent() {
        let document =
            r#"{"id":"d","samples":[{"id":"s","voice_id":"v"}],"other":{"id":"x"},"voice_id":["w"]}"#;
        let expected = [
            (ResourceKind::Dictionary, "d"),
            (ResourceKind::Sample, "s"),
            (ResourceKind::Voice, "v"),
            (ResourceKind::Voice, "w"),
        ];
        assert_eq!(identifiers_in(document), expected.map(|(kind, value)| Identifier::new(kind, value)));
    }

    #[test]
    fn values_are_examined_up_to_a_maximum() {
        for (before, is_examined) in [(MAX_VALUES - 3, true), (MAX_VALUES - 2, false), (300_000, false)] {
            let empty_strings = vec![r#""""#; before].join(",");
            let document = format!(r#"{{"a":[{empty_strings}],"voice_id":"v"}}"#);
            assert_eq!(identifiers_in(&document).len(), usize::from(is_examined), "{before}");
        }
    }

    #[test]
    fn identifiers_are_found_up_to_a_maximum() {
        let many = vec![r#"{"voice_id":"v"}"#; MAX_IDENTIFIERS + 10].join(",");
        assert_eq!(identifiers_in(&format!("[{many}]")).len(), MAX_IDENTIFIERS);
    }
}
