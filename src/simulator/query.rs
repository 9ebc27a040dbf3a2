//! Parses the query of a URL into names and values, and decodes their percent escapes and plus signs.

/// Returns the decoded names and values of a query.
pub(super) fn query_pairs(query: &str) -> impl Iterator<Item = (String, String)> {
    query.split('&').filter(|pair| !pair.is_empty()).map(|pair| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        (form_decode(name), form_decode(value))
    })
}

/// Returns the first value of a query parameter, or `None` if the query does not contain the parameter.
pub(super) fn query_value(query: &str, parameter: &str) -> Option<String> {
    query_pairs(query).find(|(name, _)| name == parameter).map(|(_, value)| value)
}

/// Decodes percent escapes and plus signs, as in HTML forms. An invalid escape stays unchanged. Bytes that are not
/// valid UTF-8 become replacement characters.
pub(super) fn form_decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut remaining = text.as_bytes();
    while let Some((first, after)) = remaining.split_first() {
        remaining = after;
        match (first, parse_hex_pair(after)) {
            (b'%', Some(byte)) => {
                bytes.push(byte);
                remaining = &after[2..];
            }
            (b'+', _) => bytes.push(b' '),
            _ => bytes.push(*first),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Returns the byte that the first two characters encode, or `None` if they are not hexadecimal digits.
fn parse_hex_pair(bytes: &[u8]) -> Option<u8> {
    let high = char::from(*bytes.first()?).to_digit(16)?;
    let low = char::from(*bytes.get(1)?).to_digit(16)?;
    u8::try_from(high * 16 + low).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_decoded_and_invalid_escapes_are_kept() {
        let pairs: Vec<_> = query_pairs("a=1&%78i%5Fapi_key=s+p&b&c=%zz&d=%4&e=100%").collect();
        let expected =
            [("a", "1"), ("xi_api_key", "s p"), ("b", ""), ("c", "%zz"), ("d", "%4"), ("e", "100%")];
        assert_eq!(pairs, expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
    }
}
