//! Keys in one text, as people paste them into a variable or a file: separated by commas, and
//! whatever else got in between is forgiven and named, by position and short key only.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use crate::secret::ApiKey;

/// Where the text is from: what is odd in one is usual in the other.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// Commas separate; line breaks are odd.
    Variable,
    /// Lines and commas separate; a line that starts with `#` is a comment.
    File,
}

/// What was in the text.
#[derive(Debug, Default)]
pub(super) struct KeyList {
    /// In their order, each once.
    pub(super) keys: Vec<ApiKey>,
    /// What was mended, each a sentence without its subject: `ends with a comma`.
    pub(super) oddities: Vec<String>,
    /// What cannot be a key, each a sentence.
    pub(super) mistakes: Vec<String>,
}

/// Reads a list. Positions count from 1, empty entries included.
pub(super) fn parse(text: &str, form: Form) -> KeyList {
    let mut reading = Reading::default();
    match form {
        Form::Variable => reading.chunks(text.split(',')),
        Form::File => {
            for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
            {
                reading.chunks(line.split(','));
            }
        }
    }
    reading.finish()
}

#[derive(Default)]
struct Reading {
    list: KeyList,
    position: usize,
    first_positions: HashMap<crate::secret::Fingerprint, usize>,
    empty: Vec<usize>,
    ends_with_comma: bool,
    has_quotes: bool,
    has_line_breaks: bool,
    has_other_separators: bool,
}

impl Reading {
    /// What stands between commas.
    fn chunks<'a>(&mut self, chunks: impl Iterator<Item = &'a str>) {
        let mut chunks = chunks.peekable();
        let mut is_first = true;
        while let Some(chunk) = chunks.next() {
            // Text after the last comma that is nothing is a trailing comma, not an empty entry.
            if chunk.trim_matches(is_padding).is_empty() && chunks.peek().is_none() && !is_first {
                self.has_quotes |= chunk.contains(is_quote);
                self.ends_with_comma = true;
            } else {
                self.chunk(chunk);
            }
            is_first = false;
        }
    }

    fn chunk(&mut self, chunk: &str) {
        let chunk = chunk.trim_matches(is_space);
        let mut count = 0;
        for piece in chunk.split(|character| is_space(character) || character == ';') {
            let bare = piece.trim_matches(is_quote);
            self.has_quotes |= bare.len() < piece.len();
            if !bare.is_empty() {
                count += 1;
                self.key(bare);
            }
        }
        if count == 0 {
            self.position += 1;
            self.empty.push(self.position);
        }
        if count > 1 {
            self.has_line_breaks |= chunk.contains(['\n', '\r']);
            self.has_other_separators |= chunk.contains(|character| {
                (is_space(character) && !"\r\n".contains(character)) || character == ';'
            });
        }
    }

    fn key(&mut self, text: &str) {
        self.position += 1;
        let position = self.position;
        // No key is known to have one of these; a placeholder, an unexpanded `$VARIABLE`, a JSON
        // list or a name copied along with its `=` has. Said here it is clearer than as the provider's 401 later.
        if let Some(odd) = text.chars().find(|character| "<>[]{}()$=\"'`\\".contains(*character)) {
            let mistake = format!("entry {position} has a `{odd}` in it, which no key has");
            self.list.mistakes.push(mistake);
            return;
        }
        match ApiKey::new(text) {
            Ok(key) => match self.first_positions.entry(key.fingerprint()) {
                Entry::Vacant(vacant) => {
                    vacant.insert(position);
                    self.list.keys.push(key);
                }
                Entry::Occupied(first) => {
                    let (first, short) = (first.get(), key.short());
                    self.list
                        .oddities
                        .push(format!("entry {position} is the same key as entry {first} ({short})"));
                }
            },
            Err(unusable) => self.list.mistakes.push(format!("entry {position}: {unusable}")),
        }
    }

    fn finish(mut self) -> KeyList {
        let oddities = &mut self.list.oddities;
        match self.empty.as_slice() {
            [] => {}
            [one] => oddities.push(format!("entry {one} is empty")),
            many => {
                let listed = many.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
                oddities.push(format!("entries {listed} are empty"));
            }
        }
        for (is_so, oddity) in [
            (self.ends_with_comma, "ends with a comma"),
            (self.has_quotes, "has quotes around keys"),
            (self.has_line_breaks, "has line breaks between keys, taken for commas"),
            (self.has_other_separators, "has spaces or semicolons between keys, taken for commas"),
        ] {
            if is_so {
                oddities.push(oddity.to_owned());
            }
        }
        if self.list.keys.is_empty() && self.list.mistakes.is_empty() {
            self.list.mistakes.push("there is no key in it".to_owned());
        }
        self.list
    }
}

