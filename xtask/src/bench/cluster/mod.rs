//! What a group of hosts can do over one cycle of rejuvenations (T-03): by
//! simulation for 3 to 1,000 hosts, and measured with three emulated hosts
//! behind a load balancer.
//!
//! Migration is simulated alone: nothing here moves a VM to another host yet.

mod measured;

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use hebe_policy::cluster::chart::{Curve, svg};
use hebe_policy::cluster::{Costs, Cycle, Way, simulate};
use hebe_policy::policy::Policy;
use hebe_policy::usage::data::read_csv;
use hebe_policy::usage::model::Model;
use lab::assets::{Assets, KernelName};
use serde::Serialize;
use serde_json::json;

use super::{Aim, Output, caveat, while_emulator_fails};
use crate::ui::Spinner;
use measured::Run;

/// What to simulate and to measure.
#[derive(Args)]
pub struct ClusterArgs {
    /// Sizes of simulated groups.
    #[arg(long, value_delimiter = ',', default_value = "3,10,30,100,300,1000")]
    hosts: Vec<u32>,
    /// VMs on each simulated host.
    #[arg(long, default_value_t = 11)]
    vms: u32,
    /// Downtimes from a table that `bench reboot --csv` wrote, instead of the
    /// papers'; what it does not hold stays theirs.
    #[arg(long, value_name = "FILE")]
    data: Option<PathBuf>,
    /// Only simulate: start no machine.
    #[arg(long)]
    simulate_only: bool,
    /// The kernel of the three hosts and their guests.
    #[arg(long, default_value = "6.1-cloud")]
    host: KernelName,
    /// RAM of each VM of the three hosts, in MiB.
    #[arg(long, default_value_t = 128)]
    memory: u64,
    /// Draw what came out into this file.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    #[command(flatten)]
    output: Output,
}

/// Policy of the simulated hosts: the first of each month. February 2026, which
/// is simulated, has the four weeks of the papers (R-47).
const POLICY: &str = r#"
at_most = 1
[[rule]]
when = "calendar"
on = "*-*-01 03:00 UTC"
within = "1w"
"#;
/// 15 January 2026.
const FROM: i64 = 1_768_435_200;

/// One line of the table.
#[derive(Serialize)]
struct Row {
    /// `simulated` or `measured`.
    kind: &'static str,
    /// Whose costs: `paper`, the file's name, or `emulated hosts`.
    costs: String,
    way: Way,
    hosts: u32,
    cycle_s: f64,
    /// Throughput over the cycle, in host-seconds.
    area: f64,
    lost: f64,
    lost_part: f64,
    least: f64,
    roll_s: f64,
}

impl Row {
    fn of(cycle: &Cycle, costs: &str) -> Self {
        Self {
            kind: "simulated",
            costs: costs.to_owned(),
            way: cycle.way,
            hosts: cycle.hosts,
            cycle_s: cycle.cycle_s,
            area: cycle.area,
            lost: cycle.lost,
            lost_part: cycle.lost_part,
            least: cycle.least,
            roll_s: cycle.roll_s,
        }
    }

    fn csv(&self) -> String {
        format!(
            "{},{},{:?},{},{:.0},{:.1},{:.1},{:.9},{:.2},{:.1}",
            self.kind,
            self.costs,
            self.way,
            self.hosts,
            self.cycle_s,
            self.area,
            self.lost,
            self.lost_part,
            self.least,
            self.roll_s
        )
        .to_lowercase()
    }
}

