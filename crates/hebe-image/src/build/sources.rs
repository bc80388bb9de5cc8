//! apt's source entries: finds the one through which this machine gets its
//! own suite, and derives entries for other suites from it.
//!
//! Both formats are read: deb822 (`*.sources`) and one-line (`*.list`), see
//! sources.list(5). The result is always deb822.

use std::io;
use std::path::Path;

/// One entry: where packages come from, and who signs them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// `deb` and perhaps `deb-src`.
    pub types: Vec<String>,
    /// Base addresses.
    pub uris: Vec<String>,
    /// Suites or code names.
    pub suites: Vec<String>,
    /// Components.
    pub components: Vec<String>,
    /// Every other field, as it stood (`Signed-By`, `Trusted` …).
    pub others: Vec<(String, String)>,
}

impl Source {
    /// The same source for other suites; binary packages, and source
    /// packages when `with_source`.
    pub fn with_suites(&self, suites: &[&str], with_source: bool) -> Self {
        let types = if with_source { "deb deb-src" } else { "deb" };
        Self {
            types: words(types),
            suites: suites.iter().map(|s| (*s).to_owned()).collect(),
            components: vec!["main".to_owned()],
            ..self.clone()
        }
    }

    /// The entry as a deb822 stanza.
    pub fn to_deb822(&self) -> String {
        let mut text = format!(
            "Types: {}\nURIs: {}\nSuites: {}\nComponents: {}\n",
            self.types.join(" "),
            self.uris.join(" "),
            self.suites.join(" "),
            self.components.join(" ")
        );
        for (key, value) in &self.others {
            text.push_str(&format!("{key}: {value}\n"));
        }
        text
    }
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

/// Reads deb822 stanzas; comments and disabled stanzas are left out.
pub fn parse_deb822(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    let mut fields: Vec<(String, String)> = Vec::new();
    for line in text.lines().chain(std::iter::once("")) {
        if line.starts_with('#') {
            continue;
        }
        if line.trim().is_empty() {
            sources.extend(from_fields(&std::mem::take(&mut fields)));
        } else if line.starts_with([' ', '\t']) {
            // A continuation line belongs to the field before it.
            if let Some((_, value)) = fields.last_mut() {
                value.push('\n');
                value.push_str(line);
            }
        } else if let Some((key, value)) = line.split_once(':') {
            fields.push((key.trim().to_owned(), value.trim().to_owned()));
        }
    }
    sources
}

fn from_fields(fields: &[(String, String)]) -> Option<Source> {
    let get = |key: &str| {
        fields
            .iter()
            .find(|(k, _)| k.eq_ignore_ascii_case(key))
            .map(|(_, v)| v.as_str())
    };
    if get("Enabled").is_some_and(|v| v.eq_ignore_ascii_case("no")) {
        return None;
    }
    let named = ["types", "uris", "suites", "components", "enabled"];
    Some(Source {
        types: words(get("Types")?),
        uris: words(get("URIs")?),
        suites: words(get("Suites")?),
        components: words(get("Components").unwrap_or("")),
        others: fields
            .iter()
            .filter(|(k, _)| !named.contains(&k.to_ascii_lowercase().as_str()))
            .cloned()
            .collect(),
    })
}

/// Reads one-line entries: `deb [option=value …] URI SUITE COMPONENT …`.
pub fn parse_list(text: &str) -> Vec<Source> {
    text.lines().filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<Source> {
    let line = line.split('#').next()?.trim();
    let (kind, rest) = line.split_once(char::is_whitespace)?;
    if kind != "deb" && kind != "deb-src" {
        return None;
    }
    let rest = rest.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(inside) => inside.split_once(']')?,
        None => ("", rest),
    };
    let mut parts = rest.split_whitespace();
    let uri = parts.next()?;
    let suite = parts.next()?;
    let others = options
        .split_whitespace()
        .filter_map(|o| o.split_once('='))
        .map(|(k, v)| (deb822_name(k), v.replace(',', " ")))
        .collect();
    Some(Source {
        types: vec![kind.to_owned()],
        uris: vec![uri.to_owned()],
        suites: vec![suite.to_owned()],
        components: parts.map(str::to_owned).collect(),
        others,
    })
}

/// The deb822 field for a one-line option (sources.list(5), OPTIONS).
fn deb822_name(option: &str) -> String {
    match option {
        "arch" => "Architectures".to_owned(),
        "lang" => "Languages".to_owned(),
        "target" => "Targets".to_owned(),
        "pdiffs" => "PDiffs".to_owned(),
        "by-hash" => "By-Hash".to_owned(),
        other => other
            .split('-')
            .map(|part| {
                let mut letters = part.chars();
                letters.next().map_or(String::new(), |first| {
                    first.to_ascii_uppercase().to_string() + letters.as_str()
                })
            })
            .collect::<Vec<_>>()
            .join("-"),
    }
}

/// The entry through which the machine gets suite `codename` itself.
pub fn own_source(sources: &[Source], codename: &str) -> Option<Source> {
    sources
        .iter()
        .find(|s| {
            s.types.iter().any(|t| t == "deb")
                && s.suites.iter().any(|suite| suite == codename)
                && s.components.iter().any(|c| c == "main")
        })
        .cloned()
}

/// Reads every source entry under `etc_apt` (usually `/etc/apt`).
///
/// # Errors
/// A file that is there and cannot be read; that there is none is no error.
pub fn read_machine(etc_apt: &Path) -> io::Result<Vec<Source>> {
    let mut sources = Vec::new();
    let main = etc_apt.join("sources.list");
    if let Ok(text) = std::fs::read_to_string(&main) {
        sources.extend(parse_list(&text));
    }
    let parts = etc_apt.join("sources.list.d");
    let mut files: Vec<_> = match std::fs::read_dir(&parts) {
        Ok(dir) => dir.filter_map(|e| Some(e.ok()?.path())).collect(),
        Err(_) => Vec::new(),
    };
    files.sort();
    for file in files {
        let read: fn(&str) -> Vec<Source> = match file.extension().and_then(|e| e.to_str()) {
            Some("sources") => parse_deb822,
            Some("list") => parse_list,
            _ => continue,
        };
        let text = std::fs::read_to_string(&file)
            .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", file.display())))?;
        sources.extend(read(&text));
    }
    Ok(sources)
}

/// Suites without security and update suites of their own.
const ROLLING: [&str; 4] = ["sid", "unstable", "experimental", "rc-buggy"];

/// The entries for `suite`, derived from those through which the machine gets
/// its own suite `own` with its updates and its security fixes.
pub fn for_suite(sources: &[Source], own: &str, suite: &str) -> Vec<Source> {
    let rolling = ROLLING.contains(&suite);
    let renamed = |name: &String| {
        let rest = name.strip_prefix(own)?;
        match rest {
            "" => Some(suite.to_owned()),
            "-updates" | "-security" if !rolling => Some(format!("{suite}{rest}")),
            _ => None,
        }
    };
    let main = |s: &&Source| {
        s.types.iter().any(|t| t == "deb") && s.components.iter().any(|c| c == "main")
    };
    let mut all: Vec<Source> = Vec::new();
    for source in sources.iter().filter(main) {
        let suites: Vec<String> = source.suites.iter().filter_map(renamed).collect();
        let names: Vec<&str> = suites.iter().map(String::as_str).collect();
        let source = source.with_suites(&names, false);
        if !names.is_empty() && !all.contains(&source) {
            all.push(source);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEB822: &str = "# a comment\nTypes: deb\n# another\nURIs: http://mirror.test/debian\nSuites: bookworm bookworm-updates\nComponents: main contrib\nSigned-By: /k.gpg\n\nTypes: deb\nURIs: http://mirror.test/security\nSuites: bookworm-security\nComponents: main\n";

    #[test]
    fn a_deb822_stanza_is_rewritten_for_another_suite() {
        let sources = parse_deb822(DEB822);
        assert_eq!(sources.len(), 2);
        let own = own_source(&sources, "bookworm").expect("the machine's own");
        let text = own.with_suites(&["trixie-backports"], false).to_deb822();
        assert_eq!(
            text,
            "Types: deb\nURIs: http://mirror.test/debian\nSuites: trixie-backports\nComponents: main\nSigned-By: /k.gpg\n"
        );
        assert_eq!(parse_deb822(&text).len(), 1);
    }

    #[test]
    fn one_line_entries_are_read_with_their_options() {
        let text = "# deb http://no.test/ x main\ndeb [arch=amd64 signed-by=/k.gpg] http://mirror.test/debian/ trixie main # tail\ndeb-src http://mirror.test/debian trixie main\n";
        let sources = parse_list(text);
        assert_eq!(sources.len(), 2);
        let own = own_source(&sources, "trixie").expect("the machine's own");
        assert_eq!(own.uris, ["http://mirror.test/debian/"]);
        assert_eq!(own.others[0], ("Architectures".into(), "amd64".into()));
        assert_eq!(own.others[1], ("Signed-By".into(), "/k.gpg".into()));
    }

    #[test]
    fn inline_keys_and_disabled_stanzas() {
        let text = "Types: deb\nURIs: http://m.test/d\nSuites: trixie\nComponents: main\nSigned-By:\n -----BEGIN-----\n .\n abc\n\nEnabled: no\nTypes: deb\nURIs: u\nSuites: trixie\nComponents: main\n";
        let sources = parse_deb822(text);
        assert_eq!(sources.len(), 1);
        assert!(
            sources[0]
                .to_deb822()
                .contains("Signed-By: \n -----BEGIN-----\n .\n abc\n")
        );
    }

    #[test]
    fn a_foreign_entry_is_not_taken_for_the_machines_own() {
        let sources = parse_list("deb http://other.test stable main\n");
        assert_eq!(own_source(&sources, "trixie"), None);
    }

    #[test]
    fn another_suite_is_reached_as_the_machines_own_is() {
        let sources = parse_deb822(DEB822);
        let of = |suite: &str| -> Vec<String> {
            let all = for_suite(&sources, "bookworm", suite);
            all.iter().map(|s| s.suites.join(" ")).collect()
        };
        assert_eq!(
            of("bookworm"),
            ["bookworm bookworm-updates", "bookworm-security"]
        );
        assert_eq!(of("trixie"), ["trixie trixie-updates", "trixie-security"]);
        assert_eq!(of("unstable"), ["unstable"]);
        let all = for_suite(&sources, "bookworm", "trixie");
        assert!(all.iter().all(|s| s.components == ["main"]));
        assert!(for_suite(&sources, "jammy", "jammy").is_empty());
    }
}
