//! One event, one line: `✅ Using key sk_…` where a person looks, an object of JSON where a machine
//! does. Anything that could end a line or colour a terminal is escaped.

use std::fmt::{self, Write as _};

use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

use super::Sink;
use crate::clock;
use crate::policy::units::UnixMs;

/// How lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// For a terminal that speaks UTF-8.
    Terminal,
    /// For one that does not.
    Ascii,
    /// For machines: one JSON object a line.
    Json,
}

impl Form {
    /// The form for a terminal with this locale.
    #[must_use]
    pub fn of_terminal(locale: Option<&str>) -> Self {
        let charset = locale.unwrap_or_default().to_ascii_lowercase().replace('-', "");
        if charset.contains("utf8") { Self::Terminal } else { Self::Ascii }
    }
}

/// Writes events as lines.
#[derive(Debug)]
pub struct Lines {
    form: Form,
    sink: Sink,
}

impl Lines {
    /// Lines of this form.
    #[must_use]
    pub fn new(form: Form, sink: Sink) -> Self {
        Self { form, sink }
    }
}

impl<S: Subscriber> Layer<S> for Lines {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let metadata = event.metadata();
        let line = match self.form {
            Form::Json => json(&fields, *metadata.level(), metadata.target(), clock::now()),
            Form::Terminal | Form::Ascii => {
                terminal(&fields, *metadata.level(), metadata.target(), self.form)
            }
        };
        self.sink.write(line.as_bytes());
    }
}

#[derive(Debug, Default)]
struct Fields {
    message: String,
    rest: Map<String, Value>,
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            let _ = write!(self.message, "{value:?}");
        } else {
            self.rest.insert(field.name().to_owned(), Value::String(format!("{value:?}")));
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.rest.insert(field.name().to_owned(), Value::from(value));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.rest.insert(field.name().to_owned(), Value::from(value));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.rest.insert(field.name().to_owned(), Value::from(value));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.rest.insert(field.name().to_owned(), Value::from(value));
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.rest.insert(field.name().to_owned(), Value::from(value));
    }
}

fn json(fields: &Fields, level: Level, target: &str, now: UnixMs) -> String {
    let mut line = Map::new();
    line.insert("time".to_owned(), now.rfc3339().into());
    line.insert("level".to_owned(), level.as_str().to_ascii_lowercase().into());
    if !fields.rest.contains_key("event") {
        line.insert("target".to_owned(), target.into());
    }
    line.insert("message".to_owned(), fields.message.as_str().into());
    line.extend(fields.rest.clone());
    format!("{}\n", Value::Object(line))
}

fn terminal(fields: &Fields, level: Level, target: &str, form: Form) -> String {
    let mut line = String::new();
    let event = fields.rest.get("event").and_then(Value::as_str);
    line.push_str(symbol(event, level, form));
    line.push_str(&fields.message);
    if event.is_none() {
        for (name, value) in &fields.rest {
            let _ = write!(line, " {name}={value}");
        }
        if level > Level::INFO {
            let _ = write!(line, " [{target}]");
        }
    }
    let mut safe: String = line.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    if form == Form::Ascii {
        safe = safe.chars().map(|c| if c.is_ascii() { c } else { '?' }).collect();
    }
    safe.push('\n');
    safe
}

fn symbol(event: Option<&str>, level: Level, form: Form) -> &'static str {
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
    if form == Form::Ascii { ascii } else { picture }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(message: &str, rest: &[(&str, Value)]) -> Fields {
        Fields {
            message: message.to_owned(),
            rest: rest.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect(),
        }
    }

    #[test]
    fn a_line_has_the_symbol_of_its_event() {
        let using = fields("Using key sk", &[("event", "key_in_use".into()), ("key", "sk".into())]);
        assert_eq!(terminal(&using, Level::INFO, "t", Form::Terminal), "✅ Using key sk\n");
        assert_eq!(terminal(&using, Level::INFO, "t", Form::Ascii), "[ok] Using key sk\n");
    }

    #[test]
    fn other_events_show_their_fields() {
        let other = fields("said", &[("n", 7.into())]);
        assert_eq!(terminal(&other, Level::WARN, "t", Form::Terminal), "⚠️ said n=7\n");
        assert_eq!(terminal(&other, Level::DEBUG, "t", Form::Ascii), "    said n=7 [t]\n");
    }

    #[test]
    fn nothing_ends_a_line_or_colours_a_terminal() {
        let evil = fields("a\r\nb\u{1b}[31m\u{9b}", &[("n", "x\ny".into())]);
        let line = terminal(&evil, Level::INFO, "t", Form::Terminal);
        assert_eq!(line.matches('\n').count(), 1);
        assert!(!line.trim_end().chars().any(char::is_control), "{line:?}");
        let line = json(&evil, Level::INFO, "t", UnixMs(0));
        assert_eq!(line.matches('\n').count(), 1);
    }

    #[test]
    fn an_ascii_line_is_ascii() {
        let line = terminal(&fields("naïve …", &[]), Level::ERROR, "t", Form::Ascii);
        assert_eq!(line, "[error] na?ve ?\n");
    }

    #[test]
    fn a_machine_gets_an_object_a_line() {
        let event = fields("m", &[("event", "e".into()), ("n", 7.into())]);
        let value: Value = serde_json::from_str(&json(&event, Level::WARN, "t", UnixMs(0))).unwrap();
        assert_eq!(
            value,
            serde_json::json!({"time":"1970-01-01T00:00:00.000Z","level":"warn","message":"m","event":"e","n":7})
        );
    }

    #[test]
    fn a_terminal_without_utf_8_gets_ascii() {
        for (locale, form) in [
            (Some("en_US.UTF-8"), Form::Terminal),
            (Some("C.utf8"), Form::Terminal),
            (Some("C"), Form::Ascii),
            (Some("de_DE.ISO-8859-1"), Form::Ascii),
            (None, Form::Ascii),
        ] {
            assert_eq!(Form::of_terminal(locale), form);
        }
    }
}
