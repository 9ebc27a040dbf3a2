//! Defines the rows of the table of refusals, checks whether an error body matches a row, and creates the verdict of
//! the row with the numbers and names in the body.

use std::time::Duration;

use http::StatusCode;

use super::ErrorBody;
use crate::policy::permission::Permission;
use crate::policy::verdict::{Shortfall, Subject, UnexplainedRefusal, Verdict};

/// A refusal of the provider: the bodies that it matches, its meaning, and examples of responses.
#[derive(Debug)]
pub(crate) struct RefusalRow {
    /// The statuses that the row matches.
    pub(super) statuses: Statuses,
    /// The body must match this pattern.
    pub(super) pattern: BodyPattern,
    /// The body must also match this pattern.
    pub(super) and_pattern: BodyPattern,
    /// The body must not match this pattern, unless the pattern is empty.
    pub(super) excluded_pattern: BodyPattern,
    /// The meaning of the refusal.
    pub(crate) meaning: RefusalMeaning,
    /// Responses that the row matches, for the simulator and for the tests of the table.
    pub(crate) examples: &'static [Example],
}

/// Codes and parts of messages, all in lower case. A body matches the pattern if it contains at least one of them, or
/// if the pattern is empty.
#[derive(Debug)]
pub(super) struct BodyPattern {
    /// Codes that are compared as a whole, or as `prefix*` or `*suffix`.
    pub(super) codes: &'static [&'static str],
    /// Texts at the start of a message.
    pub(super) message_prefixes: &'static [&'static str],
    /// Texts at any position of a message.
    pub(super) message_parts: &'static [&'static str],
}

/// The statuses that a row matches. A WebSocket error is matched with the status 200 first, and then with the status
/// that its code has over HTTP.
#[derive(Debug)]
pub(super) enum Statuses {
    Any,
    Only(&'static [u16]),
    Except(&'static [u16]),
}

/// The meaning of a refusal, which determines its [`Verdict`]. Most variants have the name of their verdict. The
/// numbers and names in the verdict are parsed from the body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RefusalMeaning {
    KeyQuota,
    WorkspaceQuota,
    /// The same as [`Slots`](Self::Slots), but only if the message contains no numbers of credits.
    SlotsWithoutCredits,
    Slots,
    Concurrency,
    Busy,
    RateLimited,
    WrongHost,
    MissingPermission,
    InvalidKey,
    Abuse,
    Billing,
    /// A feature of the plan: the given feature, or the feature that the message names.
    PlanFeature(Option<Subject>),
    RequestError,
    NotFound,
    /// The sender of the refusal did not check the key, so the refusal is unexplained.
    Unauthorized,
}

/// A response with a refusal, as it was captured or is documented. The simulator sends it, and replaces the
/// placeholders in the message with properties of the request.
#[derive(Debug, PartialEq, Eq)]
pub struct Example {
    /// The name of the simulator's fault that sends the example.
    pub name: &'static str,
    /// The status over HTTP.
    pub status: u16,
    /// The format of the body.
    pub body: BodyFormat,
    /// The message of the error.
    pub message: &'static str,
}

/// The format of an error body.
#[derive(Debug, PartialEq, Eq)]
pub enum BodyFormat {
    /// `{"detail":{"type","code","message","status",…}}` with these values of `type`, `code` and
    /// `status`.
    Typed([&'static str; 3]),
    /// `{"detail":{"status","message"}}` with this `status`.
    Legacy(&'static str),
    /// `{"detail":"…"}`.
    Bare,
    /// `{"error","message"}` with this `error`.
    Unwrapped(&'static str),
}

/// The pattern that matches every body.
pub(super) const EMPTY_PATTERN: BodyPattern =
    BodyPattern { codes: &[], message_prefixes: &[], message_parts: &[] };

/// Returns a pattern that matches bodies with one of `codes`.
pub(super) const fn codes(codes: &'static [&'static str]) -> BodyPattern {
    BodyPattern { codes, ..EMPTY_PATTERN }
}

/// Returns a pattern that matches bodies with a message that starts with one of `message_prefixes`.
pub(super) const fn message_prefixes(message_prefixes: &'static [&'static str]) -> BodyPattern {
    BodyPattern { message_prefixes, ..EMPTY_PATTERN }
}

/// Returns a pattern that matches bodies with a message that contains one of `message_parts`.
pub(super) const fn message_parts(message_parts: &'static [&'static str]) -> BodyPattern {
    BodyPattern { message_parts, ..EMPTY_PATTERN }
}

/// Returns a row for bodies that match a pattern, with any status.
pub(super) const fn row(pattern: BodyPattern, meaning: RefusalMeaning) -> RefusalRow {
    RefusalRow {
        statuses: Statuses::Any,
        pattern,
        and_pattern: EMPTY_PATTERN,
        excluded_pattern: EMPTY_PATTERN,
        meaning,
        examples: &[],
    }
}

pub(super) const fn example(
    name: &'static str,
    status: u16,
    body: BodyFormat,
    message: &'static str,
) -> Example {
    Example { name, status, body, message }
}

impl BodyPattern {
    pub(super) const fn or_message_prefixes(self, message_prefixes: &'static [&'static str]) -> Self {
        Self { message_prefixes, ..self }
    }

    pub(super) const fn or_message_parts(self, message_parts: &'static [&'static str]) -> Self {
        Self { message_parts, ..self }
    }

