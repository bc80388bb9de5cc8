//! What Prometheus gets to read, in the OpenMetrics text format.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;

use hebe_host::Host;
use hebe_host::ageing::{sample, sample_quietly};
use hebe_host::listing::{Survey, VmState};
use hebe_host::report::last_report;
use hebe_host::timeline::Downtime;
use hebe_policy::ageing::{Indicator, Sample};
use hebe_types::VmName;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use crate::agents::{AgentState, Agents};
use crate::app::App;

/// The content type.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The states that are counted, each always there.
const STATES: [VmState; 9] = [
    VmState::Running,
    VmState::Paused,
    VmState::Frozen,
    VmState::Saved,
    VmState::Stopped,
    VmState::Crashed,
    VmState::Damaged,
    VmState::Unresponsive,
    VmState::Lost,
];

type Labels = Vec<(String, String)>;
type Gauges = Family<Labels, Gauge<f64, AtomicU64>>;

fn label(key: &str, value: &str) -> Labels {
    vec![(key.to_owned(), value.to_owned())]
}

/// What has to be read for the metrics besides the VMs.
#[derive(Debug, Default)]
pub struct HostFigures {
    downtimes: Vec<Downtime>,
    sample: Option<Sample>,
}

/// Reads it; the store, in which the report lies, and the VMMs are left alone
/// in the midst of a reboot (`quiet`).
pub fn host_figures(host: &Host, quiet: bool) -> HostFigures {
    let report = (!quiet).then(|| last_report(host).ok().flatten());
    let report = report.flatten();
    HostFigures {
        downtimes: report.map(|r| r.downtimes()).unwrap_or_default(),
        sample: if quiet {
            sample_quietly(host).ok()
        } else {
            sample(host).ok()
        },
    }
}

/// The whole text.
pub fn text(app: &App, survey: Option<&Survey>, figures: &HostFigures) -> String {
    let mut registry = Registry::with_prefix("hebe");
    daemon(app, &mut registry);
    if let Some(survey) = survey {
        vms(survey, &mut registry);
        agents(&app.agents(), survey, &mut registry);
    }
    host(figures, &mut registry);
    exhaustions(&app.exhaustions(), &mut registry);
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = encode(&mut text, &registry);
    text
}

fn daemon(app: &App, registry: &mut Registry) {
    let up = Gauge::<f64, AtomicU64>::default();
    up.set(app.began.elapsed().as_secs_f64());
    registry.register_with_unit("daemon_up", "Since hebed began", Unit::Seconds, up);
    let jobs = Gauge::<i64>::default();
    jobs.set(i64::try_from(app.jobs.open()).unwrap_or(i64::MAX));
    registry.register("jobs_open", "Jobs under way", jobs);
    restarts(app.watched().restarts(), registry);
}

fn restarts(counts: &BTreeMap<VmName, u32>, registry: &mut Registry) {
    let restarts = Gauges::default();
    for (name, count) in counts {
        let gauge = restarts.get_or_create_owned(&label("vm", name.as_str()));
        gauge.set(f64::from(*count));
    }
    let help = "Starts in a row by the supervisor";
    registry.register("vm_restarts_in_a_row", help, restarts);
}

fn vms(survey: &Survey, registry: &mut Registry) {
    let states = Gauges::default();
    for state in STATES {
        let count = survey
            .rows
            .values()
            .filter(|row| row.state == state)
            .count();
        let gauge = states.get_or_create_owned(&label("state", state.as_str()));
        gauge.set(count as f64);
    }
    registry.register("vms", "VMs in each state", states);
    let (up, memory) = (Gauges::default(), Gauges::default());
    for row in survey.rows.values() {
        let labels = label("vm", row.name.as_str());
        let runs = row.state == VmState::Running;
        up.get_or_create_owned(&labels)
            .set(f64::from(u8::from(runs)));
        if let Some(size) = row.memory {
            memory.get_or_create_owned(&labels).set(size.0 as f64);
        }
    }
    balloons(survey, registry);
    registry.register("vm_up", "Whether the VM runs", up);
    registry.register_with_unit("vm_memory", "RAM of the VM", Unit::Bytes, memory);
    if let Some(store) = &survey.store {
        let bytes = Gauges::default();
        let free = bytes.get_or_create_owned(&label("part", "free"));
        free.set(store.free.0 as f64);
        let used = store.capacity.0.saturating_sub(store.free.0);
        let gauge = bytes.get_or_create_owned(&label("part", "used"));
        gauge.set(used as f64);
        registry.register_with_unit("store", "The store", Unit::Bytes, bytes);
    }
}

