//! Defines the problems and warnings of a configuration. A problem consists of the source of a value, the error,
//! advice, and an excerpt of the file. Only [`Excerpt`] prints a line of a file, with its secrets masked.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::mask;
use super::overlay::EntryKind;
use crate::policy::similar::find_similar;

/// The source of a value, in the order of the report.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ValueOrigin {
    /// A command line flag, with its dashes.
    Flag(&'static str),
    /// A position in a file.
    Line {
        /// The path of the file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// The column in characters, counted from 1.
        column: usize,
    },
    /// A whole file, for an error or a warning without a position in it.
    File(PathBuf),
    /// An environment variable, by its name.
    Variable(String),
    /// No source, because the setting is missing.
    Absent,
}

impl fmt::Display for ValueOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(name) => f.write_str(name),
            Self::Line { path, line, column } => write!(f, "{}:{line}:{column}", path.display()),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Variable(name) => f.write_str(name),
            Self::Absent => f.write_str("configuration"),
        }
    }
}

/// The error in a value, with advice. It contains no possible secret. `SourceSpan::problem` adds
/// the source of the value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValueError {
    message: String,
    advice: Vec<String>,
}

impl ValueError {
    pub(super) fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), advice: Vec::new() }
    }

    /// Adds a line of advice.
    #[must_use]
    pub(super) fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice.push(advice.into());
        self
    }

    /// Returns the error for a name that is not one of `known_names`. It lists them and suggests a similar one.
    pub(super) fn unknown_name(kind: &str, name: &str, known_names: &[&'static str]) -> Self {
        let quoted_names: Vec<String> =
            known_names.iter().map(|known_name| format!("`{known_name}`")).collect();
        Self::new(format!("unknown {kind} {}", mask::quote_masked(name)))
            .advise(format!("use one of {}", quoted_names.join(", ")))
            .suggest(find_similar(&name.to_lowercase().replace('_', "-"), known_names.iter().copied()))
    }

    /// Puts `subject` before the message, which is the rest of its sentence.
    pub(super) fn about(self, subject: impl fmt::Display) -> Self {
        Self { message: format!("{subject} {}", self.message), ..self }
    }

    /// Adds a suggestion, if there is one. A suggestion is made from the value, which may be a key in the wrong
    /// setting, so a suggestion that may contain a secret is omitted.
    #[must_use]
    pub(super) fn suggest(self, suggestion: Option<impl fmt::Display>) -> Self {
        let suggestion = suggestion.map(|suggestion| suggestion.to_string());
        match suggestion.filter(|suggestion| !mask::looks_like_secret(suggestion)) {
            Some(suggestion) => self.advise(format!("did you mean `{suggestion}`?")),
            None => self,
        }
    }
}

impl fmt::Display for ValueError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        self.advice.iter().try_for_each(|advice| write!(f, "; {advice}"))
    }
}

impl std::error::Error for ValueError {}

/// The source of a value, with an excerpt if it is in a file.
#[derive(Clone, Debug)]
pub(super) struct SourceSpan {
    pub(super) origin: ValueOrigin,
    excerpt: Option<Excerpt>,
    /// The entry of the overlay that contains the value, with its index among the entries of its kind.
    pub(super) overlay_entry: Option<(EntryKind, usize)>,
}

impl SourceSpan {
    pub(super) fn new(origin: ValueOrigin) -> Self {
        Self { origin, excerpt: None, overlay_entry: None }
    }

    /// Creates the source of the value in the byte range `range` of a TOML file.
    pub(super) fn for_toml(path: &Path, text: &str, range: Range<usize>) -> Self {
        let (excerpt, column) = Excerpt::new(text, range);
        let origin = ValueOrigin::Line { path: path.to_owned(), line: excerpt.line, column };
        Self { origin, excerpt: Some(excerpt), overlay_entry: None }
    }

