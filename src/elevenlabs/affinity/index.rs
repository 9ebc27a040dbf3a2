//! Indexes the table of resources for lookups by the first path segment: most requests name no
//! identifier, and need only this one lookup.

use std::sync::LazyLock;

use http::{HeaderName, Method};

use super::Yields;
use super::fields::{Field, Fields};
use super::kind::{Kind, Named};
use super::table::{ACCOUNT_READS, CURSORS, Made, ResourceRow, rows};
use crate::elevenlabs::endpoint::{Literal, Route};
use crate::elevenlabs::segments::Segment;

static INDEX: LazyLock<Index> = LazyLock::new(Index::new);

/// The indexed table.
#[derive(Debug)]
pub(super) struct Index {
    /// Path patterns, by the number of their first segment.
    patterns: Vec<Vec<Pattern>>,
    /// Query parameters, sorted by name.
    query: Vec<Field>,
    body: Fields,
    /// The fields of a list response that contain its next cursor.
    cursors: Fields,
    headers: Vec<(HeaderName, Kind)>,
    /// By the number of the first segment of the route.
    yields_by_root: Vec<Vec<RouteYields>>,
}

/// The segments of a path that names an identifier; also matches longer paths that begin with them.
type Pattern = Vec<PatternSegment>;

#[derive(Clone, Copy, Debug)]
enum PatternSegment {
    Literal(Literal),
    /// Any segment that is not a literal of the API.
    Any,
    Identifier(Kind),
}

/// The identifiers in the responses of a route.
#[derive(Clone, Debug)]
struct RouteYields {
    route: Route,
    /// Fields of the response to a read; `None` when the response neither is a list nor describes the
    /// account.
    read: Option<Fields>,
    /// Fields of the response to a request that creates something.
    created: Option<Fields>,
}

/// A [`RouteYields`] while the table is being indexed.
struct UnindexedRoute {
    route: Route,
    read: Option<Vec<Field>>,
    created: Option<Vec<Field>>,
}

/// The indexed table.
pub(super) fn index() -> &'static Index {
    &INDEX
}

impl Index {
    fn new() -> Self {
        let mut patterns = vec![Vec::new(); Literal::COUNT];
        for path in rows().flat_map(|row| row.paths) {
            let pattern: Pattern = path.split('/').map(PatternSegment::read).collect();
            if let Some(PatternSegment::Literal(first)) = pattern.first() {
                patterns[usize::from(first.number())].push(pattern);
            }
        }
        let mut query: Vec<Field> = rows().flat_map(|row| row.query).copied().collect();
        // The first entry of the table wins.
        query.sort_by_key(|(name, _)| *name);
        query.dedup_by_key(|(name, _)| *name);
        let body = Fields::of(rows().flat_map(|row| row.body).copied());
        let cursors = Fields::of(CURSORS);
        let named = |(name, kind): &Field| Some((HeaderName::try_from(*name).ok()?, *kind));
        let headers = rows().flat_map(|row| row.headers).filter_map(named).collect();
        Self { patterns, query, body, cursors, headers, yields_by_root: yields_by_root() }
    }

