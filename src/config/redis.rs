//! Parses the settings of Redis, which several replicas share, and finds its URL in a setting, a file or a credential
//! of systemd.
//!
//! A URL may contain a password, so error messages of this module never quote it.

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use super::base_url::{parse_host, split_port};
use super::keys::CREDENTIALS;
use super::problem::{Report, SourceSpan, ValueError, ValueOrigin};
use super::source::{ReadFileError, ValueSources};
use super::value_file::{read_value_file, unreadable_file_error};
use crate::policy::forward_proxy::percent_decode;
use crate::policy::redis_url::{
    REDIS_PORT, RedisAddress, RedisLocation, RedisTransport, RedisUrl, SENTINEL_PORT, SentinelGroup,
};
use crate::policy::shared_pool_name::SharedPoolName;
use crate::secret::RedisCredentials;

/// The file in the directory of systemd's credentials that contains the URL.
const URL_CREDENTIAL: &str = "redis_url";

/// The settings of Redis.
#[derive(Clone, Debug, PartialEq)]
pub struct RedisConfig {
    /// The URL. If there is no URL, the process is the only replica of its pool.
    pub url: RedisUrlSetting,
    /// A file with the value of `url`.
    pub url_file: Option<PathBuf>,
    /// A PEM file of the only certificate authorities that are trusted for Redis. `None` means the public authorities.
    pub ca_file: Option<PathBuf>,
    /// The name of the pool that the replicas share.
    pub pool: SharedPoolName,
    /// Maximum wait of a request for Redis.
    pub wait_timeout: Duration,
    /// Interval between two beats, the requests with which a replica sends its usage to Redis while the usage changes.
    pub beat_interval: Duration,
    /// Time without a response after which Redis counts as lost.
    pub response_timeout: Duration,
    /// Timeout for sentinels, DNS, TCP, TLS and authentication together.
    pub connect_timeout: Duration,
    /// Maximum delay between two attempts to connect.
    pub max_reconnect_delay: Duration,
}

impl Default for RedisConfig {
    fn default() -> Self {
        Self {
            url: RedisUrlSetting::default(),
            url_file: None,
            ca_file: None,
            pool: SharedPoolName::default(),
            wait_timeout: Duration::from_millis(20),
            beat_interval: Duration::from_millis(200),
            response_timeout: Duration::from_secs(1),
            connect_timeout: Duration::from_secs(2),
            max_reconnect_delay: Duration::from_secs(1),
        }
    }
}

impl RedisConfig {
    /// Reads the URL from `url_file`, or else from the credential of systemd, unless `url` is set.
    pub(super) fn find_url(
        &mut self,
        sources: &ValueSources<'_>,
        spans: &mut HashMap<&'static str, SourceSpan>,
        report: &mut Report,
    ) {
        let Some(path) = &self.url_file else {
            if self.url.url().is_none() {
                self.read_credential(sources, spans, report);
            }
            return;
        };
        let names = ["redis.url", "redis.url_file"];
        let is_set = self.url.url().is_some();
        if let Some(url) = read_value_file(path, names, is_set, sources, spans, report, parse_file) {
            self.url = url;
        }
    }

    /// Reads the URL from the credential of systemd, if there is one.
    fn read_credential(
        &mut self,
        sources: &ValueSources<'_>,
        spans: &mut HashMap<&'static str, SourceSpan>,
        report: &mut Report,
    ) {
        let Some(directory) = sources.environment.value(CREDENTIALS) else { return };
        let path = PathBuf::from(directory).join(URL_CREDENTIAL);
        let content = (sources.read_file)(&path);
        let span = SourceSpan::new(ValueOrigin::File(path));
        let url_result = match content {
            Ok(text) => parse_file(&text),
            // The service may have credentials for other programs only.
            Err(ReadFileError::Missing) => return,
            Err(reason) => Err(unreadable_file_error("the file", &reason)),
        };
        match url_result {
            Ok(url) => {
                self.url = url;
                spans.insert("redis.url", span);
            }
            Err(error) => report.problems.push(span.problem(error)),
        }
    }
}

