//! Applies the replies to a beat, in which this replica has sent its statements to Redis. Records the clock and the
//! replicas, and changes this replica's shares of credits and slots in the pool. Replaces shares whose grants have
//! ended by fallback shares. `replica.rs` makes the statements of the beat.

use redis::Value;

use super::beat_calls::{Beat, BeatOutcome};
use super::credit_statement::{CreditGrant, CreditStatement};
use super::members::{Description, Membership};
use super::replica::{Replica, WorkspaceState};
use super::reply::{UnexpectedReply, flatten_lists};
use super::scripts::MAX_SUBJECTS;
use super::shared_clock::Moment;
use super::slots::{Fallback, SlotGrant};
use crate::policy::concurrency_group::ConcurrencyGroup;
use crate::policy::shared_id::SharedId;
use crate::telemetry::log_transitions;

impl Replica {
    /// Applies the replies to a beat, which arrived at `received_at`. Returns the tasks that follow from them.
    ///
    /// # Errors
    ///
    /// Fails when a reply does not have the form that the scripts return.
    pub(super) fn apply_replies(
        &mut self,
        beat: &Beat,
        replies: &[Value],
        received_at: Moment,
    ) -> Result<BeatOutcome, UnexpectedReply> {
        let (members_reply, other_replies) = replies.split_first().ok_or(UnexpectedReply)?;
        let membership = Membership::from_value(members_reply)?;
        self.clock.record(membership.now_ms, beat.sent_at, received_at);
        self.live_replicas = membership.live_count();
        let has_redis_lost_statements = self.has_reported && membership.previous.is_none();
        if has_redis_lost_statements {
            self.maps.forget_versions();
        }
        let outdated = self.maps.compare(&membership.versions);
        let is_other = |previous: &Description| previous.process != self.description.process;
        let has_duplicate_id = self.has_reported && membership.previous.as_ref().is_some_and(is_other);
        self.has_reported = true;
        let mut outcome =
            BeatOutcome { outdated, has_redis_lost_statements, has_duplicate_id, ..BeatOutcome::default() };
        self.membership = Some(membership);
        if beat.is_full {
            self.last_full_beat = Some(beat.sent_at.instant);
        }
        let credit_calls = beat.credits.len().div_ceil(MAX_SUBJECTS);
        let (credit_replies, slot_replies) =
            other_replies.split_at_checked(credit_calls).ok_or(UnexpectedReply)?;
        let credit_replies = flatten_lists(credit_replies)?;
        let slot_replies = flatten_lists(slot_replies)?;
        if credit_replies.len() != beat.credits.len() || slot_replies.len() != beat.slots.len() {
            return Err(UnexpectedReply);
        }
        // The slots are applied first, because new credits may start queued requests, and these must not use a slot
        // that this replica has lost.
        for ((id, group, statement), reply) in beat.slots.iter().zip(slot_replies) {
            let Some((state, workspace)) = self.workspaces.get_mut(id).zip(beat.workspaces.get(id)) else {
                continue;
            };
            let grant = SlotGrant::from_value(reply)?;
            let change = state.slots[group.index()].apply_grant(*statement, grant, beat.sent_at.instant);
            if grant.is_demand_unmet && grant.active_replicas > 1 {
                outcome.unmet_demands.insert(*id);
            }
            if let Some(max) = change.max {
                self.pool.record_shared_maximum(workspace, *group, max, received_at.now);
            }
            if let Some(share) = change.share {
                self.pool.divide_slots(workspace, *group, share.slots, received_at.now);
            }
        }
        for ((id, statement), reply) in beat.credits.iter().zip(credit_replies) {
            self.apply_credit_grant(
                *id,
                *statement,
                &CreditGrant::from_value(reply)?,
                beat,
                received_at,
                &mut outcome,
            );
        }
        self.fall_back(received_at);
        Ok(outcome)
    }

