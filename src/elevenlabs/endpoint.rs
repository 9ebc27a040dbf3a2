//! Classifies a request or a WebSocket handshake by its method and path. The classification contains the route for logs
//! and usage records, the effect, the operation, the WebSocket protocol and the permission that the key needs. It also
//! shows whether the request costs credits, which data of the account the response contains, and whether a client may
//! send the request.
//!
//! One table (`table`) contains all known endpoints. Unknown paths are allowed, because the API grows by dozens of
//! paths a month. Only the endpoints that could disable, create or show a key, manage the workspace, or read or change
//! its secrets and settings, are denied.

mod literals;
mod route;
mod row;
mod table;

use http::Method;

use super::normalize_path::is_version;
use super::segments::{Segment, Segments};
use super::socket::Dialect;
use crate::policy::charge::Billing;
use crate::policy::path::{AmbiguousPathError, Path};
use crate::policy::permission::Permission;
use crate::policy::replay::Effect;
pub(super) use literals::Literal;
pub use route::Route;

/// The classification of a request by its method and path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The path with every identifier replaced by `{id}`: `/v1/text-to-speech/{id}/stream`.
    pub route: Route,
    /// Whether the request changes or generates something.
    pub effect: Effect,
    /// Whether the request counts as charged.
    pub metering: Metering,
    /// Whether the request costs credits, may cost credits or costs none. The quota of the client depends on it.
    pub billing: Billing,
    /// Whether the response lets the client use the provider without Keychoir.
    pub grants_direct_access: bool,
    /// The work of the request, which determines its price and concurrency group.
    pub operation: Operation,
    /// The permission that the key needs, if it is known.
    pub permission: Option<Permission>,
    /// Whether a client of the pool may call the endpoint.
    pub access: Access,
    /// Whether the response describes the account holder of the key.
    pub returns_owner_data: bool,
    /// Whether the response contains the address of a WebSocket.
    pub returns_websocket_url: bool,
    /// Whether the request creates a voice that takes a slot of its workspace.
    pub adds_voice: bool,
    /// The protocol of a request that opens a WebSocket, or `None` for any other request.
    pub socket: Option<Dialect>,
}

/// Whether a request counts as charged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metering {
    /// The request costs credits, or it opens a WebSocket of the API that may cost credits. Most responses over HTTP
    /// report the credits in `character-cost`.
    Credits,
    /// The request is not known to cost credits.
    Free,
}

/// The work of a request, which determines the rule of its price and its concurrency group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// The request reads or manages resources, or the table contains no work for its endpoint or WebSocket.
    Reading,
    /// Text to speech.
    Speech,
    /// Text to dialogue, with several speakers.
    Dialogue,
    /// Speech to speech.
    Conversion,
    /// Audio isolation, which removes noise.
    Isolation,
    /// Speech to text, and alignment.
    Transcription,
    /// Live speech to text.
    LiveTranscription,
    /// A conversation with an agent.
    Conversation,
    /// Sound effects.
    SoundEffects,
    /// Music.
    Music,
    /// Any other charged work.
    Other,
}

impl Operation {
    /// Whether the request body contains a text or a length from which the price can be estimated.
    #[must_use]
    pub fn has_text(self) -> bool {
        match self {
            Self::Speech | Self::Dialogue | Self::SoundEffects => true,
            Self::Reading
            | Self::Conversion
            | Self::Isolation
            | Self::Transcription
            | Self::LiveTranscription
            | Self::Conversation
            | Self::Music
            | Self::Other => false,
        }
    }
}

/// Whether a client of the pool may call an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Clients may call the endpoint.
    Open,
    /// Clients may not call the endpoint unless the configuration allows it. The error response contains this reason.
    Denied(&'static str),
}

/// Classifies a request by its received path.
///
/// # Errors
///
/// Fails if the path is ambiguous.
pub fn lookup(method: &Method, path: &str) -> Result<Endpoint, AmbiguousPathError> {
    Ok(Endpoint::classify(method, &Segments::new(&Path::parse(path)?)))
}

/// Returns the protocol of a WebSocket at a received path, or `None` if the path is ambiguous.
#[must_use]
pub fn websocket_dialect(path: &str) -> Option<Dialect> {
    let path = Path::parse(path).ok()?;
    Some(SegmentCodes::new(&Segments::new(&path)).dialect())
}

