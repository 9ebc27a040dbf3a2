//! Describes a mistake: its source, the error and advice. All messages have this form, and only
//! [`Excerpt`] prints a line of a configuration file, with secrets masked.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::mask;

/// The source of a value, in the order of the report.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ValueOrigin {
    /// A command line flag, with its dashes.
    Flag(&'static str),
    /// A position in a file; line and column count from 1, the column in characters.
    Line {
        /// The path of the file, as it was named.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The column, from 1.
        column: usize,
    },
    /// A file as a whole.
    File(PathBuf),
    /// An environment variable.
    Variable(String),
    /// No source, because a setting is missing.
    Nowhere,
}

impl fmt::Display for ValueOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(name) => f.write_str(name),
            Self::Line { path, line, column } => write!(f, "{}:{line}:{column}", path.display()),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Variable(name) => f.write_str(name),
            Self::Nowhere => f.write_str("configuration"),
        }
    }
}

/// The error in a value, with advice. Contains neither the source of the value nor a possible
/// secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrongValue {
    message: String,
    advice: Vec<String>,
}

impl WrongValue {
    pub(super) fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), advice: Vec::new() }
    }

    /// Adds a line of advice.
    #[must_use]
    pub(super) fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice.push(advice.into());
        self
    }

    /// Adds a suggestion, if a similar name exists.
    #[must_use]
    pub(super) fn suggest(self, near: Option<impl fmt::Display>) -> Self {
        match near {
            Some(near) => self.advise(format!("did you mean `{near}`?")),
            None => self,
        }
    }
}

impl fmt::Display for WrongValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        self.advice.iter().try_for_each(|advice| write!(f, "; {advice}"))
    }
}

impl std::error::Error for WrongValue {}

/// The source of a value, with its line if it is in a file.
#[derive(Clone, Debug)]
pub(super) struct SourceSpan {
    pub(super) origin: ValueOrigin,
    excerpt: Option<Excerpt>,
}

impl SourceSpan {
    pub(super) fn of(origin: ValueOrigin) -> Self {
        Self { origin, excerpt: None }
    }

    /// The source of the value at the byte range `span` of a TOML file.
    pub(super) fn in_toml(path: &Path, text: &str, span: Range<usize>) -> Self {
        let (excerpt, column) = Excerpt::of(text, span);
        let origin = ValueOrigin::Line { path: path.to_owned(), line: excerpt.line, column };
        Self { origin, excerpt: Some(excerpt) }
    }

    pub(super) fn problem(&self, wrong: WrongValue) -> Problem {
        let WrongValue { message, advice } = wrong;
        Problem { origin: self.origin.clone(), message, excerpt: self.excerpt.clone(), advice }
    }

    pub(super) fn warning(&self, message: impl Into<String>) -> Warning {
        Warning { origin: self.origin.clone(), message: message.into() }
    }
}

/// One line of a file with masked secrets, and the marked range in it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Excerpt {
    line: usize,
    shown: String,
    mark: Range<usize>,
}

/// Maximum characters shown of a line. A terminal would wrap a longer line, and the mark below it
/// would be misplaced.
const MAX_SHOWN_CHARS: usize = 100;

impl Excerpt {
    /// The line that contains the start of `span`, and the column of this start in the file.
    fn of(text: &str, span: Range<usize>) -> (Self, usize) {
        let start = text.floor_char_boundary(span.start);
        let before = text.get(..start).unwrap_or_default();
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        let line = before.matches('\n').count() + 1;
        let rest = text.get(line_start..).unwrap_or_default();
        let whole_line = rest.lines().next().unwrap_or_default();
        let shown: String = mask::line(whole_line, mask::section_at(text, line_start))
            .chars()
            .take(MAX_SHOWN_CHARS)
            .map(|character| if character.is_control() { ' ' } else { character })
            .collect();
        let column = before.get(line_start..).unwrap_or_default().chars().count();
        let end = text.floor_char_boundary(
            span.end.clamp(start, line_start + whole_line.len().max(start - line_start)),
        );
        let width = text.get(start..end).unwrap_or_default().chars().count().max(1);
        // A mask may be shorter than the masked text, so the mark ends with the shown line at the
        // latest.
        let length = shown.chars().count();
        let first = column.min(length.saturating_sub(usize::from(column > length)));
        let mark = first..(first + width).min(length.max(first + 1));
        (Self { line, shown, mark }, column + 1)
    }
}

impl fmt::Display for Excerpt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = self.line.to_string();
        writeln!(f, "  {number} | {}", self.shown)?;
        let (gap, marks) = (self.mark.start, self.mark.len());
        write!(f, "  {:width$} | {:gap$}{:^<marks$}", "", "", "", width = number.len())
    }
}

/// One mistake in the configuration.
#[derive(Clone, Debug)]
pub struct Problem {
    origin: ValueOrigin,
    message: String,
    excerpt: Option<Excerpt>,
    advice: Vec<String>,
}

impl Problem {
    /// The source of the wrong value.
    #[must_use]
    pub fn origin(&self) -> &ValueOrigin {
        &self.origin
    }

