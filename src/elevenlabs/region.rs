//! Finds the region of ElevenLabs that a host serves. Each region has its own host, and a key is valid only at the host
//! of its region. The usage record of an attempt contains its region.

/// Returns the name of the region that a host serves: `global`, `us`, or a region with data residency such as
/// `eu`. Returns the host itself if it is not a host of ElevenLabs' API.
///
/// Source: the environments of the provider's Python SDK 2.78 (`api.elevenlabs.io`, `api.us.elevenlabs.io`,
/// `api.eu.residency.elevenlabs.io`).
#[must_use]
pub fn region_of_host(host: &str) -> &str {
    let Some(name) = host.strip_suffix("elevenlabs.io").and_then(|name| name.strip_prefix("api.")) else {
        return host;
    };
    let name = name.strip_suffix("residency.").unwrap_or(name);
    match name.strip_suffix('.') {
        Some(region) if !region.contains('.') => region,
        None if name.is_empty() => "global",
        Some(_) | None => host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_api_host_of_the_provider_has_a_region() {
        for (host, region) in [
            ("api.elevenlabs.io", "global"),
            ("api.us.elevenlabs.io", "us"),
            ("api.eu.residency.elevenlabs.io", "eu"),
            ("api.in.residency.elevenlabs.io", "in"),
            ("api.a.b.elevenlabs.io", "api.a.b.elevenlabs.io"),
            ("api.fakeelevenlabs.io", "api.fakeelevenlabs.io"),
            ("elevenlabs.io", "elevenlabs.io"),
            ("127.0.0.1", "127.0.0.1"),
        ] {
            assert_eq!(region_of_host(host), region);
        }
    }
}
