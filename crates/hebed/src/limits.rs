//! What a request has to keep to, whatever it is about.
//!
//! - Its body is short and comes in time ([`BODY_MAX`], [`BODY_WAIT`]).
//! - It does not come from a page of somebody else's that runs in a browser
//!   of an operator who forwards the socket: the page's origin would be
//!   another host (`Origin`), or the name in `Host` is one that anybody can
//!   point at this machine.

use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::extract::Request;
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;

use crate::answers::Problem;

/// Longest body, in bytes.
pub const BODY_MAX: usize = 64 << 10;
/// How long a body may take.
pub const BODY_WAIT: Duration = Duration::from_secs(10);

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A process of this machine, over the unix socket.
    Local {
        /// Its user.
        uid: u32,
    },
    /// Somebody with a certificate, over the network.
    Certified,
}

impl Peer {
    /// Whether it may say what the host boots.
    pub fn may_name_kernels(self) -> bool {
        matches!(self, Self::Local { uid: 0 })
    }

    /// Whether it may run programs in guests: root, and with `allowed` who may
    /// give orders at all.
    pub fn may_run_programs(self, allowed: bool) -> bool {
        allowed || matches!(self, Self::Local { uid: 0 })
    }
}

/// Checks a request, and takes all of its body.
pub async fn keep_to(request: Request, next: Next) -> Result<Response, Problem> {
    let peer = request.extensions().get::<Peer>().copied();
    let local = !matches!(peer, Some(Peer::Certified));
    let changes = !matches!(*request.method(), Method::GET | Method::HEAD);
    foreign(request.headers(), local, changes)?;
    let (parts, body) = request.into_parts();
    let announced = parts.headers.get(header::CONTENT_LENGTH);
    let announced = announced.and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|length| length > BODY_MAX as u64) {
        return Err(too_long());
    }
    let taken = tokio::time::timeout(BODY_WAIT, to_bytes(body, BODY_MAX)).await;
    let bytes = match taken {
        Ok(Ok(bytes)) => bytes,
        Ok(Err(error)) if is_too_long(&error) => return Err(too_long()),
        Ok(Err(_)) => {
            let text = "the body broke off, or is not what its header says";
            return Err(Problem::new(StatusCode::BAD_REQUEST, text));
        }
        Err(_) => {
            let text = format!("the body did not come within {} s", BODY_WAIT.as_secs());
            return Err(Problem::new(StatusCode::REQUEST_TIMEOUT, text));
        }
    };
    Ok(next
        .run(Request::from_parts(parts, Body::from(bytes)))
        .await)
}

fn too_long() -> Problem {
    let text = format!("the body is too long: at most {BODY_MAX} bytes");
    Problem::new(StatusCode::PAYLOAD_TOO_LARGE, text)
}

fn is_too_long(error: &axum::Error) -> bool {
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(inner) = cause {
        if inner.is::<http_body_util::LengthLimitError>() {
            return true;
        }
        cause = inner.source();
    }
    false
}

fn foreign(headers: &HeaderMap, local: bool, changes: bool) -> Result<(), Problem> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let host = text(header::HOST).unwrap_or_default();
    if local && !is_local(host) {
        return Err(Problem::new(
            StatusCode::MISDIRECTED_REQUEST,
            "the Host header names another machine: ask for http://localhost/",
        ));
    }
    let origin = text(header::ORIGIN);
    let same = |origin: &str| {
        origin
            .split_once("://")
            .is_some_and(|(_, rest)| rest == host)
    };
    if changes && headers.contains_key(header::ORIGIN) && !origin.is_some_and(same) {
        return Err(Problem::new(
            StatusCode::FORBIDDEN,
            "the order comes from a page of another origin: use the daemon's own page",
        ));
    }
    Ok(())
}

/// Names that nobody can point elsewhere; with any port.
fn is_local(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    matches!(name, "" | "localhost" | "127.0.0.1" | "[::1]" | "hebed")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.insert(*name, value.parse().expect("value"));
        }
        headers
    }

    #[test]
    fn programs_are_run_for_root_alone_where_nobody_says_otherwise() {
        let (root, member) = (Peer::Local { uid: 0 }, Peer::Local { uid: 1000 });
        for (peer, allowed, may) in [
            (root, false, true),
            (member, false, false),
            (Peer::Certified, false, false),
            (member, true, true),
            (Peer::Certified, true, true),
        ] {
            assert_eq!(peer.may_run_programs(allowed), may, "{peer:?} {allowed}");
        }
    }

    #[test]
    fn pages_of_others_get_nothing() {
        let refused = |pairs: &[_], local, changes| {
            foreign(&headers(pairs), local, changes)
                .err()
                .map(|problem| problem.status.as_u16())
        };
        for host in [
            "localhost",
            "localhost:8080",
            "127.0.0.1:1",
            "[::1]:80",
            "hebed",
        ] {
            assert_eq!(refused(&[("host", host)], true, true), None, "{host}");
        }
        for host in ["evil.example", "localhost.evil.example", "[::2]:80"] {
            assert_eq!(refused(&[("host", host)], true, false), Some(421), "{host}");
            // A certificate says whose name it is.
            assert_eq!(refused(&[("host", host)], false, false), None, "{host}");
        }
        let from = |origin| [("host", "localhost:8080"), ("origin", origin)];
        assert_eq!(refused(&from("http://localhost:8080"), true, true), None);
        for origin in ["http://evil.example", "null", "http://localhost:81"] {
            assert_eq!(refused(&from(origin), true, true), Some(403), "{origin}");
            assert_eq!(refused(&from(origin), true, false), None, "{origin}");
        }
    }
}
