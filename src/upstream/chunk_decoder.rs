//! Decodes a response body in the chunked transfer coding (RFC 9112, section 7.1). Adjacent small chunks are joined in
//! place in the read buffer, so that one read returns few frames.

use std::fmt;

use bytes::{Buf, Bytes, BytesMut};
use http::HeaderMap;
use http::header::{HeaderName, HeaderValue};

/// Maximum size of a chunk that is moved directly after the previous chunk. Moving a chunk is cheaper than returning
/// a separate frame.
const MAX_MOVED_BYTES: u64 = 16 * 1024;
/// Maximum number of bytes of chunk extensions in one body. The decoder ignores the extensions, so a provider has no
/// reason to send more of them.
const MAX_EXTENSION_BYTES: u64 = 16 * 1024;
/// Maximum number of bytes of the trailers of one body.
const MAX_TRAILER_BYTES: usize = 16 * 1024;
/// Maximum number of trailers of one body.
const MAX_TRAILERS: usize = 64;

/// Decodes one chunked body.
#[derive(Debug, Default)]
pub struct ChunkDecoder {
    state: DecoderState,
    extension_bytes: u64,
}

/// The part of a body that the decoder expects next. A number in the states of a size line is the size of the chunk.
#[derive(Debug, Default)]
enum DecoderState {
    /// The first digit of a chunk size.
    #[default]
    Size,
    /// More digits of the size, or the end of the size.
    Digits(u64),
    /// More white space after the size, or the end of the size line.
    Blanks(u64),
    /// More bytes of a chunk extension, or the end of the size line.
    Extension(u64),
    /// The line feed of the size line.
    SizeLf(u64),
    /// The remaining bytes of a chunk, whose number the variant contains.
    Data(u64),
    /// The carriage return after a chunk.
    DataCr,
    /// The line feed after a chunk.
    DataLf,
    /// More trailers. The variant contains the received lines of the trailers.
    Trailers(Vec<u8>),
    /// Nothing, because the body is complete. The variant contains the trailers until they are returned.
    Complete(Option<HeaderMap>),
    /// Nothing, because the body is invalid.
    Failed(ChunkError),
}

/// The next part of a chunked body.
#[derive(Debug)]
pub enum DecodedPart {
    /// Bytes of the body.
    Data(Bytes),
    /// The trailers, which complete the body.
    Trailers(HeaderMap),
    /// More bytes must be read to decode the next part.
    Incomplete,
    /// The body is complete.
    Complete,
}

/// The reason why the received bytes are not a valid chunked body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChunkError {
    /// A chunk or a trailer is malformed.
    Malformed,
    /// A chunk size, the extensions or the trailers are too large.
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

impl ChunkDecoder {
    /// Decodes the next part of the body and removes it from `read_buf`.
    ///
    /// # Errors
    ///
    /// Fails when the bytes are not a valid chunked body. The preceding valid data is returned first.
    pub fn decode(&mut self, read_buf: &mut BytesMut) -> Result<DecodedPart, ChunkError> {
        // `read_buf[..data_end]` contains joined data. `read_buf[..position]` is decoded.
        let (mut data_end, mut position) = (0, 0);
        while position < read_buf.len() {
            match &mut self.state {
                DecoderState::Data(remaining) => {
                    let count =
                        usize::try_from(*remaining).unwrap_or(usize::MAX).min(read_buf.len() - position);
                    if data_end == 0 {
                        // The first chunk is not moved. The framing bytes before the chunk are dropped.
                        read_buf.advance(position);
                        position = 0;
                    } else if *remaining > MAX_MOVED_BYTES {
                        break;
                    } else {
                        read_buf.copy_within(position..position + count, data_end);
                    }
                    (data_end, position) = (data_end + count, position + count);
                    *remaining -= count as u64;
                    if *remaining == 0 {
                        self.state = DecoderState::DataCr;
                    }
                }
                DecoderState::Complete(_) | DecoderState::Failed(_) => break,
                DecoderState::Trailers(_) => position += self.collect_trailers(&read_buf[position..]),
                DecoderState::Size
                | DecoderState::Digits(_)
                | DecoderState::Blanks(_)
                | DecoderState::Extension(_)
                | DecoderState::SizeLf(_)
                | DecoderState::DataCr
                | DecoderState::DataLf => position += self.decode_framing(&read_buf[position..]),
            }
        }
        if data_end > 0 {
            let data = read_buf.split_to(data_end).freeze();
            read_buf.advance(position - data_end);
            return Ok(DecodedPart::Data(data));
        }
        read_buf.advance(position);
        match &mut self.state {
            DecoderState::Failed(error) => Err(*error),
            DecoderState::Complete(trailers) => {
                Ok(trailers.take().map_or(DecodedPart::Complete, DecodedPart::Trailers))
            }
            DecoderState::Size
            | DecoderState::Digits(_)
            | DecoderState::Blanks(_)
            | DecoderState::Extension(_)
            | DecoderState::SizeLf(_)
            | DecoderState::Data(_)
            | DecoderState::DataCr
            | DecoderState::DataLf
            | DecoderState::Trailers(_) => Ok(DecodedPart::Incomplete),
        }
    }

