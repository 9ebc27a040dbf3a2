//! Tests the dashboard over HTTP, without a browser: codes and sessions, forms and their refusals, events, assets,
//! security headers, and the escaping of names in HTML and CSV.

use flate2::read::GzDecoder;
use reqwest::{Method, RequestBuilder, Response};
use serde_json::{Value, json};
use std::io::Read as _;
use std::time::Duration;

use crate::admin_api::{ADMIN_TOKEN, ReceivedChanges, key_id, send, set_paused, start_admin_proxy_with};
use crate::support::events::EventReader;
use crate::support::{CLIENT_TOKEN, FIRST_KEY, SECOND_KEY, TestProxy, client_config, join_all};

const PAGES: [&str; 8] = ["", "keys", "key?id=x", "live", "usage", "clients", "connect", "system"];
const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
                      img-src 'self' data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'; \
                      require-trusted-types-for 'script'";

fn request(proxy: &TestProxy, method: Method, path: &str) -> RequestBuilder {
    proxy.client.request(method, format!("{}/_/{path}", proxy.url))
}

/// Sends a request with the cookie of a session.
async fn get(proxy: &TestProxy, cookie: &str, path: &str) -> Response {
    request(proxy, Method::GET, path).header("cookie", cookie).send().await.unwrap()
}

/// Returns the request that a form of the dashboard sends.
fn form(proxy: &TestProxy, cookie: &str, path: &str, fields: &str) -> RequestBuilder {
    request(proxy, Method::POST, path)
        .header("cookie", cookie)
        .header("origin", &proxy.url)
        .header("content-type", "application/x-www-form-urlencoded")
        .body(fields.to_owned())
}

/// Sends a code to the login page.
async fn enter_code(proxy: &TestProxy, code: &str) -> Response {
    form(proxy, "", "login", &format!("code={code}")).send().await.unwrap()
}

/// Creates a code with which an operator signs in.
async fn create_code(proxy: &TestProxy) -> String {
    let response = send(proxy, Method::POST, "dashboard-codes", Some(&json!({}))).await;
    let document: Value = response.json().await.unwrap();
    document["code"].as_str().unwrap().to_owned()
}

/// Starts a session, and returns its cookie.
async fn sign_in(proxy: &TestProxy) -> String {
    let response = enter_code(proxy, &create_code(proxy).await).await;
    assert_eq!(response.status(), 303);
    let cookie = response.headers()["set-cookie"].to_str().unwrap();
    cookie.split(';').next().unwrap().to_owned()
}

/// Starts a proxy with a session, and returns its cookie.
async fn start_with_session() -> (TestProxy, ReceivedChanges, String) {
    let (proxy, changes) = start_admin_proxy_with(|_| {}).await;
    let cookie = sign_in(&proxy).await;
    (proxy, changes, cookie)
}

#[tokio::test]
async fn no_page_is_shown_without_a_session() {
    let (proxy, _, _) = start_with_session().await;
    let wrong_cookie =
        format!("keychoir_session_{}=kcs_guess", proxy.app.address().to_string().rsplit_once(':').unwrap().1);
    for cookie in ["", &wrong_cookie] {
        for path in PAGES.iter().chain(&["usage.csv", "nothing", "logout"]) {
            let response = get(&proxy, cookie, path).await;
            assert_eq!(
                (response.status().as_u16(), &response.headers()["location"]),
                (303, &"login".parse().unwrap()),
                "{path}: the response must lead to the login page"
            );
            assert_eq!(response.text().await.unwrap(), "", "{path}: the response must have no content");
        }
        // The location is relative, so that it also works under a path prefix.
        let nested_page = get(&proxy, cookie, "a/b/c").await;
        assert_eq!(nested_page.headers()["location"], "../../login");
        assert_eq!(get(&proxy, cookie, "events").await.status(), 401);
        let changed = form(&proxy, cookie, "keys", &format!("action=pause&id={}", key_id(FIRST_KEY)))
            .send()
            .await
            .unwrap();
        assert_eq!(
            (changed.status().as_u16(), &changed.headers()["location"]),
            (303, &"login".parse().unwrap())
        );
    }
    // The tokens of the API and of clients do not open a page.
    for token in [ADMIN_TOKEN, CLIENT_TOKEN] {
        let response = request(&proxy, Method::GET, "keys").bearer_auth(token).send().await.unwrap();
        assert_eq!(response.status(), 303);
    }
    proxy.close().await;
}

