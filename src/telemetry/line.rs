//! Formats an event as one line: `✅ Using key sk_…` on a terminal, a JSON object otherwise. Characters that
//! could end a line or control a terminal are escaped.

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

use super::text::{append_quoted, append_shown, append_within_quotes, escape_from, make_safe};
use crate::clock;
use crate::policy::units::UnixMs;

/// The format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LineFormat {
    /// For a terminal with UTF-8.
    Terminal,
    /// For a terminal without UTF-8.
    Ascii,
    /// For machines: one JSON object per line.
    Json,
}

impl LineFormat {
    /// The form for a terminal with this locale.
    #[must_use]
    pub fn of_terminal(locale: Option<&str>) -> Self {
        let charset = locale.unwrap_or_default().to_ascii_lowercase().replace('-', "");
        if charset.contains("utf8") { Self::Terminal } else { Self::Ascii }
    }
}

/// A `tracing` layer that writes each event as a line.
#[derive(Debug)]
pub struct Lines<W> {
    form: LineFormat,
    writer: W,
}

impl<W> Lines<W> {
    /// A layer that writes lines of this form to `writer`.
    #[must_use]
    pub fn new(form: LineFormat, writer: W) -> Self {
        Self { form, writer }
    }
}

thread_local! {
    /// The draft of this thread, whose memory is reused for each line.
    static DRAFT: Cell<LineDraft> = const { Cell::new(LineDraft::EMPTY) };
}

/// A draft that a long line has enlarged beyond this is freed.
const DRAFT_BYTES_MAX: usize = 16 * 1024;

impl<S: Subscriber, W: for<'a> MakeWriter<'a> + 'static> Layer<S> for Lines<W> {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        // A value that logs an event while it is formatted finds an empty draft here.
        let mut draft = DRAFT.try_with(Cell::take).unwrap_or_default();
        draft.begin(self.form);
        event.record(&mut draft);
        let metadata = event.metadata();
        let line = draft.line(*metadata.level(), metadata.target(), clock::now());
        // A failing log output must not stop the traffic.
        let _ = self.writer.make_writer_for(metadata).write_all(line);
        if draft.values.capacity() <= DRAFT_BYTES_MAX && draft.line.capacity() <= DRAFT_BYTES_MAX {
            let _ = DRAFT.try_with(|kept| kept.set(draft));
        }
    }
}

/// A line under construction.
#[derive(Debug)]
pub(super) struct LineDraft {
    form: LineFormat,
    /// The message and the fields, formatted for the line, in the order in which they were recorded.
    values: Vec<u8>,
    message: Range<usize>,
    /// The ranges of the fields, in alphabetical order.
    fields: Vec<FieldRange>,
    line: Vec<u8>,
}

#[derive(Debug)]
struct FieldRange {
    name: &'static str,
    at: Range<usize>,
}

impl Default for LineDraft {
    fn default() -> Self {
        Self::EMPTY
    }
}

impl LineDraft {
    const EMPTY: Self = Self {
        form: LineFormat::Json,
        values: Vec::new(),
        message: 0..0,
        fields: Vec::new(),
        line: Vec::new(),
    };

    /// Begins a line of this form.
    pub(super) fn begin(&mut self, form: LineFormat) {
        self.form = form;
        self.values.clear();
        self.message = 0..0;
        self.fields.clear();
        self.line.clear();
    }

    /// Sets the message of the line.
    pub(super) fn message(&mut self, message: fmt::Arguments<'_>) {
        let start = self.values.len();
        append_shown(&mut self.values, message);
        match self.form {
            LineFormat::Json => escape_from(&mut self.values, start),
            LineFormat::Terminal | LineFormat::Ascii => {}
        }
        self.message = start..self.values.len();
    }

    /// Adds a field with a text.
    pub(super) fn text(&mut self, name: &'static str, value: &str) {
        self.put(name, |values| append_quoted(values, value));
    }

    /// Adds a field with a number or a boolean.
    pub(super) fn value(&mut self, name: &'static str, value: impl Serialize) {
        self.put(name, |values| {
            let _ = serde_json::to_writer(values, &value);
        });
    }

    /// Adds a field; it replaces an earlier one of the same name.
    fn put(&mut self, name: &'static str, append: impl FnOnce(&mut Vec<u8>)) {
        let start = self.values.len();
        append_name(&mut self.values, self.form, name);
        append(&mut self.values);
        let part = FieldRange { name, at: start..self.values.len() };
        // Fields that are recorded in alphabetical order need no search.
        if self.fields.last().is_none_or(|last| order(last.name, name).is_lt()) {
            return self.fields.push(part);
        }
        match self.fields.binary_search_by(|field| order(field.name, name)) {
            Ok(index) => self.fields[index] = part,
            Err(index) => self.fields.insert(index, part),
        }
    }

    /// The finished line, with its line break.
    pub(super) fn line(&mut self, level: Level, target: &str, now: UnixMs) -> &[u8] {
        match self.form {
            LineFormat::Json => self.json(level, target, now),
            LineFormat::Terminal | LineFormat::Ascii => self.terminal(level, target),
        }
        self.line.push(b'\n');
        &self.line
    }

