//! Finds the price of a character, the concurrency group and the maximum text length of a free account for each model
//! of the provider.
//!
//! Source: `GET /v1/models` (`model_rates`, `concurrency_group`, `max_characters_request_free_user`). Before the poller
//! has received that list, and for models that it omits, the name of a model determines its price and group.

use std::collections::HashMap;
use std::sync::Arc;

use serde::Deserialize;

use crate::policy::concurrency_group::ConcurrencyGroup;

/// Number of micro-credits in a credit. Prices are integers in micro-credits per character, which avoids rounding
/// errors.
const MICRO_CREDITS: u64 = 1_000_000;

/// The models of the provider's list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Models {
    /// The models, sorted by identifier.
    listed: Vec<Model>,
}

/// The known properties of a model. A property is `None` if the list omits it or contains an implausible number.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Model {
    id: Arc<str>,
    micro_credits_per_character: Option<u64>,
    group: Option<ConcurrencyGroup>,
    max_free_characters: Option<u64>,
}

#[derive(Deserialize)]
struct ModelDocument {
    model_id: String,
    #[serde(default)]
    model_rates: RatesDocument,
    concurrency_group: Option<String>,
    max_characters_request_free_user: Option<u64>,
}

#[derive(Default, Deserialize)]
struct RatesDocument {
    character_cost_multiplier: Option<f64>,
    cost_discount_multiplier: Option<f64>,
}

/// Maximum number of models, which limits the memory that a forged response can use.
const MAX_MODELS: usize = 1_000;

impl Models {
    /// Parses the body of a response to `GET /v1/models`. Returns `None` if the body is not a list of models.
    #[must_use]
    pub fn parse(body: &[u8]) -> Option<Self> {
        let mut documents: Vec<ModelDocument> = serde_json::from_slice(body).ok()?;
        documents.truncate(MAX_MODELS);
        let groups = assign_groups(&documents);
        let mut models: Vec<Model> = documents
            .into_iter()
            .map(|document| Model {
                micro_credits_per_character: document.model_rates.micro_credits(),
                group: document.concurrency_group.and_then(|name| groups.get(&name).copied()),
                max_free_characters: document.max_characters_request_free_user.filter(|maximum| *maximum > 0),
                id: document.model_id.into(),
            })
            .collect();
        models.sort_by(|left, right| left.id.cmp(&right.id));
        Some(Self { listed: models })
    }

    /// Returns the listed model with an identifier.
    fn find(&self, id: &str) -> Option<&Model> {
        let index = self.listed.binary_search_by(|model| (*model.id).cmp(id)).ok()?;
        self.listed.get(index)
    }

    /// Returns an upper bound of the price of a text, in credits. Some plans charge less.
    #[must_use]
    pub fn max_credits(&self, id: &str, characters: u64) -> u64 {
        let is_fast = || ConcurrencyGroup::for_model(id) == Some(ConcurrencyGroup::FAST_SPEECH);
        let micro_credits = self
            .find(id)
            .and_then(|model| model.micro_credits_per_character)
            .unwrap_or_else(|| if is_fast() { MICRO_CREDITS / 2 } else { MICRO_CREDITS });
        characters.saturating_mul(micro_credits).div_ceil(MICRO_CREDITS)
    }

    /// Returns the maximum number of characters in a free account's request with the model `id`, if the list contains
    /// the model.
    #[must_use]
    pub fn max_free_characters(&self, id: &str) -> Option<u64> {
        self.find(id).and_then(|model| model.max_free_characters)
    }

    /// Returns the concurrency group of a model, or `None` if neither the list nor the name determines it.
    #[must_use]
    pub fn concurrency_group(&self, id: &str) -> Option<ConcurrencyGroup> {
        self.find(id).and_then(|model| model.group).or_else(|| ConcurrencyGroup::for_model(id))
    }
}

impl RatesDocument {
    /// Returns the price of a character, or `None` if the price is missing or implausible.
    fn micro_credits(&self) -> Option<u64> {
        let credits_per_character =
            self.character_cost_multiplier? * self.cost_discount_multiplier.unwrap_or(1.0);
        let micro_credits = (credits_per_character * MICRO_CREDITS as f64).round();
        let is_plausible =
            micro_credits.is_finite() && (0.0..=1_000.0 * MICRO_CREDITS as f64).contains(&micro_credits);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a plausible price fits")]
        is_plausible.then_some(micro_credits as u64)
    }
}

