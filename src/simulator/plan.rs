//! The description of a simulation: workspaces with credits, keys that use them, and texts that
//! must not be received. Plain data from tests and commands; [`super::accounts`] keeps the changing
//! state.

use std::time::Duration;

use crate::policy::units::UnixMs;
use crate::secret::{ApiKey, UnusableKey};

use super::fault::Fault;

/// The voice of the library in plans that name no others.
const LIBRARY_VOICE: &str = "HuLbOdhRlvQQN8oPP0AJ";
/// The default region of the responses (captured, 2026).
pub(super) const REGION: &str = "us-central1";

/// The configuration of a simulator.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Workspaces with more properties than credits. A workspace named only by keys may be left
    /// out.
    pub workspaces: Vec<WorkspacePlan>,
    /// The keys, in the order of the ledger.
    pub keys: Vec<KeyPlan>,
    /// Texts that must not occur in a request's head or in a WebSocket message: the credentials
    /// of the clients of the proxy under test. One that does is a violation.
    pub forbidden: Vec<String>,
    /// The length of a second of a WebSocket's `inactivity_timeout`; tests make it short.
    pub socket_second: Duration,
    /// Voices of the library, which every workspace may use whose plan includes it.
    pub library: Vec<String>,
    /// Keys that are valid at the host of another region and are refused here with `wrong_host`.
    pub elsewhere: Vec<String>,
    /// The `x-region` of the responses.
    pub region: String,
}

/// A group of keys with common credits.
#[derive(Clone, Debug)]
pub struct WorkspacePlan {
    /// Its name, also its `workspace_id`.
    pub name: String,
    /// Credits of a period.
    pub credits: u64,
    /// Used credits of the current period.
    pub used: u64,
    /// The plan's name, such as `free` or `creator`. It decides on the length of a text, the voices
    /// of the library, formats, clones and their slots.
    pub tier: String,
    /// The wording in which features that the plan lacks are refused.
    pub wording: PlanWording,
    /// Models that it may not use.
    pub denied_models: Vec<String>,
    /// Maximum custom voices without professional ones; `None` for the limit of its plan.
    pub voice_limit: Option<u64>,
    /// How the subscription reports the credits.
    pub shown_limit: ShownLimit,
    /// The state of the bill.
    pub billing: Billing,
    /// When the credits are reset; `None` for the first of next month.
    pub reset: Option<UnixMs>,
    /// The length of a period after that; `None` for until the first of the month.
    pub period: Option<Duration>,
    /// Maximum concurrent requests; `None` for no limit.
    pub concurrency_max: Option<u32>,
    /// Whether a caller of an agent waits in a queue while the limit is reached, and receives
    /// `queue_status` events, instead of a refusal.
    pub queues_callers: bool,
    /// Voices of its own, beside the public ones.
    pub voices: Vec<String>,
    /// Its agents. An agent of no workspace is public and belongs to its caller; without a key, to
    /// the first key of the plan.
    pub agents: Vec<AgentPlan>,
}

/// The wordings in which the provider has refused features that a plan lacks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PlanWording {
    /// 402 `paid_plan_required`, and 400 `can_not_use_instant_voice_cloning`.
    #[default]
    Current,
    /// 400 `free_users_not_allowed`, and the same for clones in older words.
    Old400,
    /// 402 `payment_required` with a message, also for clones.
    Old402,
}

/// How `GET /v1/user/subscription` reports the credits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ShownLimit {
    /// The credits of the period.
    #[default]
    Credits,
    /// `character_limit` is 0, whatever is left: pay as you go. There is no reset, and the document
    /// has no reset date.
    Zero,
    /// There is no `character_limit`; the rest is the same.
    Absent,
}

/// An agent to talk to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentPlan {
    /// Its `agent_id`.
    pub id: String,
    /// Whether it may be called without a key, at its workspace's expense.
    pub is_public: bool,
}

/// The state of the bill.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Billing {
    /// Paid.
    #[default]
    Active,
    /// The last invoice is unpaid: reading is allowed, other operations are not.
    PastDue,
    /// A free account that the abuse detection has closed.
    FreeDisabled,
}