#[tokio::test]
async fn a_session_opens_the_pages_until_it_is_ended() {
    let (proxy, _, cookie) = start_with_session().await;
    for path in PAGES {
        assert_eq!(get(&proxy, &cookie, path).await.status(), 200, "{path}: the request must be served");
    }
    assert_eq!(get(&proxy, &cookie, "nothing").await.status(), 404);
    assert_eq!(get(&proxy, &cookie, "a/b").await.headers()["location"], "../");
    let mut events = EventReader::new(get(&proxy, &cookie, "events").await);
    assert_eq!(events.next().await.unwrap().name, "overview");

    let response = form(&proxy, &cookie, "logout", "").send().await.unwrap();
    assert!(response.headers()["set-cookie"].to_str().unwrap().contains("Max-Age=0"));
    assert_eq!(
        get(&proxy, &cookie, "keys").await.status(),
        303,
        "the token must be invalid after the logout"
    );
    let end = async { while events.next().await.is_some() {} };
    tokio::time::timeout(Duration::from_secs(30), end).await.expect("the stream must end with its session");
    proxy.close().await;
}

#[tokio::test]
async fn a_form_of_another_page_changes_nothing() {
    let (proxy, changes, cookie) = start_with_session().await;
    let fields = format!("action=pause&id={}", key_id(FIRST_KEY));
    let send = async |path: &str, headers: &[(&str, &str)]| {
        let mut request = request(&proxy, Method::POST, path)
            .header("cookie", &cookie)
            .header("content-type", "application/x-www-form-urlencoded")
            .body(fields.clone());
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.send().await.unwrap().status().as_u16()
    };
    let same_site = proxy.url.replace("127.0.0.1", "localhost");
    for path in ["keys", "login", "logout", "system", "clients"] {
        assert_eq!(send(path, &[]).await, 403, "{path}: a form without an origin must be refused");
        assert_eq!(
            send(path, &[("sec-fetch-site", "same-site")]).await,
            403,
            "{path}: a form of the same site must be refused"
        );
        assert_eq!(
            send(path, &[("origin", "null")]).await,
            403,
            "{path}: a form of an opaque origin must be refused"
        );
        assert_eq!(
            send(path, &[("origin", "http://127.0.0.1:1")]).await,
            403,
            "{path}: a form of another port must be refused"
        );
        assert_eq!(
            send(path, &[("origin", &same_site)]).await,
            403,
            "{path}: a form of another name of this machine must be refused"
        );
        assert_eq!(
            send(path, &[("origin", &proxy.url), ("sec-fetch-site", "cross-site")]).await,
            403,
            "{path}: a form that the browser reports as cross-site must be refused"
        );
    }
    assert!(changes.take().is_empty(), "a refused form must change nothing");
    assert_eq!(get(&proxy, &cookie, "keys").await.status(), 200, "the session must not have ended");
    assert_eq!(send("keys", &[("sec-fetch-site", "same-origin")]).await, 303);
    assert_eq!(changes.take().len(), 1);
    proxy.close().await;
}

#[tokio::test]
async fn a_page_of_a_listed_origin_receives_no_data() {
    const PAGE_ORIGIN: &str = "https://app.example";
    let (proxy, _) =
        start_admin_proxy_with(|config| config.access.origins = vec![PAGE_ORIGIN.parse().unwrap()]).await;
    let cookie = sign_in(&proxy).await;
    for path in ["", "login", "events", "assets/app.js"] {
        let response = request(&proxy, Method::GET, path)
            .header("cookie", &cookie)
            .header("origin", PAGE_ORIGIN)
            .send()
            .await
            .unwrap();
        assert_eq!(response.status(), 403, "{path}: a page of another origin must be refused");
        assert!(
            !response.headers().contains_key("access-control-allow-origin"),
            "{path}: no origin must be allowed"
        );
    }
    proxy.close().await;
}

