//! The head of a request: what it asks for, and what of it goes on.

use http::header::UPGRADE;
use http::request::Parts;
use http::uri::PathAndQuery;
use http::{Method, Uri};

use super::error::ProxyError;
use crate::policy::endpoint::{Access, Endpoint, lookup};
use crate::policy::headers;
use crate::upstream::Outbound;

/// Looks the request up and says no to what is not passed on.
pub(super) fn look_up(head: &Parts, denies_dangerous: bool) -> Result<Endpoint, ProxyError> {
    // TRACE would show the client what we add; CONNECT would make a tunnel of us.
    if head.method == Method::TRACE || head.method == Method::CONNECT {
        return Err(ProxyError::Method);
    }
    if !headers::has_one_host(head.version, &head.uri, &head.headers) {
        return Err(ProxyError::Host);
    }
    if head.headers.contains_key(UPGRADE) {
        return Err(ProxyError::Upgrade);
    }
    let endpoint = lookup(&head.method, head.uri.path());
    match endpoint.access {
        Access::Denied(why) if denies_dangerous => Err(ProxyError::Denied(why)),
        Access::Denied(_) | Access::Open => Ok(endpoint),
    }
}

/// What goes to the upstream: path and query without credentials, headers without credentials
/// and without what belongs to this connection.
pub(super) fn strip(mut head: Parts) -> Result<Outbound, ProxyError> {
    headers::strip_request(&mut head.headers);
    let target = match head.uri.query().map(headers::strip_query) {
        None => head.uri.path().to_owned(),
        Some(None) => head.uri.path().to_owned(),
        Some(Some(query)) => format!("{}?{query}", head.uri.path()),
    };
    let target = Uri::from(PathAndQuery::try_from(target).map_err(http::Error::from)?);
    Ok(Outbound { method: head.method, target, headers: head.headers })
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
    fn check(target: &str, expected: &str) {
        assert_eq!(strip(head("GET", target)).unwrap().target.to_string(), expected);
    }

    #[test]
    fn path_and_query_go_on_as_they_came() {
        check("/v1/voices?a=1&a=%20&b", "/v1/voices?a=1&a=%20&b");
        check("/v1/%20%2F//x;y", "/v1/%20%2F//x;y");
        check("/v1/voices?", "/v1/voices?");
    }

    #[test]
    fn credentials_and_foreign_hosts_do_not() {
        check("/v1/voices?xi_api_key=k", "/v1/voices");
        check("/v1/voices?a=1&authorization=k&b=2", "/v1/voices?a=1&b=2");
        check("http://elsewhere.example/v1/voices?a=1", "/v1/voices?a=1");
    }

    #[test]
    fn what_would_make_it_another_kind_of_proxy_is_refused() {
        for method in ["TRACE", "CONNECT"] {
            assert!(matches!(look_up(&head(method, "/v1/voices"), true), Err(ProxyError::Method)));
        }
        let mut upgrade = head("GET", "/v1/text-to-speech/x/stream-input");
        upgrade.headers.insert(UPGRADE, "websocket".parse().unwrap());
        assert!(matches!(look_up(&upgrade, true), Err(ProxyError::Upgrade)));
        assert!(look_up(&head("BREW", "/v1/voices"), true).is_ok());
    }

    #[test]
    fn dangerous_paths_are_denied_unless_allowed() {
        let disable = head("POST", "/v1/workspaces/api-keys/disable");
        assert!(matches!(look_up(&disable, true), Err(ProxyError::Denied(_))));
        assert!(look_up(&disable, false).is_ok());
    }
}
