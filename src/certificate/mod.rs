//! Provides the TLS certificate of Keychoir's listeners, which is parsed from configured files, or issued by a local CA
//! that Keychoir generates and stores. Also writes the bundle with which programs trust the local CA, and describes the
//! certificates of other servers. Private keys leave this module only for the TLS library and the file of the CA.

mod bundle;
mod ca_directory;
mod certificate_chain;
mod local_ca;
mod peer_certificate;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::CertificateDer;
use rustls::sign::CertifiedKey;

use crate::policy::certificate::ValidityPeriod;
use crate::policy::units::UnixMs;

pub use bundle::{BundleError, find_trusted_roots, refresh_bundle, write_bundle};
pub use ca_directory::{CaError, OpenedCa, QuarantinedFile, ca_certificate_file, ca_key_file, open};
pub use certificate_chain::{CertificateChain, ChainError, PrivateKeyError};
pub use local_ca::{CaDefect, CertificateError, LocalCa};
pub use peer_certificate::PeerCertificate;

/// The location of the local CA.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CaLocation {
    /// The CA is stored in this directory.
    Directory(PathBuf),
    /// The CA is in the memory of the process. Each start generates a new CA, so clients cannot be set up to
    /// trust it.
    Memory,
}

/// A certificate chain with its private key. Cheap to clone.
#[derive(Clone)]
pub struct Certificate {
    certified_key: Arc<CertifiedKey>,
    validity_period: ValidityPeriod,
}

impl Certificate {
    /// Returns the certificate and key for the TLS library.
    #[must_use]
    pub fn certified_key(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.certified_key)
    }

    /// Returns the validity period of the certificate.
    #[must_use]
    pub fn validity_period(&self) -> ValidityPeriod {
        self.validity_period
    }
}

impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificate").field("validity_period", &self.validity_period).finish_non_exhaustive()
    }
}

/// Returns the cryptography of the TLS library. Every use receives it explicitly: no module installs a default for the
/// whole process.
fn crypto_provider() -> CryptoProvider {
    rustls::crypto::ring::default_provider()
}

/// Parses the validity period of a certificate. Returns `None` if the certificate is malformed.
fn parse_validity(certificate: &CertificateDer<'_>) -> Option<ValidityPeriod> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let unix_ms = |seconds: i64| UnixMs(u64::try_from(seconds).unwrap_or(0).saturating_mul(1000));
    let validity = parsed.validity();
    Some(ValidityPeriod {
        from: unix_ms(validity.not_before.timestamp()),
        until: unix_ms(validity.not_after.timestamp()),
    })
}
