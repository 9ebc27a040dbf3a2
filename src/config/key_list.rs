//! Parses a list of keys from a variable or a file, and corrects common mistakes such as quotes and trailing commas.
//! Messages identify an entry by its position and its masked form, so that they contain no key.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use super::key_format::{self, KeyProvider, mask_key};
use super::problem::ValueError;
use crate::secret::{ApiKey, Fingerprint};

/// The source of a list, which determines the separators.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum KeyListFormat {
    /// Commas separate keys. Line breaks, spaces and semicolons between keys are accepted with a warning.
    Variable,
    /// Lines and commas separate keys. Spaces and semicolons between keys are accepted with a warning. A line that
    /// starts with `#` is a comment.
    File,
}

/// The keys of a list, and the messages about its mistakes.
#[derive(Debug, Default)]
pub(super) struct KeyList {
    /// The keys in their order, without duplicates.
    pub(super) keys: Vec<ApiKey>,
    /// Messages about corrected or unusual entries. Each is the rest of a sentence that begins with the source, such as
    /// `ends with a comma`.
    pub(super) corrections: Vec<String>,
    /// The errors of invalid entries.
    pub(super) errors: Vec<ValueError>,
}

/// The message about a list without keys.
pub(super) const NO_KEY: &str = "contains no key";

/// Parses a list of keys for `provider`. Positions count from 1 and include empty entries.
pub(super) fn parse(text: &str, format: KeyListFormat, provider: KeyProvider) -> KeyList {
    let mut parser = KeyListParser {
        provider,
        list: KeyList::default(),
        position: 0,
        first_positions: HashMap::new(),
        name_like_entries: Vec::new(),
        empty_positions: Vec::new(),
        ends_with_comma: false,
        has_quotes: false,
        has_line_breaks: false,
        has_other_separators: false,
    };
    match format {
        KeyListFormat::Variable => parser.parse_chunks(text.split(',')),
        KeyListFormat::File => {
            for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
            {
                parser.parse_chunks(line.split(','));
            }
        }
    }
    parser.finish()
}

/// The state of parsing: the parsed entries, and the facts about all entries for which [`KeyListParser::finish`] adds
/// one correction each.
struct KeyListParser {
    provider: KeyProvider,
    list: KeyList,
    /// The position of the last entry.
    position: usize,
    /// The position of the first entry with each key.
    first_positions: HashMap<Fingerprint, usize>,
    /// Entries that count as keys only if no other entry looks like a key, with their positions.
    name_like_entries: Vec<(usize, ApiKey)>,
    empty_positions: Vec<usize>,
    ends_with_comma: bool,
    has_quotes: bool,
    has_line_breaks: bool,
    has_other_separators: bool,
}

