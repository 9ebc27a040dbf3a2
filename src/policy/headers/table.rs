//! Lists the headers that are not forwarded unchanged. Each row contains the name of a header, its rule, and the
//! reason.

use http::header::HeaderName;

/// The treatment of a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rule {
    /// The header is removed in both directions, because it belongs to one connection (RFC 9110, section 7.6.1).
    HopByHop,
    /// The header is removed from requests, because it contains a credential or an end user of the client.
    Credential,
    /// The header is removed from requests, unless `access.forward_headers` lists it.
    Request,
    /// The header is removed from responses.
    Response,
    /// The header is changed or examined by `headers` or by the upstream client.
    Special,
}

/// A row, which covers one header or all headers with a prefix.
#[derive(Clone, Copy, Debug)]
pub(super) struct HeaderRow {
    /// The name in lower case. A trailing `*` covers every name with the prefix before it.
    pub(super) name: &'static str,
    pub(super) rule: Rule,
    /// The reason why the header is not forwarded unchanged, with the source in parentheses.
    pub(super) reason: &'static str,
}

impl HeaderRow {
    /// Returns the prefix, if the row covers more than one name.
    pub(super) const fn prefix(&self) -> Option<&'static str> {
        match self.name.as_bytes() {
            [start @ .., b'*'] => Some(self.name.split_at(start.len()).0),
            _ => None,
        }
    }
}

macro_rules! table {
    ($($rule:ident { $($name:literal: $reason:literal,)* })*) => {
        /// All rows.
        pub(super) const ROWS: &[HeaderRow] =
            &[$($(HeaderRow { name: $name, rule: Rule::$rule, reason: $reason }),*),*];
        /// The name of each row.
        pub(super) static HEADERS: [HeaderName; ROWS.len()] = [$($(HeaderName::from_static($name)),*),*];
    };
}

