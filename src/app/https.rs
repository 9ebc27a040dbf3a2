//! Chooses the certificate of each listener, and replaces it at a reload or before it expires. `certificate`
//! makes and parses certificates, and `server` uses them.

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
    /// The local CA, for listeners on loopback addresses.
    LocalCa {
        /// The location of the CA.
        location: CaLocation,
        /// Host names in the certificate, in addition to those of every machine.
        hosts: Vec<String>,
    },
    /// A configured certificate, for every TCP listener.
    Configured(Certificate),
}

/// The TLS state of a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HttpsState {
    /// TLS is disabled.
    Off,
    /// A certificate of the local CA, which clients can be set up to trust.
    LocalCa,
    /// A certificate of a CA in memory, which clients cannot be set up to trust.
    InMemoryCa,
    /// The configured certificate.
    Configured,
}

/// Interval between two checks whether the certificate must be renewed. A laptop that was suspended for weeks
/// gets a new certificate within this time.
const RENEWAL_CHECK_INTERVAL: Duration = Duration::from_secs(3600);

/// The certificates of all listeners. Clones share them.
#[derive(Clone, Debug)]
pub(super) struct Certificates(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// The TLS state of listeners on loopback addresses.
    loopback: Tls,
    /// The TLS state of all other listeners.
    exposed: Tls,
    addresses: Vec<Address>,
    current: Mutex<CurrentSource>,
}

#[derive(Debug)]
struct CurrentSource {
    https: Https,
    /// The certificate issued by the local CA.
    issued: Option<Certificate>,
}

