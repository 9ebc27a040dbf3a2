//! Decides the validity period and the renewal of certificates, the names that the local CA may certify, and the names
//! of a server certificate.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use core::time::Duration;

use super::units::UnixMs;

/// The length of a day.
const DAY: Duration = Duration::from_secs(24 * 3600);

/// Lifetime of a server certificate. It is short, because the renewal is automatic.
const SERVER_LIFETIME: Duration = DAY.saturating_mul(90);

/// Remaining lifetime at which a server certificate is renewed, so that clients never receive a certificate that is
/// about to expire.
const SERVER_RENEWAL_THRESHOLD: Duration = DAY.saturating_mul(30);

/// Lifetime of the CA. It is long, because users install each CA in apps and browsers by hand.
const CA_LIFETIME: Duration = DAY.saturating_mul(3650);

/// Remaining lifetime at which the CA is renewed, so that its certificates do not outlive it.
const CA_RENEWAL_THRESHOLD: Duration = SERVER_LIFETIME;

/// Time before its issue from which a certificate is valid, for clients whose clock is slow.
const BACKDATING: Duration = DAY;

/// The validity period of a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ValidityPeriod {
    /// The first valid time.
    pub from: UnixMs,
    /// The last valid time.
    pub until: UnixMs,
}

/// Whether a certificate is valid at a given time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Validity {
    /// The validity period has not started.
    NotYet,
    /// The certificate is valid.
    Valid,
    /// The validity period has ended.
    Expired,
}

/// The decision about the renewal of a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Renewal {
    /// The certificate is kept.
    Keep,
    /// The certificate is replaced.
    Renew,
}

impl ValidityPeriod {
    /// Returns the validity period of a CA that is created at `now`.
    #[must_use]
    pub fn for_ca(now: UnixMs) -> Self {
        Self { from: backdate(now), until: now.plus(CA_LIFETIME) }
    }

    /// Returns the validity period of a server certificate that is issued at `now` by a CA with the period `ca`.
    #[must_use]
    pub fn for_server(now: UnixMs, ca: Self) -> Self {
        Self { from: backdate(now), until: now.plus(SERVER_LIFETIME).min(ca.until) }
    }

    /// Returns whether the certificate is valid at `now`, and if not, why.
    #[must_use]
    pub fn validity(self, now: UnixMs) -> Validity {
        if now < self.from {
            Validity::NotYet
        } else if now > self.until {
            Validity::Expired
        } else {
            Validity::Valid
        }
    }

    /// Decides whether a CA is renewed. A CA that is not valid yet is kept, because the clock may be wrong and users
    /// have installed the CA by hand.
    #[must_use]
    pub fn ca_renewal(self, now: UnixMs) -> Renewal {
        self.renewal(now, CA_RENEWAL_THRESHOLD)
    }

    /// Decides whether a server certificate is renewed. A certificate that is not valid yet is also replaced, because
    /// it was issued with a wrong clock.
    #[must_use]
    pub fn server_renewal(self, now: UnixMs) -> Renewal {
        match self.validity(now) {
            Validity::NotYet => Renewal::Renew,
            Validity::Valid | Validity::Expired => self.renewal(now, SERVER_RENEWAL_THRESHOLD),
        }
    }

    fn renewal(self, now: UnixMs, threshold: Duration) -> Renewal {
        if self.until.since(now) < threshold { Renewal::Renew } else { Renewal::Keep }
    }
}

fn backdate(now: UnixMs) -> UnixMs {
    UnixMs(now.0.saturating_sub(u64::try_from(BACKDATING.as_millis()).unwrap_or(u64::MAX)))
}

/// Whether the local CA may certify a name: `localhost` and the names below it, which always resolve to this
/// machine.
#[must_use]
pub fn may_certify(name: &str) -> bool {
    name == "localhost" || name.ends_with(".localhost")
}

