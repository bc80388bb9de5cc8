//! The command line.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Command, CommandFactory, Parser};
use clap_complete::Shell;
use clap_mangen::Man;

use crate::tls::TlsFiles;

const AFTER_HELP: &str = "\
hebed holds no state of its own: it may be stopped, killed and started at any time, and no VM
notices. Orders given with `hebe` meanwhile are found.

Examples:
  hebed                            # /run/hebe/hebed.sock, for root alone
  hebed --group hebe               # and for the members of group hebe
  hebed --listen 192.0.2.7:7443 --tls-cert host.pem --tls-key host.key --client-ca operators.pem
  hebed --group hebe --allow-exec  # they may also run programs in guests that allow it
  hebed --agent-every 60           # ask guests' agents how they are once a minute
  curl --unix-socket /run/hebe/hebed.sock http://localhost/v1/vms
  curl --unix-socket /run/hebe/hebed.sock -X POST http://localhost/v1/vms/web/start
  curl --unix-socket /run/hebe/hebed.sock -N http://localhost/v1/events

Exit status:
  0  asked to end, by SIGTERM or SIGINT
  1  failed, with one sentence on stderr
  2  the command line is wrong

Environment: as of hebe, see `hebe --help`; of systemd, socket activation, readiness and watchdog.";

/// Serves and supervises a host's VMs.
#[derive(Debug, Parser)]
#[command(name = "hebed", version, after_help = AFTER_HELP, max_term_width = 100)]
pub struct Args {
    /// Where to listen [default: hebed.sock in HEBE_RUN_DIR]. Not used where systemd hands a
    /// socket over.
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Who may give orders besides the owner of the socket: a group's name or number. Its
    /// members can start, stop and suspend every VM and reboot the host.
    #[arg(long, value_name = "GROUP")]
    pub group: Option<String>,
    /// Also listen on this address and port, for clients with a certificate of --client-ca.
    #[arg(
        long,
        value_name = "ADDRESS:PORT",
        requires = "tls_cert",
        requires = "tls_key",
        requires = "client_ca"
    )]
    pub listen: Option<SocketAddr>,
    /// With --listen: the daemon's certificate in PEM, with those that lead to its authority.
    #[arg(long, value_name = "FILE", requires = "listen")]
    pub tls_cert: Option<PathBuf>,
    /// With --listen: its private key in PEM.
    #[arg(long, value_name = "FILE", requires = "listen")]
    pub tls_key: Option<PathBuf>,
    /// With --listen: who signs for clients, in PEM. Each client with a certificate of this
    /// authority can start, stop and suspend every VM and reboot the host.
    #[arg(long, value_name = "FILE", requires = "listen")]
    pub client_ca: Option<PathBuf>,
    /// How often to look at the VMs, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 2000, value_parser = clap::value_parser!(u64).range(10..=60_000))]
    pub poll_ms: u64,
    /// Take no samples of how the host is ageing.
    #[arg(long)]
    pub no_samples: bool,
    /// How often to take a sample of how the host is ageing, in seconds. The newest 8,640 are
    /// kept: more often than every 50 s, they do not reach the five days back that a look for
    /// daily cycles takes.
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub sample_every: u64,
    /// How often to look at the policy and at new samples, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=300))]
    pub look_every: u64,
    /// All who may give orders may run programs in guests whose agents allow it, not root alone.
    #[arg(long)]
    pub allow_exec: bool,
    /// How often to ask the agent in each VM that has sockets for programs of the host how its
    /// guest is, in seconds; 0 asks none.
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(0..=3600))]
    pub agent_every: u64,
    /// Print a completion script for this shell, and end.
    #[arg(long, hide = true, value_name = "SHELL")]
    pub completions: Option<Shell>,
    /// Print the manual page, and end.
    #[arg(long, hide = true)]
    pub manual_page: bool,
}

/// The manual page, for section 8.
///
/// # Errors
/// `to` cannot be written to.
pub fn write_manual(to: &mut dyn Write) -> io::Result<()> {
    let mut page = Vec::new();
    Man::new(Args::command()).section("8").render(&mut page)?;
    let page = String::from_utf8(page).map_err(io::Error::other)?;
    // Examples have lines of their own.
    let page = page.replacen(".SH EXTRA\n", ".SH NOTES\n.nf\n", 1);
    to.write_all(page.as_bytes())
}

