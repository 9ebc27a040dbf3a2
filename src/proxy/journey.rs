//! What a request has met so far: the facts of its next decision.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;

use super::{Limits, Proxy};
use crate::body::replay::Replay;
use crate::clock;
use crate::policy::classify::{Concern, Verdict};
use crate::policy::client::Client;
use crate::policy::replay::{Effect, Facts, Progress};
use crate::policy::select::Unavailable;
use crate::pool::{Key, Lease, Roster};
use crate::telemetry::announce;

/// A request under way.
#[derive(Debug)]
pub(super) struct Journey {
    roster: Arc<Roster>,
    client: Arc<Client>,
    effect: Effect,
    attempts: u32,
    blameless_replays: u32,
    /// Positions of keys that were refused for this request.
    tried: Vec<usize>,
    /// Ambiguous verdicts, each with a key that got it.
    unclear: Vec<(Verdict, Arc<Key>)>,
}

impl<C> Proxy<C> {
    /// Reserves a key that this request has not tried, and tells the news that come with it.
    pub(super) fn reserve(&self, journey: &Journey) -> Result<Lease, Unavailable> {
        let may_use = |key: &Key| journey.may_use(key);
        let reserved = self.pool.reserve(&journey.roster, &journey.tried, may_use, clock::now())?;
        announce(&reserved.news);
        Ok(reserved.lease)
    }
}

impl Journey {
    pub(super) fn begin(roster: Arc<Roster>, client: Arc<Client>, effect: Effect) -> Self {
        Self {
            roster,
            client,
            effect,
            attempts: 0,
            blameless_replays: 0,
            tried: Vec::new(),
            unclear: Vec::new(),
        }
    }

    /// Whether its client may be served by `key`.
    pub(super) fn may_use(&self, key: &Key) -> bool {
        self.client.rules.pins.permit(key.name(), key.workspace().name())
    }

    /// Counts an attempt; returns its number, from 1.
    pub(super) fn next_attempt(&mut self) -> u32 {
        self.attempts += 1;
        self.attempts
    }

    pub(super) fn roster(&self) -> &Arc<Roster> {
        &self.roster
    }

    /// The facts after an attempt with `key` got so far.
    pub(super) fn facts(
        &mut self,
        progress: Progress,
        body: &Replay<Incoming>,
        key: &Arc<Key>,
        limits: &Limits,
    ) -> Facts {
        if let Progress::Answered(verdict) = progress
            && verdict.concern() == Concern::Unclear
        {
            self.unclear.push((verdict, Arc::clone(key)));
        }
        Facts {
            progress,
            effect: self.effect,
            body: body.holding(),
            // A long upload is not waiting: the span begins when the last of it has come.
            is_late: clock::since(body.arrived_at()) >= limits.replay_max,
            attempts: self.attempts,
            attempts_max: limits.attempts_max,
            blameless_replays: self.blameless_replays,
            ambiguous_workspaces: self.agreeing_workspaces(),
        }
    }

    /// What the unclear verdicts mean, each of its key, now that another key was served.
    pub(super) fn shown_by_contrast(&self) -> impl Iterator<Item = (&Key, Verdict)> {
        self.unclear.iter().filter_map(|(verdict, key)| Some((&**key, verdict.by_contrast()?)))
    }

    /// Workspaces that gave the last ambiguous verdict.
    fn agreeing_workspaces(&self) -> u32 {
        let Some((last, _)) = self.unclear.last() else { return 0 };
        let mut seen: Vec<&Key> = Vec::new();
        for (_, key) in self.unclear.iter().filter(|(verdict, _)| verdict == last) {
            if !seen.iter().any(|seen| std::ptr::eq(seen.workspace(), key.workspace())) {
                seen.push(key);
            }
        }
        u32::try_from(seen.len()).unwrap_or(u32::MAX)
    }

    /// This request does not ask with `key` again.
    pub(super) fn leave(&mut self, key: &Key) {
        self.tried.extend(self.roster.position_of(key));
    }

    /// A replay that is no key's fault: counted, and after a pause that differs from request to
    /// request, so that they do not come back all at once.
    pub(super) async fn pause(&mut self, pause: Duration) {
        self.blameless_replays += 1;
        let chance = RandomState::new().hash_one(self.attempts) % 1_000;
        tokio::time::sleep(pause + pause.mul_f64(chance as f64 / 1_000.0)).await;
    }
}
