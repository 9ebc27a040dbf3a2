//! Refusals with a fixed status and text. They are the examples in the table of refusals, so that
//! tests cover every wording that Keychoir recognizes. Faults use their names.
//!
//! Braces in a message stand for the facts of a request: `{needed}`, `{limit}`, `{remaining}`,
//! `{subject}`, `{bound}`, `{model}`, `{format}`; `{short}` is one less than `{more}`, which is the needed
//! amount, or two; `{exceeded}` is the limit, or less if no more is needed.

use super::render::{bare, legacy, typed, unwrapped};
use super::{Facts, Refusal, Shape};
use crate::elevenlabs::refusal::{BodyFormat, Example, RefusalMeaning, examples, meaning};

/// The subject of a refusal, which decides its form on WebSockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::simulator) enum Family {
    /// Missing credits.
    Quota,
    /// A key that is not accepted.
    Key,
    /// Any other subject. The text is that of HTTP.
    Other,
}

impl Family {
    /// The family of an example.
    pub(in crate::simulator) fn of(example: &Example) -> Self {
        match meaning(example) {
            Some(RefusalMeaning::WorkspaceQuota | RefusalMeaning::KeyQuota) => Self::Quota,
            Some(RefusalMeaning::InvalidKey | RefusalMeaning::WrongHost) => Self::Key,
            Some(_) | None => Self::Other,
        }
    }
}

/// The refusal with this name, for decisions of the simulator.
pub(in crate::simulator) fn fixed_refusal(name: &'static str) -> Shape {
    // All these names are in the table. A typo would give a 500, and a test would fail.
    fixed(name).unwrap_or(Shape::ServerError)
}

/// The refusal with this name; `None` if the table has none.
pub(in crate::simulator) fn fixed(name: &str) -> Option<Shape> {
    examples().find(|example| example.name == name).map(Shape::Fixed)
}

/// Renders an example byte for byte.
pub(super) fn render(example: &Example, facts: &Facts, request_id: &str) -> Refusal {
    let message = message(example, facts);
    match example.body {
        BodyFormat::Typed(names) => typed(example.status, names, &message, request_id),
        BodyFormat::Legacy(status) => legacy(example.status, status, &message),
        BodyFormat::Bare => bare(example.status, &message),
        BodyFormat::Unwrapped(error) => unwrapped(example.status, error, &message),
    }
}

fn message(example: &Example, facts: &Facts) -> String {
    let more = facts.needed.max(2);
    let plan = if facts.format.starts_with("mp3") { "Creator" } else { "Pro" };
    let numbers = [
        ("{needed}", facts.needed),
        ("{limit}", facts.limit),
        ("{remaining}", facts.remaining),
        ("{short}", more - 1),
        ("{more}", more),
        ("{bound}", facts.bound),
        ("{exceeded}", facts.exceeded()),
    ];
    let texts = [
        ("{plan}", plan),
        ("{model}", &facts.model),
        ("{format}", &facts.format),
        ("{subject}", &facts.subject),
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