    /// Returns whether the body is complete and its trailers, if any, have been returned.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        matches!(self.state, DecoderState::Complete(None))
    }

    /// Decodes one or more bytes between two chunks, and returns their number. A usual size line, and a usual line end
    /// after a chunk, are decoded in one step.
    fn decode_framing(&mut self, bytes: &[u8]) -> usize {
        let decoded_step = match (&self.state, bytes) {
            (DecoderState::Size, _) => {
                decode_plain_size(bytes).map(|(size, length)| (DecoderState::Data(size), length))
            }
            (DecoderState::DataCr, [b'\r', b'\n', ..]) => Some((DecoderState::Size, 2)),
            _ => None,
        };
        if let Some((state, length)) = decoded_step {
            self.state = state;
            return length;
        }
        self.decode_framing_byte(bytes[0]);
        1
    }

    /// Decodes one byte of a size line, or of the line end after a chunk.
    fn decode_framing_byte(&mut self, byte: u8) {
        self.state = match (&self.state, byte) {
            (DecoderState::Size, _) => hex_digit(byte).map_or(MALFORMED, DecoderState::Digits),
            (DecoderState::Digits(size), _) if hex_digit(byte).is_some() => {
                let next_size = size
                    .checked_mul(16)
                    .zip(hex_digit(byte))
                    .and_then(|(shifted, digit)| shifted.checked_add(digit));
                next_size.map_or(DecoderState::Failed(ChunkError::TooLarge), DecoderState::Digits)
            }
            (DecoderState::Digits(size) | DecoderState::Blanks(size), b' ' | b'\t') => {
                DecoderState::Blanks(*size)
            }
            (DecoderState::Digits(size) | DecoderState::Blanks(size), b';') => DecoderState::Extension(*size),
            (
                DecoderState::Digits(size) | DecoderState::Blanks(size) | DecoderState::Extension(size),
                b'\r',
            ) => DecoderState::SizeLf(*size),
            // A line feed without a carriage return is rejected, because only some parsers end the line there.
            (DecoderState::Extension(_), b'\n') => MALFORMED,
            (DecoderState::Extension(size), _) => {
                self.extension_bytes += 1;
                let is_over_limit = self.extension_bytes > MAX_EXTENSION_BYTES;
                if is_over_limit {
                    DecoderState::Failed(ChunkError::TooLarge)
                } else {
                    DecoderState::Extension(*size)
                }
            }
            (DecoderState::SizeLf(0), b'\n') => DecoderState::Trailers(Vec::new()),
            (DecoderState::SizeLf(size), b'\n') => DecoderState::Data(*size),
            (DecoderState::DataCr, b'\r') => DecoderState::DataLf,
            (DecoderState::DataLf, b'\n') => DecoderState::Size,
            _ => MALFORMED,
        };
    }

    /// Collects the trailers up to and including the empty line after them. Returns the number of collected
    /// bytes.
    fn collect_trailers(&mut self, bytes: &[u8]) -> usize {
        let DecoderState::Trailers(lines) = &mut self.state else { return 0 };
        for (index, byte) in bytes.iter().enumerate() {
            lines.push(*byte);
            // A carriage return is valid only before a line feed, and a line feed only after a carriage
            // return.
            let follows_cr = lines.len() > 1 && lines[lines.len() - 2] == b'\r';
            let next_state = if follows_cr != (*byte == b'\n') {
                MALFORMED
            } else if lines.as_slice() == b"\r\n" || lines.ends_with(b"\r\n\r\n") {
                parse_trailers(lines)
            } else if lines.len() > MAX_TRAILER_BYTES {
                DecoderState::Failed(ChunkError::TooLarge)
            } else {
                continue;
            };
            self.state = next_state;
            return index + 1;
        }
        bytes.len()
    }
}

