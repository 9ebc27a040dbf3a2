//! Parses the configuration file or the overlay into settings and entries, such as those of `[[keys]]` and
//! `[[clients]]`, each with its position in the file. This module checks the structure of the file. `setting`, `keys`,
//! `clients` and `overlay` parse the values.

mod errors;

use std::collections::BTreeSet;
use std::ops::{Range, RangeInclusive};
use std::path::Path;
use std::str::FromStr;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::mask::quote_masked;
use super::old_names;
use super::overlay::{self, EntryKind};
use super::problem::{Problem, SourceSpan, ValueError, ValueOrigin};
use super::setting::{self, Setting};
use super::value::{self, RawValue};
use crate::policy::similar::find_similar;
use crate::policy::units::UnixMs;
use errors::{old_section_error, syntax_error, unknown_section_error, unknown_setting_error};

/// A parsed file. After a syntax error, it contains the parts that could be parsed.
pub(super) struct Document<'a> {
    path: &'a Path,
    text: &'a str,
    root: DeTable<'a>,
    /// The lines that syntax errors affect.
    broken_lines: BTreeSet<usize>,
}

/// The value of a setting in the file.
pub(super) struct AssignedValue<'a> {
    pub(super) setting: &'static Setting,
    pub(super) value: &'a DeValue<'a>,
    pub(super) span: SourceSpan,
}

/// The settings and entries of the configuration file.
#[derive(Default)]
pub(super) struct ConfigEntries<'a> {
    pub(super) settings: Vec<AssignedValue<'a>>,
    pub(super) keys: Vec<TableEntry<'a>>,
    pub(super) clients: Vec<TableEntry<'a>>,
}

/// The entries of the overlay.
#[derive(Default)]
pub(super) struct OverlayEntries<'a> {
    pub(super) generation: u64,
    pub(super) keys: Vec<TableEntry<'a>>,
    pub(super) paused_keys: Vec<TableEntry<'a>>,
    pub(super) clients: Vec<TableEntry<'a>>,
    pub(super) removed: Vec<TableEntry<'a>>,
}

/// One `[[keys]]`, `[[clients]]`, `[[paused_keys]]` or `[[removed]]` entry.
pub(super) struct TableEntry<'a> {
    document: &'a Document<'a>,
    table: &'a DeTable<'a>,
    /// The position of the entry's header.
    pub(super) span: SourceSpan,
}

/// The string in a field of an entry.
pub(super) struct StringField<'n, 'a> {
    /// The name of the field.
    pub(super) name: &'n str,
    pub(super) text: &'a str,
    pub(super) span: SourceSpan,
}

impl<'a> Document<'a> {
    /// Parses as much as possible, and adds the syntax errors to `problems`.
    pub(super) fn parse(path: &'a Path, text: &'a str, problems: &mut Vec<Problem>) -> Self {
        let (root, errors) = DeTable::parse_recoverable(text);
        let mut broken_lines = BTreeSet::new();
        for error in errors {
            let range = error.span().unwrap_or_default();
            let span = SourceSpan::for_toml(path, text, range.clone());
            if let ValueOrigin::Line { line, .. } = span.origin {
                broken_lines.extend(affected_lines(text, line));
            }
            problems.push(span.problem(syntax_error(error.message(), text.get(range).unwrap_or_default())));
        }
        Self { path, text, root: root.into_inner(), broken_lines }
    }

    /// Returns whether the whole file was parsed. Otherwise an absent entry may be in an unparsed part.
    pub(super) fn is_fully_parsed(&self) -> bool {
        self.broken_lines.is_empty()
    }

    /// Returns whether a syntax error affects the line of a problem, so that it may have caused the problem.
    pub(super) fn is_affected_by_syntax_error(&self, problem: &Problem) -> bool {
        matches!(problem.origin(), ValueOrigin::Line { path, line, .. } if path == self.path && self.broken_lines.contains(line))
    }

