//! The faults of the simulator, and their text form. `script` stores their order.

use std::fmt;
use std::str::FromStr;

use bytes::Bytes;
use http::{HeaderName, HeaderValue};

use super::encoding::{Encoding, UnknownEncoding};
use super::shape::{Shape, UnknownShape};

/// The fault of one request, or of one WebSocket session.
///
/// On a WebSocket, faults of the response body (`EarlyRefuse`, `Gzip`, `Encoded`, `Answer`,
/// `HugeError`, `EndlessError`, `GarbledError`) replace the 101 of the handshake. The effect of the
/// other faults on a WebSocket is described with each. On a request without a handshake, `After` is
/// the same as `Pass`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// No fault: the request is served normally. It fills a gap in a script.
    Pass,
    /// Reads the whole request and refuses it without a charge. A WebSocket is refused in the
    /// session, in its own format: before the server's first message, or after the client's first.
    Refuse(Shape),
    /// Refuses immediately after the head was read. The body is drained afterwards.
    EarlyRefuse(Shape),
    /// Refuses after `bytes` bytes of the body. The rest is drained afterwards. On a WebSocket the
    /// bytes of the client's messages count.
    MidRefuse {
        /// Bytes to read before the refusal.
        bytes: u64,
        /// The refusal.
        shape: Shape,
    },
    /// As `Refuse`, with the body gzip-encoded.
    Gzip(Shape),
    /// As `Refuse`, with the body encoded by each of `encodings` in turn.
    Encoded {
        /// The encodings, in the order of `Content-Encoding`.
        encodings: Vec<Encoding>,
        /// The refusal.
        shape: Shape,
    },
    /// Reads the whole request and sends exactly this response, for refusals that the catalogue
    /// does not contain. Nothing is charged.
    Answer {
        /// The status, 200 to 599.
        status: u16,
        /// Headers that replace common headers of the same name. An empty value removes the header.
        /// Without a `content-type` it is derived from the first character of the body.
        headers: Vec<(String, String)>,
        /// The body as sent. With a `content-encoding` it must already be encoded.
        body: Bytes,
    },
    /// Reads the whole request, waits, and then serves it. A client that disconnects during the
    /// wait is not charged. On a WebSocket the wait follows the handshake.
    Stall {
        /// The delay in milliseconds.
        ms: u64,
    },
    /// Executes and charges the request, and sends the head after a delay. A client that
    /// disconnects during the delay has been charged.
    SlowHead {
        /// The delay in milliseconds.
        ms: u64,
    },
    /// Delays each piece of the body, or each WebSocket message, except the first.
    SlowBody {
        /// The delay in milliseconds.
        ms: u64,
    },
    /// Serves normally, and breaks the connection after `bytes` bytes of the body. The response is
    /// chunked, and its last chunk is missing. On a WebSocket the bytes after the handshake count,
    /// including frame headers.
    CutAfter {
        /// Bytes to send before the break.
        bytes: u64,
    },
    /// Reads the whole request and closes the connection without a response.
    CloseBeforeHead,
    /// Closes the connection immediately after the head was read.
    CloseUnread,
    /// The provider's 500 without details.
    ServerError,
    /// A quota refusal whose body is larger than 64 KiB.
    HugeError,
    /// A quota refusal whose body never ends.
    EndlessError,
    /// A quota refusal with an invalid gzip body.
    GarbledError,
    /// Applies `turn` to a session after `messages` messages were sent.
    After {
        /// Messages to send before the turn; 0 for the time at which `Refuse` is sent.
        messages: u64,
        /// The fault.
        turn: Turn,
    },
}

/// The fault of a running WebSocket session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Turn {
    /// The session is refused, in the format of its WebSocket.
    Refuse(Shape),
    /// The session is closed.
    Close {
        /// The close code.
        code: u16,
        /// The close reason.
        reason: String,
    },
    /// The connection ends without a close frame.
    Cut,
    /// The connection is reset without a close frame.
    Reset,
    /// Nothing more is sent. Messages of the client are still read.
    Stall,
    /// The text is sent as a message, and the session continues.
    Say(String),
    /// The text is sent as a message, and the session is closed.
    Last {
        /// The close code.
        code: u16,
        /// The text.
        text: String,
    },
}

impl FromStr for Fault {
    type Err = FaultError;

