//! The access log: the line about a request at its end. A busy proxy logs it more often than all other events
//! together, so its values are queued as they are, and the log thread formats them.

use serde::Serialize;
use tracing::Level;

use super::line::{Form, symbol, word};
use super::text::{append_escaped, append_quoted, append_within_quotes, make_safe};
use crate::elevenlabs::endpoint::Route;
use crate::policy::units::UnixMs;

const EVENT: &str = "request_ended";
pub(super) const LEVEL: Level = Level::INFO;

/// The access log entry of one request. `T` is a text, or its length in a batch of texts.
#[derive(Clone, Copy, Debug)]
pub struct AccessLogEntry<T> {
    /// Number of attempts at the provider.
    pub attempts: u32,
    /// Bytes of the response body.
    pub bytes: u64,
    /// The name of the client; `-` when it was not identified.
    pub client: T,
    /// Credits charged for the request.
    pub credits: u64,
    /// Milliseconds from the start of the attempt to the provider's response head.
    pub first_byte_ms: u64,
    /// The short form of the key; `own` when the client brought it, `-` when there was no attempt.
    pub key: T,
    /// The HTTP method.
    pub method: T,
    /// The names of the query parameters; values are not logged.
    pub parameters: T,
    /// Why the body could not have been sent again; `None` when it could.
    pub replay_lost: Option<&'static str>,
    /// The identifier of the request.
    pub request_id: T,
    /// The path without identifiers, where the endpoint is known.
    pub route: Option<Route>,
    /// The status of the response, when there is one.
    pub status: Option<u16>,
    /// When the request ended.
    pub time: UnixMs,
    /// Milliseconds from the request head to the end.
    pub total_ms: u64,
    /// The verdict on the request.
    pub verdict: &'static str,
}

impl<T: Copy> AccessLogEntry<T> {
    /// The same entry with other texts, converted in the alphabetical order of the fields.
    fn with<U>(&self, mut text: impl FnMut(T) -> U) -> AccessLogEntry<U> {
        AccessLogEntry {
            attempts: self.attempts,
            bytes: self.bytes,
            client: text(self.client),
            credits: self.credits,
            first_byte_ms: self.first_byte_ms,
            key: text(self.key),
            method: text(self.method),
            parameters: text(self.parameters),
            replay_lost: self.replay_lost,
            request_id: text(self.request_id),
            route: self.route,
            status: self.status,
            time: self.time,
            total_ms: self.total_ms,
            verdict: self.verdict,
        }
    }
}

impl AccessLogEntry<&str> {
    /// The total length of the texts in bytes.
    pub(super) fn texts_bytes(&self) -> usize {
        let mut bytes = 0;
        self.with(|text| bytes += text.len());
        bytes
    }

    /// Appends the texts to `texts` and replaces them by their lengths.
    pub(super) fn packed(&self, texts: &mut Vec<u8>) -> AccessLogEntry<usize> {
        self.with(|text| {
            texts.extend_from_slice(text.as_bytes());
            text.len()
        })
    }

    /// Appends the entry as a line of this form.
    pub(super) fn append(&self, line: &mut Vec<u8>, form: Form) {
        match form {
            Form::Json => self.append_object(line),
            Form::Terminal | Form::Ascii => {
                let mut shown = symbol(Some(EVENT), LEVEL, form).as_bytes().to_vec();
                self.append_message(&mut shown, |line, text| line.extend_from_slice(text.as_bytes()));
                make_safe(&mut shown, form == Form::Ascii);
                line.extend_from_slice(&shown);
            }
        }
        line.push(b'\n');
    }

    /// Appends a JSON object with its fields in alphabetical order, as in all log objects.
    fn append_object(&self, line: &mut Vec<u8>) {
        let mut named = |name: &[u8], append: &dyn Fn(&mut Vec<u8>)| {
            line.extend_from_slice(name);
            append(line);
        };
        named(b"{\"attempts\":", &|line| append_value(line, self.attempts));
        named(b",\"bytes\":", &|line| append_value(line, self.bytes));
        named(b",\"client\":", &|line| append_quoted(line, self.client));
        named(b",\"credits\":", &|line| append_value(line, self.credits));
        named(b",\"event\":", &|line| append_quoted(line, EVENT));
        named(b",\"first_byte_ms\":", &|line| append_value(line, self.first_byte_ms));
        named(b",\"key\":", &|line| append_quoted(line, self.key));
        named(b",\"level\":", &|line| append_quoted(line, word(LEVEL)));
        named(b",\"message\":\"", &|line| {
            self.append_message(line, |line, text| append_escaped(line, text.as_bytes()));
        });
        named(b"\",\"method\":", &|line| append_quoted(line, self.method));
        named(b",\"parameters\":", &|line| append_quoted(line, self.parameters));
        if let Some(lost) = self.replay_lost {
            named(b",\"replay_lost\":", &|line| append_quoted(line, lost));
        }
        named(b",\"request_id\":", &|line| append_quoted(line, self.request_id));
        named(b",\"route\":\"", &|line| self.append_route(line));
        named(b"\",\"status\":", &|line| append_value(line, self.status.unwrap_or(0)));
        named(b",\"time\":", &|line| append_within_quotes(line, &self.time.rfc3339_bytes()));
        named(b",\"total_ms\":", &|line| append_value(line, self.total_ms));
        named(b",\"verdict\":", &|line| append_quoted(line, self.verdict));
        line.push(b'}');
    }

