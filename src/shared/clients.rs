//! Divides the limits of clients between replicas. Makes the statements about the clients' quotas and concurrent
//! requests for each beat, which is a round trip to Redis, and applies the replies. Sets the shares of this replica,
//! including those of rate limits, in `proxy::ClientUsage`.

use std::collections::HashMap;
use std::time::Duration;

use redis::Value;

use super::link::client_id;
use super::quotas::{parse_quota_reply, quota_call};
use super::reply::{UnexpectedReply, flatten_lists};
use super::scripts::{Keyspace, MAX_SUBJECTS, ScriptCall};
use super::shared_clock::{Moment, SharedClock};
use super::slots::{Fallback, SlotDemand, SlotGrant, SlotStatement, Slots, slots_call};
use crate::policy::client::ClientName;
use crate::pool::{RunningCount, SlotUse};
use crate::proxy::{ClientShare, ClientUsage, QuotaStatement, StatementScope};

/// Interval between two statements about all active quotas. A request whose grant is insufficient sends the statement
/// about its quota at once.
const QUOTA_INTERVAL: Duration = Duration::from_secs(2);

/// The shares of this replica in the limits of clients.
#[derive(Debug, Default)]
pub(super) struct ClientShares {
    slots: HashMap<ClientName, Slots>,
    /// The time of the last statements about quotas, or `None` before the first.
    quotas_sent_at: Option<std::time::Instant>,
    /// Whether Redis may have lost the use of quotas, so that the next beat contains the statements about all of them.
    must_resend: bool,
}

/// The statements about clients in one beat.
#[derive(Debug, Default)]
pub(super) struct ClientBeat {
    pub(super) calls: Vec<ScriptCall>,
    quotas: Vec<QuotaStatement>,
    slots: Vec<(ClientName, SlotStatement)>,
}

impl ClientShares {
    /// Adds the statements about all quotas to the next beat.
    pub(super) fn resend_all(&mut self) {
        self.must_resend = true;
    }

    /// Returns the statements of the next beat. The caller must send them, because they count as sent.
    pub(super) fn make_beat(
        &mut self,
        usage: &ClientUsage,
        context: CallContext<'_>,
        clock: SharedClock,
        moment: Moment,
    ) -> ClientBeat {
        let mut beat = ClientBeat::default();
        let are_quotas_due = self
            .quotas_sent_at
            .is_none_or(|last| moment.instant.saturating_duration_since(last) >= QUOTA_INTERVAL);
        if are_quotas_due || self.must_resend {
            let scope = if self.must_resend { StatementScope::All } else { StatementScope::Active };
            beat.quotas = usage.quota_statements(scope, moment.now);
            self.quotas_sent_at = Some(moment.instant);
        }
        for activity in usage.take_activity() {
            let slots = self.slots.entry(activity.client.clone()).or_default();
            let peak = activity.demand.max(activity.running).max(u32::from(activity.is_recent));
            let count = RunningCount { running: activity.running, peak };
            let slot_use = SlotUse { count, max: activity.max_concurrent };
            if let Some(statement) = slots.make_statement(
                slot_use,
                SlotDemand::default(),
                clock.to_shared(moment.now),
                moment.instant,
            ) {
                beat.slots.push((activity.client, statement));
            }
        }
        for statements in beat.quotas.chunks(MAX_SUBJECTS) {
            beat.calls.push(quota_call(context.keyspace, context.replica, context.replicas, statements));
        }
        for statements in beat.slots.chunks(MAX_SUBJECTS) {
            let key =
                |(client, _): &(ClientName, SlotStatement)| context.keyspace.client_slots(client_id(client));
            let keys = statements.iter().map(key).collect();
            beat.calls.push(slots_call(
                context.replica,
                keys,
                statements.iter().map(|(_, statement)| statement),
            ));
        }
        beat
    }

    /// Applies the replies to a beat that was sent at `sent_at`. `replicas` is the number of live replicas.
    ///
    /// # Errors
    ///
    /// Fails when a reply does not have the form that the scripts return.
    pub(super) fn apply_replies(
        &mut self,
        usage: &ClientUsage,
        beat: &ClientBeat,
        replies: &[Value],
        replicas: u32,
        sent_at: Moment,
    ) -> Result<(), UnexpectedReply> {
        let quota_calls = beat.quotas.len().div_ceil(MAX_SUBJECTS);
        let (quota_replies, slot_replies) = replies.split_at_checked(quota_calls).ok_or(UnexpectedReply)?;
        let quota_replies = flatten_lists(quota_replies)?;
        let slot_replies = flatten_lists(slot_replies)?;
        if quota_replies.len() != beat.quotas.len() || slot_replies.len() != beat.slots.len() {
            return Err(UnexpectedReply);
        }
        self.must_resend &= beat.quotas.is_empty();
        for (statement, reply) in beat.quotas.iter().zip(quota_replies) {
            usage.apply_grant(statement, parse_quota_reply(reply, sent_at.instant));
        }
        for ((client, statement), reply) in beat.slots.iter().zip(slot_replies) {
            let grant = SlotGrant::from_value(reply)?;
            if let Some(slots) = self.slots.get_mut(client) {
                slots.apply_grant(*statement, grant, sent_at.instant);
                let max_concurrent = slots.share();
                let rate_divisor = grant.active_replicas.max(1);
                usage.set_share(client, ClientShare { rate_divisor, max_concurrent });
            }
        }
        // A client without a current grant is idle at this replica, and gets an equal part.
        self.fall_back(usage, replicas, Fallback::EqualPart, sent_at);
        Ok(())
    }