    /// Collects the settings and entries of the configuration file.
    pub(super) fn collect(&'a self, problems: &mut Vec<Problem>) -> ConfigEntries<'a> {
        let mut entries = ConfigEntries::default();
        for (name, value) in &self.root {
            match name.get_ref().as_ref() {
                "keys" => entries.keys = self.collect_entries("keys", "key", None, value, problems),
                "clients" => {
                    entries.clients = self.collect_entries("clients", "token_sha256", None, value, problems)
                }
                section if setting::is_section(section) => match value.get_ref().as_table() {
                    Some(table) => self.collect_section(section, table, &mut entries.settings, problems),
                    None => {
                        let error = value::wrong_type(value.get_ref(), "a table");
                        problems.push(self.span_of(value.span()).problem(error));
                    }
                },
                unknown => match (old_names::new_section(unknown), value.get_ref().as_table()) {
                    (Some(_), Some(table)) if !table.is_empty() => {
                        self.collect_section(unknown, table, &mut entries.settings, problems);
                    }
                    (Some(new_name), _) => {
                        problems
                            .push(self.span_of(name.span()).problem(old_section_error(unknown, new_name)));
                    }
                    (None, _) => {
                        let error = unknown_section_error(unknown, value.get_ref());
                        problems.push(self.span_of(name.span()).problem(error));
                    }
                },
            }
        }
        entries
    }

    /// Collects the entries of the overlay.
    pub(super) fn collect_overlay(&'a self, problems: &mut Vec<Problem>) -> OverlayEntries<'a> {
        const KNOWN_FIELDS: [&str; 5] = ["generation", "keys", "paused_keys", "clients", "removed"];
        let mut entries = OverlayEntries::default();
        for (name, value) in &self.root {
            match name.get_ref().as_ref() {
                "generation" => match overlay::parse_generation(RawValue::Toml(value.get_ref())) {
                    Ok(generation) => entries.generation = generation,
                    Err(error) => problems.push(self.span_of(value.span()).problem(error)),
                },
                "keys" => {
                    let kind = Some(EntryKind::Key);
                    entries.keys = self.collect_entries("keys", "key_file", kind, value, problems);
                }
                "paused_keys" => {
                    let kind = Some(EntryKind::PausedKey);
                    entries.paused_keys =
                        self.collect_entries("paused_keys", "fingerprint", kind, value, problems);
                }
                "clients" => {
                    let kind = Some(EntryKind::Client);
                    entries.clients = self.collect_entries("clients", "token_sha256", kind, value, problems);
                }
                "removed" => entries.removed = self.collect_entries("removed", "id", None, value, problems),
                unknown => {
                    let error = ValueError::new(format!("unknown field {}", quote_masked(unknown)))
                        .suggest(find_similar(unknown, KNOWN_FIELDS));
                    problems.push(self.span_of(name.span()).problem(error));
                }
            }
        }
        entries
    }

    /// Collects the settings of a section and of the sections in it.
    fn collect_section(
        &'a self,
        section: &str,
        table: &'a DeTable<'a>,
        settings: &mut Vec<AssignedValue<'a>>,
        problems: &mut Vec<Problem>,
    ) {
        for (name, value) in table {
            let path = format!("{section}.{}", name.get_ref());
            if let Some(inner) = value.get_ref().as_table().filter(|_| setting::is_section(&path)) {
                if inner.is_empty() {
                    problems.push(self.span_of(value.span()).problem(ValueError::new("this table is empty")));
                }
                self.collect_section(&path, inner, settings, problems);
                continue;
            }
            match setting::find(&path) {
                Some(setting) => {
                    settings.push(AssignedValue {
                        setting,
                        value: value.get_ref(),
                        span: self.span_of(value.span()),
                    });
                }
                None => {
                    let error = old_names::error_in_file(section, name.get_ref(), value.get_ref())
                        .unwrap_or_else(|| unknown_setting_error(section, name.get_ref()));
                    problems.push(self.span_of(name.span()).problem(error));
                }
            }
        }
    }

    /// Collects the entries of the list `list_name`. The advice of an error contains an example with `example_field`.
    /// `overlay_kind` is the kind of the entries if the file is the overlay.
    fn collect_entries(
        &'a self,
        list_name: &str,
        example_field: &str,
        overlay_kind: Option<EntryKind>,
        value: &'a Spanned<DeValue<'a>>,
        problems: &mut Vec<Problem>,
    ) -> Vec<TableEntry<'a>> {
        let error = || {
            ValueError::new(format!("`{list_name}` must be a list of tables")).advise(format!(
                "for each entry, write [[{list_name}]] with double brackets, and `{example_field} = …` below it"
            ))
        };
        let DeValue::Array(items) = value.get_ref() else {
            problems.push(self.span_of(value.span()).problem(error()));
            return Vec::new();
        };
        let mut entries = Vec::new();
        for (index, item) in items.iter().enumerate() {
            let overlay_entry = overlay_kind.map(|kind| (kind, index));
            let span = self.span_of(item.span()).in_overlay_entry(overlay_entry);
            match item.get_ref().as_table() {
                Some(table) => entries.push(TableEntry { document: self, table, span }),
                None => problems.push(span.problem(error())),
            }
        }
        entries
    }

    fn span_of(&self, range: Range<usize>) -> SourceSpan {
        SourceSpan::for_toml(self.path, self.text, range)
    }
}

impl<'a> TableEntry<'a> {
    /// Returns the position of a part of the entry.
    fn span_of(&self, range: Range<usize>) -> SourceSpan {
        self.document.span_of(range).in_overlay_entry(self.span.overlay_entry)
    }

