//! Stores the refusals that restrictions are computed from: a row per active restriction, with the
//! refusal as JSON, because it is read as a whole, also by operators who debug. The resulting
//! restrictions are not stored, because a later version may derive others.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use rusqlite::{Connection, Transaction, params};
use serde::{Deserialize, Serialize};

use super::columns::{timestamp, whole};
use super::source::StoredSource;
use crate::elevenlabs::affinity::Tag;
use crate::elevenlabs::endpoint::Route;
use crate::elevenlabs::features::RequestFeatures;
use crate::policy::permission::Permission;
use crate::policy::replay::Effect;
use crate::policy::units::UnixMs;
use crate::policy::verdict::{Refusal, Shortfall, Subject, Verdict};
use crate::pool::{Earlier, OwnerId, RESTRICTIONS_MAX, RefusalRecord, Restriction, Restrictions};
use crate::secret::Fingerprint;

/// The migration that adds the table.
pub(super) const TABLE: &str = "
    -- The refusals that restrict plans, workspaces and keys: at most 1,024 rows.
    CREATE TABLE refusals (
        -- number of the restriction in the run of the program that wrote it
        number INTEGER PRIMARY KEY,
        refused_at_ms INTEGER NOT NULL,
        -- JSON
        refusal TEXT NOT NULL
    ) STRICT;

    -- The name of the plan of its workspace, if the provider has reported it.
    ALTER TABLE keys ADD COLUMN plan TEXT;
    ";

/// Tracks which of the pool's restrictions are in the file.
#[derive(Debug, Default)]
pub(super) struct RefusalRows {
    /// `None` while that is unknown: the next write then replaces all rows.
    written: Option<Rows>,
    next: Option<RefusalChange>,
}

/// A written state of the rows.
#[derive(Debug)]
struct Rows {
    /// The version of the pool's restrictions that was written.
    version: u64,
    numbers: HashSet<u64>,
    /// When the first of them ends.
    ends_at: Option<UnixMs>,
}

/// The change that the next transaction writes.
#[derive(Debug)]
struct RefusalChange {
    /// The numbers to delete; `None` for all.
    removed: Option<Vec<u64>>,
    added: Vec<Restriction>,
    rows: Rows,
}

impl RefusalRows {
    /// Whether the file lacks the restrictions that hold at `now`.
    pub(super) fn are_stale(&self, restrictions: &Restrictions, now: UnixMs) -> bool {
        self.written.as_ref().is_none_or(|rows| {
            rows.version != restrictions.version() || rows.ends_at.is_some_and(|ends_at| ends_at <= now)
        })
    }

    /// Computes the change to be written at `now`.
    pub(super) fn prepare(&mut self, restrictions: &Restrictions, now: UnixMs) {
        self.next = self.are_stale(restrictions, now).then(|| {
            // The version is read before the restrictions: a change in between is written next
            // time.
            let version = restrictions.version();
            let mut added = restrictions.all(now);
            let rows = Rows {
                version,
                numbers: added.iter().map(|held| held.number).collect(),
                ends_at: added.iter().map(|held| held.until).min(),
            };
            let written = self.written.as_ref().map(|rows| &rows.numbers);
            added.retain(|held| written.is_none_or(|numbers| !numbers.contains(&held.number)));
            let removed = written.map(|numbers| numbers.difference(&rows.numbers).copied().collect());
            RefusalChange { removed, added, rows }
        });
    }

    /// Writes the prepared change.
    pub(super) fn write(&self, transaction: &Transaction<'_>) -> Result<(), rusqlite::Error> {
        let Some(RefusalChange { removed, added, .. }) = &self.next else { return Ok(()) };
        match removed {
            None => transaction.execute_batch("DELETE FROM refusals")?,
            Some(numbers) => {
                let mut delete = transaction.prepare_cached("DELETE FROM refusals WHERE number = ?1")?;
                for number in numbers {
                    delete.execute([whole(*number)])?;
                }
            }
        }
        let mut insert = transaction.prepare_cached("INSERT INTO refusals VALUES (?1, ?2, ?3)")?;
        for held in added {
            insert.execute(params![whole(held.number), timestamp(held.refused_at), text(&held.record)])?;
        }
        Ok(())
    }

