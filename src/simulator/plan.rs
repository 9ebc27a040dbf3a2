//! Defines the configuration of a simulator, its [`Plan`]: workspaces with their credits, subscription tiers and
//! agents, the keys, the voice library, the region, the speed of WebSocket timeouts, and texts that a proxy must not
//! forward. Parses the notation of keys on the command line, and refuses contradictory plans. The mutable state is in
//! [`super::accounts`].

use std::time::Duration;

use crate::policy::units::UnixMs;
use crate::secret::{ApiKey, InvalidApiKey};

use super::fault::Fault;

/// The only voice of the library, unless the plan lists other voices.
const LIBRARY_VOICE: &str = "HuLbOdhRlvQQN8oPP0AJ";
/// The region that responses report unless the plan contains another one (captured, 2026).
pub(super) const REGION: &str = "us-central1";

/// The configuration of a simulator.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The workspaces that are described in full. A workspace that only needs credits and a tier can be named by its
    /// keys instead.
    pub workspaces: Vec<WorkspacePlan>,
    /// The keys. The ledger lists them in the same order.
    pub keys: Vec<KeyPlan>,
    /// Texts that no request head and no WebSocket message may contain, such as client tokens of the tested proxy. A
    /// request that contains one is a violation.
    pub forbidden_texts: Vec<String>,
    /// The real duration of one second of the timeouts on WebSockets. Tests shorten it.
    pub websocket_timeout_second: Duration,
    /// The voices of the library. A workspace may use them if its tier includes the library.
    pub library: Vec<String>,
    /// Keys that are valid at the host of another region and are refused here with `wrong_host`.
    pub other_region_keys: Vec<String>,
    /// The `x-region` header of the responses.
    pub region: String,
}

/// A workspace of the simulated provider. Its keys share its credits.
#[derive(Clone, Debug)]
pub struct WorkspacePlan {
    /// The name of the workspace, which is also its `workspace_id`.
    pub name: String,
    /// Credits per period.
    pub credits: u64,
    /// Used credits of the current period.
    pub used: u64,
    /// The subscription tier of the workspace, such as `free` or `creator`. It limits the text length, voices of the
    /// library, formats, clones and slots.
    pub tier: String,
    /// The wording of refusals of features that the tier does not include.
    pub wording: RefusalWording,
    /// Models that this workspace may not use.
    pub denied_models: Vec<String>,
    /// Maximum number of custom voices, not counting professional voices, or `None` for the limit of the tier.
    pub voice_limit: Option<u64>,
    /// The form in which the subscription reports the credits.
    pub reported_limit: ReportedLimit,
    /// The state of the workspace's bill.
    pub billing: Billing,
    /// The time of the next reset of the credits, or `None` for the first day of the next month. If the subscription
    /// does not report the credits, `None` means that they are never reset.
    pub reset: Option<UnixMs>,
    /// The length of later periods, or `None` for calendar months.
    pub period: Option<Duration>,
    /// Maximum number of concurrent requests, or `None` for no limit.
    pub max_concurrent: Option<u32>,
    /// Whether a caller of an agent waits in a queue when the concurrency limit is reached. The
    /// caller then receives `queue_status` events. Otherwise the call is refused.
    pub queues_callers: bool,
    /// The custom voices of the workspace, in addition to the public voices.
    pub voices: Vec<String>,
    /// The agents of the workspace. An agent that no workspace lists is public. Its caller pays, or the first key of
    /// the plan if the caller has no key.
    pub agents: Vec<AgentPlan>,
}

/// The observed wordings of refusals of library voices, clones and long texts that a tier does not include.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RefusalWording {
    /// 402 `paid_plan_required` for library voices, 400 `can_not_use_instant_voice_cloning` for clones, and 400
    /// `text_too_long` for long texts.
    #[default]
    Current,
    /// 400 `free_users_not_allowed`, and older messages for clones and long texts.
    Old400,
    /// 402 with the status `payment_required` or, for clones, the code `paid_plan_required`. Long texts have the
    /// message of `Old400`.
    Old402,
}

/// The form in which `GET /v1/user/subscription` reports the credits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReportedLimit {
    /// The credits of the period.
    #[default]
    Credits,
    /// `character_limit` is always 0 (pay as you go). The credits are never reset unless the plan contains a reset
    /// time, and the document has no reset date.
    Zero,
    /// `character_limit` is missing. The other fields are the same as with `Zero`.
    Absent,
}

/// An agent with which clients can have conversations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentPlan {
    /// The `agent_id`.
    pub id: String,
    /// Whether callers without a key and callers of other workspaces may use the agent. The workspace of the agent pays
    /// for them.
    pub is_public: bool,
}

