//! VM definitions: TOML files that people write.
//!
//! A definition `NAME.toml` is looked for in the configuration directory
//! first, then among those that `hebe run` keeps in the state directory.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use hebe_types::{ConfigError, VmConfig, VmName};
use serde::de::DeserializeOwned;

use crate::files;
use crate::host::{Host, HostError, Layout};

/// Longest definition, in bytes.
const DEFINITION_LEN_MAX: u64 = 1 << 20;

/// Why a definition or host.toml cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DefinitionError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}")]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The text is not what was expected there.
    #[error("{path}, line {line}: {message}")]
    Malformed {
        /// Which file.
        path: PathBuf,
        /// Line number, from 1.
        line: usize,
        /// What is wrong.
        message: String,
    },
    /// A value is out of its range.
    #[error("{path}: {source}")]
    Invalid {
        /// Which file.
        path: PathBuf,
        /// Which value, and what would be right.
        source: ConfigError,
    },
    /// File name and VM name differ.
    #[error("{path} defines a VM named '{name}': name the file {name}.toml")]
    Misnamed {
        /// Which file.
        path: PathBuf,
        /// The name inside.
        name: VmName,
    },
    /// A file that the VM needs is missing.
    #[error("{path}: {what} {file} cannot be {} ({source})", tried(*write))]
    MissingFile {
        /// Which definition.
        path: PathBuf,
        /// What the file is for.
        what: &'static str,
        /// The missing file.
        file: PathBuf,
        /// It was to be written, too.
        write: bool,
        /// Why.
        source: io::Error,
    },
}

/// Reading may be allowed where this is the answer.
fn forbidden(why: &io::Error) -> bool {
    use io::ErrorKind::{PermissionDenied, ReadOnlyFilesystem};
    matches!(why.kind(), PermissionDenied | ReadOnlyFilesystem)
}

fn tried(write: bool) -> &'static str {
    match write {
        true => "opened for reading and writing, which a disk needs that is not readonly = true",
        false => "read",
    }
}

/// Reads a TOML file; the error names file and line.
pub fn read_toml<T: DeserializeOwned>(path: &Path) -> Result<T, DefinitionError> {
    let unreadable = |source| DefinitionError::Unreadable {
        path: path.to_owned(),
        source,
    };
    let length = fs::metadata(path).map_err(unreadable)?.len();
    if length > DEFINITION_LEN_MAX {
        return Err(unreadable(io::Error::other("the file is too long")));
    }
    let text = fs::read_to_string(path).map_err(unreadable)?;
    toml::from_str(&text).map_err(|error| {
        let start = error.span().map_or(0, |span| span.start.min(text.len()));
        DefinitionError::Malformed {
            path: path.to_owned(),
            line: 1 + text[..start].matches('\n').count(),
            message: error.message().trim().replace('\n', ", "),
        }
    })
}

/// Reads and checks one definition.
pub fn read(path: &Path) -> Result<VmConfig, DefinitionError> {
    let config: VmConfig = read_toml(path)?;
    config
        .validate()
        .map_err(|source| DefinitionError::Invalid {
            path: path.to_owned(),
            source,
        })?;
    Ok(config)
}

/// Reads and checks a definition as a person wrote it: paths are meant from the
/// folder that it lies in. A VM is resumed by another process, elsewhere.
pub fn read_own(path: &Path) -> Result<VmConfig, DefinitionError> {
    let mut config = read(path)?;
    let folder = path.parent().unwrap_or(Path::new("/"));
    resolve(&mut config, folder).map_err(|source| DefinitionError::Unreadable {
        path: path.to_owned(),
        source,
    })?;
    Ok(config)
}

/// Makes every path absolute, as seen from `folder`.
///
/// # Errors
/// This process has no working directory any more, and `folder` is seen from it.
pub fn resolve(config: &mut VmConfig, folder: &Path) -> io::Result<()> {
    for path in config.paths_mut() {
        if !path.as_os_str().is_empty() {
            *path = std::path::absolute(folder.join(&*path))?;
        }
    }
    Ok(())
}

/// One that is found by its file's name.
fn read_named(path: PathBuf, name: &VmName) -> Result<VmConfig, DefinitionError> {
    // A pipe would keep whoever looks at all VMs waiting.
    if fs::metadata(&path).is_ok_and(|found| !found.is_file()) {
        let source = io::Error::other("it is not a regular file");
        return Err(DefinitionError::Unreadable { path, source });
    }
    let config = read_own(&path)?;
    if config.name != *name {
        let name = config.name;
        return Err(DefinitionError::Misnamed { path, name });
    }
    Ok(config)
}

/// Checks that the files that a VM boots from and writes to are there.
pub fn check_files(config: &VmConfig, path: &Path) -> Result<(), DefinitionError> {
    check_boot_files(config, path)?;
    check_disks(config, path)
}

