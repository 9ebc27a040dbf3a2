//! Lists the resources of the provider that belong to one account, in a table with one row per resource or group of
//! related resources. A row lists the paths, parameters, fields and headers that contain identifiers of the resource.
//! Two constants list the fields with the cursors of lists, and the routes whose response describes the account.
//!
//! Paths have no version. `{kind}` is an identifier of that kind, and `*` is any segment that is not a literal of the
//! API. The path of a request may be longer than the pattern. Fields of responses are listed by whole routes, in which
//! every identifier is `{id}`.
//!
//! Sources: the provider's OpenAPI document (August 2026) and its Python SDK 2.78.

use super::fields::IdentifierField;
use super::kind::ResourceKind;

mod agents;

/// A resource or a group of resources, and the locations of their identifiers in requests and responses.
#[derive(Debug)]
pub(super) struct ResourceRow {
    /// The name of the resource, or the names of the resources of a group.
    #[cfg_attr(not(test), expect(dead_code, reason = "only the tests of the table read the name"))]
    pub(super) resource: &'static str,
    /// The patterns of request paths that contain identifiers.
    pub(super) paths: &'static [&'static str],
    /// The query parameters of requests that contain identifiers.
    pub(super) query: &'static [IdentifierField],
    /// The fields of request bodies that contain identifiers.
    pub(super) body: &'static [IdentifierField],
    /// The headers of responses that contain identifiers.
    pub(super) headers: &'static [IdentifierField],
    /// The fields of responses to requests that create or change the resource.
    pub(super) created: &'static [RouteFields],
    /// The fields of responses to `GET` requests that list the resource, or that return a new token or signed URL.
    pub(super) lists: &'static [RouteFields],
}

/// Routes, and the fields of their responses that contain identifiers.
pub(super) type RouteFields = (&'static [&'static str], &'static [IdentifierField]);

/// A row without locations, from which the other rows take their empty parts.
const EMPTY_ROW: ResourceRow =
    ResourceRow { resource: "", paths: &[], query: &[], body: &[], headers: &[], created: &[], lists: &[] };

/// Returns all rows: first the rows below, and then the rows of the module `agents`.
pub(super) fn rows() -> impl Iterator<Item = &'static ResourceRow> + Clone {
    MEDIA.iter().chain(agents::ROWS)
}