/// The state of a workspace's bill, which decides which operations are allowed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Billing {
    /// All invoices are paid.
    #[default]
    Active,
    /// The last invoice is unpaid: only operations that cost no credits are allowed.
    PastDue,
    /// The abuse detection has disabled a free account: only operations that cost no credits are allowed.
    FreeDisabled,
}

/// A key of the simulated provider, with its credits, limits and first faults.
#[derive(Clone, Debug, Default)]
pub struct KeyPlan {
    /// The key, sent as `xi-api-key`.
    pub key: String,
    /// The name of the key in the settings of the workspace and in refusals because of the cap. If it is `None`, the
    /// names are `key 1`, `key 2` and so on, so that no response contains a key.
    pub name: Option<String>,
    /// Credits of the key's workspace. They are ignored if [`Plan::workspaces`] describes the workspace. Otherwise, all
    /// keys of a workspace must have the same value.
    pub credits: u64,
    /// The workspace that the key shares with other keys, or `None` for a separate workspace.
    pub workspace: Option<String>,
    /// The subscription tier of the key's workspace, or `None` for `creator`. It is ignored if
    /// [`Plan::workspaces`] describes the workspace or an earlier key names it.
    pub tier: Option<String>,
    /// The key's cap of credits per period, or `None` if the key has no cap.
    pub cap: Option<u64>,
    /// The key's permissions, by the provider's names, or `None` for all.
    pub permissions: Option<Vec<String>>,
    /// The faults of the key's first requests, in order.
    pub faults: Vec<Fault>,
}

impl Default for Plan {
    /// Creates a plan of three demo keys with few credits. They have the length of real keys.
    fn default() -> Self {
        Self::with_keys([
            ("sk_demo_soprano_0123456789abcdef0123456789abcdef0001", 500),
            ("sk_demo_alto_0123456789abcdef0123456789abcdef00000002", 1_000),
            ("sk_demo_tenor_0123456789abcdef0123456789abcdef0000003", 2_000),
        ])
    }
}

