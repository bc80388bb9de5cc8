//! The command line: every flag is defined here, once.

mod age;
mod agent;
mod balloon;
mod check;
mod eyes;
mod fleet;
mod image;
mod plan;
mod reboot;
mod seed;
mod setup;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use hebe_types::{ByteSize, Forward, VmName};

pub use age::{AGE_HELP, AgeArgs};
pub use agent::{AgentArgs, AgentOrder};
pub use balloon::BalloonArgs;
pub use eyes::{DASHBOARD_HELP, DashboardArgs, LOGS_HELP, LogsArgs, TOP_HELP, TopArgs};
pub use fleet::{FleetCommand, RollArgs, RollOrder};
pub use image::{ImageBuildArgs, ImageCommand, ImageFormat};
pub use plan::{PLAN_HELP, PlanArgs};
pub use reboot::{MethodArg, RebootArgs};
pub use seed::SeedArgs;
pub use setup::{SETUP_HELP, SetupArgs, SetupStore};

const EXIT_CODES: &str = "\
Exit status:
  0  done
  1  failed, with one sentence on stderr
  2  the command line is wrong
  3  a check does not hold; nothing was touched
  4  a reboot was undone, and every VM runs again
  5  some VM needs attention: it is listed with the reason
  `hebe agent NAME exec` ends as its program does, and with 255 where that did not run

Environment:
  HEBE_RUN_DIR     sockets, locks and logs of VMs that are up  [/run/hebe]
  HEBE_CONFIG_DIR  vms/NAME.toml and host.toml                 [/etc/hebe]
  HEBE_STATE_DIR   saved VMs, notes and reports                [/var/lib/hebe]
  HEBE_STORE       the store's device         [the first /dev/dax* with a store]
  HEBE_VMM         the hebe-vmm program                 [beside hebe, or in PATH]";

