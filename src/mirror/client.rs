//! Sends the requests of the mirror to Supabase's REST API (PostgREST), each for the rows of one table, and classifies
//! the responses. The requests insert, update, rename or delete rows, or only query a table. No other module of the
//! mirror reads the service key.

use std::error::Error;
use std::fmt;
use std::time::Duration;

use http::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue};
use serde::Deserialize;
use serde_json::Value;

use super::rows::MirrorRow;
use super::{MirrorStartError, Settings};
use crate::clock;
use crate::policy::mirror::{DeliveryResult, MirrorResponse, classify};
use crate::policy::retry_after::parse_retry_after;
use crate::secret::{SupabaseKey, SupabaseKeyForm};
use crate::store::KeyRename;
use crate::upstream::http_client_through;

/// Number of response bytes after which reading stops. An error is one line of JSON. A longer body is a web page, which
/// can be classified by its start.
const MAX_RESPONSE_BYTES: usize = 64 * 1024;
/// Idle timeout of a connection. A longer timeout would be useless, because Supabase closes idle connections.
const IDLE_TIMEOUT: Duration = Duration::from_secs(50);

/// The `Prefer` header of an upsert. The state of a key replaces the earlier state of the key. An event that is sent
/// again equals the first event or contains the price that the first event lacked. A trigger of the database prevents a
/// late repetition of the first event from removing the price.
const UPSERT: &str = "resolution=merge-duplicates,return=minimal";

/// The `Prefer` header of a selection, whose response is a list.
const SELECT: &str = "return=representation";

/// An HTTP client with the URL of the REST API and the headers that contain the service key.
#[derive(Debug)]
pub(super) struct SupabaseClient {
    client: reqwest::Client,
    base_url: String,
    headers: HeaderMap,
    /// The forward proxy without its credentials, for error messages. It is `None` for direct connections.
    proxy: Option<String>,
}

/// The result of a request.
#[derive(Debug)]
pub(super) struct SendOutcome {
    pub(super) delivery: DeliveryResult,
    /// The status and error code of the response, or the error of a request without a response.
    pub(super) reason: FailureReason,
    /// The duration in the `Retry-After` header of the response, or `None` without this header.
    pub(super) retry_after: Option<Duration>,
}

/// The response or the error of a request, which explains in logs why rows were not delivered. It contains neither
/// secrets nor sent data.
#[derive(Clone, Debug)]
pub(super) enum FailureReason {
    /// The status of the response, and the error code in its body. The code is `None` if the body contains none.
    Response { status: u16, code: Option<String> },
    /// The request failed without a response.
    NoResponse(String),
}

impl FailureReason {
    /// Returns the code that the outbox stores: the error code in the body, or else the status of the response. It is
    /// empty without a response.
    pub(super) fn code(&self) -> String {
        match self {
            Self::Response { status, code } => code.clone().unwrap_or_else(|| status.to_string()),
            Self::NoResponse(_) => String::new(),
        }
    }
}

impl fmt::Display for FailureReason {
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

/// The expected body of a successful response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ExpectedBody {
    /// No body, after a write.
    Nothing,
    /// A list without rows, after a selection.
    EmptyList,
}

/// The member of an error response that is read.
#[derive(Default, Deserialize)]
struct SupabaseError {
    code: Option<String>,
}

impl SupabaseClient {
    pub(super) fn new(settings: &Settings) -> Result<Self, MirrorStartError> {
        let client = http_client_through(settings.proxy.as_deref(), settings.ca_file.as_deref())?
            .connect_timeout(settings.connect_timeout)
            .timeout(settings.response_timeout)
            .pool_idle_timeout(IDLE_TIMEOUT)
            .build()?;
        let base_url = format!("{}/rest/v1", settings.base_url);
        let proxy = settings.proxy.as_ref().map(ToString::to_string);
        Ok(Self { client, base_url, headers: auth_headers(&settings.key)?, proxy })
    }

    /// Inserts or updates rows of one table. `rows` must contain each row once, because the database refuses a request
    /// with the same row twice.
    pub(super) async fn upsert<R: MirrorRow>(&self, rows: &[R]) -> SendOutcome {
        let url = format!("{}/{}?on_conflict={}", self.base_url, R::TABLE, R::CONFLICT);
        let body = Value::from_iter(rows.iter().map(MirrorRow::to_json)).to_string();
        self.send(self.client.post(url), UPSERT, body).await
    }