/// Maps the provider's names of groups to concurrency groups. A name gets the group of its first model. If an earlier
/// name already has that group, the name gets an unnamed group.
fn assign_groups(documents: &[ModelDocument]) -> HashMap<String, ConcurrencyGroup> {
    let mut groups: HashMap<String, ConcurrencyGroup> = HashMap::new();
    let mut unnamed_count = 0;
    for document in documents {
        let Some(name) = document.concurrency_group.as_ref().filter(|name| !groups.contains_key(*name))
        else {
            continue;
        };
        let group_of_model =
            ConcurrencyGroup::for_model(&document.model_id).unwrap_or(ConcurrencyGroup::OTHER);
        let is_assigned = groups.values().any(|group| *group == group_of_model);
        let unnamed_group = if is_assigned { ConcurrencyGroup::unnamed(unnamed_count) } else { None };
        unnamed_count += usize::from(unnamed_group.is_some());
        groups.insert(name.clone(), unnamed_group.unwrap_or(group_of_model));
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the entry of a model in the provider's list.
    fn entry(id: &str, rate: f64, discount: f64, group: &str) -> serde_json::Value {
        serde_json::json!({
            "model_id": id, "name": "x", "concurrency_group": group,
            "model_rates": {"character_cost_multiplier": rate, "cost_discount_multiplier": discount},
        })
    }

    fn parse_list(entries: &[serde_json::Value]) -> Models {
        Models::parse(serde_json::to_string(entries).unwrap().as_bytes()).unwrap()
    }

    #[test]
    fn an_unlisted_model_is_classified_by_its_name() {
        let models = Models::default();
        assert_eq!(models.max_credits("eleven_multilingual_v2", 100), 100);
        assert_eq!(models.max_credits("eleven_flash_v2_5", 101), 51);
        assert_eq!(models.max_credits("something new", 7), 7);
        assert_eq!(models.concurrency_group("eleven_v3"), Some(ConcurrencyGroup::SPEECH));
        assert_eq!(models.concurrency_group("something new"), None);
    }

    #[test]
    fn the_list_takes_precedence_over_the_names_of_models() {
        let models =
            parse_list(&[entry("eleven_v3", 0.8, 0.5, "a"), entry("eleven_flash_v2", 1.0, 1.0, "b")]);
        assert_eq!(models.max_credits("eleven_v3", 100), 40);
        assert_eq!(models.max_credits("eleven_v3", 1), 1);
        assert_eq!(models.max_credits("eleven_flash_v2", 10), 10);
    }

    #[test]
    fn each_group_of_the_provider_gets_a_concurrency_group() {
        let models = parse_list(&[
            entry("eleven_v3", 1.0, 1.0, "standard"),
            entry("eleven_multilingual_v2", 1.0, 1.0, "multilingual"),
            entry("eleven_turbo_v2", 0.5, 1.0, "standard"),
            entry("eleven_flash_v2", 0.5, 1.0, "fast"),
        ]);
        assert_eq!(models.concurrency_group("eleven_v3"), Some(ConcurrencyGroup::SPEECH));
        assert_eq!(models.concurrency_group("eleven_turbo_v2"), Some(ConcurrencyGroup::SPEECH));
        assert_eq!(models.concurrency_group("eleven_multilingual_v2"), ConcurrencyGroup::unnamed(0));
        assert_eq!(models.concurrency_group("eleven_flash_v2"), Some(ConcurrencyGroup::FAST_SPEECH));
    }

    #[test]
    fn groups_beyond_the_maximum_share_one_concurrency_group() {
        let ids: Vec<String> = (0..40).map(|number| format!("eleven_v{number}")).collect();
        let entries: Vec<_> = ids.iter().map(|id| entry(id, 1.0, 1.0, id)).collect();
        let models = parse_list(&entries);
        assert!(
            ids.iter().all(|id| models.concurrency_group(id).is_some()),
            "every listed model must have a concurrency group"
        );
        assert_eq!(models.concurrency_group("eleven_v39"), Some(ConcurrencyGroup::SPEECH));
    }

    #[test]
    fn implausible_rates_are_ignored() {
        for rate in [-1.0, 1e9] {
            assert_eq!(parse_list(&[entry("eleven_v3", rate, 1.0, "a")]).max_credits("eleven_v3", 10), 10);
        }
    }

    #[test]
    fn a_document_that_is_not_a_list_of_models_is_ignored() {
        for body in ["", "{}", "[1]", r#"{"detail":{"status":"workspace_not_found"}}"#, r#"[{"name":"x"}]"#] {
            assert_eq!(Models::parse(body.as_bytes()), None);
        }
        assert_eq!(Models::parse(b"[]"), Some(Models::default()));
    }
}