/// The completion script for a shell; what is not for people is not offered.
///
/// # Errors
/// `to` cannot be written to.
pub fn write_completions(shell: Shell, to: &mut dyn Write) -> io::Result<()> {
    // The generators offer also what is hidden.
    let whole = Args::command();
    let shown = whole.get_arguments().filter(|a| !a.is_hide_set()).cloned();
    let mut command = Command::new("hebed").version(env!("CARGO_PKG_VERSION"));
    command = command.args(shown.collect::<Vec<_>>());
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, "hebed", &mut script);
    to.write_all(&script)
}

impl Args {
    /// Where to listen for clients with certificates, if anywhere.
    pub fn secure(&self) -> Option<(SocketAddr, TlsFiles)> {
        let files = TlsFiles {
            certificate: self.tls_cert.clone()?,
            key: self.tls_key.clone()?,
            client_ca: self.client_ca.clone()?,
        };
        Some((self.listen?, files))
    }

    /// How often to look.
    pub fn poll(&self) -> Duration {
        Duration::from_millis(self.poll_ms)
    }

    /// Between two questions to an agent; none where none is asked.
    pub fn agent_every(&self) -> Option<Duration> {
        (self.agent_every > 0).then(|| Duration::from_secs(self.agent_every))
    }

    /// Between two samples.
    pub fn sample_every(&self) -> Duration {
        Duration::from_secs(self.sample_every)
    }

    /// Between two looks at the policy.
    pub fn look_every(&self) -> Duration {
        Duration::from_secs(self.look_every)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manual_page_tells_of_every_flag_for_the_section_of_daemons() {
        let mut page = Vec::new();
        write_manual(&mut page).expect("written");
        let page = String::from_utf8(page).expect("text");
        assert!(page.contains(".TH hebed 8"), "{page}");
        assert!(page.contains(".SH NOTES\n.nf\n"), "{page}");
        // As roff writes a hyphen.
        for flag in ["client\\-ca", "sample\\-every"] {
            assert!(page.contains(flag), "{flag}: {page}");
        }
        assert!(!page.contains("manual\\-page"));
    }

    #[test]
    fn completions_offer_every_flag_that_is_for_people() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let mut script = Vec::new();
            write_completions(shell, &mut script).expect("written");
            let script = String::from_utf8(script).expect("text");
            for argument in Args::command().get_arguments() {
                let Some(long) = argument.get_long() else {
                    continue;
                };
                let word = match shell {
                    Shell::Fish => format!("-l {long}"),
                    _ => format!("--{long}"),
                };
                let offered = script.contains(&word);
                assert_eq!(offered, !argument.is_hide_set(), "{shell}: {word}");
            }
        }
    }

    #[test]
    fn the_command_line_is_sound_and_explains_itself() {
        let mut command = Args::command();
        command.clone().debug_assert();
        for argument in command.get_arguments() {
            assert!(argument.get_help().is_some(), "{}", argument.get_id());
        }
        let help = command.render_help().to_string();
        for word in ["Examples:", "Exit status:", "--group"] {
            assert!(help.contains(word), "{word}");
        }
    }

    #[test]
    fn bad_lines_are_refused() {
        for line in [
            "hebed --poll-ms 0",
            "hebed now",
            "hebed --socket",
            "hebed --sample-every 0",
            "hebed --look-every 301",
            "hebed --agent-every 3601",
        ] {
            assert!(Args::try_parse_from(line.split(' ')).is_err(), "{line}");
        }
        // TCP is all of it or nothing.
        let all = [
            "--listen 127.0.0.1:1",
            "--tls-cert c",
            "--tls-key k",
            "--client-ca a",
        ];
        for left_out in 0..all.len() {
            let words: Vec<&str> = (0..all.len())
                .filter(|i| *i != left_out)
                .map(|i| all[i])
                .collect();
            let line = format!("hebed {}", words.join(" "));
            assert!(Args::try_parse_from(line.split(' ')).is_err(), "{line}");
        }
        let line = format!("hebed {}", all.join(" "));
        let args = Args::try_parse_from(line.split(' ')).expect("fine");
        assert!(args.secure().is_some());
        let args = Args::try_parse_from(["hebed", "--group", "hebe"]).expect("fine");
        assert_eq!(args.secure(), None);
        assert_eq!(args.poll(), Duration::from_secs(2));
        assert_eq!(args.sample_every(), Duration::from_secs(600));
        assert_eq!(args.look_every(), Duration::from_secs(60));
        assert_eq!(args.agent_every(), Some(Duration::from_secs(10)));
        let args = Args::try_parse_from(["hebed", "--agent-every", "0"]).expect("fine");
        assert_eq!(args.agent_every(), None);
    }
}
