//! A row of the table of endpoints, and the index that maps a request to its rows.

use std::sync::LazyLock;

use http::Method;

use super::Operation;
use super::literals::Literal;
use super::table::ROWS;
use crate::elevenlabs::permission::named;
use crate::elevenlabs::socket::Dialect;
use crate::policy::permission::Permission;

/// A set of methods.
pub(super) type Methods = u8;

const READ: Methods = 1;
const OPTIONS: Methods = 1 << 1;
/// `POST`.
pub(super) const POST: Methods = 1 << 2;
/// `DELETE`, `PATCH` and `PUT`, which delete or change existing resources.
pub(super) const EDIT: Methods = 1 << 3;
const OTHER: Methods = 1 << 4;
/// The handshake of a WebSocket.
pub(super) const SOCKET: Methods = 1 << 5;
/// All methods but those that only read.
pub(super) const WRITE: Methods = POST | EDIT | OTHER;
/// All methods.
pub(super) const ANY: Methods = READ | OPTIONS | WRITE;

/// Maps a method to its set.
pub(super) fn methods(method: &Method) -> Methods {
    match *method {
        Method::GET | Method::HEAD => READ,
        Method::OPTIONS => OPTIONS,
        Method::POST => POST,
        Method::DELETE | Method::PATCH | Method::PUT => EDIT,
        _ => OTHER,
    }
}

/// The known properties of requests with these paths.
#[derive(Debug)]
pub(super) struct EndpointRow {
    methods: Methods,
    /// Paths without the version. `{id}` is any segment, and `**` at the end any number of segments.
    paths: &'static [&'static str],
    facts: EndpointFacts,
}

/// The properties of a request. A property that is unknown or false here is taken from the next matching
/// row.
#[derive(Clone, Copy, Debug)]
pub(super) struct EndpointFacts {
    /// The charged work of the request.
    pub(super) operation: Option<Operation>,
    /// The protocol of its messages.
    pub(super) socket: Option<Dialect>,
    /// The permissions that a key needs for a request that reads, and for any other.
    pub(super) permissions: Option<[Permission; 2]>,
    /// The reason why clients of the pool may not call it.
    pub(super) denied: Option<&'static str>,
    /// Whether a request that changes something is known to cost nothing.
    pub(super) is_free: bool,
    /// Whether its response lets the client use the provider without the proxy.
    pub(super) gives_access: bool,
    /// Whether its response contains the address of a WebSocket.
    pub(super) gives_address: bool,
    /// Whether its response describes the owner of the key.
    pub(super) shows_owner: bool,
    /// Whether it creates a voice that takes a slot of its workspace.
    pub(super) adds_voice: bool,
}

const NO_FACTS: EndpointFacts = EndpointFacts {
    operation: None,
    socket: None,
    permissions: None,
    denied: None,
    is_free: false,
    gives_access: false,
    gives_address: false,
    shows_owner: false,
    adds_voice: false,
};

/// A row without properties: it only lists known paths.
pub(super) const fn row(methods: Methods, paths: &'static [&'static str]) -> EndpointRow {
    EndpointRow { methods, paths, facts: NO_FACTS }
}

impl EndpointRow {
    pub(super) const fn generates(mut self, operation: Operation) -> Self {
        self.facts.operation = Some(operation);
        self
    }

    pub(super) const fn socket(mut self, dialect: Dialect) -> Self {
        self.facts.socket = Some(dialect);
        self
    }

    /// Names of permissions; an unknown name does not compile.
    pub(super) const fn needs(mut self, reading: &str, other: &str) -> Self {
        self.facts.permissions = Some([named(reading), named(other)]);
        self
    }

    pub(super) const fn denied(mut self, reason: &'static str) -> Self {
        self.facts.denied = Some(reason);
        self
    }

    pub(super) const fn free(mut self) -> Self {
        self.facts.is_free = true;
        self
    }

    pub(super) const fn gives_access(mut self) -> Self {
        self.facts.gives_access = true;
        self
    }

    pub(super) const fn gives_address(mut self) -> Self {
        self.facts.gives_address = true;
        self
    }

    pub(super) const fn shows_owner(mut self) -> Self {
        self.facts.shows_owner = true;
        self
    }

    pub(super) const fn adds_voice(mut self) -> Self {
        self.facts.adds_voice = true;
        self
    }
}

