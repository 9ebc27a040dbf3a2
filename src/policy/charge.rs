//! Computes the amount by which a request counts against its client's quota. The counter in memory and the
//! usage records share this function, because the counter is restored from the records after a restart.

/// Whether the provider charges for requests to an endpoint, as far as it is known before a request is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Billing {
    /// The provider charges for the endpoint.
    Metered,
    /// The documentation does not show whether requests to the endpoint cost credits, or the response grants direct
    /// access to the provider.
    Unlisted,
    /// Requests to the endpoint cost no credits.
    Free,
}

/// The progress of a request at the provider.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChargeOutcome {
    /// No byte of the request was sent.
    Unsent,
    /// The provider refused the request or failed. It does not charge for its failures (according to the
    /// message of a 500 response, captured in 2026).
    Refused,
    /// At least a part of the request was sent, and no complete response head was received. The provider may
    /// have served it.
    Unknown,
    /// The provider served the request.
    Served,
}

/// The amount by which a request counts against a quota.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Charge {
    /// The number of requests: 0 or 1.
    pub requests: u64,
    /// The charged credits.
    pub credits: u64,
}

/// Computes the charge of a request. `reported` is the cost that the response reports. If the response reports no cost,
/// a request that counts is charged `reserved` credits, and any other request none.
///
/// A reported cost above 0 is charged for every endpoint and status. A request to an endpoint that is not free counts
/// if it was served or may have been served, even if it costs 0 credits.
#[must_use]
pub fn charge(billing: Billing, outcome: ChargeOutcome, reported: Option<u64>, reserved: u64) -> Charge {
    let is_counted = match (billing, outcome) {
        (Billing::Free, _) | (_, ChargeOutcome::Unsent | ChargeOutcome::Refused) => false,
        (Billing::Metered | Billing::Unlisted, ChargeOutcome::Unknown | ChargeOutcome::Served) => true,
    };
    let credits = reported.unwrap_or(if is_counted { reserved } else { 0 });
    Charge { requests: u64::from(is_counted || credits > 0), credits }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RESERVED: u64 = 1_000;

    #[track_caller]
    fn check_charge(
        billing: Billing,
        outcome: ChargeOutcome,
        reported: Option<u64>,
        requests: u64,
        credits: u64,
    ) {
        assert_eq!(charge(billing, outcome, reported, RESERVED), Charge { requests, credits });
    }

    #[test]
    fn a_served_request_costs_the_price_in_its_response() {
        for billing in [Billing::Metered, Billing::Unlisted] {
            check_charge(billing, ChargeOutcome::Served, Some(250), 1, 250);
            check_charge(billing, ChargeOutcome::Served, Some(5_000), 1, 5_000);
            check_charge(billing, ChargeOutcome::Served, Some(0), 1, 0);
        }
    }

    #[test]
    fn a_request_without_a_reported_cost_costs_its_reservation() {
        for billing in [Billing::Metered, Billing::Unlisted] {
            check_charge(billing, ChargeOutcome::Served, None, 1, RESERVED);
            check_charge(billing, ChargeOutcome::Unknown, None, 1, RESERVED);
        }
    }

    #[test]
    fn a_request_that_was_not_served_costs_nothing() {
        for billing in [Billing::Metered, Billing::Unlisted, Billing::Free] {
            for outcome in [ChargeOutcome::Unsent, ChargeOutcome::Refused] {
                check_charge(billing, outcome, None, 0, 0);
                check_charge(billing, outcome, Some(0), 0, 0);
            }
        }
    }

    #[test]
    fn a_reported_cost_is_charged_for_every_endpoint() {
        for outcome in [ChargeOutcome::Served, ChargeOutcome::Refused, ChargeOutcome::Unknown] {
            check_charge(Billing::Free, outcome, Some(7), 1, 7);
            check_charge(Billing::Metered, outcome, Some(7), 1, 7);
        }
        check_charge(Billing::Free, ChargeOutcome::Served, Some(0), 0, 0);
        check_charge(Billing::Free, ChargeOutcome::Served, None, 0, 0);
        check_charge(Billing::Free, ChargeOutcome::Unknown, None, 0, 0);
    }
}
