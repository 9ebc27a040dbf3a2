//! Chooses the certificate of each listener, and replaces it: at a reload, and when a certificate of the
//! local authority is due for renewal.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tracing::{debug, info, warn};

use crate::certificate::{self, AuthorityError, CaLocation, Certificate};
use crate::clock;
use crate::policy::certificate::{Renewal, names};
use crate::policy::units::UnixMs;
use crate::server::{Address, Tls};
use crate::tasks;

/// The source of the certificates.
#[derive(Clone, Debug)]
pub enum Https {
    /// No certificate: no TLS.
    Off,
    /// The local authority, for listeners on loopback addresses.
    Authority {
        /// The location of the authority's files.
        location: CaLocation,
        /// Host names of the certificate, beside the names of every machine.
        hosts: Vec<String>,
    },
    /// A configured certificate, for every TCP listener.
    Configured(Certificate),
}

/// The TLS state of a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HttpsState {
    /// TLS is off.
    Off,
    /// TLS with a certificate of the local authority, which clients must trust first.
    Local,
    /// TLS with a certificate of a local authority without files, which clients cannot trust.
    LocalInMemory,
    /// TLS with the configured certificate.
    Configured,
}

/// Interval between two checks of a certificate: a laptop that was suspended for weeks gets a new certificate
/// within this time.
const CHECK_INTERVAL: Duration = Duration::from_secs(3600);

/// The certificates of all listeners; a clone shares them.
#[derive(Clone, Debug)]
pub(super) struct Certificates(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// The certificate of listeners on loopback addresses.
    local: Tls,
    /// The certificate of all other listeners.
    open: Tls,
    addresses: Vec<Address>,
    current: Mutex<Current>,
}

#[derive(Debug)]
struct Current {
    https: Https,
    /// The certificate that the local authority issued.
    issued: Option<Certificate>,
}

impl Certificates {
    /// The certificates of listeners at these addresses. When the local authority cannot be opened, the
    /// program starts without TLS.
    pub(super) fn new(https: Https, addresses: &[Address], now: UnixMs) -> Result<Self, rustls::Error> {
        let certificates = Self(Arc::new(Inner {
            local: Tls::new()?,
            open: Tls::new()?,
            addresses: addresses.to_vec(),
            current: Mutex::new(Current { https: Https::Off, issued: None }),
        }));
        if matches!(https, Https::Authority { .. }) {
            log_exposed_listener(addresses);
        }
        certificates.replace(https, now);
        Ok(certificates)
    }

    /// The certificate of a listener.
    pub(super) fn at(&self, address: &Address) -> Tls {
        if address.is_local() { self.0.local.clone() } else { self.0.open.clone() }
    }

    /// The TLS state of a listener now.
    pub(super) fn state(&self, address: &Address) -> HttpsState {
        match (address, &self.current().https) {
            (Address::Tcp(_), _) if !self.at(address).is_on() => HttpsState::Off,
            (Address::Unix(_), _) | (Address::Tcp(_), Https::Off) => HttpsState::Off,
            (Address::Tcp(_), Https::Configured(_)) => HttpsState::Configured,
            (Address::Tcp(_), Https::Authority { location: CaLocation::Memory, .. }) => {
                HttpsState::LocalInMemory
            }
            (Address::Tcp(_), Https::Authority { location: CaLocation::Folder(_), .. }) => HttpsState::Local,
        }
    }

    /// Replaces the source of the certificates. Open connections are unchanged.
    pub(super) fn replace(&self, https: Https, now: UnixMs) {
        let Inner { local, open, .. } = &*self.0;
        let mut current = self.current();
        let issued = match &https {
            Https::Off => {
                local.show(None);
                open.show(None);
                None
            }
            Https::Configured(certificate) => {
                local.show(Some(certificate.certified_key()));
                open.show(Some(certificate.certified_key()));
                None
            }
            Https::Authority { location, hosts } => {
                open.show(None);
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
                local.show(issued.as_ref().map(Certificate::certified_key));
                issued
            }
        };
        *current = Current { https, issued };
    }

