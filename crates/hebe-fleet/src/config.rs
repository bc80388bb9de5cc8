//! `fleet.toml`: the group of this host, and who keeps its slots.

use std::path::PathBuf;

use hebe_policy::fleet::holder::Times;
use hebe_policy::fleet::slots::FleetName;
use hebe_policy::span::Span;
use serde::Deserialize;

use crate::http::TlsFiles;

/// Shortest lease, in seconds: below it, a slow answer is a lost lease.
const LEASE_MIN_S: u64 = 5;
/// Longest lease, in seconds.
const LEASE_MAX_S: u64 = 3_600;

/// `fleet.toml`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FleetConfig {
    /// The group.
    pub group: FleetName,
    /// This host's name in it; without it, the machine's own.
    pub host: Option<FleetName>,
    /// How many hosts of the group may be under way at once. Where hosts are
    /// told differently, the smallest number of those under way counts.
    #[serde(default = "one")]
    pub at_most: u32,
    /// After how long a host counts as not having come back, from the order to
    /// reboot.
    #[serde(default = "quarter_of_an_hour")]
    pub give_up_after: Span,
    /// How long a slot outlives a holder that died before its reboot.
    #[serde(default = "half_a_minute")]
    pub lease: Span,
    /// How long a slot is waited for.
    #[serde(default = "one_hour")]
    pub patience: Span,
    /// How long one request may take.
    #[serde(default = "three_seconds")]
    pub request_timeout: Span,
    /// `hebe reboot` takes a slot also without `--fleet`.
    #[serde(default)]
    pub always: bool,
    /// Slots are kept by etcd.
    pub etcd: Option<EtcdConfig>,
    /// Slots are kept by a FleetLock server.
    pub fleetlock: Option<FleetLockConfig>,
}

/// Where etcd is, and how this host shows who it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EtcdConfig {
    /// Its members, such as `https://10.0.0.1:2379`, tried in this order.
    pub endpoints: Vec<String>,
    /// With https: who vouches for the members, in PEM.
    pub ca: Option<PathBuf>,
    /// This host's certificate, in PEM.
    pub certificate: Option<PathBuf>,
    /// Its private key, in PEM.
    pub key: Option<PathBuf>,
    /// A user of etcd.
    pub user: Option<String>,
    /// The user's password is the first line of this file.
    pub password_file: Option<PathBuf>,
}

/// Where a FleetLock server is, and how this host shows who it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FleetLockConfig {
    /// Its base, such as `http://10.0.0.1:3333`.
    pub url: String,
    /// With https: who vouches for the server, in PEM.
    pub ca: Option<PathBuf>,
    /// This host's certificate, in PEM.
    pub certificate: Option<PathBuf>,
    /// Its private key, in PEM.
    pub key: Option<PathBuf>,
}

impl EtcdConfig {
    /// The files that TLS needs.
    pub fn tls(&self) -> TlsFiles<'_> {
        TlsFiles {
            ca: self.ca.as_deref(),
            certificate: self.certificate.as_deref(),
            key: self.key.as_deref(),
        }
    }

    fn check(&self) -> Result<(), ConfigError> {
        if self.endpoints.is_empty() {
            return Err(ConfigError::NoEndpoint);
        }
        for url in &self.endpoints {
            address(url, &self.tls())?;
        }
        match (&self.user, &self.password_file) {
            (None, None) => Ok(()),
            (Some(_), Some(_)) => match self.endpoints.iter().find(|url| is_overheard(url)) {
                Some(url) => Err(ConfigError::Overheard(url.clone())),
                None => Ok(()),
            },
            _ => Err(ConfigError::HalfALogin),
        }
    }
}

impl FleetLockConfig {
    /// The files that TLS needs.
    pub fn tls(&self) -> TlsFiles<'_> {
        TlsFiles {
            ca: self.ca.as_deref(),
            certificate: self.certificate.as_deref(),
            key: self.key.as_deref(),
        }
    }
}

fn one() -> u32 {
    1
}

fn quarter_of_an_hour() -> Span {
    Span::minutes(15)
}

fn half_a_minute() -> Span {
    Span::seconds(30)
}

fn one_hour() -> Span {
    Span::hours(1)
}

fn three_seconds() -> Span {
    Span::seconds(3)
}

