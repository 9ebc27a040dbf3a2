//! Scripts of faults: those queued for a key, the permanent one of a key, and those bound to a
//! route.

use std::collections::VecDeque;

use http::Method;

use super::fault::Fault;

/// The faults of one key, or of all.
#[derive(Debug, Default)]
pub(super) struct Script {
    anywhere: Faults,
    /// Faults bound to routes.
    bound: Vec<(Route, Faults)>,
}

#[derive(Debug, Default)]
struct Faults {
    /// Queued faults, each taken once.
    next: VecDeque<Fault>,
    /// The fault when the queue is empty.
    always: Option<Fault>,
}

/// A method, if only one is meant, and the beginning of a path.
#[derive(Debug, PartialEq, Eq)]
struct Route {
    method: Option<String>,
    path: String,
}

impl Route {
    /// Parses `/v1/dubbing` or `POST /v1/dubbing`.
    fn read(text: &str) -> Self {
        match text.trim().split_once(' ') {
            Some((method, path)) => {
                Self { method: Some(method.to_ascii_uppercase()), path: path.trim().to_owned() }
            }
            None => Self { method: None, path: text.trim().to_owned() },
        }
    }

    fn covers(&self, method: &Method, path: &str) -> bool {
        self.method.as_deref().is_none_or(|own| own == method.as_str()) && path.starts_with(&self.path)
    }

    /// The precedence: a longer path is more specific, and then a path with a method.
    fn width(&self) -> (usize, bool) {
        (self.path.len(), self.method.is_some())
    }
}

impl Faults {
    fn take(&mut self) -> Option<Fault> {
        self.next.pop_front().or_else(|| self.always.clone())
    }
}

impl Script {
    /// A script with these queued faults.
    pub(super) fn of(faults: Vec<Fault>) -> Self {
        let mut script = Self::default();
        script.add(None, faults);
        script
    }

    fn faults(&mut self, route: Option<&str>) -> &mut Faults {
        let Some(route) = route.map(Route::read) else { return &mut self.anywhere };
        let at = self.bound.iter().position(|(known, _)| *known == route).unwrap_or_else(|| {
            self.bound.push((route, Faults::default()));
            self.bound.len() - 1
        });
        &mut self.bound[at].1
    }

    /// Appends to the queue of a route, or to the general queue.
    pub(super) fn add(&mut self, route: Option<&str>, faults: Vec<Fault>) {
        self.faults(route).next.extend(faults);
    }

    /// Sets the fault for an empty queue of a route, or for the general one.
    pub(super) fn set(&mut self, route: Option<&str>, always: Option<Fault>) {
        self.faults(route).always = always;
    }

    /// Takes the fault of a request's route: the most specific route with a fault decides.
    pub(super) fn take_bound(&mut self, method: &Method, path: &str) -> Option<Fault> {
        let mut covering: Vec<_> =
            self.bound.iter_mut().filter(|(route, _)| route.covers(method, path)).collect();
        covering.sort_by_key(|(route, _)| std::cmp::Reverse(route.width()));
        covering.into_iter().find_map(|(_, faults)| faults.take())
    }

    /// Takes the fault of a request whose route has none.
    pub(super) fn take(&mut self) -> Option<Fault> {
        self.anywhere.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GET: Method = Method::GET;
    const POST: Method = Method::POST;

    #[test]
    fn the_line_goes_before_what_is_always_so() {
        let mut script = Script::of(vec![Fault::CloseUnread]);
        script.set(None, Some(Fault::HugeError));
        assert_eq!(script.take(), Some(Fault::CloseUnread));
        assert_eq!([script.take(), script.take()], [Some(Fault::HugeError), Some(Fault::HugeError)]);
        script.set(None, None);
        assert_eq!(script.take(), None);
    }

    #[test]
    fn a_fault_stays_on_its_route() {
        let mut script = Script::of(vec![Fault::CloseUnread]);
        script.set(Some("/v1/dubbing"), Some(Fault::HugeError));
        for path in ["/v1/user/subscription", "/v1/dub", "/", ""] {
            assert_eq!(script.take_bound(&GET, path), None, "{path}");
        }
        for path in ["/v1/dubbing", "/v1/dubbing/7/audio/de"] {
            assert_eq!(script.take_bound(&POST, path), Some(Fault::HugeError), "{path}");
        }
        assert_eq!(script.take(), Some(Fault::CloseUnread));
        script.set(Some("/v1/dubbing"), None);
        assert_eq!(script.take_bound(&POST, "/v1/dubbing"), None);
    }

    #[test]
    fn the_narrowest_route_that_has_a_fault_decides() {
        let mut script = Script::default();
        script.set(Some("/v1/voices"), Some(Fault::HugeError));
        script.add(Some("post /v1/voices"), vec![Fault::CloseUnread]);
        script.add(Some("/v1/voices/add"), vec![Fault::Pass]);
        let mut take = |method, path| script.take_bound(&method, path);
        assert_eq!(take(GET, "/v1/voices"), Some(Fault::HugeError));
        assert_eq!(take(POST, "/v1/voices/add"), Some(Fault::Pass));
        assert_eq!(take(POST, "/v1/voices/add"), Some(Fault::CloseUnread));
        assert_eq!(take(POST, "/v1/voices/add"), Some(Fault::HugeError));
    }
}
