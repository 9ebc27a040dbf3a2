//! Chooses the certificate of each listener, reports the TLS state of a listener, and replaces certificates at a reload
//! or before they expire. `certificate` makes and parses certificates, and `server` uses them.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tracing::{debug, info, warn};

use crate::certificate::{self, CaError, CaLocation, Certificate};
use crate::clock;
use crate::policy::certificate::{Renewal, certificate_names};
use crate::policy::units::UnixMs;
use crate::server::{Address, Tls};
use crate::tasks;

/// The source of the certificates.
#[derive(Clone, Debug)]
pub enum Https {
    /// TLS is disabled.
    Off,
    /// The local CA issues a certificate for the listeners on loopback addresses.
    LocalCa {
        /// The location of the CA.
        location: CaLocation,
        /// Host names in the certificate, in addition to the names that every certificate contains.
        hosts: Vec<String>,
    },
    /// Every TCP listener has this configured certificate.
    Configured(Certificate),
}

/// The TLS state of a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HttpsState {
    /// The listener has no certificate and serves only HTTP without TLS: TLS is disabled or failed, the listener is a
    /// Unix socket, or the local CA issues no certificate for its address.
    Off,
    /// The certificate was issued by the local CA, which clients can be set up to trust.
    LocalCa,
    /// The certificate was issued by a CA in memory, which clients cannot be set up to trust.
    InMemoryCa,
    /// The certificate is the configured one.
    Configured,
}

/// Interval between two checks of whether the certificate must be renewed. A laptop that was suspended for
/// weeks gets a new certificate within this interval.
const RENEWAL_CHECK_INTERVAL: Duration = Duration::from_secs(3600);

/// The certificates of all listeners. Clones share them.
#[derive(Clone, Debug)]
pub(super) struct Certificates(Arc<ListenerCertificates>);

#[derive(Debug)]
struct ListenerCertificates {
    /// The certificate of listeners on loopback addresses.
    loopback: Tls,
    /// The certificate of all other listeners.
    exposed: Tls,
    addresses: Vec<Address>,
    current: Mutex<CurrentSource>,
}

/// The source of the certificates that the listeners use.
#[derive(Debug)]
struct CurrentSource {
    https: Https,
    /// The certificate issued by the local CA, or `None` if the CA is not the source or has issued none.
    issued: Option<Certificate>,
}

impl Certificates {
    /// Sets up the certificates of the listeners at `addresses`. TLS stays disabled when the local CA cannot
    /// be opened.
    pub(super) fn new(https: Https, addresses: &[Address], now: UnixMs) -> Result<Self, rustls::Error> {
        let certificates = Self(Arc::new(ListenerCertificates {
            loopback: Tls::new()?,
            exposed: Tls::new()?,
            addresses: addresses.to_vec(),
            current: Mutex::new(CurrentSource { https: Https::Off, issued: None }),
        }));
        if matches!(https, Https::LocalCa { .. }) {
            log_exposed_listener(addresses);
        }
        certificates.replace(https, now);
        Ok(certificates)
    }

    /// Returns the handle from which the listener at `address` reads its current certificate.
    pub(super) fn tls_for(&self, address: &Address) -> Tls {
        if address.is_local() { self.0.loopback.clone() } else { self.0.exposed.clone() }
    }

    /// Returns the current TLS state of the listener at `address`.
    pub(super) fn state(&self, address: &Address) -> HttpsState {
        if matches!(address, Address::Unix(_)) || !self.tls_for(address).has_certificate() {
            return HttpsState::Off;
        }
        match &self.current().https {
            Https::Off => HttpsState::Off,
            Https::Configured(_) => HttpsState::Configured,
            Https::LocalCa { location: CaLocation::Memory, .. } => HttpsState::InMemoryCa,
            Https::LocalCa { location: CaLocation::Directory(_), .. } => HttpsState::LocalCa,
        }
    }

    /// Replaces the source of the certificates. Open connections are unchanged. If the local CA can issue no
    /// certificate, the certificate that it issued before is kept.
    pub(super) fn replace(&self, https: Https, now: UnixMs) {
        let ListenerCertificates { loopback, exposed, .. } = &*self.0;
        let mut current = self.current();
        let (configured, issued) = match &https {
            Https::Off => (None, None),
            Https::Configured(certificate) => (Some(certificate.certified_key()), None),
            Https::LocalCa { location, hosts } => {
                let previous_certificate = current.issued.take();
                let issued = self.issue(location, hosts, now).unwrap_or_else(|error| {
                    if previous_certificate.is_some() {
                        warn!("the HTTPS certificate cannot be replaced: {error}");
                    } else {
                        warn!(
                            event = "https_off",
                            "HTTPS is disabled: {error}. Set a directory with server.tls_directory, or write \
                             server.tls = \"off\"."
                        );
                    }
                    previous_certificate
                });
                (None, issued)
            }
        };
        loopback.set_certificate(configured.clone().or(issued.as_ref().map(Certificate::certified_key)));
        exposed.set_certificate(configured);
        *current = CurrentSource { https, issued };
    }

