//! Accounts for one attempt to send a request with one key. Whatever its outcome, an attempt writes one usage record.
//! An attempt with a key of the pool also charges the client and the workspace, updates the states of keys according to
//! the response, and releases its key. `exchange` and `socket` create the attempts.

mod charging;
mod key_state;
mod session;

use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper::body::Incoming;
use tokio_util::sync::CancellationToken;

use super::permits::RequestPermits;
use super::request_meta::RequestMeta;
use super::request_summary::RequestSummary;
use super::retry_state::RetryState;
use super::state::Proxy;
use super::upstream_response::UpstreamResponse;
use super::usage::{AttemptRecord, CreditSource, QuotaCharge, UsagePermit};
use crate::body::relay::RelayEnd;
use crate::body::replay::UploadProgress;
use crate::clock;
use crate::elevenlabs::cost::ReportedCost;
use crate::elevenlabs::endpoint::Metering;
use crate::elevenlabs::plan;
use crate::elevenlabs::request_body::{self, RequestBodyFeatures};
use crate::policy::authority::Authority;
use crate::policy::concurrency_group::ConcurrencyGroup;
use crate::policy::outcome::Outcome;
use crate::policy::replay::Progress;
use crate::policy::verdict::Verdict;
use crate::pool::{Lease, Pool, Roster};
use crate::secret::ApiKey;
use crate::telemetry::{AttemptUsage, RequestMetrics};
use crate::upstream::SendError;
use charging::unreported_credit_source;
pub(super) use session::SentText;

/// The key of an attempt: leased from the pool, or sent by the client.
#[derive(Debug)]
enum KeySource {
    Pool { pool: Arc<Pool>, roster: Arc<Roster>, lease: Lease },
    Client(ApiKey),
}

impl KeySource {
    fn lease(&self) -> Option<&Lease> {
        match self {
            Self::Pool { lease, .. } => Some(lease),
            Self::Client(_) => None,
        }
    }

    fn lease_mut(&mut self) -> Option<&mut Lease> {
        match self {
            Self::Pool { lease, .. } => Some(lease),
            Self::Client(_) => None,
        }
    }

    /// Returns the credits that the lease reserves in the workspace.
    fn reserved_credits(&self) -> u64 {
        self.lease().map_or(0, Lease::reserved)
    }
}

/// The part of an attempt that is not charged to the client's quota yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PendingCharge {
    /// The response head has not arrived: the provider may serve the bytes that were sent.
    Response,
    /// The response head to a WebSocket handshake has not arrived. Before this head, the provider serves nothing.
    Handshake,
    /// A WebSocket session was opened.
    Session {
        /// Whether the provider has served it.
        is_served: bool,
    },
    /// The attempt is charged.
    Nothing,
}

/// The guard of a running attempt. It owns the lease of its key and the permit of its usage record, and shares the
/// request's permits with the other attempts.
///
/// The response determines the charge, and for a WebSocket session, its messages and its duration. Without a
/// response, the charge depends on whether a byte of the request was sent. Dropping the attempt makes the charge that
/// is still pending, releases the key and writes the usage record.
#[derive(Debug)]
pub(super) struct Attempt {
    key_source: KeySource,
    upload: UploadProgress<Incoming>,
    usage_permit: Option<UsagePermit>,
    started_at: Instant,
    metering: Metering,
    body_features: Option<RequestBodyFeatures>,
    /// The concurrency group in which a text-to-speech session counts while it generates speech.
    speech_group: Option<ConcurrencyGroup>,
    permits: Arc<RequestPermits>,
    pending_charge: PendingCharge,
    /// The price of a session that is billed by its duration, or `None` for any other request.
    credits_per_minute: Option<u64>,
    /// Estimated credits for the text that was sent to the provider in a session.
    text_credits: u64,
    record: AttemptRecord,
    metrics: RequestMetrics,
    drain_expired: CancellationToken,
    /// Whether another attempt follows.
    has_failed_over: bool,
}

impl Attempt {
    /// Starts an attempt with a key of the pool. The outcome is `ClientClosed` until a different outcome is
    /// recorded, because a disconnect of the client drops the attempt.
    pub(super) fn with_pool_key<C>(
        proxy: &Proxy<C>,
        meta: &RequestMeta,
        retry: &mut RetryState,
        mut lease: Lease,
        usage_permit: UsagePermit,
        upload: UploadProgress<Incoming>,
    ) -> Box<Self> {
        lease.mark_sent();
        retry.attempts += 1;
        let key_source =
            KeySource::Pool { pool: Arc::clone(&proxy.pool), roster: Arc::clone(&retry.roster), lease };
        Self::new(proxy, meta, key_source, retry.attempts, usage_permit, upload)
    }

