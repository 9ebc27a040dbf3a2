//! The head of a request: what it asks for, and what of it goes on.

use http::header::UPGRADE;
use http::request::Parts;
use http::uri::PathAndQuery;
use http::{Method, Uri};

use super::error::ProxyError;
use crate::policy::endpoint::{Access, Endpoint, lookup};
use crate::policy::headers;
use crate::policy::mend::{Mistake, mend};
use crate::upstream::Outbound;

/// Says no to what is not passed on, mends the path of a base URL that is nearly right, and looks
/// the request up: it is judged as what it has become.
pub(super) fn look_up(
    head: &mut Parts,
    denies_dangerous: bool,
) -> Result<(Endpoint, Option<Mistake>), ProxyError> {
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
    let mut mistake = None;
    if let Some((path, found)) = mend(head.uri.path()) {
        head.uri = target(&path, head.uri.query())?;
        mistake = Some(found);
    }
    let endpoint = lookup(&head.method, head.uri.path());
    match endpoint.access {
        Access::Denied(why) if denies_dangerous => Err(ProxyError::Denied(why)),
        Access::Denied(_) | Access::Open => Ok((endpoint, mistake)),
    }
}

/// What goes to the upstream: path and query without credentials, headers without credentials
/// and without what belongs to this connection.
pub(super) fn strip(mut head: Parts) -> Result<Outbound, ProxyError> {
    headers::strip_request(&mut head.headers);
    let query = head.uri.query().and_then(headers::strip_query);
    let target = target(head.uri.path(), query.as_deref())?;
    Ok(Outbound { method: head.method, target, headers: head.headers })
}

fn target(path: &str, query: Option<&str>) -> Result<Uri, http::Error> {
    let written = match query {
        None => PathAndQuery::try_from(path),
        Some(query) => PathAndQuery::try_from(format!("{path}?{query}")),
    };
    Ok(Uri::from(written?))
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
            assert!(matches!(look_up(&mut head(method, "/v1/voices"), true), Err(ProxyError::Method)));
        }
        let mut upgrade = head("GET", "/v1/text-to-speech/x/stream-input");
        upgrade.headers.insert(UPGRADE, "websocket".parse().unwrap());
        assert!(matches!(look_up(&mut upgrade, true), Err(ProxyError::Upgrade)));
        assert!(look_up(&mut head("BREW", "/v1/voices"), true).is_ok());
    }

    #[test]
    fn dangerous_paths_are_denied_unless_allowed() {
        let mut disable = head("POST", "/v1/workspaces/api-keys/disable");
        assert!(matches!(look_up(&mut disable, true), Err(ProxyError::Denied(_))));
        assert!(look_up(&mut disable, false).is_ok());
    }

    #[test]
    fn a_mended_path_is_judged_as_what_it_has_become() {
        let mut doubled = head("GET", "/v1/v1/voices?a=%20&a=1");
        let (endpoint, mistake) = look_up(&mut doubled, true).unwrap();
        assert_eq!((endpoint.route.as_str(), mistake), ("/v1/voices", Some(Mistake::DoubledVersion)));
        assert_eq!(strip(doubled).unwrap().target.to_string(), "/v1/voices?a=%20&a=1");
        for path in ["/service-accounts", "/v1/v1/service-accounts"] {
            assert!(matches!(look_up(&mut head("GET", path), true), Err(ProxyError::Denied(_))));
        }
    }
}
