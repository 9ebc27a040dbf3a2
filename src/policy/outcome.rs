//! Defines the outcomes of an attempt, each with a stable identifier for usage records, logs and metrics. A macro
//! generates the enum, the list of its variants and their identifiers from one table, so that all three stay
//! consistent.

macro_rules! outcomes {
    ($($name:ident $identifier:literal $description:literal)+) => {
        /// The outcome of an attempt: the provider's response, or the reason why the attempt or session ended.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Outcome {
            $(#[doc = $description] $name,)+
        }

        impl Outcome {
            /// All outcomes, in the order of their numbers.
            pub const ALL: &[Self] = &[$(Self::$name,)+];

            /// Returns the identifier in usage records, logs and metrics.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$name => $identifier,)+
                }
            }
        }
    };
}

#[rustfmt::skip] // Each row stays on one line.
outcomes! {
    Served "served" "The request was served."
    WorkspaceQuota "workspace_quota" "The provider refused the request: the workspace has too few credits left."
    KeyQuota "key_quota" "The provider refused the request: the key's own quota is used up."
    InvalidKey "invalid_key" "The provider refused the request, because it does not know the key."
    WrongHost "wrong_host" "The provider refused the request: the key belongs to another region."
    MissingPermission "missing_permission" "The provider refused the request: the key lacks a permission."
    PlanFeature "plan_feature" "The provider refused the request: the workspace's plan lacks a feature."
    Slots "slots" "The provider refused the request: the workspace has no free slot for another voice or resource."
    Billing "billing" "The provider refused the request: the workspace has an unpaid bill or is locked."
    Abuse "abuse" "The provider refused the request: the workspace is suspected of abuse."
    RateLimited "rate_limited" "The provider refused the request: it received too many requests in a span of time."
    Concurrency "concurrency" "The provider refused the request: the workspace has too many concurrent requests."
    Busy "busy" "The provider refused the request, because it is overloaded or in maintenance."
    Unauthorized "unauthorized" "The provider sent a 401 response without a known reason."
    PaymentRequired "payment_required" "The provider sent a 402 response without a known reason."
    Forbidden "forbidden" "The provider sent a 403 response without a known reason."
    TooManyRequests "too_many_requests" "The provider sent a 429 response without a known reason."
    Unexplained "unexplained" "The provider sent a refusal without a body, for example to a `HEAD` request."
    NotFound "not_found" "The named resource is not in the workspace."
    RequestError "request_error" "The request is invalid with every key."
    ServerError "server_error" "The provider failed."
    Unreadable "unreadable" "The body of a refusal could not be read."
    ConnectFailed "connect_failed" "The connection failed, and no byte was sent."
    ProxyAuthenticationFailed "proxy_authentication_failed" "The forward proxy refused Keychoir's credentials."
    NoResponse "no_response" "At least one byte was sent, and no response was received, or a session served nothing."
    UpstreamReset "upstream_reset" "The connection to the provider failed during a response or session."
    UpstreamProtocolError "upstream_protocol_error" "The provider violated the WebSocket protocol."
    ClientClosed "client_closed" "The client disconnected."
    ProtocolError "protocol_error" "The client violated the WebSocket protocol."
    MessageTooLarge "message_too_large" "The client sent a WebSocket message that is too large."
    ClientQuotaExceeded "client_quota_exceeded" "The client's quota was used up during a session."
    UserQuotaExceeded "user_quota_exceeded" "The user's quota was used up during a session."
    BuffersFull "buffers_full" "The buffer budget was used up during a session."
    Idle "idle" "The idle timeout of a session expired."
    MaxDuration "max_duration" "A session reached its maximum duration."
    Shutdown "shutdown" "Keychoir shut down."
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_are_listed_in_order_and_have_distinct_identifiers() {
        for (index, outcome) in Outcome::ALL.iter().enumerate() {
            assert_eq!(*outcome as usize, index);
            let same = Outcome::ALL.iter().filter(|other| other.as_str() == outcome.as_str());
            assert_eq!(same.count(), 1, "the identifier {} must be unique", outcome.as_str());
        }
    }
}
