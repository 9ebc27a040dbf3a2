//! Masks configuration text in messages. A message shows only harmless text, because an operator
//! may have pasted a key into the wrong setting.

use super::{renamed, setting};

const MASK: &str = "***";

/// Names and values that contain one of these words count as secrets.
const SECRET_WORDS: [&str; 7] = ["key", "token", "secret", "pass", "cred", "auth", "bearer"];

/// Maximum characters of a value that a message shows.
const MAX_SHOWN_CHARS: usize = 60;

/// Formats `text` in backticks, or masks it.
pub(super) fn shown(text: &str) -> String {
    if looks_secret(text) || text.contains('@') {
        return format!("`{MASK}`");
    }
    let mut shown: String = text.chars().take(MAX_SHOWN_CHARS).flat_map(char::escape_debug).collect();
    if text.chars().count() > MAX_SHOWN_CHARS {
        shown.push('…');
    }
    format!("`{shown}`")
}

/// Whether `text` contains a possible key: `sk_…`, or at least 20 letters, digits or
/// underscores in a row, with a digit.
pub(super) fn looks_secret(text: &str) -> bool {
    let is_word = |character: char| character.is_ascii_alphanumeric() || character == '_';
    text.split(|character| !is_word(character)).any(|run| {
        run.get(..3).is_some_and(|head| head.eq_ignore_ascii_case("sk_"))
            || (run.len() >= 20 && run.bytes().any(|byte| byte.is_ascii_digit()))
    })
}

/// Masks a line of a TOML file. `section` is the preceding header, see [`section_at`].
///
/// Section headers are shown, and in known sections also names with harmless values. Otherwise only the
/// name is shown; a line without `=`, or whose name looks like a secret, is masked as a whole.
pub(super) fn line(line: &str, section: Option<&str>) -> String {
    let line = line.trim_end();
    if looks_secret(line.split('=').next().unwrap_or_default()) {
        return MASK.to_owned();
    }
    if let Some(header) = header_name(line) {
        let is_plain = !header.contains(['"', '\'', '=', ',', '{']);
        return if is_plain { line.to_owned() } else { MASK.to_owned() };
    }
    let Some((name, value)) = line.split_once('=') else {
        return if line.trim().is_empty() { String::new() } else { MASK.to_owned() };
    };
    // Before the first header, a name contains its section: `server.listen = …`, `server = { … }`.
    let section = section.unwrap_or_else(|| name.split('.').next().unwrap_or_default().trim());
    let is_section = setting::is_section(section) || renamed::section(section).is_some();
    let is_harmless = is_section
        && !has_secret_word(name)
        && !has_secret_word(value)
        && !looks_secret(value)
        && !value.contains('@');
    if is_harmless { line.to_owned() } else { format!("{name}= {MASK}") }
}

/// The name in the last header before the byte `line_start`; `None` before the first header.
pub(super) fn section_at(text: &str, line_start: usize) -> Option<&str> {
    text.get(..line_start)?.lines().rev().find_map(header_name)
}

fn header_name(line: &str) -> Option<&str> {
    let inner = line.trim().strip_prefix('[')?;
    let inner = inner.split('#').next().unwrap_or_default();
    Some(inner.trim_start_matches('[').trim_end().trim_end_matches(']').trim())
}

fn has_secret_word(text: &str) -> bool {
    let lower = text.to_ascii_lowercase();
    SECRET_WORDS.iter().any(|word| lower.contains(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks the masked form of the last line of `text`.
    #[track_caller]
    fn check(text: &str, expected: &str) {
        let start = text.rfind('\n').map_or(0, |newline| newline + 1);
        assert_eq!(line(&text[start..], section_at(text, start)), expected);
    }

    #[test]
    fn settings_are_shown() {
        check("[pool]\nstrateggy = \"fill-first\"", "strateggy = \"fill-first\"");
        check("[ server ] # here\nlisten = 3", "listen = 3");
        check("server.listen = 3", "server.listen = 3");
        check("server = { listen = 3 }", "server = { listen = 3 }");
        check("[polo]", "[polo]");
    }

    #[test]
    fn values_outside_known_sections_are_masked() {
        check("anything = \"hunter2\"", "anything = ***");
        check("[[keys]]\nname = \"hunter2\"", "name = ***");
        check("[[clinets]]\ntokn = \"hunter2", "tokn = ***");
        check("clients = [ { token = \"hunter2\" } ]", "clients = ***");
        check("[[clients]]\n\"hunter2\"", "***");
    }

    #[test]
    fn a_text_that_looks_like_a_secret_is_masked_everywhere() {
        check("[pool]\napi_key = \"hunter2\"", "api_key = ***");
        check("[pool]\nstrategy = \"sk_12\"", "strategy = ***");
        check("[pool]\nstrategy = \"0123456789abcdef0123\"", "strategy = ***");
        check("[upstream]\nbase_url = \"https://user:hunter2@host\"", "base_url = ***");
        check("[pool]\nsk_12 = 3", "***");
        check("[\"sk_12\"]", "***");
    }

    #[test]
    fn messages_echo_only_harmless_values() {
        assert_eq!(shown("fil-first"), "`fil-first`");
        assert_eq!(shown("a\nb"), "`a\\nb`");
        assert_eq!(shown("desk_lamp"), "`desk_lamp`");
        assert_eq!(shown("sk_12"), "`***`");
        assert_eq!(shown("x SK_12"), "`***`");
        assert_eq!(shown("https://a:b@host"), "`***`");
        assert_eq!(shown(&"ab ".repeat(30)).chars().count(), 63);
    }

    #[test]
    fn twenty_letters_with_a_digit_are_a_secret() {
        assert!(looks_secret("0bcdefghijklmnopqrst"));
        assert!(!looks_secret("0bcdefghijklmnopqrs"));
        assert!(!looks_secret("abcdefghijklmnopqrst"));
    }
}
