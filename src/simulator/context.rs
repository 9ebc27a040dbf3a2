//! Holds the context of one operation, performs the checks that all operations share (the key, its permission, the
//! bill, the audio format and the schema of a JSON body), and adds generated audio to the history.

use serde_json::{Map, Value};

use crate::clock;

use super::accounts::{Admission, Refusal};
use super::history::HistoryItem;
use super::provider::{PresentedKey, Provider};
use super::query::query_value;
use super::refusal::{RefusalKind, RefusalValues, fixed_refusal};
use super::request::{MAX_JSON_BYTES, ReceivedBody};
use super::response::{ProviderResponse, new_trace_id, set_header};
use super::sound::format::{FORMATS, Format};

/// Bytes of an upload that count as one second (128 kbit/s). The simulator does not decode audio, whereas the
/// provider bills the length of the decoded audio.
const UPLOAD_BYTES_PER_SECOND: u64 = 16_000;
/// The value of `maximum-concurrent-requests` for a workspace without a limit. The provider always sends this header.
const UNLIMITED_CONCURRENCY: u32 = 1_000_000;

/// The generated audio, as the history stores it.
#[derive(Debug)]
pub(super) struct GeneratedAudio {
    pub(super) voice_id: String,
    pub(super) voice_name: String,
    pub(super) model_id: String,
    pub(super) text: String,
    pub(super) format: Format,
}

/// The request of one operation, and the provider that executes it.
#[derive(Clone, Copy)]
pub(super) struct OperationContext<'a> {
    pub(super) provider: &'a Provider,
    pub(super) presented_key: PresentedKey,
    pub(super) received: &'a ReceivedBody,
    pub(super) query: &'a str,
}

impl OperationContext<'_> {
    /// Returns the index of the paying key. The key must have the permission. Its workspace must have paid the bill and
    /// must not be disabled.
    pub(super) fn require_payer(&self, permission: &'static str) -> Result<usize, RefusalKind> {
        let key_index = self.require_permission(permission)?;
        self.provider.state().accounts.check_billing(key_index)?;
        Ok(key_index)
    }

    /// Returns the index of the key of an operation that costs no credits. The key must have the permission, but the
    /// bill may be unpaid.
    pub(super) fn require_permission(&self, permission: &'static str) -> Result<usize, RefusalKind> {
        let key_index = require_key(self.presented_key)?;
        self.provider.state().accounts.check_permission(key_index, permission)?;
        Ok(key_index)
    }

    /// Returns the requested audio format. The plan of the key's workspace must include it.
    pub(super) fn requested_format(&self, key_index: usize) -> Result<Format, Refusal> {
        let Some(name) = query_value(self.query, "output_format") else { return Ok(Format::DEFAULT) };
        let format = Format::find(&name).ok_or_else(|| {
            let supported_formats = FORMATS.map(|format| format.name).join(", ");
            let message =
                format!("Output format '{name}' is not supported. Supported formats: {supported_formats}.");
            Refusal::with_subject(RefusalKind::InvalidOutputFormat, message)
        })?;
        self.provider.state().accounts.workspace(key_index)?.plan.check_format(format)?;
        Ok(format)
    }

    /// Parses the body as a JSON object. An empty body is an empty object. A body that is too large or contains
    /// anything else is refused.
    pub(super) fn json_object(&self) -> Result<Map<String, Value>, Refusal> {
        let Some(content) = &self.received.content else {
            let max_count = u64::try_from(MAX_JSON_BYTES).unwrap_or(u64::MAX);
            let values = RefusalValues { max_count, ..RefusalValues::default() };
            return Err(Refusal::new(RefusalKind::RequestTooLarge, values));
        };
        if content.is_empty() {
            return Ok(Map::new());
        }
        serde_json::from_slice(content).map_err(|_| RefusalKind::MalformedJson.into())
    }

    /// Returns the length of the uploaded audio in seconds, at least one.
    pub(super) fn uploaded_seconds(&self) -> u64 {
        self.received.length.div_ceil(UPLOAD_BYTES_PER_SECOND).max(1)
    }

    /// Adds audio to the history. Returns the response without a body.
    pub(super) fn record_audio(
        &self,
        key_index: usize,
        admission: &Admission,
        audio: GeneratedAudio,
        content_type: &str,
    ) -> Result<ProviderResponse, RefusalKind> {
        let trace_id = new_trace_id();
        let GeneratedAudio { voice_id, voice_name, model_id, text, format } = audio;
        let item = HistoryItem {
            // The end of the trace ID consists of random digits and has the length of the provider's IDs.
            id: trace_id.get(12..).unwrap_or(&trace_id).to_owned(),
            request_id: new_trace_id(),
            voice_id,
            voice_name,
            model_id,
            text,
            format,
            date_unix: clock::now().0 / 1_000,
            used_before: admission.used_before,
            used_after: admission.used_before + admission.cost,
        };
        let mut response = ProviderResponse::empty_with_trace_id(&trace_id, content_type)
            .with_header("request-id", &item.request_id)
            .with_header("history-item-id", &item.id)
            .with_cost(admission.cost);
        set_speech_headers(&mut response, admission);
        self.provider.state().accounts.workspace_mut(key_index)?.history.add(item);
        Ok(response)
    }
}

/// Returns the index of the presented key. Refuses a missing key, an unknown key and a key of another region.
pub(super) fn require_key(presented_key: PresentedKey) -> Result<usize, RefusalKind> {
    match presented_key {
        PresentedKey::Known(key_index) => Ok(key_index),
        PresentedKey::Unknown => Err(RefusalKind::InvalidKey),
        PresentedKey::OtherRegion => Err(fixed_refusal("wrong_host")),
        PresentedKey::Absent => Err(RefusalKind::NeedsAuthorization),
    }
}

/// Returns an optional string field. A value of any other type is refused.
pub(super) fn string_field(
    body: &Map<String, Value>,
    field: &'static str,
) -> Result<Option<String>, RefusalKind> {
    match body.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_)) => {
            Err(RefusalKind::NotAString(field.into()))
        }
    }
}

/// Returns a required string field.
pub(super) fn required_string(body: &Map<String, Value>, field: &'static str) -> Result<String, RefusalKind> {
    string_field(body, field)?.ok_or(RefusalKind::FieldMissing(field.into()))
}

/// Sets the headers of a successful speech response (captured responses of August 2026).
fn set_speech_headers(response: &mut ProviderResponse, admission: &Admission) {
    let running = admission.running.to_string();
    let max_concurrent = admission.max_concurrent.unwrap_or(UNLIMITED_CONCURRENCY).to_string();
    for (name, value) in [
        ("current-concurrent-requests", running.as_str()),
        ("workspace-concurrent-requests", &running),
        ("maximum-concurrent-requests", &max_concurrent),
        ("tts-latency-ms", "75"),
        ("collect-preference", "false"),
        ("vary", "Accept-Language"),
        ("access-control-allow-origin", "*"),
        ("access-control-allow-headers", "*"),
        ("access-control-allow-methods", "POST, PATCH, OPTIONS, DELETE, GET, PUT"),
        ("access-control-max-age", "600"),
        (
            "access-control-expose-headers",
            "request-id, history-item-id, tts-latency-ms, character-cost, current-concurrent-requests, \
             maximum-concurrent-requests, workspace-concurrent-requests, regeneration-count, \
             generation-info, x-region, x-trace-id",
        ),
    ] {
        set_header(&mut response.headers, name, value);
    }
}
