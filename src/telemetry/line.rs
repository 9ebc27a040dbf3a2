//! Formats each `tracing` event as one line and writes it: `✅ Using key sk_…` for a terminal, and a JSON object
//! otherwise. Characters that could end the line or control a terminal are escaped or replaced.

use std::cell::Cell;
use std::cmp::Ordering;
use std::fmt;
use std::io::Write;
use std::mem;
use std::ops::Range;

use serde::Serialize;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::Context;

use super::text::{
    append_escaped_in_quotes, append_formatted, append_quoted, escape_from, replace_unprintable,
};
use crate::clock;
use crate::policy::units::UnixMs;

/// The format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LineFormat {
    /// A text line for a terminal with UTF-8.
    Terminal,
    /// A text line for a terminal that supports only ASCII.
    Ascii,
    /// A JSON object for other programs.
    Json,
}

impl LineFormat {
    /// Returns the format for a terminal: `Terminal` if the locale's character set is UTF-8, otherwise `Ascii`.
    /// `None` stands for an unset locale.
    #[must_use]
    pub fn for_terminal(locale: Option<&str>) -> Self {
        let charset = locale.unwrap_or_default().to_ascii_lowercase().replace('-', "");
        if charset.contains("utf8") { Self::Terminal } else { Self::Ascii }
    }
}

/// A `tracing` layer that writes each event as a line.
#[derive(Debug)]
pub struct LineLayer<W> {
    format: LineFormat,
    writer: W,
}

impl<W> LineLayer<W> {
    /// Creates a layer that writes lines of `format` to `writer`.
    #[must_use]
    pub fn new(format: LineFormat, writer: W) -> Self {
        Self { format, writer }
    }
}

thread_local! {
    /// The draft of the thread, whose memory is reused for each line.
    static DRAFT: Cell<LineDraft> = const { Cell::new(LineDraft::EMPTY) };
}

/// Maximum size of a buffer that is reused. A larger buffer, which a long line has needed, is freed.
const MAX_KEPT_DRAFT_BYTES: usize = 16 * 1024;

impl<S: Subscriber, W: for<'a> MakeWriter<'a> + 'static> Layer<S> for LineLayer<W> {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        // If formatting a value logs another event, that event uses an empty draft.
        let mut draft = DRAFT.try_with(Cell::take).unwrap_or_default();
        draft.begin(self.format);
        event.record(&mut draft);
        let metadata = event.metadata();
        let line = draft.finish(*metadata.level(), metadata.target(), clock::now());
        // A failing log output must not affect requests.
        let _ = self.writer.make_writer_for(metadata).write_all(line);
        if draft.values.capacity() <= MAX_KEPT_DRAFT_BYTES && draft.line.capacity() <= MAX_KEPT_DRAFT_BYTES {
            let _ = DRAFT.try_with(|cell| cell.set(draft));
        }
    }
}

/// A line under construction.
#[derive(Debug)]
pub(super) struct LineDraft {
    format: LineFormat,
    /// The formatted message and fields, in the order in which they were recorded.
    values: Vec<u8>,
    /// The message in `values`.
    message: Range<usize>,
    /// The fields in `values`, in alphabetical order.
    fields: Vec<FieldRange>,
    /// The completed line.
    line: Vec<u8>,
}

/// The position of a field in the formatted values.
#[derive(Debug)]
struct FieldRange {
    name: &'static str,
    range: Range<usize>,
}

impl Default for LineDraft {
    fn default() -> Self {
        Self::EMPTY
    }
}

impl LineDraft {
    const EMPTY: Self = Self {
        format: LineFormat::Json,
        values: Vec::new(),
        message: 0..0,
        fields: Vec::new(),
        line: Vec::new(),
    };

    /// Starts a new line of `format`.
    pub(super) fn begin(&mut self, format: LineFormat) {
        self.format = format;
        self.values.clear();
        self.message = 0..0;
        self.fields.clear();
        self.line.clear();
    }

    /// Sets the message of the line.
    pub(super) fn set_message(&mut self, message: fmt::Arguments<'_>) {
        let start = self.values.len();
        append_formatted(&mut self.values, message);
        if self.format == LineFormat::Json {
            escape_from(&mut self.values, start);
        }
        self.message = start..self.values.len();
    }

    /// Adds a field with a string.
    pub(super) fn add_text(&mut self, name: &'static str, value: &str) {
        self.add_field(name, |values| append_quoted(values, value));
    }