    /// Renames the rows of a table whose key name begins with the old prefix.
    pub(super) async fn rename<R: MirrorRow>(&self, rename: &KeyRename) -> SendOutcome {
        let body = serde_json::json!({"api_key_hash": rename.key_hash}).to_string();
        self.send(self.client.patch(self.old_rows_url::<R>(rename)), "return=minimal", body).await
    }

    /// Deletes the rows of a table whose key name begins with the old prefix.
    pub(super) async fn delete<R: MirrorRow>(&self, rename: &KeyRename) -> SendOutcome {
        self.send(self.client.delete(self.old_rows_url::<R>(rename)), "return=minimal", String::new()).await
    }

    /// Queries the identifying column of a table, but selects no rows. The response shows whether the table exists and
    /// the key may use it.
    pub(super) async fn select_nothing<R: MirrorRow>(&self) -> SendOutcome {
        let url = format!("{}/{}?select={}&limit=0", self.base_url, R::TABLE, R::CONFLICT);
        self.send(self.client.get(url), SELECT, String::new()).await
    }

    fn old_rows_url<R: MirrorRow>(&self, rename: &KeyRename) -> String {
        format!("{}/{}?api_key_hash=like.{}*", self.base_url, R::TABLE, rename.old_prefix)
    }

    async fn send(&self, request: reqwest::RequestBuilder, prefer: &str, body: String) -> SendOutcome {
        let request = request
            .headers(self.headers.clone())
            .header("prefer", prefer)
            .header(CONTENT_TYPE, "application/json")
            .body(body);
        let expected_body = if prefer == SELECT { ExpectedBody::EmptyList } else { ExpectedBody::Nothing };
        self.receive(request, expected_body).await.unwrap_or_else(|error| {
            let mut message = with_causes(&error.without_url());
            if let Some(proxy) = &self.proxy {
                message = format!("{message} (through the proxy {proxy})");
            }
            let reason = FailureReason::NoResponse(message);
            SendOutcome { delivery: DeliveryResult::Retry, reason, retry_after: None }
        })
    }

    async fn receive(
        &self,
        request: reqwest::RequestBuilder,
        expected_body: ExpectedBody,
    ) -> Result<SendOutcome, reqwest::Error> {
        let mut response = request.send().await?;
        let status = response.status().as_u16();
        let retry_after = parse_retry_after(response.headers(), clock::now());
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await? {
            body.extend_from_slice(&chunk);
            if body.len() > MAX_RESPONSE_BYTES {
                break;
            }
        }
        let error: SupabaseError = serde_json::from_slice(&body).unwrap_or_default();
        // The code of the untrusted response is logged, so only a short alphanumeric code is accepted.
        let code = error.code.filter(|code| {
            (1..=16).contains(&code.len()) && code.bytes().all(|byte| byte.is_ascii_alphanumeric())
        });
        let is_empty = match expected_body {
            ExpectedBody::Nothing => body.is_empty(),
            ExpectedBody::EmptyList => body.trim_ascii() == b"[]",
        };
        let delivery = classify(MirrorResponse { status, code: code.as_deref(), is_empty });
        Ok(SendOutcome { delivery, reason: FailureReason::Response { status, code }, retry_after })
    }
}

/// Returns the headers that contain the service key.
fn auth_headers(key: &SupabaseKey) -> Result<HeaderMap, MirrorStartError> {
    let sensitive_header = |credentials: &str| {
        let mut header = HeaderValue::from_str(credentials).map_err(|_| MirrorStartError::Key)?;
        header.set_sensitive(true);
        Ok::<_, MirrorStartError>(header)
    };
    let mut headers = HeaderMap::new();
    headers.insert("apikey", sensitive_header(key.expose())?);
    match key.form() {
        SupabaseKeyForm::SecretKey => {}
        SupabaseKeyForm::LegacyJwt => {
            headers.insert(AUTHORIZATION, sensitive_header(&format!("Bearer {}", key.expose()))?);
        }
    }
    Ok(headers)
}

/// Formats an error with all its sources.
fn with_causes(error: &dyn Error) -> String {
    let mut message = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        message = format!("{message}: {error}");
        source = error.source();
    }
    message
}
