//! The disk from which cloud-init in a guest learns who it is: its "NoCloud"
//! data source, a small FAT file system with the label `CIDATA`.

use std::io::{self, Cursor, Write};

/// Largest user data, in bytes.
pub const USER_DATA_MAX: usize = 1 << 20;
/// Most SSH keys.
const KEYS_MAX: usize = 64;

/// What a guest is told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seed {
    /// Its host name.
    pub hostname: String,
    /// Public keys that may log in, each as one line of `authorized_keys`.
    pub ssh_keys: Vec<String>,
    /// What else cloud-init does, as it wants to be told: a `#cloud-config`, a
    /// script, and so on.
    pub user_data: Option<Vec<u8>>,
}

/// Why no such disk can be made.
#[derive(Debug, thiserror::Error)]
pub enum SeedError {
    /// Not a name of a host.
    #[error(
        "'{0}' is no host name: 1 to 253 letters, digits, hyphens and dots, with a letter or digit at both ends"
    )]
    Hostname(String),
    /// Not a key.
    #[error(
        "'{0}' is no public SSH key: give the file whose name ends in .pub, with one key on each line"
    )]
    Key(String),
    /// [`USER_DATA_MAX`], `KEYS_MAX`.
    #[error("the data for cloud-init is too large: at most 1 MiB of user data, and 64 keys")]
    TooLarge,
    /// It cannot be put together.
    #[error("the disk for cloud-init cannot be made")]
    Fat(#[from] io::Error),
}

impl Seed {
    /// The keys in a file of public keys; empty lines and comments are not
    /// keys.
    ///
    /// # Errors
    /// [`SeedError::Key`] for anything else, so that a private key is never
    /// handed to a guest.
    pub fn keys_in(text: &str) -> Result<Vec<String>, SeedError> {
        let lines = text.lines().map(str::trim);
        let keys: Vec<String> = lines
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
            .map(str::to_owned)
            .collect();
        keys.iter().try_for_each(|key| check_key(key))?;
        match keys.is_empty() {
            true => Err(SeedError::Key(crate::error::shown(text.trim()))),
            false => Ok(keys),
        }
    }

    /// The disk's bytes: the same for the same seed.
    ///
    /// # Errors
    /// [`SeedError`].
    pub fn image(&self) -> Result<Vec<u8>, SeedError> {
        check_hostname(&self.hostname)?;
        self.ssh_keys.iter().try_for_each(|key| check_key(key))?;
        let user_data = self.user_data.as_deref().unwrap_or(b"#cloud-config\n{}\n");
        if user_data.len() > USER_DATA_MAX || self.ssh_keys.len() > KEYS_MAX {
            return Err(SeedError::TooLarge);
        }
        let meta_data = self.meta_data(user_data);
        let len = (user_data.len() + meta_data.len() + (256 << 10)).next_multiple_of(64 << 10);
        let mut disk = Cursor::new(vec![0; len]);
        let id = crc32fast::hash(meta_data.as_bytes());
        let options = fatfs::FormatVolumeOptions::new()
            .volume_label(*b"CIDATA     ")
            .volume_id(id);
        fatfs::format_volume(&mut disk, options)?;
        let fs = fatfs::FileSystem::new(&mut disk, fatfs::FsOptions::new())?;
        for (name, contents) in [
            ("meta-data", meta_data.as_bytes()),
            ("user-data", user_data),
        ] {
            let mut file = fs.root_dir().create_file(name)?;
            file.write_all(contents)?;
            file.flush()?;
        }
        fs.unmount()?;
        Ok(disk.into_inner())
    }

    /// YAML, of which JSON is a part. Another seed is another instance, for
    /// which cloud-init does its work again.
    fn meta_data(&self, user_data: &[u8]) -> String {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(user_data);
        self.ssh_keys
            .iter()
            .for_each(|key| hasher.update(key.as_bytes()));
        let keys: Vec<String> = self.ssh_keys.iter().map(|key| quoted(key)).collect();
        format!(
            "{{\"instance-id\": {}, \"local-hostname\": {}, \"public-keys\": [{}]}}\n",
            quoted(&format!("{}-{:08x}", self.hostname, hasher.finalize())),
            quoted(&self.hostname),
            keys.join(", ")
        )
    }
}

