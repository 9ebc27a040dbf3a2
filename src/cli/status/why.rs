//! Explains the states of keys: one line below the table of `keychoir status` for each key that is not active or is
//! tried last for some requests, and all details of one key for `--why`.

use std::fmt::Write as _;

use serde::Deserialize;

use crate::cli::table::truncate;

/// Maximum number of characters of a line below the table.
const MAX_LINE_CHARS: usize = 80;

/// The fields of a key in `/api/keychoir-keys` that explain its state.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct ExplainedKey {
    short_key: String,
    name: Option<String>,
    plan: Option<String>,
    state: String,
    reason: Option<String>,
    advice: Option<String>,
    since: Option<String>,
    until: Option<String>,
    possible: String,
    evidence: Vec<ReportedEvidence>,
    cannot: Vec<ReportedRestriction>,
}

/// A refusal that has changed the state of the key.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ReportedEvidence {
    claim: String,
    strength: String,
    at: String,
    status: Option<u16>,
    message: String,
    route: String,
    request_id: String,
}

/// A refusal because of which the key is tried last for similar requests.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ReportedRestriction {
    what: String,
    status: Option<u16>,
    message: String,
    request_id: String,
    since: String,
    until: String,
}

/// Formats one line for each key that is not active or is tried last for some requests. Returns an empty string if
/// there is no such key.
pub(super) fn format_reasons(keys: &[ExplainedKey]) -> String {
    let mut text = String::new();
    for (index, key) in keys.iter().enumerate() {
        let number = index + 1;
        if let Some(reason) = &key.reason {
            let until = key.until.as_deref().map(|until| format!(" until {}", format_minute(until)));
            let line = format!("key {number}: {}{}", reason.replace('_', " "), until.unwrap_or_default());
            let _ = write!(text, "\n{}", truncate(&line, MAX_LINE_CHARS));
        } else if let Some(restriction) = key.cannot.first() {
            let more_text = match key.cannot.len() - 1 {
                0 => String::new(),
                count => format!(" and {count} more"),
            };
            let line = format!("key {number}: tried last for {}{more_text}", restriction.what);
            let _ = write!(text, "\n{}", truncate(&line, MAX_LINE_CHARS));
        }
    }
    if !text.is_empty() {
        text.push_str("\nFor all details: keychoir status --why NUMBER");
    }
    text
}

/// Formats all details of the key whose number, name or short form is `requested_key`. Returns an error message if the
/// key is unknown.
pub(super) fn explain(keys: &[ExplainedKey], requested_key: &str) -> Result<String, String> {
    let is_requested_key = |(index, key): &(usize, &ExplainedKey)| {
        requested_key.parse() == Ok(index + 1)
            || key.name.as_deref() == Some(requested_key)
            || key.short_key == requested_key
    };
    let Some((index, key)) = keys.iter().enumerate().find(is_requested_key) else {
        return Err(format!(
            "unknown key: use its number from 1 to {}, its name, or its short form",
            keys.len()
        ));
    };
    let mut text = format!("key {}  {}", index + 1, key.short_key);
    let name = key.name.as_deref().map(|name| format!("  {name}"));
    let plan = key.plan.as_deref().map(|plan| format!("  plan {plan}"));
    text.extend([name, plan].into_iter().flatten());
    let _ = write!(text, "\nstate     {}", key.state.replace('_', " "));
    if let Some(reason) = &key.reason {
        let _ = write!(text, "\nreason    {}", reason.replace('_', " "));
    }
    for (label, at) in [("since", &key.since), ("until", &key.until)] {
        if let Some(at) = at {
            let _ = write!(text, "\n{label:<9} {}", format_minute(at));
        }
    }
    let _ = write!(text, "\npossible  {}", key.possible);
    if let Some(advice) = &key.advice {
        let _ = write!(text, "\nadvice    {advice}");
    }
    for evidence in &key.evidence {
        let ReportedEvidence { claim, strength, at, status, message, route, request_id } = evidence;
        let _ = write!(
            text,
            "\n\nrefused {}: {} ({strength})\n  {}{message}\n  {route}  request {request_id}",
            format_minute(at),
            claim.replace('_', " "),
            status.map(|status| format!("{status} ")).unwrap_or_default(),
        );
    }
    for restriction in &key.cannot {
        let ReportedRestriction { what, status, message, request_id, since, until } = restriction;
        let _ = write!(
            text,
            "\n\ntried last until {} for {what}\n  since {}: {}{message}\n  request {request_id}",
            format_minute(until),
            format_minute(since),
            status.map(|status| format!("{status} ")).unwrap_or_default(),
        );
    }
    Ok(text)
}

/// Formats an RFC 3339 timestamp of the document as `2026-12-01 00:00Z`.
fn format_minute(at: &str) -> String {
    match (at.get(..10), at.get(11..16)) {
        (Some(day), Some(time)) => format!("{day} {time}Z"),
        _ => at.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns an exhausted key, a key with a restriction, and a key without either.
    fn sample_keys() -> Vec<ExplainedKey> {
        let json = r#"[
            {"shortKey": "sk_1...1", "name": "main", "plan": "free", "state": "exhausted", "reason": "exhausted",
             "since": "2026-11-29T06:15:00.000Z", "until": "2026-12-01T00:00:00.000Z", "possible": "reading",
             "evidence": [{"claim": "credits", "strength": "numbers", "at": "2026-11-29T06:15:00.000Z",
                "status": 401, "message": "quota_exceeded: you have 0", "route": "/v1/x", "requestId": "r1"}]},
            {"shortKey": "sk_2...2", "state": "active", "possible": "everything but", "cannot": [
                {"what": "output format pcm_44100", "status": 403, "message": "no", "requestId": "r2",
                 "since": "2026-11-29T06:15:00.000Z", "until": "2026-11-29T07:15:00.000Z"}]},
            {"shortKey": "sk_3...3", "state": "active", "possible": "everything"}]"#;
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn a_key_that_is_exhausted_or_restricted_has_a_line() {
        let expected = "\nkey 1: exhausted until 2026-12-01 00:00Z\
                        \nkey 2: tried last for output format pcm_44100\
                        \nFor all details: keychoir status --why NUMBER";
        assert_eq!(format_reasons(&sample_keys()), expected);
        assert_eq!(format_reasons(&sample_keys()[2..]), "");
    }

    #[test]
    fn all_details_of_one_key_are_explained() {
        for requested_key in ["1", "main", "sk_1...1"] {
            let text = explain(&sample_keys(), requested_key).unwrap();
            for part in [
                "key 1  sk_1...1  main  plan free",
                "until     2026-12-01 00:00Z",
                "401 quota_exceeded: you have 0",
                "request r1",
            ] {
                assert!(text.contains(part), "{part:?} must be in the explanation:\n{text}");
            }
        }
        assert!(
            explain(&sample_keys(), "2")
                .unwrap()
                .contains("tried last until 2026-11-29 07:15Z for output format")
        );
        assert!(explain(&sample_keys(), "9").unwrap_err().contains("from 1 to 3"));
    }
}
