//! Defines the scripted faults of HTTP requests and WebSocket sessions, and parses their text form. `script` stores
//! their order.

use std::fmt;
use std::str::FromStr;

use bytes::Bytes;
use http::{HeaderName, HeaderValue};

use super::encoding::{Encoding, UnknownEncoding};
use super::refusal::{RefusalKind, UnknownRefusal};

/// The fault of one request, or of one WebSocket session.
///
/// On a WebSocket, faults of the response body (`EarlyRefuse`, `Gzip`, `Encoded`, `Respond`, `HugeError`,
/// `EndlessError`, `GarbledError`) replace the 101 of the handshake. Each of the other faults describes its effect on a
/// WebSocket if it differs from the effect on a request. On a request without a handshake, `After` is the same as
/// `Pass`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// No fault: the request is served normally. `Pass` fills a gap in a queue of faults.
    Pass,
    /// Reads the whole request and refuses it without a charge. A WebSocket is refused in the
    /// session, in its own format: before the simulator's first message, or after the client's first message.
    Refuse(RefusalKind),
    /// Refuses immediately after the head was read. The body is read and dropped afterwards.
    EarlyRefuse(RefusalKind),
    /// Refuses after `bytes` bytes of the body. The rest is read and dropped afterwards. On a WebSocket the bytes of
    /// the client's messages count.
    MidRefuse {
        /// Number of bytes to read before the refusal.
        bytes: u64,
        /// The refusal that is sent after these bytes.
        refusal: RefusalKind,
    },
    /// Refuses like `Refuse`, with a gzip-encoded body.
    Gzip(RefusalKind),
    /// Refuses like `Refuse`, with a body that is encoded with `encodings`, one after the other.
    Encoded {
        /// The encodings, in the order of `Content-Encoding`.
        encodings: Vec<Encoding>,
        /// The refusal whose body is encoded.
        refusal: RefusalKind,
    },
    /// Reads the whole request and sends exactly this response, for refusals that the
    /// simulator does not know by name. Nothing is charged.
    Respond {
        /// The status, 200 to 599.
        status: u16,
        /// Headers that replace common headers of the same name. A header with an empty value is removed. If
        /// `content-type` is missing, it is derived from the first character of the body.
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
    /// Executes and charges the request, and sends the head after a delay. A client that disconnects during the delay
    /// has been charged. On a WebSocket the handshake is delayed.
    SlowHead {
        /// The delay in milliseconds.
        ms: u64,
    },
    /// Delays each chunk of the body, or each WebSocket message, except the first.
    SlowBody {
        /// The delay in milliseconds.
        ms: u64,
    },
    /// Serves normally, and breaks the connection after `bytes` bytes of the body. The response is
    /// chunked, and its last chunk is missing. On a WebSocket the bytes after the handshake count,
    /// including frame headers.
    CutAfter {
        /// Number of bytes to send before the break.
        bytes: u64,
    },
    /// Reads the whole request and closes the connection without a response.
    CloseBeforeHead,
    /// Closes the connection immediately after the head was read.
    CloseUnread,
    /// Refuses with the provider's 500 without details. On a WebSocket it has the effect of `Refuse`.
    ServerError,
    /// A quota refusal whose body is larger than 64 KiB.
    HugeError,
    /// A quota refusal whose body never ends.
    EndlessError,
    /// A quota refusal with an invalid gzip body.
    GarbledError,
    /// Applies `fault` to a session after `messages` messages were sent.
    After {
        /// Number of messages to send before the fault. With 0, the fault occurs when `Refuse` would occur.
        messages: u64,
        /// The fault of the session.
        fault: SessionFault,
    },
}

/// The fault of a running WebSocket session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SessionFault {
    /// The session is refused, in the format of its WebSocket.
    Refuse(RefusalKind),
    /// The session is closed.
    Close {
        /// The code of the close frame.
        code: u16,
        /// The reason in the close frame, which may be empty.
        reason: String,
    },
    /// The connection ends without a close frame.
    Cut,
    /// The connection is reset without a close frame.
    Reset,
    /// The session sends nothing further, and still reads messages of the client.
    Stall,
    /// The text is sent as a message, and the session continues.
    Send(String),
    /// The text is sent as a message, and the session is closed.
    SendAndClose {
        /// The code of the close frame, which has no reason.
        code: u16,
        /// The text of the message before the close frame.
        text: String,
    },
}