    /// Sets the entry of the overlay that contains the value.
    pub(super) fn in_overlay_entry(self, overlay_entry: Option<(EntryKind, usize)>) -> Self {
        Self { overlay_entry, ..self }
    }

    /// Creates the problem for an error in the value.
    pub(super) fn problem(&self, error: ValueError) -> Problem {
        Problem { span: self.clone(), error }
    }

    /// Creates a warning about the value.
    pub(super) fn warning(&self, message: impl Into<String>) -> Warning {
        Warning { origin: self.origin.clone(), message: message.into() }
    }
}

/// One line of a file with masked secrets, and the characters that are marked below it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Excerpt {
    /// The number of the line, counted from 1.
    line: usize,
    text: String,
    /// The marked characters, counted from 0.
    mark: Range<usize>,
}

/// Maximum number of characters of an excerpt. A terminal would wrap a longer line, and the mark below it
/// would be misplaced.
const MAX_EXCERPT_CHARS: usize = 100;

impl Excerpt {
    /// Returns the line of `file_text` that contains the start of `range`, and the column of this start, counted from
    /// 1.
    fn new(file_text: &str, range: Range<usize>) -> (Self, usize) {
        let start = file_text.floor_char_boundary(range.start);
        let text_before = file_text.get(..start).unwrap_or_default();
        let line_start = text_before.rfind('\n').map_or(0, |newline| newline + 1);
        let line = text_before.matches('\n').count() + 1;
        let text_from_line = file_text.get(line_start..).unwrap_or_default();
        let unmasked_line = text_from_line.lines().next().unwrap_or_default();
        let text: String = mask::mask_line(unmasked_line, mask::find_section(file_text, line_start))
            .chars()
            .take(MAX_EXCERPT_CHARS)
            .map(|character| if character.is_control() { ' ' } else { character })
            .collect();
        let column = text_before.get(line_start..).unwrap_or_default().chars().count();
        let end = file_text.floor_char_boundary(
            range.end.clamp(start, line_start + unmasked_line.len().max(start - line_start)),
        );
        let width = file_text.get(start..end).unwrap_or_default().chars().count().max(1);
        // The masked line may be shorter than the original, so the mark must end within it.
        let length = text.chars().count();
        let mark_start = column.min(length.saturating_sub(usize::from(column > length)));
        let mark = mark_start..(mark_start + width).min(length.max(mark_start + 1));
        (Self { line, text, mark }, column + 1)
    }
}

impl fmt::Display for Excerpt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = self.line.to_string();
        writeln!(f, "  {number} | {}", self.text)?;
        let (indent, length) = (self.mark.start, self.mark.len());
        write!(f, "  {:width$} | {:indent$}{:^<length$}", "", "", "", width = number.len())
    }
}

/// One mistake in the configuration.
#[derive(Clone, Debug)]
pub struct Problem {
    span: SourceSpan,
    error: ValueError,
}

impl Problem {
    /// Returns the source of the value.
    #[must_use]
    pub fn origin(&self) -> &ValueOrigin {
        &self.span.origin
    }

    /// Returns the kind and the index of the overlay's entry that contains the value, or `None` if the value is not in
    /// the overlay.
    #[must_use]
    pub fn overlay_entry(&self) -> Option<(EntryKind, usize)> {
        self.span.overlay_entry
    }

    /// Returns the source, the message and the advice in one line, without an excerpt of the file.
    #[must_use]
    pub fn summary(&self) -> String {
        format!("{}: {}", self.span.origin, self.error)
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { span: SourceSpan { origin, excerpt, .. }, error: ValueError { message, advice } } = self;
        write!(f, "{origin}: {message}")?;
        if let Some(excerpt) = excerpt {
            write!(f, "\n{excerpt}")?;
        }
        let width = excerpt.as_ref().map_or(1, |excerpt| excerpt.line.to_string().len());
        advice.iter().try_for_each(|advice| write!(f, "\n  {:width$} = {advice}", ""))
    }
}

