//! Replaces the pool's keys in a response body by their short forms. A chunk without a key is forwarded
//! unchanged. `packed` searches compressed bodies, which end with an error when they contain a key.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue};
use http_body::{Body, Frame, SizeHint};

use super::budget::BufferBudget;
use super::decode::Coding;
use super::packed::{self, Turn, Withheld};
use crate::secret::{Passed, Redaction, Redactor};

/// A body in which keys are replaced by their short forms. It keeps the length of `Content-Length`: where a
/// short form replaced a longer key, spaces are appended at the end, which JSON and plain text
/// tolerate. A compressed body that contains a key, or whose search does not fit the buffer budget,
/// ends with an error instead.
#[derive(Debug)]
pub struct Redacted<B> {
    body: B,
    search: PlainOrCompressed,
}

#[derive(Debug)]
enum PlainOrCompressed {
    /// The body is not searched.
    Off,
    Plain(Plain),
    Compressed(Box<packed::CompressedSearch>),
}

#[derive(Debug)]
struct Plain {
    redactor: Arc<Redactor>,
    redaction: Redaction,
    /// Bytes of the announced length that are still to be sent; `None` when no length was announced.
    unsent_length: Option<u64>,
    /// Trailers to send after the held-back bytes.
    trailers: Option<HeaderMap>,
    /// Whether the body has ended and only held-back bytes and padding remain.
    has_ended: bool,
}

/// Size of the pieces of padding: a response with many keys can need a lot of it.
const PADDING_BYTES_MAX: usize = 16 * 1024;

impl<B: Body> Redacted<B> {
    /// Searches `body` with `redactor`, if there is one.
    pub fn new(body: B, redactor: Option<Arc<Redactor>>) -> Self {
        let unsent_length = body.size_hint().exact();
        let plain = |redactor| {
            PlainOrCompressed::Plain(Plain {
                redactor,
                redaction: Redaction::default(),
                unsent_length,
                trailers: None,
                has_ended: false,
            })
        };
        Self { body, search: redactor.map_or(PlainOrCompressed::Off, plain) }
    }

    /// Searches for keys in a body that is encoded with these codings, in the order of their application. With
    /// `None`, for codings that cannot be decoded, the encoded bytes are searched. The buffers of the search
    /// through a compressed body count against `budget`.
    pub fn coded(
        body: B,
        redactor: Option<Arc<Redactor>>,
        codings: Option<Vec<Coding>>,
        budget: &BufferBudget,
    ) -> Self {
        match (redactor, codings) {
            (Some(redactor), Some(codings)) if !codings.is_empty() => {
                let search = packed::CompressedSearch::new(redactor, &codings, budget.share(packed::FREE));
                Self { body, search: PlainOrCompressed::Compressed(Box::new(search)) }
            }
            (redactor, Some(_) | None) => Self::new(body, redactor),
        }
    }
}

impl Plain {
    fn pass(&mut self, mut piece: Bytes) -> Bytes {
        match self.redaction.pass(&self.redactor, &piece) {
            Passed::Start(length) => piece.truncate(length),
            Passed::Instead(bytes) => piece = bytes.into(),
        }
        self.unsent_length =
            self.unsent_length.map(|unsent_length| unsent_length.saturating_sub(piece.len() as u64));
        piece
    }

    /// The remaining bytes at the end of the body, or the first piece of them.
    fn finish(&mut self) -> Bytes {
        self.has_ended = true;
        let mut rest = self.redaction.finish();
        if let Some(unsent_length) = &mut self.unsent_length {
            let padded = usize::try_from(*unsent_length).unwrap_or(usize::MAX).min(PADDING_BYTES_MAX);
            rest.resize(padded.max(rest.len()), b' ');
            *unsent_length = unsent_length.saturating_sub(rest.len() as u64);
        }
        rest.into()
    }

    fn is_over(&self) -> bool {
        self.redaction.is_idle()
            && self.unsent_length.is_none_or(|unsent_length| unsent_length == 0)
            && self.trailers.is_none()
    }

