//! Defines the state of a key: usable, in cooldown with a reason and an end, or paused by an operator. Also defines the
//! changes of the state that are logged and the kind of source of a key, and maps states to the four statuses of the
//! status document.

use std::sync::Arc;

use super::quota::Quota;
use super::units::UnixMs;

/// The kind of source from which a key was configured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KeyOrigin {
    /// An environment variable.
    #[default]
    Environment,
    /// A file of the operator: the configuration file, a list of keys or a credential of systemd.
    File,
    /// The state directory: the key was added at runtime, and only such a key can be removed at runtime.
    Managed,
}

impl KeyOrigin {
    /// Returns the identifier in documents.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Environment => "environment",
            Self::File => "file",
            Self::Managed => "managed",
        }
    }
}

/// The status of a key in the status document, whose format permits these four statuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KeyStatus {
    /// The key may be used.
    Active,
    /// The key has no credits left, or its account is locked.
    Exhausted,
    /// The key is rate limited.
    RateLimited,
    /// The provider refuses the key itself.
    Invalid,
}

impl KeyStatus {
    /// Returns the identifier in the status document, in usage records and in the mirror.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Exhausted => "exhausted",
            Self::RateLimited => "rate_limited",
            Self::Invalid => "invalid",
        }
    }

    /// Parses an identifier of [`as_str`](Self::as_str).
    #[must_use]
    pub fn parse(identifier: &str) -> Option<Self> {
        [Self::Active, Self::Exhausted, Self::RateLimited, Self::Invalid]
            .into_iter()
            .find(|status| status.as_str() == identifier)
    }
}

/// The reason why a key or a workspace is in cooldown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CooldownReason {
    /// The provider received too many requests in a span of time, or too many concurrent requests.
    RateLimited,
    /// No credits are left.
    Exhausted,
    /// The account has an unpaid bill, has not accepted the terms, or is suspected of abuse. The account holder must
    /// act.
    Billing,
    /// The provider refuses the key itself. Selection also gives this reason to a key that may not serve the request.
    Invalid,
    /// The key belongs to another region than that of the host to which its requests are sent.
    WrongHost,
}

impl CooldownReason {
    /// Returns the identifier on the status page.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::RateLimited => "rate_limited",
            Self::Exhausted => "exhausted",
            Self::Billing => "account_locked",
            Self::Invalid => "invalid_key",
            Self::WrongHost => "wrong_host",
        }
    }

    /// Returns the status of a key in a cooldown for this reason.
    #[must_use]
    pub fn status(self) -> KeyStatus {
        match self {
            Self::RateLimited => KeyStatus::RateLimited,
            // No status describes a locked account. Like an exhausted account, it cannot pay for requests.
            Self::Exhausted | Self::Billing => KeyStatus::Exhausted,
            // The host to which the requests are sent does not know the key.
            Self::Invalid | Self::WrongHost => KeyStatus::Invalid,
        }
    }
}

/// A cooldown of a key or a workspace. It ends at its time, or earlier when a poll, a served request or a new quota
/// period refutes its reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cooldown {
    /// The reason, which determines the reported status.
    pub reason: CooldownReason,
    /// The end of the cooldown.
    pub until: UnixMs,
}

impl Cooldown {
    /// Whether the cooldown has not ended at `now`.
    #[must_use]
    pub fn is_active(self, now: UnixMs) -> bool {
        now < self.until
    }

    /// Returns the cooldown that ends later, so that a short cooldown never shortens a long cooldown.
    #[must_use]
    pub fn latest(self, other: Self) -> Self {
        if other.until > self.until { other } else { self }
    }
}

/// An operator's pause of a key. The requests of the key are completed, and new requests use other keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pause {
    /// The start of the pause.
    pub since: UnixMs,
    /// The end of the pause, or `None` if only an operator ends it.
    pub until: Option<UnixMs>,
    /// The operator's reason, or `None` if the operator gave none.
    pub reason: Option<Arc<str>>,
}

impl Pause {
    /// Whether the pause has not ended at `now`.
    #[must_use]
    pub fn is_active(&self, now: UnixMs) -> bool {
        self.until.is_none_or(|until| now < until)
    }
}

/// Whether a key may be used now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyState {
    /// The key may be used.
    Usable,
    /// The key or its workspace is in cooldown, or the credits of the workspace are exhausted.
    CoolingDown {
        /// The reason, which determines the reported status.
        reason: CooldownReason,
        /// The end of the cooldown, if it is known.
        until: Option<UnixMs>,
    },
    /// An operator has paused the key.
    Paused {
        /// The end of the pause, or `None` if only an operator ends it.
        until: Option<UnixMs>,
        /// The status that the key would have without the pause.
        status: KeyStatus,
    },
}

impl KeyState {
    /// Computes the state of a key at `now` from its own cooldown, the cooldown of its workspace, and the quota.
    #[must_use]
    pub fn new(own: Option<Cooldown>, workspace: Option<Cooldown>, quota: &Quota, now: UnixMs) -> Self {
        let active_cooldowns =
            [own, workspace].into_iter().flatten().filter(|cooldown| cooldown.is_active(now));
        match active_cooldowns.reduce(Cooldown::latest) {
            // These reasons take precedence over exhausted credits, because a quota reset does not end them.
            Some(Cooldown {
                reason:
                    reason @ (CooldownReason::Invalid | CooldownReason::WrongHost | CooldownReason::Billing),
                until,
            }) => Self::CoolingDown { reason, until: Some(until) },
            _ if quota.is_exhausted() => {
                Self::CoolingDown { reason: CooldownReason::Exhausted, until: quota.resets_at }
            }
            Some(Cooldown { reason, until }) => Self::CoolingDown { reason, until: Some(until) },
            None => Self::Usable,
        }
    }

