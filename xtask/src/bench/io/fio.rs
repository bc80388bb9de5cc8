//! fio in a guest, on the raw disk itself.

use anyhow::{Context, Result};
use lab::scenario::Lab;
use lab::tools;
use serde_json::Value;

use super::{Part, Row, Runner, in_guest, kvm_counters, since};

/// The guest's second disk: the first holds the programs.
const DISK: &str = "/dev/vdb";
/// Not counted, so that what comes first once meets nobody: seconds.
const RAMP_S: u32 = 1;

/// One kind of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    write: bool,
    block_kib: u32,
    depth: u32,
}

impl Case {
    /// Every case, for some depths.
    pub fn all(depths: &[u32]) -> Vec<Self> {
        let mut all = Vec::new();
        for depth in depths {
            for block_kib in [4, 128] {
                for write in [false, true] {
                    all.push(Self {
                        write,
                        block_kib,
                        depth: *depth,
                    });
                }
            }
        }
        all
    }

    fn pattern(self) -> &'static str {
        if self.write { "randwrite" } else { "randread" }
    }

    /// Such as `randread-4k-qd1`.
    pub fn name(self) -> String {
        format!("{}-{}k-qd{}", self.pattern(), self.block_kib, self.depth)
    }
}

fn words(more: &[String]) -> Vec<String> {
    let mut words = tools::in_guest("fio");
    let common = [
        "--output-format=json",
        "--eta=never",
        "--name=job",
        "--thread",
        "--direct=1",
        "--ioengine=libaio",
        "--norandommap",
    ];
    words.extend(common.map(str::to_owned));
    words.push(format!("--filename={DISK}"));
    words.extend_from_slice(more);
    words
}

/// Writes the whole disk once, so that its file has no holes.
pub fn fill(lab: &Lab, runner: &Runner) -> Result<()> {
    let more = ["--rw=write", "--bs=1m", "--iodepth=4", "--end_fsync=1"];
    in_guest(lab, &runner.guest, &words(&more.map(str::to_owned)), 60).map(drop)
}

/// Measures one case.
pub fn run(lab: &Lab, runner: &Runner, case: Case, seconds: u32, repeat: u32) -> Result<Row> {
    let more = [
        format!("--rw={}", case.pattern()),
        format!("--bs={}k", case.block_kib),
        format!("--iodepth={}", case.depth),
        format!("--runtime={seconds}"),
        format!("--ramp_time={RAMP_S}"),
        "--time_based".to_owned(),
    ];
    let before = kvm_counters(lab, runner.pid);
    let said = in_guest(lab, &runner.guest, &words(&more), seconds + RAMP_S)?;
    let kvm = since(&before, kvm_counters(lab, runner.pid));
    let (value, latency_us) = read(&said, case)?;
    Ok(Row {
        part: Part::Block,
        case: case.name(),
        vmm: runner.vmm,
        repeat,
        value,
        unit: "IO/s",
        latency_us: Some(latency_us),
        kvm,
    })
}

/// Requests a second, and the mean time of one in microseconds. fio says what
/// it has to complain before its JSON.
fn read(said: &str, case: Case) -> Result<(f64, f64)> {
    let start = said.find('{').context("fio printed no JSON")?;
    let all: Value = serde_json::from_str(&said[start..]).context("fio printed no JSON")?;
    let side = if case.write { "write" } else { "read" };
    let found = &all["jobs"][0][side];
    let iops = found["iops"].as_f64().filter(|iops| *iops > 0.0);
    let iops = iops.context("fio measured nothing")?;
    let latency = found["lat_ns"]["mean"].as_f64();
    Ok((iops, latency.context("fio tells no latency")? / 1000.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_are_all_of_both_sizes_and_directions() {
        let names: Vec<String> = Case::all(&[1, 16]).iter().map(|c| c.name()).collect();
        assert_eq!(names.len(), 8);
        assert_eq!(names[0], "randread-4k-qd1");
        assert_eq!(names[7], "randwrite-128k-qd16");
    }

    #[test]
    fn figures_are_read_from_the_side_that_worked() {
        let case = Case::all(&[1])[1];
        let said = r#"fio: a remark
{"jobs":[{"read":{"iops":0.0},"write":{"iops":1234.5,"lat_ns":{"mean":810000.0}}}]}"#;
        assert_eq!(read(said, case).expect("figures"), (1234.5, 810.0));
        assert!(read("{}", case).is_err() && read("no", case).is_err());
    }
}
