//! One attempt to send a request with one key: updates the state of the key in the pool, charges
//! the client, and writes one usage record, however the attempt ends.

mod charging;
mod session;

use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper::body::Incoming;
use tokio_util::sync::CancellationToken;

use super::permits::RequestPermits;
use super::refusals::Conclusions;
use super::request_meta::RequestMeta;
use super::request_summary::RequestSummary;
use super::retry_state::RetryState;
use super::state::Proxy;
use super::upstream_response::UpstreamResponse;
use super::usage::{AttemptRecord, CreditSource, QuotaCharge, UsagePermit};
use crate::body::relay::RelayEnd;
use crate::body::replay::Upload;
use crate::clock;
use crate::elevenlabs::cost::ReportedCost;
use crate::elevenlabs::endpoint::Metering;
use crate::elevenlabs::plan;
use crate::elevenlabs::request_body::{self, RequestBodyFeatures};
use crate::policy::authority::Authority;
use crate::policy::concurrency_group::ConcurrencyGroup;
use crate::policy::evidence::RefusalSource;
use crate::policy::outcome::Outcome;
use crate::policy::replay::Progress;
use crate::policy::units::UnixMs;
use crate::policy::verdict::Verdict;
use crate::pool::{Key, Lease, Pool, Roster, Served, Transition};
use crate::secret::ApiKey;
use crate::telemetry::{AttemptUsage, Meters, log_restriction, log_transitions};
use crate::upstream::SendError;

/// The key that the attempt uses.
#[derive(Debug)]
enum KeySource {
    Pool { pool: Arc<Pool>, roster: Arc<Roster>, lease: Lease },
    Client(ApiKey),
}

impl KeySource {
    /// Credits that the lease reserves in the workspace.
    fn reserved(&self) -> u64 {
        match self {
            Self::Pool { lease, .. } => lease.reserved(),
            Self::Client(_) => 0,
        }
    }
}

/// What is still to be charged to the client's quota when the attempt ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PendingCharge {
    /// No response head has come yet: the provider may serve what was sent.
    Response,
    /// No response head to a socket handshake has come yet; without one the provider serves
    /// nothing.
    Handshake,
    /// A socket session was opened.
    Session {
        /// Whether the provider has served it.
        is_served: bool,
    },
    /// Everything is charged.
    Nothing,
}

/// The guard of a running attempt. It owns the lease of its key and the permit of its usage record,
/// and shares the request's permits with the other attempts of the request.
///
/// The client is charged by the response; without one, by whether a byte of the request was sent.
/// Dropping the attempt does that, releases the key and writes the usage record.
#[derive(Debug)]
pub(super) struct Attempt {
    key_source: KeySource,
    upload: Upload<Incoming>,
    usage_permit: Option<UsagePermit>,
    began: Instant,
    metering: Metering,
    body_features: Option<RequestBodyFeatures>,
    /// The concurrency group in which a text-to-speech socket counts while it generates speech.
    speech_group: Option<ConcurrencyGroup>,
    permits: Arc<RequestPermits>,
    pending: PendingCharge,
    credits_per_minute: Option<u64>,
    /// Estimated credits for the text that was sent to the provider on a session.
    text_credits: u64,
    record: AttemptRecord,
    meters: Meters,
    cut: CancellationToken,
    authority: Arc<Authority>,
    /// Whether another attempt follows.
    has_failed_over: bool,
}

impl Attempt {
    /// Begins an attempt with a key of the pool. Its outcome is `ClientClosed` until another
    /// is recorded, as dropping the attempt is how a disconnect of the client shows.
    pub(super) fn begin<C>(
        proxy: &Proxy<C>,
        meta: &RequestMeta,
        retry: &mut RetryState,
        mut lease: Lease,
        permit: UsagePermit,
        upload: Upload<Incoming>,
    ) -> Box<Self> {
        lease.begin();
        let number = retry.next_attempt();
        let key_source =
            KeySource::Pool { pool: Arc::clone(&proxy.pool), roster: Arc::clone(retry.roster()), lease };
        Self::new(proxy, meta, key_source, number, permit, upload)
    }

    /// Begins the only attempt of a request that is sent with the client's own key.
    pub(super) fn with_own_key<C>(
        proxy: &Proxy<C>,
        meta: &RequestMeta,
        key: ApiKey,
        permit: UsagePermit,
        upload: Upload<Incoming>,
    ) -> Box<Self> {
        Self::new(proxy, meta, KeySource::Client(key), 1, permit, upload)
    }

