//! The disk for a guest's cloud-init.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use hebe_image::Seed;
use hebe_types::VmName;

use crate::cli::SeedArgs;
use crate::output::Failure;

/// Longest file that is read: what cloud-init is told, or keys.
const FILE_MAX: u64 = 2 << 20;

/// The disk's bytes, where any flag asks for it.
pub fn seed(name: &VmName, args: &SeedArgs) -> Result<Option<Vec<u8>>, Failure> {
    if args.user_data.is_none() && args.hostname.is_none() && args.ssh_key.is_empty() {
        return Ok(None);
    }
    let failure = |e: hebe_image::SeedError| Failure(e.to_string());
    let mut ssh_keys = Vec::new();
    for file in &args.ssh_key {
        let text = String::from_utf8_lossy(&read(file)?).into_owned();
        ssh_keys
            .extend(Seed::keys_in(&text).map_err(|e| Failure(format!("{}: {e}", file.display())))?);
    }
    let seed = Seed {
        hostname: args.hostname.clone().unwrap_or_else(|| name.to_string()),
        ssh_keys,
        user_data: args.user_data.as_deref().map(read).transpose()?,
    };
    seed.image().map(Some).map_err(failure)
}

/// Reads a small file that somebody named.
pub fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|f| f.take(FILE_MAX).read_to_end(&mut bytes));
    match read {
        Ok(_) => Ok(bytes),
        Err(e) => Err(Failure(format!("cannot read {}: {e}", path.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_make_a_disk_and_no_flag_makes_none() {
        let name: VmName = "web".parse().expect("name");
        let none = seed(&name, &SeedArgs::default()).expect("nothing");
        assert_eq!(none, None);
        let dir = tempfile::tempdir().expect("dir");
        let key = dir.path().join("id.pub");
        std::fs::write(&key, "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ me\n").expect("write");
        let args = SeedArgs {
            ssh_key: vec![key.clone()],
            ..SeedArgs::default()
        };
        let disk = seed(&name, &args).expect("a disk").expect("some");
        let has = |word: &[u8]| disk.windows(word.len()).any(|w| w == word);
        assert!(has(b"CIDATA") && has(b"AAAAC3NzaC1lZDI1NTE5AAAAIJ") && has(b"\"web\""));
        std::fs::write(&key, "-----BEGIN OPENSSH PRIVATE KEY-----").expect("write");
        let refused = seed(&name, &args).expect_err("a private key").0;
        assert!(
            refused.contains("id.pub") && refused.contains("public"),
            "{refused}"
        );
        let args = SeedArgs {
            user_data: Some(dir.path().join("none")),
            ..SeedArgs::default()
        };
        assert!(
            seed(&name, &args)
                .expect_err("absent")
                .0
                .contains("cannot read")
        );
    }
}
