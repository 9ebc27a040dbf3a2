//! Replaces the pool's keys in a response body, its trailers and the response headers with their short forms, such as
//! `sk_6c036526...d452b`. Removes headers whose name contains a key. Data without a key is forwarded without a copy.
//! A key in a compressed body cannot be replaced, so `compressed_search` only searches such a body. The body ends with
//! an error if it contains a key.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue};
use http_body::{Body, Frame, SizeHint};

use super::add_to_hint;
use super::budget::BufferBudget;
use super::compressed_search::{self, CompressedSearch, SearchProgress, WithholdReason};
use super::decode::Coding;
use crate::secret::{RedactedChunk, Redactor, StreamRedaction};

/// A body in which keys are replaced with their short forms. The declared length stays valid: a replaced key
/// makes the body shorter, so spaces are appended, which JSON and plain text allow. A compressed body ends
/// with an error if the body contains a key or the search does not fit the buffer budget.
#[derive(Debug)]
pub struct RedactedBody<B> {
    body: B,
    search: BodySearch,
}

#[derive(Debug)]
enum BodySearch {
    /// The body is forwarded without a search.
    Off,
    /// Keys are replaced in the bytes of the body.
    Plain(PlainSearch),
    /// The body is decompressed and searched.
    Compressed(Box<CompressedSearch>),
}

/// The search of a body whose bytes are searched and redacted as they are received.
#[derive(Debug)]
struct PlainSearch {
    redactor: Arc<Redactor>,
    redaction: StreamRedaction,
    /// The part of the declared length that is not sent yet, or `None` without a declared length.
    unsent_length: Option<u64>,
    /// The trailers, which follow the bytes held back by `redaction` and the padding.
    trailers: Option<HeaderMap>,
    /// Whether the inner body has ended. Held-back bytes and padding may remain.
    has_ended: bool,
}

/// Maximum size of a frame of padding, because a response with many keys can need a large amount of padding.
const MAX_PADDING_FRAME_SIZE: usize = 16 * 1024;

impl<B: Body> RedactedBody<B> {
    /// Wraps a body without codings. If `redactor` is `None`, the body is not searched.
    pub fn new(body: B, redactor: Option<Arc<Redactor>>) -> Self {
        let unsent_length = body.size_hint().exact();
        let plain = |redactor| {
            BodySearch::Plain(PlainSearch {
                redactor,
                redaction: StreamRedaction::default(),
                unsent_length,
                trailers: None,
                has_ended: false,
            })
        };
        Self { body, search: redactor.map_or(BodySearch::Off, plain) }
    }

    /// Wraps a body with `codings`, in the order in which they were applied. `None` means that Keychoir cannot decode
    /// the codings. In that case, the encoded bytes are searched and redacted. The buffers of the search of a
    /// compressed body count against `budget`.
    pub fn with_codings(
        body: B,
        redactor: Option<Arc<Redactor>>,
        codings: Option<Vec<Coding>>,
        budget: &BufferBudget,
    ) -> Self {
        match (redactor, codings) {
            (Some(redactor), Some(codings)) if !codings.is_empty() => {
                let search = CompressedSearch::new(
                    redactor,
                    &codings,
                    budget.reservation(compressed_search::UNBUDGETED_BYTES),
                );
                Self { body, search: BodySearch::Compressed(Box::new(search)) }
            }
            (redactor, Some(_) | None) => Self::new(body, redactor),
        }
    }
}

impl PlainSearch {
    /// Replaces the keys in `data`. The end of `data` is held back if it may be the beginning of a key.
    fn redact(&mut self, mut data: Bytes) -> Bytes {
        match self.redaction.redact_chunk(&self.redactor, &data) {
            RedactedChunk::Prefix(length) => data.truncate(length),
            RedactedChunk::Replaced(redacted) => data = redacted.into(),
        }
        self.unsent_length = self.unsent_length.map(|length| length.saturating_sub(data.len() as u64));
        data
    }

    /// Ends the body. The first call returns the held-back bytes and padding, and later calls return further
    /// padding.
    fn finish(&mut self) -> Bytes {
        self.has_ended = true;
        let mut remaining_data = self.redaction.finish();
        if let Some(unsent_length) = &mut self.unsent_length {
            let padded_length =
                usize::try_from(*unsent_length).unwrap_or(usize::MAX).min(MAX_PADDING_FRAME_SIZE);
            remaining_data.resize(padded_length.max(remaining_data.len()), b' ');
            *unsent_length = unsent_length.saturating_sub(remaining_data.len() as u64);
        }
        remaining_data.into()
    }

    fn is_complete(&self) -> bool {
        self.redaction.is_idle() && matches!(self.unsent_length, None | Some(0)) && self.trailers.is_none()
    }

