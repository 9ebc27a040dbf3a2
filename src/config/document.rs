//! Parses the TOML file into settings and entries, each with its position in the file. This module
//! checks the structure only; `setting`, `keys` and `clients` parse the values.

use std::collections::BTreeSet;
use std::ops::{Range, RangeInclusive};
use std::path::Path;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::mask::shown;
use super::problem::{Problem, SourceSpan, ValueOrigin, WrongValue, nearest};
use super::renamed;
use super::setting::{self, Setting};
use super::value::{self, Raw};

/// A parsed file. After a syntax error it contains the parts that could be parsed.
pub(super) struct Document<'a> {
    path: &'a Path,
    text: &'a str,
    root: DeTable<'a>,
    broken_lines: BTreeSet<usize>,
}

/// A value with its setting.
pub(super) struct AssignedValue<'a> {
    pub(super) setting: &'static Setting,
    pub(super) value: &'a DeValue<'a>,
    pub(super) span: SourceSpan,
}

/// The settings and entries of a file.
#[derive(Default)]
pub(super) struct Contents<'a> {
    pub(super) settings: Vec<AssignedValue<'a>>,
    pub(super) keys: Vec<TableEntry<'a>>,
    pub(super) clients: Vec<TableEntry<'a>>,
}

/// One `[[keys]]` or `[[clients]]` entry.
pub(super) struct TableEntry<'a> {
    document: &'a Document<'a>,
    table: &'a DeTable<'a>,
    /// The position of its header.
    pub(super) span: SourceSpan,
}

impl<'a> Document<'a> {
    /// Parses as much as possible; syntax errors are added to `problems`.
    pub(super) fn parse(path: &'a Path, text: &'a str, problems: &mut Vec<Problem>) -> Self {
        let (root, errors) = DeTable::parse_recoverable(text);
        let mut broken_lines = BTreeSet::new();
        for error in errors {
            let range = error.span().unwrap_or_default();
            let span = SourceSpan::in_toml(path, text, range.clone());
            if let ValueOrigin::Line { line, .. } = span.origin {
                broken_lines.extend(lines_affected_from(text, line));
            }
            problems.push(span.problem(syntax_error(error.message(), text.get(range).unwrap_or_default())));
        }
        Self { path, text, root: root.into_inner(), broken_lines }
    }

    /// Whether the whole file was parsed. Only then is an absent entry really missing.
    pub(super) fn is_fully_parsed(&self) -> bool {
        self.broken_lines.is_empty()
    }

    /// Whether a problem is in a line that a syntax error affects. The syntax error may have caused
    /// the problem.
    pub(super) fn is_affected_by_syntax_error(&self, problem: &Problem) -> bool {
        matches!(problem.origin(), ValueOrigin::Line { path, line, .. } if path == self.path && self.broken_lines.contains(line))
    }

    /// Collects the settings and entries of the file.
    pub(super) fn contents(&'a self, problems: &mut Vec<Problem>) -> Contents<'a> {
        let mut contents = Contents::default();
        for (name, value) in &self.root {
            match name.get_ref().as_ref() {
                "keys" => contents.keys = self.entries("keys", "key", value, problems),
                "clients" => contents.clients = self.entries("clients", "token_sha256", value, problems),
                section if setting::is_section(section) => match value.get_ref().as_table() {
                    Some(table) => self.section(section, table, &mut contents.settings, problems),
                    None => {
                        let wrong = value::wrong_type(value.get_ref(), "a table");
                        problems.push(self.span_of(value.span()).problem(wrong));
                    }
                },
                unknown => match (renamed::section(unknown), value.get_ref().as_table()) {
                    (Some(_), Some(table)) if !table.is_empty() => {
                        self.section(unknown, table, &mut contents.settings, problems);
                    }
                    (new, _) => {
                        let wrong = match new {
                            Some(new) => renamed_section(unknown, new),
                            None => unknown_section(unknown, value.get_ref()),
                        };
                        problems.push(self.span_of(name.span()).problem(wrong));
                    }
                },
            }
        }
        contents
    }

    fn section(
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
                    problems.push(self.span_of(value.span()).problem(WrongValue::new("this table is empty")));
                }
                self.section(&path, inner, settings, problems);
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
                    let wrong = renamed::in_file(section, name.get_ref(), value.get_ref())
                        .unwrap_or_else(|| unknown_setting(section, name.get_ref()));
                    problems.push(self.span_of(name.span()).problem(wrong));
                }
            }
        }
    }

    fn entries(
        &'a self,
        name: &str,
        field: &str,
        value: &'a Spanned<DeValue<'a>>,
        problems: &mut Vec<Problem>,
    ) -> Vec<TableEntry<'a>> {
        let wrong = || {
            WrongValue::new(format!("`{name}` should be a list of tables")).advise(format!(
                "write [[{name}]], with two brackets, and `{field} = …` below it, once for each"
            ))
        };
        let DeValue::Array(items) = value.get_ref() else {
            problems.push(self.span_of(value.span()).problem(wrong()));
            return Vec::new();
        };
        let mut entries = Vec::new();
        for item in items {
            let span = self.span_of(item.span());
            match item.get_ref().as_table() {
                Some(table) => entries.push(TableEntry { document: self, table, span }),
                None => problems.push(span.problem(wrong())),
            }
        }
        entries
    }

    fn span_of(&self, range: Range<usize>) -> SourceSpan {
        SourceSpan::in_toml(self.path, self.text, range)
    }
}

