//! The state of a key: whether it may be used now, and if not, why and until when.

use super::budget::Quota;
use super::units::UnixMs;

/// The four statuses of the contract.
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
    /// The word in the status document, the usage records and the mirror.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Exhausted => "exhausted",
            Self::RateLimited => "rate_limited",
            Self::Invalid => "invalid",
        }
    }

    /// Parses a [`word`](Self::word).
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        [Self::Active, Self::Exhausted, Self::RateLimited, Self::Invalid]
            .into_iter()
            .find(|status| status.word() == word)
    }
}

/// Why a key or a workspace is in cooldown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CooldownReason {
    /// Too many requests in a span of time, or too many concurrent requests.
    RateLimited,
    /// No credits are left.
    Exhausted,
    /// The account has an unpaid bill, has not accepted terms, or is suspected of abuse: its owner must
    /// act.
    Billing,
    /// The provider refuses the key itself.
    Invalid,
    /// The key belongs to another region than the host that its requests are sent to.
    WrongHost,
}

impl CooldownReason {
    /// The identifier of the reason where a state is explained.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::RateLimited => "rate_limited",
            Self::Exhausted => "exhausted",
            Self::Billing => "account_locked",
            Self::Invalid => "invalid_key",
            Self::WrongHost => "wrong_host",
        }
    }

    /// The status of a key in this cooldown.
    #[must_use]
    pub fn status(self) -> KeyStatus {
        match self {
            Self::RateLimited => KeyStatus::RateLimited,
            // The contract has four statuses; a locked account cannot pay, like an exhausted one.
            Self::Exhausted | Self::Billing => KeyStatus::Exhausted,
            // At the host that its requests are sent to, the key is unknown.
            Self::Invalid | Self::WrongHost => KeyStatus::Invalid,
        }
    }
}

/// A cooldown of a key or a workspace. Every cooldown ends: at its time, after a probe that the provider
/// serves, or with a new period.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cooldown {
    /// Decides the reported status.
    pub reason: CooldownReason,
    /// The end of the cooldown.
    pub until: UnixMs,
}

impl Cooldown {
    /// Whether it is in force at `now`.
    #[must_use]
    pub fn holds(self, now: UnixMs) -> bool {
        now < self.until
    }

    /// The cooldown that holds when a second one is added: the one with the later end, so that a short
    /// cooldown never shortens a long one.
    #[must_use]
    pub fn joined(self, other: Self) -> Self {
        if other.until > self.until { other } else { self }
    }
}

/// Whether a key may be used now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyState {
    /// The key may be used.
    Usable,
    /// The key is in cooldown, or its workspace is.
    Resting {
        /// Decides the reported status.
        reason: CooldownReason,
        /// The end, if it is known.
        until: Option<UnixMs>,
    },
}

impl KeyState {
    /// The state of a key at `now`, from its own cooldown, its workspace's, and the quota at `now`.
    #[must_use]
    pub fn of(own: Option<Cooldown>, workspace: Option<Cooldown>, quota: &Quota, now: UnixMs) -> Self {
        let cooldown = match (
            own.filter(|cooldown| cooldown.holds(now)),
            workspace.filter(|cooldown| cooldown.holds(now)),
        ) {
            (Some(own), Some(workspace)) => Some(own.joined(workspace)),
            (one, other) => one.or(other),
        };
        match cooldown {
            // A locked or refused key keeps this reason even when its credits are exhausted as well.
            Some(Cooldown {
                reason:
                    reason @ (CooldownReason::Invalid | CooldownReason::WrongHost | CooldownReason::Billing),
                until,
            }) => Self::Resting { reason, until: Some(until) },
            _ if quota.is_spent() => {
                Self::Resting { reason: CooldownReason::Exhausted, until: quota.resets_at }
            }
            Some(Cooldown { reason, until }) => Self::Resting { reason, until: Some(until) },
            None => Self::Usable,
        }
    }