/// Runs both; prints the table.
pub fn run(assets: &Assets, args: &ClusterArgs, progress: &Spinner) -> Result<()> {
    let mut costs = Costs::of_paper(args.vms)?;
    let mut whose = "paper".to_owned();
    if let Some(file) = &args.data {
        let bytes = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        let table = read_csv(&bytes, None).with_context(|| file.display().to_string())?;
        costs.measured(&Model::fit(&table)?, args.vms)?;
        whose = file.display().to_string();
    }
    let cycles = simulated(&args.hosts, &costs)?;
    let mut rows: Vec<Row> = cycles.iter().map(|c| Row::of(c, &whose)).collect();
    let (mut runs, mut failures) = (Vec::new(), 0);
    let result = if args.simulate_only {
        Ok(())
    } else {
        while_emulator_fails(progress, &mut failures, || {
            runs.clear();
            measured::run(assets, args, &mut runs, progress)
        })
    };
    progress.clear();
    rows.extend(of_runs(&runs));
    print(&rows);
    let aims = aims(&rows);
    Aim::print(&aims);
    let csv: Vec<String> = rows.iter().map(Row::csv).collect();
    let all = json!({
        "costs": costs,
        "costs_of": whose,
        "vms": args.vms,
        "emulator_failures": failures,
        "rows": rows,
        "simulated": cycles,
        "measured": runs,
    });
    let header =
        "kind,costs,way,hosts,cycle_s,area_host_s,lost_host_s,lost_part,least_hosts,roll_s";
    args.output.write(all, &aims, header, &csv)?;
    if let Some(path) = &args.svg {
        let text = chart(&whose, &cycles, &runs);
        fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    result
}

fn simulated(sizes: &[u32], costs: &Costs) -> Result<Vec<Cycle>> {
    let policy: Policy = toml::from_str(POLICY).context("the policy of this bench")?;
    let mut cycles = Vec::new();
    for hosts in sizes {
        for way in Way::ALL {
            cycles.push(simulate(way, *hosts, &policy, costs, FROM)?);
        }
    }
    Ok(cycles)
}

/// The measured cycles, all over a time as long as the longest of them, and
/// what a spare host costs in it at the very least: that it serves nobody.
fn of_runs(runs: &[Run]) -> Vec<Row> {
    let cycle_s = runs.iter().map(Run::cycle_s).fold(0.0, f64::max);
    let hosts = runs.first().map_or(0, |run| run.hosts);
    let row = |way, kind, lost: f64, least, roll_s| {
        let whole = f64::from(hosts) * cycle_s;
        Row {
            kind,
            costs: "emulated hosts".to_owned(),
            way,
            hosts,
            cycle_s,
            area: whole - lost,
            lost,
            lost_part: lost / whole,
            least,
            roll_s,
        }
    };
    let mut rows: Vec<Row> = runs
        .iter()
        .map(|run| row(run.way, "measured", run.lost(), run.least(), run.roll_s()))
        .collect();
    if !rows.is_empty() {
        let spare = f64::from(hosts - 1);
        rows.push(row(Way::Migrate, "simulated", cycle_s, spare, 0.0));
    }
    rows
}

fn print(rows: &[Row]) {
    println!(
        "Throughput over one cycle, in hosts; measured: {}",
        caveat()
    );
    println!(
        "{:<10} {:<29} {:>5} {:>10} {:>14} {:>11} {:>7} {:>10}",
        "kind", "way", "hosts", "cycle, s", "lost, host-s", "lost, %", "least", "roll, s"
    );
    for row in rows {
        println!(
            "{:<10} {:<29} {:>5} {:>10.0} {:>14.0} {:>11.4} {:>7.2} {:>10.0}",
            row.kind,
            row.way.name(),
            row.hosts,
            row.cycle_s,
            row.lost,
            row.lost_part * 100.0,
            row.least,
            row.roll_s
        );
    }
}

/// T-03, for each size and for what was measured.
fn aims(rows: &[Row]) -> Vec<Aim> {
    let warm = rows.iter().filter(|row| row.way == Way::Warm);
    let aims = warm.flat_map(|warm| {
        let others = rows.iter().filter(move |row| {
            row.way != Way::Warm
                && (row.hosts, &row.costs, row.cycle_s) == (warm.hosts, &warm.costs, warm.cycle_s)
        });
        others.map(move |other| {
            // The same as a larger area, and the figure tells more.
            let ratio = other.lost / warm.lost;
            let what = format!(
                "{} hosts, warm {}: what {} loses to what warm does",
                warm.hosts,
                warm.kind,
                other.way.name()
            );
            Aim::new(what, ratio, "above 1", ratio > 1.0)
        })
    });
    aims.collect()
}

fn chart(whose: &str, cycles: &[Cycle], runs: &[Run]) -> String {
    let title = format!("A group of hosts over one cycle of rejuvenations (costs: {whose})");
    if runs.is_empty() {
        let small: Vec<&Cycle> = cycles
            .iter()
            .filter(|c| Some(c.hosts) == cycles.first().map(|c| c.hosts))
            .collect();
        let until = small.iter().map(|c| c.roll_s).fold(60.0, f64::max) * 1.2;
        let curves: Vec<Curve> = small.iter().map(|c| Curve::of(c, until)).collect();
        let below = format!(
            "Simulated throughput of {} hosts from the event of the calendar on",
            small.first().map_or(0, |c| c.hosts)
        );
        return svg(&title, cycles, &below, &curves);
    }
    let mut curves: Vec<Curve> = runs.iter().map(Run::curve).collect();
    let (hosts, end) = (
        f64::from(runs[0].hosts),
        runs.iter().map(Run::cycle_s).fold(0.0, f64::max),
    );
    curves.push(Curve {
        label: "migrate + cold, at best, simulated".to_owned(),
        way: Way::Migrate,
        points: [0.0, end].map(|s| (s, (hosts - 1.0) / hosts)).to_vec(),
    });
    let below = "Measured throughput of three emulated hosts, renewed one after another; migration simulated";
    svg(&title, cycles, below, &curves)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warm_has_the_largest_area_at_every_size() {
        let costs = Costs::of_paper(11).expect("costs");
        let cycles = simulated(&[3, 1000], &costs).expect("cycles");
        let rows: Vec<Row> = cycles.iter().map(|c| Row::of(c, "paper")).collect();
        let aims = aims(&rows);
        assert_eq!(aims.len(), 4);
        assert!(aims.iter().all(|aim| aim.met));
        let text = chart("paper", &cycles, &[]);
        assert!(text.contains("<polyline"), "{text}");
        assert!(
            rows[2]
                .csv()
                .starts_with("simulated,paper,migrate,3,2419200,")
        );
    }
}