    fn append_message(&self, line: &mut Vec<u8>, text: impl Fn(&mut Vec<u8>, &str)) {
        text(line, self.method);
        line.push(b' ');
        self.append_route(line);
        line.push(b' ');
        match self.status {
            Some(status) => append_value(line, status),
            None => line.push(b'-'),
        }
        line.push(b' ');
        text(line, self.verdict);
        line.push(b' ');
        text(line, self.key);
        line.push(b' ');
        append_value(line, self.credits);
        line.extend_from_slice(b" credits, ");
        append_value(line, self.attempts);
        line.extend_from_slice(b" attempts, ");
        append_value(line, self.total_ms);
        line.extend_from_slice(b" ms");
    }
}

impl<T> AccessLogEntry<T> {
    /// The route needs no escape: it consists of words of the API.
    fn append_route(&self, line: &mut Vec<u8>) {
        match self.route {
            Some(route) => route.write(|piece| line.extend_from_slice(piece.as_bytes())),
            None => line.push(b'-'),
        }
    }
}

impl AccessLogEntry<usize> {
    /// Replaces the lengths by the texts, which are taken from the front of `texts`.
    pub(super) fn unpacked<'a>(&self, texts: &mut &'a [u8]) -> AccessLogEntry<&'a str> {
        self.with(|length| {
            // The bytes were a `str` when they were packed.
            str::from_utf8(texts.split_off(..length).unwrap_or_default()).unwrap_or_default()
        })
    }
}

fn append_value(line: &mut Vec<u8>, value: impl Serialize) {
    // Writing a number to memory does not fail.
    let _ = serde_json::to_writer(line, &value);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn spoken() -> AccessLogEntry<&'static str> {
        AccessLogEntry {
            attempts: 2,
            bytes: 48_213,
            client: "studio",
            credits: 120,
            first_byte_ms: 240,
            key: "sk_6c036526...d452b",
            method: "POST",
            parameters: "output_format",
            replay_lost: Some("too_large"),
            request_id: "0198c2f0",
            route: Some(Route::read("/v1/text-to-speech/{voice_id}")),
            status: Some(200),
            time: UnixMs(7),
            total_ms: 812,
            verdict: "served",
        }
    }

    fn line(ended: &AccessLogEntry<&str>, form: Form) -> String {
        let mut line = Vec::new();
        ended.append(&mut line, form);
        String::from_utf8(line).unwrap()
    }

    #[test]
    fn a_machine_gets_an_object_in_the_order_of_its_names() {
        assert_eq!(
            line(&spoken(), Form::Json),
            "{\"attempts\":2,\"bytes\":48213,\"client\":\"studio\",\"credits\":120,\"event\":\"request_ended\",\
             \"first_byte_ms\":240,\"key\":\"sk_6c036526...d452b\",\"level\":\"info\",\
             \"message\":\"POST /v1/text-to-speech/{id} 200 served sk_6c036526...d452b 120 credits, \
             2 attempts, 812 ms\",\"method\":\"POST\",\"parameters\":\"output_format\",\
             \"replay_lost\":\"too_large\",\"request_id\":\"0198c2f0\",\
             \"route\":\"/v1/text-to-speech/{id}\",\"status\":200,\
             \"time\":\"1970-01-01T00:00:00.007Z\",\"total_ms\":812,\"verdict\":\"served\"}\n"
        );
    }

    #[test]
    fn a_person_gets_the_message() {
        let ended = AccessLogEntry { status: None, method: "BR\u{9b}W", client: "x", ..spoken() };
        let rest = "/v1/text-to-speech/{id} - served sk_6c036526...d452b 120 credits, 2 attempts, 812 ms\n";
        assert_eq!(line(&ended, Form::Terminal), format!("   BR\u{fffd}W {rest}"));
        assert_eq!(line(&ended, Form::Ascii), format!("    BR?W {rest}"));
    }

    proptest! {
        #[test]
        fn every_text_arrives_as_it_was(texts in prop::array::uniform5("(\\PC|[\\x00-\\x7f]){0,20}"), rest: bool) {
            let [client, key, method, parameters, request_id] = texts.each_ref().map(String::as_str);
            let replay_lost = rest.then_some("why");
            let ended = AccessLogEntry { client, key, method, parameters, replay_lost, request_id, route: None, ..spoken() };
            let mut packed = Vec::new();
            // Packed behind the texts of another entry.
            let lengths = [spoken(), ended].map(|ended| ended.packed(&mut packed));
            let mut left = &*packed;
            let [first, second] = lengths.each_ref().map(|lengths| lengths.unpacked(&mut left));
            prop_assert!(left.is_empty());
            prop_assert_eq!(line(&first, Form::Json), line(&spoken(), Form::Json));
            let object: serde_json::Value = serde_json::from_str(&line(&second, Form::Json)).unwrap();
            for (name, text) in [
                ("client", client),
                ("key", key),
                ("method", method),
                ("parameters", parameters),
                ("request_id", request_id),
            ] {
                prop_assert_eq!(object[name].as_str(), Some(text));
            }
            prop_assert_eq!(object["replay_lost"].as_str(), replay_lost);
            let message = object["message"].as_str().unwrap();
            let begin = format!("{method} - 200 served {key} 120 ");
            prop_assert!(message.starts_with(&begin));
        }
    }
}