    /// Marks the prepared change as committed.
    pub(super) fn written(&mut self) {
        if let Some(RefusalChange { rows, .. }) = self.next.take() {
            self.written = Some(rows);
        }
    }

    /// Forgets the written state, after a transaction that failed or whose outcome is unknown.
    pub(super) fn forget(&mut self) {
        *self = Self::default();
    }
}

/// All refusals, the oldest first. An unreadable row is skipped: the provider refuses again.
pub(super) fn read(connection: &Connection) -> Result<Vec<RefusalRecord>, rusqlite::Error> {
    let mut statement = connection.prepare("SELECT refusal FROM refusals ORDER BY number DESC LIMIT ?1")?;
    let rows = statement.query_map([whole(RESTRICTIONS_MAX as u64)], |row| row.get::<_, String>(0))?;
    let mut records: Vec<RefusalRecord> =
        rows.filter_map(|row| row.map(|text| record(&text)).transpose()).collect::<Result<_, _>>()?;
    records.reverse();
    Ok(records)
}

#[derive(Serialize, Deserialize)]
struct RefusalDocument {
    key: String,
    workspace: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    plan: Option<String>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    of_plan: bool,
    verdict: VerdictDocument,
    at_ms: u64,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    agreed: bool,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    in_concurrency_group: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    earlier: Option<EarlierDocument>,
    request: FeaturesDocument,
    #[serde(default)]
    source: StoredSource,
}

/// A verdict, with the details that classification found in the response.
#[derive(Default, Serialize, Deserialize)]
struct VerdictDocument {
    word: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    about: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    permission: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    retry_after_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    maximum: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    left: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    required: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    quota: Option<u64>,
}

#[derive(Serialize, Deserialize)]
struct EarlierDocument {
    since_ms: u64,
    #[serde(default)]
    from_characters: u64,
}

/// What the request needed.
#[derive(Serialize, Deserialize)]
struct FeaturesDocument {
    route: String,
    has_effect: bool,
    /// The hash of the voice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    voice: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    model: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    output_format: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    characters: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    permission: Option<String>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    adds_voice: bool,
}

/// Serializes a refusal for its row.
fn text(record: &RefusalRecord) -> String {
    let RefusalRecord { features, source, .. } = record;
    let document = RefusalDocument {
        key: record.key.to_string(),
        workspace: record.workspace.word().to_owned(),
        plan: record.tier.as_deref().map(str::to_owned),
        of_plan: record.is_of_plan,
        verdict: verdict_document(record.verdict),
        at_ms: record.at.0,
        agreed: record.is_agreed,
        in_concurrency_group: record.is_in_group,
        earlier: record.earlier.map(|earlier| EarlierDocument {
            since_ms: earlier.since.0,
            from_characters: earlier.from_characters,
        }),
        request: FeaturesDocument {
            route: features.route.to_string(),
            has_effect: features.effect == Effect::Some,
            voice: features.voice.map(|voice| format!("{:032x}", u128::from_be_bytes(*voice.bytes()))),
            model: features.model.as_deref().map(str::to_owned),
            output_format: features.output_format.as_deref().map(str::to_owned),
            characters: features.characters,
            permission: features.permission.map(|permission| permission.name().to_owned()),
            adds_voice: features.adds_voice,
        },
        source: StoredSource::from(&**source),
    };
    // Numbers and strings always serialize.
    serde_json::to_string(&document).unwrap_or_else(|_| "{}".to_owned())
}

