//! Builds the provider's account responses: the user, and the subscription with its credits, voice slots and invoices.

use serde_json::{Value, json};

use crate::secret::ApiKey;

use super::accounts::{Key, Workspace};
use super::plan::{Billing, ReportedLimit};

/// Builds the response to `GET /v1/user`: the user of the OpenAPI document with the `workspace_id` of current SDKs.
pub(super) fn user_document(key: &Key, workspace: &Workspace) -> Value {
    let preview = ApiKey::new(&key.plan.key).map(|key| key.short().to_string()).ok();
    json!({
        "user_id": format!("user-of-{}", workspace.plan.name),
        "workspace_id": workspace.plan.name,
        "subscription": subscription_document(workspace),
        "is_new_user": false,
        "can_use_delayed_payment_methods": false,
        "is_onboarding_completed": true,
        "is_onboarding_checklist_completed": true,
        "show_compliance_terms": false,
        "first_name": "Simulator",
        "is_api_key_hashed": true,
        "xi_api_key_preview": preview,
        "referral_link_code": null,
        "partnerstack_partner_default_link": null,
        "created_at": 1_753_999_199,
        "seat_type": "workspace_member",
    })
}

/// Builds the response to `GET /v1/user/subscription`: the subscription of the user with its invoices.
pub(super) fn subscription_with_invoices(workspace: &Workspace) -> Value {
    let is_past_due = workspace.plan.billing == Billing::PastDue;
    let next_payment = match workspace.plan.reported_limit {
        ReportedLimit::Credits => Value::from(workspace.resets_at.0 / 1_000),
        ReportedLimit::Zero | ReportedLimit::Absent => Value::Null,
    };
    let invoice = json!({
        "amount_due_cents": 2_200,
        "subtotal_cents": 2_200,
        "tax_cents": 0,
        "discounts": [],
        "next_payment_attempt_unix": next_payment,
        "payment_intent_status": "processing",
        // The provider's spelling.
        "payment_intent_statusses": ["processing"],
    });
    let mut document = subscription_document(workspace);
    document["next_invoice"] = if workspace.plan.tier == "free" { Value::Null } else { invoice.clone() };
    document["open_invoices"] = if is_past_due { json!([invoice]) } else { json!([]) };
    document["has_open_invoices"] = is_past_due.into();
    document["pending_change"] = Value::Null;
    document
}

/// Builds the subscription that both responses contain.
fn subscription_document(workspace: &Workspace) -> Value {
    let plan = &workspace.plan;
    let status = match plan.billing {
        Billing::Active if plan.tier == "free" => "free",
        Billing::Active => "active",
        Billing::PastDue => "past_due",
        Billing::FreeDisabled => "free_disabled",
    };
    let mut document = json!({
        "tier": plan.tier,
        "character_count": workspace.used,
        "character_limit": plan.credits,
        "max_character_limit_extension": 0,
        "max_credit_limit_extension": 0,
        "can_extend_character_limit": false,
        "allowed_to_extend_character_limit": false,
        "next_character_count_reset_unix": workspace.resets_at.0 / 1_000,
        "voice_slots_used": workspace.voice_slots_used(),
        "professional_voice_slots_used": workspace.professional_voices.len(),
        "professional_voice_slots_used_in_workspace": workspace.professional_voices.len(),
        "voice_limit": plan.max_voices(),
        "max_voice_add_edits": 95,
        "voice_add_edit_counter": workspace.added_voices,
        "professional_voice_limit": plan.max_professional_voices(),
        "can_extend_voice_limit": false,
        "can_use_instant_voice_cloning": plan.can_clone(),
        "can_use_professional_voice_cloning": plan.max_professional_voices() > 0,
        "currency": "usd",
        "current_overage": { "amount": "0", "currency": "usd" },
        "status": status,
        "billing_period": "monthly_period",
        "character_refresh_period": "monthly_period",
        "has_used_starter_coupon_on_account": false,
        "has_used_creator_coupon_on_account": false,
    });
    match plan.reported_limit {
        ReportedLimit::Credits => return document,
        ReportedLimit::Zero => document["character_limit"] = 0.into(),
        ReportedLimit::Absent => {
            if let Some(members) = document.as_object_mut() {
                members.remove("character_limit");
            }
        }
    }
    // Without a reported limit, the document has no reset date.
    document["next_character_count_reset_unix"] = Value::Null;
    document
}
