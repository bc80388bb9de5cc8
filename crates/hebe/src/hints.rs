//! Every command that a message, a comment or a document names, tried against
//! the definition of the command line: a way out that is none is worse than
//! none.
//!
//! What is checked is what stands between backticks or quotes and begins with
//! `hebe`, in the sources of every crate and in the documents; what stands
//! behind a `$` or alone in a code block of a document; and every line of an
//! example of `--help`. Words in capitals stand for a name, braces for a value.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use clap::error::ErrorKind;
use clap::{Command, CommandFactory, Parser};

use crate::cli::Cli;

/// One command, and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Hint {
    file: PathBuf,
    text: String,
    /// It shows what may be given, and not one order.
    usage: bool,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn files(dir: &Path, ending: &str, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            files(&path, ending, found);
        } else if path.to_string_lossy().ends_with(ending) {
            found.push(path);
        }
    }
}

/// Lines joined, without what begins a comment's next line or goes on with a
/// string.
fn flat(source: &str) -> String {
    let mut out = String::new();
    for line in source.lines() {
        let line = line.trim_start();
        let comment = ["///", "//!", "//"]
            .iter()
            .find_map(|c| line.strip_prefix(c));
        let line = comment.unwrap_or(line).trim_start();
        match line.strip_suffix('\\') {
            Some(begun) => out.push_str(begun),
            None => {
                out.push_str(line);
                out.push(' ');
            }
        }
    }
    out
}

/// What stands between two `quote`s and begins with the program's name.
fn quoted(text: &str, quote: char, file: &Path) -> Vec<Hint> {
    let opening = format!("{quote}hebe ");
    let mut found = Vec::new();
    for (at, _) in text.match_indices(&opening) {
        let inside = &text[at + quote.len_utf8()..];
        let Some(end) = inside.find(quote) else {
            continue;
        };
        found.push(hint(&inside[..end], file));
    }
    found
}

fn hint(text: &str, file: &Path) -> Hint {
    let usage = text.contains(['[', '…']);
    Hint {
        file: file.to_owned(),
        text: text.to_owned(),
        usage,
    }
}

/// Lines of code blocks that are one command of this program.
fn blocks(document: &str, file: &Path) -> Vec<Hint> {
    let mut inside = false;
    let mut found = Vec::new();
    for line in document.lines() {
        if line.trim_start().starts_with("```") {
            inside = !inside;
            continue;
        }
        let line = line.trim();
        let line = line.strip_prefix("$ ").unwrap_or(line);
        // Columns are a drawing.
        if inside && line.starts_with("hebe ") && !line.contains("    ") {
            found.extend(orders(line).map(|order| hint(order, file)));
        }
    }
    found
}

/// The orders of this program on one line for a shell.
fn orders(line: &str) -> impl Iterator<Item = &str> {
    let line = line.split(" #").next().unwrap_or_default();
    line.split("&&")
        .flat_map(|part| part.split('|'))
        .map(|order| order.split('>').next().unwrap_or_default().trim())
        .filter(|order| order.starts_with("hebe "))
}

fn examples(command: &Command, found: &mut Vec<Hint>) {
    let text = command.get_after_help().map(ToString::to_string);
    for line in text.unwrap_or_default().lines() {
        found.extend(orders(line.trim()).map(|order| hint(order, Path::new("--help"))));
    }
    for own in command.get_subcommands() {
        examples(own, found);
    }
}

/// A text with values where it has placeholders; one word of each choice.
fn filled(text: &str) -> Vec<String> {
    let text = text
        .replace("\\|", "|")
        .replace(['[', ']', '…', '(', ')'], " ");
    let mut words = Vec::new();
    let mut depth = 0;
    let mut word = String::new();
    for c in text.chars() {
        match c {
            '{' => {
                if depth == 0 {
                    word.push('7');
                }
                depth += 1;
            }
            '}' => depth -= 1,
            _ if depth > 0 => {}
            c if c.is_whitespace() => words.push(std::mem::take(&mut word)),
            c => word.push(c),
        }
    }
    words.push(word);
    let value = |word: String| {
        let word = word.split('|').next().unwrap_or_default();
        match word {
            "SHELL" => "bash".to_owned(),
            // Counted or timed.
            "N" | "SECONDS" => "7".to_owned(),
            "SIZE" => "7MiB".to_owned(),
            other => other.to_lowercase(),
        }
    };
    words
        .into_iter()
        .filter(|w| !w.is_empty())
        .map(value)
        .collect()
}

fn refusal(hint: &Hint) -> Option<String> {
    let error = match Cli::try_parse_from(filled(&hint.text)) {
        Ok(cli) => cli.check().err()?,
        Err(error) => error,
    };
    match error.kind() {
        // What is named is a command and its flags, not a whole line.
        ErrorKind::MissingRequiredArgument
        | ErrorKind::MissingSubcommand
        | ErrorKind::DisplayHelp
        | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
        | ErrorKind::DisplayVersion => None,
        // A line that shows every choice shows what excludes each other.
        ErrorKind::ArgumentConflict if hint.usage => None,
        _ => Some(error.to_string().lines().next().unwrap_or_default().into()),
    }
}

