//! What the pool learns: from a refusal, from what an answer has cost, from what the provider says when
//! it is asked. Each lesson is kept where it holds: in the key, its workspace, or a lane of that.

use super::cells::Paid;
use super::key::Key;
use super::lease::Lease;
use super::line::Ask;
use super::roster::Roster;
use super::{Observation, Pool, Transition, news_of_charge, news_of_workspace};
use crate::policy::classify::{Shortfall, Verdict};
use crate::policy::standing::{Park, ParkReason};
use crate::policy::units::UnixMs;

impl Pool {
    /// Learns from the provider's judgement of a request with this key; `ask` is what it needed.
    pub fn judge(
        &self,
        roster: &Roster,
        key: &Key,
        verdict: Verdict,
        ask: Option<&Ask>,
        now: UnixMs,
    ) -> Vec<Transition> {
        let settings = roster.settings();
        let workspace = key.workspace();
        let rest = |reason, span| Park { reason, until: now.plus(span) };
        let until_reset = || Park {
            reason: ParkReason::Exhausted,
            until: workspace.quota(now).resets_at.unwrap_or_else(|| now.plus(settings.exhausted_cooldown)),
        };
        match verdict {
            // The figure that a refusal names is not taken over into the count: requests that are
            // still under way are in it already, and would be counted a second time.
            Verdict::WorkspaceQuota(shortfall) => {
                workspace.cell().told().hear(left(shortfall, ask), workspace.parked(), now);
                workspace.park(until_reset());
            }
            Verdict::KeyQuota(shortfall) => {
                key.told().hear(left(shortfall, ask), key.parked(), now);
                key.park(until_reset());
            }
            Verdict::InvalidKey => {
                // Looked at before the park: whoever was under way with the one that was refused first
                // finds it parked, and confirms nothing.
                let is_confirmed = key.is_doubted();
                let rests = |park: Park| park.reason == ParkReason::Invalid && park.holds(now);
                if !key.parked().is_some_and(rests) {
                    // Once may be a mistake on the way; twice is the key.
                    let span =
                        if is_confirmed { settings.invalid_cooldown } else { settings.invalid_confirm };
                    key.park(rest(ParkReason::Invalid, span));
                    key.doubt();
                    self.doubts.notify_one();
                }
            }
            Verdict::Billing | Verdict::Abuse => {
                workspace.park(rest(ParkReason::Billing, settings.billing_cooldown));
            }
            Verdict::RateLimited(told) => {
                key.park(rest(ParkReason::RateLimited, told.unwrap_or(settings.rate_limited_cooldown)));
            }
            Verdict::Concurrency { maximum } => match ask.and_then(|ask| ask.lane) {
                Some(lane) => {
                    workspace.room(lane).refused(maximum, now.plus(settings.concurrency_cooldown));
                }
                None => workspace.park(rest(ParkReason::RateLimited, settings.concurrency_cooldown)),
            },
            Verdict::MissingPermission(named) => {
                if let Some(permission) = named.or_else(|| ask.and_then(|ask| ask.permission)) {
                    key.lacks().add(permission, now, now.plus(settings.permission_cooldown));
                }
                return Vec::new();
            }
            Verdict::Served => {
                // Another request may have been refused while this one was under way.
                if key.is_doubted() {
                    key.accept();
                    return news_of_workspace(roster, workspace, now);
                }
                return Vec::new();
            }
            Verdict::PlanFeature
            | Verdict::Busy
            | Verdict::Unexplained(_)
            | Verdict::NotFound
            | Verdict::RequestError
            | Verdict::ServerError
            | Verdict::Unreadable => return Vec::new(),
        }
        news_of_workspace(roster, workspace, now)
    }

    /// Books what the request of `lease` has cost.
    pub fn settle(&self, roster: &Roster, lease: &mut Lease, credits: u64, now: UnixMs) -> Vec<Transition> {
        lease.settle(credits, now);
        if credits == 0 { Vec::new() } else { news_of_charge(roster, lease.key().workspace(), now) }
    }

    /// Books what was spent with a key, and is known only now.
    pub fn spend(&self, roster: &Roster, key: &Key, credits: u64, now: UnixMs) -> Vec<Transition> {
        key.workspace().cell().settle(Paid { reserved: 0, spent: credits }, now);
        key.workspace().spending().add(credits, now);
        news_of_charge(roster, key.workspace(), now)
    }

    /// Learns what the provider told of a key's quota.
    pub fn observe(&self, roster: &Roster, key: &Key, seen: Observation, now: UnixMs) -> Vec<Transition> {
        match seen {
            Observation::Quota { quota, tier, is_paid } => {
                key.accept();
                if is_paid {
                    key.workspace().pardon(ParkReason::Billing);
                }
                key.workspace().observe(quota, tier, now, roster.settings().quota_lag);
            }
            Observation::Unreadable => key.accept(),
            // It was asked by itself, so there is nothing else that could be refused.
            Observation::Invalid => {
                key.give_up();
                key.park(Park {
                    reason: ParkReason::Invalid,
                    until: now.plus(roster.settings().invalid_cooldown),
                });
            }
        }
        news_of_workspace(roster, key.workspace(), now)
    }
}

/// What is left of a quota, in the numbers of our estimates, as the refusal of `ask` says it.
fn left(shortfall: Shortfall, ask: Option<&Ask>) -> u64 {
    let remaining = shortfall.remaining.unwrap_or(0);
    match (ask.and_then(|ask| ask.estimate), shortfall.required) {
        // Our estimates are larger than the provider's prices on some plans, by the same factor.
        (Some(estimate), Some(required @ 1..)) => {
            let scaled = u128::from(remaining) * u128::from(estimate) / u128::from(required);
            u64::try_from(scaled).unwrap_or(u64::MAX)
        }
        (Some(_) | None, Some(_) | None) => remaining,
    }
}
