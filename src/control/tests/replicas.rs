//! Tests of two replicas that share their overlays: each change has an effect on both, and none is lost, even after a
//! restart or a failure. An overlay that is invalid, known already or encrypted with other keys changes nothing, and an
//! encrypted overlay reveals no secret. Each replica has a state directory and a controller. The tests deliver the
//! overlays through the channels that otherwise lead to Redis.

mod conflicts;

use super::*;
use crate::shared::{OverlayPort, OverlayVersion};

const THIRD_KEY: &str = "sk_00112233445566778899aabbccddeeff00112233445566778899aabb";

/// A machine with a controller that shares its overlay.
struct Replica {
    machine: Machine,
    controller: Controller,
    records: Receiver<StoredChange>,
    port: OverlayPort,
    app: Option<RunningApp>,
    /// The versions that were delivered to this replica, so that each is delivered once.
    delivered: Vec<OverlayVersion>,
}

impl Replica {
    /// Starts a replica without a running server.
    async fn start(machine: Machine) -> Self {
        let (controller, records) = machine.controller();
        Self::share(machine, controller, records, None).await
    }

    /// Starts a replica with a running server.
    async fn start_with_server(machine: Machine) -> Self {
        let (app, controller, records) = start_server(&machine).await;
        Self::share(machine, controller, records, Some(app)).await
    }

    /// Starts to share the overlay of a controller.
    async fn share(
        machine: Machine,
        mut controller: Controller,
        records: Receiver<StoredChange>,
        app: Option<RunningApp>,
    ) -> Self {
        let port = controller.share_overlay(app.as_ref()).await.unwrap();
        Self { machine, controller, records, port, app, delivered: Vec::new() }
    }

    /// Starts the replica again from its files.
    async fn restart(self) -> Self {
        Self::start(self.machine).await
    }

    async fn make(&mut self, change: Change) -> ChangeReceipt {
        self.controller.make(change, None, ORIGIN, self.app.as_ref()).await.unwrap()
    }

    fn published_overlay(&self) -> SealedOverlay {
        self.port.outgoing.borrow().clone()
    }

    /// Delivers an overlay through the channel, as bytes. Returns whether it is new to this replica.
    async fn receive(&mut self, overlay: &SealedOverlay) -> bool {
        if self.delivered.contains(&overlay.version()) {
            return false;
        }
        self.delivered.push(overlay.version());
        let received_overlay = SealedOverlay::parse(overlay.as_bytes().clone()).unwrap();
        self.port.incoming.send(received_overlay).await.unwrap();
        match self.controller.next_event().await {
            ControllerEvent::OverlayReceived(overlay) => {
                self.controller.merge_overlay(overlay, self.app.as_ref()).await;
            }
            ControllerEvent::FilesChanged => panic!("no file was changed"),
        }
        true
    }

    /// Ends the wait before the next attempt to merge the last overlay that could not be merged.
    fn end_retry_wait(&mut self) {
        self.controller.unmerged.as_mut().unwrap().1 = clock::instant();
    }

    fn overlay(&self) -> Overlay {
        let text =
            fs::read_to_string(self.machine.state_directory().join("managed.toml")).unwrap_or_default();
        Overlay::parse(&text).unwrap()
    }

    /// Returns the names of the applied keys and clients.
    fn names(&self) -> (Vec<String>, Vec<String>) {
        let config = self.machine.config();
        let key_names = config.keys.iter().filter_map(|key| key.name.clone()).collect();
        (key_names, config.clients.iter().map(|client| client.name.clone()).collect())
    }
}

/// Delivers the overlays of two replicas to each other until neither publishes a new one.
async fn exchange_overlays(first: &mut Replica, second: &mut Replica) {
    for _ in 0..10 {
        let (from_first, from_second) = (first.published_overlay(), second.published_overlay());
        let is_new = second.receive(&from_first).await;
        if !first.receive(&from_second).await && !is_new {
            return;
        }
    }
    panic!("two replicas must become equal after a few exchanges");
}

/// Checks that two replicas publish the same overlay and apply the same keys and clients.
#[track_caller]
fn assert_equal_replicas(first: &Replica, second: &Replica) {
    assert_eq!(first.published_overlay().version(), second.published_overlay().version());
    let (mut first_names, mut second_names) = (first.names(), second.names());
    for names in [&mut first_names, &mut second_names] {
        names.0.sort();
        names.1.sort();
    }
    assert_eq!(first_names, second_names);
}