    /// Adds a field with a number or a boolean.
    pub(super) fn add_value(&mut self, name: &'static str, value: impl Serialize) {
        self.add_field(name, |values| {
            let _ = serde_json::to_writer(values, &value);
        });
    }

    /// Adds a field, or replaces an earlier one of the same name.
    fn add_field(&mut self, name: &'static str, append: impl FnOnce(&mut Vec<u8>)) {
        let start = self.values.len();
        append_name(&mut self.values, self.format, name);
        append(&mut self.values);
        let field = FieldRange { name, range: start..self.values.len() };
        // Fields that are recorded in alphabetical order need no search.
        if self.fields.last().is_none_or(|last| compare_names(last.name, name).is_lt()) {
            return self.fields.push(field);
        }
        match self.fields.binary_search_by(|existing| compare_names(existing.name, name)) {
            Ok(index) => self.fields[index] = field,
            Err(index) => self.fields.insert(index, field),
        }
    }

    /// Completes the line, and returns it with its line break.
    pub(super) fn finish(&mut self, level: Level, target: &str, now: UnixMs) -> &[u8] {
        match self.format {
            LineFormat::Json => self.write_json(level, target, now),
            LineFormat::Terminal | LineFormat::Ascii => self.write_text(level, target),
        }
        self.line.push(b'\n');
        &self.line
    }

    fn write_json(&mut self, level: Level, target: &str, now: UnixMs) {
        let Self { values, message, fields, line, .. } = self;
        let has_event = fields.iter().any(|field| field.name == EVENT);
        let mut standard_fields: &[(&str, StandardField)] =
            if has_event { &FIELDS_OF_NAMED_EVENTS } else { &FIELDS_OF_UNNAMED_EVENTS };
        let append_standard_field = |line: &mut Vec<u8>, (name, field): (&str, StandardField)| {
            append_name(line, LineFormat::Json, name);
            match field {
                StandardField::Level => append_quoted(line, level_name(level)),
                StandardField::Message => append_escaped_in_quotes(line, &values[message.clone()]),
                StandardField::Target => append_quoted(line, target),
                StandardField::Time => append_escaped_in_quotes(line, &now.rfc3339_bytes()),
            }
        };
        // Adjacent fields are copied together.
        let mut pending = 0..0;
        for field in &*fields {
            while let [standard_field, later @ ..] = standard_fields
                && compare_names(standard_field.0, field.name).is_le()
            {
                // A field of the event replaces the standard field of the same name.
                if standard_field.0 != field.name {
                    line.extend_from_slice(&values[mem::take(&mut pending)]);
                    append_standard_field(line, *standard_field);
                }
                standard_fields = later;
            }
            if pending.end != field.range.start {
                line.extend_from_slice(&values[mem::take(&mut pending)]);
                pending.start = field.range.start;
            }
            pending.end = field.range.end;
        }
        line.extend_from_slice(&values[pending]);
        standard_fields.iter().for_each(|standard_field| append_standard_field(line, *standard_field));
        // Each field starts with a comma. The first comma is replaced by the start of the object.
        if let Some(first) = line.first_mut() {
            *first = b'{';
        }
        line.push(b'}');
    }

    fn write_text(&mut self, level: Level, target: &str) {
        let Self { values, message, fields, line, format } = self;
        let event = fields.iter().find(|field| field.name == EVENT).and_then(|field| {
            let name = values[field.range.clone()].strip_prefix(b" event=\"")?.strip_suffix(b"\"")?;
            str::from_utf8(name).ok()
        });
        line.extend_from_slice(event_symbol(event, level, *format).as_bytes());
        line.extend_from_slice(&values[message.clone()]);
        if event.is_none() {
            fields.iter().for_each(|field| line.extend_from_slice(&values[field.range.clone()]));
            if level > Level::INFO {
                append_formatted(line, format_args!(" [{target}]"));
            }
        }
        replace_unprintable(line, *format == LineFormat::Ascii);
    }
}

impl Visit for LineDraft {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let name = field.name();
        if name == MESSAGE {
            return self.set_message(format_args!("{value:?}"));
        }
        self.add_field(name, |values| {
            values.push(b'"');
            let start = values.len();
            append_formatted(values, format_args!("{value:?}"));
            escape_from(values, start);
            values.push(b'"');
        });
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            MESSAGE => self.set_message(format_args!("{value}")),
            name => self.add_text(name, value),
        }
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.add_value(field.name(), value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.add_value(field.name(), value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.add_value(field.name(), value);
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.add_value(field.name(), value);
    }
}

/// The name of the field that `tracing` uses for the message.
const MESSAGE: &str = "message";
/// The name of the field that contains the name of the event.
const EVENT: &str = "event";

