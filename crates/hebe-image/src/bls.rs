//! Boot loader entries: `loader/entries/*.conf` (UAPI group, "Boot Loader
//! Specification").

use std::cmp::Ordering;
use std::collections::BTreeMap;

use crate::version;

/// Most entries that are looked at.
pub const ENTRIES_MAX: usize = 256;
/// Most initrds of one entry.
const INITRDS_MAX: usize = 16;
/// Longest command line that is put together.
const OPTIONS_MAX: usize = 16 << 10;

/// An entry that boots Linux.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// Its file's name without `.conf` and without a boot counter.
    pub id: String,
    /// For people.
    pub title: String,
    /// The kernel, from the root of the volume.
    pub linux: String,
    /// What the initrd is made of, one behind the other.
    pub initrds: Vec<String>,
    /// The command line.
    pub options: String,
    version: String,
    machine: String,
    sort_key: String,
    /// Its boot counter says that it never came up.
    bad: bool,
}

/// Reads the entry in the file `name`; `None` where it boots no Linux kernel of
/// this architecture. `$name` in options is put in from `variables`, as
/// Fedora's GRUB does it.
pub fn parse(name: &str, text: &str, variables: &BTreeMap<String, String>) -> Option<Entry> {
    let stem = name.strip_suffix(".conf")?;
    let (id, bad) = without_counter(stem);
    let mut entry = Entry {
        id: id.to_owned(),
        bad,
        ..Entry::default()
    };
    for line in text.lines() {
        let line = line.trim();
        let Some((key, value)) = line.split_once(|c: char| c.is_ascii_whitespace()) else {
            continue;
        };
        let value = value.trim();
        match key {
            "title" => entry.title = value.to_owned(),
            "version" => entry.version = value.to_owned(),
            "machine-id" => entry.machine = value.to_owned(),
            "sort-key" => entry.sort_key = value.to_owned(),
            "linux" => entry.linux = value.to_owned(),
            "initrd" => {
                let names = value.split_ascii_whitespace().map(|v| expand(v, variables));
                // Variables such as Fedora's `$tuned_initrd` are often empty.
                let names = names.filter(|name| !name.is_empty());
                entry.initrds.extend(names);
                entry.initrds.truncate(INITRDS_MAX);
            }
            "options" => {
                if !entry.options.is_empty() {
                    entry.options.push(' ');
                }
                entry.options.push_str(&expand(value, variables));
                if entry.options.len() > OPTIONS_MAX {
                    return None;
                }
            }
            "architecture" if !value.eq_ignore_ascii_case("x64") => return None,
            _ => {}
        }
    }
    let words: Vec<&str> = entry.options.split_ascii_whitespace().collect();
    entry.options = words.join(" ");
    (!entry.linux.is_empty()).then_some(entry)
}

/// `id+3-1`: a boot counter with three tries left, after one. None left is bad.
fn without_counter(stem: &str) -> (&str, bool) {
    let number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let Some((id, counter)) = stem.rsplit_once('+') else {
        return (stem, false);
    };
    let (left, done) = counter.split_once('-').unwrap_or((counter, "0"));
    match number(left) && number(done) {
        true => (id, left.bytes().all(|b| b == b'0')),
        false => (stem, false),
    }
}

fn expand(text: &str, variables: &BTreeMap<String, String>) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        out.push_str(before);
        let braces = after.starts_with('{');
        let name = after.trim_start_matches('{');
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let len = name.find(|c| !is_name(c)).unwrap_or(name.len());
        let (name, after) = name.split_at(len);
        out.push_str(variables.get(name).map_or("", String::as_str));
        rest = match braces {
            true => after.strip_prefix('}').unwrap_or(after),
            false => after,
        };
        if out.len() > OPTIONS_MAX {
            return out;
        }
    }
    out + rest
}

/// Which entry comes first in a menu: those with a sort key by that, machine
/// and falling version, then the others by falling name; those that never came
/// up last.
pub fn order(a: &Entry, b: &Entry) -> Ordering {
    let by_key = || match (a.sort_key.is_empty(), b.sort_key.is_empty()) {
        (false, false) => a
            .sort_key
            .cmp(&b.sort_key)
            .then_with(|| a.machine.cmp(&b.machine))
            .then_with(|| version::compare(&b.version, &a.version)),
        (a, b) => a.cmp(&b),
    };
    a.bad
        .cmp(&b.bad)
        .then_with(by_key)
        .then_with(|| version::compare(&b.id, &a.id))
        .then_with(|| b.id.cmp(&a.id))
}