    /// Changes the shares of clients without a current grant by the rule `fallback`.
    pub(super) fn fall_back(
        &mut self,
        usage: &ClientUsage,
        replicas: u32,
        fallback: Fallback,
        moment: Moment,
    ) {
        for (client, slots) in &mut self.slots {
            if slots.fall_back(replicas, fallback, moment.instant).is_some() {
                usage
                    .set_share(client, ClientShare { rate_divisor: replicas, max_concurrent: slots.share() });
            }
        }
    }
}

/// The arguments that all calls of one beat have in common.
#[derive(Clone, Copy, Debug)]
pub(super) struct CallContext<'a> {
    pub(super) keyspace: &'a Keyspace,
    /// The id of this replica.
    pub(super) replica: &'a str,
    /// The number of live replicas.
    pub(super) replicas: u32,
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use futures_util::FutureExt;
    use redis::Value::{Array, Int};

    use super::*;
    use crate::clock;
    use crate::elevenlabs::affinity::RetentionLimits;
    use crate::policy::charge::Billing;
    use crate::policy::client::{AnonymousAccess, Client, Clients, Rules};
    use crate::policy::shared_pool_name::SharedPoolName;
    use crate::policy::units::UnixMs;
    use crate::pool::{Pool, Settings};
    use crate::proxy::{AdmissionRequest, ClientPermit, NoStoredUsage};
    use crate::secret::TokenFingerprint;
    use crate::shared::link::{RedisLink, RedisLinkSettings};
    use crate::shared::slots::SLOT_LEASE;
    use crate::shared::view::SharedPoolView;

    const ADMISSION: AdmissionRequest = AdmissionRequest {
        billing: Billing::Free,
        grants_direct_access: false,
        is_charged: true,
        max_concurrent: 100,
    };

    /// Returns the number of requests of the client that are admitted at the same time.
    fn count_admitted(usage: &ClientUsage, client: &Client, now: UnixMs) -> usize {
        let admit = || usage.admit(client, ADMISSION, now).now_or_never().unwrap();
        let permits: Vec<ClientPermit> = std::iter::repeat_with(admit).map_while(Result::ok).collect();
        permits.len()
    }

    #[test]
    fn the_share_of_an_idle_client_becomes_an_equal_part() {
        let rules = Rules { max_concurrent: Some(8), ..Rules::default() };
        let client = Client { name: ClientName::new("app"), rules };
        let clients = Clients::new(
            vec![(client.clone(), TokenFingerprint::new("app").into())],
            AnonymousAccess::Refused,
        );
        let now = UnixMs(1_796_000_000_000);
        let (link, _updates) = RedisLink::new(RedisLinkSettings {
            replica_id: "r1".to_owned(),
            keyspace: Keyspace::new(SharedPoolName::default()),
            wait_timeout: Duration::from_millis(50),
            pool: Arc::new(Pool::new(Vec::new(), Settings::FOR_TESTS)),
            owner_limits: RetentionLimits { max_identifiers: 100, max_idle: None },
            counts: SharedPoolView::default().counts().clone(),
        });
        let usage = ClientUsage::new(&clients, &[], Arc::new(NoStoredUsage), now).with_link(
            Arc::new(link),
            &clients,
            now,
        );
        let mut shares = ClientShares::default();
        let sent_at = Moment { now, instant: clock::instant() };
        let statement = SlotStatement { held: 0, demand: 8, lacks_credits: false, max: 8, max_stamp: 1 };
        let beat = ClientBeat { slots: vec![(client.name.clone(), statement)], ..ClientBeat::default() };
        shares.slots.entry(client.name.clone()).or_default().make_statement(
            SlotUse { count: RunningCount { running: 0, peak: 8 }, max: Some(8) },
            SlotDemand::default(),
            1,
            sent_at.instant,
        );
        let grant = Array(vec![Array([7, 8, 1, 1, 0, 0].map(Int).to_vec())]);
        shares.apply_replies(&usage, &beat, &[grant], 2, sent_at).unwrap();
        assert_eq!(count_admitted(&usage, &client, now), 7, "the share must be the grant of Redis");
        let later = Moment { now, instant: sent_at.instant + SLOT_LEASE };
        shares.apply_replies(&usage, &ClientBeat::default(), &[], 2, later).unwrap();
        assert_eq!(count_admitted(&usage, &client, now), 4, "the share must be half of 8 after the lease");
    }
}
