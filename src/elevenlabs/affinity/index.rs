//! Finds the rows of the table of resources that match a request. An index finds the path patterns of a request by
//! the first path segment, because most requests name no identifier and then need only this lookup.

use std::sync::LazyLock;

use http::{HeaderName, Method};

use super::ResponseOwnership;
use super::fields::{Field, Fields};
use super::kind::{Identifier, ResourceKind};
use super::table::{ACCOUNT_READS, CURSORS, RouteFields, rows};
use crate::elevenlabs::endpoint::{Literal, Route};
use crate::elevenlabs::segments::Segment;

static INDEX: LazyLock<Index> = LazyLock::new(Index::new);

/// The indexed table.
#[derive(Debug)]
pub(super) struct Index {
    /// Path patterns, by the number of their first segment.
    patterns: Vec<Vec<Pattern>>,
    /// The query parameters that contain identifiers, sorted by name.
    parameters: Vec<Field>,
    /// Fields of request bodies.
    pub(super) body: Fields,
    /// Headers of responses.
    pub(super) headers: Vec<(HeaderName, ResourceKind)>,
    /// The fields of a list response that contain its next cursor.
    cursors: Fields,
    /// Fields of responses that list resources or describe the account.
    account_reads: FieldsByRoute,
    /// Fields of responses to requests that create a resource.
    created: FieldsByRoute,
}

/// The segments of a path with an identifier. The pattern also matches longer paths that start with these
/// segments.
type Pattern = Vec<PatternSegment>;

#[derive(Clone, Copy, Debug)]
enum PatternSegment {
    Literal(Literal),
    /// Any segment that is not a literal of the API.
    Any,
    Identifier(ResourceKind),
}

/// The fields of the responses of each route, by the number of the route's root. Few routes share a root, so
/// comparing them is cheaper than hashing the route.
type FieldsByRoute = Vec<Vec<(Route, Fields)>>;

/// Returns the index, which is built on the first call.
pub(super) fn index() -> &'static Index {
    &INDEX
}

impl Index {
    fn new() -> Self {
        let mut patterns = vec![Vec::new(); Literal::COUNT];
        for path in rows().flat_map(|row| row.paths) {
            let pattern: Pattern = path.split('/').map(PatternSegment::parse).collect();
            if let Some(PatternSegment::Literal(first)) = pattern.first() {
                patterns[usize::from(first.number())].push(pattern);
            }
        }
        let mut parameters: Vec<Field> = rows().flat_map(|row| row.query).copied().collect();
        // The sort is stable, so the first entry of the table takes precedence.
        parameters.sort_by_key(|(name, _)| *name);
        parameters.dedup_by_key(|(name, _)| *name);
        let parse_header = |(name, kind): &Field| Some((HeaderName::try_from(*name).ok()?, *kind));
        Self {
            patterns,
            parameters,
            body: Fields::new(rows().flat_map(|row| row.body).copied()),
            headers: rows().flat_map(|row| row.headers).filter_map(parse_header).collect(),
            cursors: Fields::new(CURSORS),
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

    /// Returns how a request's response relates to its account.
    pub(super) fn response_ownership(&self, method: &Method, route: &Route) -> ResponseOwnership {
        let is_create = [Method::POST, Method::PUT, Method::PATCH].contains(method);
        if *method == Method::GET && find_fields(&self.account_reads, route).is_some() {
            ResponseOwnership::Account
        } else if is_create && find_fields(&self.created, route).is_some() {
            ResponseOwnership::Created
        } else {
            ResponseOwnership::None
        }
    }

    /// Returns the fields of a response that contain identifiers, or `None` if no field does.
    pub(super) fn response_fields(&self, method: &Method, route: &Route) -> Option<&Fields> {
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
    common_fields: &[Field],
) -> FieldsByRoute {
    let mut by_root: Vec<Vec<(Route, Vec<Field>)>> = vec![Vec::new(); Literal::COUNT];
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
    let with_common =
        |fields: Vec<Field>| Fields::new(fields.into_iter().chain(common_fields.iter().copied()));
    let prepare = |same_root: Vec<(Route, Vec<Field>)>| {
        same_root.into_iter().map(|(route, fields)| (route, with_common(fields))).collect()
    };
    by_root.into_iter().map(prepare).collect()
}

fn find_fields<'a>(by_route: &'a FieldsByRoute, route: &Route) -> Option<&'a Fields> {
    let (root, required) = (route.root()?, route.after_version()?);
    let mut same_root = by_route[usize::from(root.number())].iter();
    same_root.find(|(known, _)| known.after_version() == Some(required)).map(|(_, fields)| fields)
}

impl PatternSegment {
    fn parse(part: &str) -> Self {
        match part.strip_prefix('{').and_then(|part| part.strip_suffix('}')) {
            Some(kind) => ResourceKind::parse(kind).map_or(Self::Any, Self::Identifier),
            None => Literal::find(part).map_or(Self::Any, Self::Literal),
        }
    }
}

/// Whether `segments` start with a match of the pattern. A literal of the API is not an identifier.
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
            assert!(is_indexed(&index().account_reads) || is_indexed(&index().created), "{route}");
        }
    }
}
