-- A database of version 0.1.0, whose schema has the number 14, with four attempts. Keychoir has written it, and SQLite has
-- dumped it. Because a released schema never changes, this file never changes.
PRAGMA application_id = 1264806002;
PRAGMA user_version = 14;
BEGIN TRANSACTION;
CREATE TABLE attempts (
        -- UUID of version 7, so ids are in the order of time
        id TEXT PRIMARY KEY,
        request_id TEXT NOT NULL,
        -- from 1 within the request
        number INTEGER NOT NULL,
        -- Unix milliseconds
        started_at_ms INTEGER NOT NULL,
        client TEXT NOT NULL,
        -- fingerprint of the key; `own` for a client's own key
        key_hash TEXT NOT NULL,
        workspace TEXT,
        method TEXT NOT NULL,
        -- the path with {id} instead of identifiers
        route TEXT NOT NULL,
        model TEXT,
        -- of the response; NULL: no response was received
        status INTEGER,
        verdict TEXT NOT NULL,
        request_bytes INTEGER NOT NULL,
        response_bytes INTEGER NOT NULL,
        characters INTEGER,
        -- duration of the audio that a WebSocket sent to be transcribed
        audio_ms INTEGER,
        -- credits that were reserved before the request was sent
        credits_reserved INTEGER,
        credits INTEGER NOT NULL,
        -- source of `credits`: answer, estimate, free or unknown
        credits_from TEXT NOT NULL,
        first_byte_ms INTEGER,
        total_ms INTEGER NOT NULL
    , user TEXT, region TEXT) STRICT, WITHOUT ROWID;
