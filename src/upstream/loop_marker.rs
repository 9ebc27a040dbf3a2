//! Marks upstream requests so that Keychoir detects a loop. If `upstream.base_url` leads back to Keychoir,
//! directly or through a gateway, each request would cause another request until a limit is reached. Requests
//! to ElevenLabs are not marked, because ElevenLabs never forwards requests to Keychoir.

use std::sync::Arc;

use http::HeaderMap;
use http::header::HeaderName;
use uuid::Uuid;

/// The header with the marks, one for each Keychoir process that the request has passed through.
pub(super) const HOP_HEADER: HeaderName = HeaderName::from_static("x-keychoir-hop");

/// The mark of this process, a random identifier.
#[derive(Clone, Debug)]
pub(super) struct LoopMarker(Arc<str>);

impl LoopMarker {
    /// Creates a mark that is unique to this process.
    pub(super) fn new() -> Self {
        Self(Uuid::now_v7().simple().to_string().into())
    }

    pub(super) fn id(&self) -> &str {
        &self.0
    }

    /// Whether `headers` contain this mark.
    pub(super) fn is_in(&self, headers: &HeaderMap) -> bool {
        headers.get_all(HOP_HEADER).iter().any(|mark| mark.as_bytes() == self.0.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_recognizes_only_its_own_mark() {
        let (own, foreign) = (LoopMarker::new(), LoopMarker::new());
        let headers = |marks: &[&str]| -> HeaderMap {
            marks.iter().map(|mark| (HOP_HEADER, mark.parse().unwrap())).collect()
        };
        assert!(own.is_in(&headers(&[own.id()])) && own.is_in(&headers(&[foreign.id(), own.id()])));
        assert!(!own.is_in(&headers(&[])) && !own.is_in(&headers(&[foreign.id(), "", "x"])));
    }
}