/// Runs VMs, and reboots the host under them.
#[derive(Debug, Parser)]
#[command(name = "hebe", version, after_help = EXIT_CODES, max_term_width = 100)]
pub struct Cli {
    /// Print JSON instead of text.
    #[arg(long, global = true)]
    pub json: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Boot a VM from a file or from flags.
    #[command(after_help = "\
Examples:
  hebe run web.toml
  hebe run --name web --memory 1GiB --disk debian.img --ssh-key ~/.ssh/id_ed25519.pub
  hebe run --name web --disk debian.img --readonly tools.img --readonly data.qcow2
  hebe run --name try --memory 256MiB --kernel /boot/vmlinuz-6.1 --cmdline console=ttyS0")]
    Run(RunArgs),
    /// Boot a defined VM (vms/NAME.toml in the configuration directory).
    #[command(after_help = "\
Examples:
  hebe start web db
  hebe start web --afresh      # 'lost': its frozen memory is given up for good")]
    Start {
        /// The VMs.
        #[arg(required = true)]
        names: Vec<VmName>,
        /// Also a VM whose memory may still be frozen in a store that this kernel
        /// does not have: that memory is never continued afterwards.
        #[arg(long)]
        afresh: bool,
        #[command(flatten)]
        cage: CageArgs,
    },
    /// Shut a VM down: press its power button and wait.
    #[command(after_help = "\
Examples:
  hebe stop web
  hebe stop web --timeout 120
  hebe stop web --force        # power off if it does not shut down in time")]
    Stop(StopArgs),
    /// List VMs and how each is.
    #[command(after_help = "Examples:\n  hebe list\n  hebe list --json")]
    List {
        /// Names alone, as far as files tell them: for completions, in no time.
        #[arg(long, hide = true)]
        names: bool,
    },
    /// Show everything about one VM.
    #[command(after_help = "Example:\n  hebe show web")]
    Show {
        /// The VM.
        name: VmName,
    },
    /// Connect to a VM's console; Ctrl-] leaves it.
    #[command(after_help = "\
Examples:
  hebe console web
  echo uptime | hebe console web")]
    Console {
        /// The VM.
        name: VmName,
    },
    /// Print what a VM's VMM noted, or what its guest wrote to its console.
    #[command(after_help = LOGS_HELP)]
    Logs(LogsArgs),
    /// Watch the VMs and the host's age, refreshed each second.
    #[command(after_help = TOP_HELP)]
    Top(TopArgs),
    /// Make the daemon's page reachable by a browser of this machine.
    #[command(after_help = DASHBOARD_HELP)]
    Dashboard(DashboardArgs),
    /// Speak with the agent in a VM.
    #[command(after_help = "\
Examples:
  hebe agent web ping
  hebe start web && hebe agent web wait        # until its guest says 'ready'
  hebe agent web time                  # set its clock to the host's
  hebe agent web freeze --for 20 && cp disk.img copy.img && hebe agent web thaw
  hebe agent web exec -- df -h /")]
    Agent(AgentArgs),
    /// Look at a VM's balloon, or set it.
    #[command(after_help = "\
Examples:
  hebe balloon web                     # how it stands, and the guest's statistics
  hebe balloon web --target 1GiB       # leave its guest with 1 GiB")]
    Balloon(BalloonArgs),
    /// Suspend a VM on memory: its RAM stays where it is.
    #[command(after_help = "\
Examples:
  hebe suspend web db
  hebe suspend web && hebe resume web
  hebe suspend --all           # every VM that runs, if it is in a store")]
    Suspend(SuspendArgs),
    /// Resume a VM from memory or from its saved file.
    #[command(after_help = "\
Examples:
  hebe resume web db
  hebe resume web --from file  # frozen and saved: the frozen state is given up
  hebe resume --all            # in early user space, after a reboot
  hebe resume --all --autostart")]
    Resume(ResumeArgs),
    /// Give a VM up: free its memory and its saved file.
    #[command(after_help = "Example:\n  hebe drop web --yes")]
    Drop {
        /// The VM.
        name: VmName,
        /// Yes, even if what it was doing can still be continued, or cannot be read.
        #[arg(long)]
        yes: bool,
    },
    /// Put a new kernel under the VMs.
    #[command(after_help = "\
Examples:
  hebe reboot --dry-run
  hebe reboot                                  # warm, into the same kernel
  hebe reboot --kernel /boot/vmlinuz-7.3.0 --append quiet
  hebe reboot --method saved --hard
  hebe reboot --load && systemctl kexec
  hebe reboot --report --svg reboot.svg")]
    Reboot(RebootArgs),
    /// Make disk images.
    #[command(subcommand)]
    Image(ImageCommand),
    /// Look after the store, where VMs outlive the host kernel.
    #[command(subcommand)]
    Store(StoreCommand),
    /// Look after this host.
    #[command(subcommand)]
    Host(HostCommand),
    /// Plan rejuvenations: what each method costs now, and what it saves a year.
    #[command(after_help = PLAN_HELP)]
    Plan(PlanArgs),
    /// Look after a group of hosts.
    #[command(subcommand)]
    Fleet(FleetCommand),
    /// Holds what the kernel before handed over; `hebe resume --all` starts it.
    #[command(
        hide = true,
        after_help = "Example:\n  hebe keeper       # not by hand: it takes what only `hebe resume` knows to use"
    )]
    Keeper(KeeperArgs),
    /// Serves networks that Hebe makes; starting a VM with network = "nat" starts it.
    #[command(
        hide = true,
        after_help = "Example:\n  hebe net-helper   # not by hand: it answers DHCP on hebe0 and ends with the last VM there"
    )]
    NetHelper,
    /// Print a completion script for a shell.
    #[command(after_help = "\
Examples:
  hebe completions bash > /etc/bash_completion.d/hebe
  hebe completions zsh > /usr/local/share/zsh/site-functions/_hebe
  hebe completions fish > /etc/fish/completions/hebe.fish")]
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page, or write one for each command.
    #[command(after_help = "\
Examples:
  hebe man | man -l -
  hebe man --dir /usr/local/share/man/man1")]
    Man {
        /// Where to write them, instead of printing the first.
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
    },
}

