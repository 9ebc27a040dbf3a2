//! A key: what opens a workspace. What is known of it, in atomics.

use std::fmt;
use std::sync::Arc;

use super::belonging::Belonging;
use super::cells::{Announced, LacksCell, ParkCell, ToldCell};
use super::roster::KeyEntry;
use super::sync::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use super::workspace::Workspace;
use crate::policy::authority::Authority;
use crate::policy::budget::Quota;
use crate::policy::standing::{Change, Park, ParkReason, Standing};
use crate::policy::units::UnixMs;
use crate::secret::ApiKey;

/// A key: what opens a workspace.
///
/// Keys that different cores touch must not share a cache line, hence the alignment (two lines,
/// because processors fetch them in pairs).
#[repr(align(128))]
pub struct Key {
    /// In the latest roster, for people.
    position: AtomicUsize,
    api_key: ApiKey,
    name: Option<String>,
    workspace: Arc<Workspace>,
    authority: Option<Arc<Authority>>,
    weight: u32,
    kept_credits: u64,
    park: ParkCell,
    /// What is left of its own cap, when the provider said so.
    told: ToldCell,
    lacks: LacksCell,
    in_flight: AtomicU32,
    /// Whether it was refused as a key, and the provider has not told since whether it is one.
    is_doubted: AtomicBool,
    /// When its next turn is; see [`Traits`](crate::policy::strategy::Traits).
    turn: AtomicU64,
    announced: Announced,
}

impl Key {
    pub(super) fn new(position: usize, entry: KeyEntry, workspace: Arc<Workspace>) -> Self {
        workspace.quiet().disturb();
        Self {
            position: AtomicUsize::new(position),
            api_key: entry.key,
            name: entry.name,
            workspace,
            authority: entry.authority,
            weight: entry.weight.max(1),
            kept_credits: entry.kept_credits,
            park: ParkCell::default(),
            told: ToldCell::default(),
            lacks: LacksCell::default(),
            in_flight: AtomicU32::new(0),
            is_doubted: AtomicBool::new(false),
            turn: AtomicU64::new(0),
            announced: Announced::default(),
        }
    }

    /// Whether it is what `entry` asks for.
    pub(super) fn is(&self, entry: &KeyEntry, belonging: &Belonging) -> bool {
        self.name == entry.name
            && self.authority == entry.authority
            && self.weight == entry.weight.max(1)
            && self.kept_credits == entry.kept_credits
            && self.workspace.belonging().is_same(belonging)
            && belonging.name().is_none_or(|name| self.workspace.belonging().name() == Some(name))
    }

    /// Its place in the pool, from 0; the last one when it is in the pool no more.
    #[must_use]
    pub fn position(&self) -> usize {
        self.position.load(Ordering::Acquire)
    }

    pub(super) fn place(&self, position: usize) {
        self.position.store(position, Ordering::Release);
    }

    /// The secret.
    #[must_use]
    pub fn api_key(&self) -> &ApiKey {
        &self.api_key
    }

    /// What people call it, if they gave it a name.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// Where it works, if not where all do.
    #[must_use]
    pub fn authority(&self) -> Option<&Arc<Authority>> {
        self.authority.as_ref()
    }

    /// Where it belongs.
    #[must_use]
    pub fn workspace(&self) -> &Workspace {
        &self.workspace
    }

    pub(super) fn workspace_arc(&self) -> &Arc<Workspace> {
        &self.workspace
    }

    /// Requests that hold a lease on it now.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Acquire)
    }

    /// How it stands at `now`.
    #[must_use]
    pub fn standing(&self, now: UnixMs) -> Standing {
        self.standing_with(&self.workspace.quota(now), now)
    }

    /// The same, when its workspace's quota is at hand.
    pub(super) fn standing_with(&self, quota: &Quota, now: UnixMs) -> Standing {
        let workspace = &self.workspace;
        Standing::of(self.park.load(), workspace.parked(), workspace.short_until(), quota, now)
    }

    /// Its own park, whether it still holds or not.
    #[must_use]
    pub fn parked(&self) -> Option<Park> {
        self.park.load()
    }

    pub(super) fn park(&self, park: Park) {
        self.park.join(park);
        self.workspace.quiet().disturb();
    }

    pub(super) fn weight(&self) -> u32 {
        self.weight
    }

    pub(super) fn kept_credits(&self) -> u64 {
        self.kept_credits
    }

    pub(super) fn told(&self) -> &ToldCell {
        &self.told
    }

    pub(super) fn lacks(&self) -> &LacksCell {
        &self.lacks
    }

    pub(super) fn turn(&self) -> &AtomicU64 {
        &self.turn
    }

    /// Whether it was refused as a key, and the provider has not told since whether it is one.
    #[must_use]
    pub fn is_doubted(&self) -> bool {
        self.is_doubted.load(Ordering::Acquire)
    }

    /// It was refused as a key. Comes after its park: whoever sees the doubt may end that.
    pub(super) fn doubt(&self) {
        self.is_doubted.store(true, Ordering::Release);
    }

    /// The provider does not know the key; no question is open any more.
    pub(super) fn give_up(&self) {
        self.is_doubted.store(false, Ordering::Release);
    }

    /// The provider knows the key.
    pub(super) fn accept(&self) {
        self.is_doubted.store(false, Ordering::Release);
        self.park.pardon(ParkReason::Invalid);
        self.workspace.quiet().disturb();
    }

    /// The next moment at which it may stand in another way, if nothing happens.
    pub(super) fn next_change(&self, now: UnixMs) -> Option<UnixMs> {
        self.park.load().filter(|park| park.holds(now)).map(|park| park.until)
    }

    pub(super) fn announce(&self, standing: Standing, quota: Quota, is_near: bool) -> Option<Change> {
        self.announced.update(standing, quota, is_near)
    }

    pub(super) fn enter(&self) {
        self.in_flight.fetch_add(1, Ordering::AcqRel);
        self.workspace.enter();
    }

    pub(super) fn leave(&self) {
        self.in_flight.fetch_sub(1, Ordering::AcqRel);
        self.workspace.leave();
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({} {})", self.position(), self.api_key.short())
    }
}