    fn poll_frame<B: Body<Data = Bytes> + Unpin>(
        &mut self,
        body: &mut B,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        if self.has_ended {
            let rest = self.finish();
            if !rest.is_empty() {
                return Poll::Ready(Some(Ok(Frame::data(rest))));
            }
            return Poll::Ready(self.trailers.take().map(|trailers| Ok(Frame::trailers(trailers))));
        }
        let Some(frame) = ready!(Pin::new(&mut *body).poll_frame(cx)?) else {
            let rest = self.finish();
            return Poll::Ready((!rest.is_empty()).then(|| Ok(Frame::data(rest))));
        };
        Poll::Ready(Some(Ok(match frame.into_data().map_err(Frame::into_trailers) {
            Ok(piece) if body.is_end_stream() => {
                let (piece, rest) = (self.pass(piece), self.finish());
                Frame::data(if rest.is_empty() { piece } else { [piece, rest].concat().into() })
            }
            Ok(piece) => Frame::data(self.pass(piece)),
            Err(Ok(mut trailers)) => {
                redact_headers(&mut trailers, &self.redactor);
                let rest = self.finish();
                if rest.is_empty() {
                    Frame::trailers(trailers)
                } else {
                    self.trailers = Some(trailers);
                    Frame::data(rest)
                }
            }
            Err(Err(other)) => other,
        })))
    }
}

