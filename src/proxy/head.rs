//! Processes a request head in two steps: routing validates the head and looks up its endpoint, and sanitizing prepares
//! the head that is sent upstream.

use std::borrow::Cow;

use http::header::{CONTENT_LENGTH, TRANSFER_ENCODING};
use http::request::Parts;
use http::uri::PathAndQuery;
use http::{HeaderMap, Method, Uri};

use super::error::ProxyError;
use crate::elevenlabs::affinity::RequestIdentifiers;
use crate::elevenlabs::endpoint::{Access, Endpoint};
use crate::elevenlabs::normalize_path::{PathFix, fix_path};
use crate::elevenlabs::segments::Segments;
use crate::elevenlabs::socket::Dialect;
use crate::policy::headers::{self, ForwardedHeaders};
use crate::policy::method;
use crate::policy::path::Path;
use crate::upstream::UpstreamRequestHead;

/// Validates a request head and looks up its endpoint. If the client's base URL has a known mistake, the path
/// is corrected first. Also returns the identifiers in the path and the query, and the correction.
///
/// # Errors
///
/// Returns the reason if the request is not proxied.
pub fn route(
    head: &mut Parts,
    blocks_admin_endpoints: bool,
) -> Result<(Endpoint, RequestIdentifiers, Option<PathFix>), ProxyError> {
    // A TRACE response would contain the headers that the proxy adds, and CONNECT would make the proxy a tunnel.
    if head.method == Method::TRACE || head.method == Method::CONNECT {
        return Err(ProxyError::MethodNotAllowed);
    }
    if !method::has_allowed_length(&head.method) {
        return Err(ProxyError::MethodTooLong);
    }
    if !headers::has_one_host(head.version, &head.uri, &head.headers) {
        return Err(ProxyError::InvalidHost);
    }
    let mut path_fix = None;
    if let Some((path, fix)) = fix_path(head.uri.path()) {
        head.uri = build_target(&path, head.uri.query())?;
        path_fix = Some(fix);
    }
    let path = Path::parse(head.uri.path())?;
    let segments = Segments::new(&path);
    let endpoint = if headers::is_websocket_upgrade(&head.method, head.version, &head.headers) {
        if has_body(&head.headers) {
            return Err(ProxyError::InvalidUpgrade);
        }
        Endpoint::classify_websocket(&segments)
    } else {
        Endpoint::classify(&head.method, &segments)
    };
    match endpoint.access {
        Access::Denied(reason) if blocks_admin_endpoints => Err(ProxyError::EndpointBlocked(reason)),
        Access::Denied(_) | Access::Open => {
            Ok((endpoint, RequestIdentifiers::from_segments(&segments, head.uri.query()), path_fix))
        }
    }
}

/// Removes client credentials from the query and the headers, hop-by-hop headers, and the headers that reverse
/// proxies in front of Keychoir added, unless they are `forwarded`. Also removes the host from the target, and prepares
/// the upgrade headers of a WebSocket handshake.
///
/// # Errors
///
/// Fails when the remaining path and query are not a valid request target.
pub fn sanitize(
    mut head: Parts,
    socket: Option<Dialect>,
    forwarded: &ForwardedHeaders,
) -> Result<UpstreamRequestHead, ProxyError> {
    headers::strip_request(&mut head.headers, forwarded);
    if let Some(dialect) = socket {
        headers::prepare_upgrade_request(&mut head.headers, dialect.is_inspected());
    }
    let target = match head.uri.query().map(headers::strip_query) {
        Some(Some(Cow::Owned(query))) => build_target(head.uri.path(), Some(&query))?,
        Some(None) => build_target(head.uri.path(), None)?,
        Some(Some(Cow::Borrowed(_))) | None => strip_host(head.uri),
    };
    Ok(UpstreamRequestHead { method: head.method, target, headers: head.headers })
}

/// Removes the scheme and the host from a request target.
fn strip_host(target: Uri) -> Uri {
    if target.authority().is_none() {
        return target;
    }
    let path_and_query = target.into_parts().path_and_query;
    Uri::from(path_and_query.unwrap_or_else(|| PathAndQuery::from_static("/")))
}

/// Returns whether the headers declare a body. Servers could read the body of a WebSocket handshake as the first
/// message or as another request (request smuggling).
fn has_body(headers: &HeaderMap) -> bool {
    headers.contains_key(TRANSFER_ENCODING)
        || headers.get_all(CONTENT_LENGTH).iter().any(|length| length.as_bytes() != b"0")
}

