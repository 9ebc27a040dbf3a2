//! The local CA. Its certificate is constrained to the names and addresses of this machine (name
//! constraints), so that a stolen key could impersonate this machine only.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, CidrSubnet, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    GeneralSubtree, IsCa, Issuer, KeyPair, KeyUsagePurpose, NameConstraints, PKCS_ECDSA_P256_SHA256,
    PublicKeyData,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use sha2::{Digest, Sha256};

use super::{Certificate, life, provider};
use crate::policy::certificate::{Life, Renewal};
use crate::policy::units::UnixMs;

/// A CA with its private key. Cannot be printed.
pub struct LocalCa {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
    life: Life,
}

/// The reason why no certificate was made.
#[derive(Debug, thiserror::Error)]
pub enum MakeError {
    /// The certificate cannot be encoded or signed.
    #[error("no certificate can be made: {0}")]
    Certificate(#[from] rcgen::Error),
    /// The TLS library refuses it.
    #[error("the certificate cannot be used: {0}")]
    Tls(#[from] rustls::Error),
}

/// The reason why a stored CA is unusable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// The file has no certificate and key that belong together.
    #[error("it is broken")]
    Broken,
    /// Its certificate expires soon, or has expired.
    #[error("it has expired")]
    Ending,
}

impl LocalCa {
    /// Makes a new CA.
    ///
    /// # Errors
    ///
    /// When the system provides no randomness.
    pub(super) fn make(now: UnixMs) -> Result<Self, MakeError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let life = Life::of_authority(now);
        let mut params = CertificateParams::default();
        (params.not_before, params.not_after) =
            (system_time(life.from).into(), system_time(life.until).into());
        params.distinguished_name = DistinguishedName::new();
        // Each CA has a name of its own: lists of authorities show names, and may still contain an
        // old CA.
        let digest = Sha256::digest(key.public_key_raw());
        let digest: String = digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
        params.distinguished_name.push(DnType::CommonName, format!("Keychoir local authority {digest}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.name_constraints = Some(NameConstraints {
            permitted_subtrees: vec![
                // This also permits all names below it.
                GeneralSubtree::DnsName("localhost".to_owned()),
                GeneralSubtree::IpAddress(subnet(Ipv4Addr::new(127, 0, 0, 0).into(), 8)),
                GeneralSubtree::IpAddress(subnet(Ipv6Addr::LOCALHOST.into(), 128)),
            ],
            excluded_subtrees: Vec::new(),
        });
        let pem = params.self_signed(&key)?.pem();
        Ok(Self { issuer: Issuer::new(params, key), pem, life })
    }

    /// Parses the output of [`secret_pem`](Self::secret_pem).
    pub(super) fn read(pem: &str, now: UnixMs) -> Result<Self, Unfit> {
        let certificate =
            CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|_| Unfit::Broken)?.into_owned();
        let key = PrivateKeyDer::from_pem_slice(pem.as_bytes()).map_err(|_| Unfit::Broken)?;
        let key = KeyPair::try_from(&key).map_err(|_| Unfit::Broken)?;
        let life = life(&certificate).ok_or(Unfit::Broken)?;
        if !matches_key(&certificate, &key) {
            return Err(Unfit::Broken);
        }
        let issuer = Issuer::from_ca_cert_der(&certificate, key).map_err(|_| Unfit::Broken)?;
        match life.authority_verdict(now) {
            Renewal::Keep => Ok(Self { issuer, pem: certificate_pem(pem), life }),
            Renewal::Renew => Err(Unfit::Ending),
        }
    }

    /// Its certificate in PEM, which is public.
    #[must_use]
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// Its certificate and private key in PEM, only for its own file.
    pub(super) fn secret_pem(&self) -> String {
        format!("{}{}", self.pem, self.issuer.key().serialize_pem())
    }

    /// Issues a server certificate for these names and addresses, with a new key that exists in
    /// memory only.
    ///
    /// # Errors
    ///
    /// When the system provides no randomness, or a name is invalid in a certificate.
    pub fn issue(&self, names: &[String], now: UnixMs) -> Result<Certificate, MakeError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let life = Life::of_server(now, self.life);
        let mut params = CertificateParams::new(names)?;
        (params.not_before, params.not_after) =
            (system_time(life.from).into(), system_time(life.until).into());
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "Keychoir");
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key, &self.issuer)?;
        let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
        let certified_key = CertifiedKey::from_der(vec![certificate.der().clone()], key, &provider())?;
        Ok(Certificate { certified_key: Arc::new(certified_key), life })
    }
}

impl fmt::Debug for LocalCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalCa").field("life", &self.life).finish_non_exhaustive()
    }
}

fn subnet(address: IpAddr, prefix: u8) -> CidrSubnet {
    CidrSubnet::from_addr_prefix(address, prefix)
}

/// The time in whole seconds, the precision of certificates.
fn system_time(at: UnixMs) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(at.0 / 1000)
}

