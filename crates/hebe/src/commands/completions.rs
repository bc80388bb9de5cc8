//! Completion scripts, made from the definition of the command line; where an
//! order takes a VM, they offer the names that `hebe list --names` gives.
//!
//! The generators know of no such thing, so their scripts are added to. Which
//! orders take a VM stands in the definition alone: positional arguments whose
//! value is a [`VmName`].

use std::any::TypeId;

use clap::{Arg, Command, CommandFactory, ValueHint};
use clap_complete::Shell;
use hebe_types::VmName;

use crate::cli::Cli;
use crate::output::{Exit, Outcome, Output};

/// What stands between the names of commands in what the generators write.
const BETWEEN: &str = "__subcmd__";
/// What gives the names, one a line. It says nothing on stderr whatever is
/// wrong; a shell may complain of a program that is not there.
const NAMES: &str = "hebe list --names 2>/dev/null";

/// `hebe completions`.
pub fn completions(shell: Shell, out: &Output) -> Outcome {
    out.raw(script(shell).as_bytes());
    Ok(Exit::Done)
}

fn script(shell: Shell) -> String {
    let mut whole = hinted(Cli::command());
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut whole, "hebe", &mut script);
    let script = String::from_utf8_lossy(&script).into_owned();
    let mut hidden = Vec::new();
    hide(&whole, &mut hidden);
    let script = hidden.iter().fold(script, without);
    let mut takers = Vec::new();
    take_vms(&whole, &mut Vec::new(), &mut takers);
    match shell {
        Shell::Bash => bash(script, &takers),
        Shell::Zsh => zsh(&script),
        Shell::Fish => fish(script, &takers),
        _ => script,
    }
}

/// An order that takes a VM.
struct Taker {
    /// `["agent"]`, without `hebe`.
    path: Vec<String>,
    /// Orders below it.
    below: Vec<String>,
}

fn is_vm(argument: &Arg) -> bool {
    argument.is_positional() && argument.get_value_parser().type_id() == TypeId::of::<VmName>()
}

/// The hint is what the generator for zsh turns into a word that can be found; no
/// order takes the name of a host by position.
fn hinted(command: Command) -> Command {
    let hint = |argument: Arg| match is_vm(&argument) {
        true => argument.value_hint(ValueHint::Hostname),
        false => argument,
    };
    command.mut_args(hint).mut_subcommands(hinted)
}

fn take_vms(command: &Command, path: &mut Vec<String>, found: &mut Vec<Taker>) {
    let below = |c: &Command| c.get_name().to_owned();
    if command.get_positionals().any(is_vm) {
        found.push(Taker {
            path: path.clone(),
            below: command.get_subcommands().map(below).collect(),
        });
    }
    for own in command.get_subcommands().filter(|c| !c.is_hide_set()) {
        path.push(own.get_name().to_owned());
        take_vms(own, path, found);
        path.pop();
    }
}

/// Orders and flags that are not for people, as they are typed.
fn hide(command: &Command, hidden: &mut Vec<String>) {
    let flags = command.get_arguments().filter(|a| a.is_hide_set());
    hidden.extend(flags.filter_map(|a| Some(format!("--{}", a.get_long()?))));
    for own in command.get_subcommands() {
        match own.is_hide_set() {
            true => hidden.push(own.get_name().to_owned()),
            false => hide(own, hidden),
        }
    }
}

/// The script without the offer of one word: in bash one of a list, in zsh and fish
/// a line. What comes behind a word that was typed all the same may stay.
fn without(script: String, word: &String) -> String {
    let flag = word.strip_prefix("--").unwrap_or("=");
    let offers = [
        format!("'{word}:"),
        format!("'{word}["),
        format!(" -a \"{word}\""),
        format!(" -l {flag} "),
    ];
    let is_offer = |line: &&str| {
        let zsh = offers[..2].iter().any(|offer| line.starts_with(offer));
        zsh || offers[2..].iter().any(|offer| line.contains(offer))
    };
    let kept = script.split_inclusive('\n').filter(|line| !is_offer(line));
    kept.collect::<String>().replace(&format!(" {word} "), " ")
}

