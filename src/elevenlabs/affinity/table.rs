//! The resources that belong to one account, and where their identifiers appear: one row per resource of
//! the provider, from its OpenAPI document (August 2026) and its Python SDK 2.78.
//!
//! Paths are without the version. `{kind}` is an identifier of that kind, `*` any segment; a pattern also
//! matches longer paths that begin with it. Identifiers in responses are listed by whole routes, in which
//! every identifier is `{id}`.

use super::fields::Field;
use super::kind::Kind;

mod agents;

/// A kind of resource, with the places of its identifiers.
#[derive(Debug)]
pub(super) struct ResourceRow {
    /// The name of the resource.
    #[cfg_attr(not(test), expect(dead_code, reason = "for readers, and for the test that walks the table"))]
    pub(super) resource: &'static str,
    /// Patterns of request paths.
    pub(super) paths: &'static [&'static str],
    /// Query parameters of requests.
    pub(super) query: &'static [Field],
    /// Fields of request bodies.
    pub(super) body: &'static [Field],
    /// Headers of responses.
    pub(super) headers: &'static [Field],
    /// Fields of responses to requests that create one, by route.
    pub(super) created: &'static [Made],
    /// Fields of responses that list them, by route.
    pub(super) lists: &'static [Made],
}

/// Routes and the fields of their responses.
pub(super) type Made = (&'static [&'static str], &'static [Field]);

const ROW: ResourceRow =
    ResourceRow { resource: "", paths: &[], query: &[], body: &[], headers: &[], created: &[], lists: &[] };

/// The whole table: first media, then agents and the account.
pub(super) fn rows() -> impl Iterator<Item = &'static ResourceRow> + Clone {
    MEDIA.iter().chain(agents::ROWS)
}