/// Of VMs that have one; the guest's own words among them.
fn balloons(survey: &Survey, registry: &mut Registry) {
    let bytes = Gauges::default();
    for row in survey.rows.values() {
        let Some(balloon) = row.status.as_ref().and_then(|s| s.balloon.as_ref()) else {
            continue;
        };
        let given = balloon.inflated.0.saturating_add(balloon.reported.0);
        let parts = [
            ("actual", Some(balloon.actual.0)),
            ("target", Some(balloon.target.0)),
            ("given", Some(given)),
            ("resident", balloon.resident.map(|size| size.0)),
        ];
        for (part, value) in parts {
            let Some(value) = value else { continue };
            let mut labels = label("vm", row.name.as_str());
            labels.extend(label("part", part));
            bytes.get_or_create_owned(&labels).set(value as f64);
        }
    }
    let help = "Balloons: RAM left to the guest, wanted, given back since the VMM began, in use";
    registry.register_with_unit("vm_balloon", help, Unit::Bytes, bytes);
}

/// Of VMs whose agent was asked.
fn agents(agents: &Agents, survey: &Survey, registry: &mut Registry) {
    let (up, heard) = (Gauges::default(), Gauges::default());
    for row in survey.rows.values() {
        let Some(agent) = agents.of(&row.name, row.state) else {
            continue;
        };
        let labels = label("vm", row.name.as_str());
        if agent.state != AgentState::Unasked {
            let answers = agent.state == AgentState::Answers;
            up.get_or_create_owned(&labels)
                .set(f64::from(u8::from(answers)));
        }
        if let Some(at) = agent.heard_at {
            heard.get_or_create_owned(&labels).set(at);
        }
    }
    let help = "Whether the agent in the guest of a VM that runs answers";
    registry.register("vm_agent_up", help, up);
    let help = "When the agent in the guest was last heard, since 1970";
    registry.register_with_unit("vm_agent_heard_timestamp", help, Unit::Seconds, heard);
}

fn host(figures: &HostFigures, registry: &mut Registry) {
    let (stopped, reply) = (Gauges::default(), Gauges::default());
    for downtime in &figures.downtimes {
        let labels = label("vm", downtime.vm.as_str());
        if let Some(ms) = downtime.stopped_ms {
            stopped.get_or_create_owned(&labels).set(ms / 1e3);
        }
        if let Some(ms) = downtime.to_first_reply_ms {
            reply.get_or_create_owned(&labels).set(ms / 1e3);
        }
    }
    let help = "How long the last reboot stopped the VM";
    registry.register_with_unit("reboot_downtime", help, Unit::Seconds, stopped);
    let help = "From the VM's last instruction before the last reboot to its first frame after";
    registry.register_with_unit("reboot_first_reply", help, Unit::Seconds, reply);
    let (values, limits) = (Gauges::default(), Gauges::default());
    let readings = figures.sample.iter().flat_map(|sample| sample.readings);
    for (indicator, reading) in Indicator::ALL.into_iter().zip(readings) {
        if let Some(reading) = reading {
            let labels = label("indicator", indicator.name());
            values.get_or_create_owned(&labels).set(reading.value);
            limits.get_or_create_owned(&labels).set(reading.limit);
        }
    }
    registry.register("host_indicator", "How the host is doing", values);
    let help = "The value of each indicator at which the host is exhausted";
    registry.register("host_indicator_limit", help, limits);
}

