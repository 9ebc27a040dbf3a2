//! Which certificate is shown where, and when another takes its place: at a reload, and when a
//! certificate by the local authority is due.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tracing::{debug, info, warn};

use crate::certificate::{self, AuthorityError, CaLocation, Certificate};
use crate::clock;
use crate::policy::certificate::{Renewal, names};
use crate::policy::units::UnixMs;
use crate::server::{Address, Tls};
use crate::tasks;

/// Where certificates come from.
#[derive(Clone, Debug)]
pub enum Https {
    /// From nowhere: no TLS.
    Off,
    /// From the local authority, for listeners on loopback.
    Authority {
        /// Where the authority lives.
        place: CaLocation,
        /// Names that are ours, beside those that every machine has for itself.
        hosts: Vec<String>,
    },
    /// From somebody else, for every port.
    Given(Certificate),
}

/// How a listener's clients can speak TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HttpsState {
    /// They cannot.
    Off,
    /// With a certificate by the local authority, which clients must come to trust.
    Local,
    /// With a certificate by the local authority, which nobody can come to trust.
    LocalInMemory,
    /// With the certificate that was given.
    Given,
}

/// A certificate is looked at this often: a laptop that slept for weeks has a new one within this
/// time.
const LOOK: Duration = Duration::from_secs(3600);

/// The certificates of all listeners. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Certificates(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// For listeners that only this machine reaches.
    local: Tls,
    /// For the others.
    open: Tls,
    addresses: Vec<Address>,
    current: Mutex<Current>,
}

#[derive(Debug)]
struct Current {
    https: Https,
    /// The one by the local authority.
    issued: Option<Certificate>,
}

impl Certificates {
    /// For listeners at these addresses. A local authority that cannot be had costs TLS and not the
    /// start.
    pub(super) fn new(https: Https, addresses: &[Address], now: UnixMs) -> Result<Self, rustls::Error> {
        let certificates = Self(Arc::new(Inner {
            local: Tls::new()?,
            open: Tls::new()?,
            addresses: addresses.to_vec(),
            current: Mutex::new(Current { https: Https::Off, issued: None }),
        }));
        if matches!(https, Https::Authority { .. }) {
            tell_beyond_loopback(addresses);
        }
        certificates.replace(https, now);
        Ok(certificates)
    }

    /// Those of a listener.
    pub(super) fn at(&self, address: &Address) -> Tls {
        if address.is_local() { self.0.local.clone() } else { self.0.open.clone() }
    }

    /// How clients of a listener can speak TLS now.
    pub(super) fn state(&self, address: &Address) -> HttpsState {
        match (address, &self.current().https) {
            (Address::Tcp(_), _) if !self.at(address).is_on() => HttpsState::Off,
            (Address::Unix(_), _) | (Address::Tcp(_), Https::Off) => HttpsState::Off,
            (Address::Tcp(_), Https::Given(_)) => HttpsState::Given,
            (Address::Tcp(_), Https::Authority { place: CaLocation::Memory, .. }) => {
                HttpsState::LocalInMemory
            }
            (Address::Tcp(_), Https::Authority { place: CaLocation::Folder(_), .. }) => HttpsState::Local,
        }
    }

    /// Goes by `https` from now on. Connections stay as they are.
    pub(super) fn replace(&self, https: Https, now: UnixMs) {
        let Inner { local, open, .. } = &*self.0;
        let mut current = self.current();
        let issued = match &https {
            Https::Off => {
                local.show(None);
                open.show(None);
                None
            }
            Https::Given(certificate) => {
                local.show(Some(certificate.shown()));
                open.show(Some(certificate.shown()));
                None
            }
            Https::Authority { place, hosts } => {
                open.show(None);
                let issued = match (self.issue(place, hosts, now), current.issued.take()) {
                    (Ok(issued), _) => issued,
                    (Err(error), Some(issued)) => {
                        warn!("the certificate of https stays as it is: {error}");
                        Some(issued)
                    }
                    (Err(error), None) => {
                        warn!(
                            event = "https_off",
                            "There is no https: {error}. Name a folder with server.tls_directory, or \
                             write server.tls = \"off\"."
                        );
                        None
                    }
                };
                local.show(issued.as_ref().map(Certificate::shown));
                issued
            }
        };
        *current = Current { https, issued };
    }

