//! Defines the marker of this process in upstream requests, by which Keychoir detects a loop. If `upstream.base_url`
//! leads back to Keychoir, directly or through a gateway, each request would cause another request until a limit is
//! reached. `head` adds the marker to all requests except those to ElevenLabs, which never forwards requests to
//! Keychoir.

use std::sync::Arc;

use http::HeaderMap;
use http::header::HeaderName;
use uuid::Uuid;

/// The header with the markers, one for each Keychoir process that has forwarded the request.
pub(super) const HOP_HEADER: HeaderName = HeaderName::from_static("x-keychoir-hop");

/// The marker of this process, a unique identifier.
#[derive(Clone, Debug)]
pub(super) struct LoopMarker(Arc<str>);

impl LoopMarker {
    /// Creates a marker that no other process has.
    pub(super) fn new() -> Self {
        Self(Uuid::now_v7().simple().to_string().into())
    }

    pub(super) fn id(&self) -> &str {
        &self.0
    }

    /// Returns whether `headers` contain this marker.
    pub(super) fn is_in(&self, headers: &HeaderMap) -> bool {
        headers.get_all(HOP_HEADER).iter().any(|marker| marker.as_bytes() == self.0.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_recognizes_only_its_own_marker() {
        let (own, foreign) = (LoopMarker::new(), LoopMarker::new());
        let headers = |markers: &[&str]| -> HeaderMap {
            markers.iter().map(|marker| (HOP_HEADER, marker.parse().unwrap())).collect()
        };
        assert!(own.is_in(&headers(&[own.id()])) && own.is_in(&headers(&[foreign.id(), own.id()])));
        assert!(!own.is_in(&headers(&[])) && !own.is_in(&headers(&[foreign.id(), "", "x"])));
    }
}