fn all_hints() -> Vec<Hint> {
    let mut sources = Vec::new();
    let mut documents = Vec::new();
    files(&root().join("crates"), ".rs", &mut sources);
    files(&root().join("docs"), ".md", &mut documents);
    for file in ["README.md", "ARCHITECTURE.md", "CHANGELOG.md"] {
        documents.push(root().join(file));
    }
    let mut hints = Vec::new();
    for file in sources.iter().filter(|f| !f.ends_with("hints.rs")) {
        let text = flat(&fs::read_to_string(file).expect("a source"));
        hints.extend(quoted(&text, '`', file));
        hints.extend(quoted(&text, '\'', file));
    }
    for file in &documents {
        let text = fs::read_to_string(file).expect("a document");
        hints.extend(quoted(&text, '`', file));
        hints.extend(blocks(&text, file));
    }
    examples(&Cli::command(), &mut hints);
    hints
}

fn flags(command: &Command, found: &mut BTreeSet<String>) {
    let own = command.get_arguments().filter_map(|a| a.get_long());
    found.extend(own.map(|long| format!("--{long}")));
    for sub in command.get_subcommands() {
        flags(sub, found);
    }
}

/// Flags of other programs that messages and comments here name.
const OF_OTHERS: [&str; 6] = [
    "--allow-exec",
    "--csv",
    "--exact",
    "--mode",
    "--run-dir",
    "--vm-id",
];

/// A way out may be a flag alone.
#[test]
fn every_flag_that_is_named_exists() {
    let mut known: BTreeSet<String> = OF_OTHERS.iter().map(ToString::to_string).collect();
    flags(&Cli::command(), &mut known);
    known.insert("--help".into());
    let mut sources = Vec::new();
    files(&root().join("crates"), ".rs", &mut sources);
    // hebe-vmm, hebed and hebe-agent have flags of their own, tested with them; so
    // have GRUB's commands, the makers of images, systemctl and passt.
    let elsewhere = [
        "hebe-image/src/build/contents.rs",
        "hebe-image/src/build/tool.rs",
        "hebe-image/src/grub/",
        "hebe-agent/",
        "hebe-vmm/",
        "hebe-net/src/passt.rs",
        "hebed/",
        "hebe-host/src/gate.rs",
        "hebe-host/src/launch.rs",
        "hebe-sys/src/fdstore/",
        "hebe-host/src/setup/",
        "hebe-host/src/systemd/",
        "hints.rs",
        "/benches/",
        "/tests/",
    ];
    sources.retain(|f| !elsewhere.iter().any(|e| f.to_string_lossy().contains(e)));
    let mut wrong = Vec::new();
    let mut seen = 0;
    for file in &sources {
        let text = fs::read_to_string(file).expect("a source");
        for (at, _) in text.match_indices("--") {
            let flag = |c: char| c == '-' || c.is_ascii_lowercase();
            let end = text[at..].find(|c| !flag(c)).unwrap_or(text.len() - at);
            let word = text[at..at + end].trim_end_matches('-');
            let begins = text[..at].ends_with([' ', '`', '"', '(', '\'']);
            if begins
                && word.len() > 3
                && text[at + 2..].starts_with(|c: char| c.is_ascii_lowercase())
            {
                seen += 1;
                if !known.contains(word) {
                    wrong.push(format!("{}: {word}", file.display()));
                }
            }
        }
    }
    assert!(seen > 100, "{seen}");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_command_that_is_named_exists() {
    let hints = all_hints();
    // As many were there when this was written: the search itself still works.
    assert!(hints.len() > 200, "{}", hints.len());
    let wrong: Vec<String> = hints
        .iter()
        .filter_map(|h| {
            Some(format!(
                "{}: `{}`: {}",
                h.file.display(),
                h.text,
                refusal(h)?
            ))
        })
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn what_is_no_command_is_found() {
    let file = Path::new("f");
    for wrong in [
        "hebe dorp web",
        "hebe drop web --no",
        "hebe reboot --hard",
        "hebe stop WEB -x",
    ] {
        assert!(refusal(&hint(wrong, file)).is_some(), "{wrong}");
    }
    for right in [
        "hebe drop {name} --yes",
        "hebe start NAME…",
        "hebe resume",
        "hebe store",
    ] {
        assert_eq!(refusal(&hint(right, file)), None, "{right}");
    }
    let source = "/// See `hebe\n/// list` or\nlet a = \"say 'hebe stop \\\n    {name}'\";\n";
    let text = flat(source);
    let found = [quoted(&text, '`', file), quoted(&text, '\'', file)].concat();
    let texts: Vec<&str> = found.iter().map(|h| h.text.as_str()).collect();
    assert_eq!(texts, ["hebe list", "hebe stop {name}"]);
    let document =
        "```\n$ hebe list | head\nhebe suspend web && hebe resume web # why\n```\nhebe x\n";
    let found = blocks(document, file);
    let texts: Vec<&str> = found.iter().map(|h| h.text.as_str()).collect();
    assert_eq!(texts, ["hebe list", "hebe suspend web", "hebe resume web"]);
}
