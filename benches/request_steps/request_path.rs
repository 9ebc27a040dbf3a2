//! Defines one step that runs the steps of the request path in sequence: from the parsed request head to the head for
//! the provider, and the processing of the response head, with and without a client quota and other replicas.

use std::future::Future;
use std::hint::black_box;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use http::request::Parts;
use http::{HeaderMap, StatusCode};
use keychoir::body::redacted_body::redact_headers;
use keychoir::clock;
use keychoir::elevenlabs::affinity::{self, Identifier};
use keychoir::elevenlabs::cost::ReportedCost;
use keychoir::elevenlabs::estimate::estimate_credits;
use keychoir::elevenlabs::models::Models;
use keychoir::elevenlabs::refusal::classify;
use keychoir::elevenlabs::request_body::RequestBodyFeatures;
use keychoir::policy::charge::{Billing, ChargeOutcome};
use keychoir::policy::client::{Client, ClientName, Clients, Rules, authenticate};
use keychoir::policy::client_quota::{ClientQuota, Period, QuotaUnit};
use keychoir::policy::concurrency_group::ConcurrencyGroup;
use keychoir::policy::headers::{ForwardedHeaders, is_searched, strip_response};
use keychoir::policy::strategy::Strategy;
use keychoir::policy::units::UnixMs;
use keychoir::policy::verdict::Verdict;
use keychoir::pool::{KeyRequest, OwnerId, PoolChange, ServedAttempt};
use keychoir::proxy::{
    AdmissionRequest, ClientPermit, ClientUsage, FoundOwner, LinkFuture, LookupResult, NoStoredUsage,
    QuotaGrant, QuotaReply, QuotaStatement, ReplicaLink, StatementScope, route, sanitize,
};
use keychoir::secret::Redactor;
use tokio::sync::mpsc;

use super::pool_settings::HOUR;
use super::{
    ClientLimits, PoolWithCredits, PrepareCalls, RequestKind, SPEECH_BODY, Spread, check_request_origin,
    create_clients, prepare, redactor, request_heads, response_heads,
};

/// A link to other replicas that grants half of each limit. The measured calls never wait for it, because the first
/// grant suffices for all of them.
#[derive(Debug)]
struct GrantingLink;

impl GrantingLink {
    fn reply(statement: &QuotaStatement) -> QuotaReply {
        let grant = QuotaGrant {
            granted: statement.limit / 2,
            used_by_others: 0,
            valid_until: clock::instant() + HOUR,
        };
        QuotaReply::Granted(grant)
    }
}

impl ReplicaLink for GrantingLink {
    fn replicas(&self) -> u32 {
        2
    }

    fn find_owners<'a>(&'a self, _: &'a [Identifier]) -> LinkFuture<'a, LookupResult<Vec<FoundOwner>>> {
        Box::pin(async { LookupResult::Unknown })
    }

    fn record_owner(&self, _: Identifier, _: &OwnerId) {}

    fn remove_owner(&self, _: Identifier) {}

    fn find_list_account<'a>(&'a self, _: &'a ClientName) -> LinkFuture<'a, LookupResult<OwnerId>> {
        Box::pin(async { LookupResult::Unknown })
    }

    fn record_list_account(&self, _: &ClientName, _: &OwnerId) {}

    fn extend_grant<'a>(&'a self, statement: &'a QuotaStatement) -> LinkFuture<'a, QuotaReply> {
        Box::pin(async { Self::reply(statement) })
    }
}

/// Runs all pure steps from the parsed request head to the head for the provider, and the processing of the response
/// head, without bodies, usage records and log lines.
struct RequestPath {
    clients: Clients,
    client_limits: ClientLimits,
    client_usage: ClientUsage,
    keys: PoolWithCredits,
    /// Receives the changes for the other replicas. The pool sends changes only while it exists.
    _changes: Option<mpsc::Receiver<PoolChange>>,
    models: Models,
    redactor: Arc<Redactor>,
}