const MALFORMED: DecoderState = DecoderState::Failed(ChunkError::Malformed);

/// Maximum number of digits of a size that is decoded in one step.
const MAX_PLAIN_DIGITS: usize = 8;

/// Decodes a complete size line. Returns the size and the length of the line, or `None` if the line is incomplete, has
/// the size 0, or is not only a size of at most [`MAX_PLAIN_DIGITS`] digits.
fn decode_plain_size(bytes: &[u8]) -> Option<(u64, usize)> {
    let mut size = 0;
    for (index, byte) in bytes.iter().enumerate().take(MAX_PLAIN_DIGITS + 1) {
        let Some(digit) = hex_digit(*byte) else {
            return (size > 0 && bytes[index..].starts_with(b"\r\n")).then_some((size, index + 2));
        };
        size = size * 16 + digit;
    }
    None
}

fn hex_digit(byte: u8) -> Option<u64> {
    char::from(byte).to_digit(16).map(u64::from)
}

/// Parses the complete lines of the trailers. Returns the state in which the body is complete or has failed.
fn parse_trailers(lines: &[u8]) -> DecoderState {
    let mut slots = [httparse::EMPTY_HEADER; MAX_TRAILERS];
    let parsed_headers = match httparse::parse_headers(lines, &mut slots) {
        Ok(httparse::Status::Complete((_, parsed_headers))) => parsed_headers,
        Err(httparse::Error::TooManyHeaders) => return DecoderState::Failed(ChunkError::TooLarge),
        Ok(httparse::Status::Partial) | Err(_) => return MALFORMED,
    };
    if parsed_headers.is_empty() {
        return DecoderState::Complete(None);
    }
    let mut headers = HeaderMap::with_capacity(parsed_headers.len());
    for header in parsed_headers {
        let name = HeaderName::from_bytes(header.name.as_bytes());
        let (Ok(name), Ok(value)) = (name, HeaderValue::from_bytes(header.value)) else { return MALFORMED };
        headers.append(name, value);
    }
    DecoderState::Complete(Some(headers))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The reason why bytes are not exactly one chunked body.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum DecodeFailure {
        Incomplete,
        BytesAfterBody,
        Invalid(ChunkError),
    }

    /// Decodes `encoded`, which is received in segments of `segment_sizes`. Returns the body and its trailers.
    fn decode_all(
        encoded: &[u8],
        segment_sizes: &[usize],
    ) -> Result<(Vec<u8>, Option<HeaderMap>), DecodeFailure> {
        let (mut decoder, mut buffer, mut body, mut trailers) =
            (ChunkDecoder::default(), BytesMut::new(), Vec::new(), None);
        let (mut rest, mut sizes) = (encoded, segment_sizes.iter().cycle());
        loop {
            match decoder.decode(&mut buffer) {
                Ok(DecodedPart::Data(data)) => body.extend_from_slice(&data),
                Ok(DecodedPart::Trailers(headers)) => trailers = Some(headers),
                Ok(DecodedPart::Complete) if buffer.is_empty() && rest.is_empty() => {
                    return Ok((body, trailers));
                }
                Ok(DecodedPart::Complete) => return Err(DecodeFailure::BytesAfterBody),
                Ok(DecodedPart::Incomplete) if rest.is_empty() => return Err(DecodeFailure::Incomplete),
                Ok(DecodedPart::Incomplete) => {
                    let size = sizes.next().copied().unwrap_or(rest.len()).clamp(1, rest.len());
                    buffer.extend_from_slice(&rest[..size]);
                    rest = &rest[size..];
                }
                Err(error) => return Err(DecodeFailure::Invalid(error)),
            }
        }
    }

    /// Decodes `encoded` in segments of several sizes, and compares the body or the failure with the expected one.
    #[track_caller]
    fn check_decoded(encoded: &str, expected: Result<&str, DecodeFailure>) {
        for sizes in [vec![], vec![1], vec![2], vec![3, 1]] {
            let body =
                decode_all(encoded.as_bytes(), &sizes).map(|(body, _)| String::from_utf8(body).unwrap());
            assert_eq!(
                body,
                expected.map(str::to_owned),
                "{encoded:?} in segments of {sizes:?} bytes must be decoded as expected"
            );
        }
    }

    #[test]
    fn valid_chunks_are_decoded_and_malformed_chunks_are_rejected() {
        check_decoded("0\r\n\r\n", Ok(""));
        check_decoded("2\r\nab\r\n0\r\n\r\n", Ok("ab"));
        check_decoded("2\r\nab\r\n003;x=\"y\"\r\ncde\r\n00\r\n\r\n", Ok("abcde"));
        check_decoded("0000000002\r\nab\r\n00000000\r\n\r\n", Ok("ab"));
        check_decoded("A \t\r\n0123456789\r\n0\r\n\r\n", Ok("0123456789"));
        let malformed = Err(DecodeFailure::Invalid(ChunkError::Malformed));
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
            check_decoded(text, malformed);
        }
        let too_large = Err(DecodeFailure::Invalid(ChunkError::TooLarge));
        check_decoded("10000000000000000\r\n", too_large);
        check_decoded(&format!("1;{}\r\na\r\n", "x".repeat(17_000)), too_large);
        check_decoded(&format!("0\r\nx: {}\r\n\r\n", "x".repeat(17_000)), too_large);
        for text in ["", "2\r\nab", "2\r\nab\r\n", "2\r\nab\r\n0\r\n"] {
            check_decoded(text, Err(DecodeFailure::Incomplete));
        }
        check_decoded("0\r\n\r\nmore", Err(DecodeFailure::BytesAfterBody));
    }

    #[test]
    fn data_before_a_malformed_chunk_is_returned() {
        let mut decoder = ChunkDecoder::default();
        let mut buffer = BytesMut::from("2\r\nab\r\nzz");
        assert!(matches!(decoder.decode(&mut buffer), Ok(DecodedPart::Data(data)) if data == "ab"));
        assert_eq!(decoder.decode(&mut buffer).unwrap_err(), ChunkError::Malformed);
    }

    #[test]
    fn trailers_end_the_body() {
        let (body, trailers) = decode_all(b"1\r\na\r\n0\r\nx-sum: 1\r\nx-b: 2\r\n\r\n", &[]).unwrap();
        assert_eq!((body.as_slice(), trailers.unwrap()["x-sum"].as_bytes()), (&b"a"[..], &b"1"[..]));
    }

    #[test]
    fn small_chunks_are_joined_and_the_end_is_detected_with_them() {
        let mut decoder = ChunkDecoder::default();
        let mut buffer = BytesMut::from(&*("4\r\nabcd\r\n".repeat(100) + "0\r\n\r\n"));
        assert!(matches!(decoder.decode(&mut buffer), Ok(DecodedPart::Data(data)) if data.len() == 400));
        assert!(decoder.is_complete() && buffer.is_empty());
    }

    proptest! {
        #[test]
        fn any_chunks_are_decoded_in_any_segments(
            chunks in prop::collection::vec((prop::collection::vec(any::<u8>(), 1..40), 0..3usize), 0..12),
            large_chunk_index in prop::option::of(0..12usize),
            sizes in prop::collection::vec(1..60_000usize, 1..6),
            has_small_segments in any::<bool>(),
        ) {
            let (mut encoded, mut expected) = (Vec::new(), Vec::new());
            for (index, (chunk, leading_zeros)) in chunks.iter().enumerate() {
                let chunk = if large_chunk_index == Some(index) { chunk.repeat(2_000) } else { chunk.clone() };
                let size_line = format!("{}{:X}\r\n", "0".repeat(*leading_zeros), chunk.len());
                encoded.extend_from_slice(size_line.as_bytes());
                encoded.extend_from_slice(&chunk);
                encoded.extend_from_slice(b"\r\n");
                expected.extend_from_slice(&chunk);
            }
            encoded.extend_from_slice(b"0\r\n\r\n");
            let sizes: Vec<usize> =
                if has_small_segments { sizes.iter().map(|size| size % 7 + 1).collect() } else { sizes };
            prop_assert_eq!(decode_all(&encoded, &sizes).unwrap().0, expected);
        }

        #[test]
        fn the_segments_do_not_determine_whether_a_body_is_valid(encoded in prop::collection::vec(prop_oneof![
            Just(b'0'), Just(b'2'), Just(b'\r'), Just(b'\n'), Just(b';'), any::<u8>()], 0..80),
            size in 1..20usize) {
            prop_assert_eq!(decode_all(&encoded, &[]).is_ok(), decode_all(&encoded, &[size]).is_ok());
        }
    }
}
