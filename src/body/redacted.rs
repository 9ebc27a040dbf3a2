//! An answer's body on its way to the client, without the keys of the pool in it. A piece without a
//! key goes on as it is.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue};
use http_body::{Body, Frame, SizeHint};

use crate::secret::{Passed, Redaction, Redactor};

/// A body in which keys are replaced by their short forms. Its length stays what was announced:
/// where a short form took a longer key's place, white space follows at the end, which documents
/// and texts allow.
#[derive(Debug)]
pub struct Redacted<B> {
    body: B,
    search: Option<Search>,
}

#[derive(Debug)]
struct Search {
    redactor: Arc<Redactor>,
    redaction: Redaction,
    /// What the announced length still leaves room for; `None` when none was announced.
    owed: Option<u64>,
    /// They come after what was held back.
    trailers: Option<HeaderMap>,
}

impl<B: Body> Redacted<B> {
    /// Searches `body`, if there is something to search it with.
    pub fn new(body: B, redactor: Option<Arc<Redactor>>) -> Self {
        let owed = body.size_hint().exact();
        let search = redactor.map(|redactor| Search {
            redactor,
            redaction: Redaction::default(),
            owed,
            trailers: None,
        });
        Self { body, search }
    }
}

impl Search {
    fn pass(&mut self, mut piece: Bytes) -> Bytes {
        match self.redaction.pass(&self.redactor, &piece) {
            Passed::Start(length) => piece.truncate(length),
            Passed::Instead(bytes) => piece = bytes.into(),
        }
        self.owed = self.owed.map(|owed| owed.saturating_sub(piece.len() as u64));
        piece
    }

    /// What is left to say at the end.
    fn finish(&mut self) -> Bytes {
        let mut rest = self.redaction.finish();
        if let Some(owed) = self.owed.as_mut().map(std::mem::take) {
            // What short forms have saved: a few bytes for each key in the text.
            rest.resize(usize::try_from(owed).unwrap_or(0).max(rest.len()), b' ');
        }
        rest.into()
    }

    fn is_over(&self) -> bool {
        self.redaction.is_idle() && self.owed.is_none_or(|owed| owed == 0) && self.trailers.is_none()
    }
}

/// Replaces keys in the values of headers.
pub fn redact_headers(headers: &mut HeaderMap, redactor: &Redactor) {
    for value in headers.values_mut() {
        if let Some(redacted) = redactor.redacted(value.as_bytes()) {
            // A short form is as plain as its key.
            *value = HeaderValue::from_bytes(&redacted).unwrap_or_else(|_| HeaderValue::from_static("..."));
        }
    }
}

impl<B> Body for Redacted<B>
where
    B: Body<Data = Bytes> + Unpin,
{
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let Self { body, search } = &mut *self;
        let Some(search) = search else { return Pin::new(body).poll_frame(cx) };
        if let Some(trailers) = search.trailers.take() {
            return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
        }
        let Some(frame) = ready!(Pin::new(&mut *body).poll_frame(cx)?) else {
            let rest = search.finish();
            return Poll::Ready((!rest.is_empty()).then(|| Ok(Frame::data(rest))));
        };
        Poll::Ready(Some(Ok(match frame.into_data().map_err(Frame::into_trailers) {
            Ok(piece) if body.is_end_stream() => {
                let (piece, rest) = (search.pass(piece), search.finish());
                Frame::data(if rest.is_empty() { piece } else { [piece, rest].concat().into() })
            }
            Ok(piece) => Frame::data(search.pass(piece)),
            Err(Ok(mut trailers)) => {
                redact_headers(&mut trailers, &search.redactor);
                let rest = search.finish();
                if rest.is_empty() {
                    Frame::trailers(trailers)
                } else {
                    search.trailers = Some(trailers);
                    Frame::data(rest)
                }
            }
            Err(Err(other)) => other,
        })))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream() && self.search.as_ref().is_none_or(Search::is_over)
    }

    fn size_hint(&self) -> SizeHint {
        match &self.search {
            None => self.body.size_hint(),
            Some(Search { owed: Some(owed), .. }) => SizeHint::with_exact(*owed),
            // A short form makes it shorter by an amount that nobody knows before.
            Some(Search { owed: None, .. }) => SizeHint::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::convert::Infallible;

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
        type Item = Result<Frame<Bytes>, Infallible>;

        fn poll_next(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
            Poll::Ready(self.0.pop_front().map(Ok))
        }
    }

    /// A body of these pieces, whose length nobody knows before.
    fn streamed(pieces: &[&str], trailers: Option<HeaderMap>) -> StreamBody<Frames> {
        let pieces = pieces.iter().map(|piece| Frame::data(Bytes::copy_from_slice(piece.as_bytes())));
        StreamBody::new(Frames(pieces.chain(trailers.map(Frame::trailers)).collect()))
    }

    #[tokio::test]
    async fn a_body_keeps_the_length_that_was_announced() {
        for text in [format!("\"{KEY}\" and {KEY}."), KEY.to_owned(), "nothing".to_owned(), String::new()] {
            let mut body = Redacted::new(Full::new(Bytes::from(text.clone())), redactor());
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
    async fn trailers_come_last_and_without_keys() {
        let trailers = HeaderMap::from_iter([("x-key".parse().unwrap(), KEY.parse().unwrap())]);
        let mut body = Redacted::new(streamed(&["sk_6c03"], Some(trailers)), redactor());
        let mut data = async || body.frame().await.unwrap().unwrap();
        assert_eq!(data().await.into_data().unwrap(), "sk_6");
        assert_eq!(data().await.into_data().unwrap(), "c03");
        assert_eq!(data().await.into_trailers().unwrap()["x-key"], SHORT);
    }

    #[tokio::test]
    async fn without_a_search_nothing_is_touched() {
        let body = Redacted::new(streamed(&[KEY], None), None);
        assert_eq!(body.collect().await.unwrap().to_bytes(), KEY);
    }
}