/// Parses the content of a file, which must contain a URL.
fn parse_file(text: &str) -> Result<RedisUrlSetting, ValueError> {
    let url: RedisUrlSetting = text.parse()?;
    if url.url().is_none() {
        return Err(url_error("the file contains no URL of Redis"));
    }
    Ok(url)
}

/// The URL of Redis, if it is configured. `Display` and `Debug` print no credentials.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RedisUrlSetting(Option<RedisUrl>);

impl RedisUrlSetting {
    /// Returns the URL.
    #[must_use]
    pub fn url(&self) -> Option<&RedisUrl> {
        self.0.as_ref()
    }

    /// Returns whether the URL contains a password.
    #[must_use]
    pub fn has_credentials(&self) -> bool {
        self.0.as_ref().is_some_and(|url| url.credentials.is_some())
    }
}

impl fmt::Display for RedisUrlSetting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|url| f.write_str(&url.format_masked()))
    }
}

impl FromStr for RedisUrlSetting {
    type Err = ValueError;

    /// An empty string means no URL.
    fn from_str(text: &str) -> Result<Self, ValueError> {
        let text = text.trim();
        if text.is_empty() { Ok(Self(None)) } else { parse_url(text).map(|url| Self(Some(url))) }
    }
}

impl FromStr for SharedPoolName {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        Self::new(text.trim()).ok_or_else(|| {
            ValueError::new("the name of the pool is invalid")
                .advise("write 1 to 64 characters of `a`-`z`, `0`-`9`, `_`, `.` and `-`")
        })
    }
}

const URL_NOTATION: &str = "write redis://HOST:PORT, rediss://HOST:PORT for TLS, or unix:/PATH for a Unix socket, with \
                        USER:PASSWORD@ or :PASSWORD@ before the host and /NUMBER of the database at the end if needed";
const SENTINEL_NOTATION: &str =
    "write redis+sentinel://HOST:26379,HOST:26379/MASTER with the name of the master at the sentinels";

/// Returns an error whose advice shows the notation of a URL.
fn url_error(message: &str) -> ValueError {
    ValueError::new(message).advise(URL_NOTATION)
}

fn parse_url(text: &str) -> Result<RedisUrl, ValueError> {
    if let Some(rest) = text.strip_prefix("unix:") {
        return parse_unix(rest);
    }
    let Some((scheme, rest)) = text.split_once("://") else {
        return Err(url_error("the URL of Redis has no scheme"));
    };
    match scheme.to_ascii_lowercase().as_str() {
        "redis" => parse_server(rest, RedisTransport::Plain),
        "rediss" => parse_server(rest, RedisTransport::Tls),
        "redis+sentinel" => parse_sentinel(rest, RedisTransport::Plain),
        "rediss+sentinel" => parse_sentinel(rest, RedisTransport::Tls),
        "valkey" => Err(url_error("the scheme of Valkey is redis, because its protocol is that of Redis")),
        "valkeys" => {
            Err(url_error("the scheme of Valkey with TLS is rediss, because its protocol is that of Redis"))
        }
        "http" | "https" => Err(url_error("this is the URL of a web server, and Redis does not use HTTP")),
        "sentinel" | "redis-sentinel" | "rediss-sentinel" | "valkey+sentinel" => {
            Err(ValueError::new("the scheme of sentinels is redis+sentinel or rediss+sentinel")
                .advise(SENTINEL_NOTATION))
        }
        "cluster" | "redis+cluster" | "redis-cluster" | "rediss+cluster" | "rediss-cluster" => {
            Err(url_error(
                "a cluster has no separate scheme: write the URL of one of its nodes, which reports the node of the pool",
            ))
        }
        _ => Err(url_error("the scheme is not redis, rediss, redis+sentinel or rediss+sentinel")),
    }
}

/// The parts of a URL after its scheme.
struct UrlParts<'a> {
    credentials: Option<RedisCredentials>,
    addresses: &'a str,
    /// The part after the first slash, without a slash at its end.
    path: &'a str,
}

