//! Tests of changes that conflict with changes of another replica, or with the configuration file of one replica: equal
//! names, concurrent changes and revocations, and entries that are left out.

use super::*;

#[tokio::test]
async fn concurrent_changes_of_one_entry_converge_to_one_of_them() {
    let (mut first, mut second) = start_pair().await;
    first.make(set_quota("app", "5 requests")).await;
    second.make(set_quota("app", "6 requests")).await;
    exchange_overlays(&mut first, &mut second).await;
    assert_equal_replicas(&first, &second);
    let quota = |replica: &Replica| replica.machine.config().clients[0].rules.quota.unwrap().to_string();
    assert_eq!(quota(&first), quota(&second));
    assert!(
        ["5 requests", "6 requests"].contains(&quota(&first).as_str()),
        "one of the quotas must be in force"
    );
}

#[tokio::test]
async fn different_keys_with_one_name_get_different_names() {
    let (mut first, mut second) = start_pair().await;
    first.make(add_key("spare", SPARE_KEY)).await;
    second.make(add_key("spare", THIRD_KEY)).await;
    exchange_overlays(&mut first, &mut second).await;
    assert_equal_replicas(&first, &second);
    for replica in [&first, &second] {
        let config = replica.machine.config();
        let mut keys: Vec<&str> = config.keys.iter().map(|key| key.key.expose()).collect();
        keys.sort_unstable();
        assert_eq!(keys, [THIRD_KEY, FIRST_KEY, SPARE_KEY], "no key must be lost or in the file of another");
    }
    second.make(remove_key("spare")).await;
    exchange_overlays(&mut first, &mut second).await;
    assert_equal_replicas(&first, &second);
    assert_eq!(first.machine.config().keys.len(), 2);
}

#[tokio::test]
async fn a_name_that_is_used_again_gets_the_file_of_its_key() {
    let (mut first, mut second) = start_pair().await;
    first.make(add_key("spare", SPARE_KEY)).await;
    exchange_overlays(&mut first, &mut second).await;
    first.make(remove_key("spare")).await;
    first.make(add_key("spare", THIRD_KEY)).await;
    // A crash after the key file is written leaves the previous key in force.
    second.controller.stop_after = Some(ChangeStep::KeyFilesWritten);
    let overlay = first.published_overlay();
    second.receive(&overlay).await;
    assert_eq!(second.machine.config().keys[1].key.expose(), SPARE_KEY);
    second.controller.stop_after = None;
    second.delivered.clear();
    exchange_overlays(&mut first, &mut second).await;
    assert_eq!(second.machine.config().keys[1].key.expose(), THIRD_KEY);
    assert_eq!(fs::read_dir(second.machine.state_directory().join(KEYS_DIRECTORY)).unwrap().count(), 1);
    assert_equal_replicas(&first, &second);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_that_conflicts_with_the_configuration_file_is_left_out_until_the_file_is_corrected() {
    let mut first = Replica::start(Machine::new()).await;
    let machine = Machine::new();
    machine.configure(&format!("[[keys]]\nname = \"spare\"\nkey = \"{THIRD_KEY}\"\n"));
    let mut second = Replica::start_with_server(machine).await;
    first.make(Change::AddKey(new_key())).await;
    first.make(pause_key("first")).await;
    exchange_overlays(&mut first, &mut second).await;
    let config = second.machine.config();
    assert_eq!(config.keys[1].key.expose(), THIRD_KEY, "the key of the file must stay");
    assert_eq!((config.keys.len(), config.paused_keys.len()), (2, 1), "the other changes must apply");
    assert_eq!(
        first.published_overlay().version(),
        second.published_overlay().version(),
        "the entry must still be shared"
    );
    let error = second.controller.make(remove_key("spare"), None, ORIGIN, None).await.unwrap_err();
    assert!(matches!(error, ControlError::NotManaged(_)), "the change must be refused: {error}");
    // The entry stays left out after another change, and the key applies when the file is corrected.
    second.make(Change::ResumeKey { key: "first".to_owned() }).await;
    assert!(second.overlay().keys[0].left_out);
    second.machine.configure("");
    second.make(Change::Reload).await;
    assert_eq!(second.machine.config().keys[1].key.expose(), SPARE_KEY);
    assert_eq!(second.app.as_ref().unwrap().keys().len(), 2);
    exchange_overlays(&mut first, &mut second).await;
    assert_equal_replicas(&first, &second);
    second.app.unwrap().drain(Duration::ZERO).await;
}

#[tokio::test]
async fn a_client_that_the_configuration_file_defines_keeps_its_token() {
    let (mut first, mut second) = start_pair().await;
    let token = TokenFingerprint::new("token-of-web");
    second.machine.configure(&format!("[[clients]]\nname = \"web\"\ntoken_sha256 = \"{token}\"\n"));
    first.make(add_client("web")).await;
    first.make(rotate_client("web")).await;
    first.make(add_client("phone")).await;
    exchange_overlays(&mut first, &mut second).await;
    let clients = second.machine.config().clients;
    assert_eq!((clients[1].name.as_str(), clients[1].token), ("web", token));
    assert_eq!(clients.len(), 3, "the other client must be added");
    let error = second.controller.make(revoke_client("web"), None, ORIGIN, None).await.unwrap_err();
    assert!(matches!(error, ControlError::NotManaged(_)), "the change must be refused: {error}");
    // The client can still be changed where it was added.
    first.make(revoke_client("web")).await;
    exchange_overlays(&mut first, &mut second).await;
    assert_eq!(second.machine.config().clients.len(), 3);
    assert_eq!(first.published_overlay().version(), second.published_overlay().version());
}

fn rotate_client(name: &str) -> Change {
    Change::RotateClient { name: name.to_owned(), grace: Duration::ZERO, expires_at: None }
}

#[tokio::test]
async fn a_client_whose_key_was_removed_at_the_other_replica_is_left_out_at_both_replicas() {
    let (mut first, mut second) = start_pair().await;
    first.make(Change::AddKey(new_key())).await;
    exchange_overlays(&mut first, &mut second).await;
    first.make(remove_key("spare")).await;
    let rules = ClientRules { keys: Some(vec!["spare".to_owned()]), ..ClientRules::default() };
    second.make(Change::AddClient { name: "web".to_owned(), rules, expires_at: None }).await;
    exchange_overlays(&mut first, &mut second).await;
    assert_equal_replicas(&first, &second);
    assert_eq!(first.names().1, ["app"]);
    assert!(first.overlay().clients[0].left_out && second.overlay().clients[0].left_out);
}

#[tokio::test]
async fn concurrent_revocations_leave_a_client() {
    let (mut first, mut second) = start_pair().await;
    first.make(add_client("web")).await;
    exchange_overlays(&mut first, &mut second).await;
    first.make(revoke_client("app")).await;
    second.make(revoke_client("web")).await;
    exchange_overlays(&mut first, &mut second).await;
    let names = |replica: &Replica| replica.names().1;
    assert_eq!((names(&first), names(&second)), (vec!["web".to_owned()], vec!["app".to_owned()]));
    first.make(add_client("phone")).await;
    exchange_overlays(&mut first, &mut second).await;
    assert_equal_replicas(&first, &second);
    assert_eq!(names(&second), ["phone"]);
}