    fn new<C>(
        proxy: &Proxy<C>,
        meta: &RequestMeta,
        key_source: KeySource,
        number: u32,
        permit: UsagePermit,
        upload: Upload<Incoming>,
    ) -> Box<Self> {
        let started_at = clock::now();
        let own_authority = match &key_source {
            KeySource::Pool { lease, .. } => lease.key().authority(),
            KeySource::Client(_) => None,
        };
        let authority = Arc::clone(own_authority.unwrap_or(proxy.upstream.authority()));
        let record = AttemptRecord {
            id: AttemptRecord::name(started_at),
            request_id: Arc::clone(&meta.request_id),
            number,
            started_at,
            client: meta.client.clone(),
            key: match &key_source {
                KeySource::Pool { lease, .. } => Some(Arc::clone(lease.key())),
                KeySource::Client(_) => None,
            },
            method: meta.method.clone(),
            route: meta.route,
            status: None,
            outcome: Outcome::ClientClosed,
            request_bytes: 0,
            response_bytes: 0,
            model: None,
            characters: None,
            audio: None,
            credits_reserved: Some(key_source.reserved()).filter(|&credits| credits > 0),
            credits: 0,
            credits_from: unknown_credits(meta.metering),
            quota: QuotaCharge::default(),
            first_byte: None,
            total: Duration::ZERO,
            is_price: false,
        };
        Box::new(Self {
            key_source,
            upload,
            usage_permit: Some(permit),
            began: clock::instant(),
            metering: meta.metering,
            body_features: meta.body_features.clone(),
            speech_group: meta.speech_group,
            permits: Arc::clone(&meta.permits),
            credits_per_minute: meta.credits_per_minute,
            text_credits: 0,
            pending: if meta.socket.is_some() { PendingCharge::Handshake } else { PendingCharge::Response },
            record,
            meters: proxy.meters.clone(),
            cut: proxy.cut.clone(),
            authority,
            has_failed_over: false,
        })
    }

    /// The host to which the request is sent with this key.
    pub(super) fn authority(&self) -> &Arc<Authority> {
        &self.authority
    }

    /// The API key that is sent.
    pub(super) fn api_key(&self) -> &ApiKey {
        match &self.key_source {
            KeySource::Pool { lease, .. } => lease.key().api_key(),
            KeySource::Client(key) => key,
        }
    }

    /// Records the response or error of the attempt, and updates the pool: the state of this key,
    /// and of the keys whose refusals of this request were unclear so far.
    pub(super) fn record_result(
        &mut self,
        result: &Result<Box<UpstreamResponse>, SendError>,
        retry: Option<&mut RetryState>,
        summary: &mut RequestSummary,
    ) -> Progress {
        let (now, elapsed) = (clock::now(), clock::since(self.began));
        let progress = match result {
            // Whether a socket session is served or refused shows only in its messages.
            Ok(response) if response.is_switched() => {
                self.record.status = Some(response.head.status.as_u16());
                self.pending = PendingCharge::Session { is_served: false };
                Progress::Answered(response.verdict)
            }
            Ok(response) => {
                let verdict = self.corrected(response.verdict);
                self.record.status = Some(response.head.status.as_u16());
                self.record.first_byte = Some(elapsed);
                self.meters.first_byte(elapsed);
                self.record.outcome = verdict.outcome();
                self.record_body_features(verdict);
                self.update_key_state(verdict, response.message.as_deref(), retry, now);
                let reported = ReportedCost::by(&response.head.headers);
                if let (KeySource::Pool { lease, .. }, Some(maximum), Verdict::Served) =
                    (&self.key_source, reported.concurrency_max, verdict)
                {
                    lease.record_concurrency_limit(maximum);
                }
                // Charge only after the key's state is updated: charging frees reserved credits and
                // wakes queued requests, which must not get a key that is in cooldown.
                self.charge(verdict, reported.credits, now);
                Progress::Answered(verdict)
            }
            Err(error) => {
                (self.record.outcome, self.record.credits_from) = match error.progress {
                    Progress::Unsent => {
                        self.settle_lease(0, now);
                        (Outcome::ConnectFailed, CreditSource::Free)
                    }
                    Progress::Unanswered | Progress::Answered(_) => {
                        (Outcome::NoResponse, unknown_credits(self.metering))
                    }
                };
                self.charge_unanswered(error.progress != Progress::Unsent, now);
                error.progress
            }
        };
        summary.record_attempt(&self.record, &self.authority, result, elapsed);
        progress
    }

    /// The meaning of a verdict, given the plan of the key's account.
    fn corrected(&self, verdict: Verdict) -> Verdict {
        let KeySource::Pool { lease, .. } = &self.key_source else { return verdict };
        if verdict == Verdict::Served {
            return verdict;
        }
        let tier = lease.key().workspace().tier();
        plan::corrected_by_plan(verdict, tier.as_ref().map(|tier| tier.as_str()))
    }