/// Why `fleet.toml` cannot be meant.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// No host would ever go.
    #[error("at_most = 0 lets no host go: write 1 or more")]
    AtMostZero,
    /// Neither, or both.
    #[error("say who keeps the slots: either [etcd] or [fleetlock], and not both")]
    OneServer,
    /// No endpoint.
    #[error("[etcd] has no endpoint: write endpoints = [\"http://HOST:2379\"]")]
    NoEndpoint,
    /// Not reachable this way.
    #[error("'{0}' is not of the form http://HOST:PORT or https://HOST:PORT")]
    BadUrl(String),
    /// Nobody vouches for the server.
    #[error(
        "'{0}' has no authority to vouch for it: write ca = \"FILE\", the certificate (PEM) of whoever signed the server's"
    )]
    NoAuthority(String),
    /// One of certificate and key.
    #[error(
        "a certificate is of no use without its key, nor the other way round: write both certificate = \"FILE\" and key = \"FILE\", or neither"
    )]
    HalfACertificate,
    /// One of user and password.
    #[error(
        "a user needs a password, and the other way round: write both user = \"NAME\" and password_file = \"FILE\", or neither"
    )]
    HalfALogin,
    /// Certificates for plain HTTP.
    #[error(
        "'{0}' is plain HTTP, for which ca, certificate and key mean nothing: write https://, or take them away"
    )]
    PlainWithFiles(String),
    /// A password that others could read.
    #[error("the password would go to '{0}' unencrypted: write https://")]
    Overheard(String),
    /// Too short or too long.
    #[error("lease = \"{0}\" is not between 5s and 1h")]
    BadLease(Span),
    /// A lease would run out under one slow request.
    #[error(
        "request_timeout = \"{0}\" must be at least 1s and at most a third of the lease (\"{1}\")"
    )]
    BadTimeout(Span, Span),
    /// Every host would be given up.
    #[error("give_up_after = \"{0}\" gives no host the time to reboot: write 1min or more")]
    GiveUpTooShort(Span),
    /// The machine's name cannot stand for the host.
    #[error(
        "this machine's own name '{0}' does not tell it from others: write host = \"NAME\" into fleet.toml"
    )]
    NoHostName(String),
}

impl FleetConfig {
    /// Refuses what cannot be meant.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.at_most == 0 {
            return Err(ConfigError::AtMostZero);
        }
        if !(LEASE_MIN_S..=LEASE_MAX_S).contains(&self.lease.as_s()) {
            return Err(ConfigError::BadLease(self.lease));
        }
        let timeout_s = self.request_timeout.as_s();
        if timeout_s == 0 || timeout_s * 3 > self.lease.as_s() {
            return Err(ConfigError::BadTimeout(self.request_timeout, self.lease));
        }
        if self.give_up_after < Span::minutes(1) {
            return Err(ConfigError::GiveUpTooShort(self.give_up_after));
        }
        match (&self.etcd, &self.fleetlock) {
            (Some(etcd), None) => etcd.check(),
            (None, Some(fleetlock)) => address(&fleetlock.url, &fleetlock.tls()),
            _ => Err(ConfigError::OneServer),
        }
    }

    /// This host's name in the group; `machine` is what the machine calls itself.
    ///
    /// # Errors
    /// When that name cannot tell hosts apart.
    pub fn host_name(&self, machine: &str) -> Result<FleetName, ConfigError> {
        if let Some(host) = &self.host {
            return Ok(host.clone());
        }
        let unset = ["localhost", "(none)", "debian"];
        let own = machine.parse().ok().filter(|_| !unset.contains(&machine));
        own.ok_or_else(|| ConfigError::NoHostName(machine.to_owned()))
    }

    /// Times of a holder that waits for a slot for `patience`.
    pub fn times(&self, patience: Span) -> Times {
        let lease_ms = self.lease.as_s() * 1_000;
        Times {
            lease_ms: self.etcd.is_some().then_some(lease_ms),
            patience_ms: patience.as_s() * 1_000,
            ask_every_ms: 2_000,
            insist_ms: lease_ms,
        }
    }
}

/// The part of a URL behind its scheme.
fn place(url: &str) -> Option<&str> {
    let rest = url.strip_prefix("http://").or(url.strip_prefix("https://"));
    rest.map(|rest| rest.strip_suffix('/').unwrap_or(rest))
}