    /// Starts the only attempt of a request that is sent with the client's own key.
    pub(super) fn with_own_key<C>(
        proxy: &Proxy<C>,
        meta: &RequestMeta,
        key: ApiKey,
        usage_permit: UsagePermit,
        upload: UploadProgress<Incoming>,
    ) -> Box<Self> {
        Self::new(proxy, meta, KeySource::Client(key), 1, usage_permit, upload)
    }

    fn new<C>(
        proxy: &Proxy<C>,
        meta: &RequestMeta,
        key_source: KeySource,
        number: u32,
        usage_permit: UsagePermit,
        upload: UploadProgress<Incoming>,
    ) -> Box<Self> {
        let started_at = clock::now();
        let key = key_source.lease().map(Lease::key);
        let key_authority = key.and_then(|key| key.destination());
        let authority = Arc::clone(key_authority.unwrap_or(proxy.upstream.authority()));
        let record = AttemptRecord {
            id: AttemptRecord::new_id(started_at),
            request_id: Arc::clone(&meta.request_id),
            number,
            started_at,
            client: meta.client.clone(),
            user: meta.user.clone(),
            authority,
            key: key.cloned(),
            method: meta.method.clone(),
            route: meta.route,
            status: None,
            outcome: Outcome::ClientClosed,
            request_bytes: 0,
            response_bytes: 0,
            model: None,
            characters: None,
            audio: None,
            credits_reserved: Some(key_source.reserved_credits()).filter(|&credits| credits > 0),
            credits: 0,
            credits_from: unreported_credit_source(meta.metering),
            quota: QuotaCharge::default(),
            first_byte: None,
            total: Duration::ZERO,
            is_price_update: false,
        };
        Box::new(Self {
            key_source,
            upload,
            usage_permit: Some(usage_permit),
            started_at: clock::instant(),
            metering: meta.metering,
            body_features: meta.body_features.clone(),
            speech_group: meta.speech_group,
            permits: Arc::clone(&meta.permits),
            credits_per_minute: meta.credits_per_minute,
            text_credits: 0,
            pending_charge: if meta.socket.is_some() {
                PendingCharge::Handshake
            } else {
                PendingCharge::Response
            },
            record,
            metrics: proxy.metrics.clone(),
            drain_expired: proxy.drain_expired.clone(),
            has_failed_over: false,
        })
    }

    /// Returns the host to which this attempt sends the request.
    pub(super) fn authority(&self) -> &Arc<Authority> {
        &self.record.authority
    }

    /// Returns the key that the request is sent with.
    pub(super) fn api_key(&self) -> &ApiKey {
        match &self.key_source {
            KeySource::Pool { lease, .. } => lease.key().api_key(),
            KeySource::Client(key) => key,
        }
    }

    /// Records the response or the error of the attempt. Updates the state of this key in the pool, and of the keys
    /// whose refusals of this request were unclear so far. Returns how far the attempt got.
    pub(super) fn record_result(
        &mut self,
        result: &Result<Box<UpstreamResponse>, SendError>,
        retry: Option<&mut RetryState>,
        summary: &mut RequestSummary,
    ) -> Progress {
        let (now, elapsed) = (clock::now(), clock::elapsed_since(self.started_at));
        let progress = match result {
            // Only the messages of a session show whether the session is served or refused.
            Ok(response) if response.is_switched() => {
                self.record.status = Some(response.head.status.as_u16());
                self.pending_charge = PendingCharge::Session { is_served: false };
                Progress::Responded(response.verdict)
            }
            Ok(response) => {
                let verdict = self.correct_by_plan(response.verdict);
                self.record.status = Some(response.head.status.as_u16());
                self.record.first_byte = Some(elapsed);
                self.metrics.record_upstream_response_head(elapsed);
                self.record.outcome = verdict.outcome();
                self.record_body_features(verdict);
                self.update_key_state(verdict, response.message.as_deref(), retry, now);
                let reported_cost = ReportedCost::from_headers(&response.head.headers);
                if let (Some(lease), Some(maximum), Verdict::Served) =
                    (self.key_source.lease(), reported_cost.max_concurrent, verdict)
                {
                    lease.record_concurrency_limit(maximum);
                }
                // The charge follows the update of the key's state, because the charge frees reserved credits
                // and wakes queued requests. These requests must not receive a key that is in cooldown.
                self.charge(verdict, reported_cost.credits, now);
                Progress::Responded(verdict)
            }
            Err(error) => {
                (self.record.outcome, self.record.credits_from) = match error.progress {
                    Progress::Unsent => {
                        self.charge_lease(0, now);
                        (Outcome::ConnectFailed, CreditSource::Free)
                    }
                    Progress::ProxyAuthenticationFailed => {
                        self.charge_lease(0, now);
                        (Outcome::ProxyAuthenticationFailed, CreditSource::Free)
                    }
                    Progress::NoResponse | Progress::Responded(_) => {
                        (Outcome::NoResponse, unreported_credit_source(self.metering))
                    }
                };
                self.charge_without_response(error.progress.is_sent(), now);
                error.progress
            }
        };
        summary.record_attempt(&self.record, result, elapsed);
        progress
    }