    /// Returns whether the entry contains a key, a token or a forward proxy. The URL of a forward proxy may contain a
    /// password. The name of a file and a hash are not secrets.
    pub(super) fn contains_secrets(&self) -> bool {
        ["key", "token", "proxy"].iter().any(|name| self.table.contains_key(*name))
    }

    /// Returns whether the entry contains the field `name`.
    pub(super) fn has_field(&self, name: &str) -> bool {
        self.table.contains_key(name)
    }

    /// Parses the time in a field. Returns `None` if the field is missing or invalid.
    pub(super) fn parse_time(&self, name: &str, problems: &mut Vec<Problem>) -> Option<UnixMs> {
        self.parse_with(name, problems, |raw| {
            let error = || {
                ValueError::new("this is not a time")
                    .advise("write a time in UTC, for example \"2026-11-29T12:00:00Z\"")
            };
            UnixMs::parse(value::parse_string(raw)?).ok_or_else(error)
        })
    }

    /// Reports every field whose name is not in `known_fields`.
    pub(super) fn report_unknown_fields(&self, known_fields: &[&'static str], problems: &mut Vec<Problem>) {
        for (name, value) in
            self.table.iter().filter(|(name, _)| !known_fields.contains(&name.get_ref().as_ref()))
        {
            let span = self.span_of(name.span());
            let error = old_names::error_in_client(name.get_ref(), value.get_ref()).unwrap_or_else(|| {
                let error = ValueError::new(format!("unknown field {}", quote_masked(name.get_ref())));
                error.suggest(find_similar(name.get_ref(), known_fields))
            });
            problems.push(span.problem(error));
        }
    }

    /// Parses the string in a field, and returns it with its position. Returns `None` if the field is
    /// missing or is not a string.
    pub(super) fn parse_string(
        &self,
        name: &str,
        problems: &mut Vec<Problem>,
    ) -> Option<(&'a str, SourceSpan)> {
        let value = self.table.get(name)?;
        let text = self.parse_with(name, problems, value::parse_string)?;
        Some((text, self.span_of(value.span())))
    }

    /// Parses a value from the string in a field. Returns `None` if the field is missing or invalid.
    pub(super) fn parse<T: FromStr<Err = ValueError>>(
        &self,
        name: &str,
        problems: &mut Vec<Problem>,
    ) -> Option<T> {
        self.parse_with(name, problems, |raw| value::parse_string(raw)?.parse())
    }

    /// Parses the integer in a field. Returns `None` if the field is missing or its value is not in
    /// `range`.
    pub(super) fn parse_count(
        &self,
        name: &str,
        range: RangeInclusive<u32>,
        problems: &mut Vec<Problem>,
    ) -> Option<u32> {
        let (min, max) = (range.start(), range.end());
        self.parse_with(name, problems, |raw| {
            let parse = || {
                let number = value::parse_integer(raw)?;
                let count = u32::try_from(number).ok().filter(|count| range.contains(count));
                count.ok_or_else(|| ValueError::new(format!("{number} is out of range")))
            };
            parse().map_err(|error| error.advise(format!("write a whole number from {min} to {max}")))
        })
    }

    /// Parses the boolean in a field. Returns `None` if the field is missing or invalid.
    pub(super) fn parse_bool(&self, name: &str, problems: &mut Vec<Problem>) -> Option<bool> {
        self.parse_with(name, problems, value::parse_bool)
    }

    /// Parses the list of strings in a field, each with `parse_item`. Returns an empty list if the field is missing. An
    /// empty list in the file is an error, because a rule without items would allow everything, although it looks as if
    /// it allowed nothing.
    pub(super) fn parse_list(
        &self,
        name: &str,
        parse_item: impl Fn(&str) -> Result<String, ValueError>,
        problems: &mut Vec<Problem>,
    ) -> Vec<String> {
        let parse = |raw: RawValue<'_>| match value::parse_strings(raw)?[..] {
            [] => Err(ValueError::new("this list is empty").advise("remove it, or add a value")),
            ref items => items.iter().map(|item| parse_item(item)).collect(),
        };
        self.parse_with(name, problems, parse).unwrap_or_default()
    }

