//! What a person reads of a Keychoir that runs, with the real binary. Tables and documents are
//! golden: scripts read them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends at its first surprise"
)]

mod house;
mod program;

use std::process::Output;

use house::{CLIENT_TOKEN, House, ONE, THREE, TWO, house, house_with};
use keychoir::config::ClientConfig;
use keychoir::policy::units::UnixMs;
use keychoir::secret::Fingerprint;
use keychoir::simulator::{Plan, WorkspacePlan};
use program::{keychoir, run, stderr};

const RESET: UnixMs = UnixMs(4_070_908_800_000);

/// Three workspaces: fresh, near its limit, and one whose figures the key may not ask for.
fn plan() -> Plan {
    let workspace =
        |name: &str, used| WorkspacePlan { used, reset: Some(RESET), ..WorkspacePlan::new(name, 100_000) };
    let mut plan = Plan::of([(ONE, 0), (TWO, 0), (THREE, 1_000)]);
    plan.keys[0].workspace = Some("one".to_owned());
    plan.keys[1].workspace = Some("two".to_owned());
    plan.keys[2].permissions = Some(vec!["text_to_speech".to_owned()]);
    plan.with_workspace(workspace("one", 5_420)).with_workspace(workspace("two", 84_766))
}

/// Runs the binary while the house serves.
async fn read(arguments: &[&str]) -> Output {
    let mut command = keychoir(arguments);
    keychoir::tasks::blocking(move || run(&mut command)).await.unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

async fn status(house: &House, more: &[&str]) -> Output {
    let mut arguments = vec!["status", "--url", &house.url];
    arguments.extend(more);
    read(&arguments).await
}

#[tokio::test]
async fn the_status_is_a_table() {
    let house = house(plan()).await;
    let output = status(&house, &[]).await;
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(
        stdout(&output),
        "\
#  key                  status        left      used/limit  used  resets
1  sk_key_numb...00001  active      94,580   5,420/100,000    5%  Jan 1
2  sk_key_numb...00002  near limit  15,234  84,766/100,000   84%  Jan 1
3  sk_key_numb...00003  active           ?             0/?     -  -

3 of 3 keys active, 109,814 characters left
"
    );
    house.close().await;
}

#[tokio::test]
async fn the_status_as_json_is_the_document() {
    let house = house(plan()).await;
    let output = status(&house, &["--json"]).await;
    let document = house.get("/api/elevenlabs-status").await.text().await.unwrap();
    assert_eq!(stdout(&output), format!("{document}\n"));
    house.close().await;
}

#[tokio::test]
async fn a_check_tells_by_its_exit_code() {
    let house = house(Plan::of([(ONE, 1_000), (TWO, 1_000)])).await;
    assert_eq!(status(&house, &["--check"]).await.status.code(), Some(0));
    house.always(ONE, "quota");
    house.speak(10).await;
    let output = status(&house, &["--check"]).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(stdout(&output).contains("  exhausted "), "{}", stdout(&output));
    assert!(stdout(&output).ends_with("\n1 of 2 keys active, 990 characters left\n"), "{}", stdout(&output));
    assert_eq!(status(&house, &[]).await.status.code(), Some(0), "only a check judges");
    house.always(TWO, "invalid");
    house.speak(10).await;
    assert_eq!(status(&house, &["--check", "--json"]).await.status.code(), Some(2));
    let url = house.url.clone();
    house.close().await;
    let output = read(&["status", "--check", "--url", &url]).await;
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("does not answer at http://127.0.0.1:"), "{}", stderr(&output));
    assert_eq!(read(&["status", "--url", &url]).await.status.code(), Some(1));
}

#[tokio::test]
async fn where_clients_have_tokens_the_status_asks_for_one() {
    let client = ClientConfig { name: "ops".to_owned(), token: Fingerprint::of(CLIENT_TOKEN) };
    let house = house_with(plan(), |config| config.clients = vec![client]).await;
    let output = status(&house, &[]).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("--token-file"), "{}", stderr(&output));

    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("token");
    for (token, code) in [(format!("{CLIENT_TOKEN}\n"), 0), ("another token canary".to_owned(), 1)] {
        std::fs::write(&file, &token).unwrap();
        let output = status(&house, &["--token-file", file.to_str().unwrap()]).await;
        assert_eq!(output.status.code(), Some(code), "{}", stderr(&output));
        assert!(!stderr(&output).contains("canary"), "{}", stderr(&output));
    }
    house.close().await;
}

#[tokio::test]
async fn the_status_finds_the_address_in_the_configuration() {
    let house = house(plan()).await;
    let address = house.running.address().to_string();
    let mut command = keychoir(&["status"]);
    command.env("KEYCHOIR_SERVER__LISTEN", address).env("HOME", "/nowhere");
    let output = keychoir::tasks::blocking(move || run(&mut command)).await.unwrap();
    assert!(stdout(&output).starts_with("#  key "), "{}", stderr(&output));
    house.close().await;
}

#[tokio::test]
async fn who_answers_and_is_no_keychoir_is_named() {
    let house = house(plan()).await;
    let url = house.simulator.base_url();
    let output = read(&["status", "--url", &url]).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("is no Keychoir"), "{}", stderr(&output));
    for url in ["https://127.0.0.1:1", "ftp://x"] {
        let output = read(&["status", "--url", url]).await;
        assert!(stderr(&output).contains("http://"), "{}", stderr(&output));
    }
    house.close().await;
}