/// A key.
#[derive(Clone, Debug, Default)]
pub struct KeyPlan {
    /// The key itself, which is sent as `xi-api-key`.
    pub key: String,
    /// Its name in the settings of the workspace, and in the refusal of its cap. `None` is `key 1`
    /// and so on, so that no response contains a key.
    pub name: Option<String>,
    /// Credits of its workspace, if the key is alone in one or the first to name it.
    pub credits: u64,
    /// The workspace that it shares with others; `None` for one of its own.
    pub workspace: Option<String>,
    /// The plan of its workspace, if the key is alone in one or the first to name it; `None` for
    /// the default.
    pub tier: Option<String>,
    /// Its own limit of credits per period.
    pub cap: Option<u64>,
    /// Its permissions, by the provider's names; `None` for all.
    pub permissions: Option<Vec<String>>,
    /// The faults of its first requests, in order.
    pub faults: Vec<Fault>,
}

impl Default for Plan {
    /// Three demo keys with few credits, long enough to be shown like real keys.
    fn default() -> Self {
        Self::of([
            ("sk_demo_soprano_0123456789abcdef0123456789abcdef0001", 500),
            ("sk_demo_alto_0123456789abcdef0123456789abcdef00000002", 1_000),
            ("sk_demo_tenor_0123456789abcdef0123456789abcdef0000003", 2_000),
        ])
    }
}

impl Plan {
    /// Keys with their credits, each in its own workspace.
    #[must_use]
    pub fn of<'a>(keys: impl IntoIterator<Item = (&'a str, u64)>) -> Self {
        Self {
            workspaces: Vec::new(),
            keys: keys.into_iter().map(|(key, credits)| KeyPlan::new(key, credits)).collect(),
            forbidden: Vec::new(),
            socket_second: Duration::from_secs(1),
            library: vec![LIBRARY_VOICE.to_owned()],
            elsewhere: Vec::new(),
            region: REGION.to_owned(),
        }
    }

    /// Keys as text, separated by commas or white space, each as [`KeyPlan::parse`] reads it.
    ///
    /// # Errors
    ///
    /// The first mistake, or what [`Plan::check`] finds.
    pub fn parse(text: &str) -> Result<Self, PlanError> {
        let entries = text.split([',', ' ', '\t', '\r', '\n']).filter(|entry| !entry.is_empty());
        let keys = entries.map(KeyPlan::parse).collect::<Result<_, _>>()?;
        let plan = Self { keys, ..Self::of([]) };
        plan.check()?;
        Ok(plan)
    }

    /// The same plan with that workspace.
    #[must_use]
    pub fn with_workspace(mut self, workspace: WorkspacePlan) -> Self {
        self.workspaces.push(workspace);
        self
    }

    /// The same plan with that key.
    #[must_use]
    pub fn with_key(mut self, key: KeyPlan) -> Self {
        self.keys.push(key);
        self
    }

    /// The same plan, where that key is one of another region.
    #[must_use]
    pub fn with_key_elsewhere(mut self, key: &str) -> Self {
        self.elsewhere.push(key.to_owned());
        self
    }

    /// The same plan, with `text` forbidden in requests.
    #[must_use]
    pub fn forbidding(mut self, text: &str) -> Self {
        self.forbidden.push(text.to_owned());
        self
    }

    /// Checks the plan for contradictions.
    ///
    /// # Errors
    ///
    /// The first contradiction.
    pub fn check(&self) -> Result<(), PlanError> {
        for (index, workspace) in self.workspaces.iter().enumerate() {
            if self.workspaces[..index].iter().any(|earlier| earlier.name == workspace.name) {
                return Err(PlanError::WorkspaceTwice(workspace.name.clone()));
            }
        }
        for (index, key) in self.keys.iter().enumerate() {
            let earlier = &self.keys[..index];
            ApiKey::new(&key.key).map_err(|source| PlanError::Key { position: index + 1, source })?;
            if earlier.iter().any(|other| other.key == key.key) {
                return Err(PlanError::KeyTwice { position: index + 1 });
            }
            if self.elsewhere.contains(&key.key) {
                return Err(PlanError::KeyElsewhere { position: index + 1 });
            }
            let Some(name) = &key.workspace else { continue };
            if self.workspaces.iter().any(|workspace| workspace.name == *name) {
                continue;
            }
            if let Some(other) =
                earlier.iter().find(|other| other.workspace == key.workspace && other.credits != key.credits)
            {
                return Err(PlanError::CreditsDiffer {
                    workspace: name.clone(),
                    first: other.credits,
                    second: key.credits,
                });
            }
        }
        Ok(())
    }
}