    /// Replaces the certificate issued by the local CA if it must be renewed. Returns whether the certificate
    /// was replaced. If a new certificate cannot be issued, the old one is kept.
    pub(super) fn renew(&self, now: UnixMs) -> bool {
        let mut current = self.current();
        let CurrentSource { https: Https::LocalCa { location, hosts }, issued: Some(certificate) } =
            &*current
        else {
            return false;
        };
        if certificate.validity_period().server_renewal(now) == Renewal::Keep {
            return false;
        }
        match self.issue(location, hosts, now) {
            Ok(issued) => {
                self.0.loopback.set_certificate(issued.as_ref().map(Certificate::certified_key));
                debug!("the HTTPS certificate is replaced");
                current.issued = issued;
                true
            }
            Err(error) => {
                warn!("the HTTPS certificate cannot be replaced: {error}; Keychoir tries again later");
                false
            }
        }
    }

    /// Calls [`renew`](Self::renew) periodically.
    pub(super) async fn renew_when_due(self) {
        loop {
            tokio::time::sleep(RENEWAL_CHECK_INTERVAL).await;
            let certificates = self.clone();
            // The renewal reads files and may write them.
            let _ = tasks::spawn_blocking(move || certificates.renew(clock::now())).await;
        }
    }

    /// Issues a certificate for the loopback addresses of the listeners. Returns `None` if no listener has
    /// such an address.
    fn issue(
        &self,
        location: &CaLocation,
        hosts: &[String],
        now: UnixMs,
    ) -> Result<Option<Certificate>, CaError> {
        let loopback_addresses: Vec<_> = self
            .0
            .addresses
            .iter()
            .filter_map(|address| match address {
                Address::Tcp(socket) if address.is_local() => Some(socket.ip()),
                Address::Tcp(_) | Address::Unix(_) => None,
            })
            .collect();
        if loopback_addresses.is_empty() {
            return Ok(None);
        }
        let opened = certificate::open(location, now)?;
        if let Some(quarantined) = &opened.quarantined {
            warn!(event = "ca_replaced", "{quarantined}");
        }
        opened.ca.issue(&certificate_names(hosts, &loopback_addresses), now).map(Some).map_err(CaError::from)
    }