    /// Records in the pool what a verdict says about its key, and after a success also about the
    /// keys that refused the request before.
    fn update_key_state(
        &self,
        verdict: Verdict,
        message: Option<&str>,
        retry: Option<&mut RetryState>,
        now: UnixMs,
    ) {
        let (KeySource::Pool { pool, roster, lease }, Some(retry)) = (&self.key_source, retry) else {
            return;
        };
        let key = lease.key();
        let is_charged = self.metering == Metering::Credits;
        let conclusions = if verdict == Verdict::Served {
            let served = Served { request: Some(retry.key_request()), began_at: lease.since(), is_charged };
            let transitions = pool.record_service(roster, key, served, now);
            let had_refusals = retry.has_met_refusals();
            let mut conclusions = if had_refusals { retry.served(pool, key) } else { Conclusions::default() };
            conclusions.transitions.splice(0..0, transitions);
            conclusions
        } else {
            let mut key_request = retry.key_request().clone();
            // A session that is refused before it speaks is refused for its concurrency group of
            // speech.
            key_request.group = key_request.group.or(self.speech_group);
            retry.refused(pool, key, verdict, &key_request, self.source(roster, message, verdict))
        };
        self.log_conclusions(key, &conclusions);
    }

    /// Logs conclusions. The state of `key`'s workspace is written with the usage record of the
    /// attempt; that of other workspaces is written on request.
    fn log_conclusions(&self, key: &Key, conclusions: &Conclusions) {
        let is_other = |change: &Transition| !std::ptr::eq(change.key.workspace(), key.workspace());
        if let Some(permit) = &self.usage_permit
            && conclusions.transitions.iter().any(is_other)
        {
            permit.keys_changed();
        }
        log_transitions(&conclusions.transitions);
        for (key, restriction) in &conclusions.restricted {
            log_restriction(key, restriction);
        }
    }

    /// The source of a refusal for the key's history. The provider's message may repeat a key, so
    /// it is redacted.
    fn source(&self, roster: &Roster, message: Option<&str>, verdict: Verdict) -> RefusalSource {
        let message = message.unwrap_or(verdict.word()).as_bytes();
        let redacted = roster.redactor().redacted(message);
        RefusalSource {
            status: self.record.status,
            words: String::from_utf8_lossy(redacted.as_deref().unwrap_or(message)).into(),
            route: self.record.route.to_string().into(),
            request_id: Arc::clone(&self.record.request_id),
        }
    }

    /// Records model and text length once the provider has accepted the request. Refused requests
    /// are not recorded, as their fields may hold anything.
    fn record_body_features(&mut self, verdict: Verdict) {
        if verdict == Verdict::Served && self.metering == Metering::Credits {
            let body_features = self.body_features.take().unwrap_or_else(|| {
                let (start, is_whole) = self.upload.start(request_body::BODY_BYTES_MAX);
                RequestBodyFeatures::of(&start, is_whole)
            });
            (self.record.model, self.record.characters) = (body_features.model, body_features.characters);
        }
    }

    fn settle_lease(&mut self, credits: u64, now: UnixMs) {
        if let KeySource::Pool { pool, roster, lease } = &mut self.key_source {
            log_transitions(&pool.settle(roster, lease, credits, now));
        }
    }

    /// Releases the key for other requests before the next attempt of this one.
    pub(super) fn release(&mut self) {
        self.record.total = clock::since(self.began);
        if let KeySource::Pool { lease, .. } = &mut self.key_source {
            lease.release();
        }
    }

    /// Releases the replay buffer when the relay of the response begins: the request is not sent
    /// again.
    pub(super) fn relaying(&self) {
        self.upload.release();
    }

    /// Counts the failover to another attempt; returns its reason. This attempt has ended when it
    /// released its key: the wait for the next one is no part of it.
    pub(super) fn failed_over(&mut self) -> &'static str {
        self.has_failed_over = true;
        self.meters.upstream_retry(self.record.key.as_deref(), self.record.outcome);
        self.record.outcome.word()
    }

    /// The outcome of a disconnect: by the client, or by the proxy at shutdown.
    fn disconnect_outcome(&self) -> Outcome {
        if self.cut.is_cancelled() { Outcome::Shutdown } else { Outcome::ClientClosed }
    }

    /// Records how the relay ended, and its bytes.
    pub(super) fn relayed(&mut self, ending: RelayEnd, bytes: u64) -> &AttemptRecord {
        self.record.response_bytes = bytes;
        match ending {
            RelayEnd::Complete => {}
            RelayEnd::ClientLeft => self.record.outcome = self.disconnect_outcome(),
            RelayEnd::UpstreamBroke => self.record.outcome = Outcome::UpstreamReset,
        }
        &self.record
    }
}

fn unknown_credits(metering: Metering) -> CreditSource {
    match metering {
        Metering::Credits => CreditSource::Unknown,
        Metering::Free => CreditSource::Free,
    }
}

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
        if let Some(permit) = self.usage_permit.take() {
            self.charge_pending();
            if self.record.outcome == Outcome::ClientClosed {
                self.record.outcome = self.disconnect_outcome();
            }
            self.record.request_bytes += self.upload.passed_bytes();
            if !self.has_failed_over {
                self.record.total = clock::since(self.began);
            }
            let AttemptRecord { key, outcome, .. } = &self.record;
            self.meters.attempt_ended(key.as_deref(), *outcome, attempt_usage(&self.record));
            permit.write(self.record.clone());
        }
    }
}
