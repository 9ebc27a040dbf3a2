//! Refusals with a fixed status and text: a table, so that another one is one line. Faults use the
//! `name`.
//!
//! Sources: the public issues and programs that quote a response, named where there is one; the
//! error table of the documentation for codes without a capture. Braces stand for the facts of a
//! request: `{needed}`, `{limit}`, `{remaining}`, `{subject}`, `{bound}`, `{model}`, `{format}`;
//! `{short}` is one less than `{more}`, which is the needed amount, or two; `{exceeded}` is the
//! limit, or less if no more is needed.

use super::render::{bare, legacy, typed, unwrapped};
use super::{Facts, Refusal, Shape};

/// A refusal with a fixed status and text.
#[derive(Debug, PartialEq, Eq)]
pub struct Fixed {
    pub(super) name: &'static str,
    status: u16,
    body: Body,
    message: &'static str,
    /// Selects the format of WebSockets that have their own for this family.
    pub(in crate::simulator) family: Family,
}

/// The format of the body.
#[derive(Debug, PartialEq, Eq)]
enum Body {
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

/// The subject of a refusal, as far as WebSockets distinguish it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::simulator) enum Family {
    /// Credits are missing.
    Quota,
    /// The key is not accepted.
    Key,
    /// Any other subject: the text of HTTP.
    Other,
}

const fn of(name: &'static str, status: u16, body: Body, family: Family, message: &'static str) -> Fixed {
    Fixed { name, status, body, message, family }
}

/// The table.
#[rustfmt::skip] // one refusal to a line and its message to the next
pub(in crate::simulator) const FIXED: &[Fixed] = {
    use Body::{Bare, Legacy, Typed, Unwrapped};
    use Family::{Key, Other, Quota};
    const LIBRARY: &str = "Free users cannot use library voices via the API. Please upgrade your subscription to use this voice.";
    &[
    // Credits. The figures are those of `quota` but for what is left.
    of("quota_short", 401, Typed(["invalid_request", "quota_exceeded", "quota_exceeded"]), Quota,
        "This request exceeds your quota of {limit}. You have {short} credits remaining, while {more} credits are required for this request."),
    of("quota_words", 401, Legacy("quota_exceeded"), Quota,
        "This request exceeds your quota."),
    // Yaroslavlazarenko/elevenlabs-proxy: the two figures with 402.
    of("quota_402", 402, Typed(["payment_required", "quota_exceeded", "quota_exceeded"]), Quota,
        "This request exceeds your quota of {limit}. You have {remaining} credits remaining, while {needed} credits are required for this request."),
    of("quota_slots", 401, Typed(["invalid_request", "quota_exceeded", "quota_exceeded"]), Other,
        "You have reached your quota of custom voices ({bound} / {bound}). Please delete a voice or upgrade your subscription."),

    // Keys. The text: elevenlabs-mcp#72, and as the reason of a close dograh#269.
    of("wrong_host", 401, Typed(["authentication_error", "unauthorized", "invalid_api_key"]), Key,
        "Invalid API key: The API key used is for a data residency stack, however this server is a global server. Please check you are calling the correct API URL."),
    of("unauthorized", 401, Bare, Other, "Unauthorized"),
    of("sign_in_required", 401, Typed(["authentication_error", "sign_in_required", "sign_in_required"]), Other,
        "You must be signed in to use this feature."),

    // Features that a plan lacks. dograh#290 of May 2026 has this one's `status`.
    of("library_voice", 402, Typed(["payment_required", "paid_plan_required", "payment_required"]), Other, LIBRARY),
    // OWASP/Nest#3859.
    of("payment_required_plan", 402, Legacy("payment_required"), Other, LIBRARY),
    of("free_users_not_allowed", 400, Legacy("free_users_not_allowed"), Other,
        "You need to be on the creator tier or above to use this voice."),
    of("output_format_not_allowed", 403, Typed(["authorization_error", "subscription_required", "output_format_not_allowed"]), Other,
        "Output format '{format}' is only available on the {plan} tier and above."),
    of("model_access_denied", 403, Typed(["authorization_error", "model_access_denied", "model_access_denied"]), Other,
        "You do not have access to the model '{model}'. Please upgrade your subscription."),
    of("feature_not_available", 403, Typed(["authorization_error", "feature_not_available", "feature_not_available"]), Other,
        "This feature is not available on your subscription."),
    of("only_for_creator", 403, Legacy("only_for_creator+"), Other,
        "This feature is only available on the creator tier and above."),
    of("cloning_not_allowed", 400, Typed(["payment_required", "paid_plan_required", "can_not_use_instant_voice_cloning"]), Other,
        "Your subscription does not include instant voice cloning. Please upgrade your plan."),
    of("cloning_not_allowed_402", 402, Typed(["payment_required", "paid_plan_required", "can_not_use_instant_voice_cloning"]), Other,
        "Your subscription does not include instant voice cloning. Please upgrade your plan."),
    // pipedream#10319.
    of("cloning_not_allowed_old", 400, Legacy("can_not_use_instant_voice_cloning"), Other,
        "Your subscription has no access to use instant voice cloning, please upgrade."),
    of("professional_cloning_not_allowed", 403, Typed(["authorization_error", "subscription_required", "can_not_use_professional_voice_cloning"]), Other,
        "Your subscription does not include professional voice cloning. Please upgrade your plan."),
    // mulmocast-app#1466.
    of("voice_limit_reached", 400, Legacy("voice_limit_reached"), Other,
        "You have reached your maximum amount of custom voices ({bound} / {bound}). You can upgrade your subscription to increase your custom voice limit."),
    // elevenlabs-js#233.
    of("invalid_workspace_type", 400, Legacy("invalid_workspace_type"), Other,
        "Operation not supported on legacy workspace"),
    // elevenlabs-python#107.
    of("max_character_limit_exceeded", 400, Legacy("max_character_limit_exceeded"), Other,
        "This request's text has {needed} characters and exceeds the character limit of {exceeded} characters for your subscription."),

    // Missing objects, in the older words: groq-voice#1, elevenlabs-python#293 and #163.
    of("voice_not_found_400", 400, Legacy("voice_not_found"), Other,
        "A voice for the voice_id {subject} was not found."),
    of("voice_does_not_exist", 400, Legacy("voice_does_not_exist"), Other,
        "A voice with voice_id {subject} does not exist."),
    of("invalid_uid", 400, Legacy("invalid_uid"), Other,
        "An invalid ID has been received: '{subject}'. Make sure to provide a correct one."),
    of("model_not_found_404", 404, Typed(["not_found", "model_not_found", "model_not_found"]), Other,
        "A model with model ID '{model}' was not found."),
    of("dubbing_not_found", 404, Typed(["not_found", "dubbing_not_found", "dubbing_not_found"]), Other,
        "A dubbing with ID '{subject}' was not found."),
    of("project_not_found", 404, Typed(["not_found", "project_not_found", "project_not_found"]), Other,
        "A project with ID '{subject}' was not found."),

    // The audio of a dubbing (OpenAPI document).
    of("dubbing_language_not_found", 404, Unwrapped("dubbing_not_found"), Other,
        "There is no dubbing for language {subject}."),
    of("dubbing_not_dubbed", 425, Unwrapped("dubbing_not_dubbed"), Other,
        "Dubbing has not finished yet."),
    ]
};

