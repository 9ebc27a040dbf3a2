//! The settings of the mirror: Supabase's address, its key, and the timing. Address and key are
//! also read from the variables of Supabase's own tools, so that an app's environment is enough.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use super::base_url::BaseUrl;
use super::keys::unreadable;
use super::mask::shown;
use super::problem::{Origin, Place, Problem, Warning, WrongValue};
use super::source::{Sources, Unreadable};
use super::value::Folders;
use crate::policy::authority::Scheme;
use crate::secret::{ServiceKey, ServiceKeyForm, UnusableServiceKey};

const URL: &str = "SUPABASE_URL";
const SECRET: &str = "SUPABASE_SECRET_KEY";
const CREDENTIALS: &str = "CREDENTIALS_DIRECTORY";

/// The variables of the two kinds of key, the newer first.
const KEYS: [(&str, ServiceKeyForm); 2] =
    [(SECRET, ServiceKeyForm::Secret), ("SUPABASE_SERVICE_ROLE_KEY", ServiceKeyForm::Token)];

/// Whether and how usage records are mirrored to Supabase.
#[derive(Clone, Debug)]
pub struct SupabaseConfig {
    /// Whether the mirror runs if an address and a key are configured.
    pub enabled: bool,
    /// The project's URL.
    pub url: SupabaseUrl,
    /// A file with the key, as an alternative to the environment.
    pub secret_key_file: Option<PathBuf>,
    /// The key; `None` until it was found.
    pub key: Option<ServiceKey>,
    /// Whether each attempt is sent, in addition to the state of the keys.
    pub events: bool,
    /// Time between two pushes.
    pub interval: Duration,
    /// Maximum rows in a request.
    pub max_batch_rows: usize,
    /// Timeout for DNS, TCP and TLS together.
    pub connect_timeout: Duration,
    /// Timeout from the start of a request to the end of its response.
    pub request_timeout: Duration,
    /// The longest delay after repeated failures.
    pub max_retry_delay: Duration,
    /// Delay after an error that an operator must fix.
    pub setup_error_delay: Duration,
    /// How long shutdown waits for the last push.
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
    /// Address and key, if the mirror is enabled and has both.
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

    /// The API's path at the end is optional; an empty text is none.
    fn from_str(text: &str) -> Result<Self, WrongValue> {
        const FORM: &str = "write the project's URL, as in https://abcdefgh.supabase.co";
        let text = text.trim();
        if text.is_empty() {
            return Ok(Self(None));
        }
        if text.starts_with("postgres") {
            // A connection string contains a password, so it is not shown.
            return Err(WrongValue::new("this is the address of the database, not of its API").advise(FORM));
        }
        let bare = text.trim_end_matches('/');
        let bare = bare.strip_suffix("/rest/v1").unwrap_or(bare);
        let url: BaseUrl = bare.parse().map_err(|wrong: WrongValue| wrong.advise(FORM))?;
        if url.path_prefix().starts_with("/dashboard") {
            return Err(WrongValue::new("this is the page of the dashboard, not the project").advise(FORM));
        }
        Ok(Self(Some(url)))
    }
}

/// The places of the settings that name address and key.
pub(super) struct Given<'a> {
    pub(super) url: Option<Place>,
    pub(super) secret_key_file: Option<Place>,
    pub(super) folders: Folders<'a>,
}

/// Problems and warnings of the search.
#[derive(Default)]
pub(super) struct Found {
    pub(super) problems: Vec<Problem>,
    pub(super) warnings: Vec<Warning>,
}