    /// Locks the current source.
    fn current(&self) -> std::sync::MutexGuard<'_, CurrentSource> {
        // A panic of another thread leaves a valid source, which at worst lacks its issued certificate.
        self.0.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Logs that an exposed listener has no certificate, because other machines would not trust the local CA.
fn log_exposed_listener(addresses: &[Address]) {
    if let Some(exposed) = addresses.iter().find(|address| !address.is_local()) {
        info!(
            event = "https_loopback_only",
            "HTTPS is off at {exposed}, because the local CA is for this machine only. Set a certificate with \
             server.tls = {{ cert = \"FILE\", key = \"FILE\" }}, or write \"off\" if a proxy in front of \
             Keychoir serves HTTPS"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixMs = UnixMs(1_800_000_000_000);
    const DAY: Duration = Duration::from_secs(24 * 3600);
    /// A time before the renewal of an issued certificate, which is due 30 days before its lifetime of 90 days ends.
    const BEFORE_RENEWAL: Duration = DAY.saturating_mul(59);
    /// A time after the renewal of an issued certificate.
    const AFTER_RENEWAL: Duration = DAY.saturating_mul(61);
    /// A time after the renewal of the CA, which is due 90 days before its lifetime of 3,650 days ends.
    const AFTER_CA_RENEWAL: Duration = DAY.saturating_mul(3600);

    fn tcp_address(text: &str) -> Address {
        Address::Tcp(text.parse().unwrap())
    }

    fn local_ca(location: CaLocation) -> Https {
        Https::LocalCa { location, hosts: Vec::new() }
    }

    fn configured_https() -> Https {
        let certified_key = rcgen::generate_simple_self_signed(["keys.example".to_owned()]).unwrap();
        let chain = certificate::CertificateChain::parse(&certified_key.cert.pem()).unwrap();
        Https::Configured(chain.with_key(&certified_key.signing_key.serialize_pem()).unwrap())
    }

    /// Returns the expiry of the certificate on loopback addresses.
    fn current_expiry(certificates: &Certificates) -> UnixMs {
        certificates.current().issued.as_ref().unwrap().validity_period().until
    }

    #[test]
    fn the_local_ca_serves_loopback_and_a_configured_certificate_all_tcp_listeners() {
        let [loopback, exposed, unix] =
            [tcp_address("127.0.0.1:1"), tcp_address("0.0.0.0:1"), Address::Unix(None)];
        let addresses = [loopback.clone(), exposed.clone(), unix.clone()];
        let certificates = Certificates::new(local_ca(CaLocation::Memory), &addresses, NOW).unwrap();
        let states = || [&loopback, &exposed, &unix].map(|address| certificates.state(address));
        assert_eq!(states(), [HttpsState::InMemoryCa, HttpsState::Off, HttpsState::Off]);
        certificates.replace(configured_https(), NOW);
        assert_eq!(states(), [HttpsState::Configured, HttpsState::Configured, HttpsState::Off]);
        certificates.replace(Https::Off, NOW);
        assert_eq!(states(), [HttpsState::Off; 3]);
        certificates.replace(local_ca(CaLocation::Memory), NOW);
        assert_eq!(states(), [HttpsState::InMemoryCa, HttpsState::Off, HttpsState::Off]);
    }

    #[test]
    fn a_ca_is_created_only_for_a_loopback_listener() {
        let directory = tempfile::tempdir().unwrap();
        let location = CaLocation::Directory(directory.path().join("tls"));
        let addresses = [tcp_address("0.0.0.0:1"), Address::Unix(None)];
        let certificates = Certificates::new(local_ca(location), &addresses, NOW).unwrap();
        assert_eq!(certificates.state(&addresses[0]), HttpsState::Off);
        assert!(!directory.path().join("tls").exists());
    }

    #[test]
    fn a_certificate_is_renewed_and_the_ca_is_replaced_only_shortly_before_it_expires() {
        let directory = tempfile::tempdir().unwrap();
        let location = CaLocation::Directory(directory.path().to_owned());
        let loopback = tcp_address("127.0.0.1:1");
        let certificates =
            Certificates::new(local_ca(location), std::slice::from_ref(&loopback), NOW).unwrap();
        let first_ca = std::fs::read(certificate::ca_certificate_file(directory.path())).unwrap();
        let first_expiry = current_expiry(&certificates);
        assert!(!certificates.renew(NOW.plus(BEFORE_RENEWAL)));
        assert_eq!(current_expiry(&certificates), first_expiry);
        assert!(certificates.renew(NOW.plus(AFTER_RENEWAL)));
        assert_eq!(current_expiry(&certificates), first_expiry.plus(AFTER_RENEWAL));
        assert!(
            !certificates.renew(NOW.plus(AFTER_RENEWAL + DAY)),
            "the certificate must not be renewed again"
        );
        assert_eq!(std::fs::read(certificate::ca_certificate_file(directory.path())).unwrap(), first_ca);
        // A CA that is about to expire is replaced as well.
        assert!(certificates.renew(NOW.plus(AFTER_CA_RENEWAL)));
        assert_ne!(std::fs::read(certificate::ca_certificate_file(directory.path())).unwrap(), first_ca);
        assert_eq!(certificates.state(&loopback), HttpsState::LocalCa);
    }

    #[test]
    fn a_certificate_is_kept_when_its_renewal_fails() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("tls");
        let loopback = tcp_address("127.0.0.1:1");
        let https = local_ca(CaLocation::Directory(directory.clone()));
        let certificates = Certificates::new(https, std::slice::from_ref(&loopback), NOW).unwrap();
        let first_expiry = current_expiry(&certificates);
        // A file at the path of the directory makes the renewal fail.
        std::fs::remove_dir_all(&directory).unwrap();
        std::fs::write(&directory, "not a directory").unwrap();
        assert!(!certificates.renew(NOW.plus(AFTER_RENEWAL)));
        assert_eq!(
            (current_expiry(&certificates), certificates.state(&loopback)),
            (first_expiry, HttpsState::LocalCa)
        );
        // A reload keeps the certificate as well.
        certificates.replace(local_ca(CaLocation::Directory(directory)), NOW);
        assert_eq!(
            (current_expiry(&certificates), certificates.state(&loopback)),
            (first_expiry, HttpsState::LocalCa)
        );
    }

    #[test]
    fn a_ca_that_cannot_be_opened_disables_only_https() {
        let parent = tempfile::tempdir().unwrap();
        std::fs::write(parent.path().join("file"), "").unwrap();
        let https = local_ca(CaLocation::Directory(parent.path().join("file/tls")));
        let loopback = tcp_address("127.0.0.1:1");
        let certificates = Certificates::new(https, std::slice::from_ref(&loopback), NOW).unwrap();
        assert_eq!(certificates.state(&loopback), HttpsState::Off);
        assert!(!certificates.renew(NOW.plus(AFTER_RENEWAL)));
    }
}
