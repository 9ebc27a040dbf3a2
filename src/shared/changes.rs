//! Converts changes of the pool, the results of polls, and the overlay to entries of the maps of changes, and applies
//! the entries of other replicas to the pool. The overlay contains the changes that operators make at runtime, and is
//! applied by its owner. `maps.rs` builds the calls that store the entries in Redis.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use tracing::debug;

use super::evidence::{EvidenceName, REFUTED, format_evidence, key_id, parse_evidence};
use super::maps::MapEntry;
use super::overlay::SealedOverlay;
use super::polls::{SharedPoll, format_poll, parse_poll};
use super::replica::Replica;
use super::scripts::ChangeMap;
use super::shared_clock::Moment;
use crate::policy::evidence::{ClaimedFault, Evidence};
use crate::policy::shared_id::{SharedId, SharedKind};
use crate::policy::units::UnixMs;
use crate::poller::OwnPoll;
use crate::pool::{Key, OwnerId, PoolChange, RefusalRecord, Roster};
use crate::secret::Fingerprint;
use crate::store::{refusal_from_json, refusal_to_json};
use crate::telemetry::log_transitions;

/// Time to live of the result of a poll, which is longer than the maximum of `quota_polling.interval`.
const POLL_TTL: Duration = Duration::from_secs(2 * 24 * 3_600);
/// Time to live of the overlay. It may expire, because every replica also has the overlay in its own files.
const OVERLAY_TTL: Duration = Duration::from_secs(30 * 24 * 3_600);
/// Time to live of a refusal of a certain kind of request, which is longer than a restriction with the default
/// cooldowns.
const REFUSAL_TTL: Duration = Duration::from_secs(2 * 24 * 3_600);

impl Replica {
    /// Returns the entry with a change of the pool.
    pub(super) fn entry_of_change(&mut self, change: &PoolChange) -> MapEntry {
        let mut entry = match change {
            PoolChange::Refused { key, is_about_key, evidence } => {
                self.evidence_entry(*key, *is_about_key, evidence)
            }
            PoolChange::Refuted { key, is_about_key, claim, at } => {
                let name = EvidenceName::new(*key, *is_about_key, *claim);
                self.entry(
                    ChangeMap::Evidence,
                    name.to_string(),
                    *at,
                    evidence_ttl(*claim),
                    REFUTED.to_owned(),
                )
            }
            PoolChange::Restricted(record) => self.refusal_entry(record),
        };
        self.maps.record_change(&mut entry);
        entry
    }

    /// Returns the entry with the result of a poll by this replica, or `None` if the known entry is newer or the same.
    pub(super) fn entry_of_poll(&mut self, poll: OwnPoll) -> Option<MapEntry> {
        let workspace = self.pool.roster().reported_workspace(poll.key);
        let region = poll.region.map(|region| region.host().to_owned());
        let value = format_poll(&SharedPoll { observation: poll.observation, workspace, region });
        let entry = self.entry(ChangeMap::Polls, key_id(poll.key).to_string(), poll.at, POLL_TTL, value);
        self.maps.record(&entry).then_some(entry)
    }

    /// Returns the entries of a map that this replica can make from its pool and that Redis may have lost.
    pub(super) fn entries_to_resend(&mut self, map: ChangeMap, now: UnixMs) -> Vec<MapEntry> {
        let roster = self.pool.roster();
        let mut entries = Vec::new();
        match map {
            ChangeMap::Evidence => {
                for key in roster.keys() {
                    let fingerprint = key.api_key().fingerprint();
                    let about_key = key.evidence().into_iter().map(|evidence| (true, evidence));
                    let about_workspace =
                        key.workspace().evidence().into_iter().map(|evidence| (false, evidence));
                    entries.extend(about_key.chain(about_workspace).map(|(is_about_key, evidence)| {
                        self.evidence_entry(fingerprint, is_about_key, &evidence)
                    }));
                }
            }
            ChangeMap::Refusals => {
                let restrictions = self.pool.restrictions().all(now);
                entries
                    .extend(restrictions.iter().map(|restriction| self.refusal_entry(&restriction.record)));
            }
            // The next poll of the leader replaces a lost poll, and `OpenLink` sends the overlay by itself.
            ChangeMap::Polls | ChangeMap::Overlay => {}
        }
        entries.retain(|entry| self.maps.record(entry));
        entries
    }

    fn evidence_entry(&self, key: Fingerprint, is_about_key: bool, evidence: &Evidence) -> MapEntry {
        let name = EvidenceName::new(key, is_about_key, evidence.claim).to_string();
        self.entry(
            ChangeMap::Evidence,
            name,
            evidence.at,
            evidence_ttl(evidence.claim),
            format_evidence(evidence),
        )
    }

    fn refusal_entry(&self, record: &RefusalRecord) -> MapEntry {
        // The name of the workspace and the message of the provider stay on this machine. Other replicas find the
        // workspace by the key.
        let record =
            RefusalRecord { workspace: OwnerId::from_stored(""), source: Arc::default(), ..record.clone() };
        let features = format!("{:?} {:?} {}", record.features, record.verdict.as_str(), record.key);
        let name = SharedId::new(SharedKind::Identifier, &[features.as_bytes()]).to_string();
        self.entry(ChangeMap::Refusals, name, record.at, REFUSAL_TTL, refusal_to_json(&record))
    }

