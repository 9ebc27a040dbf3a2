//! Tests of the overlay: each overlay is read as it was written, and another document is refused. Also tests the files
//! of the state directory: their modes, their lock, orphaned key files, and a write that fails.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use proptest::prelude::*;

use super::*;
use crate::secret::ApiKey;

fn key_with_name(name: &str) -> ManagedKey {
    ManagedKey {
        name: name.to_owned(),
        key_file: format!("{KEYS_DIRECTORY}/{name}"),
        ..ManagedKey::default()
    }
}

fn any_time() -> impl Strategy<Value = UnixMs> {
    // The limit is 30 December 9999, 22:00 UTC, where the calendar of the library ends.
    (0..253_402_207_200_000_u64).prop_map(UnixMs)
}

prop_compose! {
    fn managed_key()(
        name in ".*",
        workspace in proptest::option::of(".*"),
        base_url in proptest::option::of(".*"),
        weight in proptest::option::of(any::<u32>()),
        changed_at in any_time(),
        left_out in any::<bool>(),
    ) -> ManagedKey {
        ManagedKey { key_file: format!("keys/{name}"), name, workspace, base_url, weight, changed_at, left_out }
    }
}

prop_compose! {
    fn paused_key()(
        fingerprint in ".*",
        short_key in ".*",
        since in any_time(),
        until in proptest::option::of(any_time()),
        reason in proptest::option::of(".*"),
        changed_at in any_time(),
    ) -> PausedKey {
        PausedKey { fingerprint, short_key, since, until, reason, changed_at }
    }
}

prop_compose! {
    fn managed_client()(
        name in ".*",
        token_sha256 in proptest::option::of("[0-9a-f]{64}"),
        expires_at in proptest::option::of(any_time()),
        previous_token_expires_at in proptest::option::of(any_time()),
        revoked in any::<bool>(),
        changed_at in any_time(),
        left_out in any::<bool>(),
        quota in proptest::option::of(".*"),
        max_concurrent in proptest::option::of(any::<u32>()),
        paths in proptest::collection::vec(".*", 0..3),
        bring_your_own_key in proptest::option::of(any::<bool>()),
    ) -> ManagedClient {
        let (previous_token_sha256, replaced_token_sha256) = (token_sha256.clone(), token_sha256.clone());
        let rules =
            ManagedRules { quota, max_concurrent, paths, bring_your_own_key, ..ManagedRules::default() };
        ManagedClient {
            name, token_sha256, expires_at, previous_token_sha256, previous_token_expires_at, replaced_token_sha256,
            revoked, changed_at, left_out, rules,
        }
    }
}

prop_compose! {
    fn removed_entry()(
        kind in prop_oneof![Just(EntryKind::Key), Just(EntryKind::PausedKey), Just(EntryKind::Client)],
        id in ".*",
        changed_at in any_time(),
    ) -> RemovedEntry {
        RemovedEntry { kind, id, changed_at }
    }
}

proptest! {
    #[test]
    fn every_overlay_is_read_as_it_was_written(
        generation in 0..i64::MAX.unsigned_abs(),
        keys in proptest::collection::vec(managed_key(), 0..3),
        paused_keys in proptest::collection::vec(paused_key(), 0..3),
        clients in proptest::collection::vec(managed_client(), 0..3),
        removed in proptest::collection::vec(removed_entry(), 0..3),
    ) {
        let overlay = Overlay { generation, keys, paused_keys, clients, removed };
        let text = overlay.format().unwrap();
        prop_assert_eq!(Overlay::parse(&text).unwrap(), overlay, "{}", text);
    }
}

#[test]
fn another_document_is_refused() {
    for text in ["[server]\n", "generation = \"1\"\n", "[[keys]]\nname = \"a\"\n", "x"] {
        assert!(Overlay::parse(text).is_err(), "{text:?} must be refused");
    }
    assert_eq!(Overlay::parse("").unwrap(), Overlay::default());
}

#[test]
fn only_the_owner_can_read_the_files_and_no_temporary_file_remains() {
    let temporary = tempfile::tempdir().unwrap();
    let directory = StateDirectory::new(temporary.path().join("state"));
    let lock = directory.try_lock().unwrap();
    lock.save("generation = 1\n").unwrap();
    lock.write_key("spare", &ApiKey::new("sk_spare").unwrap()).unwrap();
    lock.write_admin_token("kca_token").unwrap();
    let mode = |path: &std::path::Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(directory.path()), 0o700);
    assert_eq!(mode(&directory.path().join(KEYS_DIRECTORY)), 0o700);
    for path in [directory.overlay_path(), directory.key_path("spare"), directory.admin_token_path()] {
        assert_eq!(mode(&path), 0o600, "only the owner must have access to {}", path.display());
    }
    assert_eq!(fs::read_to_string(directory.key_path("spare")).unwrap(), "sk_spare\n");
    assert_eq!(fs::read_dir(directory.path().join(KEYS_DIRECTORY)).unwrap().count(), 1);
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 4);
    assert_eq!(lock.read().unwrap().generation, 1);
}

#[test]
fn the_lock_is_not_acquired_while_it_is_held() {
    let temporary = tempfile::tempdir().unwrap();
    let directory = StateDirectory::new(temporary.path().to_owned());
    let first = directory.try_lock().unwrap();
    assert!(matches!(directory.try_lock(), Err(LockError::Held)));
    drop(first);
    assert!(directory.try_lock().is_ok());
}

#[test]
fn key_files_that_no_entry_names_are_deleted() {
    let temporary = tempfile::tempdir().unwrap();
    let directory = StateDirectory::new(temporary.path().to_owned());
    let lock = directory.try_lock().unwrap();
    assert_eq!(lock.delete_orphaned_key_files(&Overlay::default()).unwrap(), 0);
    for name in ["kept", "orphaned"] {
        lock.write_key(name, &ApiKey::new("sk_x").unwrap()).unwrap();
    }
    let overlay = Overlay { keys: vec![key_with_name("kept")], ..Overlay::default() };
    assert_eq!(lock.delete_orphaned_key_files(&overlay).unwrap(), 1);
    assert!(directory.key_path("kept").exists() && !directory.key_path("orphaned").exists());
}

#[test]
fn a_key_file_that_cannot_be_written_leaves_the_overlay_unchanged() {
    let temporary = tempfile::tempdir().unwrap();
    let directory = StateDirectory::new(temporary.path().to_owned());
    let lock = directory.try_lock().unwrap();
    lock.save("generation = 1\n").unwrap();
    // With a file in place of the keys' directory, the write fails even for a user who may ignore file modes.
    fs::write(temporary.path().join(KEYS_DIRECTORY), "").unwrap();
    assert!(lock.write_key("spare", &ApiKey::new("sk_x").unwrap()).is_err());
    assert_eq!(lock.read().unwrap().generation, 1);
}
