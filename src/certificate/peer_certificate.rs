//! Describes a certificate that another server has presented, for `keychoir check --online` and `keychoir doctor`.

use rustls::pki_types::CertificateDer;

use super::parse_validity;
use crate::policy::certificate::ValidityPeriod;

/// The parts of a certificate that show who issued it and how long it is valid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerCertificate {
    /// The organization and the common name of the issuer, or its whole name if it has neither.
    pub issuer: String,
    /// The period in which the certificate is valid.
    pub validity_period: ValidityPeriod,
}

impl PeerCertificate {
    /// Parses a certificate. Returns `None` if it is malformed.
    #[must_use]
    pub fn parse(certificate: &CertificateDer<'_>) -> Option<Self> {
        let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
        let issuer = parsed.issuer();
        let first_value =
            |mut attributes: Box<dyn Iterator<Item = &x509_parser::x509::AttributeTypeAndValue<'_>> + '_>| {
                attributes.next().and_then(|attribute| attribute.as_str().ok()).map(str::to_owned)
            };
        let organization = first_value(Box::new(issuer.iter_organization()));
        let common_name = first_value(Box::new(issuer.iter_common_name()));
        let issuer = match (organization, common_name) {
            (Some(organization), Some(common_name)) => format!("{organization} {common_name}"),
            (Some(name), None) | (None, Some(name)) => name,
            (None, None) => issuer.to_string(),
        };
        Some(Self { issuer, validity_period: parse_validity(certificate)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_issuer_and_the_validity_period_are_parsed() {
        let certified_key = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let certificate = PeerCertificate::parse(certified_key.cert.der()).unwrap();
        assert_eq!(certificate.issuer, "rcgen self signed cert");
        assert!(certificate.validity_period.until > certificate.validity_period.from);
        assert_eq!(PeerCertificate::parse(&CertificateDer::from(vec![0; 10])), None);
    }
}