/// Splits `[[USER]:PASSWORD@]ADDRESSES[/PATH]`.
fn split_url(rest: &str) -> Result<UrlParts<'_>, ValueError> {
    let (userinfo, rest) = match rest.rsplit_once('@') {
        Some((userinfo, rest)) => (Some(userinfo), rest),
        None => (None, rest),
    };
    if rest.contains(['?', '#']) {
        return Err(url_error("the URL of Redis has a part with `?` or `#`, which is not supported"));
    }
    let (addresses, path) = rest.split_once('/').unwrap_or((rest, ""));
    let path = path.strip_suffix('/').unwrap_or(path);
    let credentials = userinfo.map(parse_userinfo).transpose()?;
    Ok(UrlParts { credentials, addresses, path })
}

fn parse_server(rest: &str, transport: RedisTransport) -> Result<RedisUrl, ValueError> {
    let UrlParts { credentials, addresses, path } = split_url(rest)?;
    if addresses.contains(',') {
        return Err(url_error("the URL of Redis has several addresses: write one node of a cluster")
            .advise("or, for sentinels, redis+sentinel://HOST:26379,HOST:26379/MASTER"));
    }
    let address = parse_address(addresses, REDIS_PORT)?;
    Ok(RedisUrl {
        location: RedisLocation::Server(address, transport),
        credentials,
        database: parse_database(path)?,
    })
}

fn parse_sentinel(rest: &str, transport: RedisTransport) -> Result<RedisUrl, ValueError> {
    let UrlParts { credentials, addresses, path } = split_url(rest)?;
    let (master, database) = path.split_once('/').unwrap_or((path, ""));
    if master.is_empty() {
        return Err(
            ValueError::new("the URL of the sentinels has no name of a master").advise(SENTINEL_NOTATION)
        );
    }
    // A sentinel accepts only these characters.
    let is_name_byte = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    if !master.bytes().all(is_name_byte) {
        return Err(ValueError::new(
            "the name of the master has a character other than letters, digits and `.-_`",
        )
        .advise(SENTINEL_NOTATION));
    }
    let sentinels = addresses
        .split(',')
        .map(|address| parse_address(address, SENTINEL_PORT))
        .collect::<Result<_, _>>()?;
    let group = SentinelGroup { sentinels, master: master.to_owned(), transport };
    Ok(RedisUrl {
        location: RedisLocation::Sentinel(group),
        credentials,
        database: parse_database(database)?,
    })
}

/// Parses `/PATH[?db=NUMBER&user=USER&pass=PASSWORD]`.
fn parse_unix(rest: &str) -> Result<RedisUrl, ValueError> {
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let path = path.strip_prefix("//").unwrap_or(path);
    if !path.starts_with('/') || path.contains(char::is_control) {
        return Err(url_error("the path of the Unix socket is not absolute"));
    }
    let (mut database, mut user, mut password) = (0, None, None);
    for part in query.split('&').filter(|part| !part.is_empty()) {
        let (name, value) = part.split_once('=').unwrap_or((part, ""));
        match name {
            "db" => database = parse_database(value)?,
            "user" => user = Some(decode_component(value)?),
            "pass" => password = Some(decode_component(value)?),
            _ => {
                return Err(url_error(
                    "the URL of the Unix socket has a part other than `db`, `user` and `pass`",
                ));
            }
        }
    }
    let credentials = match (user, password) {
        (user, Some(password)) if !password.is_empty() => {
            Some(RedisCredentials::new(user.as_deref(), &password))
        }
        (None, None) => None,
        (_, _) => return Err(ValueError::new(NO_PASSWORD).advise("add `pass=PASSWORD`")),
    };
    Ok(RedisUrl { location: RedisLocation::Unix(path.to_owned()), credentials, database })
}

const NO_PASSWORD: &str = "the URL of Redis has a user without a password";