/// Checks the kernel and the initrd, which a guest needs when it boots or resets
/// itself, and not when it is resumed.
pub fn check_boot_files(config: &VmConfig, path: &Path) -> Result<(), DefinitionError> {
    let kernel = config.kernel.iter().map(|file| ("kernel", file, false));
    let initrd = config.initrd.iter().map(|file| ("initrd", file, false));
    openable(path, kernel.chain(initrd))
}

/// Checks the disks.
pub fn check_disks(config: &VmConfig, path: &Path) -> Result<(), DefinitionError> {
    let behind = config.disks.iter().flat_map(|disk| &disk.backing);
    let behind = behind.map(|file| ("backing file", file, false));
    let disks = config.disks.iter();
    let disks = disks.map(|disk| ("disk", &disk.path, !disk.readonly && !disk.snapshot));
    openable(path, disks.chain(behind))
}

fn openable<'a>(
    path: &Path,
    files: impl Iterator<Item = (&'static str, &'a PathBuf, bool)>,
) -> Result<(), DefinitionError> {
    for (what, file, write) in files {
        let opened = fs::OpenOptions::new().read(true).write(write).open(file);
        if let Err(source) = opened {
            return Err(DefinitionError::MissingFile {
                path: path.to_owned(),
                what,
                file: file.clone(),
                write: write && forbidden(&source),
                source,
            });
        }
    }
    Ok(())
}

fn dirs(layout: &Layout) -> [PathBuf; 2] {
    [layout.config.join("vms"), layout.state.join("vms")]
}

/// Where an operator's definition of `name` belongs.
pub fn expected_path(layout: &Layout, name: &VmName) -> PathBuf {
    layout.config.join("vms").join(format!("{name}.toml"))
}

/// Where `hebe run` keeps a definition that came from elsewhere.
pub fn transient_path(layout: &Layout, name: &VmName) -> PathBuf {
    layout.state.join("vms").join(format!("{name}.toml"))
}

/// The file that defines `name`, if any.
pub fn find(layout: &Layout, name: &VmName) -> Option<PathBuf> {
    dirs(layout)
        .into_iter()
        .map(|dir| dir.join(format!("{name}.toml")))
        .find(|path| path.exists())
}

/// The definition of `name`.
pub fn load(layout: &Layout, name: &VmName) -> Result<(PathBuf, VmConfig), HostError> {
    let path = find(layout, name).ok_or_else(|| HostError::NoSuchVm {
        name: name.clone(),
        expected: expected_path(layout, name),
    })?;
    let config = read_named(path.clone(), name)?;
    Ok((path, config))
}

/// Every definition that can be found, readable or not.
pub fn all(layout: &Layout) -> BTreeMap<VmName, Result<VmConfig, DefinitionError>> {
    let mut found = BTreeMap::new();
    for dir in dirs(layout) {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let file = entry.file_name();
            let Some(stem) = file.to_str().and_then(|f| f.strip_suffix(".toml")) else {
                continue;
            };
            if let Ok(name) = stem.parse::<VmName>() {
                let read = || read_named(entry.path(), &name);
                found.entry(name.clone()).or_insert_with(read);
            }
        }
    }
    found
}

/// Keeps a definition that `hebe run` was given, so that the VM can be booted
/// again after a cold reboot.
pub fn keep_transient(host: &Host, config: &VmConfig) -> Result<PathBuf, HostError> {
    let path = transient_path(&host.layout, &config.name);
    let text = toml::to_string(config).map_err(|e| HostError::Refused {
        name: config.name.clone(),
        why: format!("its definition cannot be written down: {e}"),
    })?;
    files::write_durably(&path, text.as_bytes()).map_err(HostError::file("write", &path))?;
    Ok(path)
}

/// Where the disk is kept from which the guest's cloud-init learns what it was
/// told, of a VM that `hebe run` was given.
pub fn seed_path(layout: &Layout, name: &VmName) -> PathBuf {
    layout.state.join("seeds").join(format!("{name}.img"))
}

/// Keeps such a disk. It may hold secrets: nobody else looks into its directory.
pub fn keep_seed(host: &Host, name: &VmName, bytes: &[u8]) -> Result<(), HostError> {
    let path = seed_path(&host.layout, name);
    let dir = path.parent().unwrap_or(&path);
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .and_then(|()| files::write_durably(&path, bytes))
        .map_err(HostError::file("write", &path))
}

