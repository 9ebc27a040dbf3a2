//! Owns the sessions of the dashboard and the one-time codes that start them, and writes the sessions to a file, so
//! that they survive a restart. The file contains fingerprints, from which a session token cannot be computed.
//! `policy::sessions` decides when a code expires and when a session ends.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use std::{fs, io};

use serde::{Deserialize, Serialize};

use super::SharedAdminToken;
use crate::policy::sessions::{CODE_LIFETIME, OperatorSession, SessionLimits, SessionTable};
use crate::policy::units::UnixMs;
use crate::secret::{SessionTokenFingerprint, generate_token};
use crate::{clock, private_file, tasks};

/// The prefix of codes that start a session.
const CODE_PREFIX: &str = "kcd_";
/// The prefix of the tokens in cookies.
const TOKEN_PREFIX: &str = "kcs_";
/// Length of the intervals that limit writes: a use of a session is written to the file only if it is the first use in
/// an interval. After a crash, a session may end earlier by this time.
const SAVE_INTERVAL: Duration = Duration::from_secs(300);
/// Maximum size of the file that is read. The file of the maximum of 64 sessions has about 8 kilobytes.
const MAX_FILE_BYTES: u64 = 64 * 1024;

/// The sessions of the dashboard. Clones share them.
#[derive(Clone, Debug)]
pub struct Sessions(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    table: Mutex<SessionTable>,
    limits: SessionLimits,
    admin_token: SharedAdminToken,
    /// The path of the file. It is `None` if Keychoir has no state directory. A restart then ends all sessions.
    file: Option<PathBuf>,
    /// Held while the file is written, so that an earlier state cannot replace a later one.
    write_lock: Mutex<()>,
}

/// A secret of the dashboard: a one-time code that starts a session, or the token of a session. Its `Debug` output does
/// not contain it.
pub struct DashboardSecret(String);

impl DashboardSecret {
    /// Returns the secret, for the response that contains it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for DashboardSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DashboardSecret(…)")
    }
}

/// A session in the notation of the file.
#[derive(Serialize, Deserialize)]
struct StoredSession {
    fingerprint: String,
    started_at_ms: u64,
    used_at_ms: u64,
}

impl Sessions {
    /// Reads the sessions in `file`. If the file cannot be read, logs a warning and starts without sessions.
    #[must_use]
    pub fn open(file: Option<PathBuf>, limits: SessionLimits, admin_token: SharedAdminToken) -> Self {
        let stored = file.as_deref().map(read_file).unwrap_or_default();
        let table = Mutex::new(SessionTable::with_sessions(stored));
        Self(Arc::new(Inner { table, limits, admin_token, file, write_lock: Mutex::default() }))
    }

    /// Creates a code that starts a session within [`CODE_LIFETIME`], and returns the code with its expiry. Returns
    /// `None` if there is no admin token, or if the system has no random numbers.
    pub(super) fn create_code(&self, now: UnixMs) -> Option<(DashboardSecret, UnixMs)> {
        let code = generate_token(CODE_PREFIX)?;
        self.lock().add_code(self.fingerprint(&code)?, now);
        Some((DashboardSecret(code), now.plus(CODE_LIFETIME)))
    }

    /// Starts a session with a code, and returns the token of the session. Returns `None` if the code is not valid, if
    /// there is no admin token, or if the system has no random numbers.
    #[must_use]
    pub fn start(&self, code: &str, now: UnixMs) -> Option<DashboardSecret> {
        let code = self.fingerprint(code)?;
        let token = generate_token(TOKEN_PREFIX)?;
        let has_started = self.lock().start(&code, self.fingerprint(&token)?, self.0.limits, now);
        if !has_started {
            return None;
        }
        self.save();
        Some(DashboardSecret(token))
    }

    /// Records a use of the session with the given `token`, which extends it. Returns `false` if there is no such
    /// session.
    #[must_use]
    pub fn record_use(&self, token: &str, now: UnixMs) -> bool {
        let Some(fingerprint) = self.fingerprint(token) else { return false };
        let Some(previous) = self.lock().record_use(&fingerprint, self.0.limits, now) else { return false };
        let interval_number = |time: UnixMs| u128::from(time.0) / SAVE_INTERVAL.as_millis();
        if interval_number(previous.used_at) != interval_number(now) {
            self.save();
        }
        true
    }

    /// Returns a function that reports whether the session with the given `token` still exists. A call of the function
    /// does not extend the session, so that a page that is only open does not extend it.
    pub(super) fn existence_check(&self, token: &str) -> impl Fn() -> bool + Send + use<> {
        let (sessions, token) = (self.clone(), DashboardSecret(token.to_owned()));
        move || {
            let fingerprint = sessions.fingerprint(token.expose());
            let limits = sessions.0.limits;
            fingerprint
                .is_some_and(|fingerprint| sessions.lock().contains(&fingerprint, limits, clock::now()))
        }
    }