#[rustfmt::skip] // a table
static MEDIA: &[ResourceRow] = &[
    ResourceRow {
        resource: "voice",
        paths: &[
            "voices/{voice}", "voices/pvc/{voice}", "text-to-speech/{voice}", "speech-to-speech/{voice}",
            "voice-changer/{voice}", "text-to-voice/{voice}/remix",
        ],
        query: &[("voice_id", Kind::Voice), ("voice_ids", Kind::Voice)],
        body: &[
            ("voice_id", Kind::Voice), ("default_title_voice_id", Kind::Voice),
            ("default_paragraph_voice_id", Kind::Voice), ("host_voice_id", Kind::Voice),
            ("guest_voice_id", Kind::Voice), ("voices", Kind::Voice),
        ],
        created: &[(
            &["voices/add", "voices/add/{id}/{id}", "voices/pvc", "text-to-voice"],
            &[(".voice_id", Kind::Voice)],
        )],
        lists: &[(&["voices"], &[("voices.voice_id", Kind::Voice)])],
        ..ROW
    },
    ResourceRow {
        resource: "voice sample",
        paths: &["voices/*/samples/{sample}", "voices/pvc/*/samples/{sample}"],
        created: &[(
            &["voices/pvc/{id}/samples", "voices/add", "text-to-voice"],
            &[(".sample_id", Kind::Sample), ("samples.sample_id", Kind::Sample)],
        )],
        lists: &[(&["voices"], &[("samples.sample_id", Kind::Sample)])],
        ..ROW
    },
    ResourceRow {
        resource: "voice preview",
        paths: &["text-to-voice/{voice preview}/stream"],
        body: &[
            ("generated_voice_id", Kind::Preview), ("played_not_selected_voice_ids", Kind::Preview),
            ("remixing_session_id", Kind::Preview),
        ],
        created: &[(
            &["text-to-voice/design", "text-to-voice/create-previews", "text-to-voice/{id}/remix"],
            &[("previews.generated_voice_id", Kind::Preview), ("remixing_session_id", Kind::Preview)],
        )],
        ..ROW
    },
    ResourceRow {
        resource: "voice collection",
        paths: &["voices/collections/{voice collection}"],
        query: &[("collection_id", Kind::Collection)],
        body: &[("collection_id", Kind::Collection)],
        created: &[(&["voices/collections"], &[(".collection_id", Kind::Collection), (".id", Kind::Collection)])],
        lists: &[(&["voices/collections"], &[
            ("collections.collection_id", Kind::Collection), ("collections.id", Kind::Collection),
        ])],
        ..ROW
    },
    ResourceRow {
        resource: "history item",
        paths: &["history/{history item}", "audio-isolation/history/{history item}"],
        query: &[("start_after_history_item_id", Kind::HistoryItem)],
        body: &[("history_item_ids", Kind::HistoryItem), ("history_item_id", Kind::HistoryItem)],
        headers: &[("history-item-id", Kind::HistoryItem)],
        lists: &[(&["history", "audio-isolation/history"], &[
            ("history.history_item_id", Kind::HistoryItem), (".last_history_item_id", Kind::HistoryItem),
        ])],
        ..ROW
    },
    ResourceRow {
        resource: "request (stitching)",
        body: &[("previous_request_ids", Kind::Request), ("next_request_ids", Kind::Request)],
        headers: &[("request-id", Kind::Request)],
        lists: &[(&["history"], &[("history.request_id", Kind::Request)])],
        ..ROW
    },
    ResourceRow {
        resource: "pronunciation dictionary",
        paths: &[
            "pronunciation-dictionaries/{pronunciation dictionary}",
            "pronunciation-dictionaries/*/{pronunciation dictionary}/download",
        ],
        body: &[
            ("pronunciation_dictionary_id", Kind::Dictionary),
            ("pronunciation_dictionary_locators.version_id", Kind::Dictionary),
        ],
        created: &[(
            &[
                "pronunciation-dictionaries/add-from-file", "pronunciation-dictionaries/add-from-rules",
                "pronunciation-dictionaries/{id}/add-rules", "pronunciation-dictionaries/{id}/remove-rules",
                "pronunciation-dictionaries/{id}/set-rules",
            ],
            &[(".id", Kind::Dictionary), (".version_id", Kind::Dictionary)],
        )],
        lists: &[(&["pronunciation-dictionaries"], &[
            ("pronunciation_dictionaries.id", Kind::Dictionary),
            ("pronunciation_dictionaries.latest_version_id", Kind::Dictionary),
        ])],
        ..ROW
    },
    ResourceRow {
        resource: "dubbing",
        paths: &["dubbing/{dubbing}", "dubbing/resource/{dubbing}", "dubbing/project/{project}"],
        body: &[("dubbing_id", Kind::Dubbing)],
        created: &[
            (&["dubbing"], &[(".dubbing_id", Kind::Dubbing)]),
            (&["dubbing/project"], &[(".project_id", Kind::Project)]),
        ],
        lists: &[
            (&["dubbing"], &[("dubs.dubbing_id", Kind::Dubbing)]),
            (&["dubbing/project"], &[("project_id", Kind::Project)]),
            (&["dubbing/project/{id}/language"], &[]),
        ],
        ..ROW
    },
    ResourceRow {
        resource: "studio project",
        paths: &[
            "studio/projects/{project}", "studio/projects/*/chapters/{chapter}",
            "studio/projects/*/chapters/*/snapshots/{snapshot}", "studio/projects/*/snapshots/{snapshot}",
        ],
        query: &[("project_id", Kind::Project)],
        body: &[
            ("project_id", Kind::Project), ("chapter_id", Kind::Chapter), ("from_chapter_id", Kind::Chapter),
            ("project_snapshot_id", Kind::Snapshot), ("chapter_snapshot_id", Kind::Snapshot),
        ],
        created: &[
            (&["studio/projects", "studio/podcasts", "studio/projects/{id}", "studio/projects/{id}/content"], &[
                ("project.project_id", Kind::Project), ("chapters.chapter_id", Kind::Chapter),
            ]),
            (&["studio/projects/{id}/chapters", "studio/projects/{id}/chapters/{id}"], &[
                ("chapter.chapter_id", Kind::Chapter),
            ]),
        ],
        lists: &[
            (&["studio/projects"], &[("projects.project_id", Kind::Project)]),
            (&["studio/projects/{id}/chapters"], &[("chapters.chapter_id", Kind::Chapter)]),
            (&["studio/projects/{id}/snapshots", "studio/projects/{id}/chapters/{id}/snapshots"], &[
                ("snapshots.project_snapshot_id", Kind::Snapshot), ("snapshots.chapter_snapshot_id", Kind::Snapshot),
            ]),
        ],
        ..ROW
    },
    ResourceRow {
        resource: "audio native",
        paths: &["audio-native/{project}"],
        created: &[(&["audio-native", "audio-native/content"], &[(".project_id", Kind::Project)])],
        ..ROW
    },
    ResourceRow {
        resource: "transcript",
        paths: &["speech-to-text/transcripts/{transcript}"],
        body: &[("transcription_id", Kind::Transcript)],
        created: &[(&["speech-to-text"], &[("transcription_id", Kind::Transcript)])],
        ..ROW
    },
    ResourceRow {
        resource: "asset / flow",
        paths: &[
            "assets/{asset}", "flows/image/{flow}", "flows/video/{flow}", "flows/text-to-speech/{flow}",
        ],
        body: &[("asset_id", Kind::Asset), ("generation_id", Kind::Flow)],
        created: &[
            (&["assets"], &[(".asset_id", Kind::Asset)]),
            (&["flows/image", "flows/video", "flows/text-to-speech"], &[(".id", Kind::Flow)]),
        ],
        lists: &[
            (&["assets"], &[("assets.asset_id", Kind::Asset)]),
            (&["flows/image", "flows/video", "flows/text-to-speech"], &[("generations.id", Kind::Flow)]),
        ],
        ..ROW
    },
    ResourceRow {
        resource: "music",
        paths: &["music/finetunes/{finetune}"],
        body: &[
            ("song_id", Kind::Song), ("finetune_id", Kind::Finetune), ("stem_variation_id", Kind::Song),
        ],
        headers: &[("song-id", Kind::Song)],
        created: &[
            (&["music/upload", "music"], &[(".song_id", Kind::Song)]),
            (&["music/finetunes"], &[(".id", Kind::Finetune)]),
        ],
        lists: &[(&["music/finetunes"], &[("finetunes.id", Kind::Finetune)])],
        ..ROW
    },
];

/// The fields of a list response that contain its next cursor.
pub(super) const CURSORS: [Field; 4] = [
    (".next_page_token", Kind::Cursor),
    (".next_cursor", Kind::Cursor),
    (".cursor", Kind::Cursor),
    (".last_sort_id", Kind::Cursor),
];

/// Routes whose response differs from account to account and contains no identifiers.
pub(super) const ACCOUNT_READS: [&str; 4] =
    ["user", "user/subscription", "usage/character-stats", "convai/analytics/live-count"];
