//! Parses the setting `server.tls` (a certificate of the local CA, a certificate in files, or no TLS), and reads the
//! files of the certificate and of its private key. Warns about a certificate that is not valid at this time.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::mask::quote_masked;
use super::problem::{Report, SourceSpan, ValueError};
use super::source::{ReadFileError, ValueSources};
use super::value_file::unreadable_file_error;
use crate::certificate::{Certificate, CertificateChain, ChainError, PrivateKeyError};
use crate::policy::certificate::Validity;
use crate::policy::similar::find_similar;

/// The setting `server.tls` and the settings in its table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsConfig {
    keyword: TlsKeyword,
    /// The file with the certificate chain in PEM, which begins with the certificate of Keychoir.
    pub(super) cert: Option<PathBuf>,
    /// The file with the private key in PEM.
    pub(super) key: Option<PathBuf>,
}

/// The strings that `server.tls` can be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum TlsKeyword {
    #[default]
    Auto,
    Off,
}

/// The resolved source of the certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsMode {
    /// A certificate of the local CA, for loopback only.
    Auto,
    /// TLS is disabled.
    Off,
    /// The certificate in the configured files.
    Files,
}

impl TlsConfig {
    /// Returns the setting that disables TLS.
    #[must_use]
    pub fn off() -> Self {
        Self { keyword: TlsKeyword::Off, ..Self::default() }
    }

    /// Returns the resolved source of the certificate. Files take precedence over a keyword.
    #[must_use]
    pub fn mode(&self) -> TlsMode {
        match (&self.cert, &self.key, self.keyword) {
            (None, None, TlsKeyword::Auto) => TlsMode::Auto,
            (None, None, TlsKeyword::Off) => TlsMode::Off,
            (Some(_), _, _) | (_, Some(_), _) => TlsMode::Files,
        }
    }

    /// Reads the two files. Problems and warnings are reported at `cert_span` and `key_span`, the sources of the
    /// settings that name the files.
    pub(super) fn read_certificate(
        &self,
        sources: &ValueSources<'_>,
        [cert_span, key_span]: [&SourceSpan; 2],
        Report { problems, warnings }: &mut Report,
    ) -> Option<Certificate> {
        let mut read_pem =
            |path: &Option<PathBuf>, span: &SourceSpan| match (sources.read_file)(path.as_ref()?) {
                Ok(text) => Some(text),
                Err(reason) => {
                    problems.push(span.problem(unreadable_tls_file_error(path.as_ref()?, &reason)));
                    None
                }
            };
        let (chain_pem, key_pem) = (read_pem(&self.cert, cert_span), read_pem(&self.key, key_span));
        let chain = match CertificateChain::parse(&chain_pem?) {
            Ok(chain) => chain,
            Err(reason) => {
                problems.push(cert_span.problem(chain_error(reason)));
                return None;
            }
        };
        let validity_period = chain.validity_period();
        match validity_period.validity(sources.now) {
            Validity::Valid => {}
            Validity::NotYet => {
                let from = validity_period.from.rfc3339_seconds();
                warnings.push(
                    cert_span
                        .warning(format!("this certificate is not valid before {from}: clients refuse it")),
                );
            }
            Validity::Expired => {
                let until = validity_period.until.rfc3339_seconds();
                warnings.push(
                    cert_span.warning(format!("this certificate expired at {until}: clients refuse it")),
                );
            }
        }
        match chain.with_key(&key_pem?) {
            Ok(certificate) => Some(certificate),
            Err(reason) => {
                problems.push(key_span.problem(private_key_error(reason)));
                None
            }
        }
    }
}

/// Returns the error for a file that cannot be read, with advice for a file in another format.
fn unreadable_tls_file_error(path: &Path, reason: &ReadFileError) -> ValueError {
    let error = unreadable_file_error(&quote_masked(&path.to_string_lossy()), reason);
    match reason {
        ReadFileError::NotUtf8 { .. } => {
            error.advise("write the path of a PEM file; openssl x509 -inform der converts a DER file")
        }
        ReadFileError::Missing
        | ReadFileError::Directory
        | ReadFileError::TooLarge
        | ReadFileError::Other(_) => error,
    }
}

/// Returns the error for an invalid file of `cert`, with advice.
fn chain_error(reason: ChainError) -> ValueError {
    let error = ValueError::new(reason.to_string());
    match reason {
        ChainError::Empty => error.advise("write the path of a PEM file: -----BEGIN CERTIFICATE-----"),
        ChainError::IsPrivateKey => {
            error.advise("`cert` names the file with the certificates, `key` the file with the private key")
        }
        ChainError::Malformed => error.advise("for details, run openssl x509 -in FILE -noout"),
    }
}

/// Returns the error for an invalid file of `key`, with advice.
fn private_key_error(reason: PrivateKeyError) -> ValueError {
    let error = ValueError::new(reason.to_string());
    match reason {
        PrivateKeyError::Empty => error.advise("write the path of a PEM file: -----BEGIN PRIVATE KEY-----"),
        PrivateKeyError::IsCertificate => {
            error.advise("`cert` names the file with the certificates, `key` the file with the private key")
        }
        PrivateKeyError::Encrypted => error.advise("decrypt it with openssl pkey -in FILE -out PLAIN_FILE"),
        PrivateKeyError::Unusable => error
            .advise("for details, run openssl pkey -in FILE -noout; ECDSA, Ed25519 and RSA are supported"),
        PrivateKeyError::Mismatch => {
            error.advise("name the key of the certificate; the server's certificate comes first in its file")
        }
    }
}

/// Formats the keyword. The settings in the table of `server.tls` are formatted separately.
impl fmt::Display for TlsConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.keyword {
            TlsKeyword::Auto => "auto",
            TlsKeyword::Off => "off",
        })
    }
}

/// Parses a keyword. It overrides the files of an earlier layer.
impl FromStr for TlsConfig {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let keyword = match text {
            "auto" => TlsKeyword::Auto,
            "off" => TlsKeyword::Off,
            other => {
                let similar_name = match other.to_lowercase().as_str() {
                    "on" | "yes" | "true" | "1" => Some("auto"),
                    "no" | "none" | "false" | "0" => Some("off"),
                    lowercase => find_similar(lowercase, ["auto", "off"]),
                };
                let error = ValueError::new(format!("{} is not a TLS mode", quote_masked(text)));
                return Err(error.advise(NOTATION).suggest(similar_name));
            }
        };
        Ok(Self { keyword, ..Self::default() })
    }
}

/// The advice that shows the valid values.
pub(super) const NOTATION: &str = "write \"auto\", \"off\", or { cert = \"FILE\", key = \"FILE\" }";
