//! The server's TLS certificates: one from configured files, or one issued by a local CA that
//! Keychoir makes and keeps itself.
//!
//! A private key leaves this module only into the TLS library and the CA's own file.

mod configured;

mod folder;
mod local_ca;

mod bundle;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::CertificateDer;
use rustls::sign::CertifiedKey;

use crate::policy::certificate::Life;
use crate::policy::units::UnixMs;

pub use bundle::{BundleError, bundle, refresh_bundle, roots};
pub use configured::{Chain, ChainError, KeyError};
pub use folder::{AuthorityError, OpenedCa, QuarantinedFile, ca_file, open};
pub use local_ca::{LocalCa, MakeError, Unfit};

/// The place where the local CA is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CaLocation {
    /// In this folder.
    Folder(PathBuf),
    /// In memory, until the program ends: no client can be set up to trust it.
    Memory,
}

/// A certificate with its private key, in the form of the TLS library. Cheap to clone.
#[derive(Clone)]
pub struct Certificate {
    certified_key: Arc<CertifiedKey>,
    life: Life,
}

impl Certificate {
    /// The certificate and key for the TLS library.
    #[must_use]
    pub fn certified_key(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.certified_key)
    }

    /// Its validity period.
    #[must_use]
    pub fn life(&self) -> Life {
        self.life
    }
}

impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificate").field("life", &self.life).finish_non_exhaustive()
    }
}

/// The crypto provider is passed explicitly, as in `upstream`, and never installed for the whole
/// process.
fn provider() -> CryptoProvider {
    rustls::crypto::ring::default_provider()
}

/// The validity period of a certificate; `None` if it cannot be parsed.
fn life(certificate: &CertificateDer<'_>) -> Option<Life> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let unix_ms = |seconds: i64| UnixMs(u64::try_from(seconds).unwrap_or(0).saturating_mul(1000));
    let validity = parsed.validity();
    Some(Life {
        from: unix_ms(validity.not_before.timestamp()),
        until: unix_ms(validity.not_after.timestamp()),
    })
}