/// Whether paths of the API start with the given `segment` after the version. The segment must be in lower case.
pub(super) fn is_root(segment: &str) -> bool {
    Literal::find(segment).is_some_and(|literal| literal.text() == segment && row::is_root(literal))
}

impl Endpoint {
    /// Classifies a request by the segments of its path.
    #[must_use]
    pub fn classify(method: &Method, segments: &Segments<'_>) -> Self {
        let is_safe = [Method::GET, Method::HEAD, Method::OPTIONS].contains(method);
        Self::new(row::methods(method), is_safe, segments, &SegmentCodes::new(segments))
    }

    /// Classifies a request that opens a WebSocket.
    #[must_use]
    pub fn classify_websocket(segments: &Segments<'_>) -> Self {
        let codes = SegmentCodes::new(segments);
        let dialect = codes.dialect();
        let is_unlisted = matches!(dialect, Dialect::Unknown | Dialect::Foreign);
        Self {
            operation: dialect.operation(),
            metering: if dialect == Dialect::Foreign { Metering::Free } else { Metering::Credits },
            billing: if is_unlisted { Billing::Unlisted } else { Billing::Metered },
            grants_direct_access: false,
            returns_owner_data: false,
            socket: Some(dialect),
            ..Self::new(row::methods(&Method::GET), true, segments, &codes)
        }
    }

    /// Creates the endpoint of a request that opens no WebSocket.
    fn new(methods: row::Methods, is_safe: bool, segments: &Segments<'_>, codes: &SegmentCodes) -> Self {
        let properties = codes.properties(methods);
        let grants_direct_access = properties.grants_direct_access || ends_in_direct_access(segments);
        let billing = match properties.operation {
            Some(_) => Billing::Metered,
            // A request for a token costs no credits, but the later use of the token does.
            None if grants_direct_access => Billing::Unlisted,
            None if is_safe || properties.is_free == Some(true) => Billing::Free,
            None => Billing::Unlisted,
        };
        let is_read = methods == row::methods(&Method::GET);
        Self {
            route: Route::from_segments(segments),
            effect: if is_safe { Effect::None } else { Effect::Some },
            metering: if properties.operation.is_some() { Metering::Credits } else { Metering::Free },
            billing,
            grants_direct_access,
            operation: properties.operation.unwrap_or(Operation::Reading),
            permission: properties.permissions.map(|[read, write]| if is_read { read } else { write }),
            access: properties.denied.map_or(Access::Open, Access::Denied),
            returns_owner_data: properties.returns_owner_data,
            returns_websocket_url: properties.returns_websocket_url,
            adds_voice: properties.adds_voice,
            socket: None,
        }
    }
}

/// Whether the response to a path that ends with the last of `segments` lets the client use the provider directly.
fn ends_in_direct_access(segments: &Segments<'_>) -> bool {
    let last = segments.last().and_then(Segment::literal);
    last.is_some_and(|last| table::DIRECT_ACCESS_ENDINGS.contains(&last.text()))
}

/// The codes of the first segments after the version. The version does not change the meaning of a path.
struct SegmentCodes {
    /// The number of the literal of each segment, or [`row::NOT_LITERAL`].
    codes: [u8; row::MAX_SEGMENTS],
    /// The number of all segments after the version.
    count: usize,
    has_version: bool,
}

impl SegmentCodes {
    fn new(segments: &Segments<'_>) -> Self {
        let (after_version, has_version) = match &**segments {
            [version, rest @ ..] if is_version_in_any_case(version.text()) => (rest, true),
            all => (all, false),
        };
        let mut codes = [row::NOT_LITERAL; row::MAX_SEGMENTS];
        for (code, segment) in codes.iter_mut().zip(after_version) {
            *code = segment.literal().map_or(row::NOT_LITERAL, Literal::number);
        }
        Self { codes, count: after_version.len(), has_version }
    }

    /// Returns the properties of a request with one of `methods`.
    fn properties(&self, methods: row::Methods) -> row::EndpointProperties {
        row::find_properties(methods, &self.codes[..self.count.min(row::MAX_SEGMENTS)], self.count)
    }

    /// Returns the protocol of a WebSocket at the path.
    fn dialect(&self) -> Dialect {
        let default_dialect = if self.has_version { Dialect::Unknown } else { Dialect::Foreign };
        self.properties(row::SOCKET).socket.unwrap_or(default_dialect)
    }
}

