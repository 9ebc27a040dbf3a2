//! Parses forward proxies from the settings and from the environment variables `HTTPS_PROXY`, `ALL_PROXY` and
//! `NO_PROXY`, and decides which forward proxy is used for which host.
//!
//! The URL of a forward proxy may contain a password, so error messages of this module never quote it.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use super::base_url::{BaseUrl, parse_host, split_port};
use super::no_proxy::NoProxy;
use super::problem::{Report, SourceSpan, ValueError, ValueOrigin};
use super::source::Environment;
use crate::policy::authority::Scheme;
use crate::policy::forward_proxy::{ForwardProxy, ProxyScheme, percent_decode};
use crate::secret::ProxyCredentials;

/// Maximum number of bytes of a SOCKS5 username or password (RFC 1929). HTTP proxies have no common limit.
const MAX_SOCKS_CREDENTIAL_BYTES: usize = 255;

/// A `proxy` setting.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ProxySetting {
    /// The setting is empty. Keys and the mirror inherit `upstream.proxy`, which itself falls back to the environment
    /// variables.
    #[default]
    Inherited,
    /// Connections are direct. The environment variables are ignored.
    Direct,
    /// Connections are opened through this proxy.
    Proxy(Arc<ForwardProxy>),
}

impl ProxySetting {
    /// Returns whether the setting contains a user and a password.
    #[must_use]
    pub fn has_credentials(&self) -> bool {
        match self {
            Self::Proxy(proxy) => proxy.credentials().is_some(),
            Self::Inherited | Self::Direct => false,
        }
    }
}

/// Formats the value in TOML without the quotes, and with masked credentials.
impl fmt::Display for ProxySetting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inherited => Ok(()),
            Self::Direct => f.write_str("direct"),
            Self::Proxy(proxy) if self.has_credentials() => {
                f.write_str(&proxy.to_string().replacen("://", "://***@", 1))
            }
            Self::Proxy(proxy) => proxy.fmt(f),
        }
    }
}

impl FromStr for ProxySetting {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        match text.trim() {
            "" => Ok(Self::Inherited),
            "direct" | "off" => Ok(Self::Direct),
            url => parse_url(url).map(|proxy| Self::Proxy(Arc::new(proxy))),
        }
    }
}

const NOTATION: &str = "write http://HOST:PORT, https://HOST:PORT or socks5h://HOST:PORT, with USER:PASSWORD@ before the \
                        host if the proxy requires it, or \"direct\" for no proxy";

/// Parses `SCHEME://[USER[:PASSWORD]@]HOST[:PORT]`.
fn parse_url(url: &str) -> Result<ForwardProxy, ValueError> {
    let error = |message: &str| ValueError::new(message).advise(NOTATION);
    let Some((scheme, rest)) = url.split_once("://") else {
        return Err(error("the proxy's URL has no scheme"));
    };
    let scheme = match scheme.to_ascii_lowercase().as_str() {
        "http" => ProxyScheme::Http,
        "https" => ProxyScheme::Https,
        // The forward proxy resolves host names for both schemes, because this machine may not have DNS.
        "socks5" | "socks5h" => ProxyScheme::Socks5,
        _ => return Err(error("the proxy's scheme is not http, https or socks5h")),
    };
    let (userinfo, address) = match rest.rsplit_once('@') {
        Some((userinfo, address)) => (Some(userinfo), address),
        None => (None, rest),
    };
    let address = address.strip_suffix('/').unwrap_or(address);
    if address.contains(['/', '?', '#']) {
        return Err(error("the proxy's URL has a path"));
    }
    let (host, port) =
        split_port(address, address).map_err(|_| error("the proxy's URL has no valid port"))?;
    let host = parse_host(host).map_err(|_| error("the proxy's host is not a valid name or address"))?;
    let credentials = userinfo.map(|userinfo| parse_credentials(userinfo, scheme)).transpose()?;
    Ok(ForwardProxy::new(scheme, &host, port.unwrap_or_else(|| scheme.default_port()), credentials))
}