impl KeyListParser {
    /// Parses the chunks between commas.
    fn parse_chunks<'a>(&mut self, chunks: impl Iterator<Item = &'a str>) {
        let mut chunks = chunks.peekable();
        let mut is_first = true;
        while let Some(chunk) = chunks.next() {
            // A comma with only whitespace after it is a trailing comma and not an empty entry.
            if chunk.trim_matches(is_space_or_quote).is_empty() && chunks.peek().is_none() && !is_first {
                self.has_quotes |= chunk.contains(is_quote);
                self.ends_with_comma = true;
            } else {
                self.parse_chunk(chunk);
            }
            is_first = false;
        }
    }

    /// Parses the text between two commas, which contains one key or several keys that other characters separate.
    fn parse_chunk(&mut self, chunk: &str) {
        let chunk = chunk.trim_matches(is_space);
        let words = chunk.split(|character| is_space(character) || character == ';');
        let unquoted_words = words.map(|word| {
            let unquoted_word = word.trim_matches(is_quote);
            self.has_quotes |= unquoted_word.len() < word.len();
            unquoted_word
        });
        let words: Vec<&str> = unquoted_words.filter(|word| !word.is_empty()).collect();
        match words.as_slice() {
            [] => {
                self.position += 1;
                self.empty_positions.push(self.position);
            }
            [word] => self.add_key(word),
            words if words.iter().all(|word| key_format::looks_like_key(word)) => {
                words.iter().for_each(|word| self.add_key(word));
                self.has_line_breaks |= chunk.contains(['\n', '\r']);
                self.has_other_separators |= chunk.contains(|character| {
                    (is_space(character) && !"\r\n".contains(character)) || character == ';'
                });
            }
            words => {
                self.position += 1;
                self.reject_entry(&words.join(" "), key_format::multiple_words_error(words));
            }
        }
    }

    /// Adds the error for the last entry, whose text is `text`.
    fn reject_entry(&mut self, text: &str, error: ValueError) {
        let entry = format!("entry {} ({})", self.position, mask_key(text));
        self.list.errors.push(error.about(entry));
    }

    fn add_key(&mut self, text: &str) {
        self.position += 1;
        let position = self.position;
        // Without this check, the provider would refuse the text with a less specific error.
        if let Err(error) = key_format::check_key(text, self.provider) {
            return self.reject_entry(text, error);
        }
        let key = match ApiKey::new(text) {
            Ok(key) => key,
            Err(error) => {
                let message = format!("entry {position}: {error}");
                return self.list.errors.push(ValueError::new(message));
            }
        };
        match self.first_positions.entry(key.fingerprint()) {
            Entry::Vacant(vacant) => {
                vacant.insert(position);
                if self.provider == KeyProvider::ElevenLabs && !key_format::is_known_format(text) {
                    self.list.corrections.push(format!(
                        "entry {position} ({}) has an unknown format (known keys of ElevenLabs have `sk_` and 48 \
                         hexadecimal digits, or 32 hexadecimal digits): it may be truncated or mistyped",
                        mask_key(text)
                    ));
                }
                if key_format::looks_like_name(text) {
                    self.name_like_entries.push((position, key.clone()));
                }
                self.list.keys.push(key);
            }
            Entry::Occupied(first) => {
                let (first, short) = (first.get(), key.short());
                self.list
                    .corrections
                    .push(format!("entry {position} is the same key as entry {first} ({short})"));
            }
        }
    }

    /// Rejects entries that look like names if other entries look like keys. Such an entry may be the name of a key or
    /// the title of a column.
    fn reject_names(&mut self) {
        if self.name_like_entries.len() == self.list.keys.len() {
            return;
        }
        for (position, key) in std::mem::take(&mut self.name_like_entries) {
            self.position = position;
            let error = ValueError::new("does not look like a key, but other entries do");
            self.reject_entry(key.expose(), error.advise("write only keys, without names"));
        }
    }

    /// Adds the corrections of the whole list, and returns it.
    fn finish(mut self) -> KeyList {
        self.reject_names();
        let corrections = &mut self.list.corrections;
        match self.empty_positions.as_slice() {
            [] => {}
            [position] => corrections.push(format!("entry {position} is empty")),
            positions => {
                let listed_positions =
                    positions.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
                corrections.push(format!("entries {listed_positions} are empty"));
            }
        }
        for (applies, correction) in [
            (self.ends_with_comma, "ends with a comma"),
            (self.has_quotes, "has quotes around keys"),
            (self.has_line_breaks, "has line breaks between keys, which count as commas"),
            (self.has_other_separators, "has spaces or semicolons between keys, which count as commas"),
        ] {
            if applies {
                corrections.push(correction.to_owned());
            }
        }
        if self.list.keys.is_empty() && self.list.errors.is_empty() {
            self.list.errors.push(ValueError::new(NO_KEY));
        }
        self.list
    }
}

/// Returns whether the character is whitespace, or an invisible character that copied text may contain.
fn is_space(character: char) -> bool {
    character.is_whitespace() || matches!(character, '\u{feff}' | '\u{200b}'..='\u{200d}')
}

fn is_quote(character: char) -> bool {
    "\"'`´“”„‟‘’‚‛«»‹›＂＇".contains(character)
}

