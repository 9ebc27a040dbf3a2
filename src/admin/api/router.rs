//! Defines the resources of the admin API: parses a path into a resource, and lists the methods of each resource.

use http::Method;

use super::API_PREFIX;
use super::error::ApiError;

/// A resource of the admin API. Its path is relative to [`API_PREFIX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Resource<'p> {
    Overview,
    Keys,
    /// A key, by its id.
    Key(&'p str),
    KeyAction(&'p str, KeyAction),
    Clients,
    /// A client, by its name.
    Client(&'p str),
    ClientRotation(&'p str),
    Usage,
    Attempts,
    Config,
    Changes,
    Events,
    Me,
    Reload,
    DashboardCodes,
}

/// An action on a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KeyAction {
    Pause,
    Resume,
    Check,
}

const READ_ONLY: &[Method] = &[Method::GET, Method::HEAD];
const READ_AND_ADD: &[Method] = &[Method::GET, Method::HEAD, Method::POST];
const READ_AND_REMOVE: &[Method] = &[Method::GET, Method::HEAD, Method::DELETE];
const READ_AND_CHANGE: &[Method] = &[Method::GET, Method::HEAD, Method::PATCH, Method::DELETE];
const ACT_ONLY: &[Method] = &[Method::POST];

impl<'p> Resource<'p> {
    /// Parses the path of a request. Returns `None` if the API has no such path.
    pub(super) fn parse(path: &'p str) -> Option<Self> {
        let segments: Vec<&str> = path.strip_prefix(API_PREFIX)?.split('/').collect();
        Some(match *segments.as_slice() {
            ["overview"] => Self::Overview,
            ["keys"] => Self::Keys,
            ["keys", id] if !id.is_empty() => Self::Key(id),
            ["keys", id, action] if !id.is_empty() => match action {
                "pause" => Self::KeyAction(id, KeyAction::Pause),
                "resume" => Self::KeyAction(id, KeyAction::Resume),
                "check" => Self::KeyAction(id, KeyAction::Check),
                _ => return None,
            },
            ["clients"] => Self::Clients,
            ["clients", name] if !name.is_empty() => Self::Client(name),
            ["clients", name, "rotate"] if !name.is_empty() => Self::ClientRotation(name),
            ["usage"] => Self::Usage,
            ["attempts"] => Self::Attempts,
            ["config"] => Self::Config,
            ["changes"] => Self::Changes,
            ["events"] => Self::Events,
            ["me"] => Self::Me,
            ["reload"] => Self::Reload,
            ["dashboard-codes"] => Self::DashboardCodes,
            _ => return None,
        })
    }

    /// Returns the methods of the resource.
    pub(super) fn methods(self) -> &'static [Method] {
        match self {
            Self::Overview
            | Self::Usage
            | Self::Attempts
            | Self::Config
            | Self::Changes
            | Self::Events
            | Self::Me => READ_ONLY,
            Self::Keys | Self::Clients => READ_AND_ADD,
            Self::Key(_) => READ_AND_REMOVE,
            Self::Client(_) => READ_AND_CHANGE,
            Self::KeyAction(..) | Self::ClientRotation(_) | Self::Reload | Self::DashboardCodes => ACT_ONLY,
        }
    }
}

/// Returns an error if the resource does not have the method.
pub(super) fn require_method(resource: Resource<'_>, method: &Method) -> Result<(), ApiError> {
    let methods = resource.methods();
    if methods.contains(method) { Ok(()) } else { Err(ApiError::method_not_allowed(methods)) }
}
