//! Parses the settings of the mirror, which copies key states and events to Supabase, and finds its
//! URL and key. Both can also come from the environment variables of Supabase's own tools, because an app's environment
//! often contains them. The key can also be in a systemd credential or in a file.

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use super::base_url::BaseUrl;
use super::keys::CREDENTIALS;
use super::mask::quote_masked;
use super::problem::{Report, SourceSpan, ValueError, ValueOrigin};
use super::proxy::ProxySetting;
use super::source::{ReadFileError, ValueSources};
use super::value::BaseDirectories;
use super::value_file::unreadable_file_error;
use crate::policy::authority::Scheme;
use crate::secret::{InvalidSupabaseKey, SupabaseKey, SupabaseKeyForm};

/// The variable with the URL of the Supabase project.
const URL_VARIABLE: &str = "SUPABASE_URL";
/// The variable with a secret key.
const SECRET_VARIABLE: &str = "SUPABASE_SECRET_KEY";

/// The variables with a key, in order of precedence, and the form of the key in each.
const KEY_VARIABLES: [(&str, SupabaseKeyForm); 2] = [
    (SECRET_VARIABLE, SupabaseKeyForm::SecretKey),
    ("SUPABASE_SERVICE_ROLE_KEY", SupabaseKeyForm::LegacyJwt),
];

/// The settings of the mirror in Supabase.
#[derive(Clone, Debug)]
pub struct SupabaseConfig {
    /// Whether the mirror runs if a URL and a key are configured.
    pub enabled: bool,
    /// The URL of the Supabase project.
    pub url: SupabaseUrl,
    /// A file with the key, used if neither an environment variable nor a systemd credential contains it.
    pub secret_key_file: Option<PathBuf>,
    /// The key, if one was found.
    pub key: Option<SupabaseKey>,
    /// The forward proxy for connections to Supabase, if it differs from the forward proxy for the provider.
    pub proxy: ProxySetting,
    /// A file with the value of `proxy`.
    pub proxy_file: Option<PathBuf>,
    /// Whether a row for each attempt is sent, in addition to the rows of the keys.
    pub events: bool,
    /// Interval between two pushes.
    pub interval: Duration,
    /// Maximum number of rows per request.
    pub max_batch_rows: usize,
    /// Timeout for DNS, TCP and TLS together.
    pub connect_timeout: Duration,
    /// Timeout from the start of a request to the end of its response.
    pub request_timeout: Duration,
    /// Maximum delay after repeated failures.
    pub max_retry_delay: Duration,
    /// Delay after an error that an operator must fix.
    pub setup_error_delay: Duration,
    /// Timeout of the last push at shutdown.
    pub final_push_timeout: Duration,
}

impl Default for SupabaseConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            url: SupabaseUrl::default(),
            secret_key_file: None,
            key: None,
            proxy: ProxySetting::default(),
            proxy_file: None,
            events: false,
            interval: Duration::from_secs(10),
            max_batch_rows: 500,
            connect_timeout: Duration::from_secs(10),
            request_timeout: Duration::from_secs(30),
            max_retry_delay: Duration::from_secs(300),
            setup_error_delay: Duration::from_secs(60),
            final_push_timeout: Duration::from_secs(5),
        }
    }
}

impl SupabaseConfig {
    /// Returns the URL and the key, if the mirror is enabled and has both.
    #[must_use]
    pub fn target(&self) -> Option<(&BaseUrl, &SupabaseKey)> {
        self.url.0.as_ref().zip(self.key.as_ref()).filter(|_| self.enabled)
    }
}

/// A key and its source. The key can be invalid.
struct FoundSupabaseKey {
    key: Result<SupabaseKey, ValueError>,
    span: SourceSpan,
}

/// The URL of the Supabase project, `https://PROJECT.supabase.co`, if it is configured.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SupabaseUrl(Option<BaseUrl>);

impl fmt::Display for SupabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|url| url.fmt(f))
    }
}

impl FromStr for SupabaseUrl {
    type Err = ValueError;

    /// Parses the URL, with or without the path of the API. An empty string means no URL.
    fn from_str(text: &str) -> Result<Self, ValueError> {
        const NOTATION: &str = "write the project's URL, as in https://abcdefgh.supabase.co";
        let text = text.trim();
        if text.is_empty() {
            return Ok(Self(None));
        }
        if text.starts_with("postgres") {
            // A connection string contains a password, so the message does not show it.
            return Err(ValueError::new("this is the URL of the database, not of its API").advise(NOTATION));
        }
        let text = text.trim_end_matches('/');
        let project_url = text.strip_suffix("/rest/v1").unwrap_or(text);
        let url: BaseUrl = project_url.parse().map_err(|error: ValueError| error.advise(NOTATION))?;
        if url.path_prefix().starts_with("/dashboard") {
            return Err(
                ValueError::new("this is the URL of the dashboard, not of the project").advise(NOTATION)
            );
        }
        Ok(Self(Some(url)))
    }
}

