//! Generates the local CA, converts it to and from PEM, and issues the certificates of listeners on loopback addresses
//! with it. Name constraints in its certificate limit it to `localhost` and loopback addresses, so that a stolen key
//! cannot impersonate other machines.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
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

use super::{Certificate, crypto_provider, parse_validity};
use crate::policy::certificate::{Renewal, ValidityPeriod};
use crate::policy::units::UnixMs;

/// A CA with its private key. The `Debug` output omits the key.
pub struct LocalCa {
    issuer: Issuer<'static, KeyPair>,
    /// The certificate in PEM, without the private key.
    pem: String,
    validity_period: ValidityPeriod,
}

/// The reason why a certificate cannot be created.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// The certificate cannot be encoded or signed.
    #[error("a certificate cannot be created: {0}")]
    Certificate(#[from] rcgen::Error),
    /// The TLS library rejects the certificate.
    #[error("the certificate cannot be used: {0}")]
    Tls(#[from] rustls::Error),
}

/// The reason why a stored CA is unusable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CaDefect {
    /// The file does not contain a CA certificate and its key.
    #[error("The local CA is malformed")]
    Malformed,
    /// The certificate has expired or expires soon.
    #[error("The local CA has expired")]
    Expired,
}

impl LocalCa {
    /// Generates a new CA.
    ///
    /// # Errors
    ///
    /// Fails when the key or the certificate cannot be created, for example without randomness from the system.
    pub(super) fn generate(now: UnixMs) -> Result<Self, CertificateError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let validity_period = ValidityPeriod::for_ca(now);
        let mut params = CertificateParams::default();
        (params.not_before, params.not_after) =
            (system_time(validity_period.from).into(), system_time(validity_period.until).into());
        params.distinguished_name = DistinguishedName::new();
        // Each CA has a different name, because the lists in which users trust CAs show names and may still
        // contain an old CA.
        let digest = Sha256::digest(key.public_key_raw());
        let suffix: String = digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
        params.distinguished_name.push(DnType::CommonName, format!("Keychoir local authority {suffix}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.name_constraints = Some(NameConstraints {
            permitted_subtrees: vec![
                // This entry also permits all subdomains.
                GeneralSubtree::DnsName("localhost".to_owned()),
                GeneralSubtree::IpAddress(CidrSubnet::from_addr_prefix(
                    Ipv4Addr::new(127, 0, 0, 0).into(),
                    8,
                )),
                GeneralSubtree::IpAddress(CidrSubnet::from_addr_prefix(Ipv6Addr::LOCALHOST.into(), 128)),
            ],
            excluded_subtrees: Vec::new(),
        });
        let pem = params.self_signed(&key)?.pem();
        Ok(Self { issuer: Issuer::new(params, key), pem, validity_period })
    }

    /// Parses the output of [`secret_pem`](Self::secret_pem).
    pub(super) fn parse(pem: &str, now: UnixMs) -> Result<Self, CaDefect> {
        let certificate =
            CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|_| CaDefect::Malformed)?.into_owned();
        let key_der = PrivateKeyDer::from_pem_slice(pem.as_bytes()).map_err(|_| CaDefect::Malformed)?;
        let key = KeyPair::try_from(&key_der).map_err(|_| CaDefect::Malformed)?;
        let validity_period = parse_validity(&certificate).ok_or(CaDefect::Malformed)?;
        if !matches_key(&certificate, &key) {
            return Err(CaDefect::Malformed);
        }
        let issuer = Issuer::from_ca_cert_der(&certificate, key).map_err(|_| CaDefect::Malformed)?;
        match validity_period.ca_renewal(now) {
            Renewal::Keep => Ok(Self { issuer, pem: extract_certificate_pem(pem), validity_period }),
            Renewal::Renew => Err(CaDefect::Expired),
        }
    }

    /// Returns the certificate in PEM, without the private key.
    #[must_use]
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// Returns the certificate and private key in PEM. They may be written only to the key file of the CA.
    pub(super) fn secret_pem(&self) -> String {
        format!("{}{}", self.pem, self.issuer.key().serialize_pem())
    }

    /// Issues a server certificate for names and IP addresses, with a new key that exists only in memory.
    ///
    /// # Errors
    ///
    /// Fails when the key or the certificate cannot be created, for example because a name is not valid in a
    /// certificate.
    pub fn issue(&self, names: &[String], now: UnixMs) -> Result<Certificate, CertificateError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let validity_period = ValidityPeriod::for_server(now, self.validity_period);
        let mut params = CertificateParams::new(names)?;
        (params.not_before, params.not_after) =
            (system_time(validity_period.from).into(), system_time(validity_period.until).into());
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "Keychoir");
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key, &self.issuer)?;
        let key_der = PrivateKeyDer::Pkcs8(key.serialize_der().into());
        let certified_key =
            CertifiedKey::from_der(vec![certificate.der().clone()], key_der, &crypto_provider())?;
        Ok(Certificate { certified_key: Arc::new(certified_key), validity_period })
    }
}

impl fmt::Debug for LocalCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalCa").field("validity_period", &self.validity_period).finish_non_exhaustive()
    }
}

/// Converts a time, and truncates it to whole seconds, which is the precision of certificates.
fn system_time(time: UnixMs) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(time.0 / 1000)
}

