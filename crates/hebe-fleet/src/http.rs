//! JSON over plain HTTP, with a limit on time and on size.

use std::time::Duration;

use serde_json::Value;
use ureq::Agent;

/// Longest answer, in bytes.
const ANSWER_LEN_MAX: u64 = 8 << 20;
/// Longest text of a server that is shown.
const SHOWN_LEN_MAX: usize = 200;

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

/// A client that follows no redirects, uses no proxy and keeps no connection:
/// one that was cut would cost the first request after a reboot of the server.
#[derive(Clone, Debug)]
pub struct Client {
    agent: Agent,
}

impl Client {
    /// Each request ends within `timeout`.
    pub fn new(timeout: Duration) -> Self {
        let config = Agent::config_builder()
            .timeout_global(Some(timeout))
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .max_idle_connections(0)
            .proxy(None)
            .build();
        Self {
            agent: Agent::new_with_config(config),
        }
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

/// A server's text, fit to be shown: one line, not too long, no control
/// characters.
pub fn shown(text: &str) -> String {
    let clean = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().take(SHOWN_LEN_MAX).map(clean).collect()
}