    /// Ends the session with the given `token`.
    pub fn end(&self, token: &str) {
        let Some(fingerprint) = self.fingerprint(token) else { return };
        let has_ended = self.lock().end(&fingerprint);
        if has_ended {
            self.save();
        }
    }

    /// Returns the maximum duration of a session.
    #[must_use]
    pub fn max_duration(&self) -> Duration {
        self.0.limits.max_duration
    }

    /// Returns the fingerprint of a code or token, or `None` if there is no admin token.
    fn fingerprint(&self, token: &str) -> Option<SessionTokenFingerprint> {
        let admin_token = self.0.admin_token.load();
        admin_token.as_deref().map(|admin_token| SessionTokenFingerprint::new(token, admin_token))
    }

    /// Writes the file on a blocking thread.
    fn save(&self) {
        if self.0.file.is_none() {
            return;
        }
        let sessions = self.clone();
        drop(tasks::spawn_blocking(move || sessions.write_file()));
    }

    fn write_file(&self) {
        let Inner { write_lock, file, .. } = &*self.0;
        let Some(file) = file else { return };
        let _guard = write_lock.lock().unwrap_or_else(PoisonError::into_inner);
        let stored: Vec<StoredSession> = self.lock().sessions().iter().map(StoredSession::new).collect();
        // Serializing these sessions cannot fail, because they consist of strings and numbers.
        let content = serde_json::to_vec(&stored).unwrap_or_default();
        if let Err(error) = private_file::replace(file, &content) {
            tracing::warn!(
                event = "sessions_not_saved",
                "The sessions of the dashboard cannot be saved in {}: {error}",
                file.display()
            );
        }
    }

    fn lock(&self) -> MutexGuard<'_, SessionTable> {
        self.0.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl StoredSession {
    fn new(session: &OperatorSession) -> Self {
        Self {
            fingerprint: session.fingerprint.to_string(),
            started_at_ms: session.started_at.0,
            used_at_ms: session.used_at.0,
        }
    }

    fn parse(&self) -> Option<OperatorSession> {
        Some(OperatorSession {
            fingerprint: SessionTokenFingerprint::parse(&self.fingerprint)?,
            started_at: UnixMs(self.started_at_ms),
            used_at: UnixMs(self.used_at_ms),
        })
    }
}

fn read_file(path: &Path) -> Vec<OperatorSession> {
    let read = || -> io::Result<Vec<StoredSession>> {
        if fs::metadata(path)?.len() > MAX_FILE_BYTES {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the file is too large"));
        }
        Ok(serde_json::from_slice(&fs::read(path)?)?)
    };
    match read() {
        Ok(stored) => stored.iter().filter_map(StoredSession::parse).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => {
            tracing::warn!(
                event = "sessions_unreadable",
                "The sessions of the dashboard cannot be read from {}, so operators must sign in again: {error}",
                path.display()
            );
            Vec::new()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use arc_swap::ArcSwapOption;

    use super::*;
    use crate::secret::AdminTokenFingerprint;

    const NOW: UnixMs = UnixMs(1_800_000_000_000);

    fn open(file: &Path, admin_token: &str) -> Sessions {
        let limits = SessionLimits {
            idle_timeout: Duration::from_secs(3_600),
            max_duration: Duration::from_secs(7_200),
        };
        let admin_token = ArcSwapOption::from_pointee(AdminTokenFingerprint::new(admin_token));
        Sessions::open(Some(file.to_owned()), limits, Arc::new(admin_token))
    }

    #[test]
    fn sessions_survive_a_restart_and_the_file_contains_no_secret() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("sessions.json");
        let sessions = open(&file, "admin");
        let (code, _) = sessions.create_code(NOW).unwrap();
        // `Sessions::start` needs a runtime for its blocking thread, so the test writes the file itself.
        let token = "token";
        let [code_fingerprint, token_fingerprint] =
            [code.expose(), token].map(|secret| sessions.fingerprint(secret).unwrap());
        let is_started = sessions.lock().start(&code_fingerprint, token_fingerprint, sessions.0.limits, NOW);
        assert!(is_started, "the code must start a session");
        sessions.write_file();
        let content = fs::read_to_string(&file).unwrap();
        assert!(
            !content.contains(code.expose()) && !content.contains("\"token\""),
            "the file must contain neither the code nor the token: {content}"
        );
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        let is_valid = |sessions: &Sessions| {
            let fingerprint = sessions.fingerprint(token).unwrap();
            sessions.lock().record_use(&fingerprint, sessions.0.limits, NOW).is_some()
        };
        assert!(is_valid(&open(&file, "admin")), "the session must survive a restart");
        assert!(!is_valid(&open(&file, "another")), "another admin token must end the session");
    }

    #[test]
    fn a_malformed_file_contains_no_sessions() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("sessions.json");
        for content in ["", "{}", "[{\"fingerprint\":\"zz\",\"started_at_ms\":1,\"used_at_ms\":1}]"] {
            fs::write(&file, content).unwrap();
            let sessions = open(&file, "admin");
            assert!(sessions.lock().sessions().is_empty(), "a broken file must have no sessions: {content}");
        }
    }
}