/// Indicators that do not tend to their limit have no time.
fn exhaustions(all: &[(Indicator, f64)], registry: &mut Registry) {
    let times = Gauges::default();
    for (indicator, seconds) in all {
        let labels = label("indicator", indicator.name());
        times.get_or_create_owned(&labels).set(*seconds);
    }
    let help = "When the indicator reaches its limit, from the last sample on; told of those alone that tend to it";
    registry.register_with_unit("host_exhausted_in", help, Unit::Seconds, times);
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use hebe_api::{BalloonStatus, RamMeter, VmStatus, VmmState};
    use hebe_flow::life::Life;
    use hebe_host::listing::VmRow;
    use hebe_host::stores::StoreView;
    use hebe_types::ByteSize;
    use serde_json::Value;

    use super::*;

    /// Everything that can be told, told.
    fn everything() -> String {
        let dir = tempfile::tempdir().expect("folder");
        let mut host = Host::here();
        host.layout = hebe_host::host::Layout::below(dir.path());
        let vm: VmName = "web".parse().expect("name");
        let status = VmStatus {
            name: vm.clone(),
            id: hebe_types::VmId([7; 16]),
            state: VmmState::Running,
            pid: 1,
            version: String::new(),
            resumes: 0,
            failed: None,
            guest_panicked: false,
            stopped_devices: Vec::new(),
            ram_meter: RamMeter::default(),
            disk_request_ns: None,
            disk_rings: Vec::new(),
            first_tx: None,
            resume: None,
            cage: None,
            balloon: Some(Box::new(BalloonStatus {
                resident: Some(ByteSize(1)),
                ..BalloonStatus::default()
            })),
        };
        let row = VmRow {
            name: vm.clone(),
            state: VmState::Running,
            detail: None,
            memory: Some(ByteSize(1 << 30)),
            store: None,
            segment: None,
            pid: None,
            id: None,
            life: Life::Running,
            status: Some(status),
        };
        let store = StoreView {
            path: "/dev/dax0.0".into(),
            uuid: [0; 16],
            capacity: ByteSize(2 << 30),
            free: ByteSize(1 << 30),
            kept_only: false,
            phys_range: None,
            segments: Vec::new(),
        };
        let survey = Survey {
            store: Some(store),
            store_trouble: None,
            rows: BTreeMap::from([(vm.clone(), row)]),
            definitions: BTreeMap::new(),
        };
        let figures = HostFigures {
            downtimes: vec![Downtime {
                vm,
                stopped_ms: Some(100.0),
                to_first_reply_ms: Some(200.0),
            }],
            sample: sample(&host).ok(),
        };
        let mut started_again = Registry::with_prefix("hebe");
        let counts = BTreeMap::from([(figures.downtimes[0].vm.clone(), 2)]);
        restarts(&counts, &mut started_again);
        let app = App::new(host, false);
        app.agents().hear_all(&survey);
        app.note_exhaustions(vec![(Indicator::Slab, 3_600.0)]);
        let mut all = text(&app, Some(&survey), &figures);
        encode(&mut all, &started_again).expect("text");
        all
    }

    fn each<'a>(value: &'a Value, key: &str, found: &mut Vec<&'a str>) {
        match value {
            Value::Object(fields) => {
                found.extend(fields.get(key).and_then(Value::as_str));
                fields.values().for_each(|value| each(value, key, found));
            }
            Value::Array(items) => items.iter().for_each(|value| each(value, key, found)),
            _ => {}
        }
    }

    fn words(text: &str) -> impl Iterator<Item = &str> {
        text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
    }

    #[test]
    fn the_dashboard_shows_what_is_told_and_all_of_it() {
        let dashboard: Value =
            serde_json::from_str(include_str!("../../../packaging/grafana-hebe.json"))
                .expect("JSON");
        let mut shown = Vec::new();
        each(&dashboard, "expr", &mut shown);
        each(&dashboard, "query", &mut shown);
        let metric = |word: &&str| word.starts_with("hebe_");
        let shown: BTreeSet<&str> = shown.into_iter().flat_map(words).filter(metric).collect();
        let text = everything();
        let told = text.lines().filter_map(|line| {
            let line = line.strip_prefix("# TYPE ")?;
            line.split_whitespace().next()
        });
        let told: BTreeSet<&str> = told.collect();
        assert_eq!(shown, told, "the dashboard and what is told:\n{text}");
        let mut legends = Vec::new();
        each(&dashboard, "legendFormat", &mut legends);
        for label in legends
            .into_iter()
            .flat_map(words)
            .filter(|l| !l.is_empty())
        {
            // Prometheus gives each sample the instance it is from.
            let known = label == "instance" || text.contains(&format!("{label}=\""));
            assert!(known, "no metric has a label '{label}'");
        }
    }
}
