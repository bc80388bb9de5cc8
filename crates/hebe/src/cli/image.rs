//! Commands and flags of `image`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use hebe_types::ByteSize;

/// What `image build` says at its end.
const BUILD_HELP: &str = "\
It takes the packages mmdebstrap and e2fsprogs (and qemu-utils for qcow2), root
or a user with subordinate ids, some minutes, and network to this machine's own
apt sources. Nothing is mounted, and no loop device is needed. What goes wrong
leaves no image behind.

Examples:
  hebe image build debian.img --autologin
  hebe image build web.qcow2 --include nginx-light --size 4GiB --ssh-key ~/.ssh/id_ed25519.pub
  hebe image build debian.img --agent --copy app.service:/etc/systemd/system/app.service";

/// What to do with disk images.
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Make a small Debian disk image that boots as a VM's first disk.
    #[command(after_help = BUILD_HELP)]
    Build(ImageBuildArgs),
}

/// Flags of `image build`.
#[derive(Debug, Args)]
pub struct ImageBuildArgs {
    /// The image to make.
    pub output: PathBuf,
    /// Suite or code name of Debian  [this machine's own].
    #[arg(long)]
    pub suite: Option<String>,
    /// Where packages come from  [as this machine's apt sources say].
    #[arg(long, value_name = "URI")]
    pub mirror: Option<String>,
    /// Packages to install, besides systemd and a kernel; may be given again.
    #[arg(long, value_name = "PACKAGES", value_delimiter = ',')]
    pub include: Vec<String>,
    /// The package that brings the kernel.
    #[arg(
        long,
        value_name = "PACKAGE",
        default_value = "linux-image-cloud-amd64"
    )]
    pub kernel_package: String,
    /// Size of the disk; the file takes what is in it.
    #[arg(long, default_value = "2GiB")]
    pub size: ByteSize,
    /// Host name  [the output's name].
    #[arg(long)]
    pub hostname: Option<String>,
    /// Public keys with which root may log in; adds an SSH server; may be given again.
    #[arg(long, value_name = "FILE")]
    pub ssh_key: Vec<PathBuf>,
    /// Log root in on the serial console (hebe console) without a password.
    #[arg(long)]
    pub autologin: bool,
    /// Put hebe-agent in, from FILE  [beside hebe, or in PATH].
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true)]
    pub agent: Option<Option<PathBuf>>,
    /// Copy a file in, with its permissions; may be given again.
    #[arg(long, value_name = "FILE:PATH")]
    pub copy: Vec<String>,
    /// The kernel's command line, behind root=.
    #[arg(
        long,
        value_name = "WORDS",
        default_value = "console=ttyS0",
        allow_hyphen_values = true
    )]
    pub cmdline: String,
    /// How the image is written  [qcow2 if its name ends in .qcow2, else raw].
    #[arg(long, value_enum)]
    pub format: Option<ImageFormat>,
    /// Replace an image that is there.
    #[arg(long)]
    pub force: bool,
}

/// How an image is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ImageFormat {
    /// Byte for byte, with holes.
    Raw,
    /// qcow2.
    Qcow2,
}
