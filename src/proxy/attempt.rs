//! One attempt with one key: teaches the pool, spends, and is written down once, however it ends.

use std::sync::Arc;
use std::time::{Duration, Instant};

use http::Method;
use hyper::body::Incoming;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::Proxy;
use super::accounts::Account;
use super::answer::Answer;
use super::books::{AttemptRecord, CreditSource, Place};
use super::journal::RequestLog;
use super::journey::Journey;
use crate::body::relay::Ending;
use crate::body::replay::Upload;
use crate::clock;
use crate::policy::asked::{self, Asked};
use crate::policy::authority::Authority;
use crate::policy::classify::Verdict;
use crate::policy::client::ClientName;
use crate::policy::cost;
use crate::policy::endpoint::{Endpoint, Metering};
use crate::policy::replay::Progress;
use crate::policy::units::UnixMs;
use crate::pool::{Lease, Pool, Roster};
use crate::secret::ApiKey;
use crate::telemetry::announce;
use crate::upstream::SendError;

/// What all attempts of a request have in common in the books.
#[derive(Debug)]
pub(super) struct Case {
    request_id: Arc<str>,
    client: ClientName,
    method: Arc<str>,
    route: Arc<str>,
    metering: Metering,
    /// Who is charged for it.
    account: Option<Arc<Account>>,
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
            account: None,
        };
        log.opened(&case.client, &case.route);
        case
    }

    /// Charges what it costs to `account`.
    pub(super) fn charge_to(&mut self, account: &Arc<Account>) {
        self.account = Some(Arc::clone(account));
    }
}

/// The client closed its connection before the end.
const CLIENT_LEFT: &str = "client_left";
/// We closed it, because the program's end had come and the grace was over.
const CUT: &str = "cut";

/// Whose key it asks with.
#[derive(Debug)]
enum Payer {
    Pool { pool: Arc<Pool>, roster: Arc<Roster>, lease: Lease },
    Client(ApiKey),
}

/// An attempt under way. Dropping it releases the key and writes the record.
#[derive(Debug)]
pub(super) struct Attempt {
    payer: Payer,
    upload: Upload<Incoming>,
    place: Option<Place>,
    began: Instant,
    metering: Metering,
    account: Option<Arc<Account>>,
    record: AttemptRecord,
    cut: CancellationToken,
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
        let number = journey.next_attempt();
        let payer =
            Payer::Pool { pool: Arc::clone(&proxy.pool), roster: Arc::clone(journey.roster()), lease };
        Self::by(proxy, case, payer, number, place, upload)
    }

    /// Begins the only attempt of a client that has brought its own key.
    pub(super) fn with_own_key<C>(
        proxy: &Proxy<C>,
        case: &Case,
        key: ApiKey,
        place: Place,
        upload: Upload<Incoming>,
    ) -> Self {
        Self::by(proxy, case, Payer::Client(key), 1, place, upload)
    }

    fn by<C>(
        proxy: &Proxy<C>,
        case: &Case,
        payer: Payer,
        number: u32,
        place: Place,
        upload: Upload<Incoming>,
    ) -> Self {
        let record = AttemptRecord {
            id: Uuid::now_v7(),
            request_id: Arc::clone(&case.request_id),
            number,
            started_at: clock::now(),
            client: case.client.clone(),
            key: match &payer {
                Payer::Pool { lease, .. } => Some(Arc::clone(lease.key())),
                Payer::Client(_) => None,
            },
            method: Arc::clone(&case.method),
            route: Arc::clone(&case.route),
            status: None,
            verdict: CLIENT_LEFT,
            request_bytes: 0,
            response_bytes: 0,
            model: None,
            characters: None,
            credits_reserved: None,
            credits: 0,
            credits_from: unknown(case.metering),
            first_byte: None,
            total: Duration::ZERO,
        };
        Self {
            payer,
            upload,
            place: Some(place),
            began: clock::instant(),
            metering: case.metering,
            account: case.account.clone(),
            record,
            cut: proxy.cut.clone(),
        }
    }

    /// Where its key works, if not where all do.
    pub(super) fn authority(&self) -> Option<&Arc<Authority>> {
        match &self.payer {
            Payer::Pool { lease, .. } => lease.key().authority(),
            Payer::Client(_) => None,
        }
    }

    /// The secret of that key.
    pub(super) fn api_key(&self) -> &ApiKey {
        match &self.payer {
            Payer::Pool { lease, .. } => lease.key().api_key(),
            Payer::Client(key) => key,
        }
    }

    /// Takes in what came back, and teaches the pool: of this key, and of those that were refused
    /// on the journey to it without a reason.
    pub(super) fn learn(
        &mut self,
        result: &Result<Answer, SendError>,
        journey: Option<&Journey>,
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
                if let Payer::Pool { pool, roster, lease } = &self.payer {
                    announce(&pool.judge(roster, lease.key(), answer.verdict, now));
                    let is_served = answer.verdict == Verdict::Served;
                    let shown = journey.filter(|_| is_served).map(Journey::shown_by_contrast);
                    for (key, verdict) in shown.into_iter().flatten() {
                        announce(&pool.judge(roster, key, verdict, now));
                    }
                }
                Progress::Answered(answer.verdict)
            }
            Err(error) => {
                (self.record.verdict, self.record.credits_from) = match error.progress {
                    Progress::Unsent => ("unsent", CreditSource::Free),
                    Progress::Unanswered | Progress::Answered(_) => ("unanswered", unknown(self.metering)),
                };
                error.progress
            }
        };
        log.learned(&self.record, result);
        progress
    }

    /// Notes what was asked for, once the provider has taken it: what it refuses may be anything.
    fn describe(&mut self, verdict: Verdict) {
        if verdict == Verdict::Served && self.metering == Metering::Credits {
            let (start, is_whole) = self.upload.start(asked::BODY_BYTES_MAX);
            let Asked { model, characters } = Asked::of(&start, is_whole);
            (self.record.model, self.record.characters) = (model, characters);
        }
    }

    /// Books the cost. It stands in the head of the answer, before the first byte of the body: an
    /// answer that is broken off later is probably charged all the same.
    fn charge(&mut self, answer: &Answer, now: UnixMs) {
        let told = cost::told(&answer.head.headers);
        self.record.credits = told.unwrap_or(0);
        self.record.credits_from = match (told, answer.verdict) {
            (Some(_), _) => CreditSource::Answer,
            (None, Verdict::Served | Verdict::ServerError) => unknown(self.metering),
            (None, _) => CreditSource::Free,
        };
        if let Some(account) = &self.account {
            account.spend(self.record.credits, now);
        }
        if let Payer::Pool { pool, roster, lease } = &self.payer {
            announce(&pool.spend(roster, lease.key(), self.record.credits, now));
        }
    }

    /// The relay of the answer begins: the request is not sent again.
    pub(super) fn relaying(&self) {
        self.upload.release();
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

fn unknown(metering: Metering) -> CreditSource {
    match metering {
        Metering::Credits => CreditSource::Unknown,
        Metering::Free => CreditSource::Free,
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
            place.write(self.record.clone());
        }
    }
}