impl SupabaseConfig {
    /// Finds the URL and the key in the environment, the systemd credentials and the settings. `spans` contains the
    /// sources of the settings. If only one of the two is configured, adds a warning that names the other.
    pub(super) fn find_target(
        &mut self,
        sources: &ValueSources<'_>,
        spans: &mut HashMap<&'static str, SourceSpan>,
        report: &mut Report,
    ) {
        if !self.enabled {
            return;
        }
        let problem_count = report.problems.len();
        let found_key = self.find_key(sources, spans, report);
        let mut url_span = spans.get("supabase.url").cloned();
        let is_variable = |span: &SourceSpan| matches!(span.origin, ValueOrigin::Variable(_));
        if let Some(text) =
            sources.environment.value(URL_VARIABLE).filter(|_| !url_span.as_ref().is_some_and(is_variable))
        {
            let span = SourceSpan::new(ValueOrigin::Variable(URL_VARIABLE.to_owned()));
            match text.parse() {
                Ok(url) => self.url = url,
                // Without a key, an invalid variable is not an error, because it may be for another app.
                Err(_) if found_key.is_none() => {}
                Err(error) => report.problems.push(span.problem(error)),
            }
            if self.url.0.is_some() {
                spans.insert("supabase.url", span.clone());
            }
            url_span = Some(span);
        }
        let url_span = url_span.unwrap_or_else(|| SourceSpan::new(ValueOrigin::Absent));
        let (span, missing_part, variable) = match (&self.url.0, found_key) {
            (None, None) => return,
            (Some(url), Some(FoundSupabaseKey { key, span })) => {
                match key {
                    Ok(key) => self.key = Some(key),
                    Err(error) => report.problems.push(span.problem(error)),
                }
                if url.scheme() == Scheme::Http && !url.is_loopback() {
                    let message = "Supabase's key is sent over the network in clear text: use https:// if the host supports it";
                    report.warnings.push(url_span.warning(message));
                }
                return;
            }
            (Some(_), None) => (url_span, "key", SECRET_VARIABLE),
            (None, Some(FoundSupabaseKey { span, .. })) => (span, "URL", URL_VARIABLE),
        };
        if report.problems.len() == problem_count {
            report.warnings.push(span.warning(format!(
                "the mirror in Supabase is off because it has no {missing_part}: set {variable}, or supabase.enabled = false"
            )));
        }
    }

    /// Finds the first configured key and its source.
    fn find_key(
        &self,
        sources: &ValueSources<'_>,
        spans: &HashMap<&'static str, SourceSpan>,
        report: &mut Report,
    ) -> Option<FoundSupabaseKey> {
        let directories = BaseDirectories { base: None, home: sources.environment.home() };
        for (name, form) in KEY_VARIABLES {
            if let Some(text) = sources.environment.value(name) {
                let span = SourceSpan::new(ValueOrigin::Variable(name.to_owned()));
                return Some(FoundSupabaseKey { key: parse_key(text, form), span });
            }
            let name = format!("{name}_FILE");
            if let Some(path) = sources.environment.value(&name) {
                let key = directories.resolve(path).and_then(|path| {
                    let text = (sources.read_file)(&path).map_err(|reason| {
                        unreadable_file_error(&quote_masked(&path.to_string_lossy()), &reason)
                    })?;
                    parse_key(&text, form)
                });
                return Some(FoundSupabaseKey { key, span: SourceSpan::new(ValueOrigin::Variable(name)) });
            }
        }
        if let Some(directory) = sources.environment.value(CREDENTIALS) {
            for (name, form) in KEY_VARIABLES {
                let path = PathBuf::from(directory).join(name.to_lowercase());
                let content = (sources.read_file)(&path);
                let span = SourceSpan::new(ValueOrigin::File(path));
                match content {
                    Ok(text) => return Some(FoundSupabaseKey { key: parse_key(&text, form), span }),
                    // The service may have credentials for other programs only.
                    Err(ReadFileError::Missing) => {}
                    Err(reason) => {
                        report.problems.push(span.problem(unreadable_file_error("the file", &reason)));
                        return None;
                    }
                }
            }
        }
        let path = self.secret_key_file.as_ref()?;
        let text = (sources.read_file)(path).map_err(|reason| unreadable_file_error("the file", &reason));
        let span = spans
            .get("supabase.secret_key_file")
            .cloned()
            .unwrap_or_else(|| SourceSpan::new(ValueOrigin::File(path.clone())));
        let key = text.and_then(|text| parse_key(&text, SupabaseKeyForm::SecretKey));
        Some(FoundSupabaseKey { key, span })
    }
}

/// Parses a key, which may be in quotes.
fn parse_key(text: &str, form: SupabaseKeyForm) -> Result<SupabaseKey, ValueError> {
    let unquoted = text.trim().trim_matches(['"', '\'']);
    SupabaseKey::new(unquoted, form).map_err(|reason| {
        let error = ValueError::new(reason.to_string());
        match reason {
            InvalidSupabaseKey::NotVisibleAscii => error,
            InvalidSupabaseKey::Publishable | InvalidSupabaseKey::Anon | InvalidSupabaseKey::OtherRole => error
                .advise(format!("set {SECRET_VARIABLE} to a secret key (sb_secret_…): in the project's settings, API keys"))
                .advise("or SUPABASE_SERVICE_ROLE_KEY to the older service_role key, if the project still has one"),
        }
    })
}