/// Builds a request target from a path and a query.
fn build_target(path: &str, query: Option<&str>) -> Result<Uri, http::Error> {
    let path_and_query = match query {
        None => PathAndQuery::try_from(path),
        Some(query) => PathAndQuery::try_from(format!("{path}?{query}")),
    };
    Ok(Uri::from(path_and_query?))
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn head(method: &str, target: &str) -> Parts {
        let mut head = Request::builder().method(method).uri(target).body(()).unwrap().into_parts().0;
        head.headers.insert("host", "localhost".parse().unwrap());
        head
    }

    #[track_caller]
    fn check_target(target: &str, expected: &str) {
        assert_eq!(
            sanitize(head("GET", target), None, &ForwardedHeaders::default()).unwrap().target.to_string(),
            expected
        );
    }

    #[test]
    fn path_and_query_are_forwarded_unchanged() {
        check_target("/v1/voices?a=1&a=%20&b", "/v1/voices?a=1&a=%20&b");
        check_target("/v1/%76oices/a%20b/", "/v1/%76oices/a%20b/");
        check_target("/v1/voices?", "/v1/voices?");
    }

    #[test]
    fn credentials_and_foreign_hosts_are_removed_from_the_target() {
        check_target("/v1/voices?xi_api_key=k", "/v1/voices");
        check_target("/v1/voices?a=1&authorization=k&b=2", "/v1/voices?a=1&b=2");
        check_target("http://elsewhere.example/v1/voices?a=1", "/v1/voices?a=1");
    }

    #[test]
    fn trace_connect_and_long_methods_are_rejected() {
        for method in ["TRACE", "CONNECT"] {
            assert!(matches!(
                route(&mut head(method, "/v1/voices"), true),
                Err(ProxyError::MethodNotAllowed)
            ));
        }
        assert!(route(&mut head("BREW", "/v1/voices"), true).is_ok());
        let long_method = "A".repeat(method::MAX_METHOD_LENGTH + 1);
        assert!(matches!(route(&mut head(&long_method, "/v1/voices"), true), Err(ProxyError::MethodTooLong)));
    }

    fn websocket_head(target: &str) -> Parts {
        let mut head = head("GET", target);
        for (name, header) in [
            ("upgrade", "websocket"),
            ("connection", "Upgrade, x-mine"),
            ("x-mine", "1"),
            ("sec-websocket-extensions", "permessage-deflate"),
            ("sec-websocket-protocol", "convai, bearer.tok"),
            ("origin", "https://app.example"),
        ] {
            head.headers.insert(name, header.parse().unwrap());
        }
        head
    }

    #[test]
    fn a_handshake_offers_no_compression_if_messages_are_inspected() {
        for (target, dialect, keeps_extensions) in [
            ("/v1/convai/conversation?agent_id=a", Dialect::Agent, false),
            ("/convai/conversation", Dialect::Agent, false),
            ("/v1/new/one", Dialect::Unknown, false),
            ("/runCase?case=1", Dialect::Foreign, true),
        ] {
            let mut head = websocket_head(target);
            let (endpoint, _, _) = route(&mut head, true).unwrap();
            assert_eq!(endpoint.socket, Some(dialect));
            let headers = sanitize(head, endpoint.socket, &ForwardedHeaders::default()).unwrap().headers;
            assert_eq!(
                headers.contains_key("sec-websocket-extensions"),
                keeps_extensions,
                "{target}: compression must be offered only for messages that are not inspected"
            );
            let header = |name| headers.get(name).map(|header| header.to_str().unwrap());
            assert_eq!(
                [header("connection"), header("upgrade"), header("sec-websocket-protocol"), header("origin")],
                [Some("Upgrade"), Some("websocket"), Some("convai"), Some("https://app.example")]
            );
            assert_eq!(header("x-mine"), None);
        }
    }

    #[test]
    fn a_handshake_with_a_body_is_rejected() {
        for (name, header, is_rejected) in [
            ("content-length", "5", true),
            ("transfer-encoding", "chunked", true),
            ("content-length", "0", false),
        ] {
            let mut head = websocket_head("/v1/convai/conversation");
            head.headers.insert(name, header.parse().unwrap());
            let is_invalid = matches!(route(&mut head, true), Err(ProxyError::InvalidUpgrade));
            assert_eq!(
                is_invalid, is_rejected,
                "{name}: {header} must be rejected only if it declares a body"
            );
        }
    }

    #[test]
    fn an_upgrade_to_another_protocol_is_removed() {
        let mut head = websocket_head("/v1/voices");
        head.headers.insert("upgrade", "h2c".parse().unwrap());
        let (endpoint, _, _) = route(&mut head, true).unwrap();
        assert_eq!(endpoint.socket, None);
        let headers = sanitize(head, None, &ForwardedHeaders::default()).unwrap().headers;
        assert!(!headers.contains_key("upgrade") && !headers.contains_key("connection"));
    }

    #[test]
    fn admin_endpoints_are_blocked_unless_allowed() {
        let mut disable = head("POST", "/v1/workspaces/api-keys/disable");
        assert!(matches!(route(&mut disable, true), Err(ProxyError::EndpointBlocked(_))));
        assert!(route(&mut disable, false).is_ok());
    }

    #[test]
    fn an_ambiguous_path_is_rejected() {
        for path in ["/v1/voices/..;/service-accounts", "/v1//x", "/v1/%2e%2e/x", "/x/v1%2fservice-accounts"]
        {
            assert!(
                matches!(route(&mut head("GET", path), true), Err(ProxyError::AmbiguousPath(_))),
                "{path} must be rejected"
            );
            assert!(
                matches!(route(&mut websocket_head(path), false), Err(ProxyError::AmbiguousPath(_))),
                "{path} must be rejected"
            );
        }
    }

    #[test]
    fn a_corrected_path_is_routed_by_its_new_form() {
        let mut doubled = head("GET", "/v1/v1/voices?a=%20&a=1");
        let (endpoint, _, path_fix) = route(&mut doubled, true).unwrap();
        assert_eq!((&*endpoint.route.to_string(), path_fix), ("/v1/voices", Some(PathFix::DoubledVersion)));
        assert_eq!(
            sanitize(doubled, None, &ForwardedHeaders::default()).unwrap().target.to_string(),
            "/v1/voices?a=%20&a=1"
        );
        for path in ["/service-accounts", "/v1/v1/service-accounts"] {
            assert!(matches!(route(&mut head("GET", path), true), Err(ProxyError::EndpointBlocked(_))));
        }
    }
}
