//! The settings for copying key states and events to Supabase (the mirror): the project's URL, the API key
//! and the timing. The URL and the key are also read from the environment variables of Supabase's own tools, which an app's environment
//! often contains.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use super::base_url::BaseUrl;
use super::keys::unreadable;
use super::mask::shown;
use super::problem::{Problem, SourceSpan, ValueOrigin, Warning, WrongValue};
use super::source::{Unreadable, ValueSources};
use super::value::Folders;
use crate::policy::authority::Scheme;
use crate::secret::{ServiceKey, ServiceKeyForm, UnusableServiceKey};

const URL: &str = "SUPABASE_URL";
const SECRET: &str = "SUPABASE_SECRET_KEY";
const CREDENTIALS: &str = "CREDENTIALS_DIRECTORY";

/// The variables of the two types of key; the newer type is first.
const KEYS: [(&str, ServiceKeyForm); 2] =
    [(SECRET, ServiceKeyForm::Secret), ("SUPABASE_SERVICE_ROLE_KEY", ServiceKeyForm::Token)];

/// The settings of the mirror in Supabase.
#[derive(Clone, Debug)]
pub struct SupabaseConfig {
    /// Whether the mirror runs when an address and a key are configured.
    pub enabled: bool,
    /// The project's URL.
    pub url: SupabaseUrl,
    /// A file with the key, in place of an environment variable.
    pub secret_key_file: Option<PathBuf>,
    /// The key; `None` if none was found.
    pub key: Option<ServiceKey>,
    /// Whether a row per attempt is sent, in addition to the rows of the keys.
    pub events: bool,
    /// Interval between two pushes.
    pub interval: Duration,
    /// Maximum rows per request.
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
    /// The address and the key, if the mirror is enabled and has both.
    #[must_use]
    pub fn target(&self) -> Option<(&BaseUrl, &ServiceKey)> {
        self.url.0.as_ref().zip(self.key.as_ref()).filter(|_| self.enabled)
    }
}

/// `https://PROJECT.supabase.co`, or none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SupabaseUrl(Option<BaseUrl>);

impl fmt::Display for SupabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|url| url.fmt(f))
    }
}

impl FromStr for SupabaseUrl {
    type Err = WrongValue;

    /// The path of the API is optional. An empty string means no URL.
    fn from_str(text: &str) -> Result<Self, WrongValue> {
        const FORM: &str = "write the project's URL, as in https://abcdefgh.supabase.co";
        let text = text.trim();
        if text.is_empty() {
            return Ok(Self(None));
        }
        if text.starts_with("postgres") {
            // A connection string contains a password, so the message does not show it.
            return Err(WrongValue::new("this is the address of the database, not of its API").advise(FORM));
        }
        let trimmed = text.trim_end_matches('/');
        let trimmed = trimmed.strip_suffix("/rest/v1").unwrap_or(trimmed);
        let url: BaseUrl = trimmed.parse().map_err(|wrong: WrongValue| wrong.advise(FORM))?;
        if url.path_prefix().starts_with("/dashboard") {
            return Err(WrongValue::new("this is the page of the dashboard, not the project").advise(FORM));
        }
        Ok(Self(Some(url)))
    }
}

/// Where the settings of the URL and of the key were written, for error messages.
pub(super) struct SettingSpans<'a> {
    pub(super) url: Option<SourceSpan>,
    pub(super) secret_key_file: Option<SourceSpan>,
    pub(super) folders: Folders<'a>,
}

/// The problems and warnings of the search.
#[derive(Default)]
pub(super) struct ServiceKeySearch {
    pub(super) problems: Vec<Problem>,
    pub(super) warnings: Vec<Warning>,
}

