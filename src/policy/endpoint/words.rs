//! The segments that are part of a path's shape and not an identifier: those of the provider's
//! OpenAPI document (300 paths, August 2026), of its Python SDK 2.78 and of its socket paths.

/// Whether `segment`, lower case, is a fixed part of some path of the API.
pub(in crate::policy) fn is_literal(segment: &str) -> bool {
    LITERALS.binary_search(&segment).is_ok()
}

#[rustfmt::skip]
const LITERALS: [&str; 229] = [
    "accents", "add", "add-bulk", "add-from-file", "add-from-rules", "add-rules", "agent", "agent-testing",
    "agents", "analysis", "analysis-items", "analytics", "api-keys", "approval-policy", "archive", "assets",
    "assignable-users", "audio", "audio-effects", "audio-isolation", "audio-native", "audit-logs",
    "auth-connections", "avatar", "batch-calling", "branches", "bulk-delete", "bulk-move", "calculate",
    "cancel", "captcha", "catalog", "chapters", "character-stats", "chunk", "chunks", "client_secrets",
    "collections", "comments", "compile", "content", "convai", "conversation", "conversations", "convert",
    "crawl", "create", "create-previews", "dashboard", "default", "deliverables", "dependencies",
    "dependent-agents", "deployments", "design", "detailed", "disable", "docs", "download", "draft",
    "drafts", "dub", "dubbing", "duplicate", "edit", "environment-variables", "environments", "evaluations",
    "executions", "exotel", "export", "feedback", "file", "files", "finetunes", "flows", "folder",
    "folders", "forced-alignment", "format", "get-signed-url", "get_signed_url", "groups", "history",
    "hold-audio", "image", "invites", "items", "knowledge-base", "language", "languages", "link", "list",
    "live", "live-count", "llm", "llm-usage", "mcp-servers", "media", "members", "merge", "merge-preview",
    "merge-proposals", "messages", "migrate-segments", "models", "monitor", "move", "multi-stream-input",
    "music", "muted-tracks", "orders", "outbound-call", "outbound-campaigns", "outbound-message",
    "phone-numbers", "plan", "podcasts", "procedures", "productions", "project", "projects",
    "pronunciation-dictionaries", "pvc", "query", "rag-index", "rag-query", "realtime", "rebase",
    "rebase-preview", "refresh", "regenerate", "register-call", "remix", "remove", "remove-rules", "render",
    "replicate-to-isolated-environment", "requests", "resolve", "resource", "resources", "resubmit",
    "retry", "run", "run-tests", "samples", "search", "secrets", "segment", "segments", "separate-speakers",
    "service-accounts", "set-rules", "settings", "share", "shared-voices", "similar-voices",
    "simulate-conversation", "single-use-token", "sip-messages", "sip-trunk", "size", "smart-search",
    "snapshots", "sound-generation", "source-file-url", "speaker", "speakers", "speech-engine",
    "speech-to-speech", "speech-to-text", "stem-separation", "stream", "stream-input", "studio", "submit",
    "subscription", "summaries", "summary", "tags", "templates", "test-invocations", "text", "text-search",
    "text-to-dialogue", "text-to-speech", "text-to-voice", "third-party-disabling", "token",
    "tool-approvals", "tool-configs", "tools", "topics", "train", "transcribe", "transcript", "transcripts",
    "translate", "translation", "triage-tickets", "turn-comments", "twilio", "unshare", "update-file",
    "upload", "url", "usage", "usage-by-product-over-time", "usage-limit", "user", "users", "v1", "v2",
    "v3", "verification", "versions", "video", "video-to-music", "voice-changer", "voices", "waveform",
    "webhooks", "whatsapp", "whatsapp-accounts", "widget", "with-timestamps", "workspace", "workspaces",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_are_sorted_for_the_search() {
        assert!(LITERALS.is_sorted_by(|a, b| a < b));
    }
}
