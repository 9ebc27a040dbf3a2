//! Decodes a chunked body (RFC 9112, section 7.1) into as few pieces as arrived, and checks that the last
//! chunk came. Pieces stay in the read buffer: small chunks are moved together in place.

use std::fmt;

use bytes::{Buf, Bytes, BytesMut};
use http::HeaderMap;
use http::header::{HeaderName, HeaderValue};

/// A chunk larger than this is passed on where it lies; a smaller one is moved behind the previous one, which
/// costs less than a separate piece.
const MOVED_BYTES_MAX: u64 = 16 * 1024;
/// Maximum bytes of chunk extensions in one body. No client reads them; more of them are an attack.
const EXTENSION_BYTES_MAX: u64 = 16 * 1024;
/// Maximum bytes of the trailers of one body.
const TRAILER_BYTES_MAX: usize = 16 * 1024;
const TRAILERS_MAX: usize = 64;

/// The decoder of one chunked body.
#[derive(Debug, Default)]
pub struct Chunks {
    state: State,
    extension_bytes: u64,
}

#[derive(Debug, Default)]
enum State {
    /// Before the first digit of a size.
    #[default]
    Size,
    /// After some digits.
    Digits(u64),
    /// After blanks behind the digits of the size.
    Blanks(u64),
    Extension(u64),
    /// After the carriage return of the size line.
    SizeLf(u64),
    Data(u64),
    DataCr,
    DataLf,
    /// After the last chunk, with the trailer lines so far.
    Trailers(Vec<u8>),
    Over(Option<HeaderMap>),
    Broken(ChunkError),
}

/// The next part of a chunked body.
#[derive(Debug)]
pub enum Next {
    /// A piece of the body.
    Piece(Bytes),
    /// The trailers, which end the body.
    Trailers(HeaderMap),
    /// More bytes must be read.
    More,
    /// The body is complete.
    Over,
}

/// Why the bytes read are not a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChunkError {
    /// A chunk or a trailer is malformed.
    Malformed,
    /// A size, the extensions or the trailers are too large.
    TooLarge,
}

impl fmt::Display for ChunkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Malformed => "a chunk is malformed",
            Self::TooLarge => "a chunk's size or its trailers are too large",
        })
    }
}

impl std::error::Error for ChunkError {}

impl Chunks {
    /// Takes the next part of the body from the bytes read.
    ///
    /// # Errors
    ///
    /// When the bytes are not a chunk; the pieces before them were returned earlier.
    pub fn next(&mut self, read: &mut BytesMut) -> Result<Next, ChunkError> {
        // The piece consists of the bytes before `piece`; the bytes before `at` are decoded.
        let (mut piece, mut at) = (0, 0);
        while at < read.len() {
            match &mut self.state {
                State::Data(left) => {
                    let here = usize::try_from(*left).unwrap_or(usize::MAX).min(read.len() - at);
                    if piece == 0 {
                        // The first chunk stays in place; the framing before it is dropped.
                        read.advance(at);
                        at = 0;
                    } else if *left > MOVED_BYTES_MAX {
                        break;
                    } else {
                        read.copy_within(at..at + here, piece);
                    }
                    (piece, at) = (piece + here, at + here);
                    *left -= here as u64;
                    if *left == 0 {
                        self.state = State::DataCr;
                    }
                }
                State::Over(_) | State::Broken(_) => break,
                State::Trailers(_) => {
                    let used = self.collect_trailers(&read[at..]);
                    at += used;
                }
                State::Size
                | State::Digits(_)
                | State::Blanks(_)
                | State::Extension(_)
                | State::SizeLf(_)
                | State::DataCr
                | State::DataLf => at += self.decode_framing(&read[at..]),
            }
        }
        if piece > 0 {
            let data = read.split_to(piece).freeze();
            read.advance(at - piece);
            return Ok(Next::Piece(data));
        }
        read.advance(at);
        match &mut self.state {
            State::Broken(error) => Err(*error),
            State::Over(trailers) => Ok(trailers.take().map_or(Next::Over, Next::Trailers)),
            State::Size
            | State::Digits(_)
            | State::Blanks(_)
            | State::Extension(_)
            | State::SizeLf(_)
            | State::Data(_)
            | State::DataCr
            | State::DataLf
            | State::Trailers(_) => Ok(Next::More),
        }
    }

    /// Whether the body is complete, including its trailers.
    #[must_use]
    pub fn is_over(&self) -> bool {
        matches!(self.state, State::Over(None))
    }

    /// Decodes some of the framing between the pieces, at least a byte; returns the number of bytes.
    fn decode_framing(&mut self, read: &[u8]) -> usize {
        let decoded = if matches!(self.state, State::Size) {
            plain_size(read).map(|(size, used)| (State::Data(size), used))
        } else if matches!(self.state, State::DataCr) {
            read.starts_with(b"\r\n").then_some((State::Size, 2))
        } else {
            None
        };
        if let Some((state, used)) = decoded {
            self.state = state;
            return used;
        }
        self.step(read[0]);
        1
    }