/// All mistakes in a configuration, in the order of [`ValueOrigin`]. There is at least one.
#[derive(Clone, Debug)]
pub struct Problems(Vec<Problem>);

impl Problems {
    /// Sorts the problems. Returns `None` if the list is empty.
    pub(super) fn new(mut problems: Vec<Problem>) -> Option<Self> {
        problems.sort_by(|first, second| first.origin().cmp(second.origin()));
        (!problems.is_empty()).then_some(Self(problems))
    }

    /// Returns the problems in their order.
    pub fn iter(&self) -> impl Iterator<Item = &Problem> {
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

/// A message about a corrected or unusual setting, or about a file that other users can read or change. It does not
/// prevent startup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    origin: ValueOrigin,
    message: String,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.origin, self.message)
    }
}

/// The problems and warnings of the configuration that is being resolved.
#[derive(Default)]
pub(super) struct Report {
    pub(super) problems: Vec<Problem>,
    pub(super) warnings: Vec<Warning>,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks the message for a problem at the first occurrence of `wrong_part` in `text`.
    #[track_caller]
    fn check_message(text: &str, wrong_part: &str, expected: &str) {
        let start = text.find(wrong_part).unwrap();
        let span = SourceSpan::for_toml(Path::new("k.toml"), text, start..start + wrong_part.len());
        let problem = span.problem(ValueError::new("wrong").advise("fix it"));
        assert_eq!(problem.to_string(), expected);
    }

    #[test]
    fn an_excerpt_marks_the_wrong_value() {
        check_message(
            "# one\n\n[pool]\nstrateggy = \"fill-first\"\n",
            "strateggy",
            "k.toml:4:1: wrong\n  4 | strateggy = \"fill-first\"\n    | ^^^^^^^^^\n    = fix it",
        );
    }

    #[test]
    fn a_column_counts_characters_and_a_tab_as_one() {
        check_message(
            "[log]\n\tlevel = 'ä', x",
            "x",
            "k.toml:2:15: wrong\n  2 |  level = 'ä', x\n    |               ^\n    = fix it",
        );
    }

    #[test]
    fn the_margin_has_the_width_of_the_line_number() {
        let text = format!("[log]\n{}level = 3", "\n".repeat(8));
        check_message(&text, "3", "k.toml:10:9: wrong\n  10 | level = 3\n     |         ^\n     = fix it");
    }

    #[test]
    fn a_mark_ends_within_the_masked_line() {
        check_message(
            "[[clients]]\ntoken = \"0123456789\"",
            "\"0123456789\"",
            "k.toml:2:9: wrong\n  2 | token = ***\n    |         ^^^\n    = fix it",
        );
        check_message(
            "[[clients]]\ntoken = \"0123456789\"",
            "789\"",
            "k.toml:2:17: wrong\n  2 | token = ***\n    |           ^\n    = fix it",
        );
    }

    #[test]
    fn a_range_at_or_beyond_the_end_of_the_file_is_reported() {
        for range in [5..5, 6..6, 7..9, 100..100] {
            let message = SourceSpan::for_toml(Path::new("k"), "[log]\n", range)
                .problem(ValueError::new("wrong"))
                .to_string();
            assert!(message.starts_with("k:"), "the message must begin with the file: {message}");
        }
    }

    #[test]
    fn problems_are_printed_in_order_with_their_count() {
        let problem = |origin| SourceSpan::new(origin).problem(ValueError::new("wrong"));
        let variable = problem(ValueOrigin::Variable("V".into()));
        let flag = problem(ValueOrigin::Flag("--listen"));
        let two_problems = Problems::new(vec![variable.clone(), flag]).unwrap();
        assert_eq!(two_problems.to_string(), "--listen: wrong\nV: wrong\n2 problems in the configuration");
        let one_problem = Problems::new(vec![variable]).unwrap();
        assert_eq!(one_problem.to_string(), "V: wrong\n1 problem in the configuration");
        assert!(Problems::new(Vec::new()).is_none());
    }
}
