//! One attempt with one key: teaches the pool, spends, and is written down once, however it ends.

use std::sync::Arc;
use std::time::{Duration, Instant};

use http::Method;
use hyper::body::Incoming;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::Proxy;
use super::answer::Answer;
use super::bond::Teaching;
use super::books::{AttemptRecord, CreditSource, Place};
use super::journal::RequestLog;
use super::journey::Journey;
use crate::body::relay::Ending;
use crate::body::replay::{Replay, Upload};
use crate::clock;
use crate::policy::asked::{self, Asked};
use crate::policy::authority::Authority;
use crate::policy::classify::Verdict;
use crate::policy::client::ClientName;
use crate::policy::cost::{self, concurrency_max};
use crate::policy::endpoint::{Endpoint, Metering, Work};
use crate::policy::estimate::estimate;
use crate::policy::lane::Lane;
use crate::policy::models::Models;
use crate::policy::replay::Progress;
use crate::policy::units::UnixMs;
use crate::pool::{Ask, Key, Lease, Pool, Roster};
use crate::secret::ApiKey;
use crate::telemetry::{Meters, Spent, announce};
use crate::upstream::SendError;

/// What all attempts of a request have in common in the books.
#[derive(Debug)]
pub(super) struct Case {
    request_id: Arc<str>,
    pub(super) client: ClientName,
    method: Arc<str>,
    route: Arc<str>,
    metering: Metering,
    /// What was asked for, where that was known before.
    asked: Option<Asked>,
}

impl Case {
    /// Opens a case, and tells the log what it is about.
    pub(super) fn open(
        log: &mut RequestLog,
        client: ClientName,
        method: &Method,
        endpoint: &Endpoint,
    ) -> Self {
        let case = Self {
            request_id: log.request_id(),
            client,
            method: method.as_str().into(),
            route: endpoint.route.as_str().into(),
            metering: endpoint.metering,
            asked: None,
        };
        log.opened(&case.client, &case.route);
        case
    }

    /// Looks at what is asked for, as far as can be seen before it is sent; returns what that needs of
    /// a key.
    pub(super) async fn foresee(
        &mut self,
        endpoint: &Endpoint,
        body: &Replay<Incoming>,
        models: &Models,
        span: Duration,
    ) -> Ask {
        let mut asked = Asked::default();
        let is_short = body.length().is_none_or(|bytes| bytes <= asked::BODY_BYTES_MAX as u64);
        if endpoint.work.has_text() && is_short && !span.is_zero() {
            let (start, is_whole) = body.gather(asked::BODY_BYTES_MAX, span).await;
            asked = Asked::of(&start, is_whole);
            self.asked = is_whole.then(|| asked.clone());
        }
        Ask {
            client: self.client.clone(),
            estimate: estimate(endpoint.work, &asked, body.length(), models),
            lane: lane(endpoint.work, &asked, models),
            permission: endpoint.permission,
            excluded: Vec::new(),
            barred: Vec::new(),
            home: Vec::new(),
            spares_credits: false,
        }
    }
}

/// The client closed its connection before the end.
const CLIENT_LEFT: &str = "client_left";
/// We closed it, because the program's end had come and the grace was over.
const CUT: &str = "cut";

/// An attempt under way. Dropping it releases the key and writes the record.
#[derive(Debug)]
pub(super) struct Attempt {
    pool: Arc<Pool>,
    roster: Arc<Roster>,
    lease: Lease,
    upload: Upload<Incoming>,
    place: Option<Place>,
    began: Instant,
    metering: Metering,
    asked: Option<Asked>,
    record: AttemptRecord,
    meters: Meters,
    cut: CancellationToken,
    teaching: Option<Teaching>,
}

impl Attempt {
    /// Begins an attempt. Until something else is known, it ended because the client left.
    pub(super) fn begin<C>(
        proxy: &Proxy<C>,
        case: &Case,
        journey: &mut Journey,
        lease: Lease,
        place: Place,
        upload: Upload<Incoming>,
    ) -> Self {
        let record = AttemptRecord {
            id: Uuid::now_v7(),
            request_id: Arc::clone(&case.request_id),
            number: journey.next_attempt(),
            started_at: clock::now(),
            client: case.client.clone(),
            key: Arc::clone(lease.key()),
            method: Arc::clone(&case.method),
            route: Arc::clone(&case.route),
            status: None,
            verdict: CLIENT_LEFT,
            request_bytes: 0,
            response_bytes: 0,
            model: None,
            characters: None,
            credits_reserved: Some(lease.reserved()).filter(|&credits| credits > 0),
            credits: 0,
            credits_from: unknown(case.metering),
            first_byte: None,
            total: Duration::ZERO,
        };
        Self {
            pool: Arc::clone(&proxy.pool),
            roster: Arc::clone(journey.roster()),
            lease,
            upload,
            place: Some(place),
            began: clock::instant(),
            metering: case.metering,
            asked: case.asked.clone(),
            record,
            meters: proxy.meters.clone(),
            cut: proxy.cut.clone(),
            teaching: None,
        }
    }

    /// The body of its answer will teach that.
    pub(super) fn teaches(&mut self, teaching: Option<Teaching>) {
        self.teaching = teaching;
    }

    /// What hears the body of its answer.
    pub(super) fn listener(&mut self) -> Option<Teaching> {
        self.teaching.take()
    }

    /// The key it asks with.
    pub(super) fn key(&self) -> &Arc<Key> {
        self.lease.key()
    }