/// A field that the formatter adds to a JSON object.
#[derive(Clone, Copy, Debug)]
enum StandardField {
    /// The level of the event.
    Level,
    /// The message of the event.
    Message,
    /// The module that logged the event.
    Target,
    /// The time of the event in RFC 3339.
    Time,
}

/// The standard fields of an event with an `event` field, in alphabetical order.
const FIELDS_OF_NAMED_EVENTS: [(&str, StandardField); 3] =
    [("level", StandardField::Level), (MESSAGE, StandardField::Message), ("time", StandardField::Time)];
/// The standard fields of an event without an `event` field, in alphabetical order.
const FIELDS_OF_UNNAMED_EVENTS: [(&str, StandardField); 4] = [
    ("level", StandardField::Level),
    (MESSAGE, StandardField::Message),
    ("target", StandardField::Target),
    ("time", StandardField::Time),
];

/// Compares names like `str`. The first letters are compared separately, because most names differ there.
fn compare_names(name: &str, other: &str) -> Ordering {
    name.as_bytes().first().cmp(&other.as_bytes().first()).then_with(|| name.cmp(other))
}

/// Appends the separator and the name before a value. Names are constants of the source code and need no escape.
fn append_name(values: &mut Vec<u8>, format: LineFormat, name: &str) {
    let (before, after): (&[u8], &[u8]) = match format {
        LineFormat::Json => (b",\"", b"\":"),
        LineFormat::Terminal | LineFormat::Ascii => (b" ", b"="),
    };
    values.extend_from_slice(before);
    values.extend_from_slice(name.as_bytes());
    values.extend_from_slice(after);
}

fn level_name(level: Level) -> &'static str {
    match level {
        Level::ERROR => "error",
        Level::WARN => "warn",
        Level::INFO => "info",
        Level::DEBUG => "debug",
        Level::TRACE => "trace",
    }
}

