//! How a key stands: whether it may be used now, and if not, why and until when.

use super::budget::Quota;
use super::units::UnixMs;

/// The four statuses of the contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KeyStatus {
    /// May be used.
    Active,
    /// Has no credits left, or its account is locked.
    Exhausted,
    /// Cools down.
    RateLimited,
    /// Is refused as a key.
    Invalid,
}

impl KeyStatus {
    /// The word of the status document, the books and the mirror.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Exhausted => "exhausted",
            Self::RateLimited => "rate_limited",
            Self::Invalid => "invalid",
        }
    }

    /// The status that [`word`](Self::word) writes so.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        [Self::Active, Self::Exhausted, Self::RateLimited, Self::Invalid]
            .into_iter()
            .find(|status| status.word() == word)
    }
}

/// Why a key or a workspace is set aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CooldownReason {
    /// Too many requests, in a span or at once.
    RateLimited,
    /// No credits.
    Exhausted,
    /// Unpaid, terms not accepted, or suspected of abuse: a person must look.
    Billing,
    /// Refused as a key.
    Invalid,
    /// A key of another region than the host that it is sent to.
    WrongHost,
}

impl CooldownReason {
    /// The word for it where a state is explained.
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

    /// The status that a key has meanwhile.
    #[must_use]
    pub fn status(self) -> KeyStatus {
        match self {
            Self::RateLimited => KeyStatus::RateLimited,
            // The contract has four statuses; a locked account cannot pay, like an empty one.
            Self::Exhausted | Self::Billing => KeyStatus::Exhausted,
            // At the host that it is sent to, it opens nothing.
            Self::Invalid | Self::WrongHost => KeyStatus::Invalid,
        }
    }
}

/// A key or a workspace set aside until a moment. Every park ends: by its time, by a probe that
/// finds the key well, or by a new period.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cooldown {
    /// Why.
    pub reason: CooldownReason,
    /// Until when.
    pub until: UnixMs,
}

impl Cooldown {
    /// Whether it still holds at `now`.
    #[must_use]
    pub fn holds(self, now: UnixMs) -> bool {
        now < self.until
    }

    /// The park that holds after a second one: the one with the later end, so that a short
    /// cooldown never shortens a long sentence.
    #[must_use]
    pub fn joined(self, other: Self) -> Self {
        if other.until > self.until { other } else { self }
    }
}

/// Whether a key may be used now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyState {
    /// It may.
    Usable,
    /// It may not.
    Resting {
        /// Why.
        reason: CooldownReason,
        /// Until when, as far as is known.
        until: Option<UnixMs>,
    },
}

impl KeyState {
    /// How a key stands at `now`, given its own park, its workspace's, and its quota as it is at `now`.
    #[must_use]
    pub fn of(own: Option<Cooldown>, workspace: Option<Cooldown>, quota: &Quota, now: UnixMs) -> Self {
        let park = match (own.filter(|park| park.holds(now)), workspace.filter(|park| park.holds(now))) {
            (Some(own), Some(workspace)) => Some(own.joined(workspace)),
            (one, other) => one.or(other),
        };
        match park {
            // A locked or refused key says so, also when it is empty as well.
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

    /// Whether it can serve something: other concurrency groups go on while one is rate limited.
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

    /// The contract's word for it.
    #[must_use]
    pub fn status(self) -> KeyStatus {
        match self {
            Self::Usable => KeyStatus::Active,
            Self::Resting { reason, .. } => reason.status(),
        }
    }
}

/// A change that people are told of, once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transition<K> {
    /// Whose.
    pub key: K,
    /// Which.
    pub change: Change,
}

/// What changed about a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It serves from now on; its position in the pool, from 0, when another served before.
    InUse {
        /// What is left of its workspace, when that is known.
        quota: Quota,
        /// Set when it took over from another key.
        rotated_to: Option<usize>,
    },
    /// It came near its limit.
    NearLimit(Quota),
    /// It rests.
    Rests {
        /// Why.
        reason: CooldownReason,
        /// Until when, as far as is known.
        until: Option<UnixMs>,
    },
    /// It may be used again.
    Returns,
    /// It was passed over for a request that costs more than it has left; smaller ones go on.
    PassedOver {
        /// Credits that it has left.
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

    fn park(reason: CooldownReason, until: u64) -> Option<Cooldown> {
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
    fn a_park_holds_until_its_end_and_not_at_it() {
        check(
            park(CooldownReason::RateLimited, 1_001),
            None,
            FULL,
            Some((CooldownReason::RateLimited, 1_001)),
        );
        check(park(CooldownReason::RateLimited, 1_000), None, FULL, None);
    }

    #[test]
    fn a_workspaces_park_rests_its_keys() {
        check(None, park(CooldownReason::Exhausted, 2_000), FULL, Some((CooldownReason::Exhausted, 2_000)));
    }

    #[test]
    fn the_later_end_wins() {
        let (short, long) =
            (park(CooldownReason::RateLimited, 1_500), park(CooldownReason::Exhausted, 2_000));
        check(short, long, FULL, Some((CooldownReason::Exhausted, 2_000)));
        check(long, short, FULL, Some((CooldownReason::Exhausted, 2_000)));
    }

    #[test]
    fn a_spent_quota_rests_until_its_reset() {
        check(None, None, Quota { count: 10, ..FULL }, Some((CooldownReason::Exhausted, 9_000)));
        check(
            park(CooldownReason::RateLimited, 1_500),
            None,
            Quota { count: 10, ..FULL },
            Some((CooldownReason::Exhausted, 9_000)),
        );
        check(
            park(CooldownReason::Invalid, 1_500),
            None,
            Quota { count: 10, ..FULL },
            Some((CooldownReason::Invalid, 1_500)),
        );
    }

    #[test]
    fn the_words_read_back() {
        for status in [KeyStatus::Active, KeyStatus::Exhausted, KeyStatus::RateLimited, KeyStatus::Invalid] {
            assert_eq!(KeyStatus::parse(status.word()), Some(status));
        }
        assert_eq!(KeyStatus::parse("Active"), None);
    }
}