    fn from_str(text: &str) -> Result<Self, FaultError> {
        let text = text.trim();
        if let Some(shape) = text.strip_prefix("early:") {
            return Ok(Fault::EarlyRefuse(shape.parse()?));
        }
        if let Some((bytes, shape)) = text.strip_prefix("mid=").and_then(|text| text.split_once(':')) {
            return Ok(Fault::MidRefuse { bytes: count_of_bytes(bytes)?, shape: shape.parse()? });
        }
        if let Some((messages, turn)) = text.strip_prefix("after=").and_then(|text| text.split_once(':')) {
            let messages = messages.parse().map_err(|_| FaultError::Messages(messages.to_owned()))?;
            return Ok(Fault::After { messages, turn: turn.parse()? });
        }
        if let Some(shape) = text.strip_prefix("gzip:") {
            return Ok(Fault::Gzip(shape.parse()?));
        }
        if let Some((encodings, shape)) = text.strip_prefix("encoded=").and_then(|text| text.split_once(':'))
        {
            let encodings = encodings.split(',').map(|name| name.trim().parse()).collect::<Result<_, _>>()?;
            return Ok(Fault::Encoded { encodings, shape: shape.parse()? });
        }
        if let Some(answer) = text.strip_prefix("answer=") {
            return parse_answer(answer).ok_or_else(|| FaultError::Answer(answer.to_owned()));
        }
        if let Some((name, value)) = text.split_once('=') {
            match name {
                "stall" => return Ok(Fault::Stall { ms: milliseconds(value)? }),
                "slow_head" => return Ok(Fault::SlowHead { ms: milliseconds(value)? }),
                "slow_body" => return Ok(Fault::SlowBody { ms: milliseconds(value)? }),
                "cut" => return Ok(Fault::CutAfter { bytes: count_of_bytes(value)? }),
                "close" | "say" | "last" => return Ok(Fault::After { messages: 0, turn: text.parse()? }),
                _ => {}
            }
        }
        match text {
            "pass" => Ok(Fault::Pass),
            "close" => Ok(Fault::CloseBeforeHead),
            "close_unread" => Ok(Fault::CloseUnread),
            "server_error" => Ok(Fault::ServerError),
            "huge" => Ok(Fault::HugeError),
            "endless" => Ok(Fault::EndlessError),
            "garbled" => Ok(Fault::GarbledError),
            other => Ok(Fault::Refuse(other.parse()?)),
        }
    }
}

impl FromStr for Turn {
    type Err = FaultError;

    fn from_str(text: &str) -> Result<Self, FaultError> {
        match (text, text.split_once('=')) {
            ("cut", _) => Ok(Turn::Cut),
            ("reset", _) => Ok(Turn::Reset),
            ("stall", _) => Ok(Turn::Stall),
            (_, Some(("say", text))) => Ok(Turn::Say(text.to_owned())),
            (_, Some(("last", text))) => {
                let (code, message) = text.split_once('/').unwrap_or((text, ""));
                let code = close_code(code).ok_or_else(|| FaultError::Close(text.to_owned()))?;
                Ok(Turn::Last { code, text: message.to_owned() })
            }
            (_, Some(("close", text))) => {
                let (code, reason) = text.split_once('/').unwrap_or((text, ""));
                // A control frame has at most 125 bytes, of which the code takes two.
                match close_code(code).filter(|_| reason.len() <= 123) {
                    Some(code) => Ok(Turn::Close { code, reason: reason.to_owned() }),
                    None => Err(FaultError::Close(text.to_owned())),
                }
            }
            _ => Ok(Turn::Refuse(text.parse()?)),
        }
    }
}

/// Parses a close code that an endpoint may send (RFC 6455, 7.4).
fn close_code(text: &str) -> Option<u16> {
    let sendable = |code: &u16| (1_000..5_000).contains(code) && ![1_004, 1_005, 1_006].contains(code);
    text.parse().ok().filter(sendable)
}

impl fmt::Display for Turn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Turn::Refuse(shape) => write!(f, "{shape}"),
            Turn::Close { code, reason } if reason.is_empty() => write!(f, "close={code}"),
            Turn::Close { code, reason } => write!(f, "close={code}/{reason}"),
            Turn::Cut => f.write_str("cut"),
            Turn::Reset => f.write_str("reset"),
            Turn::Stall => f.write_str("stall"),
            Turn::Say(text) => write!(f, "say={text}"),
            Turn::Last { code, text } => write!(f, "last={code}/{text}"),
        }
    }
}

