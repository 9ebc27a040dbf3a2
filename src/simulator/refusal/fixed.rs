//! Renders refusals with a fixed status and text, and decides the family of each refusal. The fixed refusals are the
//! examples in the table of [`crate::elevenlabs::refusal`], so that tests cover every wording that Keychoir recognizes.
//! Faults select them by their names.
//!
//! Messages contain placeholders for [`RefusalValues`]: `{needed}`, `{limit}`, `{remaining}`,
//! `{subject}`, `{bound}`, `{model}`, `{format}`. `{more}` is the requested amount, at least two, and
//! `{short}` is one less. `{exceeded}` is the limit, but always less than the requested amount.
//! `{plan}` is the plan that includes the requested format.

use super::render::{legacy_refusal, plain_refusal, refusal_without_detail, typed_refusal};
use super::{HttpRefusal, RefusalKind, RefusalValues};
use crate::elevenlabs::refusal::{BodyFormat, Example, RefusalMeaning, examples, meaning_of_example};

/// The kind of reason of a refusal, which decides its form on the agent and transcription WebSockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::simulator) enum RefusalFamily {
    /// The workspace or the key has too few credits.
    Quota,
    /// The provider does not accept the key. Only fixed refusals have this family.
    Key,
    /// Any other reason. Refusals of keys that are not fixed have this family as well.
    Other,
}

impl RefusalFamily {
    /// Returns the family of a refusal.
    pub(in crate::simulator) fn of(kind: &RefusalKind) -> Self {
        if matches!(
            kind,
            RefusalKind::Quota
                | RefusalKind::KeyCap
                | RefusalKind::QuotaForbidden
                | RefusalKind::InsufficientCredits
        ) {
            return Self::Quota;
        }
        let RefusalKind::Fixed(example) = kind else { return Self::Other };
        match meaning_of_example(example) {
            Some(RefusalMeaning::WorkspaceQuota | RefusalMeaning::KeyQuota) => Self::Quota,
            Some(RefusalMeaning::InvalidKey | RefusalMeaning::WrongHost) => Self::Key,
            Some(_) | None => Self::Other,
        }
    }
}

/// Returns the refusal with the given `name`. The name must be in the table.
pub(in crate::simulator) fn fixed_refusal(name: &'static str) -> RefusalKind {
    // A typo in the name would cause a 500 response, and a test would fail.
    find_fixed(name).unwrap_or(RefusalKind::ServerError)
}

/// Returns the refusal with the given `name`. Returns `None` if the name is not in the table.
pub(in crate::simulator) fn find_fixed(name: &str) -> Option<RefusalKind> {
    examples().find(|example| example.name == name).map(RefusalKind::Fixed)
}

/// Renders an example of the table byte for byte.
pub(super) fn render(example: &Example, values: &RefusalValues, request_id: &str) -> HttpRefusal {
    let message = fill_placeholders(example, values);
    match example.body {
        BodyFormat::Typed(names) => typed_refusal(example.status, names, &message, request_id),
        BodyFormat::Legacy(status) => legacy_refusal(example.status, status, &message),
        BodyFormat::Bare => plain_refusal(example.status, &message),
        BodyFormat::Unwrapped(error) => refusal_without_detail(example.status, error, &message),
    }
}

fn fill_placeholders(example: &Example, values: &RefusalValues) -> String {
    let more = values.requested_amount.max(2);
    let plan = if values.format.starts_with("mp3") { "Creator" } else { "Pro" };
    let numbers = [
        ("{needed}", values.requested_amount),
        ("{limit}", values.credit_limit),
        ("{remaining}", values.remaining_credits),
        ("{short}", more - 1),
        ("{more}", more),
        ("{bound}", values.max_count),
        ("{exceeded}", values.exceeded_limit()),
    ];
    let texts = [
        ("{plan}", plan),
        ("{model}", &values.model),
        ("{format}", &values.format),
        ("{subject}", &values.subject),
    ];
    let mut message = example.message.to_owned();
    for (placeholder, value) in numbers {
        message = message.replace(placeholder, &value.to_string());
    }
    for (placeholder, value) in texts {
        message = message.replace(placeholder, value);
    }
    message
}