impl SupabaseConfig {
    /// Finds the address and the key in the environment, systemd credentials and the
    /// settings. If only one of the two is found, a warning names the other.
    pub(super) fn find_key(
        &mut self,
        sources: &ValueSources<'_>,
        spans: SettingSpans<'_>,
    ) -> ServiceKeySearch {
        let mut search = ServiceKeySearch::default();
        if !self.enabled {
            return search;
        }
        let key = self.key_text(sources, &spans, &mut search);
        let mut url_span = spans.url;
        let is_setting_variable = |span: &SourceSpan| matches!(span.origin, ValueOrigin::Variable(_));
        if let Some(text) =
            sources.environment.value(URL).filter(|_| !url_span.as_ref().is_some_and(is_setting_variable))
        {
            let span = SourceSpan::of(ValueOrigin::Variable(URL.to_owned()));
            match text.parse() {
                Ok(url) => self.url = url,
                // An invalid variable without a key is not an error: another app may use it.
                Err(_) if key.is_none() => {}
                Err(wrong) => search.problems.push(span.problem(wrong)),
            }
            url_span = Some(span);
        }
        match (&self.url.0, key) {
            (None, None) => {}
            (Some(url), Some((key, span))) => {
                match key {
                    Ok(key) => self.key = Some(key),
                    Err(wrong) => search.problems.push(span.problem(wrong)),
                }
                if url.scheme() == Scheme::Http && !url.is_loopback() {
                    let span = url_span.unwrap_or_else(|| SourceSpan::of(ValueOrigin::Nowhere));
                    let message = "Supabase's key goes over the network in clear text: write https:// if the host supports it";
                    search.warnings.push(span.warning(message));
                }
            }
            (Some(_), None) => {
                let span = url_span.unwrap_or_else(|| SourceSpan::of(ValueOrigin::Nowhere));
                let message = format!(
                    "nothing is mirrored to Supabase: it has no key; set {SECRET}, or supabase.enabled = false"
                );
                search.warnings.extend(search.problems.is_empty().then(|| span.warning(message)));
            }
            (None, Some((_, span))) => {
                let message = format!(
                    "nothing is mirrored to Supabase: it has no address; set {URL}, or supabase.enabled = false"
                );
                search.warnings.extend(search.problems.is_empty().then(|| span.warning(message)));
            }
        }
        search
    }

    /// The first configured key, and its source.
    fn key_text(
        &self,
        sources: &ValueSources<'_>,
        spans: &SettingSpans<'_>,
        search: &mut ServiceKeySearch,
    ) -> Option<(Result<ServiceKey, WrongValue>, SourceSpan)> {
        let local = Folders { base: None, home: spans.folders.home };
        for (name, form) in KEYS {
            if let Some(text) = sources.environment.value(name) {
                return Some((key(text, form), SourceSpan::of(ValueOrigin::Variable(name.to_owned()))));
            }
            let name = format!("{name}_FILE");
            if let Some(path) = sources.environment.value(&name) {
                let text = local.file(path).and_then(|path| {
                    (sources.read)(&path)
                        .map_err(|reason| unreadable(&shown(&path.to_string_lossy()), &reason))
                });
                return Some((
                    text.and_then(|text| key(&text, form)),
                    SourceSpan::of(ValueOrigin::Variable(name)),
                ));
            }
        }
        if let Some(folder) = sources.environment.value(CREDENTIALS) {
            for (name, form) in KEYS {
                let path = PathBuf::from(folder).join(name.to_lowercase());
                match (sources.read)(&path) {
                    Ok(text) => return Some((key(&text, form), SourceSpan::of(ValueOrigin::File(path)))),
                    // The service may have credentials for other programs only.
                    Err(Unreadable::Missing) => {}
                    Err(reason) => {
                        let wrong = unreadable("the file", &reason);
                        search.problems.push(SourceSpan::of(ValueOrigin::File(path)).problem(wrong));
                        return None;
                    }
                }
            }
        }
        let path = self.secret_key_file.as_ref()?;
        let text = (sources.read)(path).map_err(|reason| unreadable("the file", &reason));
        let span =
            spans.secret_key_file.clone().unwrap_or_else(|| SourceSpan::of(ValueOrigin::File(path.clone())));
        Some((text.and_then(|text| key(&text, ServiceKeyForm::Secret)), span))
    }
}

fn key(text: &str, form: ServiceKeyForm) -> Result<ServiceKey, WrongValue> {
    let plain = text.trim().trim_matches(['"', '\'']);
    ServiceKey::new(plain, form).map_err(|error| {
        let wrong = WrongValue::new(error.to_string());
        match error {
            UnusableServiceKey::NotVisibleAscii => wrong,
            UnusableServiceKey::Publishable | UnusableServiceKey::Anon | UnusableServiceKey::OtherRole => wrong
                .advise(format!("set {SECRET} to a secret key (sb_secret_…): in the project's settings, API keys"))
                .advise("or SUPABASE_SERVICE_ROLE_KEY to the older service_role key, if the project still has one"),
        }
    })
}
