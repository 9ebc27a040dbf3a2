//! Starts, renews and ends the sessions of operators at the dashboard. A one-time code starts a session. The session
//! ends after a time without a use, at its maximum duration, or when the operator signs out.

use std::time::Duration;

use super::units::UnixMs;
use crate::secret::SessionTokenFingerprint;

/// Time for which a code can start a session.
pub const CODE_LIFETIME: Duration = Duration::from_secs(600);
/// Maximum number of codes at the same time. A further code replaces an earlier code.
const MAX_CODES: usize = 16;
/// Maximum number of sessions at the same time. A new session ends the session that was not used for the longest
/// time.
const MAX_SESSIONS: usize = 64;

/// The time limits of sessions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionLimits {
    /// The time without a request after which a session ends.
    pub idle_timeout: Duration,
    /// The time after which a session ends even if it is used.
    pub max_duration: Duration,
}

/// A session of an operator at the dashboard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OperatorSession {
    /// The fingerprint of the token in the cookie.
    pub fingerprint: SessionTokenFingerprint,
    /// The start of the session.
    pub started_at: UnixMs,
    /// The time of the last use.
    pub used_at: UnixMs,
}

impl OperatorSession {
    /// Returns whether the session has ended. A start or a use after `now` shows that the clock was set back, and does
    /// not extend the session beyond its maximum duration from `now`.
    fn has_ended(&self, limits: SessionLimits, now: UnixMs) -> bool {
        let (age, idle) = (now.since(self.started_at), now.since(self.used_at));
        age >= limits.max_duration || idle >= limits.idle_timeout
    }
}

/// All codes that can start a session, and all sessions.
#[derive(Clone, Debug, Default)]
pub struct SessionTable {
    /// The fingerprints of the codes, with the times at which the codes were created, the oldest first.
    codes: Vec<(SessionTokenFingerprint, UnixMs)>,
    sessions: Vec<OperatorSession>,
}

impl SessionTable {
    /// Creates a table with stored sessions.
    #[must_use]
    pub fn with_sessions(sessions: Vec<OperatorSession>) -> Self {
        Self { codes: Vec::new(), sessions }
    }

    /// Returns the sessions, for storage.
    #[must_use]
    pub fn sessions(&self) -> &[OperatorSession] {
        &self.sessions
    }

    /// Adds a code, which is valid for [`CODE_LIFETIME`] from `now`.
    pub fn add_code(&mut self, code: SessionTokenFingerprint, now: UnixMs) {
        self.remove_expired_codes(now);
        if self.codes.len() >= MAX_CODES {
            self.codes.remove(0);
        }
        self.codes.push((code, now));
    }

    /// Starts a session if the code is valid. The code cannot be used again. Returns whether a session was started.
    pub fn start(
        &mut self,
        code: &SessionTokenFingerprint,
        session: SessionTokenFingerprint,
        limits: SessionLimits,
        now: UnixMs,
    ) -> bool {
        self.remove_expired_codes(now);
        let Some(index) = self.codes.iter().position(|(known, _)| known == code) else { return false };
        self.codes.remove(index);
        self.sessions.retain(|session| !session.has_ended(limits, now));
        if self.sessions.len() >= MAX_SESSIONS {
            let least_recent = self.sessions.iter().enumerate().min_by_key(|(_, session)| session.used_at);
            if let Some((index, _)) = least_recent {
                self.sessions.swap_remove(index);
            }
        }
        self.sessions.push(OperatorSession { fingerprint: session, started_at: now, used_at: now });
        true
    }

    /// Records a use of a session at `now`, and returns the session as it was before. Returns `None` if the session
    /// does not exist or has ended.
    pub fn record_use(
        &mut self,
        fingerprint: &SessionTokenFingerprint,
        limits: SessionLimits,
        now: UnixMs,
    ) -> Option<OperatorSession> {
        let session = self.sessions.iter_mut().find(|session| session.fingerprint == *fingerprint)?;
        if session.has_ended(limits, now) {
            return None;
        }
        let session_before = *session;
        // If the clock was set back, the time of a use must not stay in the future.
        session.started_at = session.started_at.min(now);
        session.used_at = now;
        Some(session_before)
    }

    /// Returns whether a session exists and has not ended. The check does not count as a use.
    #[must_use]
    pub fn contains(
        &self,
        fingerprint: &SessionTokenFingerprint,
        limits: SessionLimits,
        now: UnixMs,
    ) -> bool {
        let session = self.sessions.iter().find(|session| session.fingerprint == *fingerprint);
        session.is_some_and(|session| !session.has_ended(limits, now))
    }

    /// Ends a session. Returns whether it existed.
    pub fn end(&mut self, fingerprint: &SessionTokenFingerprint) -> bool {
        let count = self.sessions.len();
        self.sessions.retain(|session| session.fingerprint != *fingerprint);
        self.sessions.len() < count
    }

