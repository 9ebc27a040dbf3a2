//! The provider's models: the price of a character, and the concurrency group of each.
//!
//! Source: `GET /v1/models` (`model_rates`, `concurrency_group`). Until it is received, and for models
//! that it does not list (it is not exhaustive), both follow from the model's name.

use std::sync::Arc;

use serde::Deserialize;

use crate::policy::concurrency_group::ConcurrencyGroup;

/// Prices are integers in millionths of a credit per character, because this avoids rounding errors.
const MICRO: u64 = 1_000_000;

/// The known models.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Models {
    /// Sorted by identifier.
    known: Vec<Model>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Model {
    id: Arc<str>,
    micro_credits_per_character: Option<u64>,
    group: Option<ConcurrencyGroup>,
    free_characters_max: Option<u64>,
}

#[derive(Deserialize)]
struct ModelDocument {
    model_id: String,
    #[serde(default)]
    model_rates: Rates,
    concurrency_group: Option<String>,
    max_characters_request_free_user: Option<u64>,
}

#[derive(Default, Deserialize)]
struct Rates {
    character_cost_multiplier: Option<f64>,
    cost_discount_multiplier: Option<f64>,
}

/// Maximum number of models; bounds the memory that a forged response could use.
const MODELS_MAX: usize = 1_000;

impl Models {
    /// Parses the response of `GET /v1/models`. `None` when it is not a list of models.
    #[must_use]
    pub fn read(body: &[u8]) -> Option<Self> {
        let mut listed: Vec<ModelDocument> = serde_json::from_slice(body).ok()?;
        listed.truncate(MODELS_MAX);
        let groups = groups(&listed);
        let mut known: Vec<Model> = listed
            .into_iter()
            .map(|document| Model {
                micro_credits_per_character: document.model_rates.micro_credits(),
                group: document.concurrency_group.and_then(|group| {
                    groups.iter().find(|(known, _)| *known == group).map(|(_, group)| *group)
                }),
                free_characters_max: document.max_characters_request_free_user.filter(|max| *max > 0),
                id: document.model_id.into(),
            })
            .collect();
        known.sort_by(|a, b| a.id.cmp(&b.id));
        Some(Self { known })
    }

    fn find(&self, id: &str) -> Option<&Model> {
        let at = self.known.binary_search_by(|model| (*model.id).cmp(id)).ok()?;
        self.known.get(at)
    }

    /// Upper bound of the price of this many characters, in credits: plans may charge less.
    #[must_use]
    pub fn credits(&self, id: &str, characters: u64) -> u64 {
        let price = self.find(id).and_then(|model| model.micro_credits_per_character);
        let micro_credits =
            price.unwrap_or(if ConcurrencyGroup::of_model(id) == Some(ConcurrencyGroup::FAST_SPEECH) {
                MICRO / 2
            } else {
                MICRO
            });
        characters.saturating_mul(micro_credits).div_ceil(MICRO)
    }

    /// Maximum characters of a request of a free account with this model, if the list has it.
    #[must_use]
    pub fn free_characters_max(&self, id: &str) -> Option<u64> {
        self.find(id).and_then(|model| model.free_characters_max)
    }

    /// The concurrency group of a model. `None` when neither the list nor the name determines it.
    #[must_use]
    pub fn group(&self, id: &str) -> Option<ConcurrencyGroup> {
        self.find(id).and_then(|model| model.group).or_else(|| ConcurrencyGroup::of_model(id))
    }
}

impl Rates {
    fn micro_credits(&self) -> Option<u64> {
        let rate = self.character_cost_multiplier? * self.cost_discount_multiplier.unwrap_or(1.0);
        let micro_credits = (rate * MICRO as f64).round();
        let is_plausible =
            micro_credits.is_finite() && (0.0..=1_000.0 * MICRO as f64).contains(&micro_credits);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "within bounds")]
        is_plausible.then_some(micro_credits as u64)
    }
}

