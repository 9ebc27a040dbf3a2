//! Asks the provider how much each key has left: at the start in the background, and then rarely.
//! What it learns brings refused keys back and corrects the count where other apps spend too.

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, Method, Response, Uri};
use hyper::body::Incoming;
use tokio::sync::watch;
use tracing::debug;

use crate::body::decode::decoded;
use crate::body::peek::Peeked;
use crate::body::replay::Replay;
use crate::clock;
use crate::policy::budget::Quota;
use crate::policy::classify::{ErrorBody, Verdict, classify};
use crate::policy::subscription::Subscription;
use crate::pool::{Key, Observation, Pool};
use crate::proxy::Books;
use crate::telemetry::{announce, announce_drift};
use crate::upstream::{AnswerBody, Connect, Outbound, Upstream};

/// How the provider is asked.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Between two rounds.
    pub interval: Duration,
    /// For one key's answer.
    pub answer_max: Duration,
}

/// Asks for every key's quota, round after round.
#[derive(Debug)]
pub struct Watch<C> {
    pool: Arc<Pool>,
    upstream: Upstream<Incoming, C>,
    books: Books,
    settings: watch::Receiver<Settings>,
}

/// An answer is a kilobyte or two; one that is larger is none.
const ANSWER_BYTES_MAX: usize = 64 * 1024;

impl<C: Connect> Watch<C> {
    /// A watch over `pool`. It asks anew as soon as it is given settings, also when they are the
    /// same: there may be other keys.
    pub fn new(
        pool: Arc<Pool>,
        upstream: Upstream<Incoming, C>,
        books: Books,
        settings: watch::Receiver<Settings>,
    ) -> Self {
        Self { pool, upstream, books, settings }
    }

    /// Asks round after round, for ever. `rounds` counts those that are complete.
    pub async fn run(mut self, rounds: watch::Sender<u64>) {
        loop {
            let settings = *self.settings.borrow_and_update();
            self.round(settings).await;
            rounds.send_modify(|rounds| *rounds += 1);
            // Nobody changes the settings any more: then the interval alone counts.
            let changed = async {
                if self.settings.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                () = tokio::time::sleep(settings.interval) => {}
                () = changed => {}
            }
        }
    }

    /// Asks once with every key, one after the other: a burst from one address looks like abuse.
    async fn round(&self, settings: Settings) {
        let roster = self.pool.roster();
        let mut told: Vec<Told<'_>> = Vec::new();
        for key in roster.keys() {
            let asked = tokio::time::timeout(settings.answer_max, self.ask(key, settings)).await;
            // A provider that does not answer says nothing of the key.
            let Ok(Some(seen)) = asked else {
                debug!(key = key.api_key().short().as_str(), "the provider did not tell this key's quota");
                continue;
            };
            let quota = match &seen {
                Observation::Quota { quota, .. } => Some(*quota),
                Observation::Unreadable | Observation::Invalid => None,
            };
            let before = key.workspace().drift();
            announce(&self.pool.observe(&roster, key, seen, clock::now()));
            if let Some(quota) = quota {
                told.push(Told { key, quota, before });
            }
        }
        announce_drifts(&told);
        self.books.keys_changed();
    }

    async fn ask(&self, key: &Key, settings: Settings) -> Option<Observation> {
        let outbound = Outbound {
            method: Method::GET,
            target: Uri::from_static("/v1/user/subscription"),
            headers: HeaderMap::new(),
        };
        let answer = self
            .upstream
            .send(key.authority(), key.api_key(), &outbound, Replay::empty().attempt())
            .await
            .ok()?;
        read(answer, settings).await
    }
}

/// What the provider told of a key in this round.
struct Told<'a> {
    key: &'a Key,
    quota: Quota,
    /// The drift of its workspace before.
    before: i64,
}

/// Tells by how much the provider's figures differ from ours, once all are known: two workspaces with
/// the same figures are one.
fn announce_drifts(told: &[Told<'_>]) {
    for Told { key, quota, before } in told {
        // A new period begins at nothing, and what has evened out is nothing any more.
        let after = key.workspace().drift();
        let drifted = after - before;
        if drifted == 0 || after == 0 {
            continue;
        }
        let is_twin = |other: &&Told<'_>| {
            other.quota.is_twin(quota) && !std::ptr::eq(other.key.workspace(), key.workspace())
        };
        announce_drift(key, drifted, told.iter().find(is_twin).map(|twin| twin.key));
    }
}

async fn read(answer: Response<AnswerBody<Incoming>>, settings: Settings) -> Option<Observation> {
    let (head, body) = answer.into_parts();
    let (_, whole) = Peeked::read(body, ANSWER_BYTES_MAX, settings.answer_max).await;
    let encoding = head.headers.get("content-encoding").and_then(|value| value.to_str().ok());
    let text = decoded(&whole?, encoding, ANSWER_BYTES_MAX)?;
    match classify(head.status, Some(&ErrorBody::read(&text)), None) {
        Verdict::Served => Subscription::read(&text)
            .map(|subscription| Observation::Quota { quota: subscription.quota, tier: subscription.tier }),
        Verdict::InvalidKey => Some(Observation::Invalid),
        // A key for speech alone may not ask, and is as good as any.
        Verdict::MissingPermission => Some(Observation::Unreadable),
        Verdict::WorkspaceQuota(_)
        | Verdict::KeyQuota(_)
        | Verdict::PlanFeature
        | Verdict::Billing
        | Verdict::RateLimited(_)
        | Verdict::Concurrency { .. }
        | Verdict::Busy
        | Verdict::Unexplained(_)
        | Verdict::NotFound
        | Verdict::RequestError
        | Verdict::ServerError
        | Verdict::Unreadable => None,
    }
}
