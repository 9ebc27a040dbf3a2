//! What a client gets when no key is left to try: the last response of the provider, or an error of the
//! proxy.

use super::RetryState;
use crate::clock;
use crate::policy::key_state::KeyState;
use crate::policy::replay::{LastWord, last_word};
use crate::policy::select::Unavailable;
use crate::policy::verdict::Verdict;
use crate::proxy::error::ProxyError;
use crate::proxy::upstream_response::UpstreamResponse;

impl RetryState {
    /// Chooses between the last response and an error of the proxy when no key is left to try.
    ///
    /// # Errors
    ///
    /// The error of the proxy.
    pub(in crate::proxy) fn last_response(
        &self,
        response: Box<UpstreamResponse>,
        unavailable: Unavailable,
    ) -> Result<Box<UpstreamResponse>, ProxyError> {
        // Every key was tried, and the last one was refused as invalid, or for the cost.
        let unavailable = match (response.verdict, unavailable) {
            (Verdict::WorkspaceQuota(_), _) if self.is_refused_itself() => return Ok(response),
            (Verdict::InvalidKey | Verdict::WrongHost, _) if self.is_refused_repeatedly() => {
                return Ok(response);
            }
            (Verdict::InvalidKey | Verdict::WrongHost, Unavailable::Tried) => Unavailable::Invalid,
            (Verdict::WorkspaceQuota(shortfall), Unavailable::Tried) if shortfall.figures().is_some() => {
                self.exhausted()
            }
            (_, unavailable) => unavailable,
        };
        match last_word(response.verdict, unavailable) {
            LastWord::Theirs => Ok(response),
            LastWord::Ours => Err(self.refusal(unavailable)),
        }
    }

    /// The error for a request that no key can serve: it names the kind of the owned resource, if
    /// the request is pinned to an account.
    pub(in crate::proxy) fn refusal(&self, unavailable: Unavailable) -> ProxyError {
        match self.affinity.pinned_by() {
            Some(kind) => ProxyError::OwnerUnavailable { kind, unavailable },
            None => ProxyError::Unavailable(unavailable),
        }
    }

    /// The error when no account has the credits: the earliest quota reset and the most credits
    /// left.
    fn exhausted(&self) -> Unavailable {
        let now = clock::now();
        let keys = || self.roster.keys().iter();
        let usable = keys().filter(|key| key.state(now) == KeyState::Usable);
        let left = usable.filter_map(|key| key.workspace().quota(now).spendable()).max();
        Unavailable::Exhausted {
            resets_at: keys().filter_map(|key| key.workspace().quota(now).resets_at).min(),
            left: left.filter(|&credits| credits > 0),
        }
    }
}