/// Flags of `run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// A definition in TOML.
    #[arg(required_unless_present_any = ["kernel", "disk", "readonly"], conflicts_with_all = [
        "name", "memory", "vcpus", "kernel", "initrd", "cmdline", "disk", "readonly", "net",
        "store", "user_data", "hostname", "ssh_key", "vsock", "balloon", "forward", "snapshot",
    ])]
    pub file: Option<PathBuf>,
    /// The VM's name.
    #[arg(long)]
    pub name: Option<VmName>,
    /// Its RAM, a multiple of 2MiB.
    #[arg(long, default_value = "256MiB")]
    pub memory: ByteSize,
    /// Its processors, 1 to 8.
    #[arg(long, default_value_t = 1)]
    pub vcpus: u8,
    /// Its kernel: a bzImage, or an ELF image with a PVH note. Without one, what the boot
    /// loader on the first disk would boot.
    #[arg(long, requires = "name")]
    pub kernel: Option<PathBuf>,
    /// Its initramfs.
    #[arg(long, requires = "kernel")]
    pub initrd: Option<PathBuf>,
    /// Its kernel's command line; without --kernel, what is put behind that of the disk.
    #[arg(long, default_value = "")]
    pub cmdline: String,
    /// A disk: a qcow2 image if its name ends in .qcow2, raw otherwise; may be given again.
    #[arg(long, value_name = "PATH", requires = "name")]
    pub disk: Vec<PathBuf>,
    /// A disk that the guest can only read, behind those of --disk; may be given again.
    #[arg(long, value_name = "PATH", requires = "name")]
    pub readonly: Vec<PathBuf>,
    /// The disks of --disk stay as they are: what the guest writes goes when the VM is stopped.
    #[arg(long, requires = "disk")]
    pub snapshot: bool,
    /// A network: `nat` (address and way out by this host), `user` (the same without
    /// privileges, by passt), or a tap device of yours, TAP or TAP@BRIDGE; may be given again.
    #[arg(long, value_name = "nat|user|TAP[@BRIDGE]")]
    pub net: Vec<String>,
    /// A port of this host that leads to the VM's first network of `nat` or `user`, such as
    /// 8080:80, tcp:127.0.0.1:2222:22 or udp:5353:53; may be given again.
    #[arg(long, value_name = "[PROTO:][ADDRESS:]PORT:PORT", requires = "net")]
    pub forward: Vec<Forward>,
    /// Sockets between host and guest, as its agent needs them.
    #[arg(long)]
    pub vsock: bool,
    /// A balloon: what the guest does not need goes back to the host.
    #[arg(long)]
    pub balloon: bool,
    /// Where its RAM lives.
    #[arg(long, value_enum, default_value_t = StoreArg::Auto)]
    pub store: StoreArg,
    #[command(flatten)]
    pub seed: SeedArgs,
    #[command(flatten)]
    pub cage: CageArgs,
}

/// Flags of all commands that start VMMs.
#[derive(Clone, Copy, Debug, Args)]
pub struct CageArgs {
    /// For debugging alone: the VMM keeps all rights of whoever starts it, and a guest that
    /// breaks out of its VM has them too.
    #[arg(long)]
    pub no_sandbox: bool,
}

/// Where RAM lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum StoreArg {
    /// In the store where there is one, else in what Linux carries, if it can.
    Auto,
    /// In the store: outlives the host kernel.
    Devdax,
    /// In ordinary memory that Linux carries into the next kernel.
    Luo,
    /// In anonymous memory.
    Memfd,
}

/// Of `keeper`, which `hebe` starts.
#[derive(Debug, Args)]
pub struct KeeperArgs {
    /// A session that systemd handed over: its descriptor, and its name there.
    #[arg(long, value_name = "NUMBER=NAME")]
    pub session: Vec<String>,
    /// Where systemd listens.
    #[arg(long, value_name = "ADDRESS")]
    pub notify: Option<OsString>,
}

/// Flags of `stop`.
#[derive(Debug, Args)]
pub struct StopArgs {
    /// The VMs.
    #[arg(required = true)]
    pub names: Vec<VmName>,
    /// How long the guest has to shut down, in seconds; 0 does not ask it.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub timeout: u64,
    /// Power off a guest that does not shut down in time.
    #[arg(long)]
    pub force: bool,
}

/// Flags of `suspend`.
#[derive(Debug, Args)]
pub struct SuspendArgs {
    /// The VMs.
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    pub names: Vec<VmName>,
    /// Every VM that runs, all at once.
    #[arg(long)]
    pub all: bool,
}