    /// Whether it can serve any request: other concurrency groups are usable while one is rate limited.
    #[must_use]
    pub fn serves(self) -> bool {
        match self {
            Self::Usable | Self::Resting { reason: CooldownReason::RateLimited, .. } => true,
            Self::Resting {
                reason:
                    CooldownReason::Exhausted
                    | CooldownReason::Billing
                    | CooldownReason::Invalid
                    | CooldownReason::WrongHost,
                ..
            } => false,
        }
    }

    /// The status in the terms of the contract.
    #[must_use]
    pub fn status(self) -> KeyStatus {
        match self {
            Self::Usable => KeyStatus::Active,
            Self::Resting { reason, .. } => reason.status(),
        }
    }
}

/// A state change, which is logged once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transition<K> {
    /// The key that changed.
    pub key: K,
    /// The change, with its reason and figures.
    pub change: StateChange,
}

/// A change of a key's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateChange {
    /// It serves from now on.
    InUse {
        /// The known quota of its workspace.
        quota: Quota,
        /// Its position in the pool, from 0, when another key was in use before.
        rotated_to: Option<usize>,
    },
    /// Its use is near the limit.
    NearLimit(Quota),
    /// A cooldown has begun.
    Rests {
        /// The reason of the cooldown.
        reason: CooldownReason,
        /// The end, if it is known.
        until: Option<UnixMs>,
    },
    /// The cooldown has ended.
    Returns,
    /// The key was skipped for a request that costs more than its remaining credits; cheaper requests
    /// still use it.
    PassedOver {
        /// Remaining credits of the key.
        left: u64,
        /// Credits that the request was expected to cost.
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
        extension: super::super::budget::Extension::None,
        resets_at: Some(UnixMs(9_000)),
    };

    fn cooldown(reason: CooldownReason, until: u64) -> Option<Cooldown> {
        Some(Cooldown { reason, until: UnixMs(until) })
    }

    #[track_caller]
    fn check(
        own: Option<Cooldown>,
        workspace: Option<Cooldown>,
        quota: Quota,
        expected: Option<(CooldownReason, u64)>,
    ) {
        let expected = expected.map_or(KeyState::Usable, |(reason, until)| KeyState::Resting {
            reason,
            until: Some(UnixMs(until)),
        });
        assert_eq!(KeyState::of(own, workspace, &quota, NOW), expected);
    }

    #[test]
    fn a_cooldown_holds_until_its_end_and_not_at_it() {
        check(
            cooldown(CooldownReason::RateLimited, 1_001),
            None,
            FULL,
            Some((CooldownReason::RateLimited, 1_001)),
        );
        check(cooldown(CooldownReason::RateLimited, 1_000), None, FULL, None);
    }

    #[test]
    fn a_cooldown_of_a_workspace_is_one_of_its_keys() {
        check(
            None,
            cooldown(CooldownReason::Exhausted, 2_000),
            FULL,
            Some((CooldownReason::Exhausted, 2_000)),
        );
    }

    #[test]
    fn the_cooldown_with_the_later_end_holds() {
        let (short, long) =
            (cooldown(CooldownReason::RateLimited, 1_500), cooldown(CooldownReason::Exhausted, 2_000));
        check(short, long, FULL, Some((CooldownReason::Exhausted, 2_000)));
        check(long, short, FULL, Some((CooldownReason::Exhausted, 2_000)));
    }

    #[test]
    fn a_spent_quota_is_a_cooldown_until_its_reset() {
        check(None, None, Quota { count: 10, ..FULL }, Some((CooldownReason::Exhausted, 9_000)));
        check(
            cooldown(CooldownReason::RateLimited, 1_500),
            None,
            Quota { count: 10, ..FULL },
            Some((CooldownReason::Exhausted, 9_000)),
        );
        check(
            cooldown(CooldownReason::Invalid, 1_500),
            None,
            Quota { count: 10, ..FULL },
            Some((CooldownReason::Invalid, 1_500)),
        );
    }

    #[test]
    fn the_status_words_are_parsed_again() {
        for status in [KeyStatus::Active, KeyStatus::Exhausted, KeyStatus::RateLimited, KeyStatus::Invalid] {
            assert_eq!(KeyStatus::parse(status.word()), Some(status));
        }
        assert_eq!(KeyStatus::parse("Active"), None);
    }
}