impl SupabaseConfig {
    /// Searches address and key in the environment, the service's credentials and the settings.
    /// Only one of the two is reported as a problem, unless the mirror is disabled.
    pub(super) fn find_key(&mut self, sources: &Sources<'_>, given: Given<'_>) -> Found {
        let mut found = Found::default();
        if !self.enabled {
            return found;
        }
        let key = self.key_text(sources, &given, &mut found);
        let mut url_place = given.url;
        let is_ours = |place: &Place| matches!(place.origin, Origin::Variable(_));
        if let Some(text) =
            sources.environment.value(URL).filter(|_| !url_place.as_ref().is_some_and(is_ours))
        {
            let place = Place::of(Origin::Variable(URL.to_owned()));
            match text.parse() {
                Ok(url) => self.url = url,
                // An invalid variable of an app, which may not be intended for Keychoir, is no
                // error.
                Err(_) if key.is_none() => {}
                Err(wrong) => found.problems.push(place.problem(wrong)),
            }
            url_place = Some(place);
        }
        match (&self.url.0, key) {
            (None, None) => {}
            (Some(url), Some((key, place))) => {
                match key {
                    Ok(key) => self.key = Some(key),
                    Err(wrong) => found.problems.push(place.problem(wrong)),
                }
                if url.scheme() == Scheme::Http && !url.is_loopback() {
                    let place = url_place.unwrap_or_else(|| Place::of(Origin::Nowhere));
                    let what = "Supabase's key goes over the network in clear text: write https:// if the host speaks it";
                    found.warnings.push(place.warning(what));
                }
            }
            (Some(_), None) => {
                let place = url_place.unwrap_or_else(|| Place::of(Origin::Nowhere));
                let what = format!(
                    "nothing is mirrored to Supabase: it has no key; set {SECRET}, or supabase.enabled = false"
                );
                found.warnings.extend(found.problems.is_empty().then(|| place.warning(what)));
            }
            (None, Some((_, place))) => {
                let what = format!(
                    "nothing is mirrored to Supabase: it has no address; set {URL}, or supabase.enabled = false"
                );
                found.warnings.extend(found.problems.is_empty().then(|| place.warning(what)));
            }
        }
        found
    }

    /// The first key that is given, and its place.
    fn key_text(
        &self,
        sources: &Sources<'_>,
        given: &Given<'_>,
        found: &mut Found,
    ) -> Option<(Result<ServiceKey, WrongValue>, Place)> {
        let local = Folders { base: None, home: given.folders.home };
        for (name, form) in KEYS {
            if let Some(text) = sources.environment.value(name) {
                return Some((key(text, form), Place::of(Origin::Variable(name.to_owned()))));
            }
            let name = format!("{name}_FILE");
            if let Some(path) = sources.environment.value(&name) {
                let text = local.file(path).and_then(|path| {
                    (sources.read)(&path)
                        .map_err(|reason| unreadable(&shown(&path.to_string_lossy()), &reason))
                });
                return Some((text.and_then(|text| key(&text, form)), Place::of(Origin::Variable(name))));
            }
        }
        if let Some(folder) = sources.environment.value(CREDENTIALS) {
            for (name, form) in KEYS {
                let path = PathBuf::from(folder).join(name.to_lowercase());
                match (sources.read)(&path) {
                    Ok(text) => return Some((key(&text, form), Place::of(Origin::File(path)))),
                    // The service may have other credentials than Keychoir's.
                    Err(Unreadable::Missing) => {}
                    Err(reason) => {
                        let wrong = unreadable("the file", &reason);
                        found.problems.push(Place::of(Origin::File(path)).problem(wrong));
                        return None;
                    }
                }
            }
        }
        let path = self.secret_key_file.as_ref()?;
        let text = (sources.read)(path).map_err(|reason| unreadable("the file", &reason));
        let place = given.secret_key_file.clone().unwrap_or_else(|| Place::of(Origin::File(path.clone())));
        Some((text.and_then(|text| key(&text, ServiceKeyForm::Secret)), place))
    }
}

fn key(text: &str, form: ServiceKeyForm) -> Result<ServiceKey, WrongValue> {
    let bare = text.trim().trim_matches(['"', '\'']);
    ServiceKey::new(bare, form).map_err(|error| {
        let wrong = WrongValue::new(error.to_string());
        match error {
            UnusableServiceKey::NotVisibleAscii => wrong,
            UnusableServiceKey::Publishable | UnusableServiceKey::Anon | UnusableServiceKey::OtherRole => wrong
                .advise(format!("set {SECRET} to a secret key (sb_secret_…): in the project's settings, API keys"))
                .advise("or SUPABASE_SERVICE_ROLE_KEY to the older service_role key, if the project still has one"),
        }
    })
}
