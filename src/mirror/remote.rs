//! The HTTP client of Supabase: sends rows of one table in one request. `policy` classifies the
//! response. No other module reads the service key.

use std::error::Error;
use std::fmt;
use std::time::Duration;

use http::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue};
use serde::Deserialize;

use super::rows::MirrorRow;
use super::{MirrorStartError, Settings};
use crate::clock;
use crate::policy::mirror::{Acceptance, MirrorResponse, classify};
use crate::policy::retry_after::retry_after;
use crate::secret::{ServiceKey, ServiceKeyForm};
use crate::store::Rename;
use crate::upstream::http_client;

/// Maximum response bytes to read. An error is one line of JSON; a longer body is a web page, and
/// its start identifies it.
const MAX_RESPONSE_BYTES: usize = 64 * 1024;
/// Idle timeout of a kept connection. Servers close connections that are idle for longer.
const IDLE_TIMEOUT: Duration = Duration::from_secs(50);

/// The API's URL, the headers with the service key, and the HTTP client.
#[derive(Debug)]
pub(super) struct Remote {
    client: reqwest::Client,
    base_url: String,
    headers: HeaderMap,
}

/// The result of a request.
#[derive(Debug)]
pub(super) struct SendOutcome {
    pub(super) verdict: Acceptance,
    /// For the log: the status and error code, or the error of a request without a response. Never
    /// contains sent data.
    pub(super) reason: Reason,
    /// The `Retry-After` of the response.
    pub(super) retry_after: Option<Duration>,
}

/// The reason why rows were not delivered, without secrets.
#[derive(Clone, Debug)]
pub(super) enum Reason {
    /// The status of the response and the database's error code.
    Response { status: u16, code: Option<String> },
    /// The request failed without a response.
    NoResponse(String),
}

impl Reason {
    /// The error code that the outbox stores.
    pub(super) fn code(&self) -> String {
        match self {
            Self::Response { status, code } => code.clone().unwrap_or_else(|| status.to_string()),
            Self::NoResponse(_) => String::new(),
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Response { status, code: Some(code) } => {
                write!(f, "Supabase responds with status {status}, {code}")
            }
            Self::Response { status, code: None } => write!(f, "Supabase responds with status {status}"),
            Self::NoResponse(error) => f.write_str(error),
        }
    }
}

#[derive(Default, Deserialize)]
struct SupabaseError {
    code: Option<String>,
}

impl Remote {
    pub(super) fn new(settings: &Settings) -> Result<Self, MirrorStartError> {
        let client = http_client()?
            .connect_timeout(settings.connect_timeout)
            .timeout(settings.response_timeout)
            .pool_idle_timeout(IDLE_TIMEOUT)
            .build()?;
        let base_url = format!("{}/rest/v1", settings.base_url);
        Ok(Self { client, base_url, headers: credentials(&settings.key)? })
    }

    /// Sends rows of one table. A row must not appear twice in a request, because the database
    /// refuses both then.
    pub(super) async fn push<R: MirrorRow>(&self, rows: &[R]) -> SendOutcome {
        let url = format!("{}/{}?on_conflict={}", self.base_url, R::TABLE, R::CONFLICT);
        // Rows contain numbers and plain strings, so serializing them cannot fail.
        let body = serde_json::to_vec(rows).unwrap_or_default();
        self.send(self.client.post(url), R::PREFER, body).await
    }

    /// Renames the rows of a table whose key name begins with the old hash.
    pub(super) async fn rename<R: MirrorRow>(&self, rename: &Rename) -> SendOutcome {
        let body = serde_json::json!({"api_key_hash": rename.key_hash}).to_string();
        self.send(self.client.patch(self.old_rows::<R>(rename)), "return=minimal", body.into_bytes()).await
    }

    /// Deletes the rows of a table whose key name begins with the old hash.
    pub(super) async fn remove<R: MirrorRow>(&self, rename: &Rename) -> SendOutcome {
        self.send(self.client.delete(self.old_rows::<R>(rename)), "return=minimal", Vec::new()).await
    }

    fn old_rows<R: MirrorRow>(&self, rename: &Rename) -> String {
        format!("{}/{}?api_key_hash=like.{}*", self.base_url, R::TABLE, rename.beginning)
    }

    async fn send(&self, request: reqwest::RequestBuilder, prefer: &str, body: Vec<u8>) -> SendOutcome {
        let request = request
            .headers(self.headers.clone())
            .header("prefer", prefer)
            .header(CONTENT_TYPE, "application/json")
            .body(body);
        match self.read(request).await {
            Ok(outcome) => outcome,
            Err(error) => {
                let reason = Reason::NoResponse(with_causes(&error.without_url()));
                SendOutcome { verdict: Acceptance::Later, reason, retry_after: None }
            }
        }
    }

    async fn read(&self, request: reqwest::RequestBuilder) -> Result<SendOutcome, reqwest::Error> {
        let mut response = request.send().await?;
        let status = response.status().as_u16();
        let retry_after = retry_after(response.headers(), clock::now());
        let mut body = Vec::new();
        while let Some(piece) = response.chunk().await? {
            body.extend_from_slice(&piece);
            if body.len() > MAX_RESPONSE_BYTES {
                break;
            }
        }
        let error: SupabaseError = serde_json::from_slice(&body).unwrap_or_default();
        // The response is not trusted and the code is logged, so only a short alphanumeric code is
        // accepted.
        let code = error.code.filter(|code| {
            (1..=16).contains(&code.len()) && code.bytes().all(|byte| byte.is_ascii_alphanumeric())
        });
        let verdict = classify(MirrorResponse { status, code: code.as_deref(), is_empty: body.is_empty() });
        Ok(SendOutcome { verdict, reason: Reason::Response { status, code }, retry_after })
    }
}

/// The headers that carry the service key.
fn credentials(key: &ServiceKey) -> Result<HeaderMap, MirrorStartError> {
    let secret = |text: &str| {
        let mut value = HeaderValue::from_str(text).map_err(|_| MirrorStartError::Key)?;
        value.set_sensitive(true);
        Ok::<_, MirrorStartError>(value)
    };
    let mut headers = HeaderMap::new();
    headers.insert("apikey", secret(key.expose())?);
    match key.form() {
        ServiceKeyForm::Secret => {}
        ServiceKeyForm::Token => {
            headers.insert(AUTHORIZATION, secret(&format!("Bearer {}", key.expose()))?);
        }
    }
    Ok(headers)
}

/// Formats an error with all its sources.
fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