pub(crate) fn check_hostname(name: &str) -> Result<(), SeedError> {
    match is_hostname(name) {
        true => Ok(()),
        false => Err(SeedError::Hostname(crate::error::shown(name))),
    }
}

fn is_hostname(name: &str) -> bool {
    let label = |label: &str| {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
        let end = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
        let bytes = label.as_bytes();
        bytes.len() <= 63 && end(bytes.first()) && end(bytes.last()) && label.bytes().all(allowed)
    };
    name.len() <= 253 && name.split('.').all(label)
}

pub(crate) fn check_key(key: &str) -> Result<(), SeedError> {
    let kinds = ["ssh-", "ecdsa-", "sk-ssh-", "sk-ecdsa-"];
    let known = |word: &str| kinds.iter().any(|kind| word.starts_with(kind));
    // Options may stand before the kind.
    let words: Vec<&str> = key.split_ascii_whitespace().collect();
    let at = words.iter().position(|word| known(word));
    let body = at.and_then(|at| words.get(at + 1));
    let is_body = |b: &&str| b.len() >= 16 && b.starts_with("AAAA");
    match body.is_some_and(is_body) && !key.contains(char::is_control) && key.len() <= 16 << 10 {
        true => Ok(()),
        false => Err(SeedError::Key(crate::error::shown(key))),
    }
}

fn quoted(text: &str) -> String {
    let mut quoted = String::from('"');
    for c in text.chars() {
        if matches!(c, '"' | '\\') {
            quoted.push('\\');
        }
        quoted.push(c);
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;
    use crate::fs::{Content, look};
    use crate::source::Piece;

    const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ me@\"home\"";

    fn seed() -> Seed {
        Seed {
            hostname: "web.example".into(),
            ssh_keys: Seed::keys_in(&format!("# mine\n{KEY}\n\n")).expect("keys"),
            user_data: Some(b"#!/bin/sh\ntrue\n".to_vec()),
        }
    }

    #[test]
    fn a_guest_finds_what_it_was_told_by_the_label() {
        let image = seed().image().expect("image");
        assert_eq!(
            image,
            seed().image().expect("image"),
            "it is the same again"
        );
        assert!(image.len().is_multiple_of(512) && image.len() < 1 << 20);
        let Content::Readable { fs, label, .. } = look(&Piece::whole(Rc::new(image))) else {
            panic!("no FAT");
        };
        assert_eq!(label, "CIDATA");
        let read = |name: &str| fs.text(name, 1 << 20).expect(name);
        assert_eq!(read("user-data"), "#!/bin/sh\ntrue\n");
        let meta = read("meta-data");
        assert!(
            meta.contains("\"local-hostname\": \"web.example\""),
            "{meta}"
        );
        assert!(meta.contains(r#"me@\"home\""#), "{meta}");
        let mut other = seed();
        other.user_data = None;
        let other = other.image().expect("image");
        let Content::Readable { fs, .. } = look(&Piece::whole(Rc::new(other))) else {
            panic!("no FAT");
        };
        assert_ne!(
            fs.text("meta-data", 4096).expect("meta"),
            meta,
            "another instance"
        );
    }

    #[test]
    fn the_largest_fits() {
        let mut seed = seed();
        seed.user_data = Some(vec![b'x'; USER_DATA_MAX]);
        seed.image().expect("it fits");
        seed.user_data = Some(vec![b'x'; USER_DATA_MAX + 1]);
        assert!(matches!(seed.image(), Err(SeedError::TooLarge)));
    }

    #[test]
    fn neither_private_keys_nor_odd_names_get_in() {
        for text in [
            "",
            "-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n",
            "ssh-rsa",
            "ssh-rsa short",
            &format!("{KEY}\nnonsense"),
        ] {
            assert!(
                matches!(Seed::keys_in(text), Err(SeedError::Key(_))),
                "{text}"
            );
        }
        for name in ["", "-a", "a-", "a b", "a..b", "a\"b", &"a".repeat(64)] {
            let seed = Seed {
                hostname: name.into(),
                ..seed()
            };
            assert!(
                matches!(seed.image(), Err(SeedError::Hostname(_))),
                "{name}"
            );
        }
    }
}
