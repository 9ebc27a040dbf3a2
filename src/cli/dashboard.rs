//! `keychoir dashboard`: prints a link that opens the dashboard of a running Keychoir once. On a terminal of a desktop,
//! it also opens the link in a browser.

use std::env;
use std::io::{IsTerminal as _, stdout};
use std::process::{Command, Stdio};

use clap::Args;
use http::Method;
use serde_json::json;

use super::control::{ControlOptions, Target};
use super::{CommandResult, build_runtime, fail, print, print_error};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    options: ControlOptions,
    /// Only print the link.
    #[arg(long)]
    no_open: bool,
}

pub(super) fn run(arguments: &Arguments) -> CommandResult {
    let (base_url, document) = build_runtime()?.block_on(async {
        match arguments.options.connect().await? {
            Target::Server(client) => {
                let base_url = client.browser_url().ok_or_else(|| {
                    fail(
                        "a browser cannot open a Unix socket: set admin.listen or server.listen to HOST:PORT, or forward \
                         a port with `ssh -L 11011:/PATH/TO/SOCKET HOST` and use --url http://127.0.0.1:11011",
                    )
                })?;
                let document = client.call(&Method::POST, "/dashboard-codes", Some(json!({}))).await?;
                Ok((base_url, document))
            }
            Target::Offline(_) => {
                Err(fail("Keychoir does not run at the configured address: start it with `keychoir serve`, or use --url"))
            }
        }
    })?;
    let code = document["code"].as_str().unwrap_or_default();
    let link = format!("{base_url}/_/login#{code}");
    if arguments.options.json {
        print(&json!({"url": link, "code": code, "expires_at": document["expires_at"]}));
        return Ok(());
    }
    print_error(
        &"This link opens the dashboard once, within 10 minutes. Without JavaScript, enter the code after # there.",
    );
    print(&link);
    if !arguments.no_open && stdout().is_terminal() {
        open_browser(&link);
    }
    Ok(())
}

/// Opens a link in the browser of the desktop, if there is one. A failure is ignored, because the link is printed.
fn open_browser(link: &str) {
    let opener = if cfg!(target_os = "macos") {
        "open"
    } else if env::var_os("DISPLAY").is_some() || env::var_os("WAYLAND_DISPLAY").is_some() {
        "xdg-open"
    } else {
        return;
    };
    let mut command = Command::new(opener);
    let _ = command.arg(link).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
}