    /// The mistake, in one line.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The advice, one line per item.
    #[must_use]
    pub fn advice(&self) -> &[String] {
        &self.advice
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.origin, self.message)?;
        if let Some(excerpt) = &self.excerpt {
            write!(f, "\n{excerpt}")?;
        }
        let width = self.excerpt.as_ref().map_or(1, |excerpt| excerpt.line.to_string().len());
        self.advice.iter().try_for_each(|advice| write!(f, "\n  {:width$} = {advice}", ""))
    }
}

/// All mistakes in the configuration, in the order of [`ValueOrigin`]. Never empty.
#[derive(Clone, Debug)]
pub struct Problems(Vec<Problem>);

impl Problems {
    /// Sorts the problems; `None` if there are none.
    pub(super) fn of(mut problems: Vec<Problem>) -> Option<Self> {
        problems.sort_by(|first, second| first.origin.cmp(&second.origin));
        (!problems.is_empty()).then_some(Self(problems))
    }

    /// Iterates over the mistakes.
    pub fn iter(&self) -> std::slice::Iter<'_, Problem> {
        self.0.iter()
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|problem| writeln!(f, "{problem}"))?;
        match self.0.len() {
            1 => f.write_str("1 problem in the configuration"),
            count => write!(f, "{count} problems in the configuration"),
        }
    }
}

impl std::error::Error for Problems {}

/// A message about a corrected or unusual setting, which does not prevent a start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    origin: ValueOrigin,
    message: String,
}

impl Warning {
    /// The source of the setting.
    #[must_use]
    pub fn origin(&self) -> &ValueOrigin {
        &self.origin
    }

    /// The message, in one line.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.message
    }
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.origin, self.message)
    }
}

/// The candidate most similar to `word`, if they differ little enough.
pub(super) fn nearest<T: AsRef<str>>(word: &str, candidates: impl IntoIterator<Item = T>) -> Option<T> {
    // At most a third of the letters may differ. With more, suggestions would be guesses; with
    // less, a short word with two typos would get no suggestion.
    let max_distance = (word.chars().count() / 3).max(1);
    candidates
        .into_iter()
        .map(|candidate| (strsim::damerau_levenshtein(word, candidate.as_ref()), candidate))
        .filter(|(distance, _)| *distance <= max_distance)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks the message for a problem at the first occurrence of `needle` in `text`.
    #[track_caller]
    fn check(text: &str, needle: &str, expected: &str) {
        let start = text.find(needle).unwrap();
        let span = SourceSpan::in_toml(Path::new("k.toml"), text, start..start + needle.len());
        let problem = span.problem(WrongValue::new("wrong").advise("fix it"));
        assert_eq!(problem.to_string(), expected);
    }

    #[test]
    fn a_line_is_shown_with_its_wrong_part_marked() {
        check(
            "# one\n\n[pool]\nstrateggy = \"fill-first\"\n",
            "strateggy",
            "k.toml:4:1: wrong\n  4 | strateggy = \"fill-first\"\n    | ^^^^^^^^^\n    = fix it",
        );
    }

    #[test]
    fn columns_count_characters_and_tabs_take_one() {
        check(
            "[log]\n\tlevel = 'ä', x",
            "x",
            "k.toml:2:15: wrong\n  2 |  level = 'ä', x\n    |               ^\n    = fix it",
        );
    }

    #[test]
    fn the_margin_is_as_wide_as_the_line_number() {
        let text = format!("[log]\n{}level = 3", "\n".repeat(8));
        check(&text, "3", "k.toml:10:9: wrong\n  10 | level = 3\n     |         ^\n     = fix it");
    }

    #[test]
    fn a_mark_does_not_leave_a_masked_line() {
        check(
            "[[clients]]\ntoken = \"0123456789\"",
            "\"0123456789\"",
            "k.toml:2:9: wrong\n  2 | token = ***\n    |         ^^^\n    = fix it",
        );
        check(
            "[[clients]]\ntoken = \"0123456789\"",
            "789\"",
            "k.toml:2:17: wrong\n  2 | token = ***\n    |           ^\n    = fix it",
        );
    }

    #[test]
    fn a_span_may_be_the_end_of_a_file_or_beyond_it() {
        for span in [5..5, 6..6, 7..9, 100..100] {
            let text = "[log]\n";
            let printed =
                SourceSpan::in_toml(Path::new("k"), text, span).problem(WrongValue::new("wrong")).to_string();
            assert!(printed.starts_with("k:"), "{printed}");
        }
    }

    #[test]
    fn problems_print_in_order_with_their_count() {
        let problem = |origin| SourceSpan::of(origin).problem(WrongValue::new("wrong"));
        let variable = problem(ValueOrigin::Variable("V".into()));
        let flag = problem(ValueOrigin::Flag("--listen"));
        let both = Problems::of(vec![variable.clone(), flag]).unwrap();
        assert_eq!(both.to_string(), "--listen: wrong\nV: wrong\n2 problems in the configuration");
        let one = Problems::of(vec![variable]).unwrap();
        assert_eq!(one.to_string(), "V: wrong\n1 problem in the configuration");
        assert!(Problems::of(Vec::new()).is_none());
    }

    #[test]
    fn only_a_similar_name_is_suggested() {
        let names = ["strategy", "near_limit_ratio"];
        assert_eq!(nearest("strateggy", names), Some("strategy"));
        assert_eq!(nearest("startegy", names), Some("strategy"));
        assert_eq!(nearest("colour", names), None);
    }
}
