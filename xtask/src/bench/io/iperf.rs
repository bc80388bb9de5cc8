//! iperf3 between a guest and its host, over the tap and the bridge.

use anyhow::{Context, Result};
use lab::scenario::Lab;
use lab::tools;
use serde_json::Value;

use super::{Part, Row, Runner, in_guest, kvm_counters, since};

/// The host's own address on the bridge.
const HOST: &str = "10.0.2.15";
const LOG: &str = "/run/iperf3.log";
/// Not counted: seconds until TCP has found its pace.
const OMITTED_S: u32 = 1;

/// Who sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The guest.
    ToHost,
    /// The host.
    FromHost,
}

impl Direction {
    pub const ALL: [Self; 2] = [Self::ToHost, Self::FromHost];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::ToHost => "to-host",
            Self::FromHost => "from-host",
        }
    }
}

/// Starts the host's end; it stays.
pub fn serve(lab: &Lab) -> Result<()> {
    let mut words = tools::in_host("iperf3");
    words.push("--server".to_owned());
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    lab.machine.agent.spawn(&words, LOG).map(drop)
}

/// Measures one direction, by one TCP stream.
pub fn run(
    lab: &Lab,
    runner: &Runner,
    direction: Direction,
    seconds: u32,
    repeat: u32,
) -> Result<Row> {
    let mut words = tools::in_guest("iperf3");
    words.extend(["--client", HOST, "--json"].map(str::to_owned));
    words.extend(["--time".to_owned(), seconds.to_string()]);
    words.extend(["--omit".to_owned(), OMITTED_S.to_string()]);
    if direction == Direction::FromHost {
        words.push("--reverse".to_owned());
    }
    let before = kvm_counters(lab, runner.pid);
    let said = in_guest(lab, &runner.guest, &words, seconds + OMITTED_S)?;
    let kvm = since(&before, kvm_counters(lab, runner.pid));
    Ok(Row {
        part: Part::Net,
        case: direction.as_str().to_owned(),
        vmm: runner.vmm,
        repeat,
        value: received_mbit_s(&said)?,
        unit: "Mbit/s",
        latency_us: None,
        kvm,
    })
}

/// What arrived, in megabits a second.
fn received_mbit_s(said: &str) -> Result<f64> {
    let all: Value = serde_json::from_str(said).context("iperf3 printed no JSON")?;
    let bits = all["end"]["sum_received"]["bits_per_second"].as_f64();
    let bits = bits.filter(|bits| *bits > 0.0);
    bits.map(|bits| bits / 1e6)
        .with_context(|| format!("iperf3 measured nothing: {}", all["error"]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_arrived_counts() {
        let said = r#"{"end":{"sum_sent":{"bits_per_second":9e6},"sum_received":{"bits_per_second":8e6}}}"#;
        assert_eq!(received_mbit_s(said).expect("a rate"), 8.0);
        let error = received_mbit_s(r#"{"error":"unable to connect"}"#).expect_err("none");
        assert!(error.to_string().contains("unable to connect"));
    }
}
