//! Keeps the maps of changes equal at all replicas: records the entries that this replica has stored or applied, and
//! detects entries that this replica has missed or Redis has lost. Builds the calls of `newest.lua` that store entries.
//! Also parses the messages on the channel of the pool. They publish an entry, or a demand, by which a replica asks the
//! other replicas to return credits or slots.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use super::scripts::{ChangeMap, Keyspace, ScriptCall};
use crate::policy::shared_id::SharedId;

/// An entry of a map. Of several entries with the same name, the entry with the highest stamp applies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MapEntry {
    pub(super) map: ChangeMap,
    pub(super) name: String,
    /// The time of the change, in milliseconds by the clock of Redis.
    pub(super) stamp: u64,
    /// The time at which the entry expires, in milliseconds by the clock of Redis.
    pub(super) expires_ms: u64,
    pub(super) value: String,
}

impl MapEntry {
    /// Parses `stamp expires value`, which is the value of the field `name` in Redis.
    pub(super) fn parse(map: ChangeMap, name: &str, text: &str) -> Option<Self> {
        let mut parts = text.splitn(3, ' ');
        Some(Self {
            map,
            name: name.to_owned(),
            stamp: parts.next()?.parse().ok()?,
            expires_ms: parts.next()?.parse().ok()?,
            value: parts.next()?.to_owned(),
        })
    }
}

/// A message that a replica has published on the channel of the pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Message {
    /// An entry was stored.
    Entry {
        replica: String,
        /// The version of the map with this entry.
        version: u64,
        entry: MapEntry,
    },
    /// A replica needs more credits or slots of these workspaces than are free. Other replicas must return the credits
    /// and slots that they do not need.
    Demand { replica: String, workspaces: Vec<SharedId> },
}

impl Message {
    /// Parses a message. Returns `None` for a message of an unknown kind, which a later version may publish.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (kind, rest) = text.split_once(' ')?;
        if kind == "demand" {
            let mut words = rest.split(' ');
            let replica = words.next()?.to_owned();
            return Some(Self::Demand { replica, workspaces: words.filter_map(SharedId::parse).collect() });
        }
        let (replica, rest) = rest.split_once(' ')?;
        let replica = replica.to_owned();
        let map = ChangeMap::from_str(kind)?;
        let mut parts = rest.splitn(3, ' ');
        let version = parts.next()?.parse().ok()?;
        let entry = MapEntry::parse(map, parts.next()?, parts.next()?)?;
        Some(Self::Entry { replica, version, entry })
    }

    /// Returns the id of the replica that sent the message.
    pub(super) fn replica(&self) -> &str {
        match self {
            Self::Entry { replica, .. } | Self::Demand { replica, .. } => replica,
        }
    }

    /// Formats the demand of `replica` for credits or slots of these workspaces.
    pub(super) fn format_demand(replica: &str, workspaces: &[SharedId]) -> String {
        let names: String = workspaces.iter().map(|workspace| format!(" {workspace}")).collect();
        format!("demand {replica}{names}")
    }
}

/// The entries of all maps that this replica has stored or applied.
#[derive(Debug, Default)]
pub(super) struct KnownMaps {
    /// For each map, the stamp of each entry and the digest of its value.
    stamps: [HashMap<String, (u64, u64)>; ChangeMap::ALL.len()],
    /// For each map, the version up to which this replica has applied all entries.
    versions: [u64; ChangeMap::ALL.len()],
}

impl KnownMaps {
    /// Records an entry. Returns whether this replica must apply it, because it is newer than the known entry, or has
    /// the same stamp and another value. Of two changes in the same millisecond, Redis stores the first change. A
    /// replica that has applied the second change then also applies the first.
    pub(super) fn record(&mut self, entry: &MapEntry) -> bool {
        let stamps = &mut self.stamps[entry.map.index()];
        let digest = digest(&entry.value);
        if stamps.get(&entry.name).is_some_and(|(stamp, applied)| {
            *stamp > entry.stamp || (*stamp == entry.stamp && *applied == digest)
        }) {
            return false;
        }
        // Redis limits a map by removing the entries that expire first. This replica forgets all entries instead, so
        // that it applies some of them twice.
        if stamps.len() >= 2 * entry.map.max_entries() {
            stamps.clear();
        }
        stamps.insert(entry.name.clone(), (entry.stamp, digest));
        true
    }

    /// Records a change by this replica. Raises its stamp above the stamp of the known entry, which the change
    /// replaces, because the offsets of the replicas' clocks are exact only to some milliseconds.
    pub(super) fn record_change(&mut self, entry: &mut MapEntry) {
        let known = self.stamps[entry.map.index()].get(&entry.name).copied();
        let min_stamp = known.map_or(0, |(stamp, _)| stamp + 1);
        if min_stamp > entry.stamp {
            entry.expires_ms += min_stamp - entry.stamp;
            entry.stamp = min_stamp;
        }
        self.record(entry);
    }

    /// Records the version of a map after one more entry. Has no effect if a message was missed, so that the next beat
    /// detects it.
    pub(super) fn advance(&mut self, map: ChangeMap, version: u64) {
        let last_version = &mut self.versions[map.index()];
        if Some(version) == last_version.checked_add(1) {
            *last_version = version;
        }
    }

    /// Records that this replica has applied all entries up to a version.
    pub(super) fn set_version(&mut self, map: ChangeMap, version: u64) {
        self.versions[map.index()] = version;
    }