#[tokio::test]
async fn an_unreadable_form_is_refused() {
    let (proxy, changes, cookie) = start_with_session().await;
    let refusal_status = async |request: RequestBuilder| {
        let response = request.send().await.unwrap();
        assert_security_headers(&response);
        response.status().as_u16()
    };
    let large = format!("action=add&name=a&key={}", "k".repeat(16 * 1024));
    assert_eq!(refusal_status(form(&proxy, &cookie, "keys", &large)).await, 413);
    assert_eq!(
        refusal_status(form(&proxy, "", "login", &format!("code={}", "k".repeat(16 * 1024)))).await,
        413
    );
    for media_type in ["application/json", "multipart/form-data; boundary=x", "text/plain", ""] {
        // `RequestBuilder::header` appends, so the header is replaced in the built request.
        let request = form(&proxy, &cookie, "keys", "action=pause");
        let mut request = request.build().unwrap();
        request.headers_mut().insert("content-type", media_type.parse().unwrap());
        assert_eq!(
            proxy.client.execute(request).await.unwrap().status(),
            415,
            "the media type {media_type:?} must be refused"
        );
    }
    for (fields, status) in [
        ("", 404),
        ("action=explode", 404),
        ("action=pause&id=unknown", 404),
        ("action=pause&id=..%2Fclients%2Fapp", 400),
        ("action=add&name=a%2Fb&key=sk_a_key_that_is_not_in_the_pool", 400),
        ("action=add&name=a&key=sk_with+a+space", 400),
    ] {
        assert_eq!(
            refusal_status(form(&proxy, &cookie, "keys", fields)).await,
            status,
            "the form {fields:?} must be refused with {status}"
        );
    }
    assert_eq!(refusal_status(form(&proxy, &cookie, "clients", "action=revoke&name=app%3Fx")).await, 400);
    assert_eq!(refusal_status(form(&proxy, &cookie, "nothing", "action=pause")).await, 404);
    assert!(changes.take().is_empty(), "a refused form must change nothing");
    proxy.close().await;
}

#[tokio::test]
async fn other_methods_are_refused() {
    let (proxy, _, cookie) = start_with_session().await;
    for method in ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"] {
        for path in ["", "keys", "events", "login", "assets/app.js"] {
            let request = request(&proxy, method.parse().unwrap(), path).header("cookie", &cookie);
            let response = request.send().await.unwrap();
            let allowed = if path.starts_with("assets/") { "GET, HEAD" } else { "GET, HEAD, POST" };
            assert_eq!(
                (response.status().as_u16(), &response.headers()["allow"]),
                (405, &allowed.parse().unwrap()),
                "{method} {path}: the response must list the allowed methods"
            );
        }
    }
    assert_eq!(request(&proxy, Method::POST, "assets/app.js").send().await.unwrap().status(), 405);
    let head = request(&proxy, Method::HEAD, "keys").header("cookie", &cookie).send().await.unwrap();
    assert_eq!((head.status().as_u16(), head.bytes().await.unwrap().len()), (200, 0));
    proxy.close().await;
}

#[track_caller]
fn assert_security_headers(response: &Response) {
    let expected = [
        ("content-security-policy", CONTENT_SECURITY_POLICY),
        ("x-content-type-options", "nosniff"),
        ("referrer-policy", "same-origin"),
        ("cross-origin-opener-policy", "same-origin"),
        ("cross-origin-resource-policy", "same-origin"),
    ];
    for (name, value) in expected {
        assert_eq!(
            response.headers()[name],
            value,
            "the response must have its security headers: {}",
            response.url()
        );
    }
    let is_asset = response.url().path().contains("/assets/") && response.status().is_success();
    let caching = if is_asset { "no-cache" } else { "no-store" };
    assert_eq!(
        response.headers()["cache-control"],
        caching,
        "the response must have its caching policy: {}",
        response.url()
    );
}

#[tokio::test]
async fn a_page_receives_only_the_events_that_it_shows() {
    let (proxy, _, cookie) = start_with_session().await;
    let open = async |query| EventReader::new(get(&proxy, &cookie, query).await);
    let mut state = open("events?only=state").await;
    let mut requests = open("events?only=requests").await;
    let mut all = open("events").await;
    for reader in [&mut state, &mut all] {
        assert_eq!(reader.next().await.unwrap().name, "overview", "the state must begin with a snapshot");
    }
    proxy.request_speech(10).await.bytes().await.unwrap();
    assert_eq!(requests.next().await.unwrap().name, "request", "requests must begin without a snapshot");
    all.wait_for("request", |_| true).await;
    proxy.request_speech(10).await.bytes().await.unwrap();
    // A request event of the first request would precede the key event after the second request.
    loop {
        let event = state.next().await.unwrap();
        assert_ne!(event.name, "request");
        if event.name == "key" && event.data["credits_used"] == 20 {
            break;
        }
    }
    drop((state, requests, all));
    proxy.close().await;
}

