//! Defines the rows of the table of endpoints (`table`), and finds the properties of a request in all rows that match
//! its method and path. Also finds out whether a literal, which is a path segment with a fixed text, is the root of a
//! path.

use std::sync::LazyLock;

use http::Method;

use super::Operation;
use super::literals::Literal;
use super::table::ROWS;
use crate::elevenlabs::permission::permission;
use crate::elevenlabs::socket::Dialect;
use crate::policy::permission::Permission;

/// A set of methods, one bit for each kind.
pub(super) type Methods = u8;

/// `GET` and `HEAD`.
const READ: Methods = 1;
/// `OPTIONS`.
const OPTIONS: Methods = 1 << 1;
/// `POST`.
pub(super) const POST: Methods = 1 << 2;
/// `DELETE`, `PATCH` and `PUT`, which delete or change existing resources.
pub(super) const EDIT: Methods = 1 << 3;
/// Any method without a constant.
const OTHER: Methods = 1 << 4;
/// The handshake of a WebSocket.
pub(super) const SOCKET: Methods = 1 << 5;
/// All methods except `GET`, `HEAD` and `OPTIONS`.
pub(super) const WRITE: Methods = POST | EDIT | OTHER;
/// All methods of HTTP requests, without the handshake of a WebSocket.
pub(super) const ANY: Methods = READ | OPTIONS | WRITE;

/// Returns the set of methods with the bit of a method.
pub(super) fn methods(method: &Method) -> Methods {
    match *method {
        Method::GET | Method::HEAD => READ,
        Method::OPTIONS => OPTIONS,
        Method::POST => POST,
        Method::DELETE | Method::PATCH | Method::PUT => EDIT,
        _ => OTHER,
    }
}

/// A row of the table: the known properties of requests with certain paths.
#[derive(Debug)]
pub(super) struct EndpointRow {
    methods: Methods,
    /// Paths without the version. `{id}` is any segment, and `**` at the end is any number of segments.
    paths: &'static [&'static str],
    properties: EndpointProperties,
}

/// The properties of a request. A property that is `None` or `false` in one row is taken from the next matching row.
#[derive(Clone, Copy, Debug)]
pub(super) struct EndpointProperties {
    /// The charged work of the request.
    pub(super) operation: Option<Operation>,
    /// The protocol of a WebSocket.
    pub(super) socket: Option<Dialect>,
    /// The permission that a key needs to read, and the permission for any other request.
    pub(super) permissions: Option<[Permission; 2]>,
    /// The reason why clients of the pool may not call the endpoint, or `None` if they may.
    pub(super) denied: Option<&'static str>,
    /// Whether a request that changes something costs no credits (`true`) or may cost credits (`false`).
    pub(super) is_free: Option<bool>,
    /// Whether the response lets the client use the provider without Keychoir.
    pub(super) grants_direct_access: bool,
    /// Whether the response contains the address of a WebSocket.
    pub(super) returns_websocket_url: bool,
    /// Whether the response describes the account holder of the key.
    pub(super) returns_owner_data: bool,
    /// Whether the request creates a voice that takes a slot of its workspace.
    pub(super) adds_voice: bool,
}

const NO_PROPERTIES: EndpointProperties = EndpointProperties {
    operation: None,
    socket: None,
    permissions: None,
    denied: None,
    is_free: None,
    grants_direct_access: false,
    returns_websocket_url: false,
    returns_owner_data: false,
    adds_voice: false,
};

/// Returns a row without properties, which only lists known paths.
pub(super) const fn row(methods: Methods, paths: &'static [&'static str]) -> EndpointRow {
    EndpointRow { methods, paths, properties: NO_PROPERTIES }
}

impl EndpointRow {
    /// Sets the charged work of the requests.
    pub(super) const fn generates(mut self, operation: Operation) -> Self {
        self.properties.operation = Some(operation);
        self
    }

    /// Sets the protocol of the WebSocket.
    pub(super) const fn socket(mut self, dialect: Dialect) -> Self {
        self.properties.socket = Some(dialect);
        self
    }

    /// Sets the permissions by name. An unknown name does not compile.
    pub(super) const fn needs(mut self, read: &str, write: &str) -> Self {
        self.properties.permissions = Some([permission(read), permission(write)]);
        self
    }

    /// Denies the requests, with the reason for the error response.
    pub(super) const fn denied(mut self, reason: &'static str) -> Self {
        self.properties.denied = Some(reason);
        self
    }

    /// Marks the requests as free of credits.
    pub(super) const fn free(mut self) -> Self {
        self.properties.is_free = Some(true);
        self
    }

    /// Overrides [`free`](Self::free) of a row with a wider path.
    #[cfg_attr(not(test), expect(dead_code, reason = "only rows of the tests use it"))]
    pub(super) const fn may_cost(mut self) -> Self {
        self.properties.is_free = Some(false);
        self
    }

    pub(super) const fn grants_direct_access(mut self) -> Self {
        self.properties.grants_direct_access = true;
        self
    }

    pub(super) const fn returns_websocket_url(mut self) -> Self {
        self.properties.returns_websocket_url = true;
        self
    }

    pub(super) const fn returns_owner_data(mut self) -> Self {
        self.properties.returns_owner_data = true;
        self
    }

    pub(super) const fn adds_voice(mut self) -> Self {
        self.properties.adds_voice = true;
        self
    }
}

impl EndpointProperties {
    /// Fills the unknown properties with the properties of the next matching row.
    fn fill(&mut self, next: &Self) {
        self.operation = self.operation.or(next.operation);
        self.socket = self.socket.or(next.socket);
        self.permissions = self.permissions.or(next.permissions);
        self.denied = self.denied.or(next.denied);
        self.is_free = self.is_free.or(next.is_free);
        self.grants_direct_access |= next.grants_direct_access;
        self.returns_websocket_url |= next.returns_websocket_url;
        self.returns_owner_data |= next.returns_owner_data;
        self.adds_voice |= next.adds_voice;
    }
}