    /// Returns an entry that expires `ttl` after `at`.
    fn entry(&self, map: ChangeMap, name: String, at: UnixMs, ttl: Duration, value: String) -> MapEntry {
        let stamp = self.clock.to_shared(at);
        let ttl = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX);
        MapEntry { map, name, stamp, expires_ms: stamp.saturating_add(ttl), value }
    }

    /// Returns the entry with the overlay of this replica, or `None` if the known entry is newer or the same.
    pub(super) fn overlay_entry(&mut self, overlay: &SealedOverlay, now: UnixMs) -> Option<MapEntry> {
        // The name is the same for all replicas, so that the last overlay replaces all earlier overlays. Each replica
        // merges every overlay that it receives with its own overlay, and stores the result if it differs.
        let value = BASE64_STANDARD.encode(overlay.as_bytes());
        let entry = self.entry(ChangeMap::Overlay, "overlay".to_owned(), now, OVERLAY_TTL, value);
        self.maps.record(&entry).then_some(entry)
    }

    /// Applies an entry of `replica` to the pool, except an overlay, which the caller sends to its owner. Returns
    /// whether the entry has not expired and differs from the known entry without being older.
    pub(super) fn apply_entry(&mut self, entry: &MapEntry, replica: &str, moment: Moment) -> bool {
        let shared_now = self.clock.to_shared(moment.now);
        if entry.expires_ms <= shared_now || !self.maps.record(entry) {
            return false;
        }
        let applied = match entry.map {
            ChangeMap::Evidence => self.apply_evidence(entry, replica, moment.now),
            ChangeMap::Refusals => self.apply_refusal(entry, moment.now),
            ChangeMap::Polls => self.apply_poll(entry, replica, moment.now),
            ChangeMap::Overlay => Some(()),
        };
        if applied.is_none() {
            debug!(map = entry.map.as_str(), replica, "an entry of another replica has no effect here");
        }
        true
    }

    fn apply_evidence(&mut self, entry: &MapEntry, replica: &str, now: UnixMs) -> Option<()> {
        let name = EvidenceName::parse(&entry.name)?;
        let roster = self.pool.roster();
        let key = self.key_index.find(&roster, name.key)?;
        let transitions = if entry.value == REFUTED {
            let is_refuted = |evidence: &Evidence| {
                name.matches(evidence) && self.clock.to_shared(evidence.at) <= entry.stamp
            };
            self.pool.remove_shared_refusal(&roster, key, name.is_about_key, is_refuted, now)
        } else {
            let at = self.clock.to_local(entry.stamp).min(now);
            let evidence = parse_evidence(&name, &entry.value, at, replica)?;
            self.pool.record_shared_refusal(&roster, key, name.is_about_key, evidence, now)
        };
        log_transitions(&transitions);
        Some(())
    }

    fn apply_refusal(&self, entry: &MapEntry, now: UnixMs) -> Option<()> {
        let mut record = refusal_from_json(&entry.value)?;
        record.at = self.clock.to_local(entry.stamp).min(now);
        let roster = self.pool.roster();
        // A refusal of a key that this replica does not have is ignored.
        roster.find(record.key)?;
        self.pool.record_shared_restriction(&roster, record, now);
        Some(())
    }

    fn apply_poll(&mut self, entry: &MapEntry, replica: &str, now: UnixMs) -> Option<()> {
        let SharedPoll { observation, workspace, region } = parse_poll(&entry.value, replica)?;
        let id = SharedId::parse(&entry.name)?;
        let roster = self.pool.roster();
        let key = self.key_index.find(&roster, id)?;
        if let Some(workspace) = workspace {
            self.pool.record_workspace_id(key, workspace);
        }
        let region = self.regions.iter().find(|configured| region.as_deref() == Some(configured.host()));
        if let Some(region) = region.map(|region| key.route_to(region))
            && key.authority() != Some(&region)
        {
            self.pool.record_region(key, &region);
        }
        // Recording the workspace or the region may have replaced the roster.
        let roster = self.pool.roster();
        let key = self.key_index.find(&roster, id)?;
        let at = self.clock.to_local(entry.stamp).min(now);
        log_transitions(&self.pool.observe_shared(&roster, key, observation, at, now));
        Some(())
    }
}

/// Parses the value of an entry with the overlay of another replica.
pub(super) fn parse_overlay(value: &str) -> Option<SealedOverlay> {
    let bytes = BASE64_STANDARD.decode(value).ok()?;
    SealedOverlay::parse(bytes).ok()
}

/// Returns the time to live of the evidence of a claim in Redis. Replicas that start within this time read it.
fn evidence_ttl(claim: ClaimedFault) -> Duration {
    const DAY: u64 = 24 * 3_600;
    Duration::from_secs(match claim {
        ClaimedFault::RateLimited(_) => 3_600,
        ClaimedFault::Locked
        | ClaimedFault::Suspected
        | ClaimedFault::InvalidKey
        | ClaimedFault::WrongHost => 2 * DAY,
        ClaimedFault::Credits { .. } => 32 * DAY,
    })
}

/// Finds keys by their digests, which are their names in Redis.
#[derive(Debug, Default)]
pub(super) struct KeyIndex {
    /// The roster to which the positions belong.
    roster: Weak<Roster>,
    positions: HashMap<SharedId, usize>,
}

impl KeyIndex {
    /// Returns the key with a digest. Computes the digests of all keys again if the roster was replaced.
    fn find<'r>(&mut self, roster: &'r Arc<Roster>, id: SharedId) -> Option<&'r Arc<Key>> {
        if !std::ptr::eq(self.roster.as_ptr(), Arc::as_ptr(roster)) {
            let keys = roster.keys().iter().enumerate();
            self.positions =
                keys.map(|(position, key)| (key_id(key.api_key().fingerprint()), position)).collect();
            // While this reference exists, no other roster can have the same address.
            self.roster = Arc::downgrade(roster);
        }
        roster.keys().get(*self.positions.get(&id)?)
    }
}