    fn poll_frame<B: Body<Data = Bytes> + Unpin>(
        &mut self,
        body: &mut B,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        if self.has_ended {
            let remaining_data = self.finish();
            if !remaining_data.is_empty() {
                return Poll::Ready(Some(Ok(Frame::data(remaining_data))));
            }
            return Poll::Ready(self.trailers.take().map(|trailers| Ok(Frame::trailers(trailers))));
        }
        let Some(frame) = ready!(Pin::new(&mut *body).poll_frame(cx)?) else {
            let remaining_data = self.finish();
            return Poll::Ready((!remaining_data.is_empty()).then(|| Ok(Frame::data(remaining_data))));
        };
        Poll::Ready(Some(Ok(match frame.into_data().map_err(Frame::into_trailers) {
            Ok(data) if body.is_end_stream() => {
                let (data, rest) = (self.redact(data), self.finish());
                Frame::data(if rest.is_empty() { data } else { [data, rest].concat().into() })
            }
            Ok(data) => Frame::data(self.redact(data)),
            Err(Ok(mut trailers)) => {
                redact_headers(&mut trailers, &self.redactor);
                let remaining_data = self.finish();
                if remaining_data.is_empty() {
                    Frame::trailers(trailers)
                } else {
                    self.trailers = Some(trailers);
                    Frame::data(remaining_data)
                }
            }
            Err(Err(unknown_frame)) => unknown_frame,
        })))
    }
}