/// Returns whether `certificate` is the CA certificate of `key`.
fn matches_key(certificate: &CertificateDer<'_>, key: &KeyPair) -> bool {
    x509_parser::parse_x509_certificate(certificate).is_ok_and(|(_, parsed)| {
        parsed.is_ca() && parsed.public_key().raw == key.subject_public_key_info().as_slice()
    })
}

/// Extracts the certificate from `pem`, which also contains the private key.
fn extract_certificate_pem(pem: &str) -> String {
    const END: &str = "-----END CERTIFICATE-----";
    let start = pem.find("-----BEGIN CERTIFICATE-----").unwrap_or(0);
    let remaining_pem = pem.get(start..).unwrap_or_default();
    let end = remaining_pem.find(END).map_or(0, |end| end + END.len());
    format!("{}\n", remaining_pem.get(..end).unwrap_or_default())
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

    /// Returns whether a client that trusts the CA accepts this certificate for `name` at `time`.
    fn is_trusted(ca: &LocalCa, certificate: &Certificate, name: &str, time: UnixMs) -> bool {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(ca.pem().as_bytes()).unwrap()).unwrap();
        let verifier =
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::new(crypto_provider()))
                .build()
                .unwrap();
        let server_name = ServerName::try_from(name).unwrap();
        let unix_time = UnixTime::since_unix_epoch(Duration::from_millis(time.0));
        let server_certificate = &certificate.certified_key().cert[0];
        verifier.verify_server_cert(server_certificate, &[], &server_name, &[], unix_time).is_ok()
    }

    #[test]
    fn an_issued_certificate_is_trusted_for_this_machine_for_ninety_days() {
        let ca = LocalCa::generate(NOW).unwrap();
        let names = ["localhost", "127.0.0.1", "127.0.0.2", "::1", "a.localhost"].map(str::to_owned);
        let certificate = ca.issue(&names, NOW).unwrap();
        for name in &names {
            assert!(is_trusted(&ca, &certificate, name, NOW), "the certificate must be trusted for {name}");
        }
        assert!(is_trusted(&ca, &certificate, "localhost", UnixMs(NOW.0 + 89 * DAY_MS)));
        assert!(!is_trusted(&ca, &certificate, "localhost", UnixMs(NOW.0 + 91 * DAY_MS)));
        assert!(!is_trusted(&ca, &certificate, "b.localhost", NOW));
        let other_ca = LocalCa::generate(NOW).unwrap();
        assert!(!is_trusted(&other_ca, &certificate, "localhost", NOW));
    }

    #[test]
    fn clients_do_not_trust_the_ca_for_other_machines() {
        let ca = LocalCa::generate(NOW).unwrap();
        for name in ["api.elevenlabs.io", "localhost.example", "10.0.0.1", "128.0.0.1", "::2"] {
            let certificate = ca.issue(&[name.to_owned()], NOW).unwrap();
            assert!(!is_trusted(&ca, &certificate, name, NOW), "no certificate must be trusted for {name}");
        }
    }

    #[test]
    fn a_stored_ca_is_parsed_unchanged() {
        let original = LocalCa::generate(NOW).unwrap();
        let parsed_ca = LocalCa::parse(&original.secret_pem(), NOW).unwrap();
        assert_eq!((parsed_ca.pem(), parsed_ca.secret_pem()), (original.pem(), original.secret_pem()));
        // Certificates store whole seconds.
        assert_eq!(parsed_ca.validity_period, original.validity_period);
        let certificate = parsed_ca.issue(&["localhost".to_owned()], NOW).unwrap();
        assert!(is_trusted(&original, &certificate, "localhost", NOW));
        let expiry = UnixMs(original.validity_period.until.0);
        assert_eq!(LocalCa::parse(&original.secret_pem(), expiry).unwrap_err(), CaDefect::Expired);
    }

    #[test]
    fn a_certificate_and_key_that_do_not_match_are_malformed() {
        let (ca, other_ca) = (LocalCa::generate(NOW).unwrap(), LocalCa::generate(NOW).unwrap());
        let key_pem = |ca: &LocalCa| ca.issuer.key().serialize_pem();
        let leaf = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        for pem in [
            String::new(),
            ca.pem().to_owned(),
            key_pem(&ca),
            format!("{}{}", ca.pem(), key_pem(&other_ca)),
            ca.secret_pem()[..ca.secret_pem().len() - 40].to_owned(),
            format!("{}{}", leaf.cert.pem(), leaf.signing_key.serialize_pem()),
        ] {
            assert_eq!(LocalCa::parse(&pem, NOW).unwrap_err(), CaDefect::Malformed);
        }
    }

    #[test]
    fn the_debug_output_of_a_ca_omits_its_private_key() {
        let ca = LocalCa::generate(NOW).unwrap();
        let debug_output = format!("{ca:?} {ca:#?}");
        let key = ca.issuer.key().serialize_pem();
        let first_key_line = key.lines().nth(1).unwrap();
        assert!(
            !debug_output.contains(first_key_line) && !debug_output.contains("PRIVATE"),
            "the debug output must omit the key: {debug_output}"
        );
        assert!(!ca.pem().contains("PRIVATE"));
    }
}