/// Each order has a branch that begins with the words that may stand there.
fn bash(script: String, takers: &[Taker]) -> String {
    let words = |path: &[String]| {
        let path = path.iter().map(|name| name.replace('-', BETWEEN));
        let path: Vec<String> = std::iter::once("hebe".to_owned()).chain(path).collect();
        path.join(BETWEEN)
    };
    let script = takers.iter().fold(script, |script, taker| {
        let branch = format!("\n        {})\n            opts=\"", words(&taker.path));
        script.replacen(&branch, &format!("{branch}$(_hebe_vm_names) "), 1)
    });
    format!(
        "_hebe_vm_names() {{
    # cur is the caller's: flags need no names.
    [[ ${{cur}} == -* ]] || {NAMES}
}}

{script}"
    )
}

fn zsh(script: &str) -> String {
    let function = format!(
        "(( $+functions[_hebe_vm_names] )) ||
_hebe_vm_names() {{
    local names; names=(${{(f)\"$({NAMES})\"}})
    _describe -t vms 'VM' names \"$@\"
}}

"
    );
    // Behind what is below, the file is carried out.
    const LAST: &str = "if [ \"$funcstack[1]\"";
    script
        .replace(":_hosts'", ":_hebe_vm_names'")
        .replacen(LAST, &format!("{function}{LAST}"), 1)
}

fn fish(mut script: String, takers: &[Taker]) -> String {
    for taker in takers {
        let Some((first, rest)) = taker.path.split_first() else {
            continue;
        };
        let mut when = format!("__fish_hebe_using_subcommand {first}");
        for word in rest {
            when.push_str(&format!("; and __fish_seen_subcommand_from {word}"));
        }
        if !taker.below.is_empty() {
            let below = taker.below.join(" ");
            when.push_str(&format!("; and not __fish_seen_subcommand_from {below}"));
        }
        script.push_str(&format!(
            "complete -c hebe -n \"{when}\" -f -a \"({NAMES})\" -d 'VM'\n"
        ));
    }
    script
}

#[cfg(test)]
mod tests {
    use super::*;

    fn takers() -> Vec<Taker> {
        let mut found = Vec::new();
        take_vms(&Cli::command(), &mut Vec::new(), &mut found);
        found
    }

    #[test]
    fn orders_that_take_a_vm_are_found_in_the_definition() {
        let found: Vec<String> = takers().iter().map(|t| t.path.join(" ")).collect();
        for order in ["start", "stop", "show", "agent", "resume", "drop", "logs"] {
            assert!(found.iter().any(|f| f == order), "{order}: {found:?}");
        }
        for order in ["list", "run", "store show", "host check", "reboot"] {
            assert!(!found.iter().any(|f| f == order), "{order}: {found:?}");
        }
    }

    /// A generator that writes otherwise than it did would leave them out.
    #[test]
    fn every_such_order_offers_names_in_each_shell() {
        let count = takers().len();
        for (shell, word, besides) in [
            // Its definition.
            (Shell::Bash, "_hebe_vm_names", 1),
            // Its definition, and the question whether there is one.
            (Shell::Zsh, "_hebe_vm_names", 2),
            (Shell::Fish, "hebe list --names", 0),
        ] {
            let script = script(shell);
            let found = script.matches(word).count();
            assert_eq!(found, count + besides, "{shell}: {script}");
            assert!(!script.contains("_hosts"), "{shell}: a name of a host");
            for offer in [" keeper ", "'keeper:", "\"keeper\"", "'--names["] {
                assert!(
                    !script.contains(offer),
                    "{shell}: {offer} is not for people"
                );
            }
        }
    }
}