fn is_space_or_quote(character: char) -> bool {
    is_space(character) || is_quote(character)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_variable(text: &str, keys: &[&str], corrections: &[&str]) {
        check_format(KeyListFormat::Variable, text, keys, corrections, &[]);
    }

    #[track_caller]
    fn check_file(text: &str, keys: &[&str], corrections: &[&str]) {
        check_format(KeyListFormat::File, text, keys, corrections, &[]);
    }

    #[track_caller]
    fn check_invalid(text: &str, invalid: &[&str]) {
        let list = parse(text, KeyListFormat::Variable, KeyProvider::Other);
        assert_eq!(error_messages(&list), invalid);
    }

    #[track_caller]
    fn check_format(
        format: KeyListFormat,
        text: &str,
        keys: &[&str],
        corrections: &[&str],
        invalid: &[&str],
    ) {
        let list = parse(text, format, KeyProvider::Other);
        assert_eq!(list.keys.iter().map(ApiKey::expose).collect::<Vec<_>>(), keys);
        assert_eq!(list.corrections, corrections);
        assert_eq!(error_messages(&list), invalid);
    }

    /// Returns the messages of the errors without their advice.
    fn error_messages(list: &KeyList) -> Vec<String> {
        let message = |error: &ValueError| error.to_string().split("; ").next().unwrap().to_owned();
        list.errors.iter().map(message).collect()
    }

    const QUOTES: &str = "has quotes around keys";

    #[test]
    fn commas_and_spaces_separate_keys() {
        check_variable("sk_key1,sk_key2, sk_key3", &["sk_key1", "sk_key2", "sk_key3"], &[]);
        check_variable("  sk_a ,\tsk_b  ", &["sk_a", "sk_b"], &[]);
        check_variable("sk_a", &["sk_a"], &[]);
    }

    #[test]
    fn quotes_around_all_keys_or_each_key_are_removed() {
        check_variable("\"sk_a,sk_b\"", &["sk_a", "sk_b"], &[QUOTES]);
        check_variable("'sk_a', \"sk_b\"", &["sk_a", "sk_b"], &[QUOTES]);
        check_variable("“sk_a”,” sk_b ”", &["sk_a", "sk_b"], &[QUOTES]);
        check_variable("\"sk_a", &["sk_a"], &[QUOTES]);
        check_variable("\"sk_a,\"", &["sk_a"], &["ends with a comma", QUOTES]);
    }

    #[test]
    fn a_trailing_comma_is_not_an_empty_entry() {
        check_variable("sk_a,", &["sk_a"], &["ends with a comma"]);
        check_variable("sk_a, \n", &["sk_a"], &["ends with a comma"]);
        check_variable("sk_a,,", &["sk_a"], &["entry 2 is empty", "ends with a comma"]);
    }

    #[test]
    fn empty_entries_are_reported_by_position() {
        check_variable(",sk_a", &["sk_a"], &["entry 1 is empty"]);
        check_variable(", ,sk_a,\"\",sk_b", &["sk_a", "sk_b"], &["entries 1, 2, 4 are empty", QUOTES]);
    }

    #[test]
    fn line_breaks_and_spaces_separate_keys() {
        let breaks = "has line breaks between keys, which count as commas";
        let spaces = "has spaces or semicolons between keys, which count as commas";
        check_variable("sk_a\nsk_b\r\nsk_c\n", &["sk_a", "sk_b", "sk_c"], &[breaks]);
        check_variable("sk_a,\nsk_b", &["sk_a", "sk_b"], &[]);
        check_variable("sk_a sk_b;sk_c", &["sk_a", "sk_b", "sk_c"], &[spaces]);
        check_variable("\u{feff}sk_a,\u{a0}sk_b\u{200b}", &["sk_a", "sk_b"], &[]);
    }

    #[test]
    fn a_duplicate_key_is_dropped() {
        check_variable(
            "sk_a,sk_b,sk_a,sk_a",
            &["sk_a", "sk_b"],
            &["entry 3 is the same key as entry 1 (...)", "entry 4 is the same key as entry 1 (...)"],
        );
    }

    #[test]
    fn a_file_has_lines_and_comments() {
        check_file("# ours\nsk_a\n\n  sk_b\n#sk_c\nsk_d, sk_e\n", &["sk_a", "sk_b", "sk_d", "sk_e"], &[]);
        check_file("sk_a,\nsk_b,\n", &["sk_a", "sk_b"], &["ends with a comma"]);
    }

    #[test]
    fn a_list_without_keys_is_refused() {
        for text in ["", ",", " , ,", "\"\""] {
            check_invalid(text, &["contains no key"]);
        }
    }

    #[test]
    fn an_invalid_entry_is_reported_by_its_position() {
        check_invalid("sk_a,<your-key>", &["entry 2 (10 characters) is a placeholder"]);
        check_invalid("sk_a,<key>", &["entry 2 (5 characters) contains the invalid character `<`"]);
        check_invalid("$KEYS", &["entry 1 (5 characters) contains the invalid character `$`"]);
        check_invalid("[\"sk_a\"]", &["entry 1 (8 characters) contains the invalid character `[`"]);
        check_invalid(
            "sk_a,sk_\u{e9}",
            &["entry 2 (sk_***, 4 characters) contains the invalid character `\u{e9}`"],
        );
    }

    const KEY: &str = "sk_0123456789abcdef0123456789abcdef0123456789abcdef";

    /// Checks that `text` is refused with messages that contain the `expected` parts. `K` in `text` stands for a key.
    #[track_caller]
    fn check_around(text: &str, expected: &[&str]) {
        let text = text.replace('K', KEY);
        for format in [KeyListFormat::Variable, KeyListFormat::File] {
            for provider in [KeyProvider::ElevenLabs, KeyProvider::Other] {
                let list = parse(&text, format, provider);
                let printed_text = format!("{:?} {:?}", list.errors, list.corrections);
                assert!(!list.errors.is_empty(), "{text:?} must be refused");
                assert!(
                    !printed_text.contains(&KEY[12..40]),
                    "no message must contain the key: {printed_text}"
                );
                for part in expected {
                    assert!(
                        printed_text.contains(part),
                        "the messages must contain {part:?}: {printed_text}"
                    );
                }
            }
        }
    }

    #[test]
    fn words_around_a_key_are_refused_and_never_become_keys() {
        check_around("Bearer K", &["entry 1", "`Bearer`", "write only the key"]);
        check_around("K # the first", &["entry 1", "a comment", "separate lines"]);
        check_around("main K", &["entry 1", "a space within a key, or words around a key"]);
        check_around("K, backup K", &["entry 2"]);
        check_around(
            "name,key\nmain,K",
            &["entry 1 (4 characters) is the word `name`, not a key", "entry 2"],
        );
        check_around("main,K", &["entry 1 (4 characters) "]);
        check_around("K,studio", &["entry 2 (6 characters) "]);
        check_around("main=K", &["entry 1", "the invalid character `=`"]);
        check_around("ELEVENLABS_API_KEYS=K", &["entry 1", "the invalid character `=`"]);
        check_around("export ELEVENLABS_API_KEY=K", &["entry 1"]);
        check_around("{\"key\": \"K\"}", &["entry 1"]);
        check_around("- K", &["entry 1", "YAML"]);
        check_around("xi-api-key: K", &["entry 1"]);
        check_around(&format!("{} {}", &KEY[..20], &KEY[20..]), &["entry 1", "a space within a key"]);
        check_around("sk_01234567...bcdef", &["entry 1", "short form"]);
        check_around("K,sk_second…", &["entry 2 (sk_***, 10 characters) is a placeholder"]);
    }

    #[test]
    fn a_yaml_list_is_refused_in_both_formats() {
        check_around("keys:\n  - K\n", &["entry 1"]);
    }

    #[test]
    fn a_short_elevenlabs_key_is_refused_and_an_unknown_format_causes_a_warning() {
        let parse_keys = |text: &str| parse(text, KeyListFormat::Variable, KeyProvider::ElevenLabs);
        let list = parse_keys(&format!("sk_first,{KEY}"));
        assert_eq!(
            error_messages(&list),
            ["entry 1 (sk_***, 8 characters) is too short for a key of ElevenLabs"]
        );
        let list = parse_keys(&format!("{KEY},{}", &KEY[..50]));
        assert_eq!((list.keys.len(), error_messages(&list).len()), (2, 0));
        assert!(
            list.corrections[0].starts_with("entry 2 (sk_01234567...abcde) has an unknown format"),
            "the correction must name the unknown format: {list:?}"
        );
        assert_eq!(parse_keys(KEY).corrections, [""; 0]);
    }

    #[test]
    fn quotes_of_every_kind_are_removed() {
        for (open, close) in
            [('“', '”'), ('„', '“'), ('‘', '’'), ('‚', '‘'), ('«', '»'), ('‹', '›'), ('＂', '＂'), ('´', '´')]
        {
            check_variable(&format!("{open}sk_a{close},sk_b"), &["sk_a", "sk_b"], &[QUOTES]);
        }
    }

    #[test]
    fn a_key_of_another_provider_may_be_any_word() {
        check_variable("secret1", &["secret1"], &[]);
        let list = parse("main,sk_a", KeyListFormat::Variable, KeyProvider::Other);
        assert_eq!(
            error_messages(&list),
            ["entry 1 (4 characters) does not look like a key, but other entries do"]
        );
        check_variable("first-upstream,second", &["first-upstream", "second"], &[]);
    }
}
