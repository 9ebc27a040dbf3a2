//! Indexes the table of resources. The index finds the identifiers of a path, the kind of identifier in a query
//! parameter, and the fields and headers that contain identifiers. It also determines whether a response belongs to the
//! account that served it. Path patterns are indexed by their first segment, and the fields of responses by the root of
//! their route, which is its first segment after the version. Most requests contain no identifier and thus need only
//! one lookup.

use std::sync::LazyLock;

use http::{HeaderName, Method};

use super::ResponseOwnership;
use super::fields::{IdentifierField, IdentifierFields};
use super::kind::{Identifier, ResourceKind};
use super::table::{ACCOUNT_READS, CURSORS, RouteFields, rows};
use crate::elevenlabs::endpoint::{Literal, Route};
use crate::elevenlabs::segments::Segment;

static INDEX: LazyLock<ResourceIndex> = LazyLock::new(ResourceIndex::new);

/// The rows of the table, indexed by the parts of a request or a response.
#[derive(Debug)]
pub(super) struct ResourceIndex {
    /// The patterns of paths with the same first segment, by the number of that segment.
    patterns: Vec<Vec<PathPattern>>,
    /// The query parameters that contain identifiers, sorted by name.
    parameters: Vec<IdentifierField>,
    /// The fields of request bodies that contain identifiers.
    pub(super) body: IdentifierFields,
    /// The headers of responses that contain identifiers.
    pub(super) headers: Vec<(HeaderName, ResourceKind)>,
    /// The fields of a list response that contain its next cursor.
    cursors: IdentifierFields,
    /// The fields of those responses to `GET` requests that depend on the account.
    account_reads: FieldsByRoute,
    /// The fields of responses to requests that create or change a resource.
    created: FieldsByRoute,
}

/// The segments of a path that contains an identifier. The pattern also matches longer paths that start with these
/// segments.
type PathPattern = Vec<PatternSegment>;

#[derive(Clone, Copy, Debug)]
enum PatternSegment {
    Literal(Literal),
    /// Any segment that is not a literal of the API.
    Any,
    Identifier(ResourceKind),
}

/// The fields of the responses of each route, by the number of the route's root. Few routes have the same root, so a
/// comparison with each of them is cheaper than a hash of the route.
type FieldsByRoute = Vec<Vec<(Route, IdentifierFields)>>;

/// Returns the index, which is built on the first call.
pub(super) fn index() -> &'static ResourceIndex {
    &INDEX
}

impl ResourceIndex {
    fn new() -> Self {
        let mut patterns = vec![Vec::new(); Literal::COUNT];
        for path in rows().flat_map(|row| row.paths) {
            let pattern: PathPattern = path.split('/').map(PatternSegment::parse).collect();
            if let Some(PatternSegment::Literal(first)) = pattern.first() {
                patterns[usize::from(first.number())].push(pattern);
            }
        }
        let mut parameters: Vec<IdentifierField> = rows().flat_map(|row| row.query).copied().collect();
        // The sort keeps the order of equal names, so the first row with a name takes precedence.
        parameters.sort_by_key(|(name, _)| *name);
        parameters.dedup_by_key(|(name, _)| *name);
        let parse_header = |(name, kind): &IdentifierField| Some((HeaderName::try_from(*name).ok()?, *kind));
        Self {
            patterns,
            parameters,
            body: IdentifierFields::new(rows().flat_map(|row| row.body).copied()),
            headers: rows().flat_map(|row| row.headers).filter_map(parse_header).collect(),
            cursors: IdentifierFields::new(CURSORS),
            account_reads: index_by_route(rows().flat_map(|row| row.lists).chain([&ACCOUNT_READS]), &CURSORS),
            created: index_by_route(rows().flat_map(|row| row.created), &[]),
        }
    }

    /// Returns the kind of the identifiers in a query parameter, or `None` if it contains none.
    pub(super) fn parameter_kind(&self, name: &str) -> Option<ResourceKind> {
        let position = self.parameters.binary_search_by_key(&name, |(known, _)| known).ok()?;
        self.parameters.get(position).map(|(_, kind)| *kind)
    }

