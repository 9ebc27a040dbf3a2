//! Parses a configured certificate chain and its private key, and detects common mistakes such as swapped
//! files. The caller reads the files.

use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use rustls::{Error, InconsistentKeys};

use super::{Certificate, crypto_provider, parse_validity};
use crate::policy::certificate::ValidityPeriod;

/// A certificate chain. The first certificate is for the listener, and the others are for its issuers.
#[derive(Clone, Debug)]
pub struct CertificateChain {
    certificates: Vec<CertificateDer<'static>>,
    validity_period: ValidityPeriod,
}

/// The reason why a file is not a certificate chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// The file contains no certificate.
    #[error("the file contains no certificate")]
    Empty,
    /// The file contains a private key, but no certificate.
    #[error("the file contains a private key, but no certificate")]
    IsPrivateKey,
    /// A block marked as a certificate cannot be parsed.
    #[error("a certificate in the file is malformed")]
    Malformed,
}

/// The reason why a file is not the private key of a certificate. The error contains no part of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PrivateKeyError {
    /// The file contains no private key.
    #[error("the file contains no private key")]
    Empty,
    /// The file contains a certificate, but no private key.
    #[error("the file contains a certificate, but no private key")]
    IsCertificate,
    /// The key is encrypted with a passphrase, which cannot be entered at startup.
    #[error("the private key is encrypted")]
    Encrypted,
    /// The key is malformed, or of a type that the TLS library does not support.
    #[error("the private key is malformed, or of an unsupported type")]
    Unusable,
    /// The key belongs to another certificate.
    #[error("the private key belongs to another certificate")]
    Mismatch,
}

impl CertificateChain {
    /// Parses certificates in PEM.
    ///
    /// # Errors
    ///
    /// Fails when `pem` contains no certificate or a malformed one.
    pub fn parse(pem: &str) -> Result<Self, ChainError> {
        let certificates = CertificateDer::pem_slice_iter(pem.as_bytes())
            .collect::<Result<Vec<_>, _>>()
            .map_err(|_| ChainError::Malformed)?;
        let validity_periods: Option<Vec<ValidityPeriod>> = certificates.iter().map(parse_validity).collect();
        match validity_periods.ok_or(ChainError::Malformed)?.first() {
            Some(&validity_period) => Ok(Self { certificates, validity_period }),
            None if pem.contains("PRIVATE KEY-----") => Err(ChainError::IsPrivateKey),
            None => Err(ChainError::Empty),
        }
    }

    /// Returns the validity period of the first certificate.
    #[must_use]
    pub fn validity_period(&self) -> ValidityPeriod {
        self.validity_period
    }

    /// Combines the chain with its private key in PEM.
    ///
    /// # Errors
    ///
    /// Fails when the key is unusable or belongs to another certificate.
    pub fn with_key(self, pem: &str) -> Result<Certificate, PrivateKeyError> {
        let Ok(key) = PrivateKeyDer::from_pem_slice(pem.as_bytes()) else {
            // The older PEM format marks encryption in a header, not in the label.
            return Err(if pem.contains("BEGIN ENCRYPTED") || pem.contains("Proc-Type: 4,ENCRYPTED") {
                PrivateKeyError::Encrypted
            } else if pem.contains("PRIVATE KEY-----") {
                PrivateKeyError::Unusable
            } else if pem.contains("BEGIN CERTIFICATE") {
                PrivateKeyError::IsCertificate
            } else {
                PrivateKeyError::Empty
            });
        };
        match CertifiedKey::from_der(self.certificates, key, &crypto_provider()) {
            Ok(certified_key) => Ok(Certificate {
                certified_key: Arc::new(certified_key),
                validity_period: self.validity_period,
            }),
            Err(Error::InconsistentKeys(InconsistentKeys::KeyMismatch)) => Err(PrivateKeyError::Mismatch),
            Err(_) => Err(PrivateKeyError::Unusable),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a certificate and its private key in PEM.
    fn generate_certificate_and_key() -> (String, String) {
        let certified_key = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        (certified_key.cert.pem(), certified_key.signing_key.serialize_pem())
    }

    #[test]
    fn a_certificate_accepts_its_own_key() {
        let (cert, key) = generate_certificate_and_key();
        let certificate = CertificateChain::parse(&cert).unwrap().with_key(&key).unwrap();
        assert_eq!(certificate.certified_key().cert.len(), 1);
        assert!(certificate.validity_period().from < certificate.validity_period().until);
        let debug_output = format!("{certificate:?}");
        assert!(
            debug_output.starts_with("Certificate { validity_period:") && !debug_output.contains("key"),
            "the debug output must omit the key: {debug_output}"
        );
    }

    #[test]
    fn an_error_gives_the_reason_why_a_file_is_not_a_certificate() {
        let (cert, key) = generate_certificate_and_key();
        assert_eq!(CertificateChain::parse("").unwrap_err(), ChainError::Empty);
        assert_eq!(CertificateChain::parse(&key).unwrap_err(), ChainError::IsPrivateKey);
        let malformed = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        assert_eq!(CertificateChain::parse(malformed).unwrap_err(), ChainError::Malformed);
        assert_eq!(
            CertificateChain::parse(&format!("{cert}{malformed}")).unwrap_err(),
            ChainError::Malformed
        );
        assert_eq!(CertificateChain::parse(&cert[..cert.len() - 30]).unwrap_err(), ChainError::Malformed);
    }

    #[test]
    fn an_error_gives_the_reason_why_a_file_is_not_the_key_of_the_certificate() {
        let (cert, _) = generate_certificate_and_key();
        let (_, other_key) = generate_certificate_and_key();
        for (key, expected) in [
            ("", PrivateKeyError::Empty),
            (&cert, PrivateKeyError::IsCertificate),
            (&other_key, PrivateKeyError::Mismatch),
            ("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", PrivateKeyError::Unusable),
            (
                "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n",
                PrivateKeyError::Encrypted,
            ),
            (
                "-----BEGIN EC PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\nAAAA\n-----END EC PRIVATE KEY-----\n",
                PrivateKeyError::Encrypted,
            ),
            ("-----BEGIN PRIVATE KEY-----\nAAAA\n", PrivateKeyError::Unusable),
        ] {
            let error = CertificateChain::parse(&cert).unwrap().with_key(key).unwrap_err();
            assert_eq!(error, expected, "the key must be refused with {expected:?}: {key}");
        }
    }
}