/// Maps the provider's groups to ours: each to that of its first model, or to an unnamed one when that is
/// taken.
fn groups(listed: &[ModelDocument]) -> Vec<(String, ConcurrencyGroup)> {
    let mut groups: Vec<(String, ConcurrencyGroup)> = Vec::new();
    let mut unnamed_count = 0;
    for document in listed {
        let Some(group) = &document.concurrency_group else { continue };
        if groups.iter().any(|(known, _)| known == group) {
            continue;
        }
        let group_of_name = ConcurrencyGroup::of_model(&document.model_id).unwrap_or(ConcurrencyGroup::OTHER);
        let is_taken = groups.iter().any(|(_, group)| *group == group_of_name);
        let assigned = if is_taken { ConcurrencyGroup::extra(unnamed_count) } else { None };
        unnamed_count += usize::from(assigned.is_some());
        groups.push((group.clone(), assigned.unwrap_or(group_of_name)));
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(models: &[(&str, f64, f64, &str)]) -> Models {
        let models: Vec<_> = models
            .iter()
            .map(|(id, rate, discount, group)| {
                serde_json::json!({
                    "model_id": id, "name": "x", "concurrency_group": group,
                    "model_rates": {"character_cost_multiplier": rate, "cost_discount_multiplier": discount},
                })
            })
            .collect();
        Models::read(serde_json::to_string(&models).unwrap().as_bytes()).unwrap()
    }

    #[test]
    fn an_unlisted_model_is_classified_by_its_name() {
        let models = Models::default();
        assert_eq!(models.credits("eleven_multilingual_v2", 100), 100);
        assert_eq!(models.credits("eleven_flash_v2_5", 101), 51);
        assert_eq!(models.credits("something new", 7), 7);
        assert_eq!(models.group("eleven_v3"), Some(ConcurrencyGroup::SPEECH));
        assert_eq!(models.group("something new"), None);
    }

    #[test]
    fn the_list_takes_precedence_over_names() {
        let models = list(&[("eleven_v3", 0.8, 0.5, "a"), ("eleven_flash_v2", 1.0, 1.0, "b")]);
        assert_eq!(models.credits("eleven_v3", 100), 40);
        assert_eq!(models.credits("eleven_v3", 1), 1);
        assert_eq!(models.credits("eleven_flash_v2", 10), 10);
    }

    #[test]
    fn a_group_of_the_provider_is_a_concurrency_group() {
        let models = list(&[
            ("eleven_v3", 1.0, 1.0, "standard"),
            ("eleven_multilingual_v2", 1.0, 1.0, "multilingual"),
            ("eleven_turbo_v2", 0.5, 1.0, "standard"),
            ("eleven_flash_v2", 0.5, 1.0, "fast"),
        ]);
        assert_eq!(models.group("eleven_v3"), Some(ConcurrencyGroup::SPEECH));
        assert_eq!(models.group("eleven_turbo_v2"), Some(ConcurrencyGroup::SPEECH));
        assert_eq!(models.group("eleven_multilingual_v2"), ConcurrencyGroup::extra(0));
        assert_eq!(models.group("eleven_flash_v2"), Some(ConcurrencyGroup::FAST_SPEECH));
    }

    #[test]
    fn groups_beyond_the_maximum_share_one_concurrency_group() {
        let many: Vec<String> = (0..40).map(|n| format!("eleven_v{n}")).collect();
        let listed: Vec<_> = many.iter().map(|id| (id.as_str(), 1.0, 1.0, id.as_str())).collect();
        let models = list(&listed);
        assert!(many.iter().all(|id| models.group(id).is_some()));
        assert_eq!(models.group("eleven_v39"), Some(ConcurrencyGroup::SPEECH));
    }

    #[test]
    fn absurd_rates_are_ignored() {
        for rate in [-1.0, 1e9] {
            assert_eq!(list(&[("eleven_v3", rate, 1.0, "a")]).credits("eleven_v3", 10), 10);
        }
    }

    #[test]
    fn a_document_that_is_no_list_is_ignored() {
        for body in ["", "{}", "[1]", r#"{"detail":{"status":"workspace_not_found"}}"#, r#"[{"name":"x"}]"#] {
            assert_eq!(Models::read(body.as_bytes()), None);
        }
        assert_eq!(Models::read(b"[]"), Some(Models::default()));
    }
}