/// Forgets what [`keep_transient`] and [`keep_seed`] kept.
pub fn forget_transient(layout: &Layout, name: &VmName) {
    let seed = seed_path(layout, name);
    if seed.exists() {
        let _ = files::remove_durably(&seed);
    }
    let _ = files::remove_durably(&transient_path(layout, name));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> String {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("web.toml");
        fs::write(&path, text).expect("write");
        read(&path).expect_err("refused").to_string()
    }

    #[test]
    fn a_disk_that_may_only_be_read_is_told_from_one_that_is_not_there() {
        let told = |code: i32, write: bool| {
            let source = io::Error::from_raw_os_error(code);
            let error = DefinitionError::MissingFile {
                path: "web.toml".into(),
                what: "disk",
                file: "/d".into(),
                write: write && forbidden(&source),
                source,
            };
            error.to_string()
        };
        let (absent, denied, readonly) = (2, 13, 30);
        for code in [denied, readonly] {
            assert!(told(code, true).contains("readonly = true"), "{code}");
            assert!(told(code, false).contains("cannot be read ("), "{code}");
        }
        assert!(told(absent, true).contains("cannot be read ("));
    }

    #[test]
    fn each_error_names_file_and_line() {
        let unknown = refused("name = \"web\"\nmemory = \"256MiB\"\nkernel = \"/k\"\ncolour = 1\n");
        assert!(unknown.contains("web.toml, line 4"), "{unknown}");
        assert!(unknown.contains("colour"), "{unknown}");
        let nothing = refused("name = \"web\"\nmemory = \"2MiB\"\n");
        assert!(nothing.contains("neither a kernel nor a disk"), "{nothing}");
        let missing = refused("name = \"web\"\nkernel = \"/k\"\n");
        assert!(missing.contains("memory"), "{missing}");
        let broken = refused("name = \"web\"\nmemory = \n");
        assert!(broken.contains("line 2"), "{broken}");
        let size = refused("name = \"web\"\nmemory = \"12 apples\"\nkernel = \"/k\"\n");
        assert!(size.contains("line 2") && size.contains("apples"), "{size}");
        let range = refused("name = \"web\"\nmemory = \"0\"\nkernel = \"/k\"\n");
        assert!(range.contains("web.toml"), "{range}");
        assert!(range.contains("multiple of 2MiB"), "{range}");
    }

    #[test]
    fn a_definition_is_found_by_name_and_a_stranger_in_the_file_is_refused() {
        let root = tempfile::tempdir().expect("dir");
        let layout = Layout::below(root.path());
        let name: VmName = "web".parse().expect("name");
        assert!(matches!(
            load(&layout, &name),
            Err(HostError::NoSuchVm { .. })
        ));
        let path = expected_path(&layout, &name);
        fs::create_dir_all(path.parent().expect("parent")).expect("mkdir");
        fs::write(&path, "name=\"db\"\nmemory=\"2MiB\"\nkernel=\"/k\"\n").expect("write");
        let error = load(&layout, &name).expect_err("misnamed").to_string();
        assert!(error.contains("db.toml"), "{error}");
        let listed = all(&layout).remove(&name).expect("listed");
        assert_eq!(listed.expect_err("misnamed").to_string(), error);
        fs::write(&path, "name=\"web\"\nmemory=\"2MiB\"\nkernel=\"/k\"\n").expect("write");
        let (_, config) = load(&layout, &name).expect("found");
        assert_eq!(all(&layout).len(), 1);
        let error = check_files(&config, &path)
            .expect_err("no kernel")
            .to_string();
        assert!(error.contains("kernel /k"), "{error}");
    }

    #[test]
    fn a_pipe_among_the_definitions_keeps_nobody_waiting() {
        let root = tempfile::tempdir().expect("dir");
        let layout = Layout::below(root.path());
        let name: VmName = "web".parse().expect("name");
        let path = expected_path(&layout, &name);
        fs::create_dir_all(path.parent().expect("parent")).expect("mkdir");
        let mode = rustix::fs::Mode::RUSR;
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0)
            .expect("a pipe");
        let listed = all(&layout).remove(&name).expect("listed");
        let error = listed.expect_err("no file").to_string();
        assert!(error.contains("web.toml"), "{error}");
    }

    #[test]
    fn paths_are_meant_from_the_folder_of_the_definition() {
        let root = tempfile::tempdir().expect("dir");
        let layout = Layout::below(root.path());
        let name: VmName = "web".parse().expect("name");
        let path = expected_path(&layout, &name);
        let folder = path.parent().expect("parent");
        fs::create_dir_all(folder).expect("mkdir");
        let text = "name=\"web\"\nmemory=\"2MiB\"\nkernel=\"/k\"\ninitrd=\"./i\"\n[[disk]]\npath=\"d\"\nformat=\"qcow2\"\nbacking=[\"b\"]\n";
        fs::write(&path, text).expect("write");
        let (_, config) = load(&layout, &name).expect("found");
        assert_eq!(config.kernel.as_deref(), Some(Path::new("/k")));
        assert_eq!(config.initrd, Some(folder.join("i")));
        assert_eq!(config.disks[0].path, folder.join("d"));
        assert_eq!(config.disks[0].backing, [folder.join("b")]);
        let listed = all(&layout).remove(&name).expect("listed");
        assert_eq!(listed.expect("readable"), config);
    }
}
