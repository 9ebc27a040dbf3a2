//! The features of a request that a plan may refuse. A refusal proves a limit of the narrowest feature
//! that its words name; later requests with this feature first try accounts that have not refused it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::affinity::Tag;
use super::endpoint::Route;
use super::models::Models;
use crate::policy::permission::Permission;
use crate::policy::replay::Effect;
use crate::policy::verdict::{Refusal, Subject, Verdict};

/// The properties of a request for which plans and permissions may differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestFeatures {
    /// The route of the request.
    pub route: Route,
    /// Whether it changes anything.
    pub effect: Effect,
    /// The voice that its path or body names, as a hash.
    pub voice: Option<Tag>,
    /// The model that its body names.
    pub model: Option<Arc<str>>,
    /// The output format that its query names.
    pub output_format: Option<Arc<str>>,
    /// Number of characters of its text.
    pub characters: Option<u64>,
    /// The permission that the key needs, where it is known.
    pub permission: Option<Permission>,
    /// Whether it creates a voice that takes a slot of its workspace.
    pub adds_voice: bool,
}

/// A feature that a plan, a workspace or a key may lack.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Feature {
    /// A voice, by its hash.
    Voice(Tag),
    /// A model, by the provider's name.
    Model(Arc<str>),
    /// An output format.
    OutputFormat(Arc<str>),
    /// The length of a text with a model; [`Limit`] has the number of characters.
    TextLength(Option<Arc<str>>),
    /// A permission of a key.
    Permission(Permission),
    /// An endpoint; `true` for requests that change something.
    Endpoint(Route, bool),
    /// A request of exactly this kind, when the refusal names nothing narrower.
    Alike(Box<Signature>),
}

/// The properties by which two requests count as alike after a refusal whose words name no feature.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Signature {
    route: Route,
    has_effect: bool,
    voice: Option<Tag>,
    model: Option<Arc<str>>,
    output_format: Option<Arc<str>>,
}

/// A limited feature, and the smallest limited size if it has a size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limit {
    /// The limited feature.
    pub feature: Feature,
    /// The smallest limited number of characters; 0 for a feature without a size.
    pub from_characters: u64,
}

/// The scope and the duration for which a limit is recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remembered {
    /// For the key, as a permission that may be granted.
    Permission,
    /// For the workspace, and for others with its plan.
    Plan,
    /// For the workspace, until a slot becomes free.
    Slots,
    /// For the workspace, as an endpoint that refuses it.
    Endpoint,
    /// For the workspace, until a poll or another request decides.
    Unproven,
    /// For the workspace, as a rate limit with the named time. A rate limit of a concurrency group is
    /// evidence about the workspace instead.
    RateLimit(Option<Duration>),
    /// For the workspace, as a 429 in unknown words, with the named time.
    Throttle(Option<Duration>),
    /// For the workspace, as too many concurrent requests, unless they are of a concurrency group.
    Concurrency,
}

impl RequestFeatures {
    /// The limit that a refusal of this request proves, and how it is recorded. `None` for a verdict that
    /// is not about the capabilities of an account.
    #[must_use]
    pub fn refused(&self, verdict: Verdict) -> Option<(Limit, Remembered)> {
        let (subject, remembered) = match verdict {
            Verdict::MissingPermission(named) => {
                let needed = self.permission.filter(|needed| named.is_none_or(|named| named == *needed));
                if let Some(needed) = needed {
                    let limit = Limit { feature: Feature::Permission(needed), from_characters: 0 };
                    return Some((limit, Remembered::Permission));
                }
                (Subject::Endpoint, Remembered::Permission)
            }
            Verdict::PlanFeature(Subject::Endpoint) => (Subject::Endpoint, Remembered::Endpoint),
            Verdict::PlanFeature(subject) => (subject, Remembered::Plan),
            Verdict::Slots => (Subject::Endpoint, Remembered::Slots),
            Verdict::RateLimited(span) => (Subject::Endpoint, Remembered::RateLimit(span)),
            Verdict::Concurrency { .. } => (Subject::Endpoint, Remembered::Concurrency),
            Verdict::Unexplained(Refusal::TooMany(span)) => (Subject::Endpoint, Remembered::Throttle(span)),
            Verdict::Unexplained(_) => (Subject::Endpoint, Remembered::Endpoint),
            Verdict::InvalidKey | Verdict::WrongHost => (Subject::Endpoint, Remembered::Unproven),
            Verdict::WorkspaceQuota(_) | Verdict::Billing | Verdict::Abuse => {
                (Subject::Unnamed, Remembered::Unproven)
            }
            Verdict::Served
            | Verdict::KeyQuota(_)
            | Verdict::Busy
            | Verdict::NotFound
            | Verdict::RequestError
            | Verdict::ServerError
            | Verdict::Unreadable => return None,
        };
        Some((self.limit(subject), remembered))
    }

    /// The narrowest feature of this request that a plan's refusal names.
    fn limit(&self, subject: Subject) -> Limit {
        let without_size = |feature| Limit { feature, from_characters: 0 };
        match (subject, self.voice, &self.model, &self.output_format, self.characters) {
            (Subject::Voice, Some(voice), ..) => without_size(Feature::Voice(voice)),
            (Subject::Model, _, Some(model), ..) => without_size(Feature::Model(Arc::clone(model))),
            (Subject::OutputFormat, _, _, Some(format), _) => {
                without_size(Feature::OutputFormat(Arc::clone(format)))
            }
            (Subject::TextLength, _, model, _, Some(characters)) => {
                Limit { feature: Feature::TextLength(model.clone()), from_characters: characters }
            }
            (Subject::Cloning | Subject::Endpoint, ..) => without_size(self.endpoint()),
            // The request has no known value for the named subject.
            (
                Subject::Voice
                | Subject::Model
                | Subject::OutputFormat
                | Subject::TextLength
                | Subject::Unnamed,
                ..,
            ) => without_size(self.alike()),
        }
    }