/// Parses `[USER]:PASSWORD`, in which characters may be percent-encoded.
fn parse_userinfo(userinfo: &str) -> Result<RedisCredentials, ValueError> {
    if userinfo.contains(['/', '?', '#', '@']) {
        return Err(ValueError::new("the user or password has a character that must be escaped in a URL")
            .advise(ESCAPE_NOTATION));
    }
    let (user, password) = userinfo.split_once(':').unwrap_or((userinfo, ""));
    if password.is_empty() {
        return Err(ValueError::new(NO_PASSWORD)
            .advise("write USER:PASSWORD@ before the host, or :PASSWORD@ without a user"));
    }
    let user = if user.is_empty() { None } else { Some(decode_component(user)?) };
    Ok(RedisCredentials::new(user.as_deref(), &decode_component(password)?))
}

const ESCAPE_NOTATION: &str = "write % as %25, / as %2F, : as %3A, ? as %3F, # as %23, & as %26 and @ as %40";

fn decode_component(text: &str) -> Result<String, ValueError> {
    percent_decode(text).ok_or_else(|| {
        ValueError::new("the user or password has an invalid escape or a control character")
            .advise(ESCAPE_NOTATION)
    })
}

/// Parses `HOST[:PORT]`.
fn parse_address(text: &str, default_port: u16) -> Result<RedisAddress, ValueError> {
    let (host, port) = split_port(text, text).map_err(|_| url_error("the URL of Redis has no valid port"))?;
    let host = parse_host(host).map_err(|_| url_error("the host of Redis is not a valid name or address"))?;
    Ok(RedisAddress { host, port: port.unwrap_or(default_port) })
}

