//! Completion scripts, in the shells themselves, where they are installed.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

/// A host with two VMs, and a script for `shell`.
struct Scene {
    root: tempfile::TempDir,
}

impl Scene {
    fn new(shell: &str) -> Self {
        let root = tempfile::tempdir().expect("dir");
        let dir = root.path().join("etc/vms");
        fs::create_dir_all(&dir).expect("mkdir");
        for name in ["web", "db"] {
            // What is in it plays no part.
            fs::write(dir.join(format!("{name}.toml")), "=").expect("write");
        }
        let scene = Self { root };
        let hebe = Command::new(env!("CARGO_BIN_EXE_hebe"))
            .args(["completions", shell])
            .output();
        let script = hebe.expect("hebe runs").stdout;
        fs::write(scene.root.path().join("script"), script).expect("write");
        scene
    }

    /// What a shell says to a program of its own; `None` where there is none.
    fn run(&self, shell: &str, program: &str) -> Option<String> {
        let root: &Path = self.root.path();
        let bin = Path::new(env!("CARGO_BIN_EXE_hebe")).parent().expect("dir");
        let path = std::env::var("PATH").unwrap_or_default();
        let output = Command::new(shell)
            .args(["-c", program])
            .current_dir(root)
            .env("PATH", format!("{}:{path}", bin.display()))
            .env("HOME", root)
            .env("HEBE_RUN_DIR", root.join("run"))
            .env("HEBE_CONFIG_DIR", root.join("etc"))
            .env("HEBE_STATE_DIR", root.join("state"))
            .stdin(Stdio::null())
            .output();
        let Ok(output) = output else {
            eprintln!("skipped here: there is no {shell}");
            return None;
        };
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{shell}: {errors}");
        assert_eq!(errors, "", "{shell}");
        Some(String::from_utf8(output.stdout).expect("text"))
    }
}

#[test]
fn bash_offers_the_vms() {
    let scene = Scene::new("bash");
    let offered = |words: &str, last: usize| {
        let program = format!(
            "source ./script; COMP_WORDS=({words}); COMP_CWORD={last};
            _hebe hebe \"${{COMP_WORDS[{last}]}}\" \"${{COMP_WORDS[{last}-1]}}\"
            echo \"${{COMPREPLY[@]}}\""
        );
        Some(scene.run("bash", &program)?.trim().to_owned())
    };
    let Some(first) = offered("hebe start ''", 2) else {
        return;
    };
    assert!(first.starts_with("db web "), "{first}");
    let wanted = |words: &str, last: usize, wanted: &str| {
        assert_eq!(offered(words, last).as_deref(), Some(wanted), "{words}");
    };
    wanted("hebe start d", 2, "db");
    wanted("hebe start db w", 3, "web");
    wanted("hebe agent we", 2, "web");
    wanted("hebe agent web pi", 3, "ping");
    wanted("hebe show --j", 2, "--json");
    wanted("hebe store init w", 3, "");
    wanted("hebe kee", 1, "");
}

#[test]
fn fish_offers_the_vms() {
    let scene = Scene::new("fish");
    let offered = |line: &str| {
        let text = scene.run("fish", &format!("source ./script; complete -C '{line}'"))?;
        let first = |line: &str| line.split('\t').next().unwrap_or_default().to_owned();
        Some(text.lines().map(first).collect::<Vec<_>>())
    };
    let Some(names) = offered("hebe start ") else {
        return;
    };
    assert_eq!(names, ["db", "web"]);
    let wanted = |line: &str, wanted: &[&str]| {
        assert_eq!(offered(line).expect("fish"), wanted, "{line}");
    };
    wanted("hebe start db w", &["web"]);
    wanted("hebe agent we", &["web"]);
    wanted("hebe agent web pi", &["ping"]);
    wanted("hebe kee", &[]);
}

/// zsh completes in its line editor alone; what can be asked here is whether the
/// script is sound, and what its function gives.
#[test]
fn zsh_offers_the_vms() {
    let scene = Scene::new("zsh");
    let program = "autoload -Uz compinit; compinit -D -u; source ./script;
        _describe() { print -r -- \"$2: $names\" }; _hebe_vm_names";
    let Some(text) = scene.run("zsh", program) else {
        return;
    };
    assert_eq!(text.trim(), "vms: db web");
}
