//! `keychoir env`: prints the environment variables with which apps find Keychoir and trust its certificate. The output
//! is for `eval` in a shell. If the local CA and its bundle do not exist yet, the command creates them.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use super::server::base_url;
use super::{CommandResult, ConfigSources, fail, load, print, print_error};
use crate::certificate::{self, BundleError, CaLocation, LocalCa, OpenedCa};
use crate::clock;
use crate::config::{Config, HostPort, KeyRequirement, ListenAddress, TlsMode};

/// The variable that replaces the root certificates that Python and OpenSSL trust.
const OPENSSL_VARIABLE: &str = "SSL_CERT_FILE";
/// The variable that adds root certificates to those that Node trusts by default.
const NODE_VARIABLE: &str = "NODE_EXTRA_CA_CERTS";

pub(super) fn run(sources: ConfigSources) -> CommandResult {
    let config = load(&sources.into_overrides(KeyRequirement::Optional))?.config;
    let mut lines = "# For a shell: eval \"$(keychoir env)\"\n".to_owned();
    add_address(&mut lines, &config);
    let roots_result = add_trusted_roots(&mut lines, &config);
    print(&lines.trim_end());
    roots_result.map_err(fail)
}

fn add_address(lines: &mut String, config: &Config) {
    let Some(address) = config.server.listen.fixed_tcp_address() else {
        let comment = "Keychoir prints its address when it serves: server.listen names no fixed port.";
        return add_comment(lines, comment);
    };
    let https_note = if has_https(config, address) { "; https:// works as well" } else { "" };
    let comment = format!(
        "The address of Keychoir, for an SDK's base_url (Python) or baseUrl (JavaScript){https_note}."
    );
    add_comment(lines, &comment);
    add_export(lines, "ELEVENLABS_BASE_URL", &base_url(address));
}

fn has_https(config: &Config, address: &HostPort) -> bool {
    match config.server.tls.mode() {
        TlsMode::Auto => address.is_loopback(),
        TlsMode::Off => false,
        TlsMode::Files => true,
    }
}

/// Adds the variables with which apps trust the local CA, or a comment that names the reason why they cannot trust it.
/// Creates the CA and the bundle if they do not exist yet.
fn add_trusted_roots(lines: &mut String, config: &Config) -> anyhow::Result<()> {
    let has_local_https = config.server.listen.iter().any(|listen| match listen {
        ListenAddress::Tcp(address) => address.is_loopback(),
        ListenAddress::Systemd => true,
        ListenAddress::Unix(_) => false,
    });
    let directory = match (config.server.tls.mode(), config.ca_location()) {
        (TlsMode::Auto, CaLocation::Directory(directory)) if has_local_https => {
            std::path::absolute(directory)?
        }
        (mode, _) => {
            add_comment(
                lines,
                match mode {
                    TlsMode::Off => "HTTPS is disabled (server.tls).",
                    TlsMode::Files => {
                        "HTTPS uses the certificate of server.tls, which clients trust if they trust its CA."
                    }
                    TlsMode::Auto if has_local_https => {
                        "HTTPS cannot be trusted: its CA is kept only in memory, like the usage records \
                     (storage.ephemeral). Set server.tls_directory to a directory for the CA."
                    }
                    TlsMode::Auto => {
                        "HTTPS is not available: the local CA is only for loopback addresses, and server.tls \
                     names no certificate."
                    }
                },
            );
            return Ok(());
        }
    };
    let OpenedCa { ca, quarantined } =
        certificate::open(&CaLocation::Directory(directory.clone()), clock::now())?;
    if let Some(file) = &quarantined {
        print_error(file);
    }
    let bundle = add_openssl_variable(lines, &directory, &ca)?;
    add_node_variable(lines, &certificate::ca_certificate_file(&directory), bundle.as_ref());
    Ok(())
}

/// A file with the certificate of the local CA and the root certificates of another file.
struct Bundle {
    path: PathBuf,
    /// The file with the root certificates that the bundle contains in addition to that of the local CA.
    roots_file: PathBuf,
}