/// Returns the symbol at the start of a text line.
fn event_symbol(event: Option<&str>, level: Level, format: LineFormat) -> &'static str {
    let (symbol, ascii) = match event {
        Some("keys_loaded" | "key_in_use" | "key_returned") => ("✅ ", "[ok] "),
        Some("key_near_limit") => ("⚠️ ", "[!] "),
        Some("key_exhausted" | "key_invalid") => ("🚫 ", "[x] "),
        Some("key_rate_limited") => ("⏳ ", "[wait] "),
        Some("key_rotated") => ("🔄 ", "[next] "),
        _ if level == Level::ERROR => ("❌ ", "[error] "),
        _ if level == Level::WARN => ("⚠️ ", "[!] "),
        Some("server_started") => ("", ""),
        _ => ("   ", "    "),
    };
    if format == LineFormat::Ascii { ascii } else { symbol }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;
    use tracing_subscriber::layer::SubscriberExt;

    use super::super::log::LogSink;
    use super::*;

    /// Formats an event with the given `message` and `fields`.
    fn format_line(
        format: LineFormat,
        level: Level,
        message: &str,
        fields: &[(&'static str, Value)],
    ) -> String {
        let mut draft = LineDraft::default();
        // The second line proves that the first line leaves no values in the draft.
        for _ in 0..2 {
            draft.begin(format);
            fields.iter().for_each(|(name, value)| draft.add_value(name, value));
            draft.set_message(format_args!("{message}"));
            draft.finish(level, "t", UnixMs(7));
        }
        String::from_utf8(draft.line).unwrap()
    }

    #[test]
    fn a_line_has_the_symbol_of_its_event() {
        let fields = [("event", "key_in_use".into()), ("key", "sk".into())];
        assert_eq!(
            format_line(LineFormat::Terminal, Level::INFO, "Using key sk", &fields),
            "✅ Using key sk\n"
        );
        assert_eq!(
            format_line(LineFormat::Ascii, Level::INFO, "Using key sk", &fields),
            "[ok] Using key sk\n"
        );
    }

    #[test]
    fn the_fields_of_an_unnamed_event_follow_its_message() {
        let fields = [("n", 7.into()), ("a", "b c".into())];
        assert_eq!(
            format_line(LineFormat::Terminal, Level::WARN, "message", &fields),
            "⚠️ message a=\"b c\" n=7\n"
        );
        assert_eq!(
            format_line(LineFormat::Ascii, Level::DEBUG, "message", &fields),
            "    message a=\"b c\" n=7 [t]\n"
        );
    }

    #[test]
    fn control_characters_are_replaced_or_escaped() {
        let (message, fields) = ("a\r\nb\u{1b}[31m\u{9b}\u{7f}", [("n", "x\ny\u{9b}".into())]);
        let terminal_line = format_line(LineFormat::Terminal, Level::INFO, message, &fields);
        assert_eq!(terminal_line, "   a\u{fffd}\u{fffd}b\u{fffd}[31m\u{fffd}\u{fffd} n=\"x\\ny\u{fffd}\"\n");
        let ascii_line = format_line(LineFormat::Ascii, Level::INFO, message, &fields);
        assert_eq!(ascii_line, "    a??b?[31m?? n=\"x\\ny?\"\n");
        let json_line = format_line(LineFormat::Json, Level::INFO, message, &fields);
        assert_eq!(
            json_line,
            "{\"level\":\"info\",\"message\":\"a\\r\\nb\\u001b[31m\u{9b}\u{7f}\",\"n\":\"x\\ny\u{9b}\",\
             \"target\":\"t\",\"time\":\"1970-01-01T00:00:00.007Z\"}\n"
        );
    }

    #[test]
    fn an_ascii_line_is_ascii() {
        assert_eq!(format_line(LineFormat::Ascii, Level::ERROR, "naïve …", &[]), "[error] na?ve ...\n");
    }

    #[test]
    fn a_json_line_is_one_object_with_sorted_fields() {
        let fields =
            [("z", true.into()), ("event", "e".into()), ("n", 7.into()), ("a", Value::from(f64::NAN))];
        assert_eq!(
            format_line(LineFormat::Json, Level::WARN, "m", &fields),
            "{\"a\":null,\"event\":\"e\",\"level\":\"warn\",\"message\":\"m\",\"n\":7,\
             \"time\":\"1970-01-01T00:00:00.007Z\",\"z\":true}\n"
        );
    }

    #[test]
    fn a_later_field_replaces_an_earlier_one_and_a_standard_one() {
        let fields = [("n", 1.into()), ("time", "soon".into()), ("n", 2.into()), ("level", "x".into())];
        assert_eq!(
            format_line(LineFormat::Json, Level::WARN, "m", &fields),
            "{\"level\":\"x\",\"message\":\"m\",\"n\":2,\"target\":\"t\",\"time\":\"soon\"}\n"
        );
    }

    /// Returns the lines of the events that `log_events` logs.
    fn logged_lines(format: LineFormat, log_events: impl FnOnce()) -> String {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let lines = tracing_subscriber::registry().with(LineLayer::new(format, LogSink::new(writer)));
        tracing::subscriber::with_default(lines, log_events);
        let mut written_lines = String::new();
        std::io::Read::read_to_string(&mut reader, &mut written_lines).unwrap();
        written_lines
    }

    #[test]
    fn the_fields_of_an_event_keep_their_types() {
        let log_events = || {
            tracing::info!(
                target: "tests",
                text = "a\"b",
                number = 7_u16,
                negative = -7_i64,
                share = 0.5,
                is_true = true,
                shown = %"a\\b",
                debugged = ?Some("c"),
                absent = Option::<u64>::None,
                "a {}",
                "message"
            );
        };
        let json_line = logged_lines(LineFormat::Json, log_events);
        let (start, rest) = json_line.split_once("\"time\":\"").unwrap();
        assert_eq!(
            start,
            r#"{"debugged":"Some(\"c\")","is_true":true,"level":"info","message":"a message","negative":-7,"number":7,"share":0.5,"shown":"a\\b","target":"tests","text":"a\"b","#
        );
        // The time has 24 characters. The quotation mark, the brace and the line break follow it.
        assert_eq!((&rest[24..], rest.len()), ("\"}\n", 27));
        assert_eq!(
            logged_lines(LineFormat::Terminal, log_events),
            "   a message debugged=\"Some(\\\"c\\\")\" is_true=true negative=-7 number=7 share=0.5 shown=\"a\\\\b\" \
             text=\"a\\\"b\"\n"
        );
    }

    #[test]
    fn a_terminal_without_utf_8_gets_ascii_lines() {
        for (locale, format) in [
            (Some("en_US.UTF-8"), LineFormat::Terminal),
            (Some("C.utf8"), LineFormat::Terminal),
            (Some("C"), LineFormat::Ascii),
            (Some("de_DE.ISO-8859-1"), LineFormat::Ascii),
            (None, LineFormat::Ascii),
        ] {
            assert_eq!(
                LineFormat::for_terminal(locale),
                format,
                "the locale {locale:?} must have this format"
            );
        }
    }
}