    /// Whether the key can serve some request. A key with one rate limited concurrency group can serve requests of
    /// the other groups.
    #[must_use]
    pub fn can_serve(self) -> bool {
        match self {
            Self::Usable | Self::CoolingDown { reason: CooldownReason::RateLimited, .. } => true,
            Self::CoolingDown {
                reason:
                    CooldownReason::Exhausted
                    | CooldownReason::Billing
                    | CooldownReason::Invalid
                    | CooldownReason::WrongHost,
                ..
            }
            | Self::Paused { .. } => false,
        }
    }

    /// Whether an operator has paused the key.
    #[must_use]
    pub fn is_paused(self) -> bool {
        matches!(self, Self::Paused { .. })
    }

    /// Returns the status in the status document, which has no status for a paused key: it reports the status that the
    /// key would have without the pause.
    #[must_use]
    pub fn status(self) -> KeyStatus {
        match self {
            Self::Paused { status, .. } => status,
            Self::Usable => KeyStatus::Active,
            Self::CoolingDown { reason, .. } => reason.status(),
        }
    }
}

/// A state change of a key, which is logged once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transition<K> {
    /// The key, or a value that identifies it.
    pub key: K,
    /// The change, with its reason and the credits.
    pub change: StateChange,
}

/// A change of a key's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateChange {
    /// The pool has started to use the key.
    InUse {
        /// The quota of the workspace.
        quota: Quota,
        /// The zero-based position of the key in the pool, or `None` if no other key was used before.
        rotated_to: Option<usize>,
    },
    /// The used credits are near the limit.
    NearLimit(Quota),
    /// A cooldown has started.
    CooldownStarted {
        /// The reason of the cooldown.
        reason: CooldownReason,
        /// The end of the cooldown, if it is known.
        until: Option<UnixMs>,
    },
    /// The cooldown has ended.
    CooldownEnded,
    /// An operator has paused the key.
    Paused {
        /// The end of the pause, or `None` if only an operator ends it.
        until: Option<UnixMs>,
    },
    /// The pause has ended.
    Resumed,
    /// A request may cost more than the remaining credits, so it did not use the key. Cheaper requests still use the
    /// key.
    Skipped {
        /// The remaining credits.
        left: u64,
        /// The estimated cost of the request in credits.
        needed: u64,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixMs = UnixMs(1_000);
    const FULL: Quota = Quota {
        count: 0,
        limit: Some(10),
        extension: super::super::quota::Extension::None,
        resets_at: Some(UnixMs(9_000)),
    };

    fn cooldown(reason: CooldownReason, until: u64) -> Option<Cooldown> {
        Some(Cooldown { reason, until: UnixMs(until) })
    }

    #[track_caller]
    fn check_state(
        own: Option<Cooldown>,
        workspace: Option<Cooldown>,
        quota: Quota,
        expected: Option<(CooldownReason, u64)>,
    ) {
        let expected = expected.map_or(KeyState::Usable, |(reason, until)| KeyState::CoolingDown {
            reason,
            until: Some(UnixMs(until)),
        });
        assert_eq!(KeyState::new(own, workspace, &quota, NOW), expected);
    }

    #[test]
    fn a_cooldown_is_active_until_its_end() {
        check_state(
            cooldown(CooldownReason::RateLimited, 1_001),
            None,
            FULL,
            Some((CooldownReason::RateLimited, 1_001)),
        );
        check_state(cooldown(CooldownReason::RateLimited, 1_000), None, FULL, None);
    }

    #[test]
    fn a_cooldown_of_a_workspace_applies_to_its_keys() {
        check_state(
            None,
            cooldown(CooldownReason::Exhausted, 2_000),
            FULL,
            Some((CooldownReason::Exhausted, 2_000)),
        );
    }

    #[test]
    fn the_cooldown_with_the_later_end_applies() {
        let (short, long) =
            (cooldown(CooldownReason::RateLimited, 1_500), cooldown(CooldownReason::Exhausted, 2_000));
        check_state(short, long, FULL, Some((CooldownReason::Exhausted, 2_000)));
        check_state(long, short, FULL, Some((CooldownReason::Exhausted, 2_000)));
    }

    #[test]
    fn an_exhausted_quota_is_a_cooldown_until_its_reset() {
        check_state(None, None, Quota { count: 10, ..FULL }, Some((CooldownReason::Exhausted, 9_000)));
        check_state(
            cooldown(CooldownReason::RateLimited, 1_500),
            None,
            Quota { count: 10, ..FULL },
            Some((CooldownReason::Exhausted, 9_000)),
        );
        check_state(
            cooldown(CooldownReason::Invalid, 1_500),
            None,
            Quota { count: 10, ..FULL },
            Some((CooldownReason::Invalid, 1_500)),
        );
    }

    #[test]
    fn a_pause_ends_at_its_time_or_never() {
        let pause = |until| Pause { since: UnixMs(0), until, reason: None };
        assert!(pause(Some(UnixMs(1_001))).is_active(NOW));
        assert!(!pause(Some(NOW)).is_active(NOW));
        assert!(pause(None).is_active(UnixMs(u64::MAX)));
    }

    #[test]
    fn a_paused_key_keeps_its_status_and_serves_nothing() {
        let paused = KeyState::Paused { until: None, status: KeyStatus::Exhausted };
        assert_eq!((paused.status(), paused.can_serve()), (KeyStatus::Exhausted, false));
    }

    #[test]
    fn status_identifiers_round_trip() {
        for status in [KeyStatus::Active, KeyStatus::Exhausted, KeyStatus::RateLimited, KeyStatus::Invalid] {
            assert_eq!(KeyStatus::parse(status.as_str()), Some(status));
        }
        assert_eq!(KeyStatus::parse("Active"), None);
    }
}