fn is_version_in_any_case(segment: &str) -> bool {
    is_version(segment) || segment.strip_prefix('V').is_some_and(|digits| is_version(&format!("v{digits}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_route(path: &str, expected: &str) {
        assert_eq!(lookup(&Method::GET, path).unwrap().route.to_string(), expected);
    }

    #[test]
    fn identifiers_are_replaced_in_a_route() {
        check_route(
            "/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM/stream/with-timestamps",
            "/v1/text-to-speech/{id}/stream/with-timestamps",
        );
        check_route("/v1/user/subscription", "/v1/user/subscription");
        check_route("/v2/voices", "/v2/voices");
        check_route("/v1/some-new-thing/abc", "/v1/{id}/{id}");
        check_route("/", "/");
        check_route("/caf%C3%A9", "/{id}");
    }

    #[test]
    fn a_route_has_a_maximum_length() {
        check_route(&"/a".repeat(5_000), &("/{id}".repeat(10) + "/…"));
    }

    #[test]
    fn a_documented_route_is_recognized_in_any_case_and_with_any_identifier() {
        let is_documented = |path: &str| lookup(&Method::GET, path).unwrap().route.is_documented();
        for path in [
            "/v1/text-to-speech/x/stream",
            "/v1/Text-To-Speech/y/stream",
            "/v2/voices",
            "/v1/convai/conversation",
        ] {
            assert!(is_documented(path), "{path} must be documented");
        }
        for path in ["/", "/v1/voices/voices/voices", "/v1/some-new-thing/abc", "/v9/voices"] {
            assert!(!is_documented(path), "{path} must not be documented");
        }
        for line in include_str!("endpoint/routes.txt").lines() {
            assert_eq!(Route::parse(line).to_string(), line, "each segment must be a literal of the API");
        }
    }

    #[test]
    fn a_read_has_no_effect_and_any_other_request_has_one() {
        for (method, effect) in [
            (Method::GET, Effect::None),
            (Method::HEAD, Effect::None),
            (Method::OPTIONS, Effect::None),
            (Method::POST, Effect::Some),
            (Method::DELETE, Effect::Some),
            (Method::from_bytes(b"BREW").unwrap(), Effect::Some),
        ] {
            assert_eq!(lookup(&method, "/v1/voices").unwrap().effect, effect);
        }
    }

    #[test]
    fn generating_audio_is_metered_and_reading_costs_no_credits() {
        assert_eq!(lookup(&Method::POST, "/v1/text-to-speech/x").unwrap().metering, Metering::Credits);
        assert_eq!(lookup(&Method::POST, "/v1/voice-changer/x/stream").unwrap().metering, Metering::Credits);
        assert_eq!(lookup(&Method::GET, "/v1/dubbing/x").unwrap().metering, Metering::Free);
        assert_eq!(lookup(&Method::POST, "/v1/voices/add").unwrap().metering, Metering::Free);
    }

    #[test]
    fn every_operation_is_recognized() {
        for (path, operation) in [
            ("/v1/text-to-speech/x/stream", Operation::Speech),
            ("/v1/text-to-dialogue", Operation::Dialogue),
            ("/v1/speech-to-speech/x", Operation::Conversion),
            ("/v1/audio-isolation", Operation::Isolation),
            ("/v1/forced-alignment", Operation::Transcription),
            ("/v1/sound-generation", Operation::SoundEffects),
            ("/v1/music/detailed", Operation::Music),
            ("/v1/dubbing", Operation::Other),
            ("/v1/user", Operation::Reading),
        ] {
            assert_eq!(
                lookup(&Method::POST, path).unwrap().operation,
                operation,
                "{path} must have the expected operation"
            );
            assert_eq!(lookup(&Method::GET, path).unwrap().operation, Operation::Reading);
        }
    }

    #[track_caller]
    fn check_billing(method: &str, path: &str, expected: Billing) {
        let method = Method::from_bytes(method.as_bytes()).unwrap();
        assert_eq!(
            lookup(&method, path).unwrap().billing,
            expected,
            "{method} {path} must have the expected billing"
        );
    }

    #[test]
    fn a_generating_request_is_metered() {
        for path in ["/v1/text-to-speech/x/stream", "/v1/music/plan", "/v1/dubbing", "/v1/Music"] {
            check_billing("POST", path, Billing::Metered);
        }
    }

    #[test]
    fn a_managing_request_costs_no_credits() {
        for path in [
            "/v1/voices/add",
            "/v1/voices/add/owner/voice",
            "/v1/voices/x/edit",
            "/v1/voices/pvc/x/samples/y",
            "/v1/history/download",
            "/v1/pronunciation-dictionaries/x/add-rules",
            "/v1/convai/agents/create",
            "/v1/convai/agents/x/branches/y/merge",
            "/v1/convai/knowledge-base/text",
            "/v1/convai/batch-calling/x/cancel",
            "/v1/convai/conversations/x/feedback",
            "/V1/Voices/add",
        ] {
            check_billing("POST", path, Billing::Free);
        }
        for path in ["/v1/voices/x", "/v1/convai/agents/x", "/v1/studio/projects/x/chapters/y"] {
            check_billing("DELETE", path, Billing::Free);
            check_billing("PATCH", path, Billing::Free);
        }
        for path in ["/v1/voices", "/v1/dubbing/x", "/v1/what/comes/next", "/"] {
            check_billing("GET", path, Billing::Free);
            check_billing("HEAD", path, Billing::Free);
        }
    }

    #[test]
    fn an_unlisted_request_may_cost_credits() {
        for path in [
            "/v1/convai/twilio/outbound-call",
            "/v1/convai/sip-trunk/outbound-call",
            "/v1/convai/exotel/outbound-call",
            "/v1/convai/whatsapp/outbound-call",
            "/v1/convai/whatsapp/outbound-message",
            "/v1/convai/batch-calling/submit",
            "/v1/convai/batch-calling/x/retry",
            "/v1/convai/agents/x/simulate-conversation",
            "/v1/convai/agents/x/simulate-conversation/stream",
            "/v1/convai/agents/x/run-tests",
            "/v1/convai/conversations/x/analysis/run",
            "/v1/convai/agents/x/branches/y/merge/outbound-call",
            "/v1/voices/pvc/x/train",
            "/v1/translation",
            "/v1/flows/video",
            "/v1/audio-native",
            "/v1/what/comes/next",
            "/what/comes/next",
            "/",
        ] {
            check_billing("POST", path, Billing::Unlisted);
        }
        check_billing("PUT", "/v1/text-to-speech/x", Billing::Unlisted);
        check_billing("DELETE", "/v1/new-thing/x", Billing::Unlisted);
        check_billing("BREW", "/v1/voices/add", Billing::Unlisted);
    }

    #[test]
    fn a_websocket_is_metered_or_may_cost_credits() {
        for (path, expected) in [
            ("/v1/text-to-speech/x/stream-input", Billing::Metered),
            ("/v1/convai/conversation", Billing::Metered),
            ("/v1/speech-to-text/realtime", Billing::Metered),
            ("/v1/translation/realtime", Billing::Unlisted),
            ("/runCase", Billing::Unlisted),
        ] {
            let billing = Endpoint::classify_websocket(&Segments::split(path)).billing;
            assert_eq!(billing, expected, "the WebSocket {path} must have the expected billing");
        }
    }

    #[test]
    fn an_endpoint_that_grants_direct_access_is_recognized() {
        for (method, path) in [
            ("POST", "/v1/single-use-token/realtime_scribe"),
            ("POST", "/v1/single-use-token/new_kind"),
            ("POST", "/v1/convai/realtime/client_secrets"),
            ("GET", "/v1/convai/conversation/token"),
            ("GET", "/v1/convai/conversation/get-signed-url"),
            ("GET", "/v1/convai/conversation/get_signed_url"),
            ("POST", "/v1/convai/twilio/register-call"),
            ("GET", "/v1/ConvAI/conversation/token"),
        ] {
            let endpoint = lookup(&method.parse().unwrap(), path).unwrap();
            assert!(endpoint.grants_direct_access, "{path} must grant direct access");
            assert_eq!(endpoint.billing, Billing::Unlisted, "{path} may cost credits");
        }
        for path in ["/v1/voices", "/v1/convai/conversations/x", "/v1/models"] {
            let endpoint = lookup(&Method::GET, path).unwrap();
            assert!(!endpoint.grants_direct_access, "{path} must not grant direct access");
        }
    }

    #[track_caller]
    fn check_denied(path: &str) {
        for method in [Method::GET, Method::POST, Method::DELETE] {
            let access = lookup(&method, path).unwrap().access;
            assert!(matches!(access, Access::Denied(_)), "{method} {path} must be denied");
        }
    }

    #[test]
    fn an_endpoint_that_could_harm_the_pool_is_denied() {
        for path in [
            "/v1/workspaces/api-keys/disable",
            "/v1/workspaces/api-keys/third-party-disabling",
            "/v1/service-accounts",
            "/v1/service-accounts/a/api-keys/b/disable",
            "/v1/workspace/members",
            "/v1/workspace/invites/add-bulk",
            "/v1/workspace/groups/g/members/remove",
            "/v1/workspace/webhooks/w",
            "/v1/workspace/auth-connections",
            "/v1/workspace/audit-logs",
            "/v1/workspace/resources/r/share",
            "/v1/convai/secrets/s/dependencies/tools",
            "/v1/convai/settings",
        ] {
            check_denied(path);
        }
    }

    #[test]
    fn a_denied_path_is_denied_in_every_unambiguous_spelling() {
        for path in [
            "/v1/service-accounts/",
            "/v1/%73ervice-accounts",
            "/v1/Service-Accounts",
            "/v3/service-accounts",
            "/V1/SERVICE-ACCOUNTS",
            "/service-accounts",
        ] {
            check_denied(path);
        }
    }

    #[test]
    fn a_path_that_hides_a_denied_path_is_ambiguous() {
        for path in [
            "//v1//service-accounts",
            "/v1/./service-accounts/",
            "/v1/voices/../service-accounts",
            "/v1/voices/..;/service-accounts",
            "/v1/%2573ervice-accounts",
            "/v1%2fservice-accounts",
            "/v1/service-accounts;x=1",
            "/v1\\service-accounts",
            "/v1/%20service-accounts",
            "/v1/service-accounts%3fx",
        ] {
            assert!(lookup(&Method::POST, path).is_err(), "{path} must be ambiguous");
            assert_eq!(websocket_dialect(path), None, "{path} must be ambiguous");
        }
    }

    #[test]
    fn an_endpoint_that_returns_owner_data_is_recognized_in_every_spelling() {
        for path in ["/v1/user", "/v1/user/subscription", "/v1/%75ser/", "/v2/User", "/user/subscription"] {
            let endpoint = lookup(&Method::GET, path).unwrap();
            assert!(endpoint.returns_owner_data, "{path} must return owner data");
        }
        for path in ["/v1/users", "/v1/user/x", "/v1/voices/user"] {
            let endpoint = lookup(&Method::GET, path).unwrap();
            assert!(!endpoint.returns_owner_data, "{path} must not return owner data");
        }
    }

    #[test]
    fn a_websocket_url_is_returned_under_two_paths() {
        for (path, returns_websocket_url) in [
            ("/v1/convai/conversation/get-signed-url", true),
            ("/v1/convai/conversation/get_signed_url", true),
            ("/v1/convai/conversation/token", false),
        ] {
            let endpoint = lookup(&Method::GET, path).unwrap();
            assert_eq!(endpoint.returns_websocket_url, returns_websocket_url, "{path} must be classified");
        }
    }

    #[test]
    fn a_websocket_is_recognized_by_its_path() {
        for (path, dialect, metering) in [
            ("/v1/text-to-speech/x/stream-input", Dialect::Speech, Metering::Credits),
            ("/v1/Text-to-Speech/x/%73tream-input", Dialect::Speech, Metering::Credits),
            ("/v1/convai/conversation", Dialect::Agent, Metering::Credits),
            ("/v1/something/new", Dialect::Unknown, Metering::Credits),
            ("/runCase", Dialect::Foreign, Metering::Free),
        ] {
            let decoded_path = Path::parse(path).unwrap();
            let endpoint = Endpoint::classify_websocket(&Segments::new(&decoded_path));
            assert_eq!(websocket_dialect(path), Some(dialect));
            assert_eq!(
                (endpoint.socket, endpoint.metering),
                (Some(dialect), metering),
                "{path} must be classified"
            );
            assert_eq!(lookup(&Method::GET, path).unwrap().socket, None);
        }
        let segments = Segments::split("/v1/service-accounts");
        assert!(matches!(Endpoint::classify_websocket(&segments).access, Access::Denied(_)));
    }

    #[test]
    fn an_endpoint_that_cannot_harm_the_pool_is_open() {
        for path in [
            "/v1/voices",
            "/v1/user",
            "/v1/workspace/analytics/requests",
            "/v1/workspace/resources/r",
            "/v1/convai/agents/service-accounts",
            "/v1/what/comes/next",
            "/docs",
        ] {
            for method in [Method::GET, Method::POST, Method::DELETE] {
                let access = lookup(&method, path).unwrap().access;
                assert_eq!(access, Access::Open, "{method} {path} must be open");
            }
        }
    }
}