    /// The identifiers in a path, by its segments after the version.
    pub(super) fn of_path(&self, segments: &[Segment<'_>]) -> Vec<Named> {
        let Some(first) = segments.first().and_then(Segment::literal) else { return Vec::new() };
        let mut all: Vec<Named> = Vec::new();
        for pattern in &self.patterns[usize::from(first.number())] {
            if matches(pattern, segments) {
                let identifiers = pattern.iter().zip(segments).filter_map(|(part, segment)| match part {
                    PatternSegment::Identifier(kind) => Some(Named::new(*kind, segment.text())),
                    PatternSegment::Literal(_) | PatternSegment::Any => None,
                });
                super::add_all(&mut all, identifiers);
            }
        }
        all
    }

    /// The kind of identifier in a query parameter.
    pub(super) fn of_parameter(&self, name: &str) -> Option<Kind> {
        let at = self.query.binary_search_by_key(&name, |(known, _)| known).ok()?;
        self.query.get(at).map(|(_, kind)| *kind)
    }

    /// The fields of a request body with identifiers.
    pub(super) fn body(&self) -> &Fields {
        &self.body
    }

    /// The headers of a response with identifiers.
    pub(super) fn headers(&self) -> &[(HeaderName, Kind)] {
        &self.headers
    }

    /// How a request's response relates to its account.
    pub(super) fn yields(&self, method: &Method, route: &Route) -> Yields {
        let Some(route_yields) = self.of_route(route) else { return Yields::Nothing };
        if *method == Method::GET && route_yields.read.is_some() {
            return Yields::Account;
        }
        let creates = [Method::POST, Method::PUT, Method::PATCH].contains(method);
        if creates && route_yields.created.is_some() { Yields::Made } else { Yields::Nothing }
    }

    /// The fields of a response with identifiers; `None` when there are none.
    pub(super) fn of_response(&self, method: &Method, route: &Route) -> Option<&Fields> {
        let route_yields = self.of_route(route);
        if *method == Method::GET {
            return Some(
                route_yields.and_then(|route_yields| route_yields.read.as_ref()).unwrap_or(&self.cursors),
            );
        }
        route_yields.and_then(|route_yields| route_yields.created.as_ref())
    }

    fn of_route(&self, route: &Route) -> Option<&RouteYields> {
        let (root, wanted) = (route.root()?, route.after_version()?);
        let mut with_root = self.yields_by_root.get(usize::from(root.number()))?.iter();
        with_root.find(|route_yields| route_yields.route.after_version() == Some(wanted))
    }
}

/// Each route of the table once, with the fields of all its rows, in their order.
fn yields_by_root() -> Vec<Vec<RouteYields>> {
    let mut yields_by_root: Vec<Vec<UnindexedRoute>> = (0..Literal::COUNT).map(|_| Vec::new()).collect();
    let mut add = |route: &str,
                   fields: &[Field],
                   part: fn(&mut UnindexedRoute) -> &mut Option<Vec<Field>>| {
        let route = Route::read(route);
        // Every route begins with a literal.
        let Some(root) = route.root() else { return };
        let yields_by_root: &mut Vec<UnindexedRoute> = &mut yields_by_root[usize::from(root.number())];
        let at =
            yields_by_root.iter().position(|route_yields| route_yields.route == route).unwrap_or_else(|| {
                yields_by_root.push(UnindexedRoute { route, read: None, created: None });
                yields_by_root.len() - 1
            });
        part(&mut yields_by_root[at]).get_or_insert_default().extend_from_slice(fields);
    };
    let mut add_all = |created: fn(&ResourceRow) -> &'static [Made],
                       part: fn(&mut UnindexedRoute) -> &mut Option<Vec<Field>>| {
        for (routes, fields) in rows().flat_map(created) {
            routes.iter().for_each(|route| add(route, fields, part));
        }
    };
    add_all(|row| row.lists, |route_yields| &mut route_yields.read);
    add_all(|row| row.created, |route_yields| &mut route_yields.created);
    ACCOUNT_READS.iter().for_each(|route| add(route, &[], |route_yields| &mut route_yields.read));
    let prepared = |UnindexedRoute { route, read, created }: UnindexedRoute| RouteYields {
        route,
        read: read.map(|fields| Fields::of(fields.into_iter().chain(CURSORS))),
        created: created.map(Fields::of),
    };
    yields_by_root
        .into_iter()
        .map(|yields_by_root| yields_by_root.into_iter().map(prepared).collect())
        .collect()
}

impl PatternSegment {
    fn read(part: &str) -> Self {
        match part.strip_prefix('{').and_then(|part| part.strip_suffix('}')) {
            Some(kind) => Kind::of_word(kind).map_or(Self::Any, Self::Identifier),
            None => Literal::of(part).map_or(Self::Any, Self::Literal),
        }
    }
}

/// Whether `segments` begin with the pattern. A literal of the API is not an identifier.
fn matches(pattern: &[PatternSegment], segments: &[Segment<'_>]) -> bool {
    let segment_matches = |(part, segment): (&PatternSegment, &Segment<'_>)| match part {
        PatternSegment::Literal(wanted) => {
            segment.literal() == Some(*wanted) && wanted.text().len() == segment.text().len()
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
    fn every_path_of_the_table_consists_of_known_words() {
        for part in rows().flat_map(|row| row.paths).flat_map(|path| path.split('/')) {
            match PatternSegment::read(part) {
                PatternSegment::Literal(_) | PatternSegment::Identifier(_) => {}
                PatternSegment::Any => assert_eq!(part, "*"),
            }
        }
        for path in rows().flat_map(|row| row.paths) {
            assert!(is_root(path.split('/').next().unwrap()), "{path} is below no root of the endpoints");
        }
        let created =
            rows().flat_map(|row| row.created.iter().chain(row.lists)).flat_map(|(routes, _)| *routes);
        for route in created.chain(&ACCOUNT_READS) {
            assert!(is_root(route.split('/').next().unwrap()), "{route} is below no root of the endpoints");
            assert_eq!(Route::read(route).to_string(), format!("/{route}"));
            assert!(index().of_route(&Route::read(&format!("/v1/{route}"))).is_some(), "{route}");
        }
    }
}
