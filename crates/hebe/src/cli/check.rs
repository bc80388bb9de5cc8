//! Flags that would be ignored because of the value of another.

use clap::CommandFactory;

use super::{Cli, Command, FromArg, HostCommand, MethodArg, SetupStore};

impl Cli {
    /// Refuses flags that would be ignored because of the value of another;
    /// what excludes each other whatever the values are is said at the flags.
    pub fn check(&self) -> Result<(), clap::Error> {
        match self.contradiction() {
            Some((command, why)) => {
                let mut whole = Self::command();
                whole.build();
                let own = whole.find_subcommand_mut(command);
                let kind = clap::error::ErrorKind::ArgumentConflict;
                Err(match own {
                    Some(own) => own.error(kind, why),
                    None => whole.error(kind, why),
                })
            }
            None => Ok(()),
        }
    }

    fn contradiction(&self) -> Option<(&'static str, &'static str)> {
        match &self.command {
            Command::Console { .. } | Command::Completions { .. } | Command::Man { .. }
                if self.json =>
            {
                Some((
                    self.command.name(),
                    "what it prints is no JSON: leave --json out",
                ))
            }
            Command::Logs(args) if args.console && self.json => Some((
                "logs",
                "what a guest writes to its console is no JSON: leave --json or --console out",
            )),
            Command::Stop(args) if args.timeout == 0 && !args.force => Some((
                "stop",
                "--timeout 0 does not ask the guest, and without --force it is not powered off either: give it time, or say --force",
            )),
            Command::Resume(args) if args.again && args.from == Some(FromArg::Memory) => Some((
                "resume",
                "--again is about the saved file, and --from memory gives that up: leave one out",
            )),
            // A requirement that conflicts with another flag is not enforced.
            Command::Reboot(args) if args.svg.is_some() && !args.report => {
                Some(("reboot", "--svg draws a report: use it with --report"))
            }
            Command::Reboot(args) => {
                let late = args.timeout.is_some() && args.method != MethodArg::Cold;
                let late = late.then_some(
                    "--timeout is for guests that shut down, as with --method cold: leave it out",
                );
                let why = args.options().contradiction().or(late)?;
                Some(("reboot", why))
            }
            Command::Host(HostCommand::Setup(args))
                if args.size.is_some() && args.store == Some(SetupStore::Luo) =>
            {
                Some(("host", "--store luo reserves nothing: leave --size out"))
            }
            _ => None,
        }
    }
}

impl Command {
    /// Whether it starts VMMs without a cage.
    pub fn no_sandbox(&self) -> bool {
        match self {
            Self::Run(args) => args.cage.no_sandbox,
            Self::Start { cage, .. } => cage.no_sandbox,
            Self::Resume(args) => args.cage.no_sandbox,
            _ => false,
        }
    }

    /// Whether it resumes what no note says was frozen.
    pub fn unnoted(&self) -> bool {
        matches!(self, Self::Resume(args) if args.unnoted)
    }

    /// As it is typed.
    fn name(&self) -> &'static str {
        match self {
            Self::Console { .. } => "console",
            Self::Completions { .. } => "completions",
            Self::Man { .. } => "man",
            _ => "hebe",
        }
    }
}