fn address(url: &str, tls: &TlsFiles<'_>) -> Result<(), ConfigError> {
    let place = place(url).unwrap_or_default();
    if place.is_empty() || place.contains(['@', '?', '#', ' ']) {
        return Err(ConfigError::BadUrl(url.to_owned()));
    }
    if tls.certificate.is_some() != tls.key.is_some() {
        return Err(ConfigError::HalfACertificate);
    }
    match (url.starts_with("https:"), tls.ca.is_some()) {
        (true, false) => Err(ConfigError::NoAuthority(url.to_owned())),
        (false, true) => Err(ConfigError::PlainWithFiles(url.to_owned())),
        (false, false) if tls.key.is_some() => Err(ConfigError::PlainWithFiles(url.to_owned())),
        _ => Ok(()),
    }
}

/// Whether others could read what goes there: all plain HTTP that leaves this
/// machine.
fn is_overheard(url: &str) -> bool {
    let host = place(url).unwrap_or_default();
    let own = ["127.0.0.1", "localhost", "[::1]"];
    let ends = |rest: &str| rest.is_empty() || rest.starts_with([':', '/']);
    let is_own = own
        .iter()
        .any(|own| host.strip_prefix(own).is_some_and(ends));
    url.starts_with("http:") && !is_own
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "group = \"rack1\"\n[etcd]\nendpoints = [\"http://127.0.0.1:2379\"]\n";

    fn config(text: &str) -> FleetConfig {
        toml::from_str(text).expect("it is read")
    }

    #[test]
    fn little_has_to_be_said() {
        let fleet = config(GOOD);
        assert_eq!(fleet.check(), Ok(()));
        assert_eq!((fleet.at_most, fleet.always), (1, false));
        assert_eq!(fleet.times(Span::seconds(7)).lease_ms, Some(30_000));
        assert_eq!(fleet.host_name("n1").expect("name").as_str(), "n1");
        let login = "user = \"u\"\npassword_file = \"p\"\n";
        let files = "ca = \"c\"\ncertificate = \"c\"\nkey = \"k\"\n";
        let far = GOOD.replace("http://127.0.0.1", "https://etcd.example");
        for text in [format!("{GOOD}{login}"), format!("{far}{files}{login}")] {
            assert_eq!(config(&text).check(), Ok(()), "{text}");
        }
        let lock = config("group = \"g\"\n[fleetlock]\nurl = \"http://lock.example/base/\"\n");
        assert_eq!(lock.check(), Ok(()));
        assert_eq!(lock.times(lock.patience).lease_ms, None);
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        for (text, word) in [
            (format!("at_most = 0\n{GOOD}"), "at_most"),
            (format!("lease = \"1s\"\n{GOOD}"), "lease"),
            (
                format!("request_timeout = \"11s\"\n{GOOD}"),
                "request_timeout",
            ),
            (format!("give_up_after = \"5s\"\n{GOOD}"), "give_up_after"),
            (
                format!("{GOOD}[fleetlock]\nurl = \"http://x\"\n"),
                "not both",
            ),
            ("group = \"g\"\n".to_owned(), "either"),
            (
                "group = \"g\"\n[etcd]\nendpoints = []\n".to_owned(),
                "no endpoint",
            ),
            (GOOD.replace("http://", "https://"), "ca ="),
            (GOOD.replace("127.0.0.1", "me:secret@h"), "http://HOST:PORT"),
            (GOOD.replace("http://", "ftp://"), "http://HOST:PORT"),
            (format!("{GOOD}ca = \"c\"\n"), "plain HTTP"),
            (format!("{GOOD}key = \"k\"\n"), "certificate ="),
            (format!("{GOOD}certificate = \"c\"\n"), "key ="),
            (format!("{GOOD}user = \"u\"\n"), "password_file ="),
            (
                format!("{GOOD}user = \"u\"\npassword_file = \"p\"\n")
                    .replace("127.0.0.1", "127.0.0.100"),
                "unencrypted",
            ),
        ] {
            let error = config(&text).check().expect_err(&text).to_string();
            assert!(error.contains(word), "{word}: {error}");
        }
        for name in ["localhost", "(none)", "", "two words"] {
            let error = config(GOOD).host_name(name).expect_err(name);
            assert!(error.to_string().contains("host = "), "{error}");
        }
        assert!(toml::from_str::<FleetConfig>(&format!("grup = 1\n{GOOD}")).is_err());
    }
}
