//! The TLS setting: a certificate of the local CA, one from files, or no TLS.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::keys::unreadable;
use super::mask::shown;
use super::problem::{Problem, SourceSpan, Warning, WrongValue, nearest};
use super::source::{Unreadable, ValueSources};
use crate::certificate::{Certificate, Chain, ChainError, KeyError};
use crate::policy::certificate::Validity;

/// The setting `server.tls` with the settings below it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsConfig {
    word: TlsWord,
    /// The certificate chain in PEM, the server's certificate first.
    pub(super) cert: Option<PathBuf>,
    /// The private key, in PEM.
    pub(super) key: Option<PathBuf>,
}

/// The setting when it is a word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum TlsWord {
    #[default]
    Auto,
    Off,
}

/// The resolved source of the certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsChoice {
    /// A certificate of the local CA, for loopback only.
    Auto,
    /// No TLS.
    Off,
    /// The certificate in the configured files.
    Files,
}

impl TlsConfig {
    /// No TLS.
    #[must_use]
    pub fn off() -> Self {
        Self { word: TlsWord::Off, ..Self::default() }
    }

    /// The resolved source of the certificate. Files take precedence over a word.
    #[must_use]
    pub fn choice(&self) -> TlsChoice {
        match (&self.cert, &self.key, self.word) {
            (None, None, TlsWord::Auto) => TlsChoice::Auto,
            (None, None, TlsWord::Off) => TlsChoice::Off,
            (Some(_), _, _) | (_, Some(_), _) => TlsChoice::Files,
        }
    }

    /// Reads the two files. Problems and warnings point to `cert` and `key`, the settings that name
    /// the files.
    pub(super) fn certificate(
        &self,
        sources: &ValueSources<'_>,
        [cert, key]: [&SourceSpan; 2],
        problems: &mut Vec<Problem>,
        warnings: &mut Vec<Warning>,
    ) -> Option<Certificate> {
        let mut read = |path: &Option<PathBuf>, span: &SourceSpan| match (sources.read)(path.as_ref()?) {
            Ok(text) => Some(text),
            Err(reason) => {
                problems.push(span.problem(unreadable_file(path.as_ref()?, &reason)));
                None
            }
        };
        let (chain, secret) = (read(&self.cert, cert), read(&self.key, key));
        let chain = match Chain::read(&chain?) {
            Ok(chain) => chain,
            Err(error) => {
                problems.push(cert.problem(no_chain(error)));
                return None;
            }
        };
        let life = chain.life();
        match life.validity(sources.now) {
            Validity::Holds => {}
            Validity::NotYet => {
                let from = life.from.rfc3339_seconds();
                warnings.push(cert.warning(format!("clients refuse this certificate before {from}")));
            }
            Validity::Expired => {
                let until = life.until.rfc3339_seconds();
                warnings.push(
                    cert.warning(format!("this certificate has expired at {until}: clients refuse it")),
                );
            }
        }
        match chain.with_key(&secret?) {
            Ok(certificate) => Some(certificate),
            Err(error) => {
                problems.push(key.problem(no_key(error)));
                None
            }
        }
    }
}

fn unreadable_file(path: &Path, reason: &Unreadable) -> WrongValue {
    let wrong = unreadable(&shown(&path.to_string_lossy()), reason);
    match reason {
        Unreadable::NotUtf8 { .. } => {
            wrong.advise("write the path of a PEM file; openssl x509 -inform der makes one of DER")
        }
        Unreadable::Missing | Unreadable::Folder | Unreadable::TooLarge | Unreadable::Other(_) => wrong,
    }
}

fn no_chain(error: ChainError) -> WrongValue {
    let wrong = WrongValue::new(error.to_string());
    match error {
        ChainError::Empty => wrong.advise("write the path of a PEM file: -----BEGIN CERTIFICATE-----"),
        ChainError::IsKey => {
            wrong.advise("`cert` is the file of certificates, `key` that of the private key")
        }
        ChainError::Broken => wrong.advise("openssl x509 -in FILE -noout says more"),
    }
}

fn no_key(error: KeyError) -> WrongValue {
    let wrong = WrongValue::new(error.to_string());
    match error {
        KeyError::Empty => wrong.advise("write the path of a PEM file: -----BEGIN PRIVATE KEY-----"),
        KeyError::IsCertificate => {
            wrong.advise("`cert` is the file of certificates, `key` that of the private key")
        }
        KeyError::Encrypted => wrong.advise("openssl pkey -in FILE -out PLAIN_FILE unlocks it"),
        KeyError::Unusable => {
            wrong.advise("openssl pkey -in FILE -noout says more; ECDSA, Ed25519 and RSA are supported")
        }
        KeyError::Mismatch => {
            wrong.advise("name the key of the certificate; the server's certificate comes first in its file")
        }
    }
}

/// Prints the word. The nested settings print their own values.
impl fmt::Display for TlsConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.word {
            TlsWord::Auto => "auto",
            TlsWord::Off => "off",
        })
    }
}

/// Parses a word. It replaces files that an earlier layer named.
impl FromStr for TlsConfig {
    type Err = WrongValue;

    fn from_str(text: &str) -> Result<Self, WrongValue> {
        let word = match text {
            "auto" => TlsWord::Auto,
            "off" => TlsWord::Off,
            other => {
                let near = match other.to_lowercase().as_str() {
                    "on" | "yes" | "true" | "1" => Some("auto"),
                    "no" | "none" | "false" | "0" => Some("off"),
                    lower => nearest(lower, ["auto", "off"]),
                };
                let wrong = WrongValue::new(format!("{} is no way to speak TLS", shown(text)));
                return Err(wrong.advise(NOTATION).suggest(near));
            }
        };
        Ok(Self { word, ..Self::default() })
    }
}

/// Advice with the valid forms.
pub(super) const NOTATION: &str = "write \"auto\", \"off\", or { cert = \"FILE\", key = \"FILE\" }";