impl Default for WorkspacePlan {
    fn default() -> Self {
        Self {
            name: "workspace".to_owned(),
            credits: 10_000,
            used: 0,
            tier: "creator".to_owned(),
            wording: PlanWording::Current,
            denied_models: Vec::new(),
            voice_limit: None,
            shown_limit: ShownLimit::Credits,
            billing: Billing::Active,
            reset: None,
            period: None,
            concurrency_max: None,
            queues_callers: false,
            voices: Vec::new(),
            agents: Vec::new(),
        }
    }
}

impl WorkspacePlan {
    /// A paid workspace with that many credits, all of them left.
    #[must_use]
    pub fn new(name: &str, credits: u64) -> Self {
        Self { name: name.to_owned(), credits, ..Self::default() }
    }

    /// A workspace of that plan, all of its credits left.
    #[must_use]
    pub fn of_tier(name: &str, credits: u64, tier: &str) -> Self {
        Self { tier: tier.to_owned(), ..Self::new(name, credits) }
    }

    /// A pay-as-you-go workspace: it has that many credits, and its subscription does not report
    /// them.
    #[must_use]
    pub fn pay_as_you_go(name: &str, credits: u64, shown_limit: ShownLimit) -> Self {
        Self { shown_limit, ..Self::of_tier(name, credits, "payg") }
    }
}

impl KeyPlan {
    /// A key with every permission, in a workspace of its own with that many credits.
    #[must_use]
    pub fn new(key: &str, credits: u64) -> Self {
        Self { key: key.to_owned(), credits, ..Self::default() }
    }

    /// Reads `KEY=CREDITS[@WORKSPACE][:cap=N][:tier=NAME]`, for example `sk_demo_one=500` or
    /// `sk_two=10000@choir:cap=200:tier=free`. Credits may have underscores.
    ///
    /// # Errors
    ///
    /// When a part is missing, unknown or not a number. The message does not repeat the key.
    pub fn parse(text: &str) -> Result<Self, PlanError> {
        let text = text.trim();
        let (key, rest) = text.split_once('=').ok_or(PlanError::NoCredits)?;
        ApiKey::new(key).map_err(|source| PlanError::Key { position: 1, source })?;
        let (amount, options) = match rest.split_once(':') {
            Some((amount, options)) => (amount, Some(options)),
            None => (rest, None),
        };
        let (credits, workspace) = match amount.split_once('@') {
            Some((_, "")) => return Err(PlanError::EmptyWorkspace),
            Some((credits, workspace)) => (credits, Some(workspace.to_owned())),
            None => (amount, None),
        };
        let mut plan = Self { workspace, ..Self::new(key, count("credits", credits)?) };
        for option in options.into_iter().flat_map(|options| options.split(':')) {
            match option.split_once('=') {
                Some(("cap", value)) => plan.cap = Some(count("the cap", value)?),
                Some(("tier", value)) if !value.is_empty() => plan.tier = Some(value.to_owned()),
                Some(_) | None => return Err(PlanError::UnknownOption(option.to_owned())),
            }
        }
        Ok(plan)
    }
}

fn count(number_name: &'static str, text: &str) -> Result<u64, PlanError> {
    let digits = text.replace('_', "");
    digits.parse().map_err(|_| PlanError::NotACount { number_name, text: text.to_owned() })
}