impl packed::CompressedSearch {
    fn poll_frame<B>(
        &mut self,
        body: &mut B,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>>
    where
        B: Body<Data = Bytes, Error: From<Withheld>> + Unpin,
    {
        loop {
            if let Some(frame) = self.next() {
                return Poll::Ready(Some(Ok(frame)));
            }
            if self.is_busy() {
                if self.turn()? == Turn::More {
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                continue;
            }
            let Some(frame) = ready!(Pin::new(&mut *body).poll_frame(cx)?) else {
                if self.is_over() {
                    return Poll::Ready(None);
                }
                self.end(None);
                continue;
            };
            match frame.into_data().map_err(Frame::into_trailers) {
                Ok(piece) => self.take(piece),
                Err(Ok(mut trailers)) => {
                    redact_headers(&mut trailers, self.redactor());
                    self.end(Some(Frame::trailers(trailers)));
                }
                Err(Err(other)) => self.end(Some(other)),
            }
        }
    }
}

/// Replaces keys in header values, and removes headers whose name contains a key.
pub fn redact_headers(headers: &mut HeaderMap, redactor: &Redactor) {
    let has_key = |name: &&HeaderName| redactor.redacted(name.as_str().as_bytes()).is_some();
    // A header name cannot be replaced by a short form.
    for name in headers.keys().filter(has_key).cloned().collect::<Vec<_>>() {
        headers.remove(name);
    }
    for value in headers.values_mut() {
        if let Some(redacted) = redactor.redacted(value.as_bytes()) {
            // A short form consists of the same plain characters as its key.
            *value = HeaderValue::from_bytes(&redacted).unwrap_or_else(|_| HeaderValue::from_static("..."));
        }
    }
}

impl<B> Body for Redacted<B>
where
    B: Body<Data = Bytes, Error: From<Withheld>> + Unpin,
{
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let Self { body, search } = &mut *self;
        match search {
            PlainOrCompressed::Off => Pin::new(body).poll_frame(cx),
            PlainOrCompressed::Plain(search) => search.poll_frame(body, cx),
            PlainOrCompressed::Compressed(search) => search.poll_frame(body, cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        let is_over = match &self.search {
            PlainOrCompressed::Off => true,
            PlainOrCompressed::Plain(search) => search.is_over(),
            PlainOrCompressed::Compressed(search) => search.is_over(),
        };
        is_over && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let rest = self.body.size_hint();
        match &self.search {
            PlainOrCompressed::Off => rest,
            PlainOrCompressed::Plain(Plain { unsent_length: Some(unsent_length), .. }) => {
                SizeHint::with_exact(*unsent_length)
            }
            // Short forms make the body shorter by an amount that is not known in advance.
            PlainOrCompressed::Plain(Plain { unsent_length: None, .. }) => SizeHint::default(),
            PlainOrCompressed::Compressed(search) => {
                let unsent = search.unsent_bytes();
                let mut hint = SizeHint::new();
                hint.set_lower(rest.lower() + unsent);
                if let Some(upper) = rest.upper() {
                    hint.set_upper(upper + unsent);
                }
                hint
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use flate2::Compression;
    use flate2::write::GzEncoder;
    use http_body_util::{BodyExt, Full, StreamBody};

    use super::*;
    use crate::secret::ApiKey;

    const KEY: &str = "sk_6c036526aaaabbbbccccddddeeeeffff0000111122223333d452b";
    const SHORT: &str = "sk_6c036526...d452b";

    fn redactor() -> Option<Arc<Redactor>> {
        Some(Arc::new(Redactor::new([ApiKey::new(KEY).unwrap()].iter())))
    }

    struct Frames(VecDeque<Frame<Bytes>>);

    impl futures_core::Stream for Frames {
        type Item = Result<Frame<Bytes>, Withheld>;

        fn poll_next(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
            Poll::Ready(self.0.pop_front().map(Ok))
        }
    }

    /// A body of these pieces without a known length.
    fn streamed(pieces: &[&str], trailers: Option<HeaderMap>) -> StreamBody<Frames> {
        let pieces = pieces.iter().map(|piece| Frame::data(Bytes::copy_from_slice(piece.as_bytes())));
        StreamBody::new(Frames(pieces.chain(trailers.map(Frame::trailers)).collect()))
    }

    #[tokio::test]
    async fn a_body_keeps_its_announced_length() {
        for text in [format!("\"{KEY}\" and {KEY}."), KEY.to_owned(), "nothing".to_owned(), String::new()] {
            let full = Full::new(Bytes::from(text.clone())).map_err(|never| -> Withheld { match never {} });
            let mut body: Redacted<_> = Redacted::new(full, redactor());
            assert_eq!(body.size_hint().exact(), Some(text.len() as u64));
            let whole = (&mut body).collect().await.unwrap().to_bytes();
            assert_eq!(whole.len(), text.len());
            assert_eq!(whole.trim_ascii_end(), text.replace(KEY, SHORT).as_bytes());
            assert!(body.is_end_stream());
        }
    }

    #[tokio::test]
    async fn a_stream_of_unknown_length_is_not_padded() {
        let (start, end) = KEY.split_at(20);
        let mut body = Redacted::new(streamed(&["a ", start, end, " b sk_6c03"], None), redactor());
        let mut pieces = Vec::new();
        while let Some(frame) = body.frame().await {
            pieces.push(String::from_utf8(frame.unwrap().into_data().unwrap().to_vec()).unwrap());
        }
        assert_eq!(pieces, ["a ", "sk_6", "c036526...d452b", " b sk_6", "c03"]);
    }

    #[tokio::test]
    async fn trailers_are_last_and_without_keys() {
        let trailers = HeaderMap::from_iter([("x-key".parse().unwrap(), KEY.parse().unwrap())]);
        let mut body = Redacted::new(streamed(&["sk_6c03"], Some(trailers)), redactor());
        let mut data = async || body.frame().await.unwrap().unwrap();
        assert_eq!(data().await.into_data().unwrap(), "sk_6");
        assert_eq!(data().await.into_data().unwrap(), "c03");
        assert_eq!(data().await.into_trailers().unwrap()["x-key"], SHORT);
    }

    #[tokio::test]
    async fn a_body_without_a_redactor_is_unchanged() {
        let body = Redacted::new(streamed(&[KEY], None), None);
        assert_eq!(body.collect().await.unwrap().to_bytes(), KEY);
    }

    fn gzip(text: &str) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        std::io::Write::write_all(&mut encoder, text.as_bytes()).unwrap();
        encoder.finish().unwrap()
    }

    fn coded(body: Vec<u8>) -> Redacted<impl Body<Data = Bytes, Error = Withheld> + Unpin> {
        let body = Full::new(Bytes::from(body)).map_err(|never| -> Withheld { match never {} });
        Redacted::coded(body, redactor(), Some(vec![Coding::Gzip]), &BufferBudget::none())
    }

    #[tokio::test]
    async fn a_compressed_body_is_relayed_unchanged_or_withheld() {
        let clean = gzip("nothing sk_6c036526aaaa");
        let mut body = coded(clean.clone());
        assert_eq!(body.size_hint().exact(), Some(clean.len() as u64));
        assert_eq!((&mut body).collect().await.unwrap().to_bytes(), clean);
        assert!(body.is_end_stream());
        assert_eq!(coded(gzip(&format!("a {KEY} b"))).collect().await.unwrap_err(), Withheld::KeyInside);
    }

    #[tokio::test]
    async fn an_undecodable_body_is_searched_in_its_encoding() {
        for codings in [None, Some(Vec::new())] {
            let body = Redacted::coded(streamed(&[KEY], None), redactor(), codings, &BufferBudget::none());
            assert_eq!(body.collect().await.unwrap().to_bytes(), SHORT);
        }
    }

    #[test]
    fn a_header_whose_name_contains_a_key_is_removed() {
        let mut headers = HeaderMap::new();
        headers.insert(HeaderName::try_from(KEY).unwrap(), HeaderValue::from_static("a"));
        headers.insert("x-a", HeaderValue::from_static("b"));
        redact_headers(&mut headers, &redactor().unwrap());
        assert_eq!(headers.keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["x-a"]);
    }
}
