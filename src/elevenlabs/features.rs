//! Determines the features of a request that a plan, a workspace or a key may lack. A refusal proves that the account
//! lacks the narrowest feature that the refusal names. The pool sends later requests with that feature to other
//! accounts first.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::affinity::IdentifierHash;
use super::endpoint::Route;
use super::models::Models;
use crate::policy::permission::Permission;
use crate::policy::replay::Effect;
use crate::policy::verdict::{Subject, UnexplainedRefusal, Verdict};

/// The properties of a request for which plans and permissions may differ. An optional property is `None` if the
/// request does not have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestFeatures {
    /// The route of the request.
    pub route: Route,
    /// Whether the request changes or generates something.
    pub effect: Effect,
    /// The hash of the voice that the path or the body names.
    pub voice: Option<IdentifierHash>,
    /// The model that the body names.
    pub model: Option<Arc<str>>,
    /// The output format that the query names.
    pub output_format: Option<Arc<str>>,
    /// The number of characters of the text that the body contains.
    pub characters: Option<u64>,
    /// The permission that the key needs, if it is known.
    pub permission: Option<Permission>,
    /// Whether the request creates a voice that takes a slot of its workspace.
    pub adds_voice: bool,
}

/// A feature that a plan, a workspace or a key may lack.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Feature {
    /// A voice, by its hash.
    Voice(IdentifierHash),
    /// A model, by the provider's name.
    Model(Arc<str>),
    /// An output format.
    OutputFormat(Arc<str>),
    /// The length of a text with a model, or `None` if the request names no model. [`Limit`] contains the number of
    /// characters.
    TextLength(Option<Arc<str>>),
    /// A permission of a key.
    Permission(Permission),
    /// An endpoint, separately for requests with and without an effect.
    Endpoint {
        /// The route of the endpoint.
        route: Route,
        /// Whether the request changes or generates something.
        has_effect: bool,
    },
    /// All properties of the request, if the refusal names no feature, or a feature that the request does not have.
    SimilarRequest(Box<RequestShape>),
}

/// The properties in which requests must be equal to count as similar.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RequestShape {
    route: Route,
    has_effect: bool,
    voice: Option<IdentifierHash>,
    model: Option<Arc<str>>,
    output_format: Option<Arc<str>>,
}

/// A feature that an account lacks, and the smallest refused size if the feature has a size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limit {
    /// The feature that the account lacks.
    pub feature: Feature,
    /// The smallest refused number of characters, or 0 for a feature without a size.
    pub from_characters: u64,
}

/// The kind of restriction that a refusal causes, which determines its scope and duration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RestrictionKind {
    /// Restricts the key, because it lacks a permission, which may be granted later.
    Permission,
    /// Restricts the workspace, and other workspaces with the same plan.
    Plan,
    /// Restricts the workspace until a slot becomes free.
    Slots,
    /// Restricts the workspace, because it may not use the endpoint, or because a refusal of the endpoint has no known
    /// reason.
    Endpoint,
    /// Restricts the workspace after a refusal about its key, credits, bill or suspected abuse, until a poll or another
    /// request shows whether the refusal is permanent.
    Unproven,
    /// Restricts the workspace because of a rate limit, with the time that the provider reported. A request with a
    /// concurrency group causes no such restriction: its rate limit changes the state of the workspace.
    RateLimit(Option<Duration>),
    /// Restricts the workspace because of a 429 response with an unknown message, with the time that the
    /// provider reported.
    Throttle(Option<Duration>),
    /// Restricts the workspace because of too many concurrent requests. A request with a concurrency group causes no
    /// such restriction: its refusal changes the state of the workspace.
    Concurrency,
}

