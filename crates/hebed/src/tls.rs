//! TCP, for those who ask for it: with TLS, and with certificates of both sides.
//!
//! There is no way to listen without one: whoever may ask the daemon can reboot
//! the host, and a port has no owner and no group. A client shows a certificate
//! of the authority in `--client-ca`; who it is, besides, is not looked at, so
//! that authority should be for this alone.
//!
//! Bounds besides those of [`crate::server`]: [`HANDSHAKES_MAX`] strangers at a
//! time, each for [`HEAD_WAIT`] at most. Only who has shown a certificate takes
//! a place from those on the unix socket.

use std::fs::File;
use std::io::{self, Read};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::Router;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{RootCertStore, ServerConfig};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;

use crate::limits::Peer;
use crate::server::{HEAD_WAIT, converse, taken};

/// Clients at a time that have not shown a certificate yet.
pub const HANDSHAKES_MAX: usize = 64;
/// Longest file of certificates, in bytes.
const FILE_LEN_MAX: u64 = 1 << 20;

/// Why nobody is served over the network.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("cannot read {path}, which {flag} names")]
    Io {
        /// Which flag.
        flag: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Others may read the key.
    #[error(
        "{0} is the daemon's private key, and users besides its owner and its group may read or write it: `chmod o= {0}`"
    )]
    KeyOpen(PathBuf),
    /// Others may write what says who is let in.
    #[error("{0} can be written by every user: `chmod o-w {0}`")]
    Writable(PathBuf),
    /// There is nothing of that kind in it.
    #[error("{path} holds no {what} in PEM, as {flag} needs")]
    Empty {
        /// Which flag.
        flag: &'static str,
        /// Which file.
        path: PathBuf,
        /// What is missing.
        what: &'static str,
    },
    /// Certificate, key or authority cannot be used.
    #[error("{path} cannot be used for {flag}")]
    Unusable {
        /// Which flag.
        flag: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The address cannot be had.
    #[error("cannot listen on {address}: see who does, or whether this host has that address")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The files that `--listen` needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The daemon's certificate, and those between it and its authority.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// Who signs for clients.
    pub client_ca: PathBuf,
}

const CERT: &str = "--tls-cert";
const KEY: &str = "--tls-key";
const CLIENT_CA: &str = "--client-ca";

/// A file's bytes; refused if users may write it that have nothing to do with
/// it, or may read it where it is `secret`.
fn read(flag: &'static str, path: &Path, secret: bool) -> Result<Vec<u8>, TlsError> {
    let io = |source| TlsError::Io {
        flag,
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(io)?;
    let mode = file.metadata().map_err(io)?.permissions().mode();
    if secret && mode & 0o007 != 0 {
        return Err(TlsError::KeyOpen(path.to_owned()));
    }
    if mode & 0o002 != 0 {
        return Err(TlsError::Writable(path.to_owned()));
    }
    let mut bytes = Vec::new();
    file.take(FILE_LEN_MAX)
        .read_to_end(&mut bytes)
        .map_err(io)?;
    Ok(bytes)
}

fn certificates(flag: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let bytes = read(flag, path, false)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    let found = found.map_err(|e| unusable(flag, path, e))?;
    match found.is_empty() {
        false => Ok(found),
        true => Err(TlsError::Empty {
            flag,
            path: path.to_owned(),
            what: "certificate",
        }),
    }
}

fn unusable(
    flag: &'static str,
    path: &Path,
    error: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> TlsError {
    TlsError::Unusable {
        flag,
        path: path.to_owned(),
        source: error.into(),
    }
}

/// What the daemon shows, and whom it lets in.
fn config(files: &TlsFiles) -> Result<ServerConfig, TlsError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let chain = certificates(CERT, &files.certificate)?;
    let bytes = read(KEY, &files.key, true)?;
    let key = PrivateKeyDer::from_pem_slice(&bytes).map_err(|_| TlsError::Empty {
        flag: KEY,
        path: files.key.clone(),
        what: "private key",
    })?;
    let mut roots = RootCertStore::empty();
    for certificate in certificates(CLIENT_CA, &files.client_ca)? {
        let added = roots.add(certificate);
        added.map_err(|e| unusable(CLIENT_CA, &files.client_ca, e))?;
    }
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .build()
            .map_err(|e| unusable(CLIENT_CA, &files.client_ca, e))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| unusable(CERT, &files.certificate, e))?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(|e| unusable(CERT, &files.certificate, e))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    // Each connection shows its certificate: one that expires meanwhile must
    // not go on by an older session.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// A port that is listened on, and what is shown there.
pub struct Secure {
    listener: std::net::TcpListener,
    acceptor: TlsAcceptor,
}

impl Secure {
    /// Listens on `address`.
    pub fn listen(address: SocketAddr, files: &TlsFiles) -> Result<Self, TlsError> {
        let config = config(files)?;
        let failed = |source| TlsError::Listen { address, source };
        let listener = std::net::TcpListener::bind(address).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(Self {
            listener,
            acceptor: TlsAcceptor::from(Arc::new(config)),
        })
    }

    /// Where it listens.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until the process ends. `turns` are shared by all listeners.
    pub async fn serve(self, router: Router, turns: Arc<Semaphore>) -> io::Error {
        let listener = match TcpListener::from_std(self.listener) {
            Ok(listener) => listener,
            Err(error) => return error,
        };
        let strangers = Arc::new(Semaphore::new(HANDSHAKES_MAX));
        loop {
            let Ok(stranger) = Arc::clone(&strangers).acquire_owned().await else {
                return io::Error::other("no more turns");
            };
            let Some((stream, _)) = taken(listener.accept().await).await else {
                continue;
            };
            let _ = stream.set_nodelay(true);
            let (acceptor, router) = (self.acceptor.clone(), router.clone());
            let turns = Arc::clone(&turns);
            tokio::spawn(async move {
                // Why it failed is told to the client; strangers fill no log.
                let greeted = tokio::time::timeout(HEAD_WAIT, acceptor.accept(stream)).await;
                let Ok(Ok(stream)) = greeted else {
                    return;
                };
                let Ok(_turn) = turns.acquire_owned().await else {
                    return;
                };
                drop(stranger);
                converse(stream, Peer::Certified, router).await;
            });
        }
    }
}
