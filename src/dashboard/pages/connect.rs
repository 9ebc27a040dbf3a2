//! Renders the page Connect: the base URL for clients, whether they need a token, and examples of programs with both.

use maud::{Markup, html};

use crate::dashboard::PageRequest;

/// Renders the page.
pub(in crate::dashboard) fn render_connect(request: &PageRequest<'_>) -> Markup {
    let url = request.client_url();
    let needs_token = request.admin.config.load().clients.require_token();
    let token = if needs_token { "YOUR_CLIENT_TOKEN" } else { "anything" };
    let host = url.split_once("://").map_or(url.as_str(), |(_, host)| host);
    let websocket =
        if url.starts_with("https://") { format!("wss://{host}") } else { format!("ws://{host}") };
    html! {
        h1 { "Connect" }
        p { "Keep your ElevenLabs SDK, and change its base URL to " code data-copy { (url) } "." }
        @if needs_token {
            p { "Each app needs the token of a client instead of an ElevenLabs key. " a href="clients" { "Add a client" } " to get one." }
        } @else {
            p { "Programs on this machine need no token. The SDKs require an API key, so they send any text." }
        }
        (render_snippet("Python", &format!("from elevenlabs import ElevenLabs\n\nclient = ElevenLabs(base_url=\"{url}\", api_key=\"{token}\")\naudio = client.text_to_speech.convert(\n    voice_id=\"JBFqnCBsd6RMkjVDRZzb\", model_id=\"eleven_flash_v2_5\", text=\"Hello\",\n)")))
        (render_snippet("JavaScript", &format!("import {{ ElevenLabsClient }} from \"@elevenlabs/elevenlabs-js\";\n\nconst client = new ElevenLabsClient({{ baseUrl: \"{url}\", apiKey: \"{token}\" }});")))
        (render_snippet("curl", &format!("curl {url}/v1/text-to-speech/JBFqnCBsd6RMkjVDRZzb \\\n  -H \"xi-api-key: {token}\" -H \"content-type: application/json\" \\\n  -d '{{\"text\": \"Hello\", \"model_id\": \"eleven_flash_v2_5\"}}' -o hello.mp3")))
        (render_snippet("LiveKit agents", &format!("from livekit.plugins import elevenlabs\n\ntts = elevenlabs.TTS(base_url=\"{url}/v1\", api_key=\"{token}\")")))
        (render_snippet("Pipecat", &format!("from pipecat.services.elevenlabs.tts import ElevenLabsTTSService\n\ntts = ElevenLabsTTSService(url=\"{websocket}\", api_key=\"{token}\", voice_id=\"JBFqnCBsd6RMkjVDRZzb\")")))
        (render_snippet("A program with a fixed host", &format!("export ELEVENLABS_API_BASE={url}")))
    }
}

/// Renders an example with a title.
fn render_snippet(title: &str, code: &str) -> Markup {
    html! {
        section.snippet {
            h2 { (title) }
            pre tabindex="0" role="region" aria-label={ "Code: " (title) } { code data-copy { (code) } }
        }
    }
}