    fn json(&mut self, level: Level, target: &str, now: UnixMs) {
        let Self { values, message, fields, line, .. } = self;
        let has_event = fields.iter().any(|part| part.name == EVENT);
        let mut standard_fields: &[(&str, Own)] = if has_event { &NAMED } else { &UNNAMED };
        let append_own = |line: &mut Vec<u8>, own: (&str, Own)| {
            append_name(line, LineFormat::Json, own.0);
            match own.1 {
                Own::Level => append_quoted(line, level_name(level)),
                Own::Message => append_within_quotes(line, &values[message.clone()]),
                Own::Target => append_quoted(line, target),
                Own::Time => append_within_quotes(line, &now.rfc3339_bytes()),
            }
        };
        // Consecutive fields are copied in one piece.
        let mut run = 0..0;
        for part in &*fields {
            while let [own, later @ ..] = standard_fields
                && order(own.0, part.name).is_le()
            {
                // A field of the event takes precedence over a standard field.
                if own.0 != part.name {
                    line.extend_from_slice(&values[mem::take(&mut run)]);
                    append_own(line, *own);
                }
                standard_fields = later;
            }
            if run.end != part.at.start {
                line.extend_from_slice(&values[mem::take(&mut run)]);
                run.start = part.at.start;
            }
            run.end = part.at.end;
        }
        line.extend_from_slice(&values[run]);
        standard_fields.iter().for_each(|own| append_own(line, *own));
        // The object starts with a comma.
        if let Some(first) = line.first_mut() {
            *first = b'{';
        }
        line.push(b'}');
    }

    fn terminal(&mut self, level: Level, target: &str) {
        let Self { values, message, fields, line, form } = self;
        let event = fields.iter().find(|part| part.name == EVENT).and_then(|part| {
            let text = values[part.at.clone()].strip_prefix(b" event=\"")?.strip_suffix(b"\"")?;
            str::from_utf8(text).ok()
        });
        line.extend_from_slice(symbol(event, level, *form).as_bytes());
        line.extend_from_slice(&values[message.clone()]);
        if event.is_none() {
            fields.iter().for_each(|part| line.extend_from_slice(&values[part.at.clone()]));
            if level > Level::INFO {
                append_shown(line, format_args!(" [{target}]"));
            }
        }
        make_safe(line, *form == LineFormat::Ascii);
    }
}

impl Visit for LineDraft {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let name = field.name();
        if name == MESSAGE {
            return self.message(format_args!("{value:?}"));
        }
        self.put(name, |values| {
            values.push(b'"');
            let start = values.len();
            append_shown(values, format_args!("{value:?}"));
            escape_from(values, start);
            values.push(b'"');
        });
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            MESSAGE => self.message(format_args!("{value}")),
            name => self.text(name, value),
        }
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.value(field.name(), value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.value(field.name(), value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.value(field.name(), value);
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.value(field.name(), value);
    }
}

const MESSAGE: &str = "message";
const EVENT: &str = "event";

/// The fields that every JSON object has.
#[derive(Clone, Copy, Debug)]
enum Own {
    Level,
    Message,
    Target,
    Time,
}

/// The standard fields in alphabetical order; an event without a name has its target as well.
const NAMED: [(&str, Own); 3] = [("level", Own::Level), (MESSAGE, Own::Message), ("time", Own::Time)];
const UNNAMED: [(&str, Own); 4] =
    [("level", Own::Level), (MESSAGE, Own::Message), ("target", Own::Target), ("time", Own::Time)];

/// The order of `str`. Most names differ in their first letter, which is compared first.
fn order(name: &str, other: &str) -> Ordering {
    name.as_bytes().first().cmp(&other.as_bytes().first()).then_with(|| name.cmp(other))
}