impl FromStr for Fault {
    type Err = FaultError;

    fn from_str(text: &str) -> Result<Self, FaultError> {
        let text = text.trim();
        if let Some(refusal) = text.strip_prefix("early:") {
            return Ok(Fault::EarlyRefuse(refusal.parse()?));
        }
        if let Some(refusal) = text.strip_prefix("gzip:") {
            return Ok(Fault::Gzip(refusal.parse()?));
        }
        if let Some((name, argument)) = text.split_once('=') {
            match (name, argument.split_once(':')) {
                ("mid", Some((bytes, refusal))) => {
                    return Ok(Fault::MidRefuse { bytes: parse_bytes(bytes)?, refusal: refusal.parse()? });
                }
                ("after", Some((messages, fault))) => {
                    let messages = messages.parse().map_err(|_| FaultError::Messages(messages.to_owned()))?;
                    return Ok(Fault::After { messages, fault: fault.parse()? });
                }
                ("encoded", Some((encodings, refusal))) => {
                    let encodings = encodings.split(',').map(|name| name.trim().parse());
                    let encodings = encodings.collect::<Result<_, _>>()?;
                    return Ok(Fault::Encoded { encodings, refusal: refusal.parse()? });
                }
                ("answer", _) => {
                    return parse_response(argument).ok_or_else(|| FaultError::Response(argument.to_owned()));
                }
                ("stall", _) => return Ok(Fault::Stall { ms: parse_milliseconds(argument)? }),
                ("slow_head", _) => return Ok(Fault::SlowHead { ms: parse_milliseconds(argument)? }),
                ("slow_body", _) => return Ok(Fault::SlowBody { ms: parse_milliseconds(argument)? }),
                ("cut", _) => return Ok(Fault::CutAfter { bytes: parse_bytes(argument)? }),
                ("close" | "say" | "last", _) => {
                    return Ok(Fault::After { messages: 0, fault: text.parse()? });
                }
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
            name => Ok(Fault::Refuse(name.parse()?)),
        }
    }
}

impl FromStr for SessionFault {
    type Err = FaultError;

    fn from_str(text: &str) -> Result<Self, FaultError> {
        match (text, text.split_once('=')) {
            ("cut", _) => Ok(SessionFault::Cut),
            ("reset", _) => Ok(SessionFault::Reset),
            ("stall", _) => Ok(SessionFault::Stall),
            (_, Some(("say", text))) => Ok(SessionFault::Send(text.to_owned())),
            (_, Some(("last", text))) => {
                let (code, message) = text.split_once('/').unwrap_or((text, ""));
                let code = parse_close_code(code).ok_or_else(|| FaultError::Close(text.to_owned()))?;
                Ok(SessionFault::SendAndClose { code, text: message.to_owned() })
            }
            (_, Some(("close", text))) => {
                let (code, reason) = text.split_once('/').unwrap_or((text, ""));
                // A control frame has at most 125 bytes, and the close code takes two of them.
                match parse_close_code(code).filter(|_| reason.len() <= 123) {
                    Some(code) => Ok(SessionFault::Close { code, reason: reason.to_owned() }),
                    None => Err(FaultError::Close(text.to_owned())),
                }
            }
            _ => Ok(SessionFault::Refuse(text.parse()?)),
        }
    }
}

/// Parses a close code that an endpoint may send (RFC 6455, 7.4).
fn parse_close_code(text: &str) -> Option<u16> {
    let is_sendable = |code: &u16| (1_000..5_000).contains(code) && ![1_004, 1_005, 1_006].contains(code);
    text.parse().ok().filter(is_sendable)
}

impl fmt::Display for SessionFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SessionFault::Refuse(refusal) => write!(f, "{refusal}"),
            SessionFault::Close { code, reason } if reason.is_empty() => write!(f, "close={code}"),
            SessionFault::Close { code, reason } => write!(f, "close={code}/{reason}"),
            SessionFault::Cut => f.write_str("cut"),
            SessionFault::Reset => f.write_str("reset"),
            SessionFault::Stall => f.write_str("stall"),
            SessionFault::Send(text) => write!(f, "say={text}"),
            SessionFault::SendAndClose { code, text } => write!(f, "last={code}/{text}"),
        }
    }
}