impl RequestPath {
    fn new(client_limits: ClientLimits) -> Self {
        let keys = PoolWithCredits::new(10, Strategy::DEFAULT, Spread::WorkspacePerKey);
        let quota = ClientQuota { amount: 1 << 40, unit: QuotaUnit::Credits, period: Period::Month };
        let quota = (client_limits != ClientLimits::None).then_some(quota);
        let clients = create_clients(10, &Rules { quota, ..Rules::default() });
        let now = clock::now();
        let mut client_usage = ClientUsage::new(&clients, &[], Arc::new(NoStoredUsage), now);
        let mut changes = None;
        if client_limits == ClientLimits::Shared {
            client_usage = client_usage.with_link(Arc::new(GrantingLink), &clients, now);
            for statement in client_usage.quota_statements(StatementScope::All, now) {
                client_usage.apply_grant(&statement, GrantingLink::reply(&statement));
            }
            changes = Some(keys.divide());
        }
        let (models, redactor) = (Models::default(), redactor());
        Self { clients, client_limits, client_usage, keys, _changes: changes, models, redactor }
    }

    /// Admits a request by the limits of its client, and reserves its credits. Returns `None` for a client without
    /// limits.
    fn admit(&self, client: &Client, credits: Option<u64>) -> Option<ClientPermit> {
        let (usage, now) = (&self.client_usage, clock::now());
        let billing = if credits == Some(0) { Billing::Free } else { Billing::Metered };
        let admission =
            AdmissionRequest { billing, grants_direct_access: false, is_charged: true, max_concurrent: 100 };
        if self.client_limits == ClientLimits::None {
            return None;
        }
        let permit = poll_ready(pin!(usage.admit(client, admission, now))).unwrap();
        match (billing, credits) {
            (Billing::Metered, Some(credits)) => poll_ready(pin!(permit.reserve(credits, now))).unwrap(),
            (Billing::Metered | Billing::Unlisted | Billing::Free, _) => {}
        }
        Some(permit)
    }

    fn run(&self, (mut head, mut response_headers): (Parts, HeaderMap)) {
        let (pool, now) = (&self.keys.pool, clock::now());
        check_request_origin(&head);
        let caller = authenticate(&self.clients, &head.headers, head.uri.query(), UnixMs(0)).unwrap();
        let (endpoint, parameter_names, _) = route(&mut head, true).unwrap();
        black_box(affinity::response_ownership(&head.method, &endpoint.route));
        black_box(affinity::is_speech(&endpoint.route));
        let upstream_head = sanitize(head, endpoint.socket, &ForwardedHeaders::default()).unwrap();
        let features = if endpoint.operation.has_text() {
            RequestBodyFeatures::parse(SPEECH_BODY, true)
        } else {
            RequestBodyFeatures::default()
        };
        let credits = estimate_credits(endpoint.operation, &features, None, &self.models);
        let permit = self.admit(&caller.client, credits);
        let group = ConcurrencyGroup::for_operation(endpoint.operation);
        let request = KeyRequest::new(caller.client.name.clone(), credits, group);
        let roster = pool.roster();
        let mut lease = self.keys.reserve(&roster, &request);
        lease.mark_sent();
        assert_eq!(classify(StatusCode::OK, None, None), Verdict::Served);
        let served =
            ServedAttempt { request: Some(&request), began_at: lease.reserved_at(), is_charged: true };
        black_box(pool.record_service(&roster, lease.key(), served, now));
        let reported_cost = ReportedCost::from_headers(&response_headers);
        lease.record_concurrency_limit(reported_cost.max_concurrent.unwrap());
        black_box(pool.charge(&roster, &mut lease, reported_cost.credits.unwrap(), now));
        if let Some(permit) = permit {
            black_box(permit.charge(ChargeOutcome::Served, reported_cost.credits, now));
        }
        strip_response(&mut response_headers);
        redact_headers(&mut response_headers, &self.redactor);
        black_box(is_searched(&response_headers));
        black_box((parameter_names, upstream_head, response_headers));
    }
}

/// Polls a future that must be ready.
fn poll_ready<T>(future: Pin<&mut impl Future<Output = T>>) -> T {
    match future.poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => output,
        Poll::Pending => panic!("the future must be ready, because the grant suffices"),
    }
}

/// Returns the calls of the whole step, for requests of this kind and clients with these limits.
pub fn prepare_request_path(kind: RequestKind, client_limits: ClientLimits) -> PrepareCalls {
    let request_path = RequestPath::new(client_limits);
    let requests =
        move |count| request_heads(count, kind).into_iter().zip(response_heads(count)).collect::<Vec<_>>();
    prepare(requests, move |request| request_path.run(request))
}