impl<'a> TableEntry<'a> {
    /// Whether the entry contains a key or a token, not only a file name or a hash.
    pub(super) fn contains_secrets(&self) -> bool {
        ["key", "token"].iter().any(|name| self.table.contains_key(*name))
    }

    /// Reports every field whose name is not in `known`.
    pub(super) fn check_names(&self, known: &[&'static str], problems: &mut Vec<Problem>) {
        for (name, value) in self.table.iter().filter(|(name, _)| !known.contains(&name.get_ref().as_ref())) {
            let span = self.document.span_of(name.span());
            let wrong = renamed::in_client(name.get_ref(), value.get_ref()).unwrap_or_else(|| {
                let wrong = WrongValue::new(format!("unknown key {}", shown(name.get_ref())));
                wrong.suggest(nearest(name.get_ref(), known))
            });
            problems.push(span.problem(wrong));
        }
    }

    /// The string in a field with its position; `None` if the field is missing or no string.
    pub(super) fn text(&self, name: &str, problems: &mut Vec<Problem>) -> Option<(&'a str, SourceSpan)> {
        let value = self.table.get(name)?;
        let span = self.document.span_of(value.span());
        match value::text(Raw::Toml(value.get_ref())) {
            Ok(text) => Some((text, span)),
            Err(wrong) => {
                problems.push(span.problem(wrong));
                None
            }
        }
    }

    /// The integer in a field; `None` if the field is missing or its value is not in `range`.
    pub(super) fn count(
        &self,
        name: &str,
        range: RangeInclusive<u32>,
        problems: &mut Vec<Problem>,
    ) -> Option<u32> {
        let (least, most) = (range.start(), range.end());
        let advice = format!("write a whole number from {least} to {most}");
        self.read(name, problems, |raw| {
            let number = value::whole_number(raw).map_err(|wrong| wrong.advise(advice.clone()))?;
            let fitting = u32::try_from(number).ok().filter(|number| range.contains(number));
            fitting.ok_or_else(|| WrongValue::new(format!("{number} is out of range")).advise(advice.clone()))
        })
    }

    /// The boolean in a field; `None` if the field is missing.
    pub(super) fn switch(&self, name: &str, problems: &mut Vec<Problem>) -> Option<bool> {
        self.read(name, problems, value::switch)
    }

    /// The strings of a field, each parsed by `parse_text`; empty if the field is missing. An empty
    /// list is an error, because it looks like "nothing" and would mean "everything".
    pub(super) fn list(
        &self,
        name: &str,
        parse_text: impl Fn(&str) -> Result<String, WrongValue>,
        problems: &mut Vec<Problem>,
    ) -> Vec<String> {
        let read = |raw: Raw<'_>| match value::texts(raw)?[..] {
            [] => Err(WrongValue::new("this list is empty").advise("remove it, or add a value")),
            ref texts => texts.iter().map(|text| parse_text(text)).collect(),
        };
        self.read(name, problems, read).unwrap_or_default()
    }