/// Parses a row; `None` if it is unreadable.
fn record(text: &str) -> Option<RefusalRecord> {
    let document: RefusalDocument = serde_json::from_str(text).ok()?;
    let FeaturesDocument { voice, permission, .. } = &document.request;
    let voice = match voice {
        Some(digits) => Some(Tag::of_bytes(u128::from_str_radix(digits, 16).ok()?.to_be_bytes())),
        None => None,
    };
    let permission = match permission {
        Some(name) => Some(Permission::parse(name)?),
        None => None,
    };
    Some(RefusalRecord {
        key: Fingerprint::parse(&document.key)?,
        workspace: OwnerId::of_word(&document.workspace),
        tier: document.plan.map(Into::into),
        is_of_plan: document.of_plan,
        features: RequestFeatures {
            route: Route::read(&document.request.route),
            effect: if document.request.has_effect { Effect::Some } else { Effect::None },
            voice,
            model: document.request.model.map(Into::into),
            output_format: document.request.output_format.map(Into::into),
            characters: document.request.characters,
            permission,
            adds_voice: document.request.adds_voice,
        },
        verdict: verdict(&document.verdict)?,
        is_in_group: document.in_concurrency_group,
        is_agreed: document.agreed,
        at: UnixMs(document.at_ms),
        earlier: document.earlier.map(|earlier| Earlier {
            since: UnixMs(earlier.since_ms),
            from_characters: earlier.from_characters,
        }),
        source: Arc::new(document.source.into()),
    })
}

fn verdict_document(verdict: Verdict) -> VerdictDocument {
    let word = verdict.word().to_owned();
    let millis = |span: Duration| u64::try_from(span.as_millis()).unwrap_or(u64::MAX);
    match verdict {
        Verdict::WorkspaceQuota(shortfall) | Verdict::KeyQuota(shortfall) => {
            let Shortfall { remaining, required, quota } = shortfall;
            VerdictDocument { word, left: remaining, required, quota, ..VerdictDocument::default() }
        }
        Verdict::MissingPermission(permission) => {
            let permission = permission.map(|permission| permission.name().to_owned());
            VerdictDocument { word, permission, ..VerdictDocument::default() }
        }
        Verdict::PlanFeature(subject) => {
            VerdictDocument { word, about: Some(subject.word().to_owned()), ..VerdictDocument::default() }
        }
        Verdict::RateLimited(span) | Verdict::Unexplained(Refusal::TooMany(span)) => {
            VerdictDocument { word, retry_after_ms: span.map(millis), ..VerdictDocument::default() }
        }
        Verdict::Concurrency { maximum } => VerdictDocument { word, maximum, ..VerdictDocument::default() },
        Verdict::Served
        | Verdict::InvalidKey
        | Verdict::WrongHost
        | Verdict::Slots
        | Verdict::Billing
        | Verdict::Abuse
        | Verdict::Busy
        | Verdict::Unexplained(
            Refusal::Unauthorized | Refusal::PaymentRequired | Refusal::Forbidden | Refusal::Bodiless,
        )
        | Verdict::NotFound
        | Verdict::RequestError
        | Verdict::ServerError
        | Verdict::Unreadable => VerdictDocument { word, ..VerdictDocument::default() },
    }
}

/// The verdict of a row; `None` for verdicts that restrict nothing.
fn verdict(verdict_document: &VerdictDocument) -> Option<Verdict> {
    let VerdictDocument { permission, retry_after_ms, maximum, left, required, quota, .. } = verdict_document;
    let span = retry_after_ms.map(Duration::from_millis);
    Some(match &*verdict_document.word {
        "workspace_quota" => {
            Verdict::WorkspaceQuota(Shortfall { remaining: *left, required: *required, quota: *quota })
        }
        "missing_permission" => Verdict::MissingPermission(match permission {
            Some(name) => Some(Permission::parse(name)?),
            None => None,
        }),
        "plan_feature" => Verdict::PlanFeature(Subject::of_word(verdict_document.about.as_deref()?)?),
        "slots" => Verdict::Slots,
        "rate_limited" => Verdict::RateLimited(span),
        "too_many_requests" => Verdict::Unexplained(Refusal::TooMany(span)),
        "concurrency" => Verdict::Concurrency { maximum: *maximum },
        "unauthorized" => Verdict::Unexplained(Refusal::Unauthorized),
        "payment_required" => Verdict::Unexplained(Refusal::PaymentRequired),
        "forbidden" => Verdict::Unexplained(Refusal::Forbidden),
        "unexplained" => Verdict::Unexplained(Refusal::Bodiless),
        "invalid_key" => Verdict::InvalidKey,
        "wrong_host" => Verdict::WrongHost,
        "billing" => Verdict::Billing,
        "abuse" => Verdict::Abuse,
        _ => return None,
    })
}

#[cfg(test)]
mod tests;
