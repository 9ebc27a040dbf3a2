//! Parses a configured certificate and its key from the texts of their files. The caller reads the
//! files.

use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use rustls::{Error, InconsistentKeys};

use super::{Certificate, life, provider};
use crate::policy::certificate::Life;

/// The certificate chain of a file, the server's certificate first.
#[derive(Clone, Debug)]
pub struct Chain {
    certificates: Vec<CertificateDer<'static>>,
    life: Life,
}

/// The reason why a text contains no usable certificates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// It contains no certificate.
    #[error("there is no certificate in the file")]
    Empty,
    /// It contains a private key, but no certificate.
    #[error("there is a private key in the file and no certificate")]
    IsKey,
    /// A block marked as a certificate cannot be parsed.
    #[error("a certificate in the file is broken")]
    Broken,
}

/// The reason why a text is not the private key of a certificate. Contains nothing of the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// It contains no private key.
    #[error("there is no private key in the file")]
    Empty,
    /// It contains a certificate, but no private key.
    #[error("there is a certificate in the file and no private key")]
    IsCertificate,
    /// The key is encrypted with a passphrase, which cannot be entered at the start.
    #[error("the private key is encrypted")]
    Encrypted,
    /// The key is broken, or of a kind that the TLS library does not support.
    #[error("the private key is broken, or of an unsupported kind")]
    Unusable,
    /// The key belongs to another certificate.
    #[error("the private key does not fit the certificate")]
    Mismatch,
}

impl Chain {
    /// Parses certificates in PEM.
    ///
    /// # Errors
    ///
    /// When the text contains no certificate, or a broken one.
    pub fn read(pem: &str) -> Result<Self, ChainError> {
        let certificates = CertificateDer::pem_slice_iter(pem.as_bytes())
            .collect::<Result<Vec<_>, _>>()
            .map_err(|_| ChainError::Broken)?;
        let lives: Option<Vec<Life>> = certificates.iter().map(life).collect();
        match lives.ok_or(ChainError::Broken)?.first() {
            Some(&life) => Ok(Self { certificates, life }),
            None if pem.contains("PRIVATE KEY-----") => Err(ChainError::IsKey),
            None => Err(ChainError::Empty),
        }
    }

    /// The validity period of the server's certificate.
    #[must_use]
    pub fn life(&self) -> Life {
        self.life
    }

    /// Combines the chain with its private key in PEM.
    ///
    /// # Errors
    ///
    /// When the key is unusable or belongs to another certificate.
    pub fn with_key(self, pem: &str) -> Result<Certificate, KeyError> {
        let Ok(key) = PrivateKeyDer::from_pem_slice(pem.as_bytes()) else {
            // The older PEM form keeps the key's label and marks the encryption in a header.
            return Err(if pem.contains("BEGIN ENCRYPTED") || pem.contains("Proc-Type: 4,ENCRYPTED") {
                KeyError::Encrypted
            } else if pem.contains("PRIVATE KEY-----") {
                KeyError::Unusable
            } else if pem.contains("BEGIN CERTIFICATE") {
                KeyError::IsCertificate
            } else {
                KeyError::Empty
            });
        };
        match CertifiedKey::from_der(self.certificates, key, &provider()) {
            Ok(certified_key) => Ok(Certificate { certified_key: Arc::new(certified_key), life: self.life }),
            Err(Error::InconsistentKeys(InconsistentKeys::KeyMismatch)) => Err(KeyError::Mismatch),
            Err(_) => Err(KeyError::Unusable),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generated() -> (String, String) {
        let generated = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        (generated.cert.pem(), generated.signing_key.serialize_pem())
    }

    #[test]
    fn a_certificate_and_its_key_fit() {
        let (cert, key) = generated();
        let certificate = Chain::read(&cert).unwrap().with_key(&key).unwrap();
        assert_eq!(certificate.certified_key().cert.len(), 1);
        assert!(certificate.life().from < certificate.life().until);
        let printed = format!("{certificate:?}");
        assert!(printed.starts_with("Certificate { life:") && !printed.contains("key"), "{printed}");
    }

    #[test]
    fn the_error_names_the_reason_why_a_text_is_no_certificate() {
        let (cert, key) = generated();
        assert_eq!(Chain::read("").unwrap_err(), ChainError::Empty);
        assert_eq!(Chain::read(&key).unwrap_err(), ChainError::IsKey);
        let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        assert_eq!(Chain::read(broken).unwrap_err(), ChainError::Broken);
        assert_eq!(Chain::read(&format!("{cert}{broken}")).unwrap_err(), ChainError::Broken);
        assert_eq!(Chain::read(&cert[..cert.len() - 30]).unwrap_err(), ChainError::Broken);
    }

    #[test]
    fn the_error_names_the_reason_why_a_text_is_no_key_of_the_certificate() {
        let (cert, _) = generated();
        let (_, other) = generated();
        let wrong = |key: &str| Chain::read(&cert).unwrap().with_key(key).unwrap_err();
        assert_eq!(wrong(""), KeyError::Empty);
        assert_eq!(wrong(&cert), KeyError::IsCertificate);
        assert_eq!(wrong(&other), KeyError::Mismatch);
        assert_eq!(
            wrong("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"),
            KeyError::Unusable
        );
        assert_eq!(
            wrong("-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n"),
            KeyError::Encrypted
        );
        assert_eq!(
            wrong(
                "-----BEGIN EC PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\nAAAA\n-----END EC PRIVATE KEY-----\n"
            ),
            KeyError::Encrypted
        );
        assert_eq!(wrong("-----BEGIN PRIVATE KEY-----\nAAAA\n"), KeyError::Unusable);
    }
}