    fn is_empty(&self) -> bool {
        self.codes.is_empty() && self.message_prefixes.is_empty() && self.message_parts.is_empty()
    }

    fn matches(&self, body: &ErrorBody) -> bool {
        self.is_empty()
            || self.codes.iter().any(|pattern| body.any_code(|code| is_code_match(pattern, code)))
            || self.message_prefixes.iter().any(|prefix| body.message_starts_with(prefix))
            || self.message_parts.iter().any(|part| body.message_contains(part))
    }
}

/// Whether a code matches a pattern with or without `*` at one of its ends.
fn is_code_match(pattern: &str, code: &str) -> bool {
    match (pattern.strip_prefix('*'), pattern.strip_suffix('*')) {
        (Some(suffix), _) => code.ends_with(suffix),
        (None, Some(prefix)) => code.starts_with(prefix),
        (None, None) => code == pattern,
    }
}

impl RefusalRow {
    pub(super) const fn only_statuses(self, statuses: &'static [u16]) -> Self {
        Self { statuses: Statuses::Only(statuses), ..self }
    }

    pub(super) const fn except_statuses(self, statuses: &'static [u16]) -> Self {
        Self { statuses: Statuses::Except(statuses), ..self }
    }

    /// Requires that the body also matches `and_pattern`.
    pub(super) const fn and(self, and_pattern: BodyPattern) -> Self {
        Self { and_pattern, ..self }
    }

    /// Requires that the body does not match `excluded_pattern`.
    pub(super) const fn without(self, excluded_pattern: BodyPattern) -> Self {
        Self { excluded_pattern, ..self }
    }

    pub(super) const fn examples(self, examples: &'static [Example]) -> Self {
        Self { examples, ..self }
    }

    /// Returns the verdict of this row, if the response matches it.
    pub(super) fn verdict(
        &self,
        status: StatusCode,
        body: &ErrorBody,
        retry_after: Option<Duration>,
    ) -> Option<Verdict> {
        let status = status.as_u16();
        let has_status = match self.statuses {
            Statuses::Any => true,
            Statuses::Only(statuses) => statuses.contains(&status),
            Statuses::Except(statuses) => !statuses.contains(&status),
        };
        let is_excluded = !self.excluded_pattern.is_empty() && self.excluded_pattern.matches(body);
        let is_match =
            has_status && self.pattern.matches(body) && self.and_pattern.matches(body) && !is_excluded;
        if is_match { self.meaning.verdict(body, retry_after) } else { None }
    }
}

/// The part of a message that precedes the name of the missing permission.
pub(super) const MISSING_PERMISSION: &str = "is missing the permission ";

impl RefusalMeaning {
    /// Returns the verdict with the numbers and names in `body`, or `None` if they contradict this meaning.
    fn verdict(self, body: &ErrorBody, retry_after: Option<Duration>) -> Option<Verdict> {
        Some(match self {
            Self::KeyQuota => Verdict::KeyQuota(parse_shortfall(body)),
            Self::WorkspaceQuota => Verdict::WorkspaceQuota(parse_shortfall(body)),
            Self::SlotsWithoutCredits if parse_shortfall(body).credits().is_some() => return None,
            Self::SlotsWithoutCredits | Self::Slots => Verdict::Slots,
            Self::Concurrency => {
                let maximum = body.number_between("a maximum of ", " concurrent requests");
                Verdict::Concurrency { maximum: maximum.and_then(|number| u32::try_from(number).ok()) }
            }
            Self::Busy => Verdict::Busy,
            Self::RateLimited => Verdict::RateLimited(retry_after),
            Self::WrongHost => Verdict::WrongHost,
            Self::MissingPermission => {
                Verdict::MissingPermission(body.word_after(MISSING_PERMISSION).and_then(Permission::parse))
            }
            Self::InvalidKey => Verdict::InvalidKey,
            Self::Abuse => Verdict::Abuse,
            Self::Billing => Verdict::Billing,
            Self::PlanFeature(subject) => Verdict::PlanFeature(subject.unwrap_or_else(|| find_subject(body))),
            Self::RequestError => Verdict::RequestError,
            Self::NotFound => Verdict::NotFound,
            Self::Unauthorized => Verdict::Unexplained(UnexplainedRefusal::Unauthorized),
        })
    }
}

/// Parses the numbers of credits in a message about exhausted credits.
fn parse_shortfall(body: &ErrorBody) -> Shortfall {
    Shortfall {
        quota: body.number_between("your quota of ", "."),
        remaining: body.number_between("you have ", " c"),
        required: body.number_between("while ", " c"),
    }
}

/// Finds the part of the request that a message or code about a plan names.
fn find_subject(body: &ErrorBody) -> Subject {
    const SUBJECTS: [(&str, Subject); 8] = [
        ("clon", Subject::Cloning),
        ("format", Subject::OutputFormat),
        ("kbps", Subject::OutputFormat),
        ("khz", Subject::OutputFormat),
        ("bitrate", Subject::OutputFormat),
        ("librar", Subject::Voice),
        ("voice", Subject::Voice),
        ("model", Subject::Model),
    ];
    let contains = |part: &str| body.message_contains(part) || body.any_code(|code| code.contains(part));
    SUBJECTS.iter().find(|(part, _)| contains(part)).map_or(Subject::Unnamed, |(_, subject)| *subject)
}