impl EndpointFacts {
    fn add(&mut self, row: &Self) {
        self.operation = self.operation.or(row.operation);
        self.socket = self.socket.or(row.socket);
        self.permissions = self.permissions.or(row.permissions);
        self.denied = self.denied.or(row.denied);
        self.is_free |= row.is_free;
        self.gives_access |= row.gives_access;
        self.gives_address |= row.gives_address;
        self.shows_owner |= row.shows_owner;
        self.adds_voice |= row.adds_voice;
    }
}

/// A path of a row, in the codes of its segments.
#[derive(Debug)]
struct Pattern {
    codes: Vec<u8>,
    /// Whether it also matches longer paths.
    is_prefix: bool,
    methods: Methods,
    facts: &'static EndpointFacts,
}

/// The code of a path segment that is not a literal. In a pattern, it matches any segment.
pub(super) const IDENTIFIER: u8 = u8::MAX;

/// Maximum number of segments of a pattern.
pub(super) const MAX_SEGMENTS: usize = 6;

/// The patterns, by the number of their first literal, in the order of the table.
static INDEX: LazyLock<Vec<Vec<Pattern>>> = LazyLock::new(|| {
    let mut index: Vec<Vec<Pattern>> = (0..Literal::COUNT).map(|_| Vec::new()).collect();
    for row in ROWS {
        for path in row.paths {
            let without_wildcard = path.strip_suffix("/**");
            let code = |segment: &str| Literal::of(segment).map_or(IDENTIFIER, Literal::number);
            let codes: Vec<u8> = without_wildcard.unwrap_or(path).split('/').map(code).collect();
            if let Some(patterns) = codes.first().and_then(|root| index.get_mut(usize::from(*root))) {
                let (methods, facts) = (row.methods, &row.facts);
                patterns.push(Pattern { codes, is_prefix: without_wildcard.is_some(), methods, facts });
            }
        }
    }
    index
});

impl Pattern {
    fn matches(&self, codes: &[u8], count: usize) -> bool {
        let has_length = if self.is_prefix { count >= self.codes.len() } else { count == self.codes.len() };
        has_length
            && self
                .codes
                .iter()
                .zip(codes)
                .all(|(wanted, segment)| *wanted == IDENTIFIER || wanted == segment)
    }
}

/// The properties of a request with one of these methods, from all matching rows. `codes` are the codes
/// of its first segments after the version, at most [`MAX_SEGMENTS`] of `count`.
pub(super) fn facts(methods: Methods, codes: &[u8], count: usize) -> EndpointFacts {
    let mut facts = NO_FACTS;
    let patterns = codes.first().and_then(|root| INDEX.get(usize::from(*root)));
    for pattern in patterns.into_iter().flatten() {
        if pattern.methods & methods != 0 && pattern.matches(codes, count) {
            facts.add(pattern.facts);
        }
    }
    facts
}

/// Whether paths of the API begin with this literal, after the version.
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
            assert!(without_wildcard.split('/').count() <= MAX_SEGMENTS, "{path}");
            for segment in without_wildcard.split('/') {
                assert!(segment == "{id}" || Literal::of(segment).is_some(), "{segment} of {path}");
            }
        }
    }

    /// Every path needs a row for its root, because a path without its version is corrected by its root.
    #[test]
    fn every_row_is_below_a_root_of_the_table() {
        let has_root_row =
            |root: &str| ROWS.iter().flat_map(|row| row.paths).any(|path| *path == format!("{root}/**"));
        for path in ROWS.iter().flat_map(|row| row.paths) {
            let root = path.split('/').next().unwrap();
            assert!(has_root_row(root), "{root}/** has no row");
        }
    }

    /// Every path of the table is a separate label in metrics.
    #[test]
    fn every_path_of_the_table_is_a_documented_route() {
        for path in ROWS.iter().flat_map(|row| row.paths).filter(|path| !path.ends_with("/**")) {
            let route = |version: &str| Route::read(&format!("/{version}/{path}")).is_documented();
            assert!(route("v1") || route("v2"), "routes.txt lacks {path}");
        }
    }

    #[test]
    fn a_narrower_row_takes_precedence_over_a_wider_one() {
        let narrow = row(POST, &["voices/{id}/edit"]).generates(Operation::Music).facts;
        let wide =
            row(ANY, &["voices/**"]).generates(Operation::Other).needs("voices_read", "voices_write").facts;
        let mut facts = NO_FACTS;
        facts.add(&narrow);
        facts.add(&wide);
        assert_eq!(facts.operation, Some(Operation::Music));
        assert!(facts.permissions.is_some());
    }
}