#[tokio::test]
async fn a_page_gets_only_the_keys_that_it_shows() {
    let (proxy, _, cookie) = start_with_session().await;
    let open = async |query: String| EventReader::new(get(&proxy, &cookie, &query).await);
    let (first, second) = (key_id(FIRST_KEY), key_id(SECOND_KEY));
    let page = get(&proxy, &cookie, "keys").await.text().await.unwrap();
    assert!(page.contains(&format!("data-key=\"{first}\"")), "the page must identify its keys by these ids");
    let mut one = open(format!("events?only=state&keys={second}")).await;
    let mut none = open("events?only=state&keys=".to_owned()).await;
    let names = async |reader: &mut EventReader, count| {
        reader.take(count).await.into_iter().map(|event| event.name).collect::<Vec<_>>()
    };
    assert_eq!(names(&mut one, 2).await, ["overview", "key"]);
    assert_eq!(names(&mut none, 1).await, ["overview"]);
    let mut all = open("events?only=state".to_owned()).await;
    set_paused(&proxy, &[FIRST_KEY]);
    all.wait_for("key", |key| key["id"] == first && key["paused"] == true).await;
    set_paused(&proxy, &[FIRST_KEY, SECOND_KEY]);
    loop {
        let event = one.next().await.unwrap();
        assert!(
            event.name == "overview" || event.data["id"] == second,
            "the page must receive only its own key: {}",
            event.data
        );
        if event.data["paused"] == true {
            break;
        }
    }
    none.wait_for("overview", |overview| overview["keys"]["paused"] == 2).await;
    drop((one, none, all));
    proxy.close().await;
}

#[tokio::test]
async fn every_response_has_the_headers_that_protect_it() {
    let (proxy, _, cookie) = start_with_session().await;
    for path in PAGES.iter().chain(&[
        "login",
        "nothing",
        "a/b",
        "usage.csv",
        "events",
        "assets/app.js",
        "assets/nothing",
    ]) {
        assert_security_headers(&get(&proxy, &cookie, path).await);
        assert_security_headers(&get(&proxy, "", path).await);
    }
    assert_security_headers(&enter_code(&proxy, "wrong").await);
    assert_security_headers(&request(&proxy, Method::PUT, "keys").send().await.unwrap());
    let root = proxy.client.get(format!("{}/_", proxy.url)).send().await.unwrap();
    assert_security_headers(&root);
    assert_eq!((root.status().as_u16(), &root.headers()["location"]), (308, &"_/".parse().unwrap()));
    proxy.close().await;
}

#[tokio::test]
async fn assets_are_compressed_and_sent_once() {
    let (proxy, _, _) = start_with_session().await;
    for (name, media_type) in [
        ("app.js", "text/javascript; charset=utf-8"),
        ("app.css", "text/css; charset=utf-8"),
        ("icon.svg", "image/svg+xml"),
        ("uplot.js", "text/javascript; charset=utf-8"),
        ("uplot.css", "text/css; charset=utf-8"),
    ] {
        let path = format!("assets/{name}");
        let plain = request(&proxy, Method::GET, &path).send().await.unwrap();
        assert_eq!(
            (&plain.headers()["content-type"], &plain.headers()["vary"]),
            (&media_type.parse().unwrap(), &"accept-encoding".parse().unwrap())
        );
        assert!(!plain.headers().contains_key("content-encoding"));
        let tag = plain.headers()["etag"].clone();
        let content = plain.bytes().await.unwrap();

        let compressed =
            request(&proxy, Method::GET, &path).header("accept-encoding", "br, gzip").send().await.unwrap();
        assert_eq!(
            (&compressed.headers()["content-encoding"], &compressed.headers()["etag"]),
            (&"gzip".parse().unwrap(), &tag)
        );
        let mut decoded = Vec::new();
        GzDecoder::new(&*compressed.bytes().await.unwrap()).read_to_end(&mut decoded).unwrap();
        assert!(decoded == content, "{name}: the compressed asset must have the same content");

        let known_tags = format!("\"other\", W/{}", tag.to_str().unwrap());
        let cached =
            request(&proxy, Method::GET, &path).header("if-none-match", known_tags).send().await.unwrap();
        assert_eq!((cached.status().as_u16(), &cached.headers()["etag"]), (304, &tag));
        assert!(cached.bytes().await.unwrap().is_empty());
    }
    proxy.close().await;
}

