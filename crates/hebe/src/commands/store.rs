//! `store init|list|show|drop`.

use hebe_host::Host;
use hebe_host::listing::with_cause;
use hebe_host::segments::drop_listed;
use hebe_host::store_init::{InitOptions, init};
use hebe_host::stores::{ExecView, SegmentView, StoreTrouble, StoreView};
use hebe_types::{ByteSize, VmId};
use serde::Serialize;

use crate::bar::Bar;
use crate::cli::StoreCommand;
use crate::output::{Exit, Failure, Outcome, Output, table};

/// `hebe store`.
pub fn store(host: &Host, command: StoreCommand, out: &Output) -> Outcome {
    match command {
        StoreCommand::Init {
            device,
            namespace,
            force,
        } => make(
            host,
            &InitOptions {
                device,
                namespace,
                force,
            },
            out,
        ),
        StoreCommand::List => list(host, out),
        StoreCommand::Show { segment } => show(host, &segment, out),
        StoreCommand::Drop { segment, yes } => drop_segment(host, &segment, yes, out),
    }
}

fn make(host: &Host, options: &InitOptions, out: &Output) -> Outcome {
    if let (Some(_), Some(store)) = (&options.namespace, &host.layout.store) {
        return Err(Failure(format!(
            "HEBE_STORE names {} and --namespace another place: unset the one or leave the other out",
            store.display()
        )));
    }
    let bar = Bar::busy(out, "looking for a store, or making one");
    let made = init(host, options)?;
    drop(bar);
    out.answer(&made, || {
        let size = ByteSize(made.capacity);
        let path = made.path.display();
        if made.existing {
            format!("{path} holds a store of {size} already; it was left as it is")
        } else {
            format!("{path} holds a new store of {size}")
        }
    });
    Ok(Exit::Done)
}

fn view(host: &Host) -> Result<StoreView, Failure> {
    let view = host.store.view().map_err(|e| Failure(with_cause(&e)))?;
    view.ok_or_else(|| Failure(StoreTrouble::None.to_string()))
}

fn exec_text(segment: &SegmentView) -> String {
    let state = match &segment.exec {
        ExecView::Empty => "empty".into(),
        ExecView::Ended => "empty, its VM ended".into(),
        ExecView::Running { pid, .. } => format!("running (process {pid} when it began)"),
        ExecView::Frozen { state_bytes, .. } => format!("frozen, {state_bytes} bytes of state"),
        ExecView::Damaged { reason } => format!("damaged: {reason}"),
    };
    match (&segment.exec, segment.held) {
        (ExecView::Frozen { .. }, true) => format!("{state}, its VMM lives"),
        _ => state,
    }
}

fn list(host: &Host, out: &Output) -> Outcome {
    let store = view(host)?;
    out.answer(&store, || {
        let row = |s: &SegmentView| {
            vec![
                s.id.to_string(),
                s.name.as_ref().map_or("-".into(), ToString::to_string),
                s.memory.to_string(),
                s.extents.to_string(),
                exec_text(s),
            ]
        };
        let rows: Vec<Vec<String>> = store.segments.iter().map(row).collect();
        format!(
            "{}: store {}, {} MiB, {} MiB free\n{}",
            store.path.display(),
            VmId(store.uuid),
            store.capacity.0 >> 20,
            store.free.0 >> 20,
            table(&["SEGMENT", "VM", "MEMORY", "EXTENTS", "STATE"], &rows)
        )
    });
    Ok(Exit::Done)
}

fn find<'a>(store: &'a StoreView, wanted: &str) -> Result<&'a SegmentView, Failure> {
    let matches = |s: &&SegmentView| {
        s.id.to_string() == wanted || s.name.as_ref().is_some_and(|n| n.as_str() == wanted)
    };
    let mut found = store.segments.iter().filter(matches);
    match (found.next(), found.next()) {
        (Some(one), None) => Ok(one),
        (None, _) => Err(Failure(format!(
            "there is no segment '{wanted}': `hebe store list` shows those there are"
        ))),
        (Some(_), Some(_)) => Err(Failure(format!(
            "several segments match '{wanted}': use a number of `hebe store list`"
        ))),
    }
}

#[derive(Serialize)]
struct Show<'a> {
    #[serde(flatten)]
    segment: &'a SegmentView,
    spec: serde_json::Value,
}

fn show(host: &Host, wanted: &str, out: &Output) -> Outcome {
    let store = view(host)?;
    let segment = find(&store, wanted)?;
    let spec = serde_json::from_str(&segment.spec).unwrap_or_default();
    let answer = Show { segment, spec };
    out.answer(&answer, || {
        let mut text = format!(
            "segment {}\nVM      {}\nid      {}\nmemory  {}\nstate   {}\n",
            segment.id,
            segment.name.as_ref().map_or("-", |n| n.as_str()),
            segment.vm.map_or("-".into(), |id| id.to_string()),
            segment.memory,
            exec_text(segment)
        );
        for range in answer.spec["ram"].as_array().into_iter().flatten() {
            let number = |v: &serde_json::Value| v.as_u64().unwrap_or_default();
            let place = &range["place"];
            text.push_str(&format!(
                "guest {:#014x}  store {:#014x}  {} MiB\n",
                number(&range["gpa"]),
                number(&place["offset"]),
                number(&place["len"]) >> 20
            ));
        }
        text
    });
    Ok(Exit::Done)
}

#[derive(Serialize)]
struct Dropped {
    segment: u32,
    result: &'static str,
}

fn drop_segment(host: &Host, wanted: &str, yes: bool, out: &Output) -> Outcome {
    let _not_all = host.lock_orders()?;
    let store = view(host)?;
    let segment = find(&store, wanted)?;
    let admit = |now: &SegmentView| {
        let precious = matches!(now.exec, ExecView::Frozen { .. } | ExecView::Damaged { .. });
        if precious && !yes {
            return Err(Failure(format!(
                "segment {0} is {1} and would be lost for good: say `hebe store drop {0} --yes` if it is to be",
                now.id,
                exec_text(now)
            )));
        }
        Ok(())
    };
    // Told before its VM's lock is asked for: a VMM that holds it is no reason.
    admit(segment)?;
    let bar = Bar::busy(
        out,
        &format!("scrubbing {} of segment {}", segment.memory, segment.id),
    );
    drop_listed(host, segment, admit)?;
    drop(bar);
    let answer = Dropped {
        segment: segment.id.0,
        result: "dropped",
    };
    out.answer(&answer, || format!("segment {} is free again", segment.id));
    Ok(Exit::Done)
}
