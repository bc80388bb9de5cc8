//! One file per group of commands.

mod age;
mod agent;
mod balloon;
mod completions;
mod console;
mod dashboard;
mod fleet;
mod host;
mod image;
mod logs;
mod man;
mod plan;
mod reboot;
mod rolls;
mod seed;
mod setup;
mod slots;
mod store;
mod suspend;
mod top;
mod vm;

use hebe_host::Host;
use hebe_types::Stamp;

use crate::cli::Command;
use crate::output::{Failure, Outcome, Output};

/// Carries out one command. `started` is the instant this process began.
pub fn run(host: &Host, command: Command, out: &Output, started: Stamp) -> Outcome {
    // What nobody reads, and what a shell asks for while a person types.
    let is_helper = matches!(
        command,
        Command::NetHelper | Command::Keeper(_) | Command::List { names: true }
    );
    let looks = matches!(
        command,
        Command::List { names: false }
            | Command::Show { .. }
            | Command::Top(_)
            | Command::Console { .. }
    );
    if looks {
        may_look(host)?;
    }
    let outcome = carry_out(host, command, out, started);
    if is_helper {
        return outcome;
    }
    for words in hebe_host::network::remarks(&host.layout) {
        out.progress(&words);
    }
    outcome
}

/// Whoever may not look into the runtime directory would be told that no VM is up.
fn may_look(host: &Host) -> Result<(), Failure> {
    let vms = host.layout.run.join("vms");
    match std::fs::read_dir(&vms) {
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => Err(Failure(format!(
            "you may not look into {}, so it is not known which VMs are up: run it with sudo, or ask hebed ({e})",
            vms.display()
        ))),
        _ => Ok(()),
    }
}

fn carry_out(host: &Host, command: Command, out: &Output, started: Stamp) -> Outcome {
    match command {
        Command::Run(args) => vm::run(host, args, out),
        Command::Start { names, afresh, .. } => vm::start(host, &names, afresh, out),
        Command::Stop(args) => vm::stop(host, &args, out),
        Command::List { names: true } => vm::names(host, out),
        Command::List { names: false } => vm::list(host, out),
        Command::Show { name } => vm::show(host, &name, out),
        Command::Drop { name, yes } => vm::drop_vm(host, &name, yes, out),
        Command::Console { name } => console::console(host, &name, out),
        Command::Balloon(args) => balloon::balloon(host, &args, out),
        Command::Logs(args) => logs::logs(host, &args, out),
        Command::Top(args) => top::top(host, args, out),
        Command::Dashboard(args) => dashboard::dashboard(host, &args, out),
        Command::Agent(args) => agent::agent(host, &args, out),
        Command::Suspend(args) => suspend::suspend(host, &args, out),
        Command::Resume(args) => suspend::resume(host, &args, out, started),
        Command::Reboot(args) => reboot::reboot(host, &args, out),
        Command::Store(command) => store::store(host, command, out),
        Command::Image(command) => image::image(host, &command, out),
        Command::Host(command) => host::host(host, &command, out),
        Command::Fleet(command) => fleet::fleet(host, &command, out),
        Command::Plan(args) => plan::plan(&args, out),
        Command::Man { dir } => man::man(dir.as_deref(), out),
        Command::Keeper(args) => host::keeper(host, args),
        Command::NetHelper => host::net_helper(host),
        Command::Completions { shell } => completions::completions(shell, out),
    }
}