/// Parses a database number. An empty string means the first database.
fn parse_database(text: &str) -> Result<u32, ValueError> {
    if text.is_empty() {
        return Ok(0);
    }
    let number = text.parse().ok().filter(|_| !text.starts_with('+'));
    number.ok_or_else(|| url_error("the database of Redis is not a number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parses a URL, and checks its masked form or its error without advice.
    #[track_caller]
    fn check_url(text: &str, expected: Result<&str, &str>) {
        let parse_result = match text.parse::<RedisUrlSetting>() {
            Ok(url) => Ok(url.to_string()),
            Err(error) => {
                let error = error.to_string();
                assert!(!error.contains("hunter"), "an error must not show the password: {error}");
                let (message, advice) = error.split_once("; ").unwrap();
                assert!(
                    advice.starts_with("write") || advice.starts_with("add"),
                    "the advice must show what to write: {error}"
                );
                Err(message.to_owned())
            }
        };
        assert_eq!(
            parse_result,
            expected.map(str::to_owned).map_err(str::to_owned),
            "{text:?} must have the expected parsed form or error"
        );
    }

    #[test]
    fn a_url_names_a_server_a_socket_or_sentinels() {
        check_url("", Ok(""));
        check_url("redis://cache", Ok("redis://cache:6379"));
        check_url(" REDIS://Cache:1/ \n", Ok("redis://cache:1"));
        check_url("rediss://[::1]:7/15", Ok("rediss://[::1]:7/15"));
        check_url("redis://:hunter2@10.0.0.1/0", Ok("redis://...@10.0.0.1:6379"));
        check_url("redis://alice:hunt:er%402@h/3", Ok("redis://...@h:6379/3"));
        check_url("unix:/run/redis.sock", Ok("unix:/run/redis.sock"));
        check_url("unix:///run/redis.sock?db=2", Ok("unix:/run/redis.sock?db=2"));
        check_url("unix:/r?user=alice&pass=hunter2", Ok("unix:/r?pass=..."));
        check_url("unix:/r?pass=hunter2&db=1", Ok("unix:/r?db=1&pass=..."));
        check_url("redis+sentinel://s/main", Ok("redis+sentinel://s:26379/main"));
        check_url(
            "rediss+sentinel://a:hunter2@s:1,[::1]:2,t/my.main-1/4",
            Ok("rediss+sentinel://...@s:1,[::1]:2,t:26379/my.main-1/4"),
        );
    }

    #[test]
    fn the_credentials_of_a_url_are_decoded() {
        let credentials =
            |text: &str| text.parse::<RedisUrlSetting>().unwrap().0.unwrap().credentials.unwrap();
        let user_and_password = credentials("redis://al%3Aice:p:w%2F@h");
        assert_eq!(
            (user_and_password.expose_user(), user_and_password.expose_password()),
            (Some("al:ice"), "p:w/")
        );
        assert_eq!(credentials("redis://:pw@h").expose_user(), None);
        let socket_credentials = credentials("unix:/r?user=a%26b&pass=p%3Dw");
        assert_eq!(
            (socket_credentials.expose_user(), socket_credentials.expose_password()),
            (Some("a&b"), "p=w")
        );
    }

    #[test]
    fn an_invalid_url_is_refused_with_the_valid_notation_and_without_its_password() {
        let (host, query) = (
            "the host of Redis is not a valid name or address",
            "the URL of Redis has a part with `?` or `#`, which is not supported",
        );
        check_url("localhost:6379", Err("the URL of Redis has no scheme"));
        check_url("hunter2", Err("the URL of Redis has no scheme"));
        check_url("valkey://h", Err("the scheme of Valkey is redis, because its protocol is that of Redis"));
        check_url(
            "valkeys://a:hunter2@h",
            Err("the scheme of Valkey with TLS is rediss, because its protocol is that of Redis"),
        );
        check_url("https://hunter2", Err("this is the URL of a web server, and Redis does not use HTTP"));
        check_url(
            "redis+cluster://:hunter2@h",
            Err(
                "a cluster has no separate scheme: write the URL of one of its nodes, which reports the node of the pool",
            ),
        );
        check_url(
            "tcp://hunter2@h",
            Err("the scheme is not redis, rediss, redis+sentinel or rediss+sentinel"),
        );
        check_url("sentinel://h", Err("the scheme of sentinels is redis+sentinel or rediss+sentinel"));
        check_url(
            "redis://a:hunter2@h:1,i:2",
            Err("the URL of Redis has several addresses: write one node of a cluster"),
        );
        for url in ["redis+sentinel://h", "redis+sentinel://:hunter2@h/", "redis+sentinel://h//1"] {
            check_url(url, Err("the URL of the sentinels has no name of a master"));
        }
        check_url(
            "redis+sentinel://h/hunter 2",
            Err("the name of the master has a character other than letters, digits and `.-_`"),
        );
        check_url("redis://", Err(host));
        check_url("redis://a:hunter2@", Err(host));
        check_url("redis://hunter 2", Err(host));
        check_url("redis+sentinel://h,/m", Err(host));
        check_url("redis://a:hunter2", Err("the URL of Redis has no valid port"));
        check_url("redis://h:0", Err("the URL of Redis has no valid port"));
        check_url("redis://h/hunter", Err("the database of Redis is not a number"));
        check_url("redis://h/-1", Err("the database of Redis is not a number"));
        check_url("redis://h/+1", Err("the database of Redis is not a number"));
        check_url("redis://h/?hunter2", Err(query));
        check_url("redis://h#hunter2", Err(query));
        check_url("redis://hunter2@h", Err(NO_PASSWORD));
        check_url("redis://hunter2:@h", Err(NO_PASSWORD));
        check_url("unix:/r?user=hunter2", Err(NO_PASSWORD));
        check_url("unix:/r?user=a&pass=", Err(NO_PASSWORD));
        check_url("unix:run?pass=hunter2", Err("the path of the Unix socket is not absolute"));
        check_url("unix://hunter2@/r", Err("the path of the Unix socket is not absolute"));
        check_url(
            "unix:/r?hunter2",
            Err("the URL of the Unix socket has a part other than `db`, `user` and `pass`"),
        );
        check_url(
            "redis://a:hun/ter@h",
            Err("the user or password has a character that must be escaped in a URL"),
        );
        check_url(
            "redis://a:hunter%@h",
            Err("the user or password has an invalid escape or a control character"),
        );
    }

    #[test]
    fn the_name_of_a_pool_has_lowercase_letters_and_surrounding_spaces_are_removed() {
        assert_eq!(" studio-1 ".parse::<SharedPoolName>().unwrap().to_string(), "studio-1");
        assert!("Studio".parse::<SharedPoolName>().unwrap_err().to_string().contains("1 to 64 characters"));
    }
}
