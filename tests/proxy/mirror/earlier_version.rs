//! Tests that a start with the database of an earlier version replaces the plain SHA-256 digests of keys, by which that
//! version identified them, in the database and in Supabase.

use super::*;

/// Returns the plain SHA-256 of a key, by which an earlier version identified it.
fn plain_sha256(key: &str) -> String {
    use sha2::{Digest, Sha256};
    Sha256::digest(key.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The tables of attempts of the schema versions 7 to 11.
const EARLIER_ATTEMPTS: &str = "
    CREATE TABLE series (number INTEGER PRIMARY KEY, client TEXT NOT NULL, key_hash TEXT NOT NULL, workspace TEXT,
        method TEXT NOT NULL, route TEXT NOT NULL, model TEXT, status INTEGER, verdict TEXT NOT NULL,
        credits_from TEXT NOT NULL, used_at_ms INTEGER NOT NULL) STRICT;
    INSERT INTO series SELECT NULL, client, key_hash, workspace, method, route, model, status, verdict, credits_from, 0
    FROM attempts;
    CREATE TABLE attempt_rows (id BLOB PRIMARY KEY, request_id TEXT NOT NULL, series INTEGER NOT NULL,
        number INTEGER NOT NULL, started_at_ms INTEGER NOT NULL, request_bytes INTEGER NOT NULL,
        response_bytes INTEGER NOT NULL, characters INTEGER, credits_reserved INTEGER, credits INTEGER NOT NULL,
        first_byte_ms INTEGER, total_ms INTEGER NOT NULL, audio_ms INTEGER) STRICT, WITHOUT ROWID;
    INSERT INTO attempt_rows SELECT unhex(id, '-'), request_id, 1, number, started_at_ms, request_bytes, response_bytes,
        characters, credits_reserved, credits, first_byte_ms, total_ms, audio_ms FROM attempts;
    CREATE TABLE attempt_sheets (number INTEGER PRIMARY KEY, hour_ms INTEGER NOT NULL, count INTEGER NOT NULL,
        chance INTEGER NOT NULL, attempts INTEGER NOT NULL, lines TEXT NOT NULL) STRICT;
    CREATE TABLE owners_passing (number INTEGER PRIMARY KEY, changes INTEGER NOT NULL, used_at_ms INTEGER NOT NULL,
        pack BLOB NOT NULL) STRICT;
    DROP TABLE attempts;
    DROP TABLE user_hours;
    CREATE VIEW attempts AS SELECT * FROM attempt_rows;
    CREATE TRIGGER attempts_forgotten AFTER DELETE ON attempt_rows BEGIN
        DELETE FROM outbox_events WHERE id = OLD.id;
    END;";

/// Converts the database to version 9 of its schema, with plain key digests, and Supabase accordingly.
fn downgrade_database(directory: &Path, supabase: &Supabase) {
    let database = rusqlite::Connection::open(directory.join("keychoir.db")).unwrap();
    database.execute_batch(EARLIER_ATTEMPTS).unwrap();
    for key in KEYS {
        let (fingerprint, digest) = (Fingerprint::new(key), plain_sha256(key));
        for table in ["keys", "series", "hours", "outbox_keys"] {
            let sql = format!("UPDATE {table} SET key_hash = '{digest}' WHERE key_hash = '{fingerprint}'");
            database.execute_batch(&sql).unwrap();
        }
        for table in ["elevenlabs_key_usage", "elevenlabs_usage_events"] {
            supabase.sql(&format!(
                "UPDATE {table} SET api_key_hash = '{digest}' WHERE api_key_hash = '{fingerprint}'"
            ));
        }
    }
    let sql =
        "DROP TABLE retired_keys; DROP TABLE maintenance; DROP TABLE outbox_renames; DROP TABLE refusals;
         DROP TABLE changes; DROP TABLE replica; DROP TABLE days; DROP TABLE next_hour_of_days;
         ALTER TABLE keys DROP COLUMN plan; PRAGMA user_version = 9";
    database.execute_batch(sql).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn plain_key_digests_of_an_earlier_version_are_replaced() {
    let supabase = Supabase::new().await;
    let first_proxy = start_proxy(plan(), configure_mirror(&supabase)).await;
    request_speech_times(&first_proxy, 2).await;
    let directory = close_and_compare(first_proxy, &supabase).await;
    downgrade_database(directory.path(), &supabase);
    // Another proxy has already reported the second key with its new identifier.
    supabase.sql(&format!(
        "INSERT INTO elevenlabs_key_usage (api_key_hash, short_key, next_reset_date) VALUES ('{}', 's', 'infinity')",
        Fingerprint::new(SECOND_KEY)
    ));
    let earlier_request_count = supabase.gateway.received_requests().len();

    // The third key is not configured at the second start.
    let remaining_keys = Plan::with_keys([FIRST_KEY, SECOND_KEY].map(|key| (key, 100_000)));
    let second_proxy = start_proxy_in(directory, remaining_keys, configure_mirror(&supabase)).await;
    request_speech_times(&second_proxy, 1).await;
    wait_until(|| event_count(&supabase) == 3).await;
    wait_for_mirror(&second_proxy, "ok", 0).await;
    let directory = second_proxy.close_unchecked().await;

    let query_supabase_hashes =
        |table: &str| supabase.sql(&format!("SELECT DISTINCT api_key_hash FROM {table} ORDER BY 1"));
    let (keys, event_keys) =
        (query_supabase_hashes("elevenlabs_key_usage"), query_supabase_hashes("elevenlabs_usage_events"));
    assert_eq!(keys.len(), 3, "each key must have one row: {keys:?}");
    assert!(
        [FIRST_KEY, SECOND_KEY].iter().all(|key| keys.contains(&Fingerprint::new(key).to_string())),
        "each configured key must have its new identifier: {keys:?}"
    );
    assert_eq!(event_keys, [Fingerprint::new(FIRST_KEY).to_string()]);
    assert_eq!(query_database(directory.path(), "SELECT count(*) FROM outbox_renames"), ["0"]);
    let sent_requests: Vec<String> = supabase.gateway.received_requests()[earlier_request_count..]
        .iter()
        .map(|request| format!("{} {}", request.path, request.body))
        .collect();
    let files = ["keychoir.db", "keychoir.db-wal"]
        .map(|name| std::fs::read(directory.path().join(name)).unwrap_or_default());
    for key in KEYS {
        let digest = plain_sha256(key);
        assert!(
            !keys.contains(&digest) && !event_keys.contains(&digest),
            "no row must contain a plain digest"
        );
        assert!(
            !sent_requests.iter().any(|request| request.contains(&digest)),
            "no request must contain a plain digest: {sent_requests:?}"
        );
        let has_digest =
            |file: &Vec<u8>| file.windows(digest.len()).any(|window| window == digest.as_bytes());
        assert!(!files.iter().any(has_digest), "no file must contain a plain digest");
    }
}