/// Parses `402/BODY` or `402[NAME: VALUE][NAME: VALUE]/BODY`.
fn parse_answer(text: &str) -> Option<Fault> {
    let end = text.find(['[', '/']).unwrap_or(text.len());
    let status = text.get(..end)?.parse().ok().filter(|status| (200..600).contains(status))?;
    let mut rest = text.get(end..)?;
    let mut headers = Vec::new();
    while let Some(header) = rest.strip_prefix('[') {
        let (header, after) = header.split_once(']')?;
        let (name, value) = header.split_once(':')?;
        let (name, value) = (name.trim(), value.trim());
        HeaderName::try_from(name).ok()?;
        HeaderValue::try_from(value).ok()?;
        headers.push((name.to_owned(), value.to_owned()));
        rest = after;
    }
    let body = if rest.is_empty() { rest } else { rest.strip_prefix('/')? };
    Some(Fault::Answer { status, headers, body: Bytes::copy_from_slice(body.as_bytes()) })
}

fn count_of_bytes(text: &str) -> Result<u64, FaultError> {
    text.parse().map_err(|_| FaultError::Bytes(text.to_owned()))
}

/// Parses `5s`, `250ms`, or a plain number of milliseconds.
fn milliseconds(text: &str) -> Result<u64, FaultError> {
    let number = |digits: &str| digits.parse::<u64>().map_err(|_| FaultError::Duration(text.to_owned()));
    if let Some(digits) = text.strip_suffix("ms") {
        number(digits)
    } else if let Some(digits) = text.strip_suffix('s') {
        Ok(number(digits)?.saturating_mul(1_000))
    } else {
        number(text)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Pass => f.write_str("pass"),
            Fault::Refuse(shape) => write!(f, "{shape}"),
            Fault::EarlyRefuse(shape) => write!(f, "early:{shape}"),
            Fault::MidRefuse { bytes, shape } => write!(f, "mid={bytes}:{shape}"),
            Fault::Gzip(shape) => write!(f, "gzip:{shape}"),
            Fault::Encoded { encodings, shape } => {
                let names: Vec<_> = encodings.iter().map(ToString::to_string).collect();
                write!(f, "encoded={}:{shape}", names.join(","))
            }
            Fault::Answer { status, headers, body } => {
                write!(f, "answer={status}")?;
                for (name, value) in headers {
                    write!(f, "[{name}: {value}]")?;
                }
                write!(f, "/{}", String::from_utf8_lossy(body))
            }
            Fault::Stall { ms } => write!(f, "stall={ms}ms"),
            Fault::SlowHead { ms } => write!(f, "slow_head={ms}ms"),
            Fault::SlowBody { ms } => write!(f, "slow_body={ms}ms"),
            Fault::CutAfter { bytes } => write!(f, "cut={bytes}"),
            Fault::CloseBeforeHead => f.write_str("close"),
            Fault::CloseUnread => f.write_str("close_unread"),
            Fault::ServerError => f.write_str("server_error"),
            Fault::HugeError => f.write_str("huge"),
            Fault::EndlessError => f.write_str("endless"),
            Fault::GarbledError => f.write_str("garbled"),
            Fault::After { messages, turn } => write!(f, "after={messages}:{turn}"),
        }
    }
}