#[rustfmt::skip] // Each row stays on one line.
table! {
    HopByHop {
        "connection": "belongs to one connection (RFC 9110)",
        "keep-alive": "belongs to one connection (RFC 2068)",
        "proxy-connection": "belongs to one connection (Netscape)",
        "proxy-authenticate": "belongs to one connection (RFC 9110)",
        "proxy-authorization": "may carry a client's token",
        "te": "belongs to one connection (RFC 9110)",
        "trailer": "belongs to one connection (RFC 9110)",
        "transfer-encoding": "belongs to one connection (RFC 9112)",
        "upgrade": "belongs to one connection (RFC 9110)",
        "expect": "is handled by Keychoir's server (RFC 9110)",
    }
    Credential {
        "x-keychoir-token": "may carry a client's token",
        "xi-api-key": "may carry a client's token, and is replaced by a key of the pool",
        "xi_api_key": "may carry a client's token",
        "authorization": "may carry a client's token",
        "cookie": "may carry a client's token",
        "x-keychoir-user": "names an end user of the client",
    }
    Special {
        "host": "is set to the upstream's host",
        "sec-websocket-protocol": "may carry a browser's token",
        "content-length": "frames the message",
        "accept-encoding": "is limited to the encodings that Keychoir can decode",
    }
    // Headers in which proxies in front of Keychoir describe the client: its address, host or user. The
    // provider does not need them, and its content delivery network refuses requests with some of them.
    Request {
        "forwarded": "the client's address and host (RFC 7239)",
        "via": "names of the proxies in front of Keychoir (RFC 9110)",
        "x-forwarded": "the client's address",
        "x-forwarded-*": "the client's address, host and scheme; users and tokens (oauth2-proxy)",
        "x-original-forwarded-for": "the client's address (ingress-nginx)",
        "x-real-ip": "the client's address (nginx)",
        "x-client-ip": "the client's address (Azure, Apache)",
        "x-cluster-client-ip": "the client's address (Rackspace, Google)",
        "x-remote-ip": "the client's address",
        "x-remote-addr": "the client's address",
        "x-originating-ip": "the client's address (mail gateways)",
        "client-ip": "the client's address",
        "true-client-ip": "the client's address (Akamai, Cloudflare)",
        "proxy-client-ip": "the client's address (WebLogic)",
        "wl-proxy-*": "the client's address and certificate (WebLogic)",
        "incap-client-ip": "the client's address (Imperva)",
        "ali-cdn-real-ip": "the client's address (Alibaba)",
        "x-sucuri-clientip": "the client's address (Sucuri)",
        "cf-*": "the client's address and country, Access tokens; refused with 403 by Cloudflare (Cloudflare)",
        "cdn-loop": "networks that forwarded the request; the next one may refuse it as a loop (RFC 8586)",
        "fastly-*": "the client's address, loop markers (Fastly)",
        "akamai-*": "the client's address and device (Akamai)",
        "x-akamai-*": "the client's address and device (Akamai)",
        "cloudfront-*": "the client's address, country and device (Amazon CloudFront)",
        "x-amz-cf-id": "a request identifier (Amazon CloudFront)",
        "x-amzn-*": "trace identifiers, identity tokens of the load balancer (Amazon)",
        "x-cloud-trace-context": "trace identifiers of the load balancer (Google)",
        "x-goog-*": "the signed-in user and tokens (Google)",
        "x-appengine-*": "the client's address and country (Google)",
        "x-azure-*": "the client's address (Azure Front Door)",
        "x-fd-*": "markers of health probes (Azure Front Door)",
        "x-arr-*": "the client's certificate, a request identifier (Azure, IIS)",
        "x-ms-client-principal*": "the signed-in user (Azure)",
        "x-vercel-*": "the client's address and country (Vercel)",
        "x-nf-*": "the client's address and country (Netlify)",
        "fly-*": "the client's address and region (Fly.io)",
        "tailscale-*": "the signed-in user (Tailscale)",
        "x-envoy-*": "the client's address; settings for timeouts and retries (Envoy)",
        "l5d-*": "names of the calling service (Linkerd)",
        "x-consumer-*": "the signed-in user (Kong)",
        "x-credential-*": "the signed-in user (Kong)",
        "x-auth-request-*": "the signed-in user and tokens (oauth2-proxy)",
        "x-authentik-*": "the signed-in user (authentik)",
        "x-pomerium-*": "the signed-in user and tokens (Pomerium)",
        "remote-user": "the signed-in user (CGI)",
        "x-remote-user": "the signed-in user",
        "x-webauth-user": "the signed-in user (Grafana)",
        "client-cert": "the client's certificate (RFC 9440)",
        "client-cert-chain": "the client's certificate (RFC 9440)",
        "ssl-client-*": "the client's certificate (ingress-nginx)",
        "x-ssl-*": "the client's certificate",
        "x-client-cert*": "the client's certificate",
        "x-varnish": "a request identifier (Varnish)",
        "x-request-start": "when the request was received (Heroku)",
        "x-scheme": "the client's scheme (ingress-nginx)",
        "x-url-scheme": "the client's scheme",
        "front-end-https": "the client's scheme (Microsoft)",
        "x-host": "a host that may differ from Host",
        "x-original-host": "a host that may differ from Host",
        "x-http-host-override": "a host that may differ from Host",
        "x-original-url": "a path that may differ from the checked one (IIS, Symfony)",
        "x-original-uri": "a path that may differ from the checked one (nginx)",
        "x-rewrite-url": "a path that may differ from the checked one (IIS, Symfony)",
        "x-original-method": "a method that may differ from the checked one",
        "x-http-method": "a method that may differ from the checked one (Microsoft)",
        "x-http-method-override": "a method that may differ from the checked one (Google)",
        "x-method-override": "a method that may differ from the checked one (IBM)",
        "proxy": "becomes the variable HTTP_PROXY of a CGI program (httpoxy)",
    }
    // Headers about the provider's origin. A browser would apply them to Keychoir's origin.
    Response {
        "alt-svc": "would send later requests to another host (RFC 7838)",
        "strict-transport-security": "would pin every port of this host to HTTPS (RFC 6797)",
        "set-cookie": "one account's cookie would reach the clients of others (RFC 6265)",
        "set-cookie2": "one account's cookie would reach the clients of others (RFC 2965)",
        "public-key-pins": "would pin this host to the provider's certificates (RFC 7469)",
        "public-key-pins-report-only": "would report this host's certificates (RFC 7469)",
        "expect-ct": "would demand logged certificates of this host (RFC 9163)",
        "nel": "would report this host's network errors elsewhere (Network Error Logging)",
        "report-to": "would send this host's reports elsewhere (Reporting API)",
        "reporting-endpoints": "would send this host's reports elsewhere (Reporting API)",
        "clear-site-data": "would clear what this host has stored in a browser (W3C)",
        "service-worker-allowed": "would widen a service worker of this host (W3C)",
        "accept-ch": "would request client hints for this host (RFC 8942)",
        "accept-ch-lifetime": "would request client hints for this host (Client Hints)",
        "critical-ch": "would repeat requests to this host (Client Hints)",
        "origin-agent-cluster": "is about the whole origin (HTML)",
        "use-as-dictionary": "would offer encodings that Keychoir cannot decode (RFC 9842)",
        "set-login": "would record a sign-in at this host (FedCM)",
        "secure-session-registration": "would bind a session to this host (Device Bound Session Credentials)",
        "sec-session-registration": "would bind a session to this host (Device Bound Session Credentials)",
        "activate-storage-access": "is about the whole origin (Storage Access)",
        "observe-browsing-topics": "is about the whole origin (Topics)",
        "attribution-reporting-*": "would count this host's visits elsewhere (Attribution Reporting)",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_occurs_once_and_has_a_reason() {
        for (index, row) in ROWS.iter().enumerate() {
            assert!(
                ROWS[..index].iter().all(|earlier| earlier.name != row.name),
                "{} must occur once",
                row.name
            );
            assert_eq!(row.name, row.name.to_ascii_lowercase());
            assert!(!row.reason.is_empty(), "{} must have a reason", row.name);
            assert_eq!(HEADERS[index].as_str(), row.name);
        }
        assert!(ROWS.len() <= 128, "the rows must fit into the bits of a u128");
    }

    #[test]
    fn no_prefix_covers_another_row() {
        for (row, prefix) in ROWS.iter().filter_map(|row| Some((row, row.prefix()?))) {
            let covered =
                ROWS.iter().filter(|other| other.name != row.name && other.name.starts_with(prefix));
            let covered: Vec<_> = covered.map(|other| other.name).collect();
            assert!(covered.is_empty(), "{prefix} must cover no other row: {covered:?}");
        }
    }
}