    /// Whether plans are known to differ in a feature of this request, before any refusal.
    #[must_use]
    pub fn may_be_limited(&self, models: &Models) -> bool {
        let is_long = || {
            let max = models.free_characters_max(self.model.as_deref()?)?;
            Some(self.characters? > max)
        };
        self.output_format.is_some() || self.adds_voice || is_long() == Some(true)
    }

    /// All features of this request that an earlier refusal may have limited.
    pub fn all(&self) -> impl Iterator<Item = Feature> {
        let voice = self.voice.map(Feature::Voice);
        let model = self.model.clone().map(Feature::Model);
        let format = self.output_format.clone().map(Feature::OutputFormat);
        let length = self.characters.map(|_| Feature::TextLength(self.model.clone()));
        let permission = self.permission.map(Feature::Permission);
        let rest = [self.endpoint(), self.alike()];
        voice.into_iter().chain(model).chain(format).chain(length).chain(permission).chain(rest)
    }

    fn endpoint(&self) -> Feature {
        Feature::Endpoint(self.route, self.effect == Effect::Some)
    }

    fn alike(&self) -> Feature {
        Feature::Alike(Box::new(Signature {
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
            Feature::Endpoint(route, has_effect) => {
                write!(f, "{} {route}", if *has_effect { "calls of" } else { "reads of" })
            }
            Feature::Alike(signature) => {
                write!(f, "some requests of {}", signature.route)?;
                let format = signature.output_format.as_ref();
                format.map_or(Ok(()), |format| write!(f, " as {format}"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elevenlabs::affinity::{Kind, Named};
    use crate::policy::verdict::Shortfall;

    fn speech() -> RequestFeatures {
        RequestFeatures {
            route: Route::read("/v1/text-to-speech/x"),
            effect: Effect::Some,
            voice: Some(Named::new(Kind::Voice, "v1").tag),
            model: Some("eleven_v3".into()),
            output_format: Some("pcm_44100".into()),
            characters: Some(900),
            permission: Permission::parse("text_to_speech"),
            adds_voice: false,
        }
    }

    #[track_caller]
    fn check(features: &RequestFeatures, verdict: Verdict, expected: &str) {
        assert_eq!(features.refused(verdict).unwrap().0.to_string(), expected);
    }

    #[test]
    fn a_refusal_is_about_the_narrowest_feature_it_names() {
        let plan = Verdict::PlanFeature;
        for (subject, expected) in [
            (Subject::Voice, "a requested voice"),
            (Subject::Model, "model eleven_v3"),
            (Subject::OutputFormat, "output format pcm_44100"),
            (Subject::TextLength, "texts of 900 characters and more with model eleven_v3"),
            (Subject::Endpoint, "calls of /v1/text-to-speech/{id}"),
            (Subject::Unnamed, "some requests of /v1/text-to-speech/{id} as pcm_44100"),
        ] {
            check(&speech(), plan(subject), expected);
        }
        let bare =
            RequestFeatures { voice: None, model: None, output_format: None, characters: None, ..speech() };
        for subject in [Subject::Voice, Subject::Model, Subject::OutputFormat, Subject::TextLength] {
            check(&bare, plan(subject), "some requests of /v1/text-to-speech/{id}");
        }
        check(&bare, Verdict::Slots, "calls of /v1/text-to-speech/{id}");
        check(&bare, Verdict::Unexplained(Refusal::Forbidden), "calls of /v1/text-to-speech/{id}");
    }

    #[test]
    fn a_missing_permission_is_recorded_by_name_where_requests_are_known_to_need_it() {
        let missing = |name: Option<&str>| Verdict::MissingPermission(name.and_then(Permission::parse));
        check(&speech(), missing(None), "the permission text_to_speech");
        check(&speech(), missing(Some("text_to_speech")), "the permission text_to_speech");
        check(&speech(), missing(Some("voices_read")), "calls of /v1/text-to-speech/{id}");
        let unknown = RequestFeatures { permission: None, ..speech() };
        check(&unknown, missing(Some("voices_read")), "calls of /v1/text-to-speech/{id}");
    }

    #[test]
    fn a_verdict_about_a_key_proves_no_limit_of_a_feature() {
        for verdict in [
            Verdict::Served,
            Verdict::KeyQuota(Shortfall::default()),
            Verdict::RequestError,
            Verdict::NotFound,
        ] {
            assert_eq!(speech().refused(verdict), None, "{verdict:?}");
        }
    }

    #[test]
    fn a_refused_feature_is_among_the_features_of_a_similar_request() {
        for subject in [
            Subject::Voice,
            Subject::Model,
            Subject::OutputFormat,
            Subject::TextLength,
            Subject::Cloning,
            Subject::Endpoint,
            Subject::Unnamed,
        ] {
            let (refused, _) = speech().refused(Verdict::PlanFeature(subject)).unwrap();
            assert!(speech().all().any(|feature| feature == refused.feature), "{subject:?}");
        }
        let other = RequestFeatures { voice: Some(Named::new(Kind::Voice, "v2").tag), ..speech() };
        let (unnamed, _) = speech().refused(Verdict::PlanFeature(Subject::Unnamed)).unwrap();
        assert!(!other.all().any(|feature| feature == unnamed.feature), "another voice is another request");
    }
}