    /// Returns the identifiers in a path, from its segments after the version.
    pub(super) fn path_identifiers(&self, segments: &[Segment<'_>]) -> Vec<Identifier> {
        let Some(first) = segments.first().and_then(Segment::literal) else { return Vec::new() };
        let mut identifiers: Vec<Identifier> = Vec::new();
        for pattern in &self.patterns[usize::from(first.number())] {
            if is_match(pattern, segments) {
                let matched = pattern.iter().zip(segments).filter_map(|(part, segment)| match part {
                    PatternSegment::Identifier(kind) => Some(Identifier::new(*kind, segment.text())),
                    PatternSegment::Literal(_) | PatternSegment::Any => None,
                });
                super::add_distinct(&mut identifiers, matched);
            }
        }
        identifiers
    }

    /// Returns the relation between the response of a request and its account.
    pub(super) fn response_ownership(&self, method: &Method, route: &Route) -> ResponseOwnership {
        let is_write = [Method::POST, Method::PUT, Method::PATCH].contains(method);
        if *method == Method::GET && find_fields(&self.account_reads, route).is_some() {
            ResponseOwnership::Account
        } else if is_write && find_fields(&self.created, route).is_some() {
            ResponseOwnership::Created
        } else {
            ResponseOwnership::None
        }
    }

    /// Returns the fields of a response that contain identifiers, or `None` if the response contains no identifiers.
    pub(super) fn response_fields(&self, method: &Method, route: &Route) -> Option<&IdentifierFields> {
        if *method == Method::GET {
            // Any list may have a cursor.
            Some(find_fields(&self.account_reads, route).unwrap_or(&self.cursors))
        } else {
            find_fields(&self.created, route)
        }
    }
}

/// Merges the fields of all rows of each route in the order of the table, followed by `common_fields`.
fn index_by_route(
    rows: impl Iterator<Item = &'static RouteFields>,
    common_fields: &[IdentifierField],
) -> FieldsByRoute {
    let mut by_root: Vec<Vec<(Route, Vec<IdentifierField>)>> = vec![Vec::new(); Literal::COUNT];
    for (routes, fields) in rows {
        for route in routes.iter().map(|route| Route::parse(route)) {
            let Some(root) = route.root() else { continue };
            let same_root = &mut by_root[usize::from(root.number())];
            match same_root.iter_mut().find(|(known, _)| *known == route) {
                Some((_, known_fields)) => known_fields.extend_from_slice(fields),
                None => same_root.push((route, fields.to_vec())),
            }
        }
    }
    let add_common_fields = |fields: Vec<IdentifierField>| {
        IdentifierFields::new(fields.into_iter().chain(common_fields.iter().copied()))
    };
    let index_fields = |same_root: Vec<(Route, Vec<IdentifierField>)>| {
        same_root.into_iter().map(|(route, fields)| (route, add_common_fields(fields))).collect()
    };
    by_root.into_iter().map(index_fields).collect()
}

/// Finds the fields of a route, which may have another version than the route of the table.
fn find_fields<'a>(by_route: &'a FieldsByRoute, route: &Route) -> Option<&'a IdentifierFields> {
    let (root, required) = (route.root()?, route.after_version()?);
    let mut same_root = by_route[usize::from(root.number())].iter();
    same_root.find(|(known, _)| known.after_version() == Some(required)).map(|(_, fields)| fields)
}

impl PatternSegment {
    /// Parses a segment of a path in the table.
    fn parse(part: &str) -> Self {
        match part.strip_prefix('{').and_then(|part| part.strip_suffix('}')) {
            Some(kind) => ResourceKind::parse(kind).map_or(Self::Any, Self::Identifier),
            None => Literal::find(part).map_or(Self::Any, Self::Literal),
        }
    }
}

/// Whether the first segments of a path match the pattern. A literal of the API is not an identifier.
fn is_match(pattern: &[PatternSegment], segments: &[Segment<'_>]) -> bool {
    let segment_matches = |(part, segment): (&PatternSegment, &Segment<'_>)| match part {
        PatternSegment::Literal(required) => {
            segment.literal() == Some(*required) && required.text().len() == segment.text().len()
        }
        PatternSegment::Any | PatternSegment::Identifier(_) => segment.literal().is_none(),
    };
    segments.len() >= pattern.len() && pattern.iter().zip(segments).all(segment_matches)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elevenlabs::endpoint::is_root;

    #[test]
    fn every_path_of_the_table_consists_of_literals_and_kinds() {
        for part in rows().flat_map(|row| row.paths).flat_map(|path| path.split('/')) {
            match PatternSegment::parse(part) {
                PatternSegment::Literal(_) | PatternSegment::Identifier(_) => {}
                PatternSegment::Any => assert_eq!(part, "*"),
            }
        }
    }

    #[test]
    fn every_path_and_route_of_the_table_starts_with_a_root_of_the_endpoints() {
        let routes = rows()
            .flat_map(|row| row.created.iter().chain(row.lists))
            .chain([&ACCOUNT_READS])
            .flat_map(|(routes, _)| *routes);
        for path in rows().flat_map(|row| row.paths).chain(routes.clone()) {
            assert!(is_root(path.split('/').next().unwrap()), "{path} must start with a root");
        }
        for route in routes {
            assert_eq!(Route::parse(route).to_string(), format!("/{route}"));
            let route = Route::parse(&format!("/v1/{route}"));
            let is_indexed = |by_route| find_fields(by_route, &route).is_some();
            assert!(
                is_indexed(&index().account_reads) || is_indexed(&index().created),
                "{route} must be indexed"
            );
        }
    }
}
