//! Defines the statement of a replica about the credits of a workspace, and parses the grant in the reply of
//! `grants.lua`. `credits.rs` makes the statements and applies the grants.
//!
//! The count of a workspace is its base plus the charges of all replicas. The base is the use that no replica has
//! charged.

use redis::Value;

use super::replica_use::ReplicaUse;
use super::reply::{UnexpectedReply, parse_amount, parse_integer, parse_text, parse_tuple};

/// The statement of this replica about the credits of a workspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CreditStatement {
    /// The sum of the credits that this replica has charged. `None` before its earlier statement is known.
    pub(super) used: Option<u64>,
    /// The number of this process. 0 before the earlier statement is known.
    pub(super) run: u64,
    /// The part of `used` that earlier processes of this replica have charged.
    pub(super) used_before: u64,
    /// Credits that requests in flight have reserved.
    pub(super) reserved: u64,
    /// Credits that queued requests need in addition.
    pub(super) queued: u64,
    /// The estimated cost of the cheapest queued request.
    pub(super) least: u64,
    /// The amount up to which this replica may charge and reserve credits until the reply.
    pub(super) held: u64,
    /// The maximum of the count.
    pub(super) limit: u64,
    /// A changed base, and the time at which it was received, in milliseconds by the clock of Redis. `None` if the base
    /// has not changed.
    pub(super) base: Option<(i64, u64)>,
    /// Whether the replica has not used the workspace recently.
    pub(super) is_idle: bool,
    /// The sum of the charges of other replicas that this replica knows.
    pub(super) used_by_others: u64,
    /// The last known [`CreditGrant::epoch`], or 0 to receive the charges of each replica.
    pub(super) epoch: u64,
}

impl CreditStatement {
    /// Returns the credits that requests in flight and queued requests need.
    pub(super) fn needed(self) -> u64 {
        self.reserved.saturating_add(self.queued)
    }

    /// Whether the replica holds more than its requests in flight need.
    pub(super) fn has_unused(self) -> bool {
        self.used.is_some_and(|used| self.held > used.saturating_add(self.reserved))
    }

    /// Returns the statement of a replica that leaves the pool: it needs no credits, and holds only its used credits.
    pub(super) fn without_need(self) -> Self {
        let used = self.used.unwrap_or(0);
        Self { reserved: 0, queued: 0, least: 0, held: used, limit: 0, ..self }
    }

    /// Whether Redis would reply to both statements with the same grant.
    pub(super) fn is_equivalent_to(self, other: Self) -> bool {
        let relevant = |statement| Self { base: None, held: 0, used_by_others: 0, epoch: 0, ..statement };
        self.base.is_some() == other.base.is_some() && relevant(self) == relevant(other)
    }
}

/// The reply of `grants.lua` to a [`CreditStatement`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct CreditGrant {
    /// The amount up to which this replica may charge and reserve credits.
    pub(super) granted: u64,
    /// The sum of the charges of other replicas.
    pub(super) used_by_others: u64,
    /// The newest base.
    pub(super) base: i64,
    /// The time at which the base was received, in milliseconds by the clock of Redis. 0 if Redis knows no base.
    pub(super) base_stamp: u64,
    /// Whether this replica may exceed the credits that are left.
    pub(super) may_exceed: bool,
    /// The charges that this replica has reported before, or `None` if Redis knows no earlier statement.
    pub(super) last_reported_use: Option<u64>,
    /// The credits that are left for all replicas together.
    pub(super) left: u64,
    /// Whether other replicas hold more credits than they need while this replica has too few.
    pub(super) is_demand_unmet: bool,
    /// The number of the last process of this replica that Redis knows.
    pub(super) run: u64,
    /// The charges of earlier processes of this replica that Redis knows.
    pub(super) used_before: u64,
    /// A number that changes when Redis loses the charges.
    pub(super) epoch: u64,
    /// The charges of each other replica. `None` if this replica does not need them: another replica has received
    /// them, and Redis has lost nothing.
    pub(super) uses: Option<Vec<(String, ReplicaUse)>>,
}

impl CreditGrant {
    pub(super) fn from_value(value: &Value) -> Result<Self, UnexpectedReply> {
        let [
            granted,
            used_by_others,
            base,
            base_stamp,
            may_exceed,
            last_reported_use,
            left,
            is_demand_unmet,
            run,
            used_before,
            epoch,
            has_uses,
            uses,
        ] = parse_tuple(value)?;
        let has_uses = parse_integer(has_uses)? == 1;
        Ok(Self {
            granted: parse_amount(granted)?,
            used_by_others: parse_amount(used_by_others)?,
            base: parse_integer(base)?,
            base_stamp: parse_amount(base_stamp)?,
            may_exceed: parse_integer(may_exceed)? == 1,
            last_reported_use: u64::try_from(parse_integer(last_reported_use)?).ok(),
            left: parse_amount(left)?,
            is_demand_unmet: parse_integer(is_demand_unmet)? == 1,
            run: parse_amount(run)?,
            used_before: parse_amount(used_before)?,
            epoch: parse_amount(epoch)?,
            uses: if has_uses { Some(parse_uses(parse_text(uses)?)?) } else { None },
        })
    }
}

/// Parses `replica used run before` for each replica.
fn parse_uses(text: &str) -> Result<Vec<(String, ReplicaUse)>, UnexpectedReply> {
    let mut words = text.split_ascii_whitespace();
    let mut uses = Vec::new();
    while let Some(replica) = words.next() {
        uses.push((replica.to_owned(), ReplicaUse::parse(&mut words).ok_or(UnexpectedReply)?));
    }
    Ok(uses)
}
