//! Builds a simulated response: its status, the headers that the provider always sends, the headers of a scripted
//! response, the encoding of the body, and the charged credits.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};
use serde_json::Value;

use super::accounts::Refusal;
use super::encoding::Encoding;
use super::plan::REGION;
use super::refusal::HttpRefusal;
use super::response_body::ResponseBody;

/// The name of the header with the region that served the request.
const REGION_HEADER: &str = "x-region";

/// A response before it is sent.
pub(super) struct ProviderResponse {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: ResponseBody,
    /// Credits charged for the request.
    pub(super) charged: u64,
}

/// Returns the headers of every response of the provider (captured responses of August 2026), with a trace
/// ID.
fn common_headers(trace_id: &str) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in [
        ("server", "uvicorn"),
        ("via", "1.1 google"),
        ("alt-svc", "h3=\":443\"; ma=2592000"),
        (REGION_HEADER, REGION),
        ("x-trace-id", trace_id),
    ] {
        set_header(&mut headers, name, value);
    }
    headers
}

/// Sets a header. A value that is invalid in a header is omitted.
pub(super) fn set_header(headers: &mut HeaderMap, name: &'static str, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(HeaderName::from_static(name), value);
    }
}

/// Creates a unique identifier that is valid in a header.
pub(super) fn new_trace_id() -> String {
    uuid::Uuid::now_v7().simple().to_string()
}

impl From<Refusal> for ProviderResponse {
    fn from(refusal: Refusal) -> Self {
        let trace_id = new_trace_id();
        Self::refusal(refusal.kind.render(&refusal.values, &trace_id), &trace_id)
    }
}

impl ProviderResponse {
    /// Creates a 200 response with a JSON document.
    pub(super) fn document(document: &Value) -> Self {
        Self::empty("application/json").with_body(ResponseBody::whole(document.to_string().into()))
    }

    /// Creates a 200 response with an empty body and the common headers.
    pub(super) fn empty(content_type: &str) -> Self {
        Self::empty_with_trace_id(&new_trace_id(), content_type)
    }

    /// Creates a 200 response with an empty body, the common headers and the given trace ID.
    pub(super) fn empty_with_trace_id(trace_id: &str, content_type: &str) -> Self {
        let mut headers = common_headers(trace_id);
        set_header(&mut headers, "content-type", content_type);
        Self { status: StatusCode::OK, headers, body: ResponseBody::whole(Bytes::new()), charged: 0 }
    }

    /// Creates a refusal. Its `request_id` is `trace_id`.
    pub(super) fn refusal(refusal: HttpRefusal, trace_id: &str) -> Self {
        let mut response = Self::empty_with_trace_id(trace_id, "application/json")
            .with_status(refusal.status)
            .with_body(ResponseBody::whole(refusal.body.into()));
        for (name, value) in refusal.headers {
            set_header(&mut response.headers, name, &value);
        }
        response
    }

    /// Creates the response that [`super::Fault::Respond`] describes. Invalid headers are omitted.
    pub(super) fn scripted(status: u16, headers: &[(String, String)], body: Bytes) -> Self {
        let content_type = match body.first() {
            None => "",
            Some(b'{' | b'[') => "application/json",
            Some(b'<') => "text/html",
            Some(_) => "text/plain",
        };
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = Self::empty(content_type).with_status(status);
        if body.is_empty() {
            response.headers.remove("content-type");
        }
        let parse_header = |(name, value): &(String, String)| {
            Some((HeaderName::try_from(name).ok()?, HeaderValue::try_from(value).ok()?))
        };
        let headers: Vec<_> = headers.iter().filter_map(parse_header).collect();
        for (name, _) in &headers {
            response.headers.remove(name);
        }
        for (name, value) in headers.into_iter().filter(|(_, value)| !value.is_empty()) {
            response.headers.append(name, value);
        }
        response.with_body(ResponseBody::whole(body))
    }

    pub(super) fn with_status(self, status: StatusCode) -> Self {
        Self { status, ..self }
    }

    pub(super) fn with_body(self, body: ResponseBody) -> Self {
        Self { body, ..self }
    }

    /// Sets a header. A value that is invalid in a header is omitted.
    pub(super) fn with_header(mut self, name: &'static str, value: &str) -> Self {
        set_header(&mut self.headers, name, value);
        self
    }

    /// Reports the charged credits in a header, and records them for the ledger.
    pub(super) fn with_cost(self, cost: u64) -> Self {
        Self { charged: cost, ..self.with_header("character-cost", &cost.to_string()) }
    }

    /// Encodes the body with `encodings`, one after the other. All bytes of the body must be available.
    pub(super) fn encoded(self, encodings: &[Encoding]) -> Self {
        let plain = self.body.into_bytes();
        let body = encodings.iter().fold(plain, |body, encoding| encoding.encode(&body).into());
        let names: Vec<_> = encodings.iter().map(ToString::to_string).collect();
        Self { body: ResponseBody::whole(body), ..self }.with_header("content-encoding", &names.join(", "))
    }

    /// Sets the region of the response, unless a fault has changed or removed the header.
    pub(super) fn set_region(&mut self, region: &str) {
        if self.headers.get(REGION_HEADER).is_some_and(|value| value == REGION) {
            set_header(&mut self.headers, REGION_HEADER, region);
        }
    }

    pub(super) fn into_response(self) -> Response<ResponseBody> {
        let mut response = Response::new(self.body);
        *response.status_mut() = self.status;
        *response.headers_mut() = self.headers;
        response
    }
}
