//! A row of the table of refusals, and the check whether an error body matches it.

use std::time::Duration;

use http::StatusCode;

use super::ErrorBody;
use crate::policy::permission::Permission;
use crate::policy::verdict::{Refusal, Shortfall, Subject, Verdict};

/// A refusal of the provider: its words, its meaning, and examples of responses.
#[derive(Debug)]
pub(crate) struct RefusalRow {
    /// The statuses with which its words have this meaning.
    pub(super) statuses: Statuses,
    /// The body must have at least one of these words.
    pub(super) any: Words,
    /// The body must also have at least one of these words, unless the list is empty.
    pub(super) and: Words,
    /// The body must have none of these words.
    pub(super) without: Words,
    /// The meaning of the refusal.
    pub(crate) meaning: RefusalMeaning,
    /// Responses with these words, for the simulator and for the tests of the table.
    pub(crate) examples: &'static [Example],
}

/// Codes and sentences, all in lower case.
#[derive(Debug)]
pub(super) struct Words {
    /// Codes: whole, or `prefix*`, or `*suffix`.
    pub(super) codes: &'static [&'static str],
    /// Beginnings of sentences.
    pub(super) begins: &'static [&'static str],
    /// Parts of sentences.
    pub(super) has: &'static [&'static str],
}

/// The statuses of a row. A WebSocket error has the status that its code has over HTTP, or 200.
#[derive(Debug)]
pub(super) enum Statuses {
    Any,
    Only(&'static [u16]),
    Except(&'static [u16]),
}

/// The meaning of a refusal. The figures, times and names of a verdict are read from the body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RefusalMeaning {
    KeyQuota,
    WorkspaceQuota,
    /// Slots, unless the sentence has figures of credits.
    SlotsWithoutFigures,
    Slots,
    Concurrency,
    Busy,
    RateLimited,
    WrongHost,
    MissingPermission,
    InvalidKey,
    Abuse,
    Billing,
    /// A feature of the plan: this one, or the one that the sentence names.
    PlanFeature(Option<Subject>),
    RequestError,
    NotFound,
    Unauthorized,
}

/// A response with a refusal, as it was captured or is documented. Braces in the message stand for facts
/// of the request (see the simulator, which sends it).
#[derive(Debug, PartialEq, Eq)]
pub struct Example {
    /// Its name in faults of the simulator.
    pub name: &'static str,
    /// The status over HTTP.
    pub status: u16,
    /// The format of the body.
    pub body: BodyFormat,
    /// The sentence.
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

pub(super) const NO_WORDS: Words = Words { codes: &[], begins: &[], has: &[] };

pub(super) const fn codes(codes: &'static [&'static str]) -> Words {
    Words { codes, ..NO_WORDS }
}

pub(super) const fn begins(begins: &'static [&'static str]) -> Words {
    Words { begins, ..NO_WORDS }
}

pub(super) const fn has(has: &'static [&'static str]) -> Words {
    Words { has, ..NO_WORDS }
}

/// A row for bodies with any of these words.
pub(super) const fn row(any: Words, meaning: RefusalMeaning) -> RefusalRow {
    RefusalRow { statuses: Statuses::Any, any, and: NO_WORDS, without: NO_WORDS, meaning, examples: &[] }
}

pub(super) const fn example(
    name: &'static str,
    status: u16,
    body: BodyFormat,
    message: &'static str,
) -> Example {
    Example { name, status, body, message }
}

impl Words {
    pub(super) const fn or_begins(self, begins: &'static [&'static str]) -> Self {
        Self { begins, ..self }
    }

    pub(super) const fn or_has(self, has: &'static [&'static str]) -> Self {
        Self { has, ..self }
    }

    fn is_empty(&self) -> bool {
        self.codes.is_empty() && self.begins.is_empty() && self.has.is_empty()
    }

    fn match_any_of(&self, body: &ErrorBody) -> bool {
        self.codes.iter().any(|code| has_code(body, code))
            || self.begins.iter().any(|prefix| body.message_starts(prefix))
            || self.has.iter().any(|part| body.message_has(part))
    }
}

fn has_code(body: &ErrorBody, code: &str) -> bool {
    match (code.strip_prefix('*'), code.strip_suffix('*')) {
        (Some(suffix), _) => body.any_code(|word| word.ends_with(suffix)),
        (None, Some(prefix)) => body.any_code(|word| word.starts_with(prefix)),
        (None, None) => body.has_code(code),
    }
}

impl RefusalRow {
    pub(super) const fn only(self, statuses: &'static [u16]) -> Self {
        Self { statuses: Statuses::Only(statuses), ..self }
    }

    pub(super) const fn except(self, statuses: &'static [u16]) -> Self {
        Self { statuses: Statuses::Except(statuses), ..self }
    }

    pub(super) const fn and(self, and: Words) -> Self {
        Self { and, ..self }
    }

    pub(super) const fn without(self, without: Words) -> Self {
        Self { without, ..self }
    }

    pub(super) const fn examples(self, examples: &'static [Example]) -> Self {
        Self { examples, ..self }
    }

    /// The verdict of this row, if the response matches it.
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
        let is_match = has_status
            && (self.any.is_empty() || self.any.match_any_of(body))
            && (self.and.is_empty() || self.and.match_any_of(body))
            && !self.without.match_any_of(body);
        if is_match { self.meaning.verdict(body, retry_after) } else { None }
    }
}

/// The sentence that names a missing permission, before its name.
pub(super) const MISSING_PERMISSION: &str = "is missing the permission ";

impl RefusalMeaning {
    fn verdict(self, body: &ErrorBody, retry_after: Option<Duration>) -> Option<Verdict> {
        Some(match self {
            Self::KeyQuota => Verdict::KeyQuota(shortfall(body)),
            Self::WorkspaceQuota => Verdict::WorkspaceQuota(shortfall(body)),
            Self::SlotsWithoutFigures if shortfall(body).figures().is_some() => return None,
            Self::SlotsWithoutFigures | Self::Slots => Verdict::Slots,
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
            Self::PlanFeature(named) => Verdict::PlanFeature(named.unwrap_or_else(|| subject(body))),
            Self::RequestError => Verdict::RequestError,
            Self::NotFound => Verdict::NotFound,
            Self::Unauthorized => Verdict::Unexplained(Refusal::Unauthorized),
        })
    }
}

/// The figures of a sentence about credits.
fn shortfall(body: &ErrorBody) -> Shortfall {
    Shortfall {
        quota: body.number_between("your quota of ", "."),
        remaining: body.number_between("you have ", " c"),
        required: body.number_between("while ", " c"),
    }
}

/// The part of the request that a sentence about a plan names.
fn subject(body: &ErrorBody) -> Subject {
    const NAMED: [(&str, Subject); 8] = [
        ("clon", Subject::Cloning),
        ("format", Subject::OutputFormat),
        ("kbps", Subject::OutputFormat),
        ("khz", Subject::OutputFormat),
        ("bitrate", Subject::OutputFormat),
        ("librar", Subject::Voice),
        ("voice", Subject::Voice),
        ("model", Subject::Model),
    ];
    let has = |part: &str| body.message_has(part) || body.any_code(|word| word.contains(part));
    NAMED.iter().find(|(part, _)| has(part)).map_or(Subject::Unnamed, |(_, subject)| *subject)
}