/// Whether the certificate is a CA certificate and belongs to this key.
fn matches_key(certificate: &CertificateDer<'_>, key: &KeyPair) -> bool {
    x509_parser::parse_x509_certificate(certificate).is_ok_and(|(_, parsed)| {
        parsed.is_ca() && parsed.public_key().raw == key.subject_public_key_info().as_slice()
    })
}

/// The public part of the file.
fn certificate_pem(pem: &str) -> String {
    const END: &str = "-----END CERTIFICATE-----";
    let start = pem.find("-----BEGIN CERTIFICATE-----").unwrap_or(0);
    let rest = pem.get(start..).unwrap_or_default();
    let end = rest.find(END).map_or(0, |end| end + END.len());
    format!("{}\n", rest.get(..end).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use rustls::RootCertStore;
    use rustls::client::WebPkiServerVerifier;
    use rustls::client::danger::ServerCertVerifier;
    use rustls::pki_types::{ServerName, UnixTime};

    use super::*;

    const NOW: UnixMs = UnixMs(1_800_000_000_000);
    const DAY_MS: u64 = 24 * 3600 * 1000;

    /// Whether a client that trusts the CA accepts this certificate for `name`.
    fn is_trusted(authority: &LocalCa, certificate: &Certificate, name: &str, at: UnixMs) -> bool {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(authority.pem().as_bytes()).unwrap()).unwrap();
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::new(provider()))
            .build()
            .unwrap();
        let name = ServerName::try_from(name).unwrap();
        let at = UnixTime::since_unix_epoch(Duration::from_millis(at.0));
        verifier.verify_server_cert(&certificate.certified_key().cert[0], &[], &name, &[], at).is_ok()
    }

    #[test]
    fn an_issued_certificate_is_trusted_for_this_machine_for_ninety_days() {
        let authority = LocalCa::make(NOW).unwrap();
        let names = ["localhost", "127.0.0.1", "127.0.0.2", "::1", "a.localhost"].map(str::to_owned);
        let certificate = authority.issue(&names, NOW).unwrap();
        for name in &names {
            assert!(is_trusted(&authority, &certificate, name, NOW), "{name}");
        }
        assert!(is_trusted(&authority, &certificate, "localhost", UnixMs(NOW.0 + 89 * DAY_MS)));
        assert!(!is_trusted(&authority, &certificate, "localhost", UnixMs(NOW.0 + 91 * DAY_MS)));
        assert!(!is_trusted(&authority, &certificate, "b.localhost", NOW));
        let other = LocalCa::make(NOW).unwrap();
        assert!(!is_trusted(&other, &certificate, "localhost", NOW));
    }

    #[test]
    fn no_client_trusts_the_authority_for_other_machines() {
        let authority = LocalCa::make(NOW).unwrap();
        for name in ["api.elevenlabs.io", "localhost.example", "10.0.0.1", "128.0.0.1", "::2"] {
            let certificate = authority.issue(&[name.to_owned()], NOW).unwrap();
            assert!(!is_trusted(&authority, &certificate, name, NOW), "{name}");
        }
    }

    #[test]
    fn a_stored_authority_is_read_unchanged() {
        let original = LocalCa::make(NOW).unwrap();
        let read = LocalCa::read(&original.secret_pem(), NOW).unwrap();
        assert_eq!((read.pem(), read.secret_pem()), (original.pem(), original.secret_pem()));
        // Certificates store whole seconds.
        assert_eq!(read.life, original.life);
        let certificate = read.issue(&["localhost".to_owned()], NOW).unwrap();
        assert!(is_trusted(&original, &certificate, "localhost", NOW));
        let ends = UnixMs(original.life.until.0);
        assert_eq!(LocalCa::read(&original.secret_pem(), ends).unwrap_err(), Unfit::Ending);
    }

    #[test]
    fn a_certificate_and_key_that_do_not_match_are_broken() {
        let (one, other) = (LocalCa::make(NOW).unwrap(), LocalCa::make(NOW).unwrap());
        let key = |authority: &LocalCa| authority.issuer.key().serialize_pem();
        let leaf = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        for text in [
            String::new(),
            one.pem().to_owned(),
            key(&one),
            format!("{}{}", one.pem(), key(&other)),
            one.secret_pem()[..one.secret_pem().len() - 40].to_owned(),
            format!("{}{}", leaf.cert.pem(), leaf.signing_key.serialize_pem()),
        ] {
            assert_eq!(LocalCa::read(&text, NOW).unwrap_err(), Unfit::Broken);
        }
    }

    #[test]
    fn the_private_key_of_an_authority_cannot_be_printed() {
        let authority = LocalCa::make(NOW).unwrap();
        let printed = format!("{authority:?} {authority:#?}");
        let key = authority.issuer.key().serialize_pem();
        let line = key.lines().nth(1).unwrap();
        assert!(!printed.contains(line) && !printed.contains("PRIVATE"), "{printed}");
        assert!(!authority.pem().contains("PRIVATE"));
    }
}