    fn parse_with<T>(
        &self,
        name: &str,
        problems: &mut Vec<Problem>,
        parse: impl FnOnce(RawValue<'a>) -> Result<T, ValueError>,
    ) -> Option<T> {
        let value = self.table.get(name)?;
        let span = self.span_of(value.span());
        parse(RawValue::Toml(value.get_ref())).map_err(|error| problems.push(span.problem(error))).ok()
    }

    /// Parses the string in the only field among `names`. Reports a problem unless exactly one of these fields exists.
    pub(super) fn require_one_of<'n>(
        &self,
        names: &[&'n str],
        problems: &mut Vec<Problem>,
    ) -> Option<StringField<'n, 'a>> {
        let listed_names = names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(" or ");
        let present_names: Vec<&str> =
            names.iter().copied().filter(|name| self.table.contains_key(*name)).collect();
        match present_names.as_slice() {
            // After a syntax error, the field may be in a part of the file that was not parsed.
            [] if !self.document.is_fully_parsed() => None,
            [] => {
                problems
                    .push(self.span.problem(ValueError::new(format!("this entry has no {listed_names}"))));
                None
            }
            [name] => self.parse_string(name, problems).map(|(text, span)| StringField { name, text, span }),
            [first, second, ..] => {
                let error = ValueError::new(format!("this entry has both `{first}` and `{second}`"));
                problems.push(self.span.problem(error.advise(format!("write only one of {listed_names}"))));
                None
            }
        }
    }
}

/// Returns the lines that a syntax error in `line` affects: the line itself, and after an invalid header all lines up
/// to the next header.
fn affected_lines(text: &str, line: usize) -> Range<usize> {
    let is_header = |line: &str| line.trim_start().starts_with('[');
    let mut lines = text.lines().skip(line - 1);
    if !lines.next().is_some_and(is_header) {
        return line..line + 1;
    }
    line..line + 1 + lines.take_while(|line| !is_header(line)).count()
}