impl RequestFeatures {
    /// Returns the limit that a refusal of this request proves, and the kind of restriction that the refusal
    /// causes. Returns `None` for a verdict that proves no limit of an account.
    #[must_use]
    pub fn proven_limit(&self, verdict: Verdict) -> Option<(Limit, RestrictionKind)> {
        let (subject, kind) = match verdict {
            Verdict::MissingPermission(reported) => {
                let needed =
                    self.permission.filter(|needed| reported.is_none_or(|reported| reported == *needed));
                if let Some(needed) = needed {
                    let limit = Limit { feature: Feature::Permission(needed), from_characters: 0 };
                    return Some((limit, RestrictionKind::Permission));
                }
                (Subject::Endpoint, RestrictionKind::Permission)
            }
            Verdict::PlanFeature(Subject::Endpoint) => (Subject::Endpoint, RestrictionKind::Endpoint),
            Verdict::PlanFeature(subject) => (subject, RestrictionKind::Plan),
            Verdict::Slots => (Subject::Endpoint, RestrictionKind::Slots),
            Verdict::RateLimited(duration) => (Subject::Endpoint, RestrictionKind::RateLimit(duration)),
            Verdict::Concurrency { .. } => (Subject::Endpoint, RestrictionKind::Concurrency),
            Verdict::Unexplained(UnexplainedRefusal::TooMany(duration)) => {
                (Subject::Endpoint, RestrictionKind::Throttle(duration))
            }
            Verdict::Unexplained(_) => (Subject::Endpoint, RestrictionKind::Endpoint),
            Verdict::InvalidKey | Verdict::WrongHost => (Subject::Endpoint, RestrictionKind::Unproven),
            Verdict::WorkspaceQuota(_) | Verdict::Billing | Verdict::Abuse => {
                (Subject::Unnamed, RestrictionKind::Unproven)
            }
            Verdict::Served
            | Verdict::KeyQuota(_)
            | Verdict::Busy
            | Verdict::NotFound
            | Verdict::RequestError
            | Verdict::ServerError
            | Verdict::Unreadable => return None,
        };
        Some((self.limit_of_subject(subject), kind))
    }

    /// Returns the limit of the feature that the subject of a refusal names. If this request does not have the feature,
    /// returns the limit of similar requests.
    fn limit_of_subject(&self, subject: Subject) -> Limit {
        let feature = self.feature_of_subject(subject).unwrap_or_else(|| self.similar_request_feature());
        let characters = self.characters.filter(|_| matches!(feature, Feature::TextLength(_)));
        Limit { feature, from_characters: characters.unwrap_or(0) }
    }

    /// Returns the feature of this request that `subject` names, or `None` if the request does not have it.
    fn feature_of_subject(&self, subject: Subject) -> Option<Feature> {
        match subject {
            Subject::Voice => self.voice.map(Feature::Voice),
            Subject::Model => self.model.clone().map(Feature::Model),
            Subject::OutputFormat => self.output_format.clone().map(Feature::OutputFormat),
            Subject::TextLength => self.characters.map(|_| Feature::TextLength(self.model.clone())),
            Subject::Cloning | Subject::Endpoint => Some(self.endpoint_feature()),
            Subject::Unnamed => None,
        }
    }

    /// Whether plans are known to differ in a feature of this request, before any refusal.
    #[must_use]
    pub fn may_be_limited_by_plan(&self, models: &Models) -> bool {
        self.output_format.is_some() || self.adds_voice || self.exceeds_free_text_length(models)
    }

    /// Whether the text is longer than a free account may send with this model.
    pub(super) fn exceeds_free_text_length(&self, models: &Models) -> bool {
        let maximum = self.model.as_deref().and_then(|model| models.max_free_characters(model));
        self.characters.zip(maximum).is_some_and(|(characters, maximum)| characters > maximum)
    }

    /// Returns an iterator over all features of this request that an earlier refusal may have limited.
    pub fn all_features(&self) -> impl Iterator<Item = Feature> {
        [Subject::Voice, Subject::Model, Subject::OutputFormat, Subject::TextLength]
            .into_iter()
            .filter_map(|subject| self.feature_of_subject(subject))
            .chain(self.permission.map(Feature::Permission))
            .chain([self.endpoint_feature(), self.similar_request_feature()])
    }

    fn endpoint_feature(&self) -> Feature {
        Feature::Endpoint { route: self.route, has_effect: self.effect == Effect::Some }
    }