/// Why a plan is invalid. Does not contain the value of a key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// The text has no `=`.
    #[error("a key is written KEY=CREDITS[@WORKSPACE][:cap=N][:tier=NAME], for example sk_demo_one=500")]
    NoCredits,
    /// A value is no number.
    #[error("{number_name} must be a whole number, not `{text}`")]
    NotACount {
        /// The name of the number.
        number_name: &'static str,
        /// The text instead of a number.
        text: String,
    },
    /// No name follows the `@`.
    #[error("a workspace's name follows the `@`, for example sk_demo_one=500@choir")]
    EmptyWorkspace,
    /// An unknown option follows a `:`.
    #[error("`{0}` is no option of a key; there are cap=N and tier=NAME")]
    UnknownOption(String),
    /// A key that is invalid in a header.
    #[error("key {position}: {source}")]
    Key {
        /// Its position in the plan, from 1.
        position: usize,
        /// Why it is invalid.
        source: UnusableKey,
    },
    /// A duplicate key.
    #[error("key {position} is the same as an earlier one")]
    KeyTwice {
        /// Its position in the plan, from 1.
        position: usize,
    },
    /// A key that is also one of another region.
    #[error("key {position} is also one of another region")]
    KeyElsewhere {
        /// Its position in the plan, from 1.
        position: usize,
    },
    /// A duplicate workspace.
    #[error("the workspace `{0}` is described twice")]
    WorkspaceTwice(String),
    /// Two keys of a workspace that is not described give it different credits.
    #[error("workspace `{workspace}` cannot have {first} and {second} credits: its keys must agree")]
    CreditsDiffer {
        /// The name of the workspace.
        workspace: String,
        /// The credits that the first key names.
        first: u64,
        /// The credits that a later key names.
        second: u64,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, key: &str, credits: u64, workspace: Option<&str>, cap: Option<u64>) {
        let plan = KeyPlan::parse(text).unwrap();
        assert_eq!(plan.key, key);
        assert_eq!((plan.credits, plan.workspace.as_deref(), plan.cap), (credits, workspace, cap));
    }

    #[track_caller]
    fn check_invalid(text: &str, expected: &str) {
        assert_eq!(KeyPlan::parse(text).unwrap_err().to_string(), expected);
    }

    #[test]
    fn a_key_has_credits_and_perhaps_a_workspace_and_a_cap() {
        check("sk_demo_one=500", "sk_demo_one", 500, None, None);
        check(" sk=1_000@choir ", "sk", 1_000, Some("choir"), None);
        check("sk=0:cap=20", "sk", 0, None, Some(20));
        check("sk=1000@choir:cap=20", "sk", 1_000, Some("choir"), Some(20));
    }

    #[test]
    fn an_error_explains_the_mistake_and_does_not_repeat_the_key() {
        check_invalid(
            "sk",
            "a key is written KEY=CREDITS[@WORKSPACE][:cap=N][:tier=NAME], for example sk_demo_one=500",
        );
        check_invalid("sk=", "credits must be a whole number, not ``");
        check_invalid("sk=-5", "credits must be a whole number, not `-5`");
        check_invalid("sk=many", "credits must be a whole number, not `many`");
        check_invalid("sk=5@", "a workspace's name follows the `@`, for example sk_demo_one=500@choir");
        check_invalid("sk=5:cap=x", "the cap must be a whole number, not `x`");
        check_invalid("sk=5:lid=3", "`lid=3` is no option of a key; there are cap=N and tier=NAME");
        check_invalid("sk=5:tier=", "`tier=` is no option of a key; there are cap=N and tier=NAME");
        check_invalid("sk=5:", "`` is no option of a key; there are cap=N and tier=NAME");
        check_invalid("=5", "key 1: the key is empty");
    }

    #[test]
    fn a_list_is_separated_by_commas_and_white_space() {
        let plan = Plan::parse("sk_one=500, sk_two=1000@choir:tier=free\n sk_three=1000@choir,").unwrap();
        assert_eq!(plan.keys[1].tier.as_deref(), Some("free"));
        assert_eq!(plan.keys.len(), 3);
        assert_eq!(plan.keys[2].workspace.as_deref(), Some("choir"));
    }

    #[test]
    fn a_contradictory_plan_is_refused() {
        for (text, expected) in [
            ("sk=5 sk=5", "key 2 is the same as an earlier one"),
            ("a=5@w b=6@w", "workspace `w` cannot have 5 and 6 credits: its keys must agree"),
        ] {
            assert_eq!(Plan::parse(text).unwrap_err().to_string(), expected);
        }
        let twice = Plan::default()
            .with_workspace(WorkspacePlan::new("w", 1))
            .with_workspace(WorkspacePlan::new("w", 2));
        assert_eq!(twice.check().unwrap_err(), PlanError::WorkspaceTwice("w".to_owned()));
    }

    #[test]
    fn a_described_workspace_decides_on_its_credits() {
        let plan = Plan {
            keys: vec![KeyPlan::parse("a=5@w").unwrap(), KeyPlan::parse("b=6@w").unwrap()],
            ..Plan::default().with_workspace(WorkspacePlan::new("w", 100))
        };
        assert_eq!(plan.check(), Ok(()));
    }

    #[test]
    fn the_default_plan_is_valid() {
        assert_eq!(Plan::default().check(), Ok(()));
    }
}
