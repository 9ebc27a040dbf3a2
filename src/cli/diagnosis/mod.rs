//! Examines the configuration, the machine, the network and the running Keychoir, and describes each fact as a
//! [`Finding`]. `keychoir doctor` prints the findings of all examinations, and `keychoir check` those of startup and,
//! if requested, of the network. `keychoir serve` uses only the warning about free plans.

mod local;
mod online;
mod server;
mod startup;

use std::fmt;

use serde::Serialize;
use serde_json::{Value, json};

use super::color::{Palette, Tone};

pub(super) use local::{examine_files, examine_storage};
pub(super) use online::examine_online;
pub(super) use server::examine_server;
pub(super) use startup::examine_start;

/// The severity of a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Severity {
    /// The examined part works.
    Ok,
    /// The examined part works, but an operator should act.
    Warning,
    /// The examined part does not work.
    Problem,
}

impl Severity {
    fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Problem => "problem",
        }
    }

    fn tone(self) -> Tone {
        match self {
            Self::Ok => Tone::Good,
            Self::Warning => Tone::Warning,
            Self::Problem => Tone::Bad,
        }
    }
}

/// One fact that an examination found. It contains no secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Finding {
    pub(super) severity: Severity,
    /// The examined part in one word.
    pub(super) area: &'static str,
    /// The fact in one line.
    pub(super) message: String,
    /// The next step for the operator.
    pub(super) next_step: Option<String>,
}

impl Finding {
    fn new(severity: Severity, area: &'static str, message: impl fmt::Display) -> Self {
        // Messages of other libraries may have several lines.
        let message = message.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        Self { severity, area, message, next_step: None }
    }

    pub(super) fn ok(area: &'static str, message: impl fmt::Display) -> Self {
        Self::new(Severity::Ok, area, message)
    }

    pub(super) fn warning(area: &'static str, message: impl fmt::Display) -> Self {
        Self::new(Severity::Warning, area, message)
    }

    pub(super) fn problem(area: &'static str, message: impl fmt::Display) -> Self {
        Self::new(Severity::Problem, area, message)
    }

    /// Adds the next step for the operator.
    pub(super) fn with_next_step(self, step: impl Into<String>) -> Self {
        Self { next_step: Some(step.into()), ..self }
    }

    /// Formats the finding in one line.
    pub(super) fn format(&self, palette: Palette) -> String {
        let severity = format!("{:<7}", self.severity.as_str());
        format!("{}  {:<8}  {self}", palette.paint(self.severity.tone(), &severity), self.area)
    }
}

/// Formats the message and the next step.
impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        match &self.next_step {
            Some(step) => write!(f, ". Next: {step}"),
            None => Ok(()),
        }
    }
}

/// Returns the highest severity, or [`Severity::Ok`] without findings.
pub(super) fn worst_severity(findings: &[Finding]) -> Severity {
    findings.iter().map(|finding| finding.severity).max().unwrap_or(Severity::Ok)
}

/// Returns the document with all findings.
pub(super) fn to_json(findings: &[Finding]) -> Value {
    json!({"status": worst_severity(findings), "findings": findings})
}

/// The name of the plan without a subscription, as the provider reports it.
pub(super) const FREE_PLAN: &str = "free";

/// Describes the consequences of `count` keys on free plans.
pub(super) fn free_plans_message(count: usize) -> String {
    format!(
        "{count} keys are of free plans: ElevenLabs' terms discourage many free accounts, and its abuse detection \
         finds them; pool only workspaces that you are entitled to use"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_is_one_line_with_its_next_step() {
        let finding = Finding::warning("clock", "a\n  b").with_next_step("set the clock");
        assert_eq!(finding.format(Palette::default()), "warning  clock     a b. Next: set the clock");
        assert_eq!(Finding::ok("files", "x").to_string(), "x");
    }

    #[test]
    fn the_highest_severity_of_the_findings_is_the_severity_of_all() {
        let (ok, warning) = (Finding::ok("a", ""), Finding::warning("a", ""));
        assert_eq!(worst_severity(&[]), Severity::Ok);
        assert_eq!(worst_severity(&[ok.clone(), warning.clone()]), Severity::Warning);
        assert_eq!(worst_severity(&[warning, Finding::problem("a", ""), ok]), Severity::Problem);
        assert_eq!(to_json(&[])["status"], "ok");
    }
}