/// The errors of parsing a fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FaultError {
    /// No fault or refusal has this name.
    #[error(
        "{0}; other faults are pass, stall=TIME, slow_head=TIME, slow_body=TIME, cut=BYTES, close, close_unread, huge, endless, garbled, early:REFUSAL, mid=BYTES:REFUSAL, gzip:REFUSAL, encoded=ENCODING,ENCODING:REFUSAL and answer=STATUS[NAME: VALUE]/BODY, and on sockets after=MESSAGES:TURN, where a turn is a REFUSAL, close=CODE[/REASON], cut, reset, stall, say=TEXT or last=CODE/TEXT"
    )]
    Unknown(#[from] UnknownShape),
    /// An invalid duration.
    #[error("`{0}` is no time: write 5s, 250ms or a number of milliseconds")]
    Duration(String),
    /// An invalid number of bytes.
    #[error("`{0}` is no number of bytes")]
    Bytes(String),
    /// An invalid number of messages.
    #[error("`{0}` is no number of messages")]
    Messages(String),
    /// An unknown encoding.
    #[error(transparent)]
    Encoding(#[from] UnknownEncoding),
    /// An invalid response.
    #[error(
        "`{0}` is no answer: write STATUS/BODY or STATUS[NAME: VALUE]/BODY, with 200 to 599 and as many headers as there are"
    )]
    Answer(String),
    /// An invalid content of a close frame.
    #[error("`{0}` is no close: write CODE or CODE/REASON, with 1000 to 4999 and at most 123 bytes")]
    Close(String),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elevenlabs::refusal::examples;
    use crate::simulator::shape::NAMED;

    #[test]
    fn a_printed_fault_is_parsed_unchanged() {
        let plain =
            ["pass", "stall=250ms", "slow_head=5000ms", "slow_body=1ms", "cut=0", "cut=70000", "close"];
        let more =
            ["close_unread", "server_error", "huge", "endless", "garbled", "missing_permissions=user_read"];
        let last =
            ["rate_limit=7", "early:quota", "mid=5000:quota", "gzip:rate_limit=1", "unprocessable=text"];
        let sockets = [
            "after=3:quota",
            "after=0:close=1011",
            "after=1:close=1008/a reason: with = and /",
            "after=2:cut",
            "after=2:reset",
            "after=2:stall",
            r#"after=1:say={"message_type":"queue_overflow"}"#,
            r#"after=0:last=1000/{"message_type":"queue_overflow"}"#,
            "after=0:rate_limit=7",
        ];
        let answers = [
            "encoded=br:rate_limit=7",
            "encoded=gzip,deflate,br,zstd:quota",
            "answer=429/",
            r#"answer=402/{"detail":{"code":"payment_required"}}"#,
            "answer=429[content-type: text/html; charset=utf-8][cf-ray: 1/2]/error code: 1015",
            "answer=200[x-trace-id: ][character-cost: 5000]/a[b]/c",
        ];
        for text in plain.into_iter().chain(more).chain(last).chain(sockets).chain(answers) {
            assert_eq!(text.parse::<Fault>().unwrap().to_string(), text);
        }
        for (name, shape) in NAMED {
            assert_eq!(name.parse::<Shape>().unwrap(), shape);
            assert_eq!(shape.to_string().parse::<Shape>().unwrap(), shape);
        }
        for fixed in examples() {
            let shape = Shape::Fixed(fixed);
            assert_eq!(shape.to_string().parse::<Shape>().unwrap(), shape);
        }
    }

    #[test]
    fn times_are_seconds_milliseconds_or_plain() {
        for (text, ms) in [("stall=5s", 5_000), ("stall=200ms", 200), (" stall=30 ", 30)] {
            assert_eq!(text.parse::<Fault>().unwrap(), Fault::Stall { ms });
        }
    }

    #[test]
    fn a_close_needs_no_number_of_messages_and_its_reason_has_a_bound() {
        let close = |reason: &str| Turn::Close { code: 1_011, reason: reason.to_owned() };
        assert_eq!("close=1011/x".parse::<Fault>().unwrap(), Fault::After { messages: 0, turn: close("x") });
        let longest = "r".repeat(123);
        assert_eq!(format!("close=1011/{longest}").parse::<Turn>().unwrap(), close(&longest));
        format!("close=1011/{longest}r").parse::<Turn>().unwrap_err();
    }

    #[test]
    fn an_invalid_fault_is_explained() {
        for (text, part) in [
            ("qota", "`qota` is no refusal: the names are quota,"),
            ("qota", "other faults are pass, stall=TIME"),
            ("stall=fast", "`fast` is no time: write 5s"),
            ("cut=some", "`some` is no number of bytes"),
            ("quota=5", "`quota=5` is no refusal"),
            ("rate_limit=soon", "`rate_limit=soon` is no refusal"),
            ("early:", "`` is no refusal"),
            ("after=some:cut", "`some` is no number of messages"),
            ("after=1:", "`` is no refusal"),
            ("close=999", "`999` is no close: write CODE"),
            ("close=1005", "`1005` is no close"),
            ("close=5000", "`5000` is no close"),
            ("last=1005/x", "`1005/x` is no close"),
            ("encoded=lzma:quota", "`lzma` is no encoding: there are gzip, deflate, br and zstd"),
            ("encoded=:quota", "`` is no encoding"),
            ("answer=", "`` is no answer: write STATUS/BODY"),
            ("answer=199/", "`199/` is no answer"),
            ("answer=600/", "`600/` is no answer"),
            ("answer=402[a b: c]/", "is no answer"),
            ("answer=402[a: b/", "is no answer"),
            ("answer=402 x", "is no answer"),
        ] {
            let message = text.parse::<Fault>().unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
    }
}
