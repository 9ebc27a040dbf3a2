//! Chooses the response to the client when no key is left to try: the provider's last response, or an error
//! of the proxy.

use super::RetryState;
use crate::clock;
use crate::policy::key_state::KeyState;
use crate::policy::replay::{ResponseSource, choose_response_source};
use crate::policy::select::Unavailable;
use crate::policy::verdict::Verdict;
use crate::proxy::error::ProxyError;
use crate::proxy::upstream_response::UpstreamResponse;

impl RetryState {
    /// Returns the provider's last response if it explains the failure best.
    ///
    /// # Errors
    ///
    /// Returns the proxy's own error if that error explains the failure better.
    pub(in crate::proxy) fn choose_last_response(
        &self,
        response: Box<UpstreamResponse>,
        unavailable: Unavailable,
    ) -> Result<Box<UpstreamResponse>, ProxyError> {
        // If the last key was refused as invalid or because of the cost, this refusal determines the error. A refusal
        // that concerns the request and not the account is relayed.
        let unavailable = match (response.verdict, unavailable) {
            (Verdict::WorkspaceQuota(_), _) if self.refusals.is_about_request() => return Ok(response),
            (Verdict::InvalidKey | Verdict::WrongHost, _) if self.refusals.is_repeated() => {
                return Ok(response);
            }
            (Verdict::InvalidKey | Verdict::WrongHost, Unavailable::Tried) => Unavailable::Invalid,
            (Verdict::WorkspaceQuota(shortfall), Unavailable::Tried) if shortfall.credits().is_some() => {
                self.exhausted_error()
            }
            (_, unavailable) => unavailable,
        };
        match choose_response_source(response.verdict, unavailable) {
            ResponseSource::Upstream => Ok(response),
            ResponseSource::Proxy => Err(self.unavailable_error(unavailable)),
        }
    }

    /// Returns the error for a request that no key can serve. If the request is pinned to an account, the
    /// error names the kind of resource that the account owns.
    pub(in crate::proxy) fn unavailable_error(&self, unavailable: Unavailable) -> ProxyError {
        match self.affinity.pinning_kind() {
            Some(kind) => ProxyError::OwnerUnavailable { kind, unavailable },
            None => ProxyError::Unavailable(unavailable),
        }
    }

    /// Returns the error for a request that costs more than each key has left. The error contains the earliest quota
    /// reset of all keys, and the largest number of credits that a usable key has left.
    fn exhausted_error(&self) -> Unavailable {
        let now = clock::now();
        let keys = || self.roster.keys().iter();
        let usable = keys().filter(|key| key.state(now) == KeyState::Usable);
        let max_remaining = usable.filter_map(|key| key.workspace().quota(now).spendable()).max();
        Unavailable::Exhausted {
            resets_at: keys().filter_map(|key| key.workspace().quota(now).resets_at).min(),
            left: max_remaining.filter(|&credits| credits > 0),
        }
    }
}
