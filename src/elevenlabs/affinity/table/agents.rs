//! Lists the rows of the table of resources for agents and the objects that they use (conversations, phone numbers,
//! knowledge bases, tools, MCP servers, secrets, environment variables, tests and batch calls). Also lists the rows for
//! speech engines, productions, webhooks, tokens, signed URLs and the cursors of lists.

use super::super::kind::ResourceKind;
use super::{EMPTY_ROW, ResourceRow};

/// The rows, each with the locations of the identifiers of one resource.
#[rustfmt::skip] // Each line has several fields.
pub(super) static ROWS: &[ResourceRow] = &[
    ResourceRow {
        resource: "agent",
        paths: &[
            "convai/agents/{agent}", "convai/agent/{agent}", "convai/agents/*/branches/{agent branch}",
            "convai/agents/*/versions/{agent branch}",
        ],
        query: &[
            ("agent_id", ResourceKind::Agent), ("agent_ids", ResourceKind::Agent), ("branch_id", ResourceKind::Branch),
            ("target_branch_id", ResourceKind::Branch),
        ],
        body: &[
            ("agent_id", ResourceKind::Agent), ("agent_ids", ResourceKind::Agent), ("branch_id", ResourceKind::Branch),
        ],
        created: &[
            (&["convai/agents/create", "convai/agents/{id}/duplicate"], &[
                (".agent_id", ResourceKind::Agent), (".main_branch_id", ResourceKind::Branch),
                (".initial_version_id", ResourceKind::Branch),
            ]),
            (&["convai/agents/{id}/branches"], &[
                (".id", ResourceKind::Branch), (".created_branch_id", ResourceKind::Branch),
                (".created_version_id", ResourceKind::Branch),
            ]),
        ],
        lists: &[
            (&["convai/agents"], &[("agents.agent_id", ResourceKind::Agent)]),
            (&["convai/agents/{id}/branches"], &[
                ("results.id", ResourceKind::Branch), ("branches.id", ResourceKind::Branch),
            ]),
        ],
        ..EMPTY_ROW
    },
    ResourceRow {
        resource: "conversation",
        paths: &["convai/conversations/{conversation}"],
        query: &[
            ("conversation_id", ResourceKind::Conversation), ("parent_conversation_id", ResourceKind::Conversation),
        ],
        body: &[("conversation_id", ResourceKind::Conversation)],
        created: &[(
            &[
                "convai/twilio/outbound-call", "convai/sip-trunk/outbound-call", "convai/exotel/outbound-call",
                "convai/whatsapp/outbound-call", "convai/whatsapp/outbound-message",
            ],
            &[(".conversation_id", ResourceKind::Conversation)],
        )],
        lists: &[
            (&["convai/conversations"], &[("conversations.conversation_id", ResourceKind::Conversation)]),
            (&["convai/conversation/token"], &[
                (".conversation_id", ResourceKind::Conversation), (".token", ResourceKind::Token),
            ]),
            (&["convai/conversation/get-signed-url", "convai/conversation/get_signed_url"], &[
                (".conversation_id", ResourceKind::Conversation),
            ]),
        ],
        ..EMPTY_ROW
    },
    ResourceRow {
        resource: "phone number",
        paths: &["convai/phone-numbers/{phone number}", "convai/whatsapp-accounts/{phone number}"],
        body: &[
            ("agent_phone_number_id", ResourceKind::PhoneNumber), ("phone_number_id", ResourceKind::PhoneNumber),
            ("whatsapp_phone_number_id", ResourceKind::PhoneNumber),
        ],
        created: &[(&["convai/phone-numbers"], &[(".phone_number_id", ResourceKind::PhoneNumber)])],
        lists: &[(&["convai/phone-numbers", "convai/whatsapp-accounts"], &[
            ("phone_number_id", ResourceKind::PhoneNumber),
        ])],
        ..EMPTY_ROW
    },
    ResourceRow {
        resource: "knowledge base",
        paths: &[
            "convai/knowledge-base/{document}", "convai/knowledge-base/crawl/{document}",
            "convai/agent-testing/folders/{document}",
        ],
        query: &[("parent_folder_id", ResourceKind::Document), ("document_ids", ResourceKind::Document)],
        body: &[
            ("knowledge_base.id", ResourceKind::Document), ("document_ids", ResourceKind::Document),
            ("document_id", ResourceKind::Document),
            ("parent_folder_id", ResourceKind::Document), ("move_to", ResourceKind::Document),
        ],
        created: &[
            (
                &[
                    "convai/knowledge-base", "convai/knowledge-base/file", "convai/knowledge-base/url",
                    "convai/knowledge-base/text", "convai/knowledge-base/folder", "convai/agent-testing/folders",
                ],
                &[(".id", ResourceKind::Document)],
            ),
            (&["convai/knowledge-base/crawl"], &[
                (".id", ResourceKind::Document), (".root_folder_id", ResourceKind::Document),
            ]),
        ],
        lists: &[(&["convai/knowledge-base"], &[("documents.id", ResourceKind::Document)])],
        ..EMPTY_ROW
    },
    ResourceRow {
        resource: "tool / MCP server / secret / env var / test",
        paths: &[
            "convai/tools/{tool}", "convai/mcp-servers/{tool server}", "convai/secrets/{secret}",
            "convai/environment-variables/{variable}", "convai/agent-testing/{test}",
            "convai/test-invocations/{test}",
        ],
        body: &[
            ("tool_ids", ResourceKind::Tool), ("tool_id", ResourceKind::Tool),
            ("mcp_server_ids", ResourceKind::McpServer),
            ("mcp_server_id", ResourceKind::McpServer), ("secret_id", ResourceKind::Secret),
            ("test_id", ResourceKind::Test),
            ("test_ids", ResourceKind::Test), ("test_invocation_id", ResourceKind::Test),
        ],
        created: &[
            (&["convai/tools"], &[(".id", ResourceKind::Tool)]),
            (&["convai/mcp-servers"], &[(".id", ResourceKind::McpServer)]),
            (&["convai/secrets"], &[(".secret_id", ResourceKind::Secret)]),
            (&["convai/environment-variables"], &[(".id", ResourceKind::Variable)]),
            (&["convai/agent-testing/create", "convai/agents/{id}/run-tests"], &[(".id", ResourceKind::Test)]),
        ],
        lists: &[
            (&["convai/tools"], &[("tools.id", ResourceKind::Tool)]),
            (&["convai/mcp-servers"], &[("mcp_servers.id", ResourceKind::McpServer)]),
            (&["convai/secrets"], &[("secrets.secret_id", ResourceKind::Secret)]),
            (&["convai/environment-variables"], &[("environment_variables.id", ResourceKind::Variable)]),
            (&["convai/agent-testing"], &[("tests.id", ResourceKind::Test)]),
            (&["convai/test-invocations"], &[("results.id", ResourceKind::Test)]),
        ],
        ..EMPTY_ROW
    },
    ResourceRow {
        resource: "batch call",
        paths: &["convai/batch-calling/{batch call}"],
        body: &[("batch_id", ResourceKind::Batch)],
        created: &[(&["convai/batch-calling/submit"], &[(".id", ResourceKind::Batch)])],
        lists: &[(&["convai/batch-calling/workspace"], &[("batch_calls.id", ResourceKind::Batch)])],
        ..EMPTY_ROW
    },
    ResourceRow {
        resource: "speech engine",
        paths: &["speech-engine/{speech engine}"],
        created: &[(&["speech-engine"], &[(".speech_engine_id", ResourceKind::SpeechEngine)])],
        lists: &[(&["speech-engine"], &[("speech_engine_id", ResourceKind::SpeechEngine)])],
        ..EMPTY_ROW
    },
    ResourceRow {
        resource: "productions",
        paths: &[
            "productions/orders/{order}", "productions/orders/*/media/{order media}",
            "productions/orders/*/items/{order item}",
        ],
        body: &[("order_id", ResourceKind::Order), ("media_id", ResourceKind::Media), ("item_id", ResourceKind::Item)],
        created: &[
            (&["productions/orders"], &[(".order_id", ResourceKind::Order)]),
            (&["productions/orders/{id}/media"], &[(".media_id", ResourceKind::Media)]),
            (&["productions/orders/{id}/items"], &[(".item_id", ResourceKind::Item)]),
        ],
        lists: &[(&["productions/orders"], &[("orders.order_id", ResourceKind::Order)])],
        ..EMPTY_ROW
    },
    // Clients may not call the endpoints of the next row unless the configuration allows it.
    ResourceRow {
        resource: "workspace webhook / service account / key / group",
        paths: &["workspace/webhooks/{webhook}"],
        body: &[("webhook_id", ResourceKind::Webhook), ("webhook_ids", ResourceKind::Webhook)],
        created: &[(&["workspace/webhooks"], &[(".webhook_id", ResourceKind::Webhook)])],
        lists: &[(&["workspace/webhooks"], &[("webhooks.webhook_id", ResourceKind::Webhook)])],
        ..EMPTY_ROW
    },
    ResourceRow {
        resource: "single-use token",
        query: &[("token", ResourceKind::Token), ("single_use_token", ResourceKind::Token)],
        body: &[("single_use_token", ResourceKind::Token)],
        created: &[
            (&["single-use-token/{id}"], &[(".token", ResourceKind::Token)]),
            (&["convai/realtime/client_secrets"], &[(".value", ResourceKind::Token)]),
        ],
        ..EMPTY_ROW
    },
    ResourceRow {
        resource: "signed URL",
        query: &[("conversation_signature", ResourceKind::Signature)],
        lists: &[(&["convai/conversation/get-signed-url", "convai/conversation/get_signed_url"], &[
            (".signed_url", ResourceKind::Signature),
        ])],
        ..EMPTY_ROW
    },
    ResourceRow {
        resource: "list cursor",
        query: &[
            ("next_page_token", ResourceKind::Cursor), ("page_token", ResourceKind::Cursor),
            ("cursor", ResourceKind::Cursor),
            ("last_sort_id", ResourceKind::Cursor),
        ],
        // These lists contain no identifiers, but their responses may contain a cursor. The responses of the other
        // rows may contain a cursor as well.
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
        ..EMPTY_ROW
    },
];