impl Certificates {
    /// Sets up the certificates of the listeners at `addresses`. TLS stays disabled when the local CA cannot
    /// be opened.
    pub(super) fn new(https: Https, addresses: &[Address], now: UnixMs) -> Result<Self, rustls::Error> {
        let certificates = Self(Arc::new(Inner {
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

    /// The TLS state to pass to the listener at `address`.
    pub(super) fn tls_for(&self, address: &Address) -> Tls {
        if address.is_local() { self.0.loopback.clone() } else { self.0.exposed.clone() }
    }

    /// The current TLS state of a listener.
    pub(super) fn state(&self, address: &Address) -> HttpsState {
        match (address, &self.current().https) {
            (Address::Tcp(_), _) if !self.tls_for(address).has_certificate() => HttpsState::Off,
            (Address::Unix(_), _) | (Address::Tcp(_), Https::Off) => HttpsState::Off,
            (Address::Tcp(_), Https::Configured(_)) => HttpsState::Configured,
            (Address::Tcp(_), Https::LocalCa { location: CaLocation::Memory, .. }) => HttpsState::InMemoryCa,
            (Address::Tcp(_), Https::LocalCa { location: CaLocation::Folder(_), .. }) => HttpsState::LocalCa,
        }
    }

    /// Replaces the source of the certificates. Open connections are unchanged.
    pub(super) fn replace(&self, https: Https, now: UnixMs) {
        let Inner { loopback, exposed, .. } = &*self.0;
        let mut current = self.current();
        let (configured, issued) = match &https {
            Https::Off => (None, None),
            Https::Configured(certificate) => (Some(certificate.certified_key()), None),
            Https::LocalCa { location, hosts } => {
                let issued = match (self.issue(location, hosts, now), current.issued.take()) {
                    (Ok(issued), _) => issued,
                    (Err(error), Some(issued)) => {
                        warn!("the https certificate is not replaced: {error}");
                        Some(issued)
                    }
                    (Err(error), None) => {
                        warn!(
                            event = "https_off",
                            "https is off: {error}. Set a folder with server.tls_directory, or \
                             write server.tls = \"off\"."
                        );
                        None
                    }
                };
                (None, issued)
            }
        };
        loopback.set_certificate(configured.clone().or(issued.as_ref().map(Certificate::certified_key)));
        exposed.set_certificate(configured);
        *current = CurrentSource { https, issued };
    }

    /// Replaces the certificate of the local CA if it must be renewed; returns whether it was replaced. On an
    /// error the old certificate is kept.
    pub(super) fn renew(&self, now: UnixMs) -> bool {
        let mut current = self.current();
        let CurrentSource { https: Https::LocalCa { location, hosts }, issued: Some(certificate) } =
            &*current
        else {
            return false;
        };
        if certificate.life().server_renewal(now) == Renewal::Keep {
            return false;
        }
        match self.issue(location, hosts, now) {
            Ok(issued) => {
                self.0.loopback.set_certificate(issued.as_ref().map(Certificate::certified_key));
                debug!("the https certificate is replaced");
                current.issued = issued;
                true
            }
            Err(error) => {
                warn!("the https certificate cannot be replaced: {error}; it is tried again later");
                false
            }
        }
    }

    /// Calls [`renew`](Self::renew) periodically.
    pub(super) async fn renew_when_due(self) {
        loop {
            tokio::time::sleep(RENEWAL_CHECK_INTERVAL).await;
            let certificates = self.clone();
            // Renewal reads and may write files.
            let _ = tasks::spawn_blocking(move || certificates.renew(clock::now())).await;
        }
    }

    /// Issues a certificate for the loopback addresses of the listeners, or `None` without such listeners.
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

    fn current(&self) -> std::sync::MutexGuard<'_, CurrentSource> {
        // Not invalid after a panic: the value is always replaced as a whole.
        self.0.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Logs that an exposed listener has no certificate, because other machines would not trust the local CA.
fn log_exposed_listener(addresses: &[Address]) {
    if let Some(exposed) = addresses.iter().find(|address| !address.is_local()) {
        info!(
            event = "https_loopback_only",
            "No https at {exposed}: the local authority is for this machine only. Set a certificate with \
             server.tls = {{ cert = \"FILE\", key = \"FILE\" }}, or write \"off\" if a proxy in front of \
             Keychoir serves https"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixMs = UnixMs(1_800_000_000_000);
    const DAY: Duration = Duration::from_secs(24 * 3600);

    fn address(text: &str) -> Address {
        Address::Tcp(text.parse().unwrap())
    }

    fn local_ca(location: CaLocation) -> Https {
        Https::LocalCa { location, hosts: Vec::new() }
    }

    fn configured() -> Https {
        let generated = rcgen::generate_simple_self_signed(["keys.example".to_owned()]).unwrap();
        let chain = certificate::CertificateChain::parse(&generated.cert.pem()).unwrap();
        Https::Configured(chain.with_key(&generated.signing_key.serialize_pem()).unwrap())
    }

    /// The expiry of the certificate on loopback addresses.
    fn current_expiry(certificates: &Certificates) -> UnixMs {
        certificates.current().issued.as_ref().unwrap().life().until
    }

    #[test]
    fn the_local_ca_serves_loopback_and_a_configured_certificate_all_tcp_listeners() {
        let [loopback, exposed, unix] = [address("127.0.0.1:1"), address("0.0.0.0:1"), Address::Unix(None)];
        let all = [loopback.clone(), exposed.clone(), unix.clone()];
        let certificates = Certificates::new(local_ca(CaLocation::Memory), &all, NOW).unwrap();
        let states = || [&loopback, &exposed, &unix].map(|address| certificates.state(address));
        assert_eq!(states(), [HttpsState::InMemoryCa, HttpsState::Off, HttpsState::Off]);
        certificates.replace(configured(), NOW);
        assert_eq!(states(), [HttpsState::Configured, HttpsState::Configured, HttpsState::Off]);
        certificates.replace(Https::Off, NOW);
        assert_eq!(states(), [HttpsState::Off; 3]);
        certificates.replace(local_ca(CaLocation::Memory), NOW);
        assert_eq!(states(), [HttpsState::InMemoryCa, HttpsState::Off, HttpsState::Off]);
    }

    #[test]
    fn a_ca_is_created_only_for_a_loopback_listener() {
        let folder = tempfile::tempdir().unwrap();
        let location = CaLocation::Folder(folder.path().join("tls"));
        let addresses = [address("0.0.0.0:1"), Address::Unix(None)];
        let certificates = Certificates::new(local_ca(location), &addresses, NOW).unwrap();
        assert_eq!(certificates.state(&addresses[0]), HttpsState::Off);
        assert!(!folder.path().join("tls").exists());
    }

    #[test]
    fn a_certificate_is_renewed_and_the_ca_stays() {
        let folder = tempfile::tempdir().unwrap();
        let location = CaLocation::Folder(folder.path().to_owned());
        let loopback = address("127.0.0.1:1");
        let certificates =
            Certificates::new(local_ca(location), std::slice::from_ref(&loopback), NOW).unwrap();
        let ca = std::fs::read(certificate::ca_file(folder.path())).unwrap();
        let first = current_expiry(&certificates);
        assert!(!certificates.renew(NOW.plus(DAY * 59)));
        assert_eq!(current_expiry(&certificates), first);
        assert!(certificates.renew(NOW.plus(DAY * 61)));
        assert_eq!(current_expiry(&certificates), first.plus(DAY * 61));
        assert!(!certificates.renew(NOW.plus(DAY * 62)), "the certificate was renewed again");
        assert_eq!(std::fs::read(certificate::ca_file(folder.path())).unwrap(), ca);
        // A CA that is about to expire is replaced as well.
        assert!(certificates.renew(NOW.plus(DAY * 3600)));
        assert_ne!(std::fs::read(certificate::ca_file(folder.path())).unwrap(), ca);
        assert_eq!(certificates.state(&loopback), HttpsState::LocalCa);
    }

    #[test]
    fn a_certificate_is_kept_when_its_renewal_fails() {
        let state = tempfile::tempdir().unwrap();
        let folder = state.path().join("tls");
        let loopback = address("127.0.0.1:1");
        let https = local_ca(CaLocation::Folder(folder.clone()));
        let certificates = Certificates::new(https, std::slice::from_ref(&loopback), NOW).unwrap();
        let first = current_expiry(&certificates);
        std::fs::remove_dir_all(&folder).unwrap();
        std::fs::write(&folder, "in the way").unwrap();
        assert!(!certificates.renew(NOW.plus(DAY * 61)));
        assert_eq!(
            (current_expiry(&certificates), certificates.state(&loopback)),
            (first, HttpsState::LocalCa)
        );
        // A reload keeps the certificate as well.
        certificates.replace(local_ca(CaLocation::Folder(folder)), NOW);
        assert_eq!(
            (current_expiry(&certificates), certificates.state(&loopback)),
            (first, HttpsState::LocalCa)
        );
    }

    #[test]
    fn a_ca_that_cannot_be_opened_disables_only_https() {
        let state = tempfile::tempdir().unwrap();
        std::fs::write(state.path().join("file"), "").unwrap();
        let https = local_ca(CaLocation::Folder(state.path().join("file/tls")));
        let loopback = address("127.0.0.1:1");
        let certificates = Certificates::new(https, std::slice::from_ref(&loopback), NOW).unwrap();
        assert_eq!(certificates.state(&loopback), HttpsState::Off);
        assert!(!certificates.renew(NOW.plus(DAY * 61)));
    }
}