/// Flags of `resume`.
#[derive(Debug, Args)]
pub struct ResumeArgs {
    /// The VMs.
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    pub names: Vec<VmName>,
    /// Every VM that was up before the host rebooted.
    #[arg(long)]
    pub all: bool,
    /// With --all: boot also VMs with autostart = true.
    #[arg(long, requires = "all", conflicts_with = "names")]
    pub autostart: bool,
    /// Which of two states to continue; the other is given up.
    #[arg(long, value_enum, conflicts_with = "all")]
    pub from: Option<FromArg>,
    /// Use a saved file whose restore was interrupted before the guest ran.
    #[arg(long, conflicts_with = "all")]
    pub again: bool,
    /// Take a disk that was replaced, or written to, while the VM was suspended. Its memory
    /// destroys what is on it, unless it holds the very bytes that the old one did.
    #[arg(long, conflicts_with = "all")]
    pub accept_changed_disk: bool,
    /// Resume also what the state directory says nothing of: where it does not outlive the
    /// kernel. A VM that was started afresh since it was frozen destroys its disks then.
    #[arg(long)]
    pub unnoted: bool,
    #[command(flatten)]
    pub cage: CageArgs,
}

/// Where to resume from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FromArg {
    /// The state frozen in the store.
    Memory,
    /// The saved file.
    File,
}

/// What to do with the store.
#[derive(Debug, Subcommand)]
pub enum StoreCommand {
    /// Make a store of a reserved range; does nothing where there is one.
    #[command(
        visible_alias = "format",
        after_help = "\
Examples:
  hebe store init                      # the one devdax device or reserved range
  hebe store init /dev/dax0.0
  hebe store init --namespace namespace0.0
  hebe store init --force              # anew, where it cannot be read"
    )]
    Init {
        /// The devdax device, or a plain file for a try.
        device: Option<PathBuf>,
        /// The reserved range to make a devdax device of.
        #[arg(long, conflicts_with = "device")]
        namespace: Option<String>,
        /// Make a store that is there anew, with whatever it holds that cannot be read; refused
        /// while a VM runs or is frozen in it.
        #[arg(long)]
        force: bool,
    },
    /// List segments.
    #[command(after_help = "Examples:\n  hebe store list\n  hebe store list --json")]
    List,
    /// Show one segment: whose it is, its state, where its RAM lies.
    #[command(after_help = "Examples:\n  hebe store show web\n  hebe store show 3")]
    Show {
        /// A VM's name or a segment's number.
        segment: String,
    },
    /// Scrub and free a segment; what its VM was doing is lost.
    #[command(after_help = "\
Examples:
  hebe store drop web
  hebe store drop 3 --yes      # frozen, or cannot be read")]
    Drop {
        /// A VM's name or a segment's number.
        segment: String,
        /// Yes, even if a state is committed in it, or it cannot be read.
        #[arg(long)]
        yes: bool,
    },
}

/// What to do with the host.
#[derive(Debug, Subcommand)]
pub enum HostCommand {
    /// Is this machine ready? The exact remedy for each thing that is not.
    #[command(
        after_help = "Exit status 3: something is missing.\n\nExamples:\n  hebe host check\n  hebe host check --json"
    )]
    Check,
    /// Make this machine ready: reserve memory, tell GRUB, enable the units. Shows what
    /// would change, and asks.
    #[command(after_help = SETUP_HELP)]
    Setup(SetupArgs),
    /// Keep the VMs while the service manager takes the host down; it is the stop of
    /// hebe-freeze.service. Where the host stays up, nothing happens.
    #[command(after_help = "\
Exit status 5: some VM could not be kept; the reason is printed.