    /// Applies the reply to the statement about the credits of the workspace `id`.
    fn apply_credit_grant(
        &mut self,
        id: SharedId,
        statement: CreditStatement,
        grant: &CreditGrant,
        beat: &Beat,
        received_at: Moment,
        outcome: &mut BeatOutcome,
    ) {
        let Some((state, workspace)) = self.workspaces.get_mut(&id).zip(beat.workspaces.get(&id)) else {
            return;
        };
        let shared_now = self.membership.as_ref().map_or(0, |membership| membership.now_ms);
        state.last_statement = Some(statement);
        if grant.is_demand_unmet {
            outcome.unmet_demands.insert(id);
        }
        let share = state.credits.apply_grant(
            statement,
            grant,
            workspace.credit_use(),
            beat.sent_at.instant,
            shared_now,
        );
        outcome.is_incomplete |= statement.used.is_none() || state.credits.is_incomplete();
        if let Some(share) = share {
            log_transitions(&self.pool.divide_credits(workspace, share, received_at.now));
        }
    }

    /// Replaces each ended grant by a fallback share. While the replica is alone, the share is an equal part of the
    /// credits or slots, which also replaces a current grant of fewer slots. While it is connected, the share is one
    /// slot, and shares of credits stay. The share of a workspace with unlimited credits gets no bound.
    pub(super) fn fall_back(&mut self, moment: Moment) {
        let fallback = if self.is_alone { Fallback::AtLeastEqualPart } else { Fallback::OneSlot };
        let roster = self.pool.roster();
        for workspace in roster.workspaces() {
            let id = workspace.shared_id();
            let state = self.workspaces.entry(id).or_insert_with(|| WorkspaceState::new(moment.instant));
            let (quota, usage) = (workspace.quota(moment.now), workspace.credit_use());
            let share = match (quota.ceiling(), quota.spendable()) {
                (None, _) => state.credits.stop_dividing(usage),
                (Some(_), Some(left)) if self.is_alone => {
                    state.credits.fall_back(usage, self.live_replicas, left, moment.instant)
                }
                (Some(_), _) => None,
            };
            if let Some(share) = share {
                log_transitions(&self.pool.divide_credits(workspace, share, moment.now));
            }
            for (group, slots) in ConcurrencyGroup::all().zip(&mut state.slots) {
                if let Some(share) = slots.fall_back(self.live_replicas, fallback, moment.instant) {
                    self.pool.divide_slots(workspace, group, share.slots, moment.now);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::clock;
    use crate::elevenlabs::plan::Capabilities;
    use crate::policy::client::ClientName;
    use crate::policy::quota::{Extension, Quota};
    use crate::policy::shared_pool_name::SharedPoolName;
    use crate::pool::{KeyEntry, KeyRequest, Observation, Pool, Settings};
    use crate::secret::ApiKey;
    use crate::shared::replica::ReplicaSettings;

    #[tokio::test(start_paused = true)]
    async fn a_workspace_with_unlimited_credits_is_not_divided() {
        let key = KeyEntry::from(ApiKey::new("sk_unlimited_workspace_0001").unwrap());
        let settings = Settings { queue_timeout: std::time::Duration::from_millis(1), ..Settings::FOR_TESTS };
        let pool = Arc::new(Pool::new(vec![key], settings));
        let roster = pool.roster();
        let observe = |extension| {
            let quota = Quota { count: 0, limit: Some(1_000), extension, ..Quota::default() };
            let observation = Observation::Quota {
                quota,
                tier: None,
                is_paid: Some(true),
                capabilities: Capabilities::default(),
            };
            pool.observe(&roster, &roster.keys()[0], observation, clock::now());
        };
        observe(Extension::None);
        let mut replica = Replica::new(
            ReplicaSettings {
                id: "a".to_owned(),
                pool_name: SharedPoolName::default(),
                can_lead: true,
                regions: Arc::new([]),
            },
            Arc::clone(&pool),
            clock::now(),
        );
        // The replica is alone and uses its part of the credits.
        replica.fall_back(Moment::current());
        let can_reserve = async |credits| {
            let first = KeyRequest::new(ClientName::new("app"), Some(1), None);
            let request = KeyRequest::new(ClientName::new("app"), Some(credits), None);
            // One request at a time may exceed the part.
            let _first = pool.reserve(&roster, &first).await.unwrap();
            pool.reserve(&roster, &request).await.is_ok()
        };
        assert!(
            can_reserve(499).await && !can_reserve(500).await,
            "a replica that is alone must use half of the credits, because it assumes two replicas"
        );
        observe(Extension::Unlimited);
        replica.fall_back(Moment::current());
        assert!(can_reserve(1_000_000).await, "unlimited credits must not be divided");
        observe(Extension::None);
        replica.fall_back(Moment::current());
        assert!(!can_reserve(1_000_000).await, "limited credits must be divided again");
    }
}