    /// Replaces a certificate by the local authority when it is due; whether it did. When it cannot,
    /// the old one stays.
    pub(super) fn renew(&self, now: UnixMs) -> bool {
        let mut current = self.current();
        let Current { https: Https::Authority { place, hosts }, issued: Some(certificate) } = &*current
        else {
            return false;
        };
        match certificate.life().server_verdict(now) {
            Renewal::Keep => return false,
            Renewal::Renew => {}
        }
        match self.issue(place, hosts, now) {
            Ok(issued) => {
                self.0.local.show(issued.as_ref().map(Certificate::shown));
                debug!("the certificate of https is replaced");
                current.issued = issued;
                true
            }
            Err(error) => {
                warn!("the certificate of https cannot be replaced: {error}; trying on");
                false
            }
        }
    }

    /// Looks again and again whether the certificate is due.
    pub(super) async fn keep_fresh(self) {
        loop {
            tokio::time::sleep(LOOK).await;
            let certificates = self.clone();
            // It reads and may write files.
            let _ = tasks::blocking(move || certificates.renew(clock::now())).await;
        }
    }

    /// A certificate for the listeners on loopback, if there are any.
    fn issue(
        &self,
        place: &CaLocation,
        hosts: &[String],
        now: UnixMs,
    ) -> Result<Option<Certificate>, AuthorityError> {
        let listened: Vec<_> = self
            .0
            .addresses
            .iter()
            .filter_map(|address| match address {
                Address::Tcp(socket) if address.is_local() => Some(socket.ip()),
                Address::Tcp(_) | Address::Unix(_) => None,
            })
            .collect();
        if listened.is_empty() {
            return Ok(None);
        }
        let opened = certificate::open(place, now)?;
        if let Some(aside) = &opened.set_aside {
            warn!(event = "ca_replaced", "{aside}");
        }
        opened.authority.vouch(&names(hosts, &listened), now).map(Some).map_err(AuthorityError::from)
    }