    /// Compares the versions at Redis with the recorded versions. Returns the maps that this replica must read, and the
    /// maps whose entries it must send again because Redis has lost entries.
    pub(super) fn compare(&mut self, versions: &[u64; ChangeMap::ALL.len()]) -> OutdatedMaps {
        let mut outdated = OutdatedMaps::default();
        for map in ChangeMap::ALL {
            let (recorded, current) = (self.versions[map.index()], versions[map.index()]);
            if current == recorded {
                continue;
            }
            outdated.to_read.push(map);
            if current < recorded {
                self.stamps[map.index()].clear();
                outdated.to_resend.push(map);
            }
        }
        outdated
    }

    /// Forgets the entries of a map, so that they are applied again when they are read.
    pub(super) fn forget(&mut self, map: ChangeMap) {
        self.stamps[map.index()].clear();
    }

    /// Forgets all versions after a lost connection, or when Redis has lost its data. This replica then reads all maps,
    /// and sends its own entries again.
    pub(super) fn forget_versions(&mut self) {
        // Redis never has this version: an empty map has version 0.
        self.versions = [u64::MAX; ChangeMap::ALL.len()];
    }
}

fn digest(value: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// The maps whose recorded versions differ from the versions at Redis.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct OutdatedMaps {
    /// All such maps.
    pub(super) to_read: Vec<ChangeMap>,
    /// The maps of which Redis has lost entries, or may have lost entries.
    pub(super) to_resend: Vec<ChangeMap>,
}

/// Returns the calls of `newest.lua` that store these entries, one for each map with an entry.
pub(super) fn newest_calls(keyspace: &Keyspace, replica: &str, entries: &[MapEntry]) -> Vec<ScriptCall> {
    let call = |map: ChangeMap| {
        let mut arguments = vec![
            keyspace.channel(),
            map.as_str().to_owned(),
            replica.to_owned(),
            map.max_entries().to_string(),
        ];
        let common_count = arguments.len();
        for entry in entries.iter().filter(|entry| entry.map == map) {
            arguments.extend([
                entry.name.clone(),
                entry.stamp.to_string(),
                entry.expires_ms.to_string(),
                entry.value.clone(),
            ]);
        }
        (arguments.len() > common_count).then(|| ScriptCall {
            script: super::scripts::NEWEST,
            keys: vec![keyspace.map(map)],
            arguments,
        })
    };
    ChangeMap::ALL.into_iter().filter_map(call).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(stamp: u64) -> MapEntry {
        MapEntry {
            map: ChangeMap::Evidence,
            name: "key:1:locked".to_owned(),
            stamp,
            expires_ms: stamp + 60_000,
            value: r#"{"status":401 }"#.to_owned(),
        }
    }

    #[test]
    fn a_message_is_parsed() {
        let text = r#"evidence r2 7 key:1:locked 1000 61000 {"status":401 }"#;
        let message = Message::Entry { replica: "r2".to_owned(), version: 7, entry: entry(1_000) };
        assert_eq!(Message::parse(text), Some(message));
        assert_eq!(Message::parse("demand r2").unwrap().replica(), "r2");
        for other in [
            "",
            "demand",
            "evidence",
            "evidence r2",
            "evidence r2 x n 1 2 v",
            "evidence r2 1 n 1",
            "new r2 1 n 1 2 v",
        ] {
            assert_eq!(Message::parse(other), None, "{other:?} must not be parsed");
        }
    }

    #[test]
    fn the_same_entry_and_an_older_entry_are_not_applied() {
        let mut maps = KnownMaps::default();
        assert!(maps.record(&entry(5)), "the first entry must be applied");
        assert!(!maps.record(&entry(5)), "the same entry must not be applied again");
        assert!(!maps.record(&entry(4)), "an older entry must not be applied");
        assert!(maps.record(&entry(6)), "a newer entry must be applied");
    }

    #[test]
    fn a_change_of_this_replica_replaces_the_known_entry() {
        let mut maps = KnownMaps::default();
        maps.record(&entry(5));
        // The clock of this replica is behind the clock of the replica that has stored the entry.
        let mut change = entry(3);
        maps.record_change(&mut change);
        assert_eq!((change.stamp, change.expires_ms), (6, 60_006));
        let mut later = entry(9);
        maps.record_change(&mut later);
        assert_eq!(later.stamp, 9);
    }

    #[test]
    fn another_value_of_the_same_millisecond_is_applied() {
        let mut maps = KnownMaps::default();
        maps.record(&entry(5));
        let winner = MapEntry { value: "-".to_owned(), ..entry(5) };
        assert!(maps.record(&winner), "the entry that Redis has stored must be applied");
        assert!(!maps.record(&winner), "the same entry must not be applied again");
    }

    #[test]
    fn a_missed_message_and_a_lost_map_are_detected() {
        let mut maps = KnownMaps::default();
        let compare = |maps: &mut KnownMaps, version| maps.compare(&[version, 0, 0, 0]);
        assert_eq!(compare(&mut maps, 0), OutdatedMaps::default());
        maps.advance(ChangeMap::Evidence, 1);
        maps.advance(ChangeMap::Evidence, 3);
        assert_eq!(
            compare(&mut maps, 3).to_read,
            [ChangeMap::Evidence],
            "the map must be read after a missed message"
        );
        maps.set_version(ChangeMap::Evidence, 3);
        assert_eq!(compare(&mut maps, 3), OutdatedMaps::default());
        maps.record(&entry(5));
        let after_loss = compare(&mut maps, 0);
        assert_eq!(
            (after_loss.to_read, after_loss.to_resend),
            (vec![ChangeMap::Evidence], vec![ChangeMap::Evidence])
        );
        assert!(maps.record(&entry(5)), "the known entry must be sent again");
    }
}
