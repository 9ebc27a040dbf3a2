//! The table, indexed for lookups: most requests name no identifier, which is decided by the first
//! segment of their path.

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
    answers: Vec<Vec<RouteYields>>,
}

/// The segments of a path that names an identifier; also matches longer paths that begin with them.
type Pattern = Vec<Part>;

#[derive(Clone, Copy, Debug)]
enum Part {
    Word(Literal),
    /// Any segment that is not a literal of the API.
    Any,
    Identifier(Kind),
}

/// The identifiers in the responses of a route.
#[derive(Clone, Debug)]
struct RouteYields {
    route: Route,
    /// Fields of the response to a read; `None` when that is neither a list nor about the account.
    read: Option<Fields>,
    /// Fields of the response to a request that creates something.
    made: Option<Fields>,
}

/// The same while the table is being indexed.
struct Listed {
    route: Route,
    read: Option<Vec<Field>>,
    made: Option<Vec<Field>>,
}

/// The indexed table.
pub(super) fn index() -> &'static Index {
    &INDEX
}

impl Index {
    fn new() -> Self {
        let mut patterns = vec![Vec::new(); Literal::COUNT];
        for path in rows().flat_map(|row| row.paths) {
            let pattern: Pattern = path.split('/').map(Part::read).collect();
            if let Some(Part::Word(first)) = pattern.first() {
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
        Self { patterns, query, body, cursors, headers, answers: answers() }
    }

    /// The identifiers in a path, by its segments after the version.
    pub(super) fn of_path(&self, words: &[Segment<'_>]) -> Vec<Named> {
        let Some(first) = words.first().and_then(Segment::literal) else { return Vec::new() };
        let mut found: Vec<Named> = Vec::new();
        for pattern in &self.patterns[usize::from(first.number())] {
            if matches(pattern, words) {
                let identifiers = pattern.iter().zip(words).filter_map(|(part, word)| match part {
                    Part::Identifier(kind) => Some(Named::new(*kind, word.text())),
                    Part::Word(_) | Part::Any => None,
                });
                super::add_all(&mut found, identifiers);
            }
        }
        found
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
    pub(super) fn gives(&self, method: &Method, route: &Route) -> Yields {
        let Some(answer) = self.answer(route) else { return Yields::Nothing };
        if *method == Method::GET && answer.read.is_some() {
            return Yields::Account;
        }
        let makes = [Method::POST, Method::PUT, Method::PATCH].contains(method);
        if makes && answer.made.is_some() { Yields::Made } else { Yields::Nothing }
    }

    /// The fields of a response with identifiers; `None` when there are none.
    pub(super) fn of_answer(&self, method: &Method, route: &Route) -> Option<&Fields> {
        let answer = self.answer(route);
        if *method == Method::GET {
            return Some(answer.and_then(|answer| answer.read.as_ref()).unwrap_or(&self.cursors));
        }
        answer.and_then(|answer| answer.made.as_ref())
    }

    fn answer(&self, route: &Route) -> Option<&RouteYields> {
        let (root, wanted) = (route.root()?, route.behind_version()?);
        let mut with_root = self.answers.get(usize::from(root.number()))?.iter();
        with_root.find(|answer| answer.route.behind_version() == Some(wanted))
    }
}

/// Each route of the table once, with the fields of all its rows, in their order.
fn answers() -> Vec<Vec<RouteYields>> {
    let mut answers: Vec<Vec<Listed>> = (0..Literal::COUNT).map(|_| Vec::new()).collect();
    let mut add = |route: &str, fields: &[Field], part: fn(&mut Listed) -> &mut Option<Vec<Field>>| {
        let route = Route::read(route);
        // Every route begins with a literal.
        let Some(root) = route.root() else { return };
        let answers: &mut Vec<Listed> = &mut answers[usize::from(root.number())];
        let at = answers.iter().position(|answer| answer.route == route).unwrap_or_else(|| {
            answers.push(Listed { route, read: None, made: None });
            answers.len() - 1
        });
        part(&mut answers[at]).get_or_insert_default().extend_from_slice(fields);
    };
    let mut add_all = |made: fn(&ResourceRow) -> &'static [Made],
                       part: fn(&mut Listed) -> &mut Option<Vec<Field>>| {
        for (routes, fields) in rows().flat_map(made) {
            routes.iter().for_each(|route| add(route, fields, part));
        }
    };
    add_all(|row| row.lists, |answer| &mut answer.read);
    add_all(|row| row.made, |answer| &mut answer.made);
    ACCOUNT_READS.iter().for_each(|route| add(route, &[], |answer| &mut answer.read));
    let prepared = |Listed { route, read, made }: Listed| RouteYields {
        route,
        read: read.map(|fields| Fields::of(fields.into_iter().chain(CURSORS))),
        made: made.map(Fields::of),
    };
    answers.into_iter().map(|answers| answers.into_iter().map(prepared).collect()).collect()
}

impl Part {
    fn read(part: &str) -> Self {
        match part.strip_prefix('{').and_then(|part| part.strip_suffix('}')) {
            Some(kind) => Kind::of_word(kind).map_or(Self::Any, Self::Identifier),
            None => Literal::of(part).map_or(Self::Any, Self::Word),
        }
    }
}

/// Whether `words` begin with the pattern. A literal of the API is not an identifier.
fn matches(pattern: &[Part], words: &[Segment<'_>]) -> bool {
    let fits = |(part, word): (&Part, &Segment<'_>)| match part {
        Part::Word(wanted) => word.literal() == Some(*wanted) && wanted.text().len() == word.text().len(),
        Part::Any | Part::Identifier(_) => word.literal().is_none(),
    };
    words.len() >= pattern.len() && pattern.iter().zip(words).all(fits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elevenlabs::endpoint::is_root;

    #[test]
    fn the_table_is_written_in_known_words() {
        for part in rows().flat_map(|row| row.paths).flat_map(|path| path.split('/')) {
            match Part::read(part) {
                Part::Word(_) | Part::Identifier(_) => {}
                Part::Any => assert_eq!(part, "*"),
            }
        }
        for path in rows().flat_map(|row| row.paths) {
            assert!(is_root(path.split('/').next().unwrap()), "{path} is below no root of the endpoints");
        }
        let made = rows().flat_map(|row| row.made.iter().chain(row.lists)).flat_map(|(routes, _)| *routes);
        for route in made.chain(&ACCOUNT_READS) {
            assert!(is_root(route.split('/').next().unwrap()), "{route} is below no root of the endpoints");
            assert_eq!(Route::read(route).to_string(), format!("/{route}"));
            assert!(index().answer(&Route::read(&format!("/v1/{route}"))).is_some(), "{route}");
        }
    }
}
