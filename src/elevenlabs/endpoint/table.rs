//! Lists the provider's endpoints in a table: the known properties of the requests of each path.
//!
//! To add an endpoint, add a row. The tests check that its literal segments are in `literals.rs` and its route is in
//! `routes.txt`. If its path, body or response names resources of an account, also add a row to `affinity/table.rs`.
//! The cost of an `Operation::Other` cannot be estimated, so `access.unpriced_credits` is reserved for it.
//!
//! A property is taken from the first matching row that has it, so the row for a narrower path must precede the row for
//! a wider path. For example, an endpoint may generate audio below a root whose other endpoints only manage resources.
//! The rows also determine whether a request is charged, its concurrency group, and whether a path without a version is
//! corrected.
//!
//! A request that changes something may cost credits unless a row marks it as free. The API grows by dozens of paths a
//! month, and a client that has used its quota must not be served on a new path. Requests that use a model, a telephone
//! or human work are not marked as free. These are simulations, test runs, outbound calls and messages, batch calls,
//! analyses, translation, crawling, retrieval indexes, training of voices, speaker separation, image and video flows,
//! audio native, and orders of human work.
//!
//! Sources: the provider's OpenAPI document (300 paths, August 2026), its Python SDK 2.78 and its
//! WebSocket paths.

use super::Operation;
use super::row::{ANY, EDIT, EndpointRow, POST, SOCKET, WRITE, row};
use crate::elevenlabs::socket::Dialect;

/// The reason why clients may not disable keys. The error response to the client contains this and the following
/// reasons.
const HARMS_KEYS: &str = "it could disable the key that serves every client";
/// The reason why clients may not use service accounts.
const HARMS_KEYS_OF_WORKSPACE: &str = "it could make, show or disable keys of the workspace";
/// The reason why clients may not manage the workspace.
const MANAGES_WORKSPACE: &str = "it manages the workspace that owns the keys";
/// The reason why clients may not use the secrets and settings of agents.
const MANAGES_AGENT_SECRETS: &str =
    "it reads or changes the secrets and settings of the workspace that owns the keys";