#[tokio::test]
async fn a_code_is_valid_once() {
    let (proxy, _, _) = start_with_session().await;
    let code = create_code(&proxy).await;
    assert_eq!(enter_code(&proxy, &code).await.status(), 303);
    let second_response = enter_code(&proxy, &code).await;
    assert_eq!(second_response.status(), 403);
    assert!(!second_response.headers().contains_key("set-cookie"));
    assert!(!second_response.text().await.unwrap().contains(&code));
    proxy.close().await;
}

#[tokio::test]
async fn a_wrong_code_counts_as_a_wrong_admin_token() {
    let (proxy, _, cookie) = start_with_session().await;
    let code = create_code(&proxy).await;
    let wrong_token = || async {
        let url = format!("{}/api/keychoir/v1/keys", proxy.url);
        proxy.client.get(url).bearer_auth("kca_wrong_admin_token_of_a_test").send().await.unwrap().status()
    };
    for _ in 0..5 {
        assert_eq!(enter_code(&proxy, "wrong").await.status(), 403);
        assert_eq!(wrong_token().await, 401);
    }
    assert_eq!(enter_code(&proxy, &code).await.status(), 429, "even a valid code must be refused");
    assert_eq!(wrong_token().await, 429);
    assert_eq!(get(&proxy, &cookie, "keys").await.status(), 200, "a session must not be affected");
    proxy.close().await;
}

#[tokio::test]
async fn tabs_share_the_listeners_of_the_api() {
    const TABS: usize = 20;
    let (proxy, _) = start_admin_proxy_with(|config| config.admin.max_event_listeners = TABS).await;
    let cookie = sign_in(&proxy).await;
    let open = || async { EventReader::new(get(&proxy, &cookie, "events").await) };
    let mut tabs = join_all((0..TABS).map(|_| open())).await;
    let refused = get(&proxy, &cookie, "events").await;
    assert_eq!(refused.status(), 503);
    assert_security_headers(&refused);
    assert!(refused.text().await.unwrap().contains("admin.max_event_listeners"));

    let response = proxy.request_speech(10).await;
    let id = response.headers()["x-request-id"].to_str().unwrap().to_owned();
    response.bytes().await.unwrap();
    for tab in &mut tabs {
        tab.wait_for("request", |request| request["request_id"] == *id).await;
    }
    drop(tabs);
    proxy.close().await;
}

#[tokio::test]
async fn no_name_is_html_or_a_formula() {
    // The configuration does not accept such a name.
    const NAME: &str = "=1+1,\"<b>1\"";
    let (proxy, _) = start_admin_proxy_with(|config| {
        config.clients = vec![client_config(NAME, CLIENT_TOKEN, Default::default())];
    })
    .await;
    let cookie = sign_in(&proxy).await;
    proxy.request_speech(10).await.bytes().await.unwrap();
    let read = async |path: &str| get(&proxy, &cookie, path).await.text().await.unwrap();
    // The record of the attempt is written after the response.
    let recorded = async {
        loop {
            let csv = read("usage.csv?by=client").await;
            if csv.lines().count() > 1 {
                return csv;
            }
        }
    };
    let csv = tokio::time::timeout(Duration::from_secs(30), recorded).await.unwrap();
    assert!(
        csv.lines().nth(1).unwrap().starts_with("\"'=1+1,\"\"<b>1\"\"\",10,1,1,0,10,"),
        "the name must not be a formula in the CSV: {csv}"
    );
    for path in ["clients", "usage?by=client", "live"] {
        let page = read(path).await;
        assert!(
            page.contains("=1+1,&quot;&lt;b&gt;1") && !page.contains("<b>"),
            "{path}: the name must be escaped: {page}"
        );
    }
    for path in [
        "keys?q=\"><b>1",
        "keys?state=\"><b>1",
        "clients?name=\"><b>1",
        "key?id=<b>1",
        "usage?by=<b>1",
        "live?done=<b>1",
    ] {
        let page = read(path).await;
        assert!(!page.contains("<b>"), "{path}: the parameter must be escaped: {page}");
    }
    proxy.close().await;
}