/// The refusal of this name, for the simulator's own decisions.
pub(in crate::simulator) fn said(name: &'static str) -> Shape {
    // Each such name is in the table; a typing mistake becomes a 500, and fails its test.
    fixed(name).unwrap_or(Shape::ServerError)
}

/// The refusal of that name.
pub(in crate::simulator) fn fixed(name: &str) -> Option<Shape> {
    FIXED.iter().find(|fixed| fixed.name == name).map(Shape::Fixed)
}

impl Fixed {
    /// The response, byte for byte.
    pub(super) fn render(&self, facts: &Facts, request_id: &str) -> Refusal {
        let message = self.message(facts);
        match self.body {
            Body::Typed(names) => typed(self.status, names, &message, request_id),
            Body::Legacy(status) => legacy(self.status, status, &message),
            Body::Bare => bare(self.status, &message),
            Body::Unwrapped(error) => unwrapped(self.status, error, &message),
        }
    }

    fn message(&self, facts: &Facts) -> String {
        let more = facts.needed.max(2);
        let plan = if facts.format.starts_with("mp3") { "Creator" } else { "Pro" };
        let figures = [
            ("{needed}", facts.needed),
            ("{limit}", facts.limit),
            ("{remaining}", facts.remaining),
            ("{short}", more - 1),
            ("{more}", more),
            ("{bound}", facts.bound),
            ("{exceeded}", facts.exceeded()),
        ];
        let words = [
            ("{plan}", plan),
            ("{model}", &facts.model),
            ("{format}", &facts.format),
            ("{subject}", &facts.subject),
        ];
        let mut message = self.message.to_owned();
        for (place, figure) in figures {
            message = message.replace(place, &figure.to_string());
        }
        for (place, word) in words {
            message = message.replace(place, word);
        }
        message
    }
}