/// The rows in the order in which they are searched.
#[rustfmt::skip] // Most rows have one line.
pub(super) static ROWS: &[EndpointRow] = &[
    // Speech and other audio.
    row(SOCKET, &["text-to-speech/{id}/stream-input"]).socket(Dialect::Speech),
    row(SOCKET, &["text-to-speech/{id}/multi-stream-input"]).socket(Dialect::SpeechContexts),
    row(POST, &["text-to-speech/**"]).generates(Operation::Speech),
    row(ANY, &["text-to-speech/**"]).needs("text_to_speech", "text_to_speech"),
    row(SOCKET, &["text-to-dialogue/stream-input"]).socket(Dialect::Dialogue),
    row(SOCKET, &["text-to-dialogue/multi-stream-input"]).socket(Dialect::DialogueContexts),
    row(POST, &["text-to-dialogue/**"]).generates(Operation::Dialogue),
    row(ANY, &["text-to-dialogue/**"]).needs("text_to_speech", "text_to_speech"),
    row(POST, &["speech-to-speech/**", "voice-changer/**"]).generates(Operation::Conversion),
    row(ANY, &["speech-to-speech/**", "voice-changer/**"]).needs("speech_to_speech", "speech_to_speech"),
    row(POST, &["audio-isolation/**"]).generates(Operation::Isolation),
    row(EDIT, &["audio-isolation/**"]).free(),
    row(ANY, &["audio-isolation/**"]).needs("audio_isolation", "audio_isolation"),
    row(SOCKET, &["speech-to-text/realtime"]).socket(Dialect::Transcription),
    row(POST, &["speech-to-text/**"]).generates(Operation::Transcription),
    row(EDIT, &["speech-to-text/**"]).free(),
    row(ANY, &["speech-to-text/**"]).needs("speech_to_text", "speech_to_text"),
    row(POST, &["forced-alignment/**"]).generates(Operation::Transcription),
    row(ANY, &["forced-alignment/**"]).needs("forced_alignment", "forced_alignment"),
    row(POST, &["sound-generation/**"]).generates(Operation::SoundEffects),
    row(ANY, &["sound-generation/**"]).needs("sound_generation", "sound_generation"),
    row(POST, &["music/**"]).generates(Operation::Music),
    row(EDIT, &["music/**"]).free(),
    row(ANY, &["music/**"]).needs("music_generation", "music_generation"),
    row(POST, &["dubbing/**"]).generates(Operation::Other),
    row(EDIT, &["dubbing/**"]).free(),
    row(ANY, &["dubbing/**"]).needs("dubbing_read", "dubbing_write"),
    row(POST, &["studio/**"]).generates(Operation::Other),
    row(EDIT, &["studio/**"]).free(),
    row(ANY, &["studio/**"]).needs("projects_read", "projects_write"),
    row(EDIT, &["audio-native/**"]).free(),
    row(ANY, &["audio-native/**"]).needs("audio_native_read", "audio_native_write"),
    row(ANY, &["flows/**", "translation/**"]),

    // Voices. A clone takes a slot of the workspace and costs no credits.
    row(WRITE, &["text-to-voice"]).adds_voice(),
    row(POST, &["text-to-voice/**"]).generates(Operation::Other),
    row(ANY, &["text-to-voice/**"]).needs("voice_generation", "voice_generation"),
    row(WRITE, &["voices/add"]).adds_voice().needs("voices_read", "create_instant_voice_clone"),
    row(WRITE, &["voices/add/{id}/{id}"]).adds_voice(),
    row(WRITE, &["voices/add/**"]).needs("voices_read", "add_voice_from_voice_library"),
    row(WRITE, &["voices/pvc"]).adds_voice(),
    row(WRITE, &["voices/pvc/**"]).needs("voices_read", "create_professional_voice_clone"),
    row(POST, &[
        "voices/add", "voices/add/{id}/{id}", "voices/{id}/edit", "voices/{id}/settings/edit",
        "voices/pvc", "voices/pvc/{id}", "voices/pvc/{id}/samples", "voices/pvc/{id}/samples/{id}",
        "voices/pvc/{id}/captcha", "voices/pvc/{id}/verification",
    ]).free(),
    row(EDIT, &["voices/**"]).free(),
    row(ANY, &["voices/**"]).needs("voices_read", "voices_write"),
    row(POST, &["similar-voices"]).free(),
    row(ANY, &["shared-voices/**", "similar-voices/**"]),

    // Resources of an account.
    row(POST, &["history/download"]).free(),
    row(EDIT, &["history/**"]).free(),
    row(ANY, &["history/**"]).needs("speech_history_read", "speech_history_write"),
    row(POST, &[
        "pronunciation-dictionaries/add-from-file", "pronunciation-dictionaries/add-from-rules",
        "pronunciation-dictionaries/{id}/add-rules", "pronunciation-dictionaries/{id}/remove-rules",
        "pronunciation-dictionaries/{id}/set-rules",
    ]).free(),
    row(EDIT, &["pronunciation-dictionaries/**"]).free(),
    row(ANY, &["pronunciation-dictionaries/**"])
        .needs("pronunciation_dictionaries_read", "pronunciation_dictionaries_write"),
    row(POST, &["assets", "speech-engine"]).free(),
    row(EDIT, &["assets/**", "speech-engine/**"]).free(),
    row(ANY, &["assets/**", "speech-engine/**", "productions/**", "usage/**"]),
    row(ANY, &["models/**"]).needs("models_read", "models_write"),
    row(ANY, &["user", "user/subscription"]).returns_owner_data(),
    row(ANY, &["user/**"]).needs("user_read", "user_write"),

    // Agents.
    row(SOCKET, &["convai/conversation"]).socket(Dialect::Agent),
    row(ANY, &["convai/conversation/get-signed-url", "convai/conversation/get_signed_url"]).returns_websocket_url(),
    row(ANY, &["convai/secrets/**", "convai/settings/**"]).denied(MANAGES_AGENT_SECRETS),
    row(POST, &[
        "convai/agents/create", "convai/agents/{id}/avatar", "convai/agents/{id}/branches",
        "convai/agents/{id}/deployments", "convai/agents/{id}/drafts", "convai/agents/{id}/duplicate",
        "convai/agents/{id}/branches/{id}/merge", "convai/agents/{id}/branches/{id}/rebase",
        "convai/agent-testing/create", "convai/agent-testing/folders", "convai/agent-testing/bulk-move",
        "convai/agent-testing/summaries", "convai/batch-calling/{id}/cancel",
        "convai/conversations/{id}/feedback", "convai/conversations/{id}/files",
        "convai/conversations/{id}/tags", "convai/environment-variables", "convai/mcp-servers",
        "convai/mcp-servers/{id}/tool-approvals", "convai/mcp-servers/{id}/tool-configs",
        "convai/phone-numbers", "convai/tags", "convai/tools", "convai/knowledge-base",
        "convai/knowledge-base/text", "convai/knowledge-base/url", "convai/knowledge-base/file",
        "convai/knowledge-base/folder", "convai/knowledge-base/bulk-delete",
        "convai/knowledge-base/bulk-move", "convai/knowledge-base/dependent-agents",
        "convai/knowledge-base/{id}/move", "convai/knowledge-base/crawl/{id}/cancel",
        "convai/llm-usage/calculate", "convai/agent/{id}/llm-usage/calculate",
        "convai/triage-tickets", "convai/triage-tickets/{id}/comments",
        "convai/triage-tickets/{id}/turn-comments",
    ]).free(),
    row(EDIT, &["convai/**"]).free(),
    row(ANY, &["convai/**"]).needs("convai_read", "convai_write"),

    // The workspace and its tokens.
    row(ANY, &["single-use-token/**"]).grants_direct_access(),
    row(ANY, &["workspaces/api-keys/**"]).denied(HARMS_KEYS),
    row(ANY, &["service-accounts/**"]).denied(HARMS_KEYS_OF_WORKSPACE),
    row(ANY, &[
        "workspace/members/**", "workspace/invites/**", "workspace/groups/**", "workspace/webhooks/**",
        "workspace/auth-connections/**", "workspace/audit-logs/**",
        "workspace/resources/{id}/share/**", "workspace/resources/{id}/unshare/**",
    ]).denied(MANAGES_WORKSPACE),
    row(POST, &["workspace/analytics/requests", "workspace/analytics/query/usage-by-product-over-time"]).free(),
    row(ANY, &["workspace/**", "workspaces/**"]),
];

/// The last segments of paths whose response lets the client use the provider without Keychoir and its limits. The
/// responses contain tokens or secrets of conversations, signed URLs, or the address of a registered call.
pub(super) const DIRECT_ACCESS_ENDINGS: [&str; 5] =
    ["token", "client_secrets", "get-signed-url", "get_signed_url", "register-call"];