INSERT INTO "attempts" VALUES('01a22a0d-2c52-736d-b9ba-e3d8e9222ff4','01a22a0d-2c51-736d-b9ba-e3d7e9222ff4',1,1796001836114,'local','afb57fd14389db2eaf33035a67cb1c8d20eff8a4ea77bcbcd8b1b290ef3c93d9',NULL,'POST','/v1/text-to-speech/{id}','eleven_multilingual_v2',200,'served',64,16718,17,NULL,17,17,'answer',0,1,NULL,'127.0.0.1');
INSERT INTO "attempts" VALUES('01a22a0d-2c69-736d-b9ba-e3dae9222ff4','01a22a0d-2c69-736d-b9ba-e3d9e9222ff4',1,1796001836137,'local','afb57fd14389db2eaf33035a67cb1c8d20eff8a4ea77bcbcd8b1b290ef3c93d9',NULL,'POST','/v1/text-to-speech/{id}','eleven_multilingual_v2',200,'served',64,16718,17,NULL,17,17,'answer',1,1,NULL,'127.0.0.1');
INSERT INTO "attempts" VALUES('01a22a0d-2c84-736d-b9ba-e3dce9222ff4','01a22a0d-2c84-736d-b9ba-e3dbe9222ff4',1,1796001836164,'local','afb57fd14389db2eaf33035a67cb1c8d20eff8a4ea77bcbcd8b1b290ef3c93d9',NULL,'POST','/v1/text-to-speech/{id}','eleven_multilingual_v2',200,'served',64,16718,17,NULL,17,17,'answer',0,0,NULL,'127.0.0.1');
INSERT INTO "attempts" VALUES('01a22a0d-2c99-736d-b9ba-e3dee9222ff4','01a22a0d-2c99-736d-b9ba-e3dde9222ff4',1,1796001836185,'local','afb57fd14389db2eaf33035a67cb1c8d20eff8a4ea77bcbcd8b1b290ef3c93d9',NULL,'GET','/v1/voices',NULL,200,'served',0,1490,NULL,NULL,NULL,0,'free',4,4,NULL,'127.0.0.1');
CREATE TABLE changes (
        -- UUID of version 7, so ids are in the order of time
        id TEXT PRIMARY KEY,
        -- Unix milliseconds
        at_ms INTEGER NOT NULL,
        -- credential or program: admin_token, command_line or reload
        actor TEXT NOT NULL,
        -- IP address of the client of the admin API; NULL for a Unix socket or the command line
        address TEXT,
        -- such as key_added or client_rotated
        action TEXT NOT NULL,
        -- the short form or name of the key, or the name of the client
        target TEXT,
        -- JSON without secrets
        detail TEXT NOT NULL,
        -- the generation after the change
        generation INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
CREATE TABLE hours (
        hour_ms INTEGER NOT NULL,
        key_hash TEXT NOT NULL,
        client TEXT NOT NULL,
        route TEXT NOT NULL,
        -- empty: unknown
        model TEXT NOT NULL,
        attempts INTEGER NOT NULL,
        -- with a response status below 400
        served INTEGER NOT NULL,
        request_bytes INTEGER NOT NULL,
        response_bytes INTEGER NOT NULL,
        characters INTEGER NOT NULL,
        credits INTEGER NOT NULL,
        -- attempts that may have been charged an unknown amount
        unpriced INTEGER NOT NULL, quota_requests INTEGER NOT NULL DEFAULT 0, quota_credits INTEGER NOT NULL DEFAULT 0,
        PRIMARY KEY (hour_ms, key_hash, client, route, model)
    ) STRICT, WITHOUT ROWID;
INSERT INTO "hours" VALUES(1796000400000,'afb57fd14389db2eaf33035a67cb1c8d20eff8a4ea77bcbcd8b1b290ef3c93d9','local','/v1/text-to-speech/{id}','eleven_multilingual_v2',3,3,192,50154,51,51,0,3,51);
INSERT INTO "hours" VALUES(1796000400000,'afb57fd14389db2eaf33035a67cb1c8d20eff8a4ea77bcbcd8b1b290ef3c93d9','local','/v1/voices','',1,1,0,1490,0,0,0,0,0);
CREATE TABLE keys (
        key_hash TEXT PRIMARY KEY,
        short_key TEXT NOT NULL,
        name TEXT,
        workspace TEXT,
        position INTEGER NOT NULL,
        status TEXT NOT NULL,
        character_count INTEGER NOT NULL,
        character_limit INTEGER,
        -- NULL: no overage; -1: without end
        extension INTEGER,
        resets_at_ms INTEGER,
        updated_at_ms INTEGER NOT NULL
    , evidence TEXT NOT NULL DEFAULT '{}', plan TEXT) STRICT;
INSERT INTO "keys" VALUES('afb57fd14389db2eaf33035a67cb1c8d20eff8a4ea77bcbcd8b1b290ef3c93d9','...',NULL,NULL,0,'active',51,500,NULL,1796083200000,1796001836192,'{}','creator');
INSERT INTO "keys" VALUES('b1a146820f9254b9dd45028ca80e6c71d79c7f8259ad447eda56048ba7c1c7ba','...',NULL,NULL,1,'active',0,100000,NULL,1796083200000,1796001834161,'{}','creator');
CREATE TABLE maintenance (
        task TEXT PRIMARY KEY
    ) STRICT, WITHOUT ROWID;
CREATE TABLE outbox_events (
        -- id of the attempt
        id TEXT PRIMARY KEY,
        -- error code of Supabase, if it has refused the row
        refused TEXT,
        parked_until_ms INTEGER,
        -- increases when the attempt changes, so that the delivery of an earlier state does not count
        revision INTEGER NOT NULL DEFAULT 0
    ) STRICT, WITHOUT ROWID;
CREATE TABLE outbox_keys (
        key_hash TEXT PRIMARY KEY,
        short_key TEXT NOT NULL,
        status TEXT NOT NULL,
        character_count INTEGER NOT NULL,
        -- 0: unknown
        character_limit INTEGER NOT NULL,
        remaining INTEGER NOT NULL,
        usage REAL NOT NULL,
        is_over_limit INTEGER NOT NULL,
        is_near_limit INTEGER NOT NULL,
        resets_at_ms INTEGER,
        -- increases with every state, also when the clock is set back
        observed_at_ms INTEGER NOT NULL,
        -- the state that Supabase has confirmed
        sent_at_ms INTEGER,
        -- the code with which it was refused
        refused TEXT,
        parked_until_ms INTEGER
    ) STRICT, WITHOUT ROWID;
CREATE TABLE outbox_renames (
        -- the first 12 digits of the old name
        beginning TEXT PRIMARY KEY,
        -- the new name
        key_hash TEXT NOT NULL
    ) STRICT, WITHOUT ROWID;
CREATE TABLE owners (
        -- SHA-256 of kind and identifier, cut to 16 bytes
        id BLOB PRIMARY KEY,
        kind TEXT NOT NULL,
        -- 0: long-lived; before schema 5 also 1: one per request, and 2: valid for hours
        class INTEGER NOT NULL,
        -- its name, or the hash of its first key
        workspace TEXT NOT NULL,
        learned_at_ms INTEGER NOT NULL,
        used_at_ms INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
CREATE TABLE owners_plentiful (
        number INTEGER PRIMARY KEY,
        changes INTEGER NOT NULL,
        -- the latest use of the identifiers
        used_at_ms INTEGER NOT NULL,
        pack BLOB NOT NULL
    ) STRICT;
INSERT INTO "owners_plentiful" VALUES(1,1,1796001836115,X'020C686973746F7279206974656D40616662353766643134333839646232656166333330333561363763623163386432306566663861346561373762636263643862316232393065663363393364398512128243B2DFA8A34891AAAB9E80AB0002A6B1E9A0C56800');
INSERT INTO "owners_plentiful" VALUES(2,2,1796001836165,X'020C686973746F7279206974656D4061666235376664313433383964623265616633333033356136376362316338643230656666386134656137376263626364386231623239306566336339336439AE83E022DFD7C2E7407470A7FB099E3100028AB2E9A0C56800508CDADD6ADD351A34D0E225E3A4054200023300');
CREATE TABLE refusals (
        -- number of the restriction in the run of the program that wrote it
        number INTEGER PRIMARY KEY,
        refused_at_ms INTEGER NOT NULL,
        -- JSON
        refusal TEXT NOT NULL
    ) STRICT;
CREATE TABLE retired_keys (
        key_hash TEXT PRIMARY KEY
    ) STRICT, WITHOUT ROWID;
CREATE TABLE user_hours (
        hour_ms INTEGER NOT NULL,
        client TEXT NOT NULL,
        -- fingerprint of the end user; empty: none, or attempts that cost nothing
        user TEXT NOT NULL,
        -- empty: unknown
        region TEXT NOT NULL,
        attempts INTEGER NOT NULL,
        served INTEGER NOT NULL,
        request_bytes INTEGER NOT NULL,
        response_bytes INTEGER NOT NULL,
        characters INTEGER NOT NULL,
        credits INTEGER NOT NULL,
        unpriced INTEGER NOT NULL,
        quota_requests INTEGER NOT NULL,
        quota_credits INTEGER NOT NULL,
        PRIMARY KEY (hour_ms, client, user, region)
    ) STRICT, WITHOUT ROWID;
INSERT INTO "user_hours" VALUES(1796000400000,'local','','127.0.0.1',4,4,192,51644,51,51,0,3,51);
CREATE INDEX owners_by_use ON owners (class, used_at_ms);
CREATE INDEX outbox_events_refused ON outbox_events (id) WHERE refused IS NOT NULL;
CREATE INDEX user_hours_by_user ON user_hours (user, client) WHERE user <> '';
CREATE TRIGGER attempts_deleted AFTER DELETE ON attempts BEGIN
        DELETE FROM outbox_events WHERE id = OLD.id;
    END;
COMMIT;
