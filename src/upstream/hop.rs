//! Marks upstream requests so that Keychoir detects a loop. When `upstream.base_url` leads back to Keychoir,
//! directly or through a gateway or an alias, each request would cause another one until a limit is reached.
//! ElevenLabs itself never sends requests here, so its requests carry no mark.

use std::sync::Arc;

use http::HeaderMap;
use http::header::HeaderName;
use uuid::Uuid;

/// The header with the mark, once for each Keychoir that the request passed through.
pub(super) const HEADER: HeaderName = HeaderName::from_static("x-keychoir-hop");

/// The mark of this process.
#[derive(Clone, Debug)]
pub(super) struct Hop(Arc<str>);

impl Hop {
    /// A mark that is unique to this process.
    pub(super) fn new() -> Self {
        Self(Uuid::now_v7().simple().to_string().into())
    }

    pub(super) fn id(&self) -> &str {
        &self.0
    }

    /// Whether these headers contain this mark.
    pub(super) fn marks(&self, headers: &HeaderMap) -> bool {
        headers.get_all(HEADER).iter().any(|mark| mark.as_bytes() == self.0.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_recognizes_only_its_own_mark() {
        let (own, other) = (Hop::new(), Hop::new());
        let with = |marks: &[&str]| -> HeaderMap {
            marks.iter().map(|mark| (HEADER, mark.parse().unwrap())).collect()
        };
        assert!(own.marks(&with(&[own.id()])) && own.marks(&with(&[other.id(), own.id()])));
        assert!(!own.marks(&with(&[])) && !own.marks(&with(&[other.id(), "", "x"])));
    }
}