    /// Corrects a verdict whose meaning depends on the plan of the key's account.
    fn correct_by_plan(&self, verdict: Verdict) -> Verdict {
        let Some(lease) = self.key_source.lease().filter(|_| verdict != Verdict::Served) else {
            return verdict;
        };
        let tier = lease.key().workspace().tier();
        plan::correct_verdict_by_plan(verdict, tier.as_ref().map(|tier| tier.as_str()))
    }

    /// Records the model and the text length after the provider has accepted the request. The values of a
    /// refused request are not recorded, because the provider has not validated them.
    fn record_body_features(&mut self, verdict: Verdict) {
        if verdict == Verdict::Served && self.metering == Metering::Credits {
            let body_features = self.body_features.take().unwrap_or_else(|| {
                let start = self.upload.buffered_start(request_body::MAX_PARSED_BODY_BYTES);
                RequestBodyFeatures::parse(&start.bytes, start.is_complete)
            });
            (self.record.model, self.record.characters) = (body_features.model, body_features.characters);
        }
    }

    /// Releases the key for other requests before the next attempt starts, and records the duration of the attempt.
    pub(super) fn release_key(&mut self) {
        self.record.total = clock::elapsed_since(self.started_at);
        if let Some(lease) = self.key_source.lease_mut() {
            lease.release();
        }
    }

    /// Releases the buffered request body. The request cannot be sent again afterwards.
    pub(super) fn release_replay_buffer(&self) {
        self.upload.release();
    }

    /// Counts the failover to another attempt. Returns the reason for the failover. This attempt ended when it released
    /// its key, so the wait for the next key is not a part of its duration.
    pub(super) fn record_failover(&mut self) -> &'static str {
        self.has_failed_over = true;
        self.metrics.record_retry(self.record.key.as_deref(), self.record.outcome);
        self.record.outcome.as_str()
    }

    /// Returns the outcome of an attempt whose client connection was closed, either by the client or by Keychoir at
    /// shutdown.
    fn disconnect_outcome(&self) -> Outcome {
        if self.drain_expired.is_cancelled() { Outcome::Shutdown } else { Outcome::ClientClosed }
    }

    /// Records how the relay of the response body ended, and the number of relayed bytes. Returns the usage record.
    pub(super) fn record_relay_end(&mut self, relay_end: RelayEnd, bytes: u64) -> &AttemptRecord {
        self.record.response_bytes = bytes;
        match relay_end {
            RelayEnd::Complete => {}
            RelayEnd::Dropped => self.record.outcome = self.disconnect_outcome(),
            RelayEnd::BodyFailed => self.record.outcome = Outcome::UpstreamReset,
        }
        &self.record
    }
}

/// Returns the usage of an attempt for the metrics.
fn attempt_usage(record: &AttemptRecord) -> AttemptUsage {
    AttemptUsage {
        request_bytes: record.request_bytes,
        response_bytes: record.response_bytes,
        characters: record.characters.unwrap_or(0),
        audio_ms: record.audio.map_or(0, |audio| u64::try_from(audio.as_millis()).unwrap_or(u64::MAX)),
        credits: record.credits,
        is_unpriced: record.credits_from == CreditSource::Unknown,
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if let Some(usage_permit) = self.usage_permit.take() {
            self.charge_pending();
            if self.record.outcome == Outcome::ClientClosed {
                self.record.outcome = self.disconnect_outcome();
            }
            self.record.request_bytes += self.upload.polled_bytes();
            if !self.has_failed_over {
                self.record.total = clock::elapsed_since(self.started_at);
            }
            let AttemptRecord { key, outcome, .. } = &self.record;
            self.metrics.record_attempt(key.as_deref(), *outcome, attempt_usage(&self.record));
            usage_permit.write(self.record.clone());
        }
    }
}
