//! Updates the state of keys in the pool after the verdict of an attempt, and logs the changes.

use std::sync::Arc;

use super::{Attempt, KeySource};
use crate::elevenlabs::endpoint::Metering;
use crate::policy::evidence::RefusalSource;
use crate::policy::units::UnixMs;
use crate::policy::verdict::Verdict;
use crate::pool::{Key, Roster, ServedAttempt};
use crate::proxy::refusals::Conclusions;
use crate::proxy::retry_state::RetryState;
use crate::telemetry::{log_restriction, log_transitions};

impl Attempt {
    /// Updates the state of the key in the pool. A success also updates the keys that refused the request
    /// earlier.
    pub(super) fn update_key_state(
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
            let served = ServedAttempt {
                request: Some(&retry.key_request),
                began_at: lease.reserved_at(),
                is_charged,
            };
            let transitions = pool.record_service(roster, key, served, now);
            let mut conclusions = retry.record_success(pool, key);
            conclusions.transitions.splice(0..0, transitions);
            conclusions
        } else {
            let mut key_request = retry.key_request.clone();
            // A session that is refused before it generates speech is refused for the concurrency group of
            // that speech.
            key_request.group = key_request.group.or(self.speech_group);
            let source = self.refusal_source(roster, message, verdict);
            retry.record_refusal(pool, key, verdict, &key_request, source)
        };
        self.log_and_store_conclusions(key, &conclusions);
    }

    /// Logs the conclusions from a response. When the usage record of the attempt is written, the state of `key`'s
    /// workspace is written as well. If the state of another workspace has changed, this function requests that it is
    /// written.
    fn log_and_store_conclusions(&self, key: &Key, conclusions: &Conclusions) {
        let is_other = |changed: &Arc<Key>| !std::ptr::eq(changed.workspace(), key.workspace());
        let transitions = conclusions.transitions.iter().map(|transition| &transition.key);
        if let Some(permit) = &self.usage_permit
            && transitions.chain(&conclusions.evidence_changes).any(is_other)
        {
            permit.request_key_state_write();
        }
        log_transitions(&conclusions.transitions);
        for (key, restriction) in &conclusions.restricted {
            log_restriction(key, restriction);
        }
    }

    /// Describes a refusal for the key's history. The provider's message may repeat a key, so it is redacted.
    fn refusal_source(&self, roster: &Roster, message: Option<&str>, verdict: Verdict) -> RefusalSource {
        let message = message.unwrap_or(verdict.as_str()).as_bytes();
        let redacted = roster.redactor().redact(message);
        RefusalSource {
            status: self.record.status,
            message: String::from_utf8_lossy(redacted.as_deref().unwrap_or(message)).into(),
            route: self.record.route.to_string().into(),
            request_id: Arc::clone(&self.record.request_id),
        }
    }
}
