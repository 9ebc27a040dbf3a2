//! Lifetime and renewal of certificates, and the names that the local CA may certify.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use core::time::Duration;

use super::units::UnixMs;

const DAY: Duration = Duration::from_secs(24 * 3600);

/// Short, because the renewal is automatic.
const SERVER_LIFE: Duration = DAY.saturating_mul(90);

/// Remaining lifetime at which a server certificate is renewed, so that clients never receive one that is
/// about to expire.
const SERVER_LEFT_MIN: Duration = DAY.saturating_mul(30);

/// Long, because every new CA has to be installed in apps and browsers by hand.
const AUTHORITY_LIFE: Duration = DAY.saturating_mul(3650);

/// Remaining lifetime at which the CA is renewed: its certificates must not outlive it.
const AUTHORITY_LEFT_MIN: Duration = SERVER_LIFE;

/// A certificate is valid from this time before its issue, for clients whose clock is slow.
const CLOCK_SLACK: Duration = DAY;

/// The validity period of a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Life {
    /// The first valid moment.
    pub from: UnixMs,
    /// The last valid moment.
    pub until: UnixMs,
}

/// The relation of a moment to the validity period.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Validity {
    /// Not valid yet.
    NotYet,
    /// Valid.
    Holds,
    /// Not valid any more.
    Expired,
}

/// Whether a certificate is renewed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Renewal {
    /// The certificate is kept.
    Keep,
    /// The certificate is replaced.
    Renew,
}

impl Life {
    /// The validity period of a CA created now.
    #[must_use]
    pub fn of_authority(now: UnixMs) -> Self {
        Self { from: backdated(now), until: now.plus(AUTHORITY_LIFE) }
    }

    /// The validity period of a server certificate issued now by a CA with the period `authority`.
    #[must_use]
    pub fn of_server(now: UnixMs, authority: Self) -> Self {
        Self { from: backdated(now), until: now.plus(SERVER_LIFE).min(authority.until) }
    }

    /// Whether the certificate is valid at this moment.
    #[must_use]
    pub fn validity(self, now: UnixMs) -> Validity {
        if now < self.from {
            Validity::NotYet
        } else if now > self.until {
            Validity::Expired
        } else {
            Validity::Holds
        }
    }

    /// Whether a CA is renewed. One that is not valid yet is kept: a wrong clock must not discard a CA
    /// that was installed by hand.
    #[must_use]
    pub fn authority_verdict(self, now: UnixMs) -> Renewal {
        self.verdict(now, AUTHORITY_LEFT_MIN)
    }

    /// Whether a server certificate is renewed. One that is not valid yet was issued with a wrong clock,
    /// and is replaced.
    #[must_use]
    pub fn server_verdict(self, now: UnixMs) -> Renewal {
        match self.validity(now) {
            Validity::NotYet => Renewal::Renew,
            Validity::Holds | Validity::Expired => self.verdict(now, SERVER_LEFT_MIN),
        }
    }

    fn verdict(self, now: UnixMs, left_min: Duration) -> Renewal {
        if self.until.since(now) < left_min { Renewal::Renew } else { Renewal::Keep }
    }
}

fn backdated(now: UnixMs) -> UnixMs {
    UnixMs(now.0.saturating_sub(u64::try_from(CLOCK_SLACK.as_millis()).unwrap_or(u64::MAX)))
}

/// Whether the local CA may certify a name: `localhost` and the names below it, which always belong to
/// this machine.
#[must_use]
pub fn may_certify(name: &str) -> bool {
    name == "localhost" || name.ends_with(".localhost")
}

/// The names of a server certificate: `localhost`, the loopback addresses that the server listens on, and
/// those of `hosts` that the CA may certify.
#[must_use]
pub fn names(hosts: &[String], listen_addresses: &[IpAddr]) -> Vec<String> {
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

    fn in_days(days: u32) -> UnixMs {
        NOW.plus(DAY * days)
    }

    #[test]
    fn a_server_certificate_is_replaced_with_thirty_days_left() {
        let authority = Life::of_authority(NOW);
        let life = Life::of_server(NOW, authority);
        assert_eq!(life.validity(NOW), Validity::Holds);
        assert_eq!(life.server_verdict(NOW), Renewal::Keep);
        assert_eq!(life.server_verdict(in_days(60)), Renewal::Keep);
        assert_eq!(life.server_verdict(in_days(60).plus(Duration::from_millis(1))), Renewal::Renew);
        assert_eq!(life.server_verdict(in_days(1000)), Renewal::Renew);
    }

    #[test]
    fn a_ca_is_replaced_before_a_certificate_outlives_it() {
        let life = Life::of_authority(NOW);
        assert_eq!(life.authority_verdict(NOW), Renewal::Keep);
        let last = in_days(3650 - 90);
        assert_eq!(life.authority_verdict(last), Renewal::Keep);
        assert_eq!(Life::of_server(last, life).until, life.until);
        assert_eq!(life.authority_verdict(last.plus(Duration::from_millis(1))), Renewal::Renew);
        assert_eq!(life.authority_verdict(in_days(4000)), Renewal::Renew);
        assert_eq!(
            Life::of_server(in_days(3640), life).until,
            life.until,
            "a certificate never outlives its CA"
        );
    }

    #[test]
    fn a_ca_is_kept_when_the_clock_is_wrong() {
        let life = Life::of_authority(NOW);
        assert_eq!(life.validity(UnixMs(0)), Validity::NotYet);
        assert_eq!(life.authority_verdict(UnixMs(0)), Renewal::Keep);
        assert_eq!(Life::of_server(NOW, life).server_verdict(UnixMs(0)), Renewal::Renew);
        // A clock that is an hour slow still accepts it.
        assert_eq!(life.validity(UnixMs(NOW.0 - 3_600_000)), Validity::Holds);
    }

    #[test]
    fn a_validity_period_includes_both_ends() {
        let life = Life { from: UnixMs(10), until: UnixMs(20) };
        let seen = [9, 10, 20, 21].map(|ms| life.validity(UnixMs(ms)));
        assert_eq!(seen, [Validity::NotYet, Validity::Holds, Validity::Holds, Validity::Expired]);
    }

    #[test]
    fn a_certificate_is_for_this_machine_and_for_no_other() {
        let hosts =
            ["keys.localhost", "keys.example.com", "*", "localhost.example"].map(str::to_owned).to_vec();
        let listen_addresses = ["127.0.0.1", "127.0.0.2", "::ffff:127.0.0.3", "10.0.0.1", "::"];
        let listen_addresses = listen_addresses.map(|text| text.parse().unwrap());
        assert_eq!(
            names(&hosts, &listen_addresses),
            ["localhost", "127.0.0.1", "::1", "127.0.0.2", "127.0.0.3", "keys.localhost"]
        );
        assert!(!may_certify("notlocalhost") && !may_certify("localhost."));
    }
}
