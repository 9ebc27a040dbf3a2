//! Converts the values in replies of scripts to Rust types. A value of an unexpected shape is an error and never a
//! panic.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "the client library may add variants, and no script returns such values"
)]

use redis::Value;

/// The error for a reply of a shape that no script of this version returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("Redis returned a reply of an unexpected shape")]
pub(super) struct UnexpectedReply;

/// Returns the elements of a list. A missing value is an empty list.
pub(super) fn parse_list(value: &Value) -> Result<&[Value], UnexpectedReply> {
    match value {
        Value::Array(elements) | Value::Set(elements) => Ok(elements),
        Value::Nil => Ok(&[]),
        _ => Err(UnexpectedReply),
    }
}

/// Returns the elements of several lists.
pub(super) fn flatten_lists(values: &[Value]) -> Result<Vec<&Value>, UnexpectedReply> {
    let mut elements = Vec::new();
    for value in values {
        elements.extend(parse_list(value)?);
    }
    Ok(elements)
}

/// Returns an integer. Scripts may also return an integer as text.
pub(super) fn parse_integer(value: &Value) -> Result<i64, UnexpectedReply> {
    match value {
        Value::Int(number) => Ok(*number),
        Value::BulkString(_) | Value::SimpleString(_) => {
            parse_text(value)?.parse().map_err(|_| UnexpectedReply)
        }
        _ => Err(UnexpectedReply),
    }
}

/// Returns an integer that is not negative.
pub(super) fn parse_amount(value: &Value) -> Result<u64, UnexpectedReply> {
    u64::try_from(parse_integer(value)?).map_err(|_| UnexpectedReply)
}

/// Returns a text, which must be valid UTF-8.
pub(super) fn parse_text(value: &Value) -> Result<&str, UnexpectedReply> {
    match value {
        Value::BulkString(bytes) => std::str::from_utf8(bytes).map_err(|_| UnexpectedReply),
        Value::SimpleString(text) => Ok(text),
        _ => Err(UnexpectedReply),
    }
}

/// Returns the first `N` elements of a list that has at least `N` elements. A later version of a script may append
/// elements.
pub(super) fn parse_tuple<const N: usize>(value: &Value) -> Result<&[Value; N], UnexpectedReply> {
    parse_list(value)?.first_chunk().ok_or(UnexpectedReply)
}

/// Returns the fields and values of a hash.
pub(super) fn parse_fields(value: &Value) -> Result<Vec<(&str, &str)>, UnexpectedReply> {
    match value {
        Value::Map(pairs) => {
            pairs.iter().map(|(field, value)| Ok((parse_text(field)?, parse_text(value)?))).collect()
        }
        _ => parse_list(value)?
            .chunks_exact(2)
            .map(|pair| Ok((parse_text(&pair[0])?, parse_text(&pair[1])?)))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bulk_string(text: &str) -> Value {
        Value::BulkString(text.as_bytes().to_vec())
    }

    #[test]
    fn values_of_the_expected_shape_are_parsed() {
        assert_eq!(parse_integer(&bulk_string("-7")), Ok(-7));
        assert_eq!(parse_amount(&Value::Int(7)), Ok(7));
        let pair = Value::Array(vec![bulk_string("a"), bulk_string("b"), Value::Int(1)]);
        assert_eq!(parse_tuple::<2>(&pair).unwrap()[1], bulk_string("b"));
        for hash in [
            Value::Array(vec![bulk_string("field"), bulk_string("value")]),
            Value::Map(vec![(bulk_string("field"), bulk_string("value"))]),
        ] {
            assert_eq!(parse_fields(&hash), Ok(vec![("field", "value")]));
        }
        assert_eq!(parse_fields(&Value::Nil), Ok(Vec::new()));
    }

    #[test]
    fn other_shapes_are_errors() {
        let invalid = Value::BulkString(vec![0xff]);
        assert_eq!(parse_text(&invalid), Err(UnexpectedReply));
        assert_eq!(parse_integer(&bulk_string("seven")), Err(UnexpectedReply));
        assert_eq!(parse_amount(&Value::Int(-1)), Err(UnexpectedReply));
        assert_eq!(parse_tuple::<2>(&Value::Array(vec![Value::Nil])).unwrap_err(), UnexpectedReply);
        assert_eq!(parse_list(&Value::Int(1)), Err(UnexpectedReply));
    }
}