    /// Decodes one byte of framing.
    fn step(&mut self, byte: u8) {
        self.state = match (&self.state, byte) {
            (State::Size, _) => digit(byte).map_or(MALFORMED, State::Digits),
            (State::Digits(size), _) if digit(byte).is_some() => {
                let larger =
                    size.checked_mul(16).zip(digit(byte)).and_then(|(size, digit)| size.checked_add(digit));
                larger.map_or(State::Broken(ChunkError::TooLarge), State::Digits)
            }
            (State::Digits(size) | State::Blanks(size), b' ' | b'\t') => State::Blanks(*size),
            (State::Digits(size) | State::Blanks(size), b';') => State::Extension(*size),
            (State::Digits(size) | State::Blanks(size) | State::Extension(size), b'\r') => {
                State::SizeLf(*size)
            }
            // A bare line feed would end the line for some parsers and not for others.
            (State::Extension(_), b'\n') => MALFORMED,
            (State::Extension(size), _) => {
                self.extension_bytes += 1;
                let is_too_much = self.extension_bytes > EXTENSION_BYTES_MAX;
                if is_too_much { State::Broken(ChunkError::TooLarge) } else { State::Extension(*size) }
            }
            (State::SizeLf(0), b'\n') => State::Trailers(Vec::new()),
            (State::SizeLf(size), b'\n') => State::Data(*size),
            (State::DataCr, b'\r') => State::DataLf,
            (State::DataLf, b'\n') => State::Size,
            _ => MALFORMED,
        };
    }

    /// Collects trailers, up to the empty line after them; returns how many bytes of `read` they were.
    fn collect_trailers(&mut self, read: &[u8]) -> usize {
        let State::Trailers(lines) = &mut self.state else { return 0 };
        for (at, byte) in read.iter().enumerate() {
            lines.push(*byte);
            // A carriage return is allowed only before a line feed, and a line feed only after one.
            let is_half = lines.len() > 1 && lines[lines.len() - 2] == b'\r';
            if is_half != (*byte == b'\n') {
                self.state = MALFORMED;
                return at + 1;
            }
            if lines.as_slice() == b"\r\n" || lines.ends_with(b"\r\n\r\n") {
                self.state = trailers(lines);
                return at + 1;
            }
            if lines.len() > TRAILER_BYTES_MAX {
                self.state = State::Broken(ChunkError::TooLarge);
                return at + 1;
            }
        }
        read.len()
    }
}

const MALFORMED: State = State::Broken(ChunkError::Malformed);

/// Maximum digits of a size that is decoded in one step.
const PLAIN_DIGITS_MAX: usize = 8;

/// A size other than 0 without extensions, as most have, and the length of its line.
fn plain_size(read: &[u8]) -> Option<(u64, usize)> {
    let mut size = 0;
    for (at, byte) in read.iter().enumerate().take(PLAIN_DIGITS_MAX + 1) {
        let Some(digit) = digit(*byte) else {
            return (size > 0 && read[at..].starts_with(b"\r\n")).then_some((size, at + 2));
        };
        size = size * 16 + digit;
    }
    None
}

fn digit(byte: u8) -> Option<u64> {
    char::from(byte).to_digit(16).map(u64::from)
}

