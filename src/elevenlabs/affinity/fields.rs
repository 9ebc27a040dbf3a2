//! Finds identifiers in a JSON document by the names of its fields and of the fields that contain them. The streaming
//! parser builds no tree, keeps only the hashes of the identifiers, and limits the number of values and of identifiers.
//! The identifiers of a premade resource are omitted, because every account has it.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};

use super::kind::{Identifier, ResourceKind};

/// The name of a JSON field, and the kind of identifier in it. `name` matches the field at any position, `parent.name`
/// only directly in the field `parent` or in its lists, and `.name` only in the outermost object.
pub(super) type IdentifierField = (&'static str, ResourceKind);

/// Maximum length of an identifier. The longest identifiers are signed URLs and tokens, which are shorter. A longer
/// string is not an identifier.
const MAX_IDENTIFIER_BYTES: usize = 4 * 1024;

/// Maximum number of values that are examined in one document. A mebibyte of the provider's responses contains about
/// 40,000 values. A mebibyte of empty strings contains more than 300,000 values, whose examination would block a worker
/// thread.
const MAX_VALUES: usize = 65_536;

/// Maximum number of identifiers in one document. The provider's largest pages contain a thousand resources with a few
/// identifiers each.
const MAX_IDENTIFIERS: usize = 4_096;

/// The fields that contain identifiers, indexed by name.
#[derive(Clone, Debug, Default)]
pub(super) struct IdentifierFields {
    /// The rules, sorted by name. Rules with the same name are in the order of the table.
    rules: Vec<FieldRule>,
    /// A bit for the length of each name. The highest bit is for all longer names. Most names in a document have
    /// another length, so they need no search.
    name_lengths: u64,
}

/// A field that contains identifiers.
#[derive(Clone, Copy, Debug)]
struct FieldRule {
    name: &'static str,
    /// The name of the field that contains this field, or `None` for any field. The name is empty for the outermost
    /// object.
    parent: Option<&'static str>,
    kind: ResourceKind,
}

impl IdentifierFields {
    pub(super) fn new(fields: impl IntoIterator<Item = IdentifierField>) -> Self {
        let rule = |(field, kind): IdentifierField| match field.split_once('.') {
            Some((parent, name)) => FieldRule { name, parent: Some(parent), kind },
            None => FieldRule { name: field, parent: None, kind },
        };
        let mut rules: Vec<FieldRule> = fields.into_iter().map(rule).collect();
        rules.sort_by_key(|rule| rule.name);
        let name_lengths = rules.iter().fold(0, |bits, rule| bits | length_bit(rule.name));
        Self { rules, name_lengths }
    }

    /// Returns the kind of identifier in the field `name` of the field `parent`, or `None` if it contains
    /// no identifier.
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

/// Returns the identifiers in the given `fields` of a document, in document order. `identify` hashes an identifier of a
/// kind, or returns `None` to exclude it. The search ends at a syntax error, such as the end of a truncated document,
/// and at [`MAX_VALUES`] values or [`MAX_IDENTIFIERS`] identifiers. The identifiers before that position are returned.
pub(super) fn find_identifiers(
    document: &[u8],
    fields: &IdentifierFields,
    mut identify: impl FnMut(ResourceKind, &str) -> Option<Identifier>,
) -> Vec<Identifier> {
    let mut search = IdentifierSearch {
        fields,
        identifiers: Vec::new(),
        remaining_values: MAX_VALUES,
        identify: &mut identify,
    };
    let mut deserializer = serde_json::Deserializer::from_slice(document);
    let position = FieldPosition { search: &mut search, parent: "", name: "", kind: None };
    // The identifiers before an error are returned, so the error is ignored.
    let _ = position.deserialize(&mut deserializer);
    search.identifiers
}

/// The fields and the progress of a search.
struct IdentifierSearch<'a> {
    fields: &'a IdentifierFields,
    identifiers: Vec<Identifier>,
    remaining_values: usize,
    identify: &'a mut dyn FnMut(ResourceKind, &str) -> Option<Identifier>,
}

/// The position of a value in a document. Its visitor returns whether the value marks the containing object
/// as premade, which means that every account has it.
struct FieldPosition<'a, 'b, 'n> {
    search: &'a mut IdentifierSearch<'b>,
    /// The name of the field that contains the field of the value.
    parent: &'n str,
    /// The name of the field of the value.
    name: &'n str,
    /// The kind of identifier in the field, or `None` if the field contains no identifier.
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
        let identifiers_before = self.search.identifiers.len();
        let mut is_premade = false;
        while let Some(FieldName(name)) = map.next_key()? {
            let kind = self.search.fields.kind(self.name, &name);
            let field = FieldPosition { search: &mut *self.search, parent: self.name, name: &name, kind };
            is_premade |= map.next_value_seed(field)?;
        }
        // A premade resource has no owner, because every account has it.
        if is_premade {
            self.search.identifiers.truncate(identifiers_before);
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
        find_identifiers(document.as_bytes(), &IdentifierFields::new(fields), |kind, value| {
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
            assert_eq!(
                identifiers_in(&document).len(),
                usize::from(is_examined),
                "a field after {before} values must be examined only within the maximum"
            );
        }
    }

    #[test]
    fn identifiers_are_found_up_to_a_maximum() {
        let objects = vec![r#"{"voice_id":"v"}"#; MAX_IDENTIFIERS + 10].join(",");
        assert_eq!(identifiers_in(&format!("[{objects}]")).len(), MAX_IDENTIFIERS);
    }
}
