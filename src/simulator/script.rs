//! Stores the scripted faults of a key or of all requests: queued faults and a permanent fault, for all routes or for a
//! single route. Selects the fault of each request.

use std::collections::VecDeque;

use http::Method;

use super::fault::Fault;

/// The faults of one key, or of all requests.
#[derive(Debug, Default)]
pub(super) struct Script {
    /// The faults of requests to any route.
    all_routes: Faults,
    /// Faults of single routes.
    by_route: Vec<(RoutePattern, Faults)>,
}

/// Queued faults and a permanent fault.
#[derive(Debug, Default)]
struct Faults {
    /// The next faults, each of which applies to one request.
    queue: VecDeque<Fault>,
    /// The permanent fault, which applies while the queue is empty.
    permanent: Option<Fault>,
}

/// The requests to which the faults of a route apply. Their path begins with the prefix, and they have the method if
/// the pattern has one.
#[derive(Debug, PartialEq, Eq)]
struct RoutePattern {
    method: Option<String>,
    path_prefix: String,
}

impl RoutePattern {
    /// Parses `/v1/dubbing` or `POST /v1/dubbing`.
    fn parse(text: &str) -> Self {
        match text.trim().split_once(' ') {
            Some((method, path)) => {
                Self { method: Some(method.to_ascii_uppercase()), path_prefix: path.trim().to_owned() }
            }
            None => Self { method: None, path_prefix: text.trim().to_owned() },
        }
    }

    fn matches(&self, method: &Method, path: &str) -> bool {
        self.method.as_deref().is_none_or(|expected| expected == method.as_str())
            && path.starts_with(&self.path_prefix)
    }

    /// Returns the sort key of the precedence. A longer path takes precedence, then a route with a method.
    fn specificity(&self) -> (usize, bool) {
        (self.path_prefix.len(), self.method.is_some())
    }
}

impl Faults {
    /// Takes the next queued fault, or else a copy of the permanent fault.
    fn take(&mut self) -> Option<Fault> {
        self.queue.pop_front().or_else(|| self.permanent.clone())
    }
}

impl Script {
    /// Creates a script with `faults` in its queue.
    pub(super) fn new(faults: Vec<Fault>) -> Self {
        let mut script = Self::default();
        script.queue(None, faults);
        script
    }

    fn faults_mut(&mut self, route: Option<&str>) -> &mut Faults {
        let Some(pattern) = route.map(RoutePattern::parse) else { return &mut self.all_routes };
        let index =
            self.by_route.iter().position(|(existing, _)| *existing == pattern).unwrap_or_else(|| {
                self.by_route.push((pattern, Faults::default()));
                self.by_route.len() - 1
            });
        &mut self.by_route[index].1
    }

    /// Queues faults for a route, or for all routes.
    pub(super) fn queue(&mut self, route: Option<&str>, faults: Vec<Fault>) {
        self.faults_mut(route).queue.extend(faults);
    }

    /// Sets the permanent fault of a route, or of all routes.
    pub(super) fn set_permanent(&mut self, route: Option<&str>, fault: Option<Fault>) {
        self.faults_mut(route).permanent = fault;
    }

    /// Takes the fault of the most specific route that matches the request and has a fault.
    pub(super) fn take_for_route(&mut self, method: &Method, path: &str) -> Option<Fault> {
        let mut matching: Vec<_> =
            self.by_route.iter_mut().filter(|(route, _)| route.matches(method, path)).collect();
        matching.sort_by_key(|(route, _)| std::cmp::Reverse(route.specificity()));
        matching.into_iter().find_map(|(_, faults)| faults.take())
    }

    /// Takes the fault that applies to all routes.
    pub(super) fn take_for_all_routes(&mut self) -> Option<Fault> {
        self.all_routes.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GET: Method = Method::GET;
    const POST: Method = Method::POST;

    #[test]
    fn queued_faults_precede_the_permanent_fault() {
        let mut script = Script::new(vec![Fault::CloseUnread]);
        script.set_permanent(None, Some(Fault::HugeError));
        assert_eq!(script.take_for_all_routes(), Some(Fault::CloseUnread));
        assert_eq!(
            [script.take_for_all_routes(), script.take_for_all_routes()],
            [Some(Fault::HugeError), Some(Fault::HugeError)]
        );
        script.set_permanent(None, None);
        assert_eq!(script.take_for_all_routes(), None);
    }

    #[test]
    fn a_fault_of_a_route_applies_to_that_route_only() {
        let mut script = Script::new(vec![Fault::CloseUnread]);
        script.set_permanent(Some("/v1/dubbing"), Some(Fault::HugeError));
        for path in ["/v1/user/subscription", "/v1/dub", "/", ""] {
            assert_eq!(script.take_for_route(&GET, path), None, "{path} must have no fault");
        }
        for path in ["/v1/dubbing", "/v1/dubbing/7/audio/de"] {
            assert_eq!(
                script.take_for_route(&POST, path),
                Some(Fault::HugeError),
                "{path} must have the fault"
            );
        }
        assert_eq!(script.take_for_all_routes(), Some(Fault::CloseUnread));
        script.set_permanent(Some("/v1/dubbing"), None);
        assert_eq!(script.take_for_route(&POST, "/v1/dubbing"), None);
    }

    #[test]
    fn the_most_specific_route_with_a_fault_decides() {
        let mut script = Script::default();
        script.set_permanent(Some("/v1/voices"), Some(Fault::HugeError));
        script.queue(Some("post /v1/voices"), vec![Fault::CloseUnread]);
        script.queue(Some("/v1/voices/add"), vec![Fault::Pass]);
        let mut take_fault = |method, path| script.take_for_route(&method, path);
        assert_eq!(take_fault(GET, "/v1/voices"), Some(Fault::HugeError));
        assert_eq!(take_fault(POST, "/v1/voices/add"), Some(Fault::Pass));
        assert_eq!(take_fault(POST, "/v1/voices/add"), Some(Fault::CloseUnread));
        assert_eq!(take_fault(POST, "/v1/voices/add"), Some(Fault::HugeError));
    }
}