    fn remove_expired_codes(&mut self, now: UnixMs) {
        self.codes.retain(|(_, created_at)| *created_at <= now && now.since(*created_at) < CODE_LIFETIME);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::AdminTokenFingerprint;

    const HOUR: Duration = Duration::from_secs(3_600);
    const LIMITS: SessionLimits =
        SessionLimits { idle_timeout: HOUR, max_duration: Duration::from_secs(4 * 3_600) };
    const START: UnixMs = UnixMs(1_800_000_000_000);

    fn fingerprint(token: &str) -> SessionTokenFingerprint {
        SessionTokenFingerprint::new(token, &AdminTokenFingerprint::new("admin"))
    }

    /// Returns a table in which the session `s` has started at [`START`].
    fn table() -> SessionTable {
        let mut table = SessionTable::default();
        table.add_code(fingerprint("code"), START);
        assert!(table.start(&fingerprint("code"), fingerprint("s"), LIMITS, START));
        table
    }

    #[track_caller]
    fn check_use(table: &mut SessionTable, after: Duration, is_valid: bool) {
        let session = table.record_use(&fingerprint("s"), LIMITS, START.plus(after));
        assert_eq!(session.is_some(), is_valid, "the session must be valid only until its end: {after:?}");
    }

    #[test]
    fn a_code_starts_one_session() {
        let mut table = table();
        assert!(
            !table.start(&fingerprint("code"), fingerprint("t"), LIMITS, START),
            "a used code must not start a session"
        );
        assert!(!table.start(&fingerprint("guess"), fingerprint("t"), LIMITS, START));
        assert_eq!(table.sessions().len(), 1);
    }

    #[test]
    fn a_full_table_drops_the_oldest_code() {
        let mut table = SessionTable::default();
        let code = |number: usize| fingerprint(&format!("code {number}"));
        (0..MAX_CODES).for_each(|number| table.add_code(code(number), START));
        assert!(table.start(&code(0), fingerprint("s"), LIMITS, START), "the first code must be valid");
        table.add_code(code(MAX_CODES), START);
        table.add_code(code(MAX_CODES + 1), START);
        assert!(!table.start(&code(1), fingerprint("t"), LIMITS, START), "the oldest code must be dropped");
        for number in 2..MAX_CODES + 2 {
            assert!(
                table.start(&code(number), fingerprint("t"), LIMITS, START),
                "code {number} must be valid"
            );
        }
    }

    #[test]
    fn a_code_expires() {
        let millisecond = Duration::from_millis(1);
        for (age, is_valid) in [(CODE_LIFETIME - millisecond, true), (CODE_LIFETIME, false)] {
            let mut table = SessionTable::default();
            table.add_code(fingerprint("code"), START);
            assert_eq!(
                table.start(&fingerprint("code"), fingerprint("s"), LIMITS, START.plus(age)),
                is_valid
            );
        }
        // A clock that is set back does not extend the lifetime of a code.
        let mut table = SessionTable::default();
        table.add_code(fingerprint("code"), START);
        assert!(!table.start(&fingerprint("code"), fingerprint("s"), LIMITS, START.minus(HOUR)));
    }

    #[test]
    fn a_session_ends_when_it_is_idle() {
        let mut idle = table();
        check_use(&mut idle, HOUR - Duration::from_millis(1), true);
        check_use(&mut idle, 2 * HOUR - Duration::from_millis(1), false);
        check_use(&mut table(), HOUR, false);
    }

    #[test]
    fn a_used_session_ends_at_its_maximum_duration() {
        let mut table = table();
        for half_hours in 1..8 {
            check_use(&mut table, half_hours * HOUR / 2, true);
        }
        check_use(&mut table, 4 * HOUR, false);
    }

    #[test]
    fn a_clock_that_is_set_back_does_not_extend_a_session() {
        let mut table = table();
        let past = START.minus(100 * HOUR);
        assert!(table.record_use(&fingerprint("s"), LIMITS, past).is_some());
        assert!(table.record_use(&fingerprint("s"), LIMITS, past.plus(HOUR)).is_none());
    }

    #[test]
    fn a_page_that_is_only_open_does_not_extend_a_session() {
        let mut table = table();
        let contains = |table: &SessionTable, after: Duration| {
            table.contains(&fingerprint("s"), LIMITS, START.plus(after))
        };
        assert!(contains(&table, HOUR - Duration::from_millis(1)));
        assert!(!contains(&table, HOUR));
        assert!(!table.contains(&fingerprint("another"), LIMITS, START));
        assert!(table.end(&fingerprint("s")) && !contains(&table, Duration::ZERO));
    }

    #[test]
    fn an_ended_session_is_not_valid() {
        let mut table = table();
        assert!(table.end(&fingerprint("s")));
        assert!(!table.end(&fingerprint("s")));
        check_use(&mut table, Duration::ZERO, false);
    }

    #[test]
    fn another_admin_token_ends_all_sessions() {
        let mut table = table();
        let with_other_admin_token =
            SessionTokenFingerprint::new("s", &AdminTokenFingerprint::new("another"));
        assert!(table.record_use(&with_other_admin_token, LIMITS, START).is_none());
    }

    #[test]
    fn the_number_of_codes_and_sessions_is_bounded() {
        let mut table = table();
        for number in 0..2 * MAX_SESSIONS {
            let (code, session) = (fingerprint(&format!("c{number}")), fingerprint(&format!("s{number}")));
            table.add_code(code, START.plus(Duration::from_millis(1)));
            assert!(table.start(&code, session, LIMITS, START.plus(Duration::from_millis(1))));
        }
        assert_eq!(table.sessions().len(), MAX_SESSIONS);
        check_use(&mut table, Duration::from_millis(1), false);
        (0..2 * MAX_CODES).for_each(|number| table.add_code(fingerprint(&number.to_string()), START));
        assert_eq!(table.codes.len(), MAX_CODES);
        let newest = fingerprint(&(2 * MAX_CODES - 1).to_string());
        assert!(table.start(&newest, fingerprint("new"), LIMITS, START));
    }
}