/// A path of a row, and the requests that the row describes.
#[derive(Debug)]
struct EndpointPattern {
    /// The number of the literal of each segment, or [`NOT_LITERAL`] for any segment.
    segment_codes: Vec<u8>,
    /// Whether the pattern also matches longer paths that start with the pattern.
    is_prefix: bool,
    methods: Methods,
    properties: &'static EndpointProperties,
}

/// The code of a path segment that is not a literal. In a pattern, it matches any segment.
pub(super) const NOT_LITERAL: u8 = u8::MAX;

/// Maximum number of segments of a pattern.
pub(super) const MAX_SEGMENTS: usize = 6;

/// The patterns of each root, by the number of the root. The patterns are in the order of the table.
static INDEX: LazyLock<Vec<Vec<EndpointPattern>>> = LazyLock::new(|| {
    let mut index: Vec<Vec<EndpointPattern>> = (0..Literal::COUNT).map(|_| Vec::new()).collect();
    for row in ROWS {
        for path in row.paths {
            let without_wildcard = path.strip_suffix("/**");
            let code = |segment: &str| Literal::find(segment).map_or(NOT_LITERAL, Literal::number);
            let segment_codes: Vec<u8> = without_wildcard.unwrap_or(path).split('/').map(code).collect();
            if let Some(patterns) = segment_codes.first().and_then(|root| index.get_mut(usize::from(*root))) {
                patterns.push(EndpointPattern {
                    segment_codes,
                    is_prefix: without_wildcard.is_some(),
                    methods: row.methods,
                    properties: &row.properties,
                });
            }
        }
    }
    index
});

impl EndpointPattern {
    /// Whether the pattern matches a path with these codes and this number of segments.
    fn matches(&self, segment_codes: &[u8], segment_count: usize) -> bool {
        let has_length = if self.is_prefix {
            segment_count >= self.segment_codes.len()
        } else {
            segment_count == self.segment_codes.len()
        };
        has_length
            && self
                .segment_codes
                .iter()
                .zip(segment_codes)
                .all(|(required, code)| *required == NOT_LITERAL || required == code)
    }
}

/// Returns the properties of a request with one of `methods`, from all matching rows. `segment_codes` has the
/// codes of the first [`MAX_SEGMENTS`] segments after the version, and `segment_count` is the number of all of them.
pub(super) fn find_properties(
    methods: Methods,
    segment_codes: &[u8],
    segment_count: usize,
) -> EndpointProperties {
    let mut properties = NO_PROPERTIES;
    let patterns = segment_codes.first().and_then(|root| INDEX.get(usize::from(*root)));
    for pattern in patterns.into_iter().flatten() {
        if pattern.methods & methods != 0 && pattern.matches(segment_codes, segment_count) {
            properties.fill(pattern.properties);
        }
    }
    properties
}

/// Whether paths of the API start with the given `literal`, after the version.
pub(super) fn is_root(literal: Literal) -> bool {
    INDEX.get(usize::from(literal.number())).is_some_and(|patterns| !patterns.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elevenlabs::endpoint::Route;

    #[test]
    fn the_paths_of_the_table_consist_of_known_literals() {
        for path in ROWS.iter().flat_map(|row| row.paths) {
            let without_wildcard = path.strip_suffix("/**").unwrap_or(path);
            assert!(
                without_wildcard.split('/').count() <= MAX_SEGMENTS,
                "{path} must have at most {MAX_SEGMENTS} segments"
            );
            for segment in without_wildcard.split('/') {
                assert!(
                    segment == "{id}" || Literal::find(segment).is_some(),
                    "{segment} of {path} must be a literal"
                );
            }
        }
    }

    /// Every path needs a row for its root, because a path without a version is corrected by its root.
    #[test]
    fn every_row_is_below_a_root_of_the_table() {
        let has_root_row =
            |root: &str| ROWS.iter().flat_map(|row| row.paths).any(|path| *path == format!("{root}/**"));
        for path in ROWS.iter().flat_map(|row| row.paths) {
            let root = path.split('/').next().unwrap();
            assert!(has_root_row(root), "{root}/** must have a row");
        }
    }

    /// Every path of the table is a separate label in metrics.
    #[test]
    fn every_path_of_the_table_is_a_documented_route() {
        for path in ROWS.iter().flat_map(|row| row.paths).filter(|path| !path.ends_with("/**")) {
            let is_documented = |version: &str| Route::parse(&format!("/{version}/{path}")).is_documented();
            assert!(is_documented("v1") || is_documented("v2"), "routes.txt must contain {path}");
        }
    }

    #[test]
    fn a_narrower_row_takes_precedence_over_a_wider_one() {
        let narrow = row(POST, &["voices/{id}/edit"]).generates(Operation::Music).properties;
        let wide = row(ANY, &["voices/**"])
            .generates(Operation::Other)
            .needs("voices_read", "voices_write")
            .properties;
        let mut properties = NO_PROPERTIES;
        properties.fill(&narrow);
        properties.fill(&wide);
        assert_eq!(properties.operation, Some(Operation::Music));
        assert!(properties.permissions.is_some());
        let mut properties = NO_PROPERTIES;
        properties.fill(&row(POST, &["voices/{id}/train"]).may_cost().properties);
        properties.fill(&row(POST, &["voices/**"]).free().properties);
        assert_eq!(properties.is_free, Some(false));
    }
}