impl CompressedSearch {
    fn poll_frame<B>(
        &mut self,
        body: &mut B,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>>
    where
        B: Body<Data = Bytes, Error: From<WithholdReason>> + Unpin,
    {
        loop {
            if let Some(frame) = self.pop_released() {
                return Poll::Ready(Some(Ok(frame)));
            }
            if self.is_busy() {
                if self.run_turn()? == SearchProgress::Incomplete {
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                continue;
            }
            let Some(frame) = ready!(Pin::new(&mut *body).poll_frame(cx)?) else {
                if self.is_empty() {
                    return Poll::Ready(None);
                }
                self.finish(None);
                continue;
            };
            match frame.into_data().map_err(Frame::into_trailers) {
                Ok(data) => self.push(data),
                Err(Ok(mut trailers)) => {
                    redact_headers(&mut trailers, self.redactor());
                    self.finish(Some(Frame::trailers(trailers)));
                }
                Err(Err(unknown_frame)) => self.finish(Some(unknown_frame)),
            }
        }
    }
}

/// Replaces keys in header values with their short forms, and removes headers whose name contains a key.
pub fn redact_headers(headers: &mut HeaderMap, redactor: &Redactor) {
    let has_key = |name: &&HeaderName| redactor.redact(name.as_str().as_bytes()).is_some();
    // The key in a name is not replaced, because a different name would be a different header.
    for name in headers.keys().filter(has_key).cloned().collect::<Vec<_>>() {
        headers.remove(name);
    }
    for value in headers.values_mut() {
        if let Some(redacted) = redactor.redact(value.as_bytes()) {
            // The conversion does not fail, because a short form consists of the same characters as its key.
            *value = HeaderValue::from_bytes(&redacted).unwrap_or_else(|_| HeaderValue::from_static("..."));
        }
    }
}

impl<B> Body for RedactedBody<B>
where
    B: Body<Data = Bytes, Error: From<WithholdReason>> + Unpin,
{
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let Self { body, search } = &mut *self;
        match search {
            BodySearch::Off => Pin::new(body).poll_frame(cx),
            BodySearch::Plain(search) => search.poll_frame(body, cx),
            BodySearch::Compressed(search) => search.poll_frame(body, cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        let is_search_complete = match &self.search {
            BodySearch::Off => true,
            BodySearch::Plain(search) => search.is_complete(),
            BodySearch::Compressed(search) => search.is_empty(),
        };
        is_search_complete && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        match &self.search {
            BodySearch::Off => self.body.size_hint(),
            // Without a declared length, short forms make the body shorter by an unknown amount.
            BodySearch::Plain(search) => {
                search.unsent_length.map_or_else(SizeHint::default, SizeHint::with_exact)
            }
            BodySearch::Compressed(search) => add_to_hint(&self.body.size_hint(), search.unsent_bytes()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use http_body_util::{BodyExt, Full, StreamBody};

    use super::super::decode::tests::gzip;
    use super::*;
    use crate::secret::ApiKey;

    const KEY: &str = "sk_6c036526aaaabbbbccccddddeeeeffff0000111122223333d452b";
    const SHORT_FORM: &str = "sk_6c036526...d452b";

    fn redactor() -> Option<Arc<Redactor>> {
        Some(Arc::new(Redactor::new([ApiKey::new(KEY).unwrap()].iter())))
    }

    /// A stream of scripted frames.
    struct FrameStream(VecDeque<Frame<Bytes>>);

    impl futures_core::Stream for FrameStream {
        type Item = Result<Frame<Bytes>, WithholdReason>;

        fn poll_next(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
            Poll::Ready(self.0.pop_front().map(Ok))
        }
    }

    /// Returns a body of `chunks` without a declared length.
    fn streamed_body(chunks: &[&str], trailers: Option<HeaderMap>) -> StreamBody<FrameStream> {
        let data = chunks.iter().map(|chunk| Frame::data(Bytes::copy_from_slice(chunk.as_bytes())));
        StreamBody::new(FrameStream(data.chain(trailers.map(Frame::trailers)).collect()))
    }

    #[tokio::test]
    async fn a_redacted_body_has_its_declared_length() {
        for text in [format!("\"{KEY}\" and {KEY}."), KEY.to_owned(), "no key".to_owned(), String::new()] {
            let source =
                Full::new(Bytes::from(text.clone())).map_err(|never| -> WithholdReason { match never {} });
            let mut body = RedactedBody::new(source, redactor());
            assert_eq!(body.size_hint().exact(), Some(text.len() as u64));
            let whole_body = (&mut body).collect().await.unwrap().to_bytes();
            assert_eq!(whole_body.len(), text.len());
            assert_eq!(whole_body.trim_ascii_end(), text.replace(KEY, SHORT_FORM).as_bytes());
            assert!(body.is_end_stream());
        }
    }

    #[tokio::test]
    async fn a_stream_of_unknown_length_is_not_padded() {
        let (start, end) = KEY.split_at(20);
        let mut body = RedactedBody::new(streamed_body(&["a ", start, end, " b sk_6c03"], None), redactor());
        let mut chunks = Vec::new();
        while let Some(frame) = body.frame().await {
            chunks.push(String::from_utf8(frame.unwrap().into_data().unwrap().to_vec()).unwrap());
        }
        assert_eq!(chunks, ["a ", "sk_6", "c036526...d452b", " b sk_6", "c03"]);
    }

    #[tokio::test]
    async fn trailers_are_sent_last_and_redacted() {
        let trailers = HeaderMap::from_iter([("x-key".parse().unwrap(), KEY.parse().unwrap())]);
        let mut body = RedactedBody::new(streamed_body(&["sk_6c03"], Some(trailers)), redactor());
        let mut next_frame = async || body.frame().await.unwrap().unwrap();
        assert_eq!(next_frame().await.into_data().unwrap(), "sk_6");
        assert_eq!(next_frame().await.into_data().unwrap(), "c03");
        assert_eq!(next_frame().await.into_trailers().unwrap()["x-key"], SHORT_FORM);
    }

    #[tokio::test]
    async fn a_body_without_a_redactor_is_unchanged() {
        let body = RedactedBody::new(streamed_body(&[KEY], None), None);
        assert_eq!(body.collect().await.unwrap().to_bytes(), KEY);
    }

    /// Returns a redacted body of `encoded_body`, which is compressed with gzip.
    fn compressed_body(
        encoded_body: Vec<u8>,
    ) -> RedactedBody<impl Body<Data = Bytes, Error = WithholdReason> + Unpin> {
        let body = Full::new(Bytes::from(encoded_body)).map_err(|never| -> WithholdReason { match never {} });
        RedactedBody::with_codings(body, redactor(), Some(vec![Coding::Gzip]), &BufferBudget::empty())
    }

    #[tokio::test]
    async fn a_compressed_body_is_relayed_unchanged_or_withheld() {
        let encoded_body = gzip(b"the beginning of a key: sk_6c036526aaaa");
        let mut body = compressed_body(encoded_body.clone());
        assert_eq!(body.size_hint().exact(), Some(encoded_body.len() as u64));
        assert_eq!((&mut body).collect().await.unwrap().to_bytes(), encoded_body);
        assert!(body.is_end_stream());
        let error = compressed_body(gzip(format!("a {KEY} b").as_bytes())).collect().await.unwrap_err();
        assert_eq!(error, WithholdReason::ContainsKey);
    }

    #[tokio::test]
    async fn a_body_with_unknown_codings_or_none_is_redacted() {
        for codings in [None, Some(Vec::new())] {
            let body = RedactedBody::with_codings(
                streamed_body(&[KEY], None),
                redactor(),
                codings,
                &BufferBudget::empty(),
            );
            assert_eq!(body.collect().await.unwrap().to_bytes(), SHORT_FORM);
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