/// Spaces of every kind, also those that cannot be seen and come with copied text.
fn is_space(character: char) -> bool {
    character.is_whitespace() || matches!(character, '\u{feff}' | '\u{200b}'..='\u{200d}')
}

fn is_quote(character: char) -> bool {
    matches!(character, '"' | '\'' | '`' | '“' | '”' | '„' | '‘' | '’' | '«' | '»')
}

fn is_padding(character: char) -> bool {
    is_space(character) || is_quote(character)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, keys: &[&str], oddities: &[&str]) {
        check_form(Form::Variable, text, keys, oddities, &[]);
    }

    #[track_caller]
    fn check_file(text: &str, keys: &[&str], oddities: &[&str]) {
        check_form(Form::File, text, keys, oddities, &[]);
    }

    #[track_caller]
    fn check_mistakes(text: &str, mistakes: &[&str]) {
        let list = parse(text, Form::Variable);
        assert_eq!(list.mistakes, mistakes);
    }

    #[track_caller]
    fn check_form(form: Form, text: &str, keys: &[&str], oddities: &[&str], mistakes: &[&str]) {
        let list = parse(text, form);
        assert_eq!(list.keys.iter().map(ApiKey::expose).collect::<Vec<_>>(), keys);
        assert_eq!(list.oddities, oddities);
        assert_eq!(list.mistakes, mistakes);
    }

    const QUOTES: &str = "has quotes around keys";

    #[test]
    fn commas_and_spaces_are_the_form() {
        check("sk_key1,sk_key2, sk_key3", &["sk_key1", "sk_key2", "sk_key3"], &[]);
        check("  sk_a ,\tsk_b  ", &["sk_a", "sk_b"], &[]);
        check("sk_a", &["sk_a"], &[]);
    }

    #[test]
    fn quotes_around_all_or_each_are_forgiven() {
        check("\"sk_a,sk_b\"", &["sk_a", "sk_b"], &[QUOTES]);
        check("'sk_a', \"sk_b\"", &["sk_a", "sk_b"], &[QUOTES]);
        check("“sk_a”,” sk_b ”", &["sk_a", "sk_b"], &[QUOTES]);
        check("\"sk_a", &["sk_a"], &[QUOTES]);
        check("\"sk_a,\"", &["sk_a"], &["ends with a comma", QUOTES]);
    }

    #[test]
    fn a_trailing_comma_is_no_empty_entry() {
        check("sk_a,", &["sk_a"], &["ends with a comma"]);
        check("sk_a, \n", &["sk_a"], &["ends with a comma"]);
        check("sk_a,,", &["sk_a"], &["entry 2 is empty", "ends with a comma"]);
    }

    #[test]
    fn empty_entries_are_named_by_position() {
        check(",sk_a", &["sk_a"], &["entry 1 is empty"]);
        check(", ,sk_a,\"\",sk_b", &["sk_a", "sk_b"], &["entries 1, 2, 4 are empty", QUOTES]);
    }

    #[test]
    fn line_breaks_and_spaces_separate_too() {
        let breaks = "has line breaks between keys, taken for commas";
        let spaces = "has spaces or semicolons between keys, taken for commas";
        check("sk_a\nsk_b\r\nsk_c\n", &["sk_a", "sk_b", "sk_c"], &[breaks]);
        check("sk_a,\nsk_b", &["sk_a", "sk_b"], &[]);
        check("sk_a sk_b;sk_c", &["sk_a", "sk_b", "sk_c"], &[spaces]);
        check("\u{feff}sk_a,\u{a0}sk_b\u{200b}", &["sk_a", "sk_b"], &[]);
    }

    #[test]
    fn a_key_counts_once() {
        check(
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
    fn nothing_is_a_mistake() {
        for text in ["", ",", " , ,", "\"\""] {
            check_mistakes(text, &["there is no key in it"]);
        }
    }

    #[test]
    fn what_is_no_key_is_named_by_position() {
        check_mistakes(
            "sk_a,<your key>",
            &["entry 2 has a `<` in it, which no key has", "entry 3 has a `>` in it, which no key has"],
        );
        check_mistakes("$KEYS", &["entry 1 has a `$` in it, which no key has"]);
        check_mistakes("[\"sk_a\"]", &["entry 1 has a `[` in it, which no key has"]);
        let unusable =
            "the key has a character that no key has (a space, a control character or a letter beyond ASCII)";
        check_mistakes("sk_a,sk_\u{e9}", &[&format!("entry 2: {unusable}")]);
    }
}