    fn read<T>(
        &self,
        name: &str,
        problems: &mut Vec<Problem>,
        read: impl FnOnce(Raw<'_>) -> Result<T, WrongValue>,
    ) -> Option<T> {
        let value = self.table.get(name)?;
        let span = self.document.span_of(value.span());
        read(Raw::Toml(value.get_ref())).map_err(|wrong| problems.push(span.problem(wrong))).ok()
    }

    /// The string of the only field among `names`, with its name and position. Exactly one of these
    /// fields must exist.
    pub(super) fn one_of<'n>(
        &self,
        names: &[&'n str],
        problems: &mut Vec<Problem>,
    ) -> Option<(&'n str, &'a str, SourceSpan)> {
        let listed = names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(" or ");
        let present: Vec<&str> =
            names.iter().copied().filter(|name| self.table.contains_key(*name)).collect();
        match present.as_slice() {
            // After a syntax error the field may exist without having been parsed.
            [] if !self.document.is_fully_parsed() => None,
            [] => {
                problems.push(self.span.problem(WrongValue::new(format!("this entry has no {listed}"))));
                None
            }
            [name] => self.text(name, problems).map(|(text, span)| (*name, text, span)),
            [first, second, ..] => {
                let wrong = WrongValue::new(format!("this entry has `{first}` and `{second}`"));
                problems.push(self.span.problem(wrong.advise(format!("give one of {listed}"))));
                None
            }
        }
    }
}

/// The lines affected by a syntax error in `line`: the line itself, and after an invalid header all
/// lines up to the next header.
fn lines_affected_from(text: &str, line: usize) -> Range<usize> {
    let is_header = |text: &str| text.trim_start().starts_with('[');
    let mut rest = text.lines().skip(line - 1);
    if !rest.next().is_some_and(is_header) {
        return line..line + 1;
    }
    line..line + 1 + rest.take_while(|text| !is_header(text)).count()
}

/// Converts an error message of the parser, which points to the source `text`.
fn syntax_error(message: &str, text: &str) -> WrongValue {
    if message == "duplicate key" {
        return WrongValue::new(format!("{} is given twice", shown(text))).advise("keep one of them");
    }
    let (message, expected) = message.split_once(", expected ").unwrap_or((message, ""));
    // The parser chooses the type of an unquoted word, address or URL by its first character, so its
    // message names that type.
    let unquoted_kinds = ["quoted", "float", "integer", "date", "time", "leading zero", "boolean"];
    let wrong = WrongValue::new(message);
    if unquoted_kinds.iter().any(|kind| message.contains(kind)) {
        return wrong.advise("a text is written in quotes, a number in digits only");
    }
    if expected.is_empty() { wrong } else { wrong.advise(format!("expected {expected}")) }
}

fn renamed_section(old: &str, new: &str) -> WrongValue {
    WrongValue::new(format!("`{old}` has a new name")).advise(format!("write [{new}]"))
}

fn unknown_setting(section: &str, name: &str) -> WrongValue {
    if let Some(new) = renamed::section(section) {
        return renamed_section(section, new);
    }
    let wrong = WrongValue::new(format!("unknown key {} in [{section}]", shown(name)));
    if let Some(other_section) = setting::of_name(name) {
        return wrong.advise(format!("`{name}` belongs in [{}]", other_section.section()));
    }
    let siblings = setting::TABLE.iter().filter(|setting| setting.section() == section).map(Setting::name);
    let near = nearest(name, siblings).map(str::to_owned);
    wrong.suggest(near.or_else(|| nearest_path(name)))
}

fn unknown_section(name: &str, value: &DeValue<'_>) -> WrongValue {
    let is_table = matches!(value, DeValue::Table(_) | DeValue::Array(_));
    let wrong =
        WrongValue::new(format!("unknown {} {}", if is_table { "section" } else { "key" }, shown(name)));
    if let Some(setting) = setting::of_name(name) {
        return wrong.advise(format!("`{name}` belongs in [{}]", setting.section()));
    }
    let sections = setting::TABLE.iter().map(Setting::section).chain(["keys", "clients"]);
    let near = nearest(name, sections).map(str::to_owned);
    wrong.suggest(near.or_else(|| nearest_path(name)))
}

/// The path of the setting with the most similar name in all sections.
fn nearest_path(name: &str) -> Option<String> {
    let names = setting::TABLE.iter().filter(|setting| !setting.is_nested()).map(Setting::name);
    let near = nearest(name, names)?;
    setting::of_name(near).map(|setting| setting.path.to_owned())
}