/// Returns the names of a server certificate: `localhost`, `127.0.0.1`, `::1`, the other loopback addresses on which
/// Keychoir listens, and the `hosts` that the CA may certify.
#[must_use]
pub fn certificate_names(hosts: &[String], listen_addresses: &[IpAddr]) -> Vec<String> {
    let addresses = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)]
        .into_iter()
        .chain(listen_addresses.iter().map(IpAddr::to_canonical).filter(IpAddr::is_loopback));
    let mut names = vec!["localhost".to_owned()];
    let candidates = addresses
        .map(|address| address.to_string())
        .chain(hosts.iter().filter(|host| may_certify(host)).cloned());
    for name in candidates {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixMs = UnixMs(1_800_000_000_000);

    fn after_days(days: u32) -> UnixMs {
        NOW.plus(DAY * days)
    }

    #[test]
    fn a_server_certificate_is_renewed_thirty_days_before_its_end() {
        let ca = ValidityPeriod::for_ca(NOW);
        let period = ValidityPeriod::for_server(NOW, ca);
        assert_eq!(period.validity(NOW), Validity::Valid);
        assert_eq!(period.server_renewal(NOW), Renewal::Keep);
        assert_eq!(period.server_renewal(after_days(60)), Renewal::Keep);
        assert_eq!(period.server_renewal(after_days(60).plus(Duration::from_millis(1))), Renewal::Renew);
        assert_eq!(period.server_renewal(after_days(1000)), Renewal::Renew);
    }

    #[test]
    fn a_ca_is_renewed_before_a_certificate_outlives_it() {
        let period = ValidityPeriod::for_ca(NOW);
        assert_eq!(period.ca_renewal(NOW), Renewal::Keep);
        let last = after_days(3650 - 90);
        assert_eq!(period.ca_renewal(last), Renewal::Keep);
        assert_eq!(ValidityPeriod::for_server(last, period).until, period.until);
        assert_eq!(period.ca_renewal(last.plus(Duration::from_millis(1))), Renewal::Renew);
        assert_eq!(period.ca_renewal(after_days(4000)), Renewal::Renew);
        assert_eq!(
            ValidityPeriod::for_server(after_days(3640), period).until,
            period.until,
            "a certificate must not outlive its CA"
        );
    }

    #[test]
    fn a_ca_is_kept_when_the_clock_is_wrong() {
        let period = ValidityPeriod::for_ca(NOW);
        assert_eq!(period.validity(UnixMs(0)), Validity::NotYet);
        assert_eq!(period.ca_renewal(UnixMs(0)), Renewal::Keep);
        assert_eq!(ValidityPeriod::for_server(NOW, period).server_renewal(UnixMs(0)), Renewal::Renew);
        // A client whose clock is an hour slow accepts the CA.
        assert_eq!(period.validity(UnixMs(NOW.0 - 3_600_000)), Validity::Valid);
    }

    #[test]
    fn a_validity_period_includes_both_ends() {
        let period = ValidityPeriod { from: UnixMs(10), until: UnixMs(20) };
        let validity = [9, 10, 20, 21].map(|ms| period.validity(UnixMs(ms)));
        assert_eq!(validity, [Validity::NotYet, Validity::Valid, Validity::Valid, Validity::Expired]);
    }

    #[test]
    fn only_names_of_this_machine_are_certified() {
        let hosts =
            ["keys.localhost", "keys.example.com", "*", "localhost.example"].map(str::to_owned).to_vec();
        let listen_addresses = ["127.0.0.1", "127.0.0.2", "::ffff:127.0.0.3", "10.0.0.1", "::"];
        let listen_addresses = listen_addresses.map(|text| text.parse().unwrap());
        assert_eq!(
            certificate_names(&hosts, &listen_addresses),
            ["localhost", "127.0.0.1", "::1", "127.0.0.2", "127.0.0.3", "keys.localhost"]
        );
        assert!(!may_certify("notlocalhost") && !may_certify("localhost."));
    }
}