/// Starts two replicas that have exchanged their overlays.
async fn start_pair() -> (Replica, Replica) {
    let mut first = Replica::start(Machine::new()).await;
    let mut second = Replica::start(Machine::new()).await;
    exchange_overlays(&mut first, &mut second).await;
    (first, second)
}

fn add_client(name: &str) -> Change {
    Change::AddClient { name: name.to_owned(), rules: quota_rules("9 requests"), expires_at: None }
}

fn set_quota(name: &str, text: &str) -> Change {
    Change::SetClient { name: name.to_owned(), rules: quota_rules(text), expiry: None }
}

fn revoke_client(name: &str) -> Change {
    Change::RevokeClient { name: name.to_owned() }
}

fn remove_key(key: &str) -> Change {
    Change::RemoveKey { key: key.to_owned() }
}

fn add_key(name: &str, key: &str) -> Change {
    Change::AddKey(NewKey { name: name.to_owned(), key: ApiKey::new(key).unwrap(), ..new_key() })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_in_force_at_the_other_replica_and_can_be_paused_and_removed_there() {
    let mut first = Replica::start_with_server(Machine::new()).await;
    let mut second = Replica::start_with_server(Machine::new()).await;
    exchange_overlays(&mut first, &mut second).await;
    let keys = |replica: &Replica| replica.app.as_ref().unwrap().keys();
    let is_paused = |replica: &Replica| keys(replica).iter().any(|snapshot| snapshot.pause.is_some());

    first.make(Change::AddKey(new_key())).await;
    exchange_overlays(&mut first, &mut second).await;
    assert_eq!(keys(&second).len(), 2, "the key must serve at the other replica");
    assert_eq!(
        fs::read_to_string(second.machine.state_directory().join(KEY_FILE)).unwrap(),
        format!("{SPARE_KEY}\n")
    );

    second.make(pause_key("spare")).await;
    exchange_overlays(&mut first, &mut second).await;
    assert!(is_paused(&first), "the pause must be in force at the first replica");
    first.make(Change::ResumeKey { key: "spare".to_owned() }).await;
    exchange_overlays(&mut first, &mut second).await;
    assert!(!is_paused(&second), "the key must be resumed at the second replica");

    second.make(remove_key("spare")).await;
    exchange_overlays(&mut first, &mut second).await;
    assert_eq!((keys(&first).len(), keys(&second).len()), (1, 1));
    assert!(!first.machine.state_directory().join(KEY_FILE).exists());
    assert_equal_replicas(&first, &second);

    let records: Vec<StoredChange> = second.records.try_iter().collect();
    let rows: Vec<_> = records.iter().map(|record| (record.actor.as_str(), record.action.as_str())).collect();
    let merged_record = ("replica", "merged");
    assert_eq!(
        rows,
        [merged_record, ("command_line", "key_paused"), merged_record, ("command_line", "key_removed")]
    );
    assert_eq!(records[0].detail, r#"{"clients":[],"keys":["spare"],"paused_keys":[]}"#);
    assert!(
        records.iter().all(|record| !format!("{record:?}").contains(SPARE_KEY)),
        "no record must contain the key"
    );
    for replica in [first, second] {
        replica.app.unwrap().drain(Duration::ZERO).await;
    }
}

#[tokio::test]
async fn a_client_is_added_changed_rotated_and_revoked_at_both_replicas() {
    let (mut first, mut second) = start_pair().await;
    let client = |replica: &Replica, name: &str| {
        replica.machine.config().clients.into_iter().find(|client| client.name == name)
    };
    let receipt = first.make(add_client("web")).await;
    exchange_overlays(&mut first, &mut second).await;
    let token = TokenFingerprint::new(receipt.token.unwrap().expose());
    assert_eq!(client(&second, "web").unwrap().token, token);

    second.make(set_quota("web", "5 requests")).await;
    exchange_overlays(&mut first, &mut second).await;
    assert_eq!(client(&first, "web").unwrap().rules.quota.unwrap().to_string(), "5 requests");

    // Both configuration files define the client `app`.
    let receipt = first.make(rotate_app(Duration::from_secs(3_600), None)).await;
    exchange_overlays(&mut first, &mut second).await;
    let rotated_client = client(&second, "app").unwrap();
    assert_eq!(rotated_client.token, TokenFingerprint::new(receipt.token.unwrap().expose()));
    assert_eq!(rotated_client.previous_token.unwrap().0, TokenFingerprint::new("token-of-app"));

    for name in ["web", "app"] {
        if name == "app" {
            second.make(add_client("phone")).await;
        }
        second.make(revoke_client(name)).await;
        exchange_overlays(&mut first, &mut second).await;
        assert!(client(&first, name).is_none(), "{name} must be revoked at the other replica");
    }
    assert_equal_replicas(&first, &second);
}

#[tokio::test]
async fn the_generation_of_a_change_is_current_at_both_replicas() {
    let (mut first, mut second) = start_pair().await;
    let generation = first.make(pause_key("first")).await.generation;
    exchange_overlays(&mut first, &mut second).await;
    assert_eq!(first.published_overlay().version().generation, generation);
    let resume = || Change::ResumeKey { key: "first".to_owned() };
    let stale = second.controller.make(resume(), Some(generation - 1), ORIGIN, None).await.unwrap_err();
    assert_eq!(stale, ControlError::Stale { current: generation });
    let receipt = second.controller.make(resume(), Some(generation), ORIGIN, None).await.unwrap();
    assert_eq!(receipt.generation, generation + 1);
}

#[tokio::test]
async fn concurrent_changes_of_different_entries_are_both_in_force() {
    let (mut first, mut second) = start_pair().await;
    let generation_before = first.published_overlay().version().generation;
    first.make(add_client("web")).await;
    first.make(Change::AddKey(new_key())).await;
    second.make(add_client("phone")).await;
    second.make(pause_key("first")).await;
    exchange_overlays(&mut first, &mut second).await;
    assert_equal_replicas(&first, &second);
    assert_eq!(first.names().0, ["first", "spare"]);
    assert_eq!(first.names().1.len(), 3);
    assert_eq!(first.machine.config().paused_keys.len(), 1);
    assert_eq!(
        first.published_overlay().version().generation,
        generation_before + 3,
        "the merged overlay must be newer than both"
    );
}

#[tokio::test]
async fn a_partition_heals_without_a_lost_change() {
    let (mut first, mut second) = start_pair().await;
    first.make(add_client("web")).await;
    first.make(Change::AddKey(new_key())).await;
    exchange_overlays(&mut first, &mut second).await;
    // Neither replica sees the changes of the other.
    first.make(revoke_client("web")).await;
    first.make(pause_key("spare")).await;
    first.make(add_client("phone")).await;
    second.make(pause_key("first")).await;
    second.make(set_quota("app", "5 requests")).await;
    second.make(add_key("third", THIRD_KEY)).await;
    exchange_overlays(&mut first, &mut second).await;
    assert_equal_replicas(&first, &second);
    let config = first.machine.config();
    assert_eq!((config.keys.len(), config.paused_keys.len()), (3, 2));
    let mut names = first.names().1;
    names.sort();
    assert_eq!(names, ["app", "phone"]);
    assert_eq!(config.clients[0].rules.quota.unwrap().to_string(), "5 requests");
}

#[tokio::test]
async fn a_removed_key_and_a_revoked_client_are_not_restored_after_a_restart() {
    let (mut first, mut second) = start_pair().await;
    first.make(Change::AddKey(new_key())).await;
    first.make(add_client("web")).await;
    exchange_overlays(&mut first, &mut second).await;
    let old_overlay = second.published_overlay();
    first.make(remove_key("spare")).await;
    first.make(revoke_client("web")).await;
    let mut first = first.restart().await;
    let removed_entries = first.overlay().removed;
    assert_eq!(removed_entries.len(), 2, "both removals must be remembered: {removed_entries:?}");
    first.receive(&old_overlay).await;
    assert_eq!(first.names(), (vec!["first".to_owned()], vec!["app".to_owned()]));
    let mut second = second.restart().await;
    exchange_overlays(&mut first, &mut second).await;
    assert_equal_replicas(&first, &second);
    assert_eq!(second.names().0, ["first"]);
    // The same key and client can be added again.
    second.make(Change::AddKey(new_key())).await;
    second.make(add_client("web")).await;
    exchange_overlays(&mut first, &mut second).await;
    assert_equal_replicas(&first, &second);
    assert_eq!((first.names().0.len(), first.overlay().removed.len()), (2, 0));
}

#[tokio::test]
async fn a_new_replica_receives_the_changes_of_the_pool() {
    let mut first = Replica::start(Machine::new()).await;
    first.make(Change::AddKey(new_key())).await;
    first.make(pause_key("first")).await;
    let mut second = Replica::start(Machine::new()).await;
    exchange_overlays(&mut first, &mut second).await;
    assert_equal_replicas(&first, &second);
    assert_eq!(second.machine.config().paused_keys.len(), 1);
    let (first_overlay, second_overlay) = (first.overlay(), second.overlay());
    assert_eq!(first_overlay.keys, second_overlay.keys);
    assert_eq!(first_overlay.paused_keys, second_overlay.paused_keys);
}

#[tokio::test]
async fn an_overlay_that_is_known_changes_nothing() {
    let (mut first, mut second) = start_pair().await;
    first.make(add_client("web")).await;
    let old_overlay = second.published_overlay();
    exchange_overlays(&mut first, &mut second).await;
    let files_before = second.machine.state_files();
    // The records of the earlier changes are taken out of the channel.
    second.records.try_iter().for_each(drop);
    second.delivered.clear();
    for overlay in [first.published_overlay(), old_overlay, second.published_overlay()] {
        second.receive(&overlay).await;
    }
    assert_eq!(second.machine.state_files(), files_before);
    assert_eq!(second.records.try_iter().count(), 0);
}

#[tokio::test]
async fn an_overlay_without_a_common_key_changes_nothing() {
    let mut first = Replica::start(Machine::new()).await;
    let machine = Machine::new();
    let text = fs::read_to_string(machine.config_file()).unwrap();
    fs::write(machine.config_file(), text.replace(FIRST_KEY, THIRD_KEY)).unwrap();
    let mut second = Replica::start(machine).await;
    first.make(add_client("web")).await;
    let files_before = second.machine.state_files();
    let overlay = first.published_overlay();
    second.receive(&overlay).await;
    assert_eq!(second.machine.state_files(), files_before);
    let reason = second.controller.merge_failure.clone().unwrap();
    assert!(
        reason.contains("configure at least one same ElevenLabs API key"),
        "the reason must contain the remedy: {reason}"
    );
    // A common key that is added at runtime suffices.
    second.make(add_key("common", FIRST_KEY)).await;
    second.delivered.clear();
    exchange_overlays(&mut first, &mut second).await;
    assert_eq!(second.controller.merge_failure, None);
    assert_eq!(second.names().1, ["app", "web"]);
}

#[tokio::test]
async fn changes_that_cannot_be_saved_are_merged_at_the_next_attempt() {
    let (mut first, mut second) = start_pair().await;
    first.make(Change::AddKey(new_key())).await;
    // A file in place of the directory of keys fails for every user, as a full disk would.
    fs::create_dir_all(second.machine.state_directory()).unwrap();
    fs::write(second.machine.state_directory().join(KEYS_DIRECTORY), "").unwrap();
    let overlay = first.published_overlay();
    second.receive(&overlay).await;
    assert_eq!(second.machine.config().keys.len(), 1);
    let reason = second.controller.merge_failure.clone().unwrap();
    assert!(reason.contains("make it writable"), "the reason must contain the remedy: {reason}");
    fs::remove_file(second.machine.state_directory().join(KEYS_DIRECTORY)).unwrap();
    // The overlay is tried again, although the other replica does not send it again.
    second.end_retry_wait();
    match second.controller.next_event().await {
        ControllerEvent::OverlayReceived(overlay) => second.controller.merge_overlay(overlay, None).await,
        ControllerEvent::FilesChanged => panic!("no file was changed"),
    }
    assert_eq!(second.machine.config().keys.len(), 2);
    assert!(second.controller.unmerged.is_none() && second.controller.merge_failure.is_none());
    exchange_overlays(&mut first, &mut second).await;
    assert_equal_replicas(&first, &second);
}

#[tokio::test]
async fn a_replica_without_a_state_directory_shares_no_overlay() {
    let machine = Machine::new();
    let overrides = Overrides { is_ephemeral: true, ..machine.overrides() };
    let recorder = |_| -> RecordFuture { Box::pin(std::future::ready(())) };
    let mut controller = Controller::offline(overrides, Box::new(recorder));
    assert_eq!(controller.share_overlay(None).await.unwrap_err(), ControlError::NoStateDirectory);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_another_process_is_shared_with_the_next_reload() {
    let mut first = Replica::start_with_server(Machine::new()).await;
    let mut second = Replica::start(Machine::new()).await;
    first.machine.make(pause_key("first")).await.unwrap();
    first.make(Change::Reload).await;
    exchange_overlays(&mut first, &mut second).await;
    assert_eq!(second.machine.config().paused_keys.len(), 1);
    first.app.unwrap().drain(Duration::ZERO).await;
}

#[tokio::test]
async fn an_ended_pause_does_not_return() {
    let (mut first, mut second) = start_pair().await;
    first.make(pause_key("first")).await;
    exchange_overlays(&mut first, &mut second).await;
    let old_overlay = second.published_overlay();
    // The pause gets an end, which passes.
    let until = Some(clock::now().plus(Duration::from_secs(3_600)));
    first.make(Change::PauseKey { key: "first".to_owned(), until, reason: None }).await;
    let mut overlay = first.overlay();
    let end = clock::now().minus(Duration::from_millis(1));
    overlay.paused_keys[0].until = Some(end);
    fs::write(first.machine.state_directory().join("managed.toml"), overlay.format().unwrap()).unwrap();
    first.make(add_client("web")).await;
    first.receive(&old_overlay).await;
    assert_eq!(first.machine.config().paused_keys[0].until, Some(end));
    let error =
        first.controller.make(Change::ResumeKey { key: "first".to_owned() }, None, ORIGIN, None).await;
    assert!(matches!(error, Err(ControlError::NotPaused(_))), "the pause must have ended: {error:?}");
}

#[tokio::test]
async fn a_sealed_overlay_contains_no_key_token_or_name() {
    let mut first = Replica::start(Machine::new()).await;
    first.make(Change::AddKey(new_key())).await;
    let receipt = first.make(add_client("canary-client")).await;
    first.make(pause_key("spare")).await;
    let token = receipt.token.unwrap();
    let sealed = first.published_overlay();
    let key_fingerprint = ApiKey::new(SPARE_KEY).unwrap().fingerprint().to_string();
    let token_fingerprint = TokenFingerprint::new(token.expose()).to_string();
    let contains = |text: &str| sealed.as_bytes().windows(text.len()).any(|window| window == text.as_bytes());
    for canary in [
        SPARE_KEY,
        FIRST_KEY,
        token.expose(),
        "canary-client",
        "spare",
        "billing",
        &key_fingerprint,
        &token_fingerprint,
        "sk_",
        "generation",
    ] {
        assert!(!contains(canary), "the sealed overlay must not contain {canary}");
    }
    let printed_text = format!("{sealed:?}{:?}{:?}", first.controller, first.port);
    assert!(
        !printed_text.contains("sk_") && !printed_text.contains("canary"),
        "no secret must be printed: {printed_text}"
    );
}

#[tokio::test]
async fn invalid_overlays_change_nothing() {
    let (first, mut second) = start_pair().await;
    let key = ApiKey::new(FIRST_KEY).unwrap();
    let files_before = second.machine.state_files();
    let document_with = |keys: &str, clients: &str| {
        format!(
            r#"{{"format":1,"generation":9,"state":{{"keys":{{{keys}}},"paused_keys":{{}},"clients":{{{clients}}}}}}}"#
        )
    };
    let client = |name: &str, time: u64| {
        let content = format!(r#"{{"present":{{"name":"{name}","quota":"1 request"}}}}"#);
        document_with("", &format!(r#""{name}":{{"changed_at":{time},"content":{content}}}"#))
    };
    let shared_key = |name: &str| {
        let id = ApiKey::new(SPARE_KEY).unwrap().fingerprint();
        let content = format!(r#"{{"present":{{"key":"{SPARE_KEY}","name":"{name}"}}}}"#);
        document_with(&format!(r#""{id}":{{"changed_at":5,"content":{content}}}"#), "")
    };
    for (number, text) in [
        String::new(),
        "{}".to_owned(),
        document_with("", "").replace(r#""format":1"#, r#""format":2"#),
        document_with("", "").replace(r#""generation":9"#, r#""generation":18446744073709551615"#),
        client("../web", 5),
        client("web", u64::MAX),
        shared_key("../../evil"),
        shared_key("a\\nb"),
        shared_key("x").replace(SPARE_KEY, THIRD_KEY),
    ]
    .into_iter()
    .enumerate()
    {
        let version =
            OverlayVersion { generation: 100 + number as u64, changed_at: UnixMs(0), content_hash: [0; 16] };
        let document = crate::shared::SecretDocument::new(text.clone().into_bytes());
        let sealed = SealedOverlay::seal(version, &document, [&key]).unwrap();
        second.receive(&sealed).await;
        assert_eq!(second.machine.state_files(), files_before, "this overlay must change no file: {text}");
        assert!(second.controller.merge_failure.take().is_some(), "this overlay must be refused: {text}");
    }
    drop(first);
}
