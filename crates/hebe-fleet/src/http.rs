//! JSON over HTTP, with a limit on time and on size, and over TLS where the
//! server is to be sure of.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use ureq::Agent;
use ureq::tls::{Certificate, ClientCert, PemItem, PrivateKey, RootCerts, TlsConfig, parse_pem};

use crate::slots::FleetError;

/// Longest answer, in bytes.
const ANSWER_LEN_MAX: u64 = 8 << 20;
/// Longest text of a server that is shown.
const SHOWN_LEN_MAX: usize = 200;
/// Longest file of certificates, keys or a password, in bytes.
const FILE_LEN_MAX: u64 = 1 << 20;

/// What was answered.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The body, `null` if it is not JSON.
    pub body: Value,
}

/// Why there is no answer. The request may have been carried out.
#[derive(Debug, thiserror::Error)]
#[error("{url} does not answer: {why}")]
pub struct Silent {
    /// Who.
    pub url: String,
    /// What was seen instead.
    pub why: String,
}

/// The files that TLS needs, in PEM; all absent for plain HTTP.
#[derive(Clone, Copy, Debug, Default)]
pub struct TlsFiles<'a> {
    /// Who vouches for the server: nobody else does.
    pub ca: Option<&'a Path>,
    /// The chain with which this host shows who it is.
    pub certificate: Option<&'a Path>,
    /// Its private key.
    pub key: Option<&'a Path>,
}

/// A client that follows no redirects, uses no proxy and keeps no connection:
/// one that was cut would cost the first request after a reboot of the server.
#[derive(Clone, Debug)]
pub struct Client {
    agent: Agent,
}

impl Client {
    /// Each request ends within `timeout`.
    ///
    /// # Errors
    /// When a file that TLS needs cannot be used.
    pub fn new(timeout: Duration, tls: &TlsFiles<'_>) -> Result<Self, FleetError> {
        let config = Agent::config_builder()
            .timeout_global(Some(timeout))
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .max_idle_connections(0)
            .proxy(None)
            .tls_config(tls_config(tls)?)
            .build();
        Ok(Self {
            agent: Agent::new_with_config(config),
        })
    }

    /// Posts JSON.
    ///
    /// # Errors
    /// When no whole answer comes in time.
    pub fn post(
        &self,
        url: &str,
        headers: &[(&str, &str)],
        body: &Value,
    ) -> Result<Answer, Silent> {
        let silent = |error: ureq::Error| Silent {
            url: url.to_owned(),
            why: error.to_string(),
        };
        let mut request = self
            .agent
            .post(url)
            .header("content-type", "application/json");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut response = request.send(body.to_string()).map_err(silent)?;
        let status = response.status().as_u16();
        let bytes = response.body_mut().with_config().limit(ANSWER_LEN_MAX);
        let bytes = bytes.read_to_vec().map_err(silent)?;
        let body = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
        Ok(Answer { status, body })
    }
}

/// Without a file of its own nobody is trusted: roots that are built in would
/// let whoever they vouch for keep the slots.
fn tls_config(files: &TlsFiles<'_>) -> Result<TlsConfig, FleetError> {
    let roots = files.ca.map(certificates).transpose()?;
    let client = match (files.certificate, files.key) {
        (Some(chain), Some(key)) => {
            let chain = certificates(chain)?;
            Some(ClientCert::new_with_certs(&chain, private_key(key)?))
        }
        _ => None,
    };
    let provider = rustls::crypto::ring::default_provider();
    Ok(TlsConfig::builder()
        .root_certs(RootCerts::from(roots.unwrap_or_default()))
        .client_cert(client)
        .unversioned_rustls_crypto_provider(Arc::new(provider))
        .build())
}

fn unusable(path: &Path, why: impl Into<String>) -> FleetError {
    FleetError::Credentials {
        path: path.to_owned(),
        why: why.into(),
    }
}

fn content(path: &Path) -> Result<Vec<u8>, FleetError> {
    let mut bytes = Vec::new();
    let read =
        File::open(path).and_then(|file| file.take(FILE_LEN_MAX + 1).read_to_end(&mut bytes));
    read.map_err(|e| unusable(path, e.to_string()))?;
    if bytes.len() as u64 > FILE_LEN_MAX {
        return Err(unusable(path, "it is too long"));
    }
    Ok(bytes)
}

/// What only this host's root may read.
///
/// # Errors
/// When others may, too, or nobody can.
fn secret(path: &Path) -> Result<Vec<u8>, FleetError> {
    use std::os::unix::fs::PermissionsExt;
    let mode = path.metadata().map(|meta| meta.permissions().mode());
    let mode = mode.map_err(|e| unusable(path, e.to_string()))?;
    if mode & 0o007 != 0 {
        return Err(unusable(
            path,
            "every user of this host may read it: say `chmod o= FILE`",
        ));
    }
    content(path)
}

fn certificates(path: &Path) -> Result<Vec<Certificate<'static>>, FleetError> {
    let bytes = content(path)?;
    let mut all = Vec::new();
    for item in parse_pem(&bytes) {
        match item {
            Ok(PemItem::Certificate(certificate)) => all.push(certificate),
            Ok(_) => {}
            Err(e) => return Err(unusable(path, e.to_string())),
        }
    }
    if all.is_empty() {
        return Err(unusable(path, "it holds no certificate in PEM"));
    }
    Ok(all)
}

fn private_key(path: &Path) -> Result<PrivateKey<'static>, FleetError> {
    let bytes = secret(path)?;
    PrivateKey::from_pem(&bytes)
        .map_err(|_| unusable(path, "it holds no private key in PEM, unencrypted"))
}

/// The first line of a file that only root may read.
///
/// # Errors
/// When others may, too, or it holds none.
pub fn password(path: &Path) -> Result<String, FleetError> {
    let text = String::from_utf8(secret(path)?);
    let text = text.map_err(|_| unusable(path, "it is no text"))?;
    match text.lines().next() {
        Some(line) if !line.is_empty() => Ok(line.to_owned()),
        _ => Err(unusable(path, "its first line is empty")),
    }
}

/// A server's text, fit to be shown: one line, not too long, no control
/// characters.
pub fn shown(text: &str) -> String {
    let clean = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().take(SHOWN_LEN_MAX).map(clean).collect()
}
