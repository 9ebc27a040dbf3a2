//! The rows of agents and of the account itself: orders, tokens, cursors.

use super::super::kind::Kind;
use super::{ROW, ResourceRow};

#[rustfmt::skip] // a table
pub(super) static ROWS: &[ResourceRow] = &[
    ResourceRow {
        resource: "agent",
        paths: &[
            "convai/agents/{agent}", "convai/agent/{agent}", "convai/agents/*/branches/{agent branch}",
            "convai/agents/*/versions/{agent branch}",
        ],
        query: &[
            ("agent_id", Kind::Agent), ("agent_ids", Kind::Agent), ("branch_id", Kind::Branch),
            ("target_branch_id", Kind::Branch),
        ],
        body: &[("agent_id", Kind::Agent), ("agent_ids", Kind::Agent), ("branch_id", Kind::Branch)],
        created: &[
            (&["convai/agents/create", "convai/agents/{id}/duplicate"], &[
                (".agent_id", Kind::Agent), (".main_branch_id", Kind::Branch), (".initial_version_id", Kind::Branch),
            ]),
            (&["convai/agents/{id}/branches"], &[
                (".id", Kind::Branch), (".created_branch_id", Kind::Branch), (".created_version_id", Kind::Branch),
            ]),
        ],
        lists: &[
            (&["convai/agents"], &[("agents.agent_id", Kind::Agent)]),
            (&["convai/agents/{id}/branches"], &[("results.id", Kind::Branch), ("branches.id", Kind::Branch)]),
        ],
        ..ROW
    },
    ResourceRow {
        resource: "conversation",
        paths: &["convai/conversations/{conversation}"],
        query: &[("conversation_id", Kind::Conversation), ("parent_conversation_id", Kind::Conversation)],
        body: &[("conversation_id", Kind::Conversation)],
        created: &[(
            &[
                "convai/twilio/outbound-call", "convai/sip-trunk/outbound-call", "convai/exotel/outbound-call",
                "convai/whatsapp/outbound-call", "convai/whatsapp/outbound-message",
            ],
            &[(".conversation_id", Kind::Conversation)],
        )],
        lists: &[
            (&["convai/conversations"], &[("conversations.conversation_id", Kind::Conversation)]),
            (&["convai/conversation/token"], &[
                (".conversation_id", Kind::Conversation), (".token", Kind::Token),
            ]),
            (&["convai/conversation/get-signed-url", "convai/conversation/get_signed_url"], &[
                (".conversation_id", Kind::Conversation),
            ]),
        ],
        ..ROW
    },
    ResourceRow {
        resource: "phone number",
        paths: &["convai/phone-numbers/{phone number}", "convai/whatsapp-accounts/{phone number}"],
        body: &[
            ("agent_phone_number_id", Kind::PhoneNumber), ("phone_number_id", Kind::PhoneNumber),
            ("whatsapp_phone_number_id", Kind::PhoneNumber),
        ],
        created: &[(&["convai/phone-numbers"], &[(".phone_number_id", Kind::PhoneNumber)])],
        lists: &[(&["convai/phone-numbers", "convai/whatsapp-accounts"], &[("phone_number_id", Kind::PhoneNumber)])],
        ..ROW
    },
    ResourceRow {
        resource: "knowledge base",
        paths: &[
            "convai/knowledge-base/{document}", "convai/knowledge-base/crawl/{document}",
            "convai/agent-testing/folders/{document}",
        ],
        query: &[("parent_folder_id", Kind::Document), ("document_ids", Kind::Document)],
        body: &[
            ("knowledge_base.id", Kind::Document), ("document_ids", Kind::Document), ("document_id", Kind::Document),
            ("parent_folder_id", Kind::Document), ("move_to", Kind::Document),
        ],
        created: &[
            (
                &[
                    "convai/knowledge-base", "convai/knowledge-base/file", "convai/knowledge-base/url",
                    "convai/knowledge-base/text", "convai/knowledge-base/folder", "convai/agent-testing/folders",
                ],
                &[(".id", Kind::Document)],
            ),
            (&["convai/knowledge-base/crawl"], &[(".id", Kind::Document), (".root_folder_id", Kind::Document)]),
        ],
        lists: &[(&["convai/knowledge-base"], &[("documents.id", Kind::Document)])],
        ..ROW
    },
    ResourceRow {
        resource: "tool / MCP server / secret / env var / test",
        paths: &[
            "convai/tools/{tool}", "convai/mcp-servers/{tool server}", "convai/secrets/{secret}",
            "convai/environment-variables/{variable}", "convai/agent-testing/{test}",
            "convai/test-invocations/{test}",
        ],
        body: &[
            ("tool_ids", Kind::Tool), ("tool_id", Kind::Tool), ("mcp_server_ids", Kind::McpServer),
            ("mcp_server_id", Kind::McpServer), ("secret_id", Kind::Secret), ("test_id", Kind::Test),
            ("test_ids", Kind::Test), ("test_invocation_id", Kind::Test),
        ],
        created: &[
            (&["convai/tools"], &[(".id", Kind::Tool)]),
            (&["convai/mcp-servers"], &[(".id", Kind::McpServer)]),
            (&["convai/secrets"], &[(".secret_id", Kind::Secret)]),
            (&["convai/environment-variables"], &[(".id", Kind::Variable)]),
            (&["convai/agent-testing/create", "convai/agents/{id}/run-tests"], &[(".id", Kind::Test)]),
        ],
        lists: &[
            (&["convai/tools"], &[("tools.id", Kind::Tool)]),
            (&["convai/mcp-servers"], &[("mcp_servers.id", Kind::McpServer)]),
            (&["convai/secrets"], &[("secrets.secret_id", Kind::Secret)]),
            (&["convai/environment-variables"], &[("environment_variables.id", Kind::Variable)]),
            (&["convai/agent-testing"], &[("tests.id", Kind::Test)]),
            (&["convai/test-invocations"], &[("results.id", Kind::Test)]),
        ],
        ..ROW
    },
    ResourceRow {
        resource: "batch call",
        paths: &["convai/batch-calling/{batch call}"],
        body: &[("batch_id", Kind::Batch)],
        created: &[(&["convai/batch-calling/submit"], &[(".id", Kind::Batch)])],
        lists: &[(&["convai/batch-calling/workspace"], &[("batch_calls.id", Kind::Batch)])],
        ..ROW
    },
    ResourceRow {
        resource: "speech engine",
        paths: &["speech-engine/{speech engine}"],
        created: &[(&["speech-engine"], &[(".speech_engine_id", Kind::SpeechEngine)])],
        lists: &[(&["speech-engine"], &[("speech_engine_id", Kind::SpeechEngine)])],
        ..ROW
    },
    ResourceRow {
        resource: "productions",
        paths: &[
            "productions/orders/{order}", "productions/orders/*/media/{order media}",
            "productions/orders/*/items/{order item}",
        ],
        body: &[("order_id", Kind::Order), ("media_id", Kind::Media), ("item_id", Kind::Item)],
        created: &[
            (&["productions/orders"], &[(".order_id", Kind::Order)]),
            (&["productions/orders/{id}/media"], &[(".media_id", Kind::Media)]),
            (&["productions/orders/{id}/items"], &[(".item_id", Kind::Item)]),
        ],
        lists: &[(&["productions/orders"], &[("orders.order_id", Kind::Order)])],
        ..ROW
    },
    // Denied by default; such a request is not forwarded.
    ResourceRow {
        resource: "workspace webhook / service account / key / group",
        paths: &["workspace/webhooks/{webhook}"],
        body: &[("webhook_id", Kind::Webhook), ("webhook_ids", Kind::Webhook)],
        created: &[(&["workspace/webhooks"], &[(".webhook_id", Kind::Webhook)])],
        lists: &[(&["workspace/webhooks"], &[("webhooks.webhook_id", Kind::Webhook)])],
        ..ROW
    },
    ResourceRow {
        resource: "single-use token",
        query: &[("token", Kind::Token), ("single_use_token", Kind::Token)],
        body: &[("single_use_token", Kind::Token)],
        created: &[
            (&["single-use-token/{id}"], &[(".token", Kind::Token)]),
            (&["convai/realtime/client_secrets"], &[(".value", Kind::Token)]),
        ],
        ..ROW
    },
    ResourceRow {
        resource: "signed URL",
        query: &[("conversation_signature", Kind::Signature)],
        lists: &[(&["convai/conversation/get-signed-url", "convai/conversation/get_signed_url"], &[
            (".signed_url", Kind::Signature),
        ])],
        ..ROW
    },
    ResourceRow {
        resource: "list cursor",
        query: &[
            ("next_page_token", Kind::Cursor), ("page_token", Kind::Cursor), ("cursor", Kind::Cursor),
            ("last_sort_id", Kind::Cursor),
        ],
        // Includes the routes of the other rows: any of their responses may contain a cursor.
        lists: &[(
            &[
                "dubbing", "dubbing/project", "music/finetunes", "speech-engine", "convai/tags", "convai/users",
                "convai/agents/{id}/topics", "convai/agents/{id}/triage-tickets",
                "convai/conversations/messages/smart-search", "convai/conversations/messages/text-search",
                "convai/conversations/{id}/sip-messages", "convai/phone-numbers/{id}/sip-messages",
                "convai/knowledge-base/crawl", "convai/knowledge-base/search",
                "convai/knowledge-base/{id}/chunks", "convai/knowledge-base/{id}/dependent-agents",
                "convai/secrets/{id}/dependencies/{id}", "convai/tools/{id}/dependent-agents",
                "convai/tools/{id}/executions", "workspace/audit-logs",
            ],
            &[],
        )],
        ..ROW
    },
];
