//! Masks text of the configuration in messages, because an operator may have pasted a key into the
//! wrong setting.

use super::{old_names, setting};

/// The text that replaces a possible secret.
const MASK: &str = "***";

/// Lines of a file whose name or value contains one of these words are masked.
const SECRET_WORDS: [&str; 7] = ["key", "token", "secret", "pass", "cred", "auth", "bearer"];

/// Maximum number of characters of a quoted value in a message.
const MAX_QUOTED_CHARS: usize = 60;

/// Formats `text` in backticks, masked if it may contain a secret.
pub(super) fn quote_masked(text: &str) -> String {
    if looks_like_secret(text) || text.contains('@') {
        return format!("`{MASK}`");
    }
    let mut quoted: String = text.chars().take(MAX_QUOTED_CHARS).flat_map(char::escape_debug).collect();
    if text.chars().count() > MAX_QUOTED_CHARS {
        quoted.push('…');
    }
    format!("`{quoted}`")
}

/// Minimum number of consecutive letters, digits and underscores, with a digit among them, that may be a secret.
const MIN_SECRET_CHARS: usize = 20;

/// Returns whether `text` may contain a secret: `sk_…`, or at least [`MIN_SECRET_CHARS`] consecutive characters of a
/// key.
pub(super) fn looks_like_secret(text: &str) -> bool {
    let is_key_character = |character: char| character.is_ascii_alphanumeric() || character == '_';
    text.split(|character| !is_key_character(character)).any(|word| {
        word.get(..3).is_some_and(|prefix| prefix.eq_ignore_ascii_case("sk_"))
            || (word.len() >= MIN_SECRET_CHARS && word.bytes().any(|byte| byte.is_ascii_digit()))
    })
}

/// Masks a line of a TOML file. `section` is the name in the preceding header, as [`find_section`] returns it.
///
/// Section headers are shown, and so are lines of known sections without a possible secret. Of any
/// other line, only the name is shown. A line without `=`, or whose name looks like a secret, is masked
/// completely.
pub(super) fn mask_line(line: &str, section: Option<&str>) -> String {
    let line = line.trim_end();
    if looks_like_secret(line.split('=').next().unwrap_or_default()) {
        return MASK.to_owned();
    }
    if let Some(header) = header_name(line) {
        let is_section_header = !header.contains(['"', '\'', '=', ',', '{']);
        return if is_section_header { line.to_owned() } else { MASK.to_owned() };
    }
    let Some((name, value)) = line.split_once('=') else {
        return if line.trim().is_empty() { String::new() } else { MASK.to_owned() };
    };
    // Before the first header, a name contains its section: `server.listen = …`, `server = { … }`.
    let section = section.unwrap_or_else(|| name.split('.').next().unwrap_or_default().trim());
    let is_section = setting::is_section(section) || old_names::new_section(section).is_some();
    let can_be_shown = is_section
        && !has_secret_word(name)
        // A proxy and Redis may have a password, even in a URL that cannot be parsed.
        && !name.contains("proxy")
        && !(section == "redis" && (name.contains("url") || value.contains(':')))
        && !has_secret_word(value)
        && !looks_like_secret(value)
        && !value.contains('@');
    if can_be_shown { line.to_owned() } else { format!("{name}= {MASK}") }
}

/// Finds the name in the last header before the byte `line_start`, or `None` before the first header.
pub(super) fn find_section(text: &str, line_start: usize) -> Option<&str> {
    text.get(..line_start)?.lines().rev().find_map(header_name)
}

/// Returns the name in a header such as `[server]` or `[[keys]]`, or `None` for any other line.
fn header_name(line: &str) -> Option<&str> {
    let inner = line.trim().strip_prefix('[')?;
    let inner = inner.split('#').next().unwrap_or_default();
    Some(inner.trim_start_matches('[').trim_end().trim_end_matches(']').trim())
}

fn has_secret_word(text: &str) -> bool {
    let lowercase = text.to_ascii_lowercase();
    SECRET_WORDS.iter().any(|word| lowercase.contains(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks the masked form of the last line of `text`.
    #[track_caller]
    fn check_last_line(text: &str, expected: &str) {
        let start = text.rfind('\n').map_or(0, |newline| newline + 1);
        assert_eq!(mask_line(&text[start..], find_section(text, start)), expected);
    }

    #[test]
    fn settings_are_shown() {
        check_last_line("[pool]\nstrateggy = \"fill-first\"", "strateggy = \"fill-first\"");
        check_last_line("[ server ] # here\nlisten = 3", "listen = 3");
        check_last_line("server.listen = 3", "server.listen = 3");
        check_last_line("server = { listen = 3 }", "server = { listen = 3 }");
        check_last_line("[polo]", "[polo]");
    }

    #[test]
    fn values_outside_known_sections_are_masked() {
        check_last_line("anything = \"hunter2\"", "anything = ***");
        check_last_line("[[keys]]\nname = \"hunter2\"", "name = ***");
        check_last_line("[[clinets]]\ntokn = \"hunter2", "tokn = ***");
        check_last_line("clients = [ { token = \"hunter2\" } ]", "clients = ***");
        check_last_line("[[clients]]\n\"hunter2\"", "***");
    }

    #[test]
    fn a_possible_secret_is_masked_in_every_section() {
        check_last_line("[pool]\napi_key = \"hunter2\"", "api_key = ***");
        check_last_line("[pool]\nstrategy = \"sk_12\"", "strategy = ***");
        check_last_line("[pool]\nstrategy = \"0123456789abcdef0123\"", "strategy = ***");
        check_last_line("[upstream]\nbase_url = \"https://user:hunter2@host\"", "base_url = ***");
        check_last_line("[upstream]\nproxy = \"user:hunter2\"", "proxy = ***");
        check_last_line("[redis]\nurl = \"redis://user:hunter2\"", "url = ***");
        check_last_line("[redis]\npool = \"redis://user:hunter2\"", "pool = ***");
        check_last_line("[redis]\npool = \"Studio\"", "pool = \"Studio\"");
        check_last_line("redis.url = \"redis://user:hunter2\"", "redis.url = ***");
        check_last_line("[pool]\nsk_12 = 3", "***");
        check_last_line("[\"sk_12\"]", "***");
    }

    #[test]
    fn a_quoted_value_is_masked_escaped_and_truncated() {
        assert_eq!(quote_masked("fil-first"), "`fil-first`");
        assert_eq!(quote_masked("a\nb"), "`a\\nb`");
        assert_eq!(quote_masked("desk_lamp"), "`desk_lamp`");
        assert_eq!(quote_masked("sk_12"), "`***`");
        assert_eq!(quote_masked("x SK_12"), "`***`");
        assert_eq!(quote_masked("https://a:b@host"), "`***`");
        assert_eq!(quote_masked(&"ab ".repeat(30)).chars().count(), 63);
    }

    #[test]
    fn twenty_characters_with_a_digit_look_like_a_secret() {
        assert!(looks_like_secret("0bcdefghijklmnopqrst"));
        assert!(!looks_like_secret("0bcdefghijklmnopqrs"));
        assert!(!looks_like_secret("abcdefghijklmnopqrst"));
    }
}