    fn current(&self) -> std::sync::MutexGuard<'_, Current> {
        // What is behind it is replaced whole.
        self.0.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A listener that other machines reach gets no certificate that none of them trusts.
fn tell_beyond_loopback(addresses: &[Address]) {
    if let Some(open) = addresses.iter().find(|address| !address.is_local()) {
        info!(
            event = "https_loopback_only",
            "No https at {open}: the local authority is for this machine alone. Name a certificate with \
             server.tls = {{ cert = \"FILE\", key = \"FILE\" }}, or write \"off\" if something before \
             Keychoir speaks https"
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

    fn authority(place: CaLocation) -> Https {
        Https::Authority { place, hosts: Vec::new() }
    }

    fn given() -> Https {
        let made = rcgen::generate_simple_self_signed(["keys.example".to_owned()]).unwrap();
        let chain = certificate::Chain::read(&made.cert.pem()).unwrap();
        Https::Given(chain.with_key(&made.signing_key.serialize_pem()).unwrap())
    }

    /// What is shown on loopback now.
    fn shown(certificates: &Certificates) -> UnixMs {
        certificates.current().issued.as_ref().unwrap().life().until
    }

    #[test]
    fn the_local_authority_is_for_loopback_and_a_given_certificate_for_all() {
        let [local, open, unix] = [address("127.0.0.1:1"), address("0.0.0.0:1"), Address::Unix(None)];
        let all = [local.clone(), open.clone(), unix.clone()];
        let certificates = Certificates::new(authority(CaLocation::Memory), &all, NOW).unwrap();
        let states = || [&local, &open, &unix].map(|address| certificates.state(address));
        assert_eq!(states(), [HttpsState::LocalInMemory, HttpsState::Off, HttpsState::Off]);
        certificates.replace(given(), NOW);
        assert_eq!(states(), [HttpsState::Given, HttpsState::Given, HttpsState::Off]);
        certificates.replace(Https::Off, NOW);
        assert_eq!(states(), [HttpsState::Off; 3]);
        certificates.replace(authority(CaLocation::Memory), NOW);
        assert_eq!(states(), [HttpsState::LocalInMemory, HttpsState::Off, HttpsState::Off]);
    }

    #[test]
    fn without_a_loopback_port_no_authority_is_made() {
        let folder = tempfile::tempdir().unwrap();
        let place = CaLocation::Folder(folder.path().join("tls"));
        let addresses = [address("0.0.0.0:1"), Address::Unix(None)];
        let certificates = Certificates::new(authority(place), &addresses, NOW).unwrap();
        assert_eq!(certificates.state(&addresses[0]), HttpsState::Off);
        assert!(!folder.path().join("tls").exists());
    }

    #[test]
    fn a_certificate_is_replaced_when_it_is_due_and_the_authority_stays() {
        let folder = tempfile::tempdir().unwrap();
        let place = CaLocation::Folder(folder.path().to_owned());
        let local = address("127.0.0.1:1");
        let certificates = Certificates::new(authority(place), std::slice::from_ref(&local), NOW).unwrap();
        let ca = std::fs::read(certificate::ca_file(folder.path())).unwrap();
        let first = shown(&certificates);
        assert!(!certificates.renew(NOW.plus(DAY * 59)));
        assert_eq!(shown(&certificates), first);
        assert!(certificates.renew(NOW.plus(DAY * 61)));
        assert_eq!(shown(&certificates), first.plus(DAY * 61));
        assert!(!certificates.renew(NOW.plus(DAY * 62)), "the next one is due later");
        assert_eq!(std::fs::read(certificate::ca_file(folder.path())).unwrap(), ca);
        // An authority that is near its end is replaced on the way.
        assert!(certificates.renew(NOW.plus(DAY * 3600)));
        assert_ne!(std::fs::read(certificate::ca_file(folder.path())).unwrap(), ca);
        assert_eq!(certificates.state(&local), HttpsState::Local);
    }

    #[test]
    fn what_cannot_be_replaced_stays() {
        let state = tempfile::tempdir().unwrap();
        let folder = state.path().join("tls");
        let local = address("127.0.0.1:1");
        let https = authority(CaLocation::Folder(folder.clone()));
        let certificates = Certificates::new(https, std::slice::from_ref(&local), NOW).unwrap();
        let first = shown(&certificates);
        std::fs::remove_dir_all(&folder).unwrap();
        std::fs::write(&folder, "in the way").unwrap();
        assert!(!certificates.renew(NOW.plus(DAY * 61)));
        assert_eq!((shown(&certificates), certificates.state(&local)), (first, HttpsState::Local));
        // Nor does a reload take it away.
        certificates.replace(authority(CaLocation::Folder(folder)), NOW);
        assert_eq!((shown(&certificates), certificates.state(&local)), (first, HttpsState::Local));
    }

    #[test]
    fn an_authority_that_cannot_be_had_costs_https_only() {
        let state = tempfile::tempdir().unwrap();
        std::fs::write(state.path().join("file"), "").unwrap();
        let https = authority(CaLocation::Folder(state.path().join("file/tls")));
        let local = address("127.0.0.1:1");
        let certificates = Certificates::new(https, std::slice::from_ref(&local), NOW).unwrap();
        assert_eq!(certificates.state(&local), HttpsState::Off);
        assert!(!certificates.renew(NOW.plus(DAY * 61)));
    }
}
