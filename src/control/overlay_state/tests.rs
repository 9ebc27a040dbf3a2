//! Tests of overlay states: a merge leads all replicas to the same state and keeps the latest versions, a change gets a
//! later time, old removals are forgotten, two keys with one name get different names, an overlay keeps the entries
//! that are written to it, and no secret is printed.

use proptest::prelude::*;

use super::*;

/// Milliseconds of a day.
const DAY_MS: u64 = 24 * 60 * 60 * 1_000;

fn id(number: u8) -> String {
    format!("{number:064x}")
}

fn key(number: u8, name: &str) -> SharedKey {
    let key = format!("sk_{number}");
    SharedKey { key, name: name.to_owned(), workspace: None, base_url: None, weight: None }
}

fn client(name: &str, quota: u32) -> ManagedClient {
    let mut client = ManagedClient { name: name.to_owned(), ..ManagedClient::default() };
    client.rules.quota = Some(format!("{quota} requests"));
    client
}

/// Adds a version of an entry, unless there is a later version.
fn insert<T: Ord>(entries: &mut Entries<T>, id: String, changed_at: UnixMs, content: EntryContent<T>) {
    merge_entries(entries, Entries::from([(id, EntryVersion { changed_at, content })]));
}

fn paused_key(number: u8, until: Option<u64>) -> PausedKey {
    PausedKey {
        fingerprint: id(number),
        short_key: "sk_...".to_owned(),
        since: UnixMs(1),
        until: until.map(UnixMs),
        reason: None,
        changed_at: UnixMs(0),
    }
}

/// Generates versions of three entries at four different times, so that versions often conflict.
fn entries<T: Clone + Ord + fmt::Debug>(
    content: impl Fn(u8, u32) -> T + Clone + 'static,
    id_of: fn(u8) -> String,
) -> impl Strategy<Value = Entries<T>> {
    let entry =
        (0..3_u8, 1..5_u64, proptest::option::of(0..3_u32)).prop_map(move |(number, time, variant)| {
            let content = match variant {
                Some(variant) => EntryContent::Present(content(number, variant)),
                None => EntryContent::Removed,
            };
            (id_of(number), EntryVersion { changed_at: UnixMs(time), content })
        });
    proptest::collection::vec(entry, 0..5).prop_map(|entries| entries.into_iter().collect())
}

prop_compose! {
    fn state()(
        keys in entries(|number, variant| key(number, ["spare", "main", "other"][variant as usize]), id),
        paused_keys in entries(|number, variant| paused_key(number, Some(u64::from(variant) + 5)), id),
        clients in entries(|number, variant| client(&format!("c{number}"), variant), |number| format!("c{number}")),
    ) -> OverlayState {
        OverlayState { keys, paused_keys, clients }
    }
}

/// A change of an operator at one of three replicas, or an overlay that one replica receives from another. The replicas
/// are numbered, and `at` is the replica that changes.
#[derive(Clone, Debug)]
enum Step {
    SetClient { at: usize, client: u8, quota: u32 },
    RemoveClient { at: usize, client: u8 },
    AddKey { at: usize, key: u8, name: u8 },
    Receive { at: usize, from: usize },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..3_usize, 0..4_u8, 0..100_u32).prop_map(|(at, client, quota)| Step::SetClient {
            at,
            client,
            quota
        }),
        (0..3_usize, 0..4_u8).prop_map(|(at, client)| Step::RemoveClient { at, client }),
        (0..3_usize, 0..4_u8, 0..2_u8).prop_map(|(at, key, name)| Step::AddKey { at, key, name }),
        (0..3_usize, 0..3_usize).prop_map(|(at, from)| Step::Receive { at, from }),
    ]
}

/// Merges the state of another replica and resolves equal names, like a merge of the controller.
fn receive(replica: &mut OverlayState, other: &OverlayState) {
    *replica = replica.clone().merge(other.clone());
    replica.resolve_names();
}