fn add_openssl_variable(
    lines: &mut String,
    directory: &Path,
    ca: &LocalCa,
) -> Result<Option<Bundle>, BundleError> {
    // If an app trusted only the local CA, it could connect only to Keychoir.
    let reason = match certificate::find_trusted_roots(path_variable(OPENSSL_VARIABLE).as_deref(), directory)
    {
        None => "this system has no file with trusted CAs (ca-certificates)".to_owned(),
        Some(roots_file) => match certificate::write_bundle(directory, ca, &roots_file) {
            Ok(path) => {
                let comment = format!(
                    "HTTPS with Python and OpenSSL: Keychoir's CA and all CAs of {}, because this variable replaces \
                     the trusted CAs.",
                    roots_file.display()
                );
                add_comment(lines, &comment);
                add_export(lines, OPENSSL_VARIABLE, &path.to_string_lossy());
                return Ok(Some(Bundle { path, roots_file }));
            }
            Err(BundleError::NoRoots(file)) => format!("{} contains no certificates", file.display()),
            Err(error @ BundleError::Unwritable(_)) => return Err(error),
        },
    };
    let comment = format!("HTTPS with Python and OpenSSL: {OPENSSL_VARIABLE} is not set, because {reason}.");
    add_comment(lines, &comment);
    Ok(None)
}

fn add_node_variable(lines: &mut String, ca_certificate_file: &Path, bundle: Option<&Bundle>) {
    let previous_file = path_variable(NODE_VARIABLE).filter(|path| path != ca_certificate_file);
    // The bundle may contain the certificates of the previous file, or be that file.
    let contains_previous_file = |bundle: &&Bundle| {
        previous_file.as_ref().is_some_and(|path| [&bundle.roots_file, &bundle.path].contains(&path))
    };
    if let Some(bundle) = bundle.filter(contains_previous_file) {
        add_comment(
            lines,
            "HTTPS with Node: the same file, because it contains the CAs that this variable named before.",
        );
        return add_export(lines, NODE_VARIABLE, &bundle.path.to_string_lossy());
    }
    add_comment(lines, "HTTPS with Node: Keychoir's CA, in addition to the CAs that Node trusts.");
    if let Some(path) = previous_file {
        let _ = writeln!(
            lines,
            "# The variable named {} before: to trust both files, join them in one file.",
            replace_control_characters(&path.to_string_lossy())
        );
    }
    add_export(lines, NODE_VARIABLE, &ca_certificate_file.to_string_lossy());
}

/// Returns the absolute form of the path in an environment variable, or `None` if the variable is not set or empty.
fn path_variable(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os(name).filter(|value| !value.is_empty())?;
    std::path::absolute(path).ok()
}

fn add_comment(lines: &mut String, text: &str) {
    let _ = writeln!(lines, "\n# {}", replace_control_characters(text));
}

/// Replaces line breaks and other control characters, which could end a comment.
fn replace_control_characters(text: &str) -> String {
    text.chars().map(|character| if character.is_control() { '?' } else { character }).collect()
}

fn add_export(lines: &mut String, name: &str, value: &str) {
    let _ = writeln!(lines, "export {name}={}", quote_for_shell(value));
}

/// Quotes `text` so that every shell reads it as one unchanged word.
fn quote_for_shell(text: &str) -> String {
    let needs_no_quotes = |byte: u8| byte.is_ascii_alphanumeric() || b"/._-:@%+,".contains(&byte);
    if !text.is_empty() && text.bytes().all(needs_no_quotes) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_reads_a_quoted_value_unchanged() {
        for (value, expected) in [
            ("/home/me/a-b_c.1/ca.pem", "/home/me/a-b_c.1/ca.pem"),
            ("http://127.0.0.1:11011", "http://127.0.0.1:11011"),
            ("http://[::1]:11011", "'http://[::1]:11011'"),
            ("/home/it's me", "'/home/it'\\''s me'"),
            ("$(rm -rf /)`\n;&|", "'$(rm -rf /)`\n;&|'"),
            ("~/x", "'~/x'"),
            ("", "''"),
        ] {
            assert_eq!(quote_for_shell(value), expected);
            let output = std::process::Command::new("/bin/sh")
                .args(["-c", &format!("printf %s {}", quote_for_shell(value))])
                .output()
                .unwrap();
            assert_eq!(String::from_utf8(output.stdout).unwrap(), value);
        }
    }

    #[test]
    fn a_path_cannot_end_a_comment() {
        assert_eq!(replace_control_characters("a\nrm -rf /\tb"), "a?rm -rf /?b");
    }
}
