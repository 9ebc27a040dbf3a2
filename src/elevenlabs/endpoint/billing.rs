//! Tables of the requests that are known to cost nothing, and of those whose response lets the client use
//! the provider without the proxy.
//!
//! A request in neither table may cost credits: the API grows by dozens of paths a month, and a client
//! that has used its quota must not find a new path that still serves it.
//!
//! Source: the operations of the provider's OpenAPI document (300 paths, August 2026) and of its Python
//! SDK 2.78 that create, change or delete something and generate nothing. Left out on purpose, because a
//! model or a telephone works for them: simulations, test runs, outbound calls and messages, batch calls,
//! analyses, translation, crawling, retrieval indexes, training of voices, speaker separation, image and
//! video flows, audio native, and orders of human work.

use http::Method;

use crate::policy::charge::Billing;

/// Roots below which `DELETE`, `PATCH` and `PUT` delete or change existing resources.
const EDITED: [&str; 12] = [
    "assets",
    "audio-isolation",
    "audio-native",
    "convai",
    "dubbing",
    "history",
    "music",
    "pronunciation-dictionaries",
    "speech-engine",
    "speech-to-text",
    "studio",
    "voices",
];

/// Whether a request that changes something is known to cost nothing. `rest` are all segments after the
/// version.
pub(super) fn is_free_change(method: &Method, rest: &[&str]) -> bool {
    if [Method::DELETE, Method::PATCH, Method::PUT].contains(method) {
        return rest.first().is_some_and(|root| EDITED.contains(root));
    }
    *method == Method::POST && is_free_post(rest)
}

fn is_free_post(rest: &[&str]) -> bool {
    match rest {
        ["convai", rest @ ..] => is_free_agents_post(rest),
        // A clone takes a slot of the plan, and no credits.
        ["voices", "add" | "pvc"]
        | ["voices", "add", _, _]
        | ["voices", "pvc", _]
        | ["voices", "pvc", _, "samples" | "captcha" | "verification"]
        | ["voices", "pvc", _, "samples", _]
        | ["voices", _, "edit"]
        | ["voices", _, "settings", "edit"]
        | ["similar-voices" | "assets" | "speech-engine"]
        | ["history", "download"]
        | ["pronunciation-dictionaries", "add-from-file" | "add-from-rules"]
        | ["pronunciation-dictionaries", _, "add-rules" | "remove-rules" | "set-rules"]
        | ["workspace", "analytics", "requests"]
        | ["workspace", "analytics", "query", "usage-by-product-over-time"] => true,
        _ => false,
    }
}

/// The same for the agents platform, after `convai`.
fn is_free_agents_post(rest: &[&str]) -> bool {
    matches!(
        rest,
        ["agents", "create"]
            | ["agents", _, "avatar" | "branches" | "deployments" | "drafts" | "duplicate"]
            | ["agents", _, "branches", _, "merge" | "rebase"]
            | ["agent-testing", "create" | "folders" | "bulk-move" | "summaries"]
            | ["batch-calling", _, "cancel"]
            | ["conversations", _, "feedback" | "files" | "tags"]
            | ["environment-variables" | "mcp-servers" | "phone-numbers" | "tags" | "tools"]
            | ["mcp-servers", _, "tool-approvals" | "tool-configs"]
            | ["knowledge-base"]
            | [
                "knowledge-base",
                "text" | "url" | "file" | "folder" | "bulk-delete" | "bulk-move" | "dependent-agents",
            ]
            | ["knowledge-base", _, "move"]
            | ["knowledge-base", "crawl", _, "cancel"]
            | ["llm-usage", "calculate"]
            | ["agent", _, "llm-usage", "calculate"]
            | ["triage-tickets"]
            | ["triage-tickets", _, "comments" | "turn-comments"]
    )
}

/// Whether its response lets the client use the provider directly, past every limit of the proxy:
/// single-use tokens, signed URLs, tokens and secrets of conversations, and the address in a registered
/// call.
pub(super) fn gives_access(rest: &[&str]) -> bool {
    rest.first() == Some(&"single-use-token")
        || matches!(
            rest.last(),
            Some(&("token" | "client_secrets" | "get-signed-url" | "get_signed_url" | "register-call"))
        )
}

/// The price class of a request.
pub(super) fn billing(
    method: &Method,
    rest: &[&str],
    is_all: bool,
    is_generating: bool,
    is_safe: bool,
) -> Billing {
    if is_generating {
        return Billing::Metered;
    }
    // The token is free, but its use is not.
    if gives_access(rest) {
        return Billing::Unlisted;
    }
    if is_safe || (is_all && is_free_change(method, rest)) { Billing::Free } else { Billing::Unlisted }
}