/// The entry that `default` names by id, title or number, or the first; in
/// `loader.conf` the id may have `*` and `?` in it.
pub fn choose<'a>(entries: &'a mut [Entry], default: &str) -> Option<&'a Entry> {
    entries.sort_by(order);
    let default = default.trim();
    let id = default.strip_suffix(".conf").unwrap_or(default);
    let by_name = |e: &&Entry| !id.is_empty() && (matches(id, &e.id) || e.title == default);
    let number = default.parse().ok().and_then(|n: usize| entries.get(n));
    entries
        .iter()
        .find(by_name)
        .or(number)
        .or_else(|| entries.first())
}

/// The default in a `loader.conf`, empty where it has none.
pub fn default_of(loader_conf: &str) -> &str {
    loader_conf
        .lines()
        .filter_map(|line| line.trim().split_once(|c: char| c.is_ascii_whitespace()))
        .find(|(key, _)| *key == "default")
        .map_or("", |(_, value)| value.trim())
}

/// Whether `name` is as `pattern` says, in time of the product of their
/// lengths.
fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name) = (pattern.as_bytes(), name.as_bytes());
    let (mut p, mut n) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(c) if *c == b'?' || *c == name[n] => (p, n) = (p + 1, n + 1),
            _ => match star {
                Some((at, from)) => {
                    star = Some((at, from + 1));
                    (p, n) = (at + 1, from + 1);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|c| *c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, text: &str) -> Entry {
        parse(name, text, &BTreeMap::new()).expect(name)
    }

    #[test]
    fn an_entry_is_read_with_its_variables() {
        let variables = [("kernelopts", "root=UUID=1 ro"), ("empty", "")];
        let variables = variables.map(|(n, v)| (n.to_owned(), v.to_owned()));
        let text = "# by hand\ntitle Fedora (6.9)\nversion 6.9\nlinux /vmlinuz-6.9\n\
                    initrd /initramfs-6.9.img $empty\ninitrd\t/more.img\n\
                    options $kernelopts  quiet ${none}x\noptions last\ngrub_users $empty\n";
        let entry = parse("a-6.9.conf", text, &variables.into()).expect("entry");
        assert_eq!(entry.id, "a-6.9");
        assert_eq!(entry.linux, "/vmlinuz-6.9");
        assert_eq!(entry.initrds, ["/initramfs-6.9.img", "/more.img"]);
        assert_eq!(entry.options, "root=UUID=1 ro quiet x last");
        for (name, text) in [
            ("a.conf", "efi /x.efi"),
            ("a.txt", "linux /k"),
            ("a.conf", "linux /k\narchitecture aa64"),
            ("a.conf", ""),
        ] {
            assert_eq!(parse(name, text, &BTreeMap::new()), None, "{text}");
        }
    }

    #[test]
    fn the_newest_is_first_and_the_default_counts() {
        let mut entries = [
            entry("m-6.1.0-9.conf", "linux /a"),
            entry("m-6.1.0-50.conf", "linux /b\ntitle The B"),
            entry("m-7+0-3.conf", "linux /bad"),
            entry("m-6.2+2.conf", "linux /c"),
        ];
        let mut chosen = |default: &str| {
            let chosen = choose(&mut entries, default).expect("one");
            chosen.linux.clone()
        };
        assert_eq!(chosen(""), "/c");
        assert_eq!(chosen("m-6.1.0-9"), "/a");
        assert_eq!(chosen("m-6.1.0-50.conf"), "/b");
        assert_eq!(chosen("The B"), "/b");
        assert_eq!(chosen("m-6.1.*"), "/b");
        assert_eq!(chosen("2"), "/a");
        assert_eq!(chosen("none"), "/c");
        assert_eq!(chosen("3"), "/bad");
        let mut keyed = [
            entry("z.conf", "linux /plain"),
            entry("a.conf", "linux /old\nsort-key d\nversion 6.9"),
            entry("b.conf", "linux /new\nsort-key d\nversion 6.10"),
        ];
        assert_eq!(choose(&mut keyed, "").expect("one").linux, "/new");
        assert_eq!(keyed[2].linux, "/plain");
        assert_eq!(choose(&mut [], "a"), None);
    }

    #[test]
    fn patterns_are_those_of_a_shell() {
        for (pattern, name, is) in [
            ("a*c", "abbbc", true),
            ("a*c", "abbb", false),
            ("*", "", true),
            ("?", "", false),
            ("a?c*", "abc", true),
            ("", "", true),
        ] {
            assert_eq!(matches(pattern, name), is, "{pattern} {name}");
        }
        assert!(!matches(&"*a".repeat(500), &"a".repeat(400)));
        assert_eq!(default_of("timeout 3\ndefault  x-* \n"), "x-*");
        assert_eq!(default_of("timeout 3"), "");
    }
}