/// Parses `402/BODY` or `402[NAME: VALUE][NAME: VALUE]/BODY`.
fn parse_response(text: &str) -> Option<Fault> {
    let end = text.find(['[', '/']).unwrap_or(text.len());
    let status = text.get(..end)?.parse().ok().filter(|status| (200..600).contains(status))?;
    let mut remaining = text.get(end..)?;
    let mut headers = Vec::new();
    while let Some(header) = remaining.strip_prefix('[') {
        let (header, after) = header.split_once(']')?;
        let (name, value) = header.split_once(':')?;
        let (name, value) = (name.trim(), value.trim());
        HeaderName::try_from(name).ok()?;
        HeaderValue::try_from(value).ok()?;
        headers.push((name.to_owned(), value.to_owned()));
        remaining = after;
    }
    let body = if remaining.is_empty() { remaining } else { remaining.strip_prefix('/')? };
    Some(Fault::Respond { status, headers, body: Bytes::copy_from_slice(body.as_bytes()) })
}

fn parse_bytes(text: &str) -> Result<u64, FaultError> {
    text.parse().map_err(|_| FaultError::Bytes(text.to_owned()))
}

/// Parses `5s`, `250ms`, or a plain number of milliseconds.
fn parse_milliseconds(text: &str) -> Result<u64, FaultError> {
    let parse_number =
        |digits: &str| digits.parse::<u64>().map_err(|_| FaultError::Duration(text.to_owned()));
    if let Some(digits) = text.strip_suffix("ms") {
        parse_number(digits)
    } else if let Some(digits) = text.strip_suffix('s') {
        Ok(parse_number(digits)?.saturating_mul(1_000))
    } else {
        parse_number(text)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Pass => f.write_str("pass"),
            Fault::Refuse(refusal) => write!(f, "{refusal}"),
            Fault::EarlyRefuse(refusal) => write!(f, "early:{refusal}"),
            Fault::MidRefuse { bytes, refusal } => write!(f, "mid={bytes}:{refusal}"),
            Fault::Gzip(refusal) => write!(f, "gzip:{refusal}"),
            Fault::Encoded { encodings, refusal } => {
                let names: Vec<_> = encodings.iter().map(ToString::to_string).collect();
                write!(f, "encoded={}:{refusal}", names.join(","))
            }
            Fault::Respond { status, headers, body } => {
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
            Fault::After { messages, fault } => write!(f, "after={messages}:{fault}"),
        }
    }
}

