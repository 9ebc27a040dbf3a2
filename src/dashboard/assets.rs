//! Serves the scripts, the styles and the icon of the dashboard from the `keychoir` binary. Each file is compressed
//! once. A browser keeps a file, and receives it again only when the entity tag of the file has changed.

use std::io::Write as _;
use std::sync::LazyLock;

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use http::header::{
    ACCEPT_ENCODING, CACHE_CONTROL, CONTENT_ENCODING, ETAG, HeaderMap, HeaderValue, IF_NONE_MATCH, VARY,
};
use http::{Response, StatusCode};

use super::response::{text, with_content_type};
use crate::admin::{ApiBody, contains_tag};
use crate::secret::Fingerprint;

/// A file of the dashboard.
struct Asset {
    /// The last segment of its path.
    name: &'static str,
    content_type: &'static str,
    content: &'static [u8],
    /// The content, compressed with gzip.
    compressed: Bytes,
    /// The entity tag, which is a digest of the content.
    entity_tag: HeaderValue,
}

const JAVASCRIPT: &str = "text/javascript; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";

static ASSETS: LazyLock<Vec<Asset>> = LazyLock::new(|| {
    vec![
        Asset::new("app.js", JAVASCRIPT, include_bytes!("assets/app.js")),
        Asset::new("app.css", CSS, include_bytes!("assets/app.css")),
        Asset::new("icon.svg", "image/svg+xml", include_bytes!("assets/icon.svg")),
        Asset::new("uplot.js", JAVASCRIPT, include_bytes!("assets/uplot/uPlot.iife.min.js")),
        Asset::new("uplot.css", CSS, include_bytes!("assets/uplot/uPlot.min.css")),
    ]
});

impl Asset {
    fn new(name: &'static str, content_type: &'static str, content: &'static [u8]) -> Self {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
        // Writing to a `Vec` cannot fail.
        let compressed = encoder.write_all(content).and_then(|()| encoder.finish()).unwrap_or_default();
        let digest = Fingerprint::new(&String::from_utf8_lossy(content)).key_id();
        let entity_tag =
            HeaderValue::from_str(&format!("\"{digest}\"")).unwrap_or(HeaderValue::from_static("\"0\""));
        Self { name, content_type, content, compressed: compressed.into(), entity_tag }
    }
}

/// Responds to a request for the file `name`.
pub(super) fn respond(name: &str, headers: &HeaderMap) -> Response<ApiBody> {
    let Some(asset) = ASSETS.iter().find(|asset| asset.name == name) else {
        return text(StatusCode::NOT_FOUND, "The dashboard has no such file.\n");
    };
    let is_known = headers.get(IF_NONE_MATCH).is_some_and(|known| contains_tag(known, &asset.entity_tag));
    let accepts_gzip = headers.get(ACCEPT_ENCODING).is_some_and(|accepted| {
        accepted.to_str().is_ok_and(|accepted| accepted.split(',').any(|coding| coding.trim() == "gzip"))
    });
    let mut response = if is_known {
        text(StatusCode::NOT_MODIFIED, "")
    } else if accepts_gzip {
        with_content_type(StatusCode::OK, asset.content_type, asset.compressed.clone())
    } else {
        with_content_type(StatusCode::OK, asset.content_type, asset.content)
    };
    let headers = response.headers_mut();
    if accepts_gzip && !is_known {
        headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    }
    headers.insert(VARY, HeaderValue::from_static("accept-encoding"));
    headers.insert(ETAG, asset.entity_tag.clone());
    // A browser must compare the entity tag before each use, so that it uses the files of a new version at once.
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_assets_together_have_less_than_120_kilobytes_and_the_script_at_most_12() {
        let size: usize = ASSETS.iter().map(|asset| asset.content.len()).sum();
        assert!(size < 120_000, "all files together must have fewer than 120,000 bytes, not {size}");
        let script = ASSETS.iter().find(|asset| asset.name == "app.js").unwrap();
        let script_size = script.content.len();
        assert!(script_size <= 12_000, "the script must have at most 12,000 bytes, not {script_size}");
    }

    #[test]
    fn a_known_asset_is_not_sent_again() {
        let first = respond("app.css", &HeaderMap::new());
        let headers = HeaderMap::from_iter([(IF_NONE_MATCH, first.headers()[ETAG].clone())]);
        assert_eq!(
            (first.status(), respond("app.css", &headers).status()),
            (StatusCode::OK, StatusCode::NOT_MODIFIED)
        );
        assert_eq!(respond("secret.txt", &headers).status(), StatusCode::NOT_FOUND);
    }
}