proptest! {
    #[test]
    fn a_merge_is_commutative_associative_and_idempotent(a in state(), b in state(), c in state()) {
        let merge = |first: &OverlayState, second: &OverlayState| first.clone().merge(second.clone());
        prop_assert_eq!(merge(&a, &b), merge(&b, &a));
        prop_assert_eq!(merge(&merge(&a, &b), &c), merge(&a, &merge(&b, &c)));
        prop_assert_eq!(merge(&a, &a), a);
    }

    #[test]
    fn a_merge_keeps_the_latest_version_of_each_client(a in state(), b in state()) {
        let merged_state = a.clone().merge(b.clone());
        for (id, entry) in &merged_state.clients {
            let versions = [a.clients.get(id), b.clients.get(id)];
            prop_assert_eq!(versions.into_iter().flatten().max(), Some(entry));
        }
        prop_assert!(a.clients.keys().chain(b.clients.keys()).all(|id| merged_state.clients.contains_key(id)));
    }

    #[test]
    fn replicas_that_exchange_their_overlays_become_equal(
        steps in proptest::collection::vec(step(), 0..30),
        clocks in proptest::array::uniform3(0..20_u64),
    ) {
        let mut replicas = [(); 3].map(|()| OverlayState::default());
        for (time, step) in steps.into_iter().enumerate() {
            let now = |at: usize| UnixMs(time as u64 + clocks[at]);
            let change = |at: usize, state: &mut OverlayState, edit: &dyn Fn(&mut OverlayState)| {
                let previous_state = state.clone();
                edit(state);
                state.stamp_changes(&previous_state, now(at));
            };
            let present = |content| EntryVersion { changed_at: UnixMs(0), content };
            match step {
                Step::SetClient { at, client: number, quota } => change(at, &mut replicas[at], &|state| {
                    let entry = client(&format!("c{number}"), quota);
                    state.clients.insert(entry.name.clone(), present(EntryContent::Present(entry)));
                }),
                Step::RemoveClient { at, client } => change(at, &mut replicas[at], &|state| {
                    state.clients.remove(&format!("c{client}"));
                }),
                Step::AddKey { at, key: number, name } => {
                    let name = format!("k{name}");
                    let is_used = replicas[at].keys.values().any(|entry| {
                        entry.content.present().is_some_and(|other| other.name == name)
                    });
                    if !is_used {
                        change(at, &mut replicas[at], &|state| {
                            let entry = EntryVersion {
                                changed_at: UnixMs(0),
                                content: EntryContent::Present(key(number, &name)),
                            };
                            state.keys.insert(id(number), entry);
                        });
                    }
                }
                Step::Receive { at, from } => {
                    let other_state = replicas[from].clone();
                    receive(&mut replicas[at], &other_state);
                }
            }
        }
        for (at, from) in [(0, 1), (0, 2), (1, 0), (2, 0), (0, 1), (0, 2), (1, 0), (2, 0)] {
            let other_state = replicas[from].clone();
            receive(&mut replicas[at], &other_state);
        }
        prop_assert_eq!(&replicas[0], &replicas[1]);
        prop_assert_eq!(&replicas[0], &replicas[2]);
        let names: Vec<_> =
            replicas[0].keys.values().filter_map(|entry| entry.content.present()).map(|key| &key.name).collect();
        let distinct_names: HashSet<_> = names.iter().collect();
        prop_assert_eq!(distinct_names.len(), names.len(), "the names must be different: {:?}", names);
    }

    #[test]
    fn an_overlay_contains_the_pauses_and_clients_that_were_written_to_it(state in state()) {
        let mut overlay = Overlay::default();
        let state = OverlayState { keys: Entries::new(), ..state };
        state.write_to(&mut overlay, &KeySecrets::new());
        prop_assert_eq!(OverlayState::new(&overlay, &KeySecrets::new()), state);
    }
}