impl Plan {
    /// Creates a plan of keys with credits, each in a separate workspace.
    #[must_use]
    pub fn with_keys<'a>(keys: impl IntoIterator<Item = (&'a str, u64)>) -> Self {
        Self {
            workspaces: Vec::new(),
            keys: keys.into_iter().map(|(key, credits)| KeyPlan::new(key, credits)).collect(),
            forbidden_texts: Vec::new(),
            websocket_timeout_second: Duration::from_secs(1),
            library: vec![LIBRARY_VOICE.to_owned()],
            other_region_keys: Vec::new(),
            region: REGION.to_owned(),
        }
    }

    /// Parses keys that are separated by commas or white space, each in the notation of
    /// [`KeyPlan::parse`].
    ///
    /// # Errors
    ///
    /// Returns the first syntax error or, if there is none, the contradiction that [`Plan::validate`] finds.
    pub fn parse(text: &str) -> Result<Self, PlanError> {
        let entries = text.split([',', ' ', '\t', '\r', '\n']).filter(|entry| !entry.is_empty());
        let keys = entries
            .enumerate()
            .map(|(index, entry)| KeyPlan::parse_at(index + 1, entry))
            .collect::<Result<_, _>>()?;
        let plan = Self { keys, ..Self::with_keys([]) };
        plan.validate()?;
        Ok(plan)
    }

    /// Adds a description of a workspace.
    #[must_use]
    pub fn with_workspace(mut self, workspace: WorkspacePlan) -> Self {
        self.workspaces.push(workspace);
        self
    }

    /// Adds a key to the end of the plan.
    #[must_use]
    pub fn with_key(mut self, key: KeyPlan) -> Self {
        self.keys.push(key);
        self
    }

    /// Adds a key of another region.
    #[must_use]
    pub fn with_other_region_key(mut self, key: &str) -> Self {
        self.other_region_keys.push(key.to_owned());
        self
    }

    /// Adds a text that no request may contain.
    #[must_use]
    pub fn with_forbidden_text(mut self, text: &str) -> Self {
        self.forbidden_texts.push(text.to_owned());
        self
    }

    /// Checks the plan for contradictions.
    ///
    /// # Errors
    ///
    /// Returns the first contradiction.
    pub fn validate(&self) -> Result<(), PlanError> {
        for (index, workspace) in self.workspaces.iter().enumerate() {
            if self.workspaces[..index].iter().any(|earlier| earlier.name == workspace.name) {
                return Err(PlanError::DuplicateWorkspace(workspace.name.clone()));
            }
        }
        for (index, key) in self.keys.iter().enumerate() {
            let earlier_keys = &self.keys[..index];
            ApiKey::new(&key.key).map_err(|source| PlanError::Key { position: index + 1, source })?;
            if earlier_keys.iter().any(|earlier_key| earlier_key.key == key.key) {
                return Err(PlanError::DuplicateKey { position: index + 1 });
            }
            if self.other_region_keys.contains(&key.key) {
                return Err(PlanError::KeyOfOtherRegion { position: index + 1 });
            }
            let Some(name) = &key.workspace else { continue };
            if self.workspaces.iter().any(|workspace| workspace.name == *name) {
                continue;
            }
            let has_other_credits = |earlier_key: &&KeyPlan| {
                earlier_key.workspace == key.workspace && earlier_key.credits != key.credits
            };
            if let Some(earlier_key) = earlier_keys.iter().find(has_other_credits) {
                return Err(PlanError::CreditsDiffer {
                    workspace: name.clone(),
                    first: earlier_key.credits,
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
            wording: RefusalWording::Current,
            denied_models: Vec::new(),
            voice_limit: None,
            reported_limit: ReportedLimit::Credits,
            billing: Billing::Active,
            reset: None,
            period: None,
            max_concurrent: None,
            queues_callers: false,
            voices: Vec::new(),
            agents: Vec::new(),
        }
    }
}

impl WorkspacePlan {
    /// Creates a workspace with a paid tier and `credits` unused credits.
    #[must_use]
    pub fn new(name: &str, credits: u64) -> Self {
        Self { name: name.to_owned(), credits, ..Self::default() }
    }

    /// Creates a workspace with the subscription tier `tier` and `credits` unused credits.
    #[must_use]
    pub fn of_tier(name: &str, credits: u64, tier: &str) -> Self {
        Self { tier: tier.to_owned(), ..Self::new(name, credits) }
    }

    /// Creates a pay-as-you-go workspace with `credits` credits. Its subscription does not report
    /// them.
    #[must_use]
    pub fn pay_as_you_go(name: &str, credits: u64, reported_limit: ReportedLimit) -> Self {
        Self { reported_limit, ..Self::of_tier(name, credits, "payg") }
    }
}

impl KeyPlan {
    /// Creates a key with all permissions, in a separate workspace with `credits` credits.
    #[must_use]
    pub fn new(key: &str, credits: u64) -> Self {
        Self { key: key.to_owned(), credits, ..Self::default() }
    }

    /// Parses `KEY=CREDITS[@WORKSPACE][:cap=N][:tier=NAME]`, for example `sk_demo_one=500` or
    /// `sk_two=10000@choir:cap=200:tier=free`. Credits may contain underscores.
    ///
    /// # Errors
    ///
    /// Fails if a part is missing, unknown or not a number. The error does not contain the key.
    pub fn parse(text: &str) -> Result<Self, PlanError> {
        Self::parse_at(1, text)
    }

    /// Parses the key at the given position of a plan. See [`Self::parse`].
    fn parse_at(position: usize, text: &str) -> Result<Self, PlanError> {
        let text = text.trim();
        let (key, properties) = text.split_once('=').ok_or(PlanError::NoCredits)?;
        ApiKey::new(key).map_err(|source| PlanError::Key { position, source })?;
        let mut properties = properties.split(':');
        let account = properties.next().unwrap_or_default();
        let (credits, workspace) = match account.split_once('@') {
            Some((_, "")) => return Err(PlanError::EmptyWorkspace),
            Some((credits, workspace)) => (credits, Some(workspace.to_owned())),
            None => (account, None),
        };
        let mut plan = Self { workspace, ..Self::new(key, parse_count("credits", credits)?) };
        for option in properties {
            match option.split_once('=') {
                Some(("cap", value)) => plan.cap = Some(parse_count("the cap", value)?),
                Some(("tier", value)) if !value.is_empty() => plan.tier = Some(value.to_owned()),
                Some(_) | None => return Err(PlanError::UnknownOption(option.to_owned())),
            }
        }
        Ok(plan)
    }
}

fn parse_count(number_name: &'static str, text: &str) -> Result<u64, PlanError> {
    let digits = text.replace('_', "");
    digits.parse().map_err(|_| PlanError::NotACount { number_name, text: text.to_owned() })
}

/// The errors of a plan. They do not contain a key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// The text of a key has no `=`, so it contains no credits.
    #[error("a key is written KEY=CREDITS[@WORKSPACE][:cap=N][:tier=NAME], for example sk_demo_one=500")]
    NoCredits,
    /// The text of a number is not a whole number.
    #[error("{number_name} must be a whole number, not `{text}`")]
    NotACount {
        /// The property that must be a number.
        number_name: &'static str,
        /// The text that is not a whole number.
        text: String,
    },
    /// No name follows the `@`.
    #[error("a workspace's name follows the `@`, for example sk_demo_one=500@choir")]
    EmptyWorkspace,
    /// An unknown option, or an empty tier, follows a `:`.
    #[error("`{0}` is not an option of a key; the options are cap=N and tier=NAME")]
    UnknownOption(String),
    /// A key is empty, or cannot be sent in a header.
    #[error("key {position}: {source}")]
    Key {
        /// The position of the key in the plan, from 1.
        position: usize,
        /// The reason why the key is invalid.
        source: InvalidApiKey,
    },
    /// The plan contains a key twice.
    #[error("key {position} is the same as an earlier one")]
    DuplicateKey {
        /// The position of the duplicate key in the plan, from 1.
        position: usize,
    },
    /// A key is both in the plan and a key of another region.
    #[error("key {position} is also a key of another region")]
    KeyOfOtherRegion {
        /// The position of the key in the plan, from 1.
        position: usize,
    },
    /// The plan describes a workspace twice.
    #[error("the workspace `{0}` is described twice")]
    DuplicateWorkspace(String),
    /// Two keys give one workspace different credits, and the plan does not describe the workspace.
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
    fn check_key(text: &str, key: &str, credits: u64, workspace: Option<&str>, cap: Option<u64>) {
        let plan = KeyPlan::parse(text).unwrap();
        assert_eq!(plan.key, key);
        assert_eq!((plan.credits, plan.workspace.as_deref(), plan.cap), (credits, workspace, cap));
    }

    #[track_caller]
    fn check_invalid_key(text: &str, expected: &str) {
        assert_eq!(KeyPlan::parse(text).unwrap_err().to_string(), expected);
    }

    #[test]
    fn a_key_has_credits_and_an_optional_workspace_and_cap() {
        check_key("sk_demo_one=500", "sk_demo_one", 500, None, None);
        check_key(" sk=1_000@choir ", "sk", 1_000, Some("choir"), None);
        check_key("sk=0:cap=20", "sk", 0, None, Some(20));
        check_key("sk=1000@choir:cap=20", "sk", 1_000, Some("choir"), Some(20));
    }

    #[test]
    fn an_error_explains_the_mistake_and_does_not_repeat_the_key() {
        check_invalid_key(
            "sk",
            "a key is written KEY=CREDITS[@WORKSPACE][:cap=N][:tier=NAME], for example sk_demo_one=500",
        );
        check_invalid_key("sk=", "credits must be a whole number, not ``");
        check_invalid_key("sk=-5", "credits must be a whole number, not `-5`");
        check_invalid_key("sk=many", "credits must be a whole number, not `many`");
        check_invalid_key("sk=5@", "a workspace's name follows the `@`, for example sk_demo_one=500@choir");
        check_invalid_key("sk=5:cap=x", "the cap must be a whole number, not `x`");
        check_invalid_key(
            "sk=5:lid=3",
            "`lid=3` is not an option of a key; the options are cap=N and tier=NAME",
        );
        check_invalid_key(
            "sk=5:tier=",
            "`tier=` is not an option of a key; the options are cap=N and tier=NAME",
        );
        check_invalid_key("sk=5:", "`` is not an option of a key; the options are cap=N and tier=NAME");
        check_invalid_key("=5", "key 1: the key is empty");
    }

    #[test]
    fn a_list_is_separated_by_commas_and_white_space() {
        let plan = Plan::parse("sk_one=500, sk_two=1000@choir:tier=free\n sk_three=1000@choir,").unwrap();
        assert_eq!(plan.keys[1].tier.as_deref(), Some("free"));
        assert_eq!(plan.keys.len(), 3);
        assert_eq!(plan.keys[2].workspace.as_deref(), Some("choir"));
    }

    #[test]
    fn an_invalid_or_contradictory_plan_is_refused() {
        for (text, expected) in [
            ("sk=5 =5", "key 2: the key is empty"),
            ("sk=5 sk=5", "key 2 is the same as an earlier one"),
            ("a=5@w b=6@w", "workspace `w` cannot have 5 and 6 credits: its keys must agree"),
        ] {
            assert_eq!(Plan::parse(text).unwrap_err().to_string(), expected);
        }
        let plan_with_duplicate = Plan::default()
            .with_workspace(WorkspacePlan::new("w", 1))
            .with_workspace(WorkspacePlan::new("w", 2));
        assert_eq!(
            plan_with_duplicate.validate().unwrap_err(),
            PlanError::DuplicateWorkspace("w".to_owned())
        );
    }

    #[test]
    fn keys_of_a_described_workspace_may_name_different_credits() {
        let plan = Plan {
            keys: vec![KeyPlan::parse("a=5@w").unwrap(), KeyPlan::parse("b=6@w").unwrap()],
            ..Plan::default().with_workspace(WorkspacePlan::new("w", 100))
        };
        assert_eq!(plan.validate(), Ok(()));
    }

    #[test]
    fn the_default_plan_is_valid() {
        assert_eq!(Plan::default().validate(), Ok(()));
    }
}
