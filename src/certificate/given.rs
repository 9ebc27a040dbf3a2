//! A certificate that somebody gave us, as the texts of its files. Reading them is the caller's.

use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use rustls::{Error, InconsistentKeys};

use super::{Certificate, life, provider};
use crate::policy::certificate::Life;

/// The certificates of a file, the server's first.
#[derive(Clone, Debug)]
pub struct Chain {
    certificates: Vec<CertificateDer<'static>>,
    life: Life,
}

/// Why a text has no certificates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// There is none in it.
    #[error("there is no certificate in it")]
    Empty,
    /// There is none in it, but a private key.
    #[error("there is a private key in it and no certificate")]
    IsKey,
    /// What is marked as one is none.
    #[error("a certificate in it is broken")]
    Broken,
}

/// Why a text is not the private key of a certificate. Says nothing of the text itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// There is none in it.
    #[error("there is no private key in it")]
    Empty,
    /// There is none in it, but a certificate.
    #[error("there is a certificate in it and no private key")]
    IsCertificate,
    /// It is locked with a passphrase, which nobody can type at the start.
    #[error("the private key is encrypted")]
    Encrypted,
    /// It is of a kind that TLS cannot use, or broken.
    #[error("the private key is broken, or of a kind that is not known")]
    Unusable,
    /// It belongs to another certificate.
    #[error("the private key does not fit the certificate")]
    Mismatch,
}

impl Chain {
    /// Reads certificates in PEM.
    ///
    /// # Errors
    ///
    /// When there is none, or one of them is broken.
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

    /// When the server's certificate holds.
    #[must_use]
    pub fn life(&self) -> Life {
        self.life
    }

    /// Joins the private key in PEM to it.
    ///
    /// # Errors
    ///
    /// When it cannot be used or belongs to another certificate.
    pub fn with_key(self, pem: &str) -> Result<Certificate, KeyError> {
        let Ok(key) = PrivateKeyDer::from_pem_slice(pem.as_bytes()) else {
            // An older form keeps the name of the key and says in a header that it is locked.
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
            Ok(shown) => Ok(Certificate { shown: Arc::new(shown), life: self.life }),
            Err(Error::InconsistentKeys(InconsistentKeys::KeyMismatch)) => Err(KeyError::Mismatch),
            Err(_) => Err(KeyError::Unusable),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made() -> (String, String) {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        (made.cert.pem(), made.signing_key.serialize_pem())
    }

    #[test]
    fn a_certificate_and_its_key_fit() {
        let (cert, key) = made();
        let certificate = Chain::read(&cert).unwrap().with_key(&key).unwrap();
        assert_eq!(certificate.shown().cert.len(), 1);
        assert!(certificate.life().from < certificate.life().until);
        let printed = format!("{certificate:?}");
        assert!(printed.starts_with("Certificate { life:") && !printed.contains("key"), "{printed}");
    }

    #[test]
    fn what_is_no_certificate_says_what_it_is() {
        let (cert, key) = made();
        assert_eq!(Chain::read("").unwrap_err(), ChainError::Empty);
        assert_eq!(Chain::read(&key).unwrap_err(), ChainError::IsKey);
        let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        assert_eq!(Chain::read(broken).unwrap_err(), ChainError::Broken);
        assert_eq!(Chain::read(&format!("{cert}{broken}")).unwrap_err(), ChainError::Broken);
        assert_eq!(Chain::read(&cert[..cert.len() - 30]).unwrap_err(), ChainError::Broken);
    }

    #[test]
    fn what_is_no_key_for_it_says_why() {
        let (cert, _) = made();
        let (_, other) = made();
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