/// Parses `USER[:PASSWORD]`, in which characters may be percent-encoded.
fn parse_credentials(userinfo: &str, scheme: ProxyScheme) -> Result<ProxyCredentials, ValueError> {
    const ESCAPES: &str = "write % as %25, / as %2F, : as %3A, ? as %3F, # as %23 and @ as %40";
    let error = |message: &str| ValueError::new(message).advise(ESCAPES);
    if userinfo.contains(['/', '?', '#', '@']) {
        return Err(error("the proxy's user or password has a character that must be escaped in a URL"));
    }
    let (user, password) = userinfo.split_once(':').unwrap_or((userinfo, ""));
    let (Some(user), Some(password)) = (percent_decode(user), percent_decode(password)) else {
        return Err(error("the proxy's user or password has an invalid escape or a control character"));
    };
    if user.is_empty() {
        return Err(ValueError::new("the proxy's URL has no user before the password").advise(NOTATION));
    }
    match scheme {
        // `Basic` authentication separates the user from the password at the first colon.
        ProxyScheme::Http | ProxyScheme::Https if user.contains(':') => {
            return Err(ValueError::new("the user for a proxy over HTTP has a colon"));
        }
        ProxyScheme::Http | ProxyScheme::Https => {}
        ProxyScheme::Socks5 => {
            let has_valid_length = |text: &str| (1..=MAX_SOCKS_CREDENTIAL_BYTES).contains(&text.len());
            if !has_valid_length(&user) || !has_valid_length(&password) {
                let message = format!(
                    "user and password for a SOCKS5 proxy have 1 to {MAX_SOCKS_CREDENTIAL_BYTES} bytes each"
                );
                return Err(ValueError::new(message));
            }
        }
    }
    Ok(ProxyCredentials::new(&user, &password))
}

/// A forward proxy that an environment variable specifies.
#[derive(Clone, Debug)]
struct EnvironmentProxy {
    variable: &'static str,
    proxy: Arc<ForwardProxy>,
}

/// The forward proxies of `HTTPS_PROXY` and `ALL_PROXY`, and the exceptions of `NO_PROXY`. Each variable may be in
/// lowercase, and the uppercase form has precedence. `HTTP_PROXY` is not read, because ElevenLabs uses HTTPS, and an
/// upstream with HTTP is usually a gateway in the same network.
#[derive(Clone, Debug, Default)]
pub struct EnvironmentProxies {
    https: Option<EnvironmentProxy>,
    all: Option<EnvironmentProxy>,
    exemptions: NoProxy,
}

impl EnvironmentProxies {
    /// Reads the variables. `is_used` is whether a connection would use their forward proxies. An invalid variable is a
    /// problem only in this case.
    pub(super) fn read(environment: &Environment, is_used: bool, report: &mut Report) -> Self {
        let mut read_variable = |names: [&'static str; 2]| {
            let (variable, text) =
                names.into_iter().find_map(|name| Some((name, environment.value(name)?)))?;
            // Like other programs, accept a proxy without a scheme.
            let url = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
            match parse_url(&url) {
                Ok(proxy) => Some(EnvironmentProxy { variable, proxy: Arc::new(proxy) }),
                Err(error) => {
                    let span = SourceSpan::new(ValueOrigin::Variable(variable.to_owned()));
                    let advice = "or set upstream.proxy, which has precedence over this variable";
                    report.problems.extend(is_used.then(|| span.problem(error.advise(advice))));
                    None
                }
            }
        };
        let (https, all) =
            (read_variable(["HTTPS_PROXY", "https_proxy"]), read_variable(["ALL_PROXY", "all_proxy"]));
        let exemptions = environment.value("NO_PROXY").or_else(|| environment.value("no_proxy"));
        Self { https, all, exemptions: exemptions.map(NoProxy::parse).unwrap_or_default() }
    }