    fn similar_request_feature(&self) -> Feature {
        Feature::SimilarRequest(Box::new(RequestShape {
            route: self.route,
            has_effect: self.effect == Effect::Some,
            voice: self.voice,
            model: self.model.clone(),
            output_format: self.output_format.clone(),
        }))
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.feature {
            Feature::Voice(_) => f.write_str("a requested voice"),
            Feature::Model(model) => write!(f, "model {model}"),
            Feature::OutputFormat(format) => write!(f, "output format {format}"),
            Feature::TextLength(model) => {
                write!(f, "texts of {} characters and more", self.from_characters)?;
                model.as_ref().map_or(Ok(()), |model| write!(f, " with model {model}"))
            }
            Feature::Permission(permission) => write!(f, "the permission {}", permission.name()),
            Feature::Endpoint { route, has_effect } => {
                write!(f, "{} {route}", if *has_effect { "calls of" } else { "reads of" })
            }
            Feature::SimilarRequest(shape) => {
                write!(f, "some requests of {}", shape.route)?;
                let format = shape.output_format.as_ref();
                format.map_or(Ok(()), |format| write!(f, " as {format}"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elevenlabs::affinity::{Identifier, ResourceKind};
    use crate::policy::verdict::Shortfall;

    /// Returns the features of a request for speech that has every feature except a voice to add.
    fn speech() -> RequestFeatures {
        RequestFeatures {
            route: Route::parse("/v1/text-to-speech/x"),
            effect: Effect::Some,
            voice: Some(Identifier::new(ResourceKind::Voice, "v1").hash),
            model: Some("eleven_v3".into()),
            output_format: Some("pcm_44100".into()),
            characters: Some(900),
            permission: Permission::parse("text_to_speech"),
            adds_voice: false,
        }
    }

    /// Compares the text of the limit that a refusal proves with the expected text.
    #[track_caller]
    fn check_limit(features: &RequestFeatures, verdict: Verdict, expected: &str) {
        let (limit, _) = features.proven_limit(verdict).unwrap();
        assert_eq!(limit.to_string(), expected);
    }

    #[test]
    fn a_refusal_limits_the_narrowest_feature_that_it_names() {
        let plan_feature = Verdict::PlanFeature;
        for (subject, expected) in [
            (Subject::Voice, "a requested voice"),
            (Subject::Model, "model eleven_v3"),
            (Subject::OutputFormat, "output format pcm_44100"),
            (Subject::TextLength, "texts of 900 characters and more with model eleven_v3"),
            (Subject::Endpoint, "calls of /v1/text-to-speech/{id}"),
            (Subject::Unnamed, "some requests of /v1/text-to-speech/{id} as pcm_44100"),
        ] {
            check_limit(&speech(), plan_feature(subject), expected);
        }
        let without_features =
            RequestFeatures { voice: None, model: None, output_format: None, characters: None, ..speech() };
        for subject in [Subject::Voice, Subject::Model, Subject::OutputFormat, Subject::TextLength] {
            check_limit(&without_features, plan_feature(subject), "some requests of /v1/text-to-speech/{id}");
        }
        check_limit(&without_features, Verdict::Slots, "calls of /v1/text-to-speech/{id}");
        check_limit(
            &without_features,
            Verdict::Unexplained(UnexplainedRefusal::Forbidden),
            "calls of /v1/text-to-speech/{id}",
        );
    }

    #[test]
    fn a_missing_permission_is_a_limit_if_the_request_is_known_to_need_it() {
        let missing = |name: Option<&str>| Verdict::MissingPermission(name.and_then(Permission::parse));
        check_limit(&speech(), missing(None), "the permission text_to_speech");
        check_limit(&speech(), missing(Some("text_to_speech")), "the permission text_to_speech");
        check_limit(&speech(), missing(Some("voices_read")), "calls of /v1/text-to-speech/{id}");
        let without_permission = RequestFeatures { permission: None, ..speech() };
        check_limit(&without_permission, missing(Some("voices_read")), "calls of /v1/text-to-speech/{id}");
    }

    #[test]
    fn a_verdict_that_concerns_no_feature_proves_no_limit() {
        for verdict in [
            Verdict::Served,
            Verdict::KeyQuota(Shortfall::default()),
            Verdict::RequestError,
            Verdict::NotFound,
        ] {
            assert_eq!(speech().proven_limit(verdict), None, "{verdict:?} must prove no limit");
        }
    }

    #[test]
    fn a_limited_feature_is_among_the_features_of_a_similar_request() {
        for subject in [
            Subject::Voice,
            Subject::Model,
            Subject::OutputFormat,
            Subject::TextLength,
            Subject::Cloning,
            Subject::Endpoint,
            Subject::Unnamed,
        ] {
            let (limit, _) = speech().proven_limit(Verdict::PlanFeature(subject)).unwrap();
            assert!(
                speech().all_features().any(|feature| feature == limit.feature),
                "the limit of {subject:?} must be a feature of the same request"
            );
        }
        let with_other_voice =
            RequestFeatures { voice: Some(Identifier::new(ResourceKind::Voice, "v2").hash), ..speech() };
        let (unnamed, _) = speech().proven_limit(Verdict::PlanFeature(Subject::Unnamed)).unwrap();
        assert!(
            !with_other_voice.all_features().any(|feature| feature == unnamed.feature),
            "a request for another voice must not be similar"
        );
    }
}