/// The errors of parsing a fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FaultError {
    /// The text, or its part that must name a refusal, is not a known name.
    #[error(
        "{0}; other faults are pass, stall=TIME, slow_head=TIME, slow_body=TIME, cut=BYTES, close, close_unread, \
         huge, endless, garbled, early:REFUSAL, mid=BYTES:REFUSAL, gzip:REFUSAL, encoded=ENCODING,ENCODING:REFUSAL and \
         answer=STATUS[NAME: VALUE]/BODY, and on WebSockets after=MESSAGES:FAULT, where FAULT is a REFUSAL, \
         close=CODE[/REASON], cut, reset, stall, say=TEXT or last=CODE/TEXT"
    )]
    Unknown(#[from] UnknownRefusal),
    /// A delay is not a duration.
    #[error("`{0}` is not a time: write 5s, 250ms or a number of milliseconds")]
    Duration(String),
    /// The position of a cut or a refusal is not a number of bytes.
    #[error("`{0}` is not a number of bytes")]
    Bytes(String),
    /// The position of a fault in a session is not a number of messages.
    #[error("`{0}` is not a number of messages")]
    Messages(String),
    /// The simulator does not support an encoding.
    #[error(transparent)]
    Encoding(#[from] UnknownEncoding),
    /// The text of a response cannot be parsed.
    #[error(
        "`{0}` is not a response: write STATUS/BODY or STATUS[NAME: VALUE]/BODY, with a status of 200 to 599 and any \
         number of headers"
    )]
    Response(String),
    /// A close code or a close reason cannot be sent.
    #[error(
        "`{0}` is not a close: write CODE or CODE/REASON, with a code of 1000 to 4999 and a reason of at most 123 \
         bytes"
    )]
    Close(String),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elevenlabs::refusal::examples;
    use crate::simulator::refusal::NAMED_REFUSALS;

    #[test]
    fn a_printed_fault_is_parsed_unchanged() {
        for text in [
            "pass",
            "stall=250ms",
            "slow_head=5000ms",
            "slow_body=1ms",
            "cut=0",
            "cut=70000",
            "close",
            "close_unread",
            "server_error",
            "huge",
            "endless",
            "garbled",
            "missing_permissions=user_read",
            "rate_limit=7",
            "early:quota",
            "mid=5000:quota",
            "gzip:rate_limit=1",
            "unprocessable=text",
            "after=3:quota",
            "after=0:close=1011",
            "after=1:close=1008/a reason: with = and /",
            "after=2:cut",
            "after=2:reset",
            "after=2:stall",
            r#"after=1:say={"message_type":"queue_overflow"}"#,
            r#"after=0:last=1000/{"message_type":"queue_overflow"}"#,
            "after=0:rate_limit=7",
            "encoded=br:rate_limit=7",
            "encoded=gzip,deflate,br,zstd:quota",
            "answer=429/",
            r#"answer=402/{"detail":{"code":"payment_required"}}"#,
            "answer=429[content-type: text/html; charset=utf-8][cf-ray: 1/2]/error code: 1015",
            "answer=200[x-trace-id: ][character-cost: 5000]/a[b]/c",
        ] {
            assert_eq!(text.parse::<Fault>().unwrap().to_string(), text);
        }
        for (name, refusal) in NAMED_REFUSALS {
            assert_eq!(name.parse::<RefusalKind>().unwrap(), refusal);
            assert_eq!(refusal.to_string().parse::<RefusalKind>().unwrap(), refusal);
        }
        for fixed in examples() {
            let refusal = RefusalKind::Fixed(fixed);
            assert_eq!(refusal.to_string().parse::<RefusalKind>().unwrap(), refusal);
        }
    }

    #[test]
    fn times_are_seconds_or_milliseconds() {
        for (text, ms) in [("stall=5s", 5_000), ("stall=200ms", 200), (" stall=30 ", 30)] {
            assert_eq!(text.parse::<Fault>().unwrap(), Fault::Stall { ms });
        }
    }

    #[test]
    fn a_close_without_messages_is_immediate_and_its_reason_is_limited() {
        let close = |reason: &str| SessionFault::Close { code: 1_011, reason: reason.to_owned() };
        assert_eq!("close=1011/x".parse::<Fault>().unwrap(), Fault::After { messages: 0, fault: close("x") });
        let longest = "r".repeat(123);
        assert_eq!(format!("close=1011/{longest}").parse::<SessionFault>().unwrap(), close(&longest));
        format!("close=1011/{longest}r").parse::<SessionFault>().unwrap_err();
    }

    #[test]
    fn an_invalid_fault_is_refused_with_an_explanation() {
        for (text, part) in [
            ("qota", "`qota` is not a refusal: the names are quota,"),
            ("qota", "other faults are pass, stall=TIME"),
            ("stall=fast", "`fast` is not a time: write 5s"),
            ("cut=some", "`some` is not a number of bytes"),
            ("quota=5", "`quota=5` is not a refusal"),
            ("rate_limit=soon", "`rate_limit=soon` is not a refusal"),
            ("early:", "`` is not a refusal"),
            ("after=some:cut", "`some` is not a number of messages"),
            ("after=1:", "`` is not a refusal"),
            ("close=999", "`999` is not a close: write CODE"),
            ("close=1005", "`1005` is not a close"),
            ("close=5000", "`5000` is not a close"),
            ("last=1005/x", "`1005/x` is not a close"),
            ("encoded=lzma:quota", "`lzma` is not an encoding: write gzip, deflate, br or zstd"),
            ("encoded=:quota", "`` is not an encoding"),
            ("answer=", "`` is not a response: write STATUS/BODY"),
            ("answer=199/", "`199/` is not a response"),
            ("answer=600/", "`600/` is not a response"),
            ("answer=402[a b: c]/", "is not a response"),
            ("answer=402[a: b/", "is not a response"),
            ("answer=402 x", "is not a response"),
        ] {
            let message = text.parse::<Fault>().unwrap_err().to_string();
            assert!(message.contains(part), "the error must contain {part:?}: {message}");
        }
    }
}