    /// Replaces a certificate of the local authority when it is due; returns whether it was replaced. On an
    /// error the old certificate is kept.
    pub(super) fn renew(&self, now: UnixMs) -> bool {
        let mut current = self.current();
        let Current { https: Https::Authority { location, hosts }, issued: Some(certificate) } = &*current
        else {
            return false;
        };
        match certificate.life().server_verdict(now) {
            Renewal::Keep => return false,
            Renewal::Renew => {}
        }
        match self.issue(location, hosts, now) {
            Ok(issued) => {
                self.0.local.show(issued.as_ref().map(Certificate::certified_key));
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

    /// Checks periodically whether the certificate is due.
    pub(super) async fn renew_when_due(self) {
        loop {
            tokio::time::sleep(CHECK_INTERVAL).await;
            let certificates = self.clone();
            // Renewal reads and may write files.
            let _ = tasks::blocking(move || certificates.renew(clock::now())).await;
        }
    }

    /// Issues a certificate for the listeners on loopback addresses, if there are any.
    fn issue(
        &self,
        location: &CaLocation,
        hosts: &[String],
        now: UnixMs,
    ) -> Result<Option<Certificate>, AuthorityError> {
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
        opened
            .authority
            .issue(&names(hosts, &loopback_addresses), now)
            .map(Some)
            .map_err(AuthorityError::from)
    }

    fn current(&self) -> std::sync::MutexGuard<'_, Current> {
        // The value behind the lock is always replaced as a whole.
        self.0.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Logs that a listener which other machines can reach has no certificate: other machines would not trust the
/// local authority.
fn log_exposed_listener(addresses: &[Address]) {
    if let Some(open) = addresses.iter().find(|address| !address.is_local()) {
        info!(
            event = "https_loopback_only",
            "No https at {open}: the local authority is for this machine only. Set a certificate with \
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

    fn authority(location: CaLocation) -> Https {
        Https::Authority { location, hosts: Vec::new() }
    }

    fn configured() -> Https {
        let generated = rcgen::generate_simple_self_signed(["keys.example".to_owned()]).unwrap();
        let chain = certificate::Chain::read(&generated.cert.pem()).unwrap();
        Https::Configured(chain.with_key(&generated.signing_key.serialize_pem()).unwrap())
    }

    /// The expiry of the certificate in use on loopback.
    fn current_expiry(certificates: &Certificates) -> UnixMs {
        certificates.current().issued.as_ref().unwrap().life().until
    }

    #[test]
    fn the_local_authority_is_for_loopback_and_a_configured_certificate_for_all() {
        let [local, open, unix] = [address("127.0.0.1:1"), address("0.0.0.0:1"), Address::Unix(None)];
        let all = [local.clone(), open.clone(), unix.clone()];
        let certificates = Certificates::new(authority(CaLocation::Memory), &all, NOW).unwrap();
        let states = || [&local, &open, &unix].map(|address| certificates.state(address));
        assert_eq!(states(), [HttpsState::LocalInMemory, HttpsState::Off, HttpsState::Off]);
        certificates.replace(configured(), NOW);
        assert_eq!(states(), [HttpsState::Configured, HttpsState::Configured, HttpsState::Off]);
        certificates.replace(Https::Off, NOW);
        assert_eq!(states(), [HttpsState::Off; 3]);
        certificates.replace(authority(CaLocation::Memory), NOW);
        assert_eq!(states(), [HttpsState::LocalInMemory, HttpsState::Off, HttpsState::Off]);
    }

    #[test]
    fn no_authority_is_created_without_a_loopback_listener() {
        let folder = tempfile::tempdir().unwrap();
        let location = CaLocation::Folder(folder.path().join("tls"));
        let addresses = [address("0.0.0.0:1"), Address::Unix(None)];
        let certificates = Certificates::new(authority(location), &addresses, NOW).unwrap();
        assert_eq!(certificates.state(&addresses[0]), HttpsState::Off);
        assert!(!folder.path().join("tls").exists());
    }

    #[test]
    fn a_certificate_is_replaced_when_it_is_due_and_the_authority_stays() {
        let folder = tempfile::tempdir().unwrap();
        let location = CaLocation::Folder(folder.path().to_owned());
        let local = address("127.0.0.1:1");
        let certificates = Certificates::new(authority(location), std::slice::from_ref(&local), NOW).unwrap();
        let ca = std::fs::read(certificate::ca_file(folder.path())).unwrap();
        let first = current_expiry(&certificates);
        assert!(!certificates.renew(NOW.plus(DAY * 59)));
        assert_eq!(current_expiry(&certificates), first);
        assert!(certificates.renew(NOW.plus(DAY * 61)));
        assert_eq!(current_expiry(&certificates), first.plus(DAY * 61));
        assert!(!certificates.renew(NOW.plus(DAY * 62)), "the next one is due later");
        assert_eq!(std::fs::read(certificate::ca_file(folder.path())).unwrap(), ca);
        // An authority that is about to expire is replaced as well.
        assert!(certificates.renew(NOW.plus(DAY * 3600)));
        assert_ne!(std::fs::read(certificate::ca_file(folder.path())).unwrap(), ca);
        assert_eq!(certificates.state(&local), HttpsState::Local);
    }

    #[test]
    fn a_certificate_that_cannot_be_replaced_stays() {
        let state = tempfile::tempdir().unwrap();
        let folder = state.path().join("tls");
        let local = address("127.0.0.1:1");
        let https = authority(CaLocation::Folder(folder.clone()));
        let certificates = Certificates::new(https, std::slice::from_ref(&local), NOW).unwrap();
        let first = current_expiry(&certificates);
        std::fs::remove_dir_all(&folder).unwrap();
        std::fs::write(&folder, "in the way").unwrap();
        assert!(!certificates.renew(NOW.plus(DAY * 61)));
        assert_eq!((current_expiry(&certificates), certificates.state(&local)), (first, HttpsState::Local));
        // A reload keeps the certificate as well.
        certificates.replace(authority(CaLocation::Folder(folder)), NOW);
        assert_eq!((current_expiry(&certificates), certificates.state(&local)), (first, HttpsState::Local));
    }

    #[test]
    fn an_authority_that_cannot_be_opened_disables_only_https() {
        let state = tempfile::tempdir().unwrap();
        std::fs::write(state.path().join("file"), "").unwrap();
        let https = authority(CaLocation::Folder(state.path().join("file/tls")));
        let local = address("127.0.0.1:1");
        let certificates = Certificates::new(https, std::slice::from_ref(&local), NOW).unwrap();
        assert_eq!(certificates.state(&local), HttpsState::Off);
        assert!(!certificates.renew(NOW.plus(DAY * 61)));
    }
}
