//! Flags of `plan`.

use std::path::PathBuf;

use clap::Args;
use hebe_policy::span::Span;

/// What `plan` says at its end.
pub const PLAN_HELP: &str = "\
Data (--data, may be given again):
  paper      the functions that the papers print
  a CSV      as 'cargo xtask bench reboot --csv' writes it: method,n,…,downtime_ms
  a report   as 'hebe reboot --report --json' prints it; several, of different n

Examples:
  hebe plan --data paper
  hebe plan --data reboot.csv --os-downtime 20 --svg plan.svg
  hebe plan --data paper --vms 4 --alpha 1 --os-interval 2d --host-interval 30d";

/// Flags of `plan`.
#[derive(Debug, Args)]
pub struct PlanArgs {
    /// Measurements: 'paper', or a file.
    #[arg(long, required = true, value_name = "FILE")]
    pub data: Vec<String>,
    /// Which service counts, where a table has several [default: its first].
    #[arg(long, value_name = "NAME")]
    pub service: Option<String>,
    /// Number of VMs on the host [default: the most that were measured].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub vms: Option<u32>,
    /// Which part of the guests' interval has gone by at a host reboot.
    #[arg(long, default_value_t = 0.5)]
    pub alpha: f64,
    /// From one rejuvenation of a guest to the next.
    #[arg(long, value_name = "SPAN", default_value = "1w")]
    pub os_interval: Span,
    /// From one rejuvenation of the host to the next.
    #[arg(long, value_name = "SPAN", default_value = "4w")]
    pub host_interval: Span,
    /// Downtime of one guest's rejuvenation [default: reboot-os at n = 1].
    #[arg(long, value_name = "SECONDS")]
    pub os_downtime: Option<f64>,
    /// A VM's downtime in one migration [default: as measured].
    #[arg(long, value_name = "SECONDS")]
    pub evacuate_pause: Option<f64>,
    /// Migrations of a VM per host reboot: 2 if it comes back, else 1.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=10))]
    pub moves: u32,
    /// Of the intervals.
    #[arg(long, default_value_t = 0.95)]
    pub confidence: f64,
    /// Draw downtime by number of VMs into this file.
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
}
