//! `keychoir env`: prints the environment variables that direct apps to Keychoir and make them
//! trust its certificate. The output is for `eval` in a shell.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::server::base_url;
use super::{ConfigSources, load, print, print_error};
use crate::certificate::{self, BundleError, CaLocation, LocalCa, OpenedCa};
use crate::clock;
use crate::config::{Config, HostPort, Listen, Need, TlsChoice};

/// The variable that replaces the trusted roots of Python and OpenSSL.
const OPENSSL: &str = "SSL_CERT_FILE";
/// The variable that adds a trusted root to Node.
const NODE: &str = "NODE_EXTRA_CA_CERTS";

pub(super) fn run(sources: ConfigSources) -> ExitCode {
    let mut overrides = sources.overrides(false);
    overrides.keys = Need::Optional;
    let config = match load(&overrides) {
        Ok(loaded) => loaded.config,
        Err(code) => return code,
    };
    let mut lines = "# For a shell: eval \"$(keychoir env)\"\n".to_owned();
    address_variables(&mut lines, &config);
    let trusted = trust_variables(&mut lines, &config);
    print(&lines.trim_end());
    match trusted {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            print_error(&format_args!("keychoir: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// Adds the variables with the address.
fn address_variables(lines: &mut String, config: &Config) {
    let port = config.server.listen.iter().find_map(|listen| match listen {
        Listen::Port(port) if port.port() != 0 => Some(port),
        Listen::Port(_) | Listen::Unix(_) | Listen::Systemd => None,
    });
    match port {
        Some(port) => {
            let scheme = if has_https(config, port) { "; https:// works there, too" } else { "" };
            comment(
                lines,
                &format!(
                    "Where Keychoir is: for an SDK's base_url (Python) or baseUrl (JavaScript){scheme}."
                ),
            );
            export(lines, "ELEVENLABS_BASE_URL", &base_url(port));
        }
        None => comment(
            lines,
            "The address is printed when Keychoir serves: server.listen names no port that is known before.",
        ),
    }
}

fn has_https(config: &Config, port: &HostPort) -> bool {
    match config.server.tls.choice() {
        TlsChoice::Auto => port.is_loopback(),
        TlsChoice::Off => false,
        TlsChoice::Files => true,
    }
}

/// Adds the variables with the trusted roots.
fn trust_variables(lines: &mut String, config: &Config) -> anyhow::Result<()> {
    match config.server.tls.choice() {
        TlsChoice::Auto => {}
        TlsChoice::Off => {
            comment(lines, "https is off (server.tls).");
            return Ok(());
        }
        TlsChoice::Files => {
            comment(
                lines,
                "https shows the certificate that server.tls names: clients trust it as they trust its authority.",
            );
            return Ok(());
        }
    }
    let is_local = config.server.listen.iter().any(|listen| match listen {
        Listen::Port(port) => port.is_loopback(),
        Listen::Systemd => true,
        Listen::Unix(_) => false,
    });
    if !is_local {
        comment(
            lines,
            "There is no https: the local authority is for loopback, and server.tls names no certificate.",
        );
        return Ok(());
    }
    let folder = match config.ca_location() {
        CaLocation::Folder(folder) => std::path::absolute(folder)?,
        CaLocation::Memory => {
            comment(
                lines,
                "https cannot be trusted: its authority lives in memory, like the usage database (storage.ephemeral). \
                 server.tls_directory gives it a folder.",
            );
            return Ok(());
        }
    };
    let OpenedCa { authority, quarantined } =
        certificate::open(&CaLocation::Folder(folder.clone()), clock::now())?;
    if let Some(file) = &quarantined {
        print_error(file);
    }
    let bundle = openssl_variables(lines, &folder, &authority)?;
    node_variables(lines, &certificate::ca_file(&folder), bundle.as_ref());
    Ok(())
}

/// A file with the certificate of the local CA and the roots of another file.
struct Bundle {
    path: PathBuf,
    roots: PathBuf,
}

fn openssl_variables(
    lines: &mut String,
    folder: &Path,
    authority: &LocalCa,
) -> Result<Option<Bundle>, BundleError> {
    let variable = variable(OPENSSL);
    let bundled = match certificate::roots(variable.as_deref(), folder) {
        Some(roots) => {
            certificate::bundle(folder, authority, &roots).map(|path| Some(Bundle { path, roots }))
        }
        None => Ok(None),
    };
    match bundled {
        Ok(Some(bundle)) => {
            comment(
                lines,
                &format!(
                    "https with Python and OpenSSL: Keychoir's authority, and all of {}, because this replaces \
                     what they trust.",
                    bundle.roots.display()
                ),
            );
            export(lines, OPENSSL, &bundle.path.to_string_lossy());
            return Ok(Some(bundle));
        }
        // If an app trusted only the local CA, it could connect to no host but Keychoir.
        Ok(None) => comment(
            lines,
            &format!(
                "https with Python and OpenSSL: this system has no file of authorities (ca-certificates) that {OPENSSL} could keep."
            ),
        ),
        Err(BundleError::NoRoots(roots)) => comment(
            lines,
            &format!(
                "https with Python and OpenSSL: {} has no certificates that {OPENSSL} could keep.",
                roots.display()
            ),
        ),
        Err(error @ BundleError::Unwritable(_)) => return Err(error),
    }
    Ok(None)
}

fn node_variables(lines: &mut String, ca: &Path, bundle: Option<&Bundle>) {
    let current_file = variable(NODE).filter(|path| path != ca);
    // The bundle may contain the certificates of this file, or be this file.
    let contains_current_file = |bundle: &&Bundle| {
        current_file.as_ref().is_some_and(|path| [&bundle.roots, &bundle.path].contains(&path))
    };
    if let Some(bundle) = bundle.filter(contains_current_file) {
        comment(lines, "https with Node: the same, because this named those authorities already.");
        return export(lines, NODE, &bundle.path.to_string_lossy());
    }
    comment(lines, "https with Node: Keychoir's authority, beside those that Node knows.");
    if let Some(current_file) = current_file {
        let current_file = one_line(&current_file.to_string_lossy());
        let _ = writeln!(lines, "# It was {current_file}: put both into one file to keep it.");
    }
    export(lines, NODE, &ca.to_string_lossy());
}

/// The absolute form of the path in an environment variable.
fn variable(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os(name).filter(|value| !value.is_empty())?;
    std::path::absolute(path).ok()
}

fn comment(lines: &mut String, text: &str) {
    let _ = writeln!(lines, "\n# {}", one_line(text));
}

/// Replaces line breaks and other control characters, which must not end a comment.
fn one_line(text: &str) -> String {
    text.chars().map(|character| if character.is_control() { '?' } else { character }).collect()
}

fn export(lines: &mut String, name: &str, value: &str) {
    let _ = writeln!(lines, "export {name}={}", quoted(value));
}

/// Quotes `text` so that every shell reads it as one unchanged word.
fn quoted(text: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/._-:@%+,".contains(&byte);
    if !text.is_empty() && text.bytes().all(is_plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_reads_a_quoted_value_unchanged() {
        for (text, expected) in [
            ("/home/me/a-b_c.1/ca.pem", "/home/me/a-b_c.1/ca.pem"),
            ("http://127.0.0.1:11011", "http://127.0.0.1:11011"),
            ("http://[::1]:11011", "'http://[::1]:11011'"),
            ("/home/it's me", "'/home/it'\\''s me'"),
            ("$(rm -rf /)`\n;&|", "'$(rm -rf /)`\n;&|'"),
            ("~/x", "'~/x'"),
            ("", "''"),
        ] {
            assert_eq!(quoted(text), expected);
            let output = std::process::Command::new("/bin/sh")
                .args(["-c", &format!("printf %s {}", quoted(text))])
                .output()
                .unwrap();
            assert_eq!(String::from_utf8(output.stdout).unwrap(), text);
        }
    }

    #[test]
    fn every_address_is_reached_over_loopback() {
        for (listen, expected) in [
            ("127.0.0.1:1", "http://127.0.0.1:1"),
            ("localhost:2", "http://127.0.0.1:2"),
            ("0.0.0.0:3", "http://127.0.0.1:3"),
            ("[::]:4", "http://[::1]:4"),
            ("10.0.0.1:5", "http://10.0.0.1:5"),
        ] {
            assert_eq!(base_url(&listen.parse().unwrap()), expected);
        }
    }

    #[test]
    fn a_path_cannot_end_a_comment() {
        assert_eq!(one_line("a\nrm -rf /\tb"), "a?rm -rf /?b");
    }
}
