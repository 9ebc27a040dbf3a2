//! Identifiers in a JSON document, found while it is read: no tree is built, and no text is kept
//! but what an identifier is hashed from.

use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use std::borrow::Cow;
use std::fmt;

use super::kind::{Kind, Named};

/// A field and what it names. `name` is a field anywhere, `parent.name` one directly in `parent`
/// (lists count for nothing), `.name` one of the document itself.
pub(super) type Field = (&'static str, Kind);

/// Longer texts are no identifiers; the longest are signed URLs and tokens.
const IDENTIFIER_BYTES_MAX: usize = 4 * 1024;

/// What a document says in these fields, in its order; `named` is told kind and identifier, and says
/// what stands for it. A document that breaks off says what stood before.
pub(super) fn find(
    document: &[u8],
    fields: &[Field],
    mut named: impl FnMut(Kind, &str) -> Option<Named>,
) -> Vec<Named> {
    let mut search = Search { fields, found: Vec::new(), named: &mut named };
    let mut reader = serde_json::Deserializer::from_slice(document);
    let place = Place { search: &mut search, parent: "", name: "" };
    // What was found in a broken document is as good as in a whole one.
    let _ = place.deserialize(&mut reader);
    search.found
}

struct Search<'a> {
    fields: &'a [Field],
    found: Vec<Named>,
    /// What stands for an identifier of a kind.
    named: &'a mut dyn FnMut(Kind, &str) -> Option<Named>,
}

impl Search<'_> {
    fn kind_of(&self, parent: &str, name: &str) -> Option<Kind> {
        let is_it = |field: &str| match field.split_once('.') {
            Some((above, last)) => last == name && above == parent,
            None => field == name,
        };
        self.fields.iter().find(|(field, _)| is_it(field)).map(|(_, kind)| *kind)
    }
}

/// A value within a document: the field it stands in, and the field around that.
struct Place<'a, 'b, 'n> {
    search: &'a mut Search<'b>,
    parent: &'n str,
    name: &'n str,
}

impl<'de> DeserializeSeed<'de> for Place<'_, '_, '_> {
    type Value = Premade;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Premade, D::Error> {
        deserializer.deserialize_any(self)
    }
}

/// Whether a value is the word for what every account has.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Premade(bool);

const NOT: Premade = Premade(false);

impl<'de> Visitor<'de> for Place<'_, '_, '_> {
    type Value = Premade;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("anything")
    }

    fn visit_str<E>(self, text: &str) -> Result<Premade, E> {
        if !text.is_empty()
            && text.len() <= IDENTIFIER_BYTES_MAX
            && let Some(kind) = self.search.kind_of(self.parent, self.name)
            && let Some(named) = (self.search.named)(kind, text)
        {
            self.search.found.push(named);
        }
        Ok(Premade(self.name == "category" && text == "premade"))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Premade, A::Error> {
        let Self { search, parent, name } = self;
        while seq.next_element_seed(Place { search: &mut *search, parent, name })?.is_some() {}
        Ok(NOT)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Premade, A::Error> {
        let before = self.search.found.len();
        let mut is_premade = false;
        while let Some(key) = map.next_key::<Key<'_>>()? {
            let inner = Place { search: &mut *self.search, parent: self.name, name: &key.0 };
            is_premade |= map.next_value_seed(inner)?.0;
        }
        // Every account has it: it is nobody's.
        if is_premade {
            self.search.found.truncate(before);
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

/// The name of a field, borrowed where it can be.
struct Key<'de>(Cow<'de, str>);

impl<'de> serde::Deserialize<'de> for Key<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Names;
        impl<'de> Visitor<'de> for Names {
            type Value = Key<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a name")
            }

            fn visit_borrowed_str<E>(self, name: &'de str) -> Result<Key<'de>, E> {
                Ok(Key(Cow::Borrowed(name)))
            }

            fn visit_str<E>(self, name: &str) -> Result<Key<'de>, E> {
                Ok(Key(Cow::Owned(name.to_owned())))
            }
        }
        deserializer.deserialize_str(Names)
    }
}