Example:
  hebe host stopping        # not by hand: systemd runs it")]
    Stopping {
        /// Only if the one before did not come to its end ($SERVICE_RESULT).
        #[arg(long)]
        rest: bool,
    },
    /// Take what systemd holds of the kernel before; it is the start of
    /// hebe-freeze.service. Where there is nothing, nothing happens.
    #[command(after_help = "Example:\n  hebe host starting        # not by hand: systemd runs it")]
    Starting,
    /// Note how the host is doing; run it from a timer.
    #[command(after_help = "Example:\n  hebe host sample")]
    Sample,
    /// Is the host ageing, and when will it be exhausted?
    #[command(after_help = AGE_HELP)]
    Age(AgeArgs),
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_of_the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        let cli = Cli::try_parse_from(line.split_whitespace())?;
        cli.check()?;
        Ok(cli)
    }

    #[test]
    fn good_lines_are_understood() {
        let cli =
            parse("hebe --json reboot --method cold --timeout 5 --append -x").expect("reboot");
        assert!(cli.json);
        let Command::Reboot(args) = cli.command else {
            panic!("not reboot");
        };
        assert_eq!((args.method, args.timeout), (MethodArg::Cold, Some(5)));
        assert_eq!(args.append.as_deref(), Some("-x"));
        for line in [
            "hebe run web.toml",
            "hebe run --name a --kernel /k --net tap0@br0",
            "hebe run --name a --disk d",
            "hebe run --name a --disk d --vsock --balloon",
            "hebe run --name a --disk d --disk e --snapshot",
            "hebe run --name a --disk d --readonly e --readonly f --snapshot",
            "hebe run --name a --readonly d",
            "hebe suspend --all",
            "hebe balloon web",
            "hebe balloon web --target 512MiB --json",
            "hebe run --name a --disk d --net nat --forward 8080:80 --forward udp:1:2",
            "hebe run --name a --disk d --hostname h --user-data u --ssh-key k --ssh-key l",
            "hebe resume --all --autostart",
            "hebe resume web --from file",
            "hebe resume web db",
            "hebe man --dir /tmp",
            "hebe list --json",
            "hebe store init --force",
            "hebe store format",
            "hebe image build d.img",
            "hebe image build d.img --agent --include a,b --size 1GiB",
            "hebe image build d.img --agent=/x --format qcow2 --json",
            "hebe reboot --report --svg x.svg",
            "hebe host check",
            "hebe host starting",
            "hebe host stopping --rest",
            "hebe host setup --size 16GiB --yes",
            "hebe host setup --store luo --dry-run",
            "hebe host setup --undo",
            "hebe reboot --load --kernel k",
            "hebe reboot --direct",
            "hebe completions bash",
            "hebe agent web ping",
            "hebe agent web freeze --for 60",
            "hebe agent web shutdown --reboot",
            "hebe agent web wait",
            "hebe agent web wait migrated --timeout 5 --json",
            "hebe agent web exec uname -a",
            "hebe agent web exec -- uname -s",
            "hebe agent web exec --timeout 300 --json -- uname",
            "hebe logs web --follow --lines 7",
            "hebe logs web --console --raw",
            "hebe logs web --json",
            "hebe top --once --json",
            "hebe dashboard --port 8080",
        ] {
            assert!(parse(line).is_ok(), "{line}");
        }
    }

    #[test]
    fn bad_lines_are_refused() {
        for line in [
            "hebe",
            "hebe start",
            "hebe start ../x",
            "hebe resume",
            "hebe resume web --all",
            "hebe run",
            "hebe run --kernel /k",
            "hebe run --name a",
            "hebe run --disk d",
            "hebe run --name a --disk d --initrd i",
            "hebe run --name a --kernel /k --memory lots",
            "hebe run --name a --kernel /k --forward 8080:80",
            "hebe run --name a --kernel /k --net nat --forward 80",
            "hebe image build",
            "hebe image build d.img --size lots",
            "hebe image build d.img --format vmdk",
            "hebe agent web",
            "hebe balloon",
            "hebe balloon web --target lots",
            "hebe agent web thaw --for 3",
            "hebe logs",
            "hebe logs web --lines 10001",
            "hebe top web",
            "hebe dashboard --port 70000",
            "hebe agent web freeze --for 61",
            "hebe agent web wait Ready",
            "hebe agent web wait --timeout 0",
            "hebe agent web exec",
            "hebe agent web exec --",
            "hebe agent web exec --timeout 0 -- uname",
            "hebe agent web exec --timeout 301 -- uname",
            "hebe reboot --method lukewarm",
            "hebe reboot --svg x.svg",
            "hebe reboot --report --dry-run",
            "hebe reboot --method cold --hard --kexec",
            "hebe reboot --method cold --hard --initrd i",
            "hebe reboot --method saved --hard --kernel k",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    /// What units run must be a command of this release.
    #[test]
    fn units_run_what_there_is() {
        let units = [
            include_str!("../../../packaging/hebe-freeze.service"),
            include_str!("../../../packaging/hebe-resume.service"),
            include_str!("../../../packaging/hebe-fleet-release.service"),
        ];
        let mut found = 0;
        for line in units.iter().flat_map(|unit| unit.lines()) {
            let Some((key, order)) = line.split_once('=') else {
                continue;
            };
            let order = order.trim_start_matches('-');
            if let Some(words) = order.strip_prefix("/usr/bin/") {
                assert!(key.starts_with("Exec"), "{line}");
                assert!(parse(words).is_ok(), "{line}");
                found += 1;
            }
        }
        assert_eq!(found, 5);
    }

    /// Whoever gives a flag must not find out later that it did nothing.
    #[test]
    fn no_flag_is_ignored_in_silence() {
        for line in [
            "hebe run web.toml --vcpus 2",
            "hebe run web.toml --initrd i",
            "hebe run web.toml --cmdline quiet",
            "hebe run web.toml --disk d",
            "hebe run web.toml --net tap0",
            "hebe run web.toml --net nat --forward 1:1",
            "hebe run web.toml --store memfd",
            "hebe run web.toml --vsock",
            "hebe run web.toml --balloon",
            "hebe run web.toml --snapshot",
            "hebe run --name a --kernel k --snapshot",
            "hebe run --name a --readonly d --snapshot",
            "hebe run web.toml --readonly d",
            "hebe suspend web --all",
            "hebe suspend",
            "hebe run web.toml --memory 4MiB",
            "hebe run web.toml --hostname h",
            "hebe run web.toml --user-data u",
            "hebe run web.toml --ssh-key k",
            "hebe stop web --timeout 0",
            "hebe resume web --from memory --again",
            "hebe resume --all --from file",
            "hebe resume web --autostart",
            "hebe reboot --hard",
            "hebe reboot --method warm --hard",
            "hebe reboot --force",
            "hebe reboot --timeout 5",
            "hebe reboot --method saved --force",
            "hebe reboot --method saved --timeout 5",
            "hebe reboot --svg x.svg --kernel k",
            "hebe reboot --report --method cold",
            "hebe reboot --report --kernel k",
            "hebe reboot --report --initrd i",
            "hebe reboot --report --append quiet",
            "hebe reboot --report --cmdline quiet",
            "hebe reboot --report --hard",
            "hebe reboot --report --kexec",
            "hebe reboot --report --timeout 5",
            "hebe reboot --report --force",
            "hebe host setup --undo --size 16GiB",
            "hebe host setup --store luo --size 16GiB",
            "hebe host setup --dry-run --yes",
            "hebe reboot --report --direct",
            "hebe reboot --report --load",
            "hebe reboot --load --direct",
            "hebe reboot --load --dry-run",
            "hebe reboot --load --hard --method saved",
            "hebe store init /dev/dax0.0 --namespace n",
            "hebe console web --json",
            "hebe logs web --raw",
            "hebe logs web --console --json",
            "hebe --json completions bash",
            "hebe man --json",
        ] {
            let error = parse(line).expect_err(line);
            assert_eq!(error.exit_code(), 2, "{line}");
        }
        let error = parse("hebe reboot --method warm --hard").expect_err("ignored");
        let text = error.to_string();
        assert!(text.contains("--method saved"), "{text}");
        assert!(text.contains("hebe reboot"), "{text}");
    }

    /// Whoever asks for help gets a line to begin with.
    #[test]
    fn every_command_explains_itself() {
        fn explained(command: &clap::Command) {
            assert!(command.get_about().is_some(), "{}", command.get_name());
            for argument in command.get_arguments() {
                let id = argument.get_id();
                assert!(argument.get_help().is_some(), "{} {id}", command.get_name());
            }
            if !command.has_subcommands() {
                let after = command.get_after_help().map(ToString::to_string);
                let after = after.unwrap_or_default();
                assert!(after.contains("Example"), "{}", command.get_name());
            }
            command.get_subcommands().for_each(explained);
        }
        explained(&Cli::command());
    }
}