    /// Returns the forward proxy for connections to `url`, or the reason why connections are direct.
    fn find_route(&self, url: &BaseUrl) -> EnvironmentRoute<'_> {
        let proxy_for_scheme = match url.scheme() {
            Scheme::Https => self.https.as_ref().or(self.all.as_ref()),
            Scheme::Http => self.all.as_ref(),
        };
        match proxy_for_scheme {
            None => EnvironmentRoute::Unset,
            // A proxy on another machine cannot reach this machine by a loopback address.
            Some(_) if url.is_loopback() => EnvironmentRoute::Unset,
            Some(proxy) if self.exemptions.exempts(url.host(), url.port()) => {
                EnvironmentRoute::Exempted(proxy)
            }
            Some(proxy) => EnvironmentRoute::Proxy(proxy),
        }
    }
}

/// The route to a host according to the environment variables.
enum EnvironmentRoute<'a> {
    /// Connections are direct: no variable is set for the scheme of the URL, or the host is a loopback address.
    Unset,
    /// The host is in `NO_PROXY`.
    Exempted(&'a EnvironmentProxy),
    /// Connections use this forward proxy.
    Proxy(&'a EnvironmentProxy),
}

/// The forward proxies for all hosts: the one of `upstream.proxy`, or those of the environment variables if the setting
/// is empty.
#[derive(Clone, Debug, Default)]
pub struct ProxyRoutes {
    setting: ProxySetting,
    environment: EnvironmentProxies,
}

impl ProxyRoutes {
    pub(super) fn new(setting: ProxySetting, environment: EnvironmentProxies) -> Self {
        Self { setting, environment }
    }

    /// Returns the forward proxy for connections to the provider at `url`. `own_setting` is the `proxy` of the key.
    #[must_use]
    pub fn for_upstream(&self, url: &BaseUrl, own_setting: &ProxySetting) -> Option<Arc<ForwardProxy>> {
        match (own_setting, &self.setting) {
            (ProxySetting::Proxy(proxy), _) => Some(Arc::clone(proxy)),
            (ProxySetting::Direct, _) => None,
            (ProxySetting::Inherited, ProxySetting::Proxy(proxy)) => Some(Arc::clone(proxy)),
            (ProxySetting::Inherited, ProxySetting::Direct) => None,
            (ProxySetting::Inherited, ProxySetting::Inherited) => match self.environment.find_route(url) {
                EnvironmentRoute::Proxy(found) => Some(Arc::clone(&found.proxy)),
                EnvironmentRoute::Unset | EnvironmentRoute::Exempted(_) => None,
            },
        }
    }

    /// Returns the forward proxy for connections to Supabase at `url`. `own_setting` is `supabase.proxy`. A Supabase on
    /// this machine is reached directly, unless `supabase.proxy` is set.
    #[must_use]
    pub fn for_mirror(&self, url: &BaseUrl, own_setting: &ProxySetting) -> Option<Arc<ForwardProxy>> {
        if url.is_loopback() && *own_setting == ProxySetting::Inherited {
            return None;
        }
        self.for_upstream(url, own_setting)
    }

    /// Describes the route to the provider at `url` in a sentence for the log, without credentials. Returns
    /// `None` if neither a setting nor a variable determines the route.
    #[must_use]
    pub fn describe(&self, url: &BaseUrl) -> Option<String> {
        let host = url.authority();
        match (&self.setting, self.environment.find_route(url)) {
            (ProxySetting::Proxy(proxy), _) => {
                Some(format!("Connections to {host} use the proxy {proxy} (upstream.proxy)"))
            }
            (ProxySetting::Direct, EnvironmentRoute::Unset) => None,
            (ProxySetting::Direct, EnvironmentRoute::Proxy(found) | EnvironmentRoute::Exempted(found)) => {
                let variable = found.variable;
                Some(format!("Connections to {host} are direct: upstream.proxy overrides {variable}"))
            }
            (ProxySetting::Inherited, EnvironmentRoute::Unset) => None,
            (ProxySetting::Inherited, EnvironmentRoute::Exempted(found)) => {
                let variable = found.variable;
                Some(format!("Connections to {host} are direct: NO_PROXY exempts it from {variable}"))
            }
            (ProxySetting::Inherited, EnvironmentRoute::Proxy(EnvironmentProxy { variable, proxy })) => {
                Some(format!("Connections to {host} use the proxy {proxy} ({variable})"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parses a setting, and checks its URL with credentials or its error without advice.
    #[track_caller]
    fn check_setting(text: &str, expected: Result<&str, &str>) {
        let parse_result = match text.parse::<ProxySetting>() {
            Ok(ProxySetting::Proxy(proxy)) => Ok(proxy.expose_url()),
            Ok(other @ (ProxySetting::Inherited | ProxySetting::Direct)) => Ok(other.to_string()),
            Err(error) => {
                let error = error.to_string();
                assert!(!error.contains("hunter"), "an error must not show the password: {error}");
                Err(error.split_once("; ").map_or(error.clone(), |(message, _)| message.to_owned()))
            }
        };
        assert_eq!(
            parse_result,
            expected.map(str::to_owned).map_err(str::to_owned),
            "{text:?} must have the expected parsed form or error"
        );
    }

    #[test]
    fn a_setting_is_empty_direct_or_a_url() {
        check_setting("", Ok(""));
        check_setting(" direct ", Ok("direct"));
        check_setting("off", Ok("direct"));
        check_setting("http://proxy.corp:3128", Ok("http://proxy.corp:3128"));
        check_setting("HTTP://Proxy.Corp", Ok("http://proxy.corp:80"));
        check_setting("https://proxy.corp/", Ok("https://proxy.corp:443"));
        check_setting("socks5://10.0.0.1", Ok("socks5h://10.0.0.1:1080"));
        check_setting("socks5h://[::1]:9050", Ok("socks5h://[::1]:9050"));
        check_setting("http://alice:hunter2@proxy.corp:3128", Ok("http://alice:hunter2@proxy.corp:3128"));
        check_setting("http://alice@proxy.corp:3128", Ok("http://alice:@proxy.corp:3128"));
        check_setting("http://al%40ice:hun:ter%2F2@proxy:1", Ok("http://al%40ice:hun%3Ater%2F2@proxy:1"));
    }

    #[test]
    fn an_invalid_url_is_refused_without_quoting_it() {
        let (path, escape) = (
            "the proxy's URL has a path",
            "the proxy's user or password has a character that must be escaped in a URL",
        );
        check_setting("proxy.corp:3128", Err("the proxy's URL has no scheme"));
        check_setting("hunter2", Err("the proxy's URL has no scheme"));
        check_setting("ftp://hunter2", Err("the proxy's scheme is not http, https or socks5h"));
        check_setting("socks4://proxy", Err("the proxy's scheme is not http, https or socks5h"));
        check_setting("http://proxy/hunter", Err(path));
        check_setting("http://proxy:1?hunter", Err(path));
        check_setting("http://", Err("the proxy's host is not a valid name or address"));
        check_setting("http://alice:hunter2@", Err("the proxy's host is not a valid name or address"));
        check_setting("http://hunter 2", Err("the proxy's host is not a valid name or address"));
        check_setting("http://proxy:hunter", Err("the proxy's URL has no valid port"));
        check_setting("http://proxy:0", Err("the proxy's URL has no valid port"));
        check_setting("http://alice:hun/ter@proxy", Err(escape));
        check_setting("http://alice:hunter@2@proxy", Err(escape));
        check_setting(
            "http://alice:hunter%@proxy",
            Err("the proxy's user or password has an invalid escape or a control character"),
        );
        check_setting(
            "http://alice:hunter%0d%0ax@proxy",
            Err("the proxy's user or password has an invalid escape or a control character"),
        );
        check_setting("http://:hunter2@proxy", Err("the proxy's URL has no user before the password"));
        check_setting("http://al%3Aice:hunter2@proxy", Err("the user for a proxy over HTTP has a colon"));
        let bytes = "user and password for a SOCKS5 proxy have 1 to 255 bytes each";
        check_setting("socks5h://alice@proxy", Err(bytes));
        check_setting(&format!("socks5h://alice:{}@proxy", "hunter".repeat(43)), Err(bytes));
    }

    #[test]
    fn a_setting_is_printed_with_masked_credentials() {
        let setting: ProxySetting = "http://alice:hunter2@proxy.corp:3128".parse().unwrap();
        assert_eq!(setting.to_string(), "http://***@proxy.corp:3128");
        let debug = format!("{setting:?}");
        assert!(
            !debug.contains("alice") && !debug.contains("hunter"),
            "the debug form must not show the credentials: {debug}"
        );
    }

    const UPSTREAM: &str = "https://api.elevenlabs.io";

    fn routes(setting: &str, variables: &[(&str, &str)]) -> ProxyRoutes {
        let environment: Environment =
            variables.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        let mut report = Report::default();
        let environment = EnvironmentProxies::read(&environment, true, &mut report);
        assert!(report.problems.is_empty(), "the variables must be valid: {:?}", report.problems);
        ProxyRoutes::new(setting.parse().unwrap(), environment)
    }

    /// Checks the forward proxy for `url` and the description of its route.
    #[track_caller]
    fn check_route(
        (setting, variables): (&str, &[(&str, &str)]),
        url: &str,
        proxy: Option<&str>,
        description: Option<&str>,
    ) {
        let (routes, url) = (routes(setting, variables), url.parse().unwrap());
        let route = routes.for_upstream(&url, &ProxySetting::Inherited);
        assert_eq!(route.map(|proxy| proxy.to_string()).as_deref(), proxy);
        assert_eq!(routes.describe(&url).as_deref(), description);
    }

    #[test]
    fn a_proxy_of_the_environment_is_used_for_its_scheme_and_for_other_machines() {
        let proxy = "http://p:1";
        let https = "Connections to api.elevenlabs.io use the proxy http://p:1 (HTTPS_PROXY)";
        check_route(("", &[]), UPSTREAM, None, None);
        check_route(("", &[("HTTPS_PROXY", "http://a:b@p:1")]), UPSTREAM, Some(proxy), Some(https));
        check_route(("", &[("HTTPS_PROXY", "p:1")]), UPSTREAM, Some(proxy), Some(https));
        check_route(
            ("", &[("https_proxy", "http://p:1"), ("ALL_PROXY", "http://q:1")]),
            UPSTREAM,
            Some(proxy),
            Some("Connections to api.elevenlabs.io use the proxy http://p:1 (https_proxy)"),
        );
        check_route(
            ("", &[("all_proxy", "socks5://p:1")]),
            UPSTREAM,
            Some("socks5h://p:1"),
            Some("Connections to api.elevenlabs.io use the proxy socks5h://p:1 (all_proxy)"),
        );
        check_route(("", &[("HTTP_PROXY", "http://p:1")]), UPSTREAM, None, None);
        check_route(("", &[("HTTPS_PROXY", "http://p:1")]), "http://gate.example", None, None);
        check_route(
            ("", &[("ALL_PROXY", "http://p:1")]),
            "http://gate.example",
            Some(proxy),
            Some("Connections to gate.example use the proxy http://p:1 (ALL_PROXY)"),
        );
        for loopback in ["http://127.0.0.1:8080", "https://localhost:8443", "http://[::1]:1"] {
            check_route(("", &[("ALL_PROXY", "http://p:1")]), loopback, None, None);
        }
    }

    #[test]
    fn hosts_in_no_proxy_are_reached_directly() {
        let exempted = "Connections to api.elevenlabs.io are direct: NO_PROXY exempts it from HTTPS_PROXY";
        for hosts in
            ["*", "elevenlabs.io", "*.elevenlabs.io", "a.example, api.elevenlabs.io:443", "API.elevenlabs.io"]
        {
            let variables = [("HTTPS_PROXY", "p:1"), ("NO_PROXY", hosts)];
            check_route(("", &variables), UPSTREAM, None, Some(exempted));
            let variables = [("HTTPS_PROXY", "p:1"), ("no_proxy", hosts)];
            check_route(("", &variables), UPSTREAM, None, Some(exempted));
        }
        let https = "Connections to api.elevenlabs.io use the proxy http://p:1 (HTTPS_PROXY)";
        for hosts in ["", "levenlabs.io", "elevenlabs.io:8443", "10.0.0.0/8"] {
            let variables = [("HTTPS_PROXY", "p:1"), ("NO_PROXY", hosts)];
            check_route(("", &variables), UPSTREAM, Some("http://p:1"), Some(https));
        }
        let variables = [("ALL_PROXY", "p:1"), ("NO_PROXY", "10.0.0.0/8")];
        check_route(
            ("", &variables),
            "http://10.1.2.3",
            None,
            Some("Connections to 10.1.2.3 are direct: NO_PROXY exempts it from ALL_PROXY"),
        );
    }

    #[test]
    fn a_setting_has_precedence_over_the_environment() {
        let variables = [("HTTPS_PROXY", "p:1"), ("NO_PROXY", "elevenlabs.io")];
        check_route(
            ("http://q:2", &variables),
            UPSTREAM,
            Some("http://q:2"),
            Some("Connections to api.elevenlabs.io use the proxy http://q:2 (upstream.proxy)"),
        );
        check_route(
            ("direct", &variables),
            UPSTREAM,
            None,
            Some("Connections to api.elevenlabs.io are direct: upstream.proxy overrides HTTPS_PROXY"),
        );
        check_route(("direct", &[]), UPSTREAM, None, None);
    }

    #[test]
    fn a_key_and_the_mirror_may_have_their_own_proxies() {
        let (routes, upstream) = (routes("http://q:2", &[]), UPSTREAM.parse().unwrap());
        let for_key = |own: &str| {
            let proxy = routes.for_upstream(&upstream, &own.parse().unwrap());
            proxy.map(|proxy| proxy.to_string())
        };
        assert_eq!(for_key(""), Some("http://q:2".into()));
        assert_eq!(for_key("direct"), None);
        assert_eq!(for_key("http://r:3"), Some("http://r:3".into()));
        let for_mirror = |url: &str, own: &str| {
            let proxy = routes.for_mirror(&url.parse().unwrap(), &own.parse().unwrap());
            proxy.map(|proxy| proxy.to_string())
        };
        assert_eq!(for_mirror("https://p.supabase.co", ""), Some("http://q:2".into()));
        assert_eq!(for_mirror("https://p.supabase.co", "off"), None);
        assert_eq!(for_mirror("http://127.0.0.1:54321", ""), None);
        assert_eq!(for_mirror("http://127.0.0.1:54321", "http://r:3"), Some("http://r:3".into()));
    }

    #[test]
    fn an_invalid_variable_is_an_error_only_where_it_is_used() {
        let environment: Environment =
            [("ALL_PROXY".into(), "socks4://hunter2".into())].into_iter().collect();
        for is_used in [false, true] {
            let mut report = Report::default();
            EnvironmentProxies::read(&environment, is_used, &mut report);
            let messages: Vec<String> = report.problems.iter().map(ToString::to_string).collect();
            assert_eq!(messages.len(), usize::from(is_used));
            assert!(
                messages
                    .iter()
                    .all(|message| message.starts_with("ALL_PROXY: ") && !message.contains("hunter2")),
                "a message must name the variable and not show the password: {messages:?}"
            );
        }
    }
}