fn trailers(lines: &[u8]) -> State {
    let mut slots = [httparse::EMPTY_HEADER; TRAILERS_MAX];
    let lines = match httparse::parse_headers(lines, &mut slots) {
        Ok(httparse::Status::Complete((_, lines))) => lines,
        Err(httparse::Error::TooManyHeaders) => return State::Broken(ChunkError::TooLarge),
        Ok(httparse::Status::Partial) | Err(_) => return MALFORMED,
    };
    if lines.is_empty() {
        return State::Over(None);
    }
    let mut headers = HeaderMap::with_capacity(lines.len());
    for header in lines {
        let name = HeaderName::from_bytes(header.name.as_bytes());
        let (Ok(name), Ok(value)) = (name, HeaderValue::from_bytes(header.value)) else { return MALFORMED };
        headers.append(name, value);
    }
    State::Over(Some(headers))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The body of `text` read in these pieces; an error also when the body is incomplete or bytes remain.
    fn read(text: &[u8], cuts: &[usize]) -> Result<(Vec<u8>, Option<HeaderMap>), Option<ChunkError>> {
        let (mut chunks, mut buffer, mut body, mut trailers) =
            (Chunks::default(), BytesMut::new(), Vec::new(), None);
        let (mut rest, mut cuts) = (text, cuts.iter().cycle());
        loop {
            match chunks.next(&mut buffer) {
                Ok(Next::Piece(piece)) => body.extend_from_slice(&piece),
                Ok(Next::Trailers(headers)) => trailers = Some(headers),
                Ok(Next::Over) if buffer.is_empty() && rest.is_empty() => return Ok((body, trailers)),
                Ok(Next::Over) => return Err(None),
                Ok(Next::More) if rest.is_empty() => return Err(None),
                Ok(Next::More) => {
                    let (now, later) =
                        rest.split_at(cuts.next().copied().unwrap_or(rest.len()).clamp(1, rest.len()));
                    buffer.extend_from_slice(now);
                    rest = later;
                }
                Err(error) => return Err(Some(error)),
            }
        }
    }

    #[track_caller]
    fn check(text: &str, expected: Result<&str, Option<ChunkError>>) {
        for cuts in [vec![], vec![1], vec![2], vec![3, 1]] {
            let result = read(text.as_bytes(), &cuts).map(|(body, _)| String::from_utf8(body).unwrap());
            assert_eq!(result, expected.map(str::to_owned), "{text:?} by {cuts:?}");
        }
    }

    #[test]
    fn well_formed_chunks_are_decoded_and_others_refused() {
        check("0\r\n\r\n", Ok(""));
        check("2\r\nab\r\n0\r\n\r\n", Ok("ab"));
        check("2\r\nab\r\n003;x=\"y\"\r\ncde\r\n00\r\n\r\n", Ok("abcde"));
        check("0000000002\r\nab\r\n00000000\r\n\r\n", Ok("ab"));
        check("A \t\r\n0123456789\r\n0\r\n\r\n", Ok("0123456789"));
        let malformed = Err(Some(ChunkError::Malformed));
        for text in [
            "\r\n",
            "g\r\n",
            "-1\r\na\r\n",
            "2\nab\r\n",
            "2\r\nabc\r\n",
            "2\r\nab\n",
            "2\r\nabXY0\r\n\r\n",
            "2\r\nab\rX0\r\n\r\n",
            "1 1\r\na\r\n",
            "2;a\nb\r\nab\r\n",
            "2\rab",
            "0\r\nx\r\n\r\n",
            "0\r\na: 1\n\r\n",
            "0\r\na: 1\rb\r\n\r\n",
        ] {
            check(text, malformed);
        }
        check("10000000000000000\r\n", Err(Some(ChunkError::TooLarge)));
        check(&format!("1;{}\r\na\r\n", "x".repeat(17_000)), Err(Some(ChunkError::TooLarge)));
        check(&format!("0\r\nx: {}\r\n\r\n", "x".repeat(17_000)), Err(Some(ChunkError::TooLarge)));
        for text in ["", "2\r\nab", "2\r\nab\r\n", "2\r\nab\r\n0\r\n", "0\r\n\r\nmore"] {
            check(text, Err(None));
        }
    }

    #[test]
    fn the_pieces_before_a_fault_are_forwarded() {
        let mut chunks = Chunks::default();
        let mut buffer = BytesMut::from("2\r\nab\r\nzz");
        assert!(matches!(chunks.next(&mut buffer), Ok(Next::Piece(piece)) if piece == "ab"));
        assert_eq!(chunks.next(&mut buffer).unwrap_err(), ChunkError::Malformed);
    }

    #[test]
    fn trailers_end_the_body() {
        let (body, trailers) = read(b"1\r\na\r\n0\r\nx-sum: 1\r\nx-b: 2\r\n\r\n", &[]).unwrap();
        assert_eq!((body.as_slice(), trailers.unwrap()["x-sum"].as_bytes()), (&b"a"[..], &b"1"[..]));
    }

    #[test]
    fn small_chunks_are_one_piece_and_the_end_is_known_with_it() {
        let mut chunks = Chunks::default();
        let mut buffer = BytesMut::from(&*("4\r\nabcd\r\n".repeat(100) + "0\r\n\r\n"));
        assert!(matches!(chunks.next(&mut buffer), Ok(Next::Piece(piece)) if piece.len() == 400));
        assert!(chunks.is_over() && buffer.is_empty());
    }

    proptest! {
        #[test]
        fn any_chunks_are_decoded_in_any_pieces(
            bodies in prop::collection::vec((prop::collection::vec(any::<u8>(), 1..40), 0..3usize), 0..12),
            large in prop::option::of(0..12usize),
            cuts in prop::collection::vec(1..60_000usize, 1..6),
            fine in any::<bool>(),
        ) {
            let (mut text, mut whole) = (Vec::new(), Vec::new());
            for (at, (body, zeros)) in bodies.iter().enumerate() {
                let body = if large == Some(at) { body.repeat(2_000) } else { body.clone() };
                text.extend_from_slice(format!("{}{:X}\r\n", "0".repeat(*zeros), body.len()).as_bytes());
                text.extend_from_slice(&body);
                text.extend_from_slice(b"\r\n");
                whole.extend_from_slice(&body);
            }
            text.extend_from_slice(b"0\r\n\r\n");
            let cuts: Vec<usize> = if fine { cuts.iter().map(|cut| cut % 7 + 1).collect() } else { cuts };
            prop_assert_eq!(read(&text, &cuts).unwrap().0, whole);
        }

        #[test]
        fn any_bytes_have_one_result_in_any_pieces(text in prop::collection::vec(prop_oneof![
            Just(b'0'), Just(b'2'), Just(b'\r'), Just(b'\n'), Just(b';'), any::<u8>()], 0..80),
            cut in 1..20usize) {
            let one = read(&text, &[]);
            prop_assert_eq!(one.is_ok(), read(&text, &[cut]).is_ok());
        }
    }
}