    /// Where that key works, if not where all do.
    pub(super) fn authority(&self) -> Option<&Arc<Authority>> {
        self.lease.key().authority()
    }

    /// The secret of that key.
    pub(super) fn api_key(&self) -> &ApiKey {
        self.lease.key().api_key()
    }

    /// Takes in what came back, and teaches the pool: of this key, and of those that were refused
    /// on the way here without a reason.
    pub(super) fn learn(
        &mut self,
        result: &Result<Answer, SendError>,
        journey: &Journey,
        log: &mut RequestLog,
    ) -> Progress {
        let now = clock::now();
        let progress = match result {
            Ok(answer) => {
                self.record.status = Some(answer.head.status.as_u16());
                self.record.first_byte = Some(clock::since(self.began));
                self.record.verdict = answer.verdict.word();
                self.describe(answer.verdict);
                self.charge(answer, now);
                let (key, ask) = (self.lease.key(), Some(journey.ask()));
                announce(&self.pool.judge(&self.roster, key, answer.verdict, ask, now));
                if answer.verdict == Verdict::Served {
                    if let Some(maximum) = concurrency_max(&answer.head.headers) {
                        self.lease.learn_room(maximum);
                    }
                    for (key, verdict) in journey.shown_by_contrast() {
                        announce(&self.pool.judge(&self.roster, key, verdict, None, now));
                    }
                }
                Progress::Answered(answer.verdict)
            }
            Err(error) => {
                (self.record.verdict, self.record.credits_from) = match error.progress {
                    Progress::Unsent => {
                        self.pool.settle(&self.roster, &mut self.lease, 0, now);
                        ("unsent", CreditSource::Free)
                    }
                    Progress::Unanswered | Progress::Answered(_) => ("unanswered", unknown(self.metering)),
                };
                error.progress
            }
        };
        log.learned(&self.record, result, clock::since(self.began));
        progress
    }

    /// Notes what was asked for, once the provider has taken it: what it refuses may be anything.
    fn describe(&mut self, verdict: Verdict) {
        if verdict == Verdict::Served && self.metering == Metering::Credits {
            let asked = self.asked.take().unwrap_or_else(|| {
                let (start, is_whole) = self.upload.start(asked::BODY_BYTES_MAX);
                Asked::of(&start, is_whole)
            });
            (self.record.model, self.record.characters) = (asked.model, asked.characters);
        }
    }

    /// Books the cost. It stands in the head of the answer, before the first byte of the body: an
    /// answer that is broken off later is probably charged all the same.
    fn charge(&mut self, answer: &Answer, now: UnixMs) {
        let expected = self.lease.reserved();
        let (credits, from) = match (cost::told(&answer.head.headers), answer.verdict) {
            (Some(told), _) => (told, CreditSource::Answer),
            (None, Verdict::Served) if expected > 0 => (expected, CreditSource::Estimate),
            (None, Verdict::Served | Verdict::ServerError) => (0, unknown(self.metering)),
            (None, _) => (0, CreditSource::Free),
        };
        (self.record.credits, self.record.credits_from) = (credits, from);
        announce(&self.pool.settle(&self.roster, &mut self.lease, credits, now));
    }

    /// Another attempt follows: the key is free for others meanwhile.
    pub(super) fn release(&mut self) {
        self.lease.release();
    }

    /// The relay of the answer begins: the request is not sent again.
    pub(super) fn relaying(&self) {
        self.upload.release();
    }

    /// Another attempt follows it.
    pub(super) fn failed_over(&self) {
        self.meters.failed_over(self.record.verdict);
    }

    /// Who has left: the client, unless we close the connections.
    fn left(&self) -> &'static str {
        if self.cut.is_cancelled() { CUT } else { CLIENT_LEFT }
    }

    /// The relay has ended.
    pub(super) fn relayed(&mut self, ending: Ending, bytes: u64) -> &AttemptRecord {
        self.record.response_bytes = bytes;
        match ending {
            Ending::Complete => {}
            Ending::ClientLeft => self.record.verdict = self.left(),
            Ending::UpstreamBroke => self.record.verdict = "upstream_broke",
        }
        &self.record
    }
}

/// With what a request is counted when it runs at once.
fn lane(work: Work, asked: &Asked, models: &Models) -> Option<Lane> {
    let of_work = Lane::of_work(work)?;
    let speaks = of_work == Lane::SPEECH;
    let model = asked.model.as_deref().or(speaks.then_some(asked::DEFAULT_MODEL));
    Some(model.and_then(|model| models.lane(model)).unwrap_or(of_work))
}

fn unknown(metering: Metering) -> CreditSource {
    match metering {
        Metering::Credits => CreditSource::Unknown,
        Metering::Free => CreditSource::Free,
    }
}

fn spent(record: &AttemptRecord) -> Spent {
    Spent {
        request_bytes: record.request_bytes,
        response_bytes: record.response_bytes,
        characters: record.characters.unwrap_or(0),
        credits: record.credits,
        is_unpriced: record.credits_from == CreditSource::Unknown,
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if let Some(place) = self.place.take() {
            if self.record.verdict == CLIENT_LEFT {
                self.record.verdict = self.left();
            }
            self.record.request_bytes = self.upload.passed_bytes();
            self.record.total = clock::since(self.began);
            self.meters.attempt_ended(self.record.verdict, spent(&self.record));
            place.write(self.record.clone());
        }
    }
}