/// The rows of voices, history, pronunciation dictionaries, dubbing, the studio, transcripts, assets, flows and music.
#[rustfmt::skip] // Each line has several fields.
static MEDIA: &[ResourceRow] = &[
    ResourceRow {
        resource: "voice",
        paths: &[
            "voices/{voice}", "voices/pvc/{voice}", "text-to-speech/{voice}", "speech-to-speech/{voice}",
            "voice-changer/{voice}", "text-to-voice/{voice}/remix",
        ],
        query: &[("voice_id", ResourceKind::Voice), ("voice_ids", ResourceKind::Voice)],
        body: &[
            ("voice_id", ResourceKind::Voice), ("default_title_voice_id", ResourceKind::Voice),
            ("default_paragraph_voice_id", ResourceKind::Voice), ("host_voice_id", ResourceKind::Voice),
            ("guest_voice_id", ResourceKind::Voice), ("voices", ResourceKind::Voice),
        ],
        created: &[(
            &["voices/add", "voices/add/{id}/{id}", "voices/pvc", "text-to-voice"],
            &[(".voice_id", ResourceKind::Voice)],
        )],
        lists: &[(&["voices"], &[("voices.voice_id", ResourceKind::Voice)])],
        ..EMPTY_ROW
    },
    ResourceRow {
        resource: "voice sample",
        paths: &["voices/*/samples/{sample}", "voices/pvc/*/samples/{sample}"],
        created: &[(
            &["voices/pvc/{id}/samples", "voices/add", "text-to-voice"],
            &[(".sample_id", ResourceKind::Sample), ("samples.sample_id", ResourceKind::Sample)],
        )],
        lists: &[(&["voices"], &[("samples.sample_id", ResourceKind::Sample)])],
        ..EMPTY_ROW
    },
    ResourceRow {
        resource: "voice preview",
        paths: &["text-to-voice/{voice preview}/stream"],
        body: &[
            ("generated_voice_id", ResourceKind::Preview), ("played_not_selected_voice_ids", ResourceKind::Preview),
            ("remixing_session_id", ResourceKind::Preview),
        ],
        created: &[(
            &["text-to-voice/design", "text-to-voice/create-previews", "text-to-voice/{id}/remix"],
            &[("previews.generated_voice_id", ResourceKind::Preview), ("remixing_session_id", ResourceKind::Preview)],
        )],
        ..EMPTY_ROW
    },
    ResourceRow {
        resource: "voice collection",
        paths: &["voices/collections/{voice collection}"],
        query: &[("collection_id", ResourceKind::Collection)],
        body: &[("collection_id", ResourceKind::Collection)],
        created: &[(&["voices/collections"], &[
            (".collection_id", ResourceKind::Collection), (".id", ResourceKind::Collection),
        ])],
        lists: &[(&["voices/collections"], &[
            ("collections.collection_id", ResourceKind::Collection), ("collections.id", ResourceKind::Collection),
        ])],
        ..EMPTY_ROW
    },
    ResourceRow {
        resource: "history item",
        paths: &["history/{history item}", "audio-isolation/history/{history item}"],
        query: &[("start_after_history_item_id", ResourceKind::HistoryItem)],
        body: &[("history_item_ids", ResourceKind::HistoryItem), ("history_item_id", ResourceKind::HistoryItem)],
        headers: &[("history-item-id", ResourceKind::HistoryItem)],
        lists: &[(&["history", "audio-isolation/history"], &[
            ("history.history_item_id", ResourceKind::HistoryItem),
            (".last_history_item_id", ResourceKind::HistoryItem),
        ])],
        ..EMPTY_ROW
    },
    ResourceRow {
        resource: "request (stitching)",
        body: &[("previous_request_ids", ResourceKind::Request), ("next_request_ids", ResourceKind::Request)],
        headers: &[("request-id", ResourceKind::Request)],
        lists: &[(&["history"], &[("history.request_id", ResourceKind::Request)])],
        ..EMPTY_ROW
    },
    ResourceRow {
        resource: "pronunciation dictionary",
        paths: &[
            "pronunciation-dictionaries/{pronunciation dictionary}",
            "pronunciation-dictionaries/*/{pronunciation dictionary}/download",
        ],
        body: &[
            ("pronunciation_dictionary_id", ResourceKind::Dictionary),
            ("pronunciation_dictionary_locators.version_id", ResourceKind::Dictionary),
        ],
        created: &[(
            &[
                "pronunciation-dictionaries/add-from-file", "pronunciation-dictionaries/add-from-rules",
                "pronunciation-dictionaries/{id}/add-rules", "pronunciation-dictionaries/{id}/remove-rules",
                "pronunciation-dictionaries/{id}/set-rules",
            ],
            &[(".id", ResourceKind::Dictionary), (".version_id", ResourceKind::Dictionary)],
        )],
        lists: &[(&["pronunciation-dictionaries"], &[
            ("pronunciation_dictionaries.id", ResourceKind::Dictionary),
            ("pronunciation_dictionaries.latest_version_id", ResourceKind::Dictionary),
        ])],
        ..EMPTY_ROW
    },
    ResourceRow {
        resource: "dubbing",
        paths: &["dubbing/{dubbing}", "dubbing/resource/{dubbing}", "dubbing/project/{project}"],
        body: &[("dubbing_id", ResourceKind::Dubbing)],
        created: &[
            (&["dubbing"], &[(".dubbing_id", ResourceKind::Dubbing)]),
            (&["dubbing/project"], &[(".project_id", ResourceKind::Project)]),
        ],
        lists: &[
            (&["dubbing"], &[("dubs.dubbing_id", ResourceKind::Dubbing)]),
            (&["dubbing/project"], &[("project_id", ResourceKind::Project)]),
            (&["dubbing/project/{id}/language"], &[]),
        ],
        ..EMPTY_ROW
    },
    ResourceRow {
        resource: "studio project",
        paths: &[
            "studio/projects/{project}", "studio/projects/*/chapters/{chapter}",
            "studio/projects/*/chapters/*/snapshots/{snapshot}", "studio/projects/*/snapshots/{snapshot}",
        ],
        query: &[("project_id", ResourceKind::Project)],
        body: &[
            ("project_id", ResourceKind::Project), ("chapter_id", ResourceKind::Chapter),
            ("from_chapter_id", ResourceKind::Chapter),
            ("project_snapshot_id", ResourceKind::Snapshot), ("chapter_snapshot_id", ResourceKind::Snapshot),
        ],
        created: &[
            (&["studio/projects", "studio/podcasts", "studio/projects/{id}", "studio/projects/{id}/content"], &[
                ("project.project_id", ResourceKind::Project), ("chapters.chapter_id", ResourceKind::Chapter),
            ]),
            (&["studio/projects/{id}/chapters", "studio/projects/{id}/chapters/{id}"], &[
                ("chapter.chapter_id", ResourceKind::Chapter),
            ]),
        ],
        lists: &[
            (&["studio/projects"], &[("projects.project_id", ResourceKind::Project)]),
            (&["studio/projects/{id}/chapters"], &[("chapters.chapter_id", ResourceKind::Chapter)]),
            (&["studio/projects/{id}/snapshots", "studio/projects/{id}/chapters/{id}/snapshots"], &[
                ("snapshots.project_snapshot_id", ResourceKind::Snapshot),
                ("snapshots.chapter_snapshot_id", ResourceKind::Snapshot),
            ]),
        ],
        ..EMPTY_ROW
    },
    ResourceRow {
        resource: "audio native",
        paths: &["audio-native/{project}"],
        created: &[(&["audio-native", "audio-native/content"], &[(".project_id", ResourceKind::Project)])],
        ..EMPTY_ROW
    },
    ResourceRow {
        resource: "transcript",
        paths: &["speech-to-text/transcripts/{transcript}"],
        body: &[("transcription_id", ResourceKind::Transcript)],
        created: &[(&["speech-to-text"], &[("transcription_id", ResourceKind::Transcript)])],
        ..EMPTY_ROW
    },
    ResourceRow {
        resource: "asset / flow",
        paths: &[
            "assets/{asset}", "flows/image/{flow}", "flows/video/{flow}", "flows/text-to-speech/{flow}",
        ],
        body: &[("asset_id", ResourceKind::Asset), ("generation_id", ResourceKind::Flow)],
        created: &[
            (&["assets"], &[(".asset_id", ResourceKind::Asset)]),
            (&["flows/image", "flows/video", "flows/text-to-speech"], &[(".id", ResourceKind::Flow)]),
        ],
        lists: &[
            (&["assets"], &[("assets.asset_id", ResourceKind::Asset)]),
            (&["flows/image", "flows/video", "flows/text-to-speech"], &[("generations.id", ResourceKind::Flow)]),
        ],
        ..EMPTY_ROW
    },
    ResourceRow {
        resource: "music",
        paths: &["music/finetunes/{finetune}"],
        body: &[
            ("song_id", ResourceKind::Song), ("finetune_id", ResourceKind::Finetune),
            ("stem_variation_id", ResourceKind::Song),
        ],
        headers: &[("song-id", ResourceKind::Song)],
        created: &[
            (&["music/upload", "music"], &[(".song_id", ResourceKind::Song)]),
            (&["music/finetunes"], &[(".id", ResourceKind::Finetune)]),
        ],
        lists: &[(&["music/finetunes"], &[("finetunes.id", ResourceKind::Finetune)])],
        ..EMPTY_ROW
    },
];

/// The fields of a list response that contain its next cursor.
pub(super) const CURSORS: [IdentifierField; 4] = [
    (".next_page_token", ResourceKind::Cursor),
    (".next_cursor", ResourceKind::Cursor),
    (".cursor", ResourceKind::Cursor),
    (".last_sort_id", ResourceKind::Cursor),
];

/// Routes whose response describes the account and contains no identifiers.
pub(super) const ACCOUNT_READS: RouteFields =
    (&["user", "user/subscription", "usage/character-stats", "convai/analytics/live-count"], &[]);