/// Appends the name before a value. Names come from the source code, so they need no escape.
fn append_name(values: &mut Vec<u8>, form: LineFormat, name: &str) {
    match form {
        LineFormat::Json => {
            values.extend_from_slice(b",\"");
            values.extend_from_slice(name.as_bytes());
            values.extend_from_slice(b"\":");
        }
        LineFormat::Terminal | LineFormat::Ascii => {
            values.push(b' ');
            values.extend_from_slice(name.as_bytes());
            values.push(b'=');
        }
    }
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

fn symbol(event: Option<&str>, level: Level, form: LineFormat) -> &'static str {
    let (picture, ascii) = match event {
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
    if form == LineFormat::Ascii { ascii } else { picture }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;
    use tracing_subscriber::layer::SubscriberExt;

    use super::super::log::Sink;
    use super::*;

    /// The line of an event with this message and these fields.
    fn line(form: LineFormat, level: Level, message: &str, rest: &[(&'static str, Value)]) -> String {
        let mut draft = LineDraft::default();
        // The second run shows that the first one leaves no traces.
        for _ in 0..2 {
            draft.begin(form);
            rest.iter().for_each(|(name, value)| draft.value(name, value));
            draft.message(format_args!("{message}"));
            draft.line(level, "t", UnixMs(7));
        }
        String::from_utf8(draft.line).unwrap()
    }

    #[test]
    fn a_line_has_the_symbol_of_its_event() {
        let using = [("event", "key_in_use".into()), ("key", "sk".into())];
        assert_eq!(line(LineFormat::Terminal, Level::INFO, "Using key sk", &using), "✅ Using key sk\n");
        assert_eq!(line(LineFormat::Ascii, Level::INFO, "Using key sk", &using), "[ok] Using key sk\n");
    }

    #[test]
    fn other_events_show_their_fields() {
        let other = [("n", 7.into()), ("a", "b c".into())];
        assert_eq!(line(LineFormat::Terminal, Level::WARN, "said", &other), "⚠️ said a=\"b c\" n=7\n");
        assert_eq!(line(LineFormat::Ascii, Level::DEBUG, "said", &other), "    said a=\"b c\" n=7 [t]\n");
    }

    #[test]
    fn control_characters_are_replaced_or_escaped() {
        let (message, rest) = ("a\r\nb\u{1b}[31m\u{9b}\u{7f}", [("n", "x\ny\u{9b}".into())]);
        let shown = line(LineFormat::Terminal, Level::INFO, message, &rest);
        assert_eq!(shown, "   a\u{fffd}\u{fffd}b\u{fffd}[31m\u{fffd}\u{fffd} n=\"x\\ny\u{fffd}\"\n");
        let shown = line(LineFormat::Ascii, Level::INFO, message, &rest);
        assert_eq!(shown, "    a??b?[31m?? n=\"x\\ny?\"\n");
        let object = line(LineFormat::Json, Level::INFO, message, &rest);
        assert_eq!(
            object,
            "{\"level\":\"info\",\"message\":\"a\\r\\nb\\u001b[31m\u{9b}\u{7f}\",\"n\":\"x\\ny\u{9b}\",\
             \"target\":\"t\",\"time\":\"1970-01-01T00:00:00.007Z\"}\n"
        );
    }

    #[test]
    fn an_ascii_line_is_ascii() {
        assert_eq!(line(LineFormat::Ascii, Level::ERROR, "naïve …", &[]), "[error] na?ve ...\n");
    }

    #[test]
    fn a_json_line_is_one_object_with_sorted_fields() {
        let rest = [("z", true.into()), ("event", "e".into()), ("n", 7.into()), ("a", Value::from(f64::NAN))];
        assert_eq!(
            line(LineFormat::Json, Level::WARN, "m", &rest),
            "{\"a\":null,\"event\":\"e\",\"level\":\"warn\",\"message\":\"m\",\"n\":7,\
             \"time\":\"1970-01-01T00:00:00.007Z\",\"z\":true}\n"
        );
    }

    #[test]
    fn a_later_field_replaces_an_earlier_one_and_a_standard_one() {
        let rest = [("n", 1.into()), ("time", "soon".into()), ("n", 2.into()), ("level", "x".into())];
        assert_eq!(
            line(LineFormat::Json, Level::WARN, "m", &rest),
            "{\"level\":\"x\",\"message\":\"m\",\"n\":2,\"target\":\"t\",\"time\":\"soon\"}\n"
        );
    }

    /// The lines of the events that `log_events` logs.
    fn lines_of(form: LineFormat, log_events: impl FnOnce()) -> String {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let lines = tracing_subscriber::registry().with(Lines::new(form, Sink::new(writer)));
        tracing::subscriber::with_default(lines, log_events);
        let mut text = String::new();
        std::io::Read::read_to_string(&mut reader, &mut text).unwrap();
        text
    }

    #[test]
    fn events_keep_their_fields_and_their_kinds() {
        let log_events = || {
            tracing::info!(
                target: "tests",
                text = "a\"b",
                number = 7_u16,
                below = -7_i64,
                share = 0.5,
                is_true = true,
                shown = %"a\\b",
                debugged = ?Some("c"),
                absent = Option::<u64>::None,
                "{} said",
                "it"
            );
        };
        let text = lines_of(LineFormat::Json, log_events);
        let (start, rest) = text.split_once("\"time\":\"").unwrap();
        assert_eq!(
            start,
            r#"{"below":-7,"debugged":"Some(\"c\")","is_true":true,"level":"info","message":"it said","number":7,"share":0.5,"shown":"a\\b","target":"tests","text":"a\"b","#
        );
        assert_eq!((&rest[24..], rest.len()), ("\"}\n", 27));
        assert_eq!(
            lines_of(LineFormat::Terminal, log_events),
            "   it said below=-7 debugged=\"Some(\\\"c\\\")\" is_true=true number=7 share=0.5 shown=\"a\\\\b\" \
             text=\"a\\\"b\"\n"
        );
    }

    #[test]
    fn a_terminal_without_utf_8_gets_ascii() {
        for (locale, form) in [
            (Some("en_US.UTF-8"), LineFormat::Terminal),
            (Some("C.utf8"), LineFormat::Terminal),
            (Some("C"), LineFormat::Ascii),
            (Some("de_DE.ISO-8859-1"), LineFormat::Ascii),
            (None, LineFormat::Ascii),
        ] {
            assert_eq!(LineFormat::of_terminal(locale), form);
        }
    }
}
