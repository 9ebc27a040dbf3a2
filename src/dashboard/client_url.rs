//! The address that clients use, as the page with the snippets shows it.

use serde_json::Value;

/// Returns the base URL for clients. It is the address at which the browser reached the dashboard, unless operators
/// have an address of their own (`admin.listen`). In that case, it is the first TCP address of `server.listen`, on
/// the host of the browser's address if it is a wildcard.
pub(super) fn client_url(base_url: &str, settings: &Value) -> String {
    let value = |name: &str| {
        let settings = settings.as_array().map_or(&[][..], Vec::as_slice);
        let setting = settings.iter().find(|setting| setting["name"] == name);
        setting.and_then(|setting| setting["value"].as_str()).unwrap_or_default()
    };
    if value("admin.listen").trim_matches('"').is_empty() {
        return base_url.to_owned();
    }
    let addresses =
        value("server.listen").split(['"', ',', '[', ' ']).map(|address| address.trim_end_matches(']'));
    let address =
        addresses.filter(|address| !address.contains('/')).find_map(|address| address.rsplit_once(':'));
    let Some((host, port)) = address.filter(|(_, port)| !port.is_empty()) else { return base_url.to_owned() };
    let host = if matches!(host, "0.0.0.0" | "::" | "*" | "") { browser_host(base_url) } else { host };
    format!("http://{host}:{port}")
}

fn browser_host(base_url: &str) -> &str {
    let authority = base_url.split_once("://").map_or(base_url, |(_, authority)| authority);
    let authority = authority.split('/').next().unwrap_or_default();
    match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
        Some(_) | None => authority,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[track_caller]
    fn check(admin_listen: &str, server_listen: &str, expected: &str) {
        let settings = json!([
            {"name": "server.listen", "value": server_listen},
            {"name": "admin.listen", "value": admin_listen},
        ]);
        assert_eq!(client_url("http://keys.lan:9000", &settings), expected);
    }

    #[test]
    fn clients_use_the_address_of_the_browser_or_that_of_the_server() {
        check("\"\"", "\"127.0.0.1:11011\"", "http://keys.lan:9000");
        check("\"127.0.0.1:9000\"", "\"127.0.0.1:11011\"", "http://127.0.0.1:11011");
        check("\"0.0.0.0:9000\"", "\"0.0.0.0:11011\"", "http://keys.lan:11011");
        check("\"0.0.0.0:9000\"", "[\"unix:/run/k.sock\", \"10.0.0.5:80\"]", "http://10.0.0.5:80");
        check("\"unix:/run/a.sock\"", "\"unix:/run/k.sock\"", "http://keys.lan:9000");
    }
}
