//! Creates the responses that scripted faults send instead of the response of an operation: plain, encoded, oversized
//! or garbled refusals, and custom responses. HTTP requests and WebSocket handshakes share these responses.

use bytes::Bytes;
use http::request::Parts;

use super::accounts::Refusal;
use super::encoding::Encoding;
use super::fault::Fault;
use super::free_operations::FreeOperation;
use super::provider::{PresentedKey, Provider};
use super::query::query_value;
use super::refusal::{RefusalKind, RefusalValues};
use super::response::ProviderResponse;
use super::response_body::ResponseBody;
use super::route::Route;

/// The size of a huge error body, which a proxy should not buffer.
const HUGE_BODY_BYTES: usize = 100_000;
/// The chunk that the endless error body repeats.
const ENDLESS_CHUNK: &[u8] = &[b' '; 8_192];
/// The maximum number of voices, characters or bytes in the text of a scripted refusal.
const DEFAULT_MAX_COUNT: u64 = 10;
/// The model in the text of a scripted refusal.
const DEFAULT_MODEL: &str = "eleven_v3";
/// The format in the text of a scripted refusal, unless the request has one.
const DEFAULT_FORMAT: &str = "pcm_44100";

/// Returns the values of a scripted refusal. The values are consistent: the remaining credits are 0, and the
/// concurrency limit is at least 1.
pub(super) fn scripted_refusal_values(
    provider: &Provider,
    presented_key: PresentedKey,
    cost: u64,
) -> RefusalValues {
    let values = match presented_key.index() {
        Some(key) => provider.state().accounts.refusal_values(key, cost),
        None => RefusalValues { requested_amount: cost, ..RefusalValues::default() },
    };
    RefusalValues {
        remaining_credits: 0,
        remaining_cap: 0,
        max_concurrent: values.max_concurrent.max(1),
        max_count: DEFAULT_MAX_COUNT,
        model: DEFAULT_MODEL.to_owned(),
        format: DEFAULT_FORMAT.to_owned(),
        ..values
    }
}

/// Creates the refusal of a fault, with the values of the request.
pub(super) fn refuse_by_fault(
    provider: &Provider,
    parts: &Parts,
    presented_key: PresentedKey,
    kind: &RefusalKind,
    cost: u64,
) -> ProviderResponse {
    let mut values = scripted_refusal_values(provider, presented_key, cost);
    if let Some(format) = query_value(parts.uri.query().unwrap_or_default(), "output_format") {
        values.format = format;
    }
    match Route::find(&parts.method, parts.uri.path()) {
        Ok(Route::Speech { voice, .. } | Route::Free(FreeOperation::Voice(voice))) => {
            values.subject = voice;
        }
        Ok(Route::Operation(_, ids)) => values.subject = ids.into_iter().next().unwrap_or_default(),
        Ok(_) | Err(_) => {}
    }
    Refusal::new(kind.clone(), values).into()
}

/// Returns the response that a fault sends instead of the response of an operation or a handshake. Returns
/// `None` if the fault does not replace the response.
pub(super) fn replace_response(
    fault: &Fault,
    refuse: impl Fn(&RefusalKind) -> ProviderResponse,
) -> Option<ProviderResponse> {
    match fault {
        Fault::EarlyRefuse(kind) => Some(refuse(kind)),
        Fault::Gzip(kind) => Some(refuse(kind).encoded(&[Encoding::Gzip])),
        Fault::Encoded { encodings, refusal } => Some(refuse(refusal).encoded(encodings)),
        Fault::Respond { status, headers, body } => {
            Some(ProviderResponse::scripted(*status, headers, body.clone()))
        }
        Fault::HugeError => Some(with_huge_body(refuse(&RefusalKind::Quota))),
        Fault::EndlessError => Some(with_endless_body(refuse(&RefusalKind::Quota))),
        Fault::GarbledError => Some(refuse(&RefusalKind::Quota).with_header("content-encoding", "gzip")),
        Fault::Pass
        | Fault::Refuse(_)
        | Fault::MidRefuse { .. }
        | Fault::Stall { .. }
        | Fault::SlowHead { .. }
        | Fault::SlowBody { .. }
        | Fault::CutAfter { .. }
        | Fault::CloseBeforeHead
        | Fault::CloseUnread
        | Fault::ServerError
        | Fault::After { .. } => None,
    }
}

fn with_huge_body(response: ProviderResponse) -> ProviderResponse {
    let mut bytes = Vec::from(response.body.into_bytes());
    // JSON allows white space after the document.
    bytes.resize(HUGE_BODY_BYTES, b' ');
    ProviderResponse { body: ResponseBody::whole(bytes.into()), ..response }
}

fn with_endless_body(response: ProviderResponse) -> ProviderResponse {
    let padding = std::iter::repeat_with(|| Bytes::from_static(ENDLESS_CHUNK));
    let chunks = std::iter::once(response.body.into_bytes()).chain(padding);
    ProviderResponse { body: ResponseBody::generated(None, chunks), ..response }
}