#[test]
fn concurrent_changes_of_different_entries_are_both_kept() {
    let change = |name: &str| {
        let mut state = OverlayState::default();
        let content = EntryContent::Present(client(name, 1));
        insert(&mut state.clients, name.to_owned(), UnixMs(7), content);
        state
    };
    let merged_state = change("app").merge(change("web"));
    assert_eq!(merged_state.clients.keys().collect::<Vec<_>>(), ["app", "web"]);
}

#[test]
fn of_two_changes_at_the_same_time_a_removal_is_kept() {
    let mut state = OverlayState::default();
    insert(&mut state.clients, "app".to_owned(), UnixMs(7), EntryContent::Removed);
    insert(&mut state.clients, "app".to_owned(), UnixMs(7), EntryContent::Present(client("app", 1)));
    assert_eq!(state.clients["app"].content, EntryContent::Removed);
    insert(&mut state.clients, "app".to_owned(), UnixMs(8), EntryContent::Present(client("app", 1)));
    assert!(state.clients["app"].content.present().is_some());
}

#[test]
fn a_change_is_later_than_every_known_change() {
    let mut previous_state = OverlayState::default();
    insert(
        &mut previous_state.clients,
        "app".to_owned(),
        UnixMs(900),
        EntryContent::Present(client("app", 1)),
    );
    let mut next = previous_state.clone();
    next.clients.remove("app");
    insert(&mut next.clients, "web".to_owned(), UnixMs(0), EntryContent::Present(client("web", 1)));
    next.stamp_changes(&previous_state, UnixMs(5));
    assert_eq!(
        next.clients["app"],
        EntryVersion { changed_at: UnixMs(901), content: EntryContent::Removed },
        "a clock that is behind must not make the removal older"
    );
    assert_eq!(next.clients["web"].changed_at, UnixMs(901));
    // Without a change, the times stay.
    let mut same = next.clone();
    same.stamp_changes(&next, UnixMs(2_000));
    assert_eq!(same, next);
}

#[test]
fn a_removal_and_an_ended_pause_are_forgotten_after_30_days() {
    let mut state = OverlayState::default();
    insert(&mut state.clients, "app".to_owned(), UnixMs(7), EntryContent::Removed);
    insert(&mut state.clients, "web".to_owned(), UnixMs(7), EntryContent::Present(client("web", 1)));
    insert(&mut state.paused_keys, id(1), UnixMs(7), EntryContent::Present(paused_key(1, Some(8))));
    insert(&mut state.paused_keys, id(2), UnixMs(7), EntryContent::Present(paused_key(2, None)));
    let all = state.clone();
    state.forget_old(UnixMs(30 * DAY_MS + 6));
    assert_eq!(state, all);
    state.forget_old(UnixMs(30 * DAY_MS + 7));
    assert_eq!(state.clients.keys().collect::<Vec<_>>(), ["web"]);
    assert_eq!(state.paused_keys.len(), 2);
    state.forget_old(UnixMs(30 * DAY_MS + 8));
    assert_eq!(state.paused_keys.keys().collect::<Vec<_>>(), [&id(2)]);
}

#[test]
fn of_two_keys_with_one_name_the_key_that_was_added_first_keeps_it() {
    let mut state = OverlayState::default();
    for (number, time) in [(1, 20), (2, 10)] {
        insert(&mut state.keys, id(number), UnixMs(time), EntryContent::Present(key(number, "spare")));
    }
    state.resolve_names();
    let name = |number: u8| state.keys[&id(number)].content.present().map(|key| key.name.as_str());
    assert_eq!((name(2), name(1)), (Some("spare"), Some("spare-000000")));
    assert_eq!(state.keys[&id(1)].changed_at, UnixMs(21));
    let resolved_state = state.clone();
    state.resolve_names();
    assert_eq!(state, resolved_state);
}

#[test]
fn a_shared_key_is_not_printed() {
    let printed_text = format!("{:?}", key(1, "spare"));
    assert!(
        printed_text.contains("spare") && !printed_text.contains("sk_1"),
        "only the name must be printed: {printed_text}"
    );
}
