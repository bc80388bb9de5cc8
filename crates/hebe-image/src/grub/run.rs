//! Carrying a configuration out.

use std::rc::Rc;

use super::script::{Part, Statement, Word, parse};
use super::{GrubError, Variables};

/// Most commands carried out.
const STEPS_MAX: usize = 100_000;
/// What a look at the disk counts as.
const LOOK: usize = 500;
/// Deepest nesting of functions, sourced files and menus.
const DEPTH_MAX: usize = 16;
/// Longest value of a variable or argument.
const VALUE_MAX: usize = 16 << 10;
/// Most variables.
const VARIABLES_MAX: usize = 1024;
/// Most entries of all menus.
const ENTRIES_MAX: usize = 1024;
/// Most initrds of one entry.
const INITRDS_MAX: usize = 16;

/// The volumes as a configuration sees them, by number.
pub trait Disk {
    /// The volume that GRUB calls so: `hd0,gpt2`, `hd0,msdos1`, `hd0`.
    fn named(&self, device: &str) -> Option<usize>;
    /// The volume with this file system UUID.
    fn with_uuid(&self, uuid: &str) -> Option<usize>;
    /// The volume with this label.
    fn with_label(&self, label: &str) -> Option<usize>;
    /// The first volume that has this file.
    fn with_file(&self, path: &str) -> Option<usize>;
    /// Whether a volume has this file.
    fn has_file(&self, place: &Place) -> bool;
    /// A text file, such as another configuration.
    fn text(&self, place: &Place) -> Option<String>;
}

/// A file on a volume.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Which volume.
    pub volume: usize,
    /// Its path there.
    pub path: String,
}

/// What a configuration boots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// A menu entry.
    Linux {
        /// Its title.
        title: String,
        /// The kernel.
        kernel: Place,
        /// The command line.
        cmdline: String,
        /// What the initrd is made of, one behind the other.
        initrds: Vec<Place>,
    },
    /// Boot loader entries; `default` is the id, the title or the number of
    /// one, or empty.
    Entries {
        /// Which one.
        default: String,
        /// What entries may refer to.
        variables: Variables,
    },
}

/// What `text`, found at `place`, boots by default. GRUB's prefix is the
/// directory that the file lies in.
pub fn choose(text: &str, place: &Place, disk: &dyn Disk) -> Result<Choice, GrubError> {
    let mut run = Run {
        disk,
        home: place.volume,
        variables: Variables::new(),
        functions: Vec::new(),
        entries: Vec::new(),
        boots: Boots::default(),
        entries_asked: false,
        made: 0,
        steps: 0,
    };
    let dir = place.path.rsplit_once('/').map_or("", |(dir, _)| dir);
    for (name, value) in [
        ("prefix", dir),
        ("grub_platform", "pc"),
        ("grub_cpu", "x86_64"),
        ("feature_menuentry_id", "y"),
        ("feature_platform_search_hint", "y"),
        ("feature_default_font_path", "y"),
    ] {
        run.variables.insert(name.to_owned(), value.to_owned());
    }
    run.all(&parse(text)?, 0)?;
    run.pick()
}

#[derive(Clone)]
struct Entry {
    title: String,
    id: String,
    submenu: bool,
    body: Rc<Vec<Statement>>,
}

/// What the entry that is carried out boots.
#[derive(Default)]
struct Boots {
    kernel: Option<(Place, String)>,
    initrds: Vec<Place>,
}

struct Run<'a> {
    disk: &'a dyn Disk,
    /// The volume that paths without a device are on where `root` is not set.
    home: usize,
    variables: Variables,
    functions: Vec<(String, Rc<Vec<Statement>>)>,
    /// Of the menu that is carried out.
    entries: Vec<Entry>,
    boots: Boots,
    entries_asked: bool,
    made: usize,
    steps: usize,
}

impl Run<'_> {
    /// Goes into submenus as `default` says, to an entry.
    fn pick(&mut self) -> Result<Choice, GrubError> {
        let default = self.value("default").to_owned();
        let mut way = default.split('>');
        for _ in 0..DEPTH_MAX {
            let wanted = way.next().unwrap_or_default();
            if self.entries_asked && self.entries.is_empty() {
                return Ok(Choice::Entries {
                    default,
                    variables: std::mem::take(&mut self.variables),
                });
            }
            let entry = self.wanted(wanted).cloned().ok_or(GrubError::NoEntry)?;
            self.entries.clear();
            self.variables.insert("chosen".into(), entry.title.clone());
            self.all(&entry.body, 0)?;
            if entry.submenu {
                continue;
            }
            let boots = std::mem::take(&mut self.boots);
            let (kernel, cmdline) = boots
                .kernel
                .ok_or_else(|| GrubError::NoLinux(crate::error::shown(&entry.title)))?;
            return Ok(Choice::Linux {
                title: entry.title,
                kernel,
                cmdline,
                initrds: boots.initrds,
            });
        }
        Err(GrubError::TooMuch)
    }

    /// By number, id or title; GRUB takes the first where there is no such.
    fn wanted(&self, wanted: &str) -> Option<&Entry> {
        let number: Option<usize> = wanted.trim().parse().ok();
        let by_number = number.and_then(|n| self.entries.get(n));
        let named = |e: &&Entry| !wanted.is_empty() && (e.id == wanted || e.title == wanted);
        by_number
            .or_else(|| self.entries.iter().find(named))
            .or_else(|| self.entries.first())
    }

    fn value(&self, name: &str) -> &str {
        self.variables.get(name).map_or("", String::as_str)
    }

    fn set(&mut self, name: &str, value: String) -> Result<(), GrubError> {
        let room = self.variables.len() < VARIABLES_MAX || self.variables.contains_key(name);
        if !room || value.len() > VALUE_MAX || name.len() > VALUE_MAX {
            return Err(GrubError::TooMuch);
        }
        self.variables.insert(name.to_owned(), value);
        Ok(())
    }

    /// Carries statements out; whether the last command succeeded.
    fn all(&mut self, statements: &[Statement], depth: usize) -> Result<bool, GrubError> {
        if depth > DEPTH_MAX {
            return Err(GrubError::TooMuch);
        }
        let mut good = true;
        for statement in statements {
            self.step(1)?;
            good = match statement {
                Statement::Command(words) => {
                    let words = self.expand(words)?;
                    self.command(&words, depth)?
                }
                Statement::If(branches, otherwise) => self.branch(branches, otherwise, depth)?,
                Statement::Function { name, body } => {
                    if self.functions.len() == VARIABLES_MAX {
                        return Err(GrubError::TooMuch);
                    }
                    self.functions.push((name.clone(), body.clone()));
                    true
                }
                Statement::Menu {
                    submenu,
                    words,
                    body,
                } => self.entry(*submenu, words, body)?,
            };
        }
        Ok(good)
    }

    fn step(&mut self, cost: usize) -> Result<(), GrubError> {
        self.steps += cost;
        match self.steps > STEPS_MAX {
            true => Err(GrubError::TooMuch),
            false => Ok(()),
        }
    }

    fn branch(
        &mut self,
        branches: &[(Vec<Statement>, Vec<Statement>)],
        otherwise: &[Statement],
        depth: usize,
    ) -> Result<bool, GrubError> {
        for (condition, body) in branches {
            if self.all(condition, depth + 1)? {
                return self.all(body, depth + 1);
            }
        }
        self.all(otherwise, depth + 1)
    }

    fn entry(
        &mut self,
        submenu: bool,
        words: &[Word],
        body: &Rc<Vec<Statement>>,
    ) -> Result<bool, GrubError> {
        self.made += 1;
        if self.made > ENTRIES_MAX {
            return Err(GrubError::TooMuch);
        }
        let words = self.expand(words)?;
        let id = words.iter().position(|w| w == "--id");
        let id = id.and_then(|i| words.get(i + 1)).cloned();
        let inline = words.iter().find_map(|w| w.strip_prefix("--id="));
        self.entries.push(Entry {
            title: words.first().cloned().unwrap_or_default(),
            id: id.or(inline.map(str::to_owned)).unwrap_or_default(),
            submenu,
            body: body.clone(),
        });
        Ok(true)
    }

    fn expand(&self, words: &[Word]) -> Result<Vec<String>, GrubError> {
        let mut expanded = Vec::new();
        let mut total = 0;
        for word in words {
            let mut text = String::new();
            let mut is_word = false;
            for part in word {
                match part {
                    Part::Text(piece) => {
                        is_word = true;
                        text.push_str(piece);
                    }
                    Part::Variable { name, quoted: true } => {
                        is_word = true;
                        text.push_str(self.value(name));
                    }
                    Part::Variable { name, .. } => {
                        let value = self.value(name);
                        let mut pieces = value.split_ascii_whitespace().peekable();
                        while let Some(piece) = pieces.next() {
                            is_word = true;
                            text.push_str(piece);
                            if pieces.peek().is_some() {
                                total += text.len();
                                expanded.push(std::mem::take(&mut text));
                            }
                        }
                    }
                }
                if total + text.len() > VALUE_MAX {
                    return Err(GrubError::TooMuch);
                }
            }
            if is_word {
                total += text.len();
                expanded.push(text);
            }
        }
        Ok(expanded)
    }

    fn command(&mut self, words: &[String], depth: usize) -> Result<bool, GrubError> {
        let Some((name, arguments)) = words.split_first() else {
            return Ok(true);
        };
        if let Some(at) = self.functions.iter().rposition(|(f, _)| f == name) {
            let body = self.functions[at].1.clone();
            return self.all(&body, depth + 1);
        }
        self.step(cost(words))?;
        if let Some((variable, value)) = name.split_once('=')
            && arguments.is_empty()
            && !variable.is_empty()
        {
            self.set(variable, value.to_owned())?;
            return Ok(true);
        }
        match name.as_str() {
            "set" => self.assign(arguments),
            "unset" => {
                arguments
                    .iter()
                    .for_each(|name| _ = self.variables.remove(name));
                Ok(true)
            }
            "[" | "test" => Ok(self.test(arguments)),
            // One after the other, not one inside the other: there may be thousands.
            "!" => {
                let command = arguments.iter().position(|word| word != "!");
                let (more, rest) = arguments.split_at(command.unwrap_or(arguments.len()));
                let good = self.command(rest, depth)?;
                Ok(good == (more.len() % 2 == 1))
            }
            "false" | "loadfont" | "cpuid" | "cryptomount" => Ok(false),
            "load_env" => self.load_env(arguments),
            "source" | "." | "configfile" => self.source(arguments, depth),
            "search" => self.search(arguments),
            "search.fs_uuid" => self.found(
                self.disk.with_uuid(argument(arguments, 0)),
                arguments.get(1),
            ),
            "search.fs_label" => self.found(
                self.disk.with_label(argument(arguments, 0)),
                arguments.get(1),
            ),
            "search.file" => self.found(
                self.disk.with_file(argument(arguments, 0)),
                arguments.get(1),
            ),
            "linux" | "linux16" | "linuxefi" => Ok(self.linux(arguments)),
            "initrd" | "initrd16" | "initrdefi" => Ok(self.initrd(arguments)),
            "blscfg" => {
                self.entries_asked = true;
                Ok(true)
            }
            _ => Ok(true),
        }
    }

    fn assign(&mut self, arguments: &[String]) -> Result<bool, GrubError> {
        for argument in arguments {
            if let Some((name, value)) = argument.split_once('=') {
                self.set(name, value.to_owned())?;
            }
        }
        Ok(true)
    }

    fn load_env(&mut self, arguments: &[String]) -> Result<bool, GrubError> {
        let file = arguments.iter().position(|a| a == "-f" || a == "--file");
        let named = file.and_then(|i| arguments.get(i + 1));
        let default = format!("{}/grubenv", self.value("prefix"));
        let Some(place) = self.place(named.unwrap_or(&default)) else {
            return Ok(false);
        };
        let Some(text) = self.disk.text(&place) else {
            return Ok(false);
        };
        for (name, value) in crate::grubenv::parse(&text) {
            self.set(&name, value)?;
        }
        Ok(true)
    }

    fn source(&mut self, arguments: &[String], depth: usize) -> Result<bool, GrubError> {
        let place = arguments.first().and_then(|path| self.place(path));
        match place.and_then(|place| self.disk.text(&place)) {
            Some(text) => self.all(&parse(&text)?, depth + 1),
            None => Ok(false),
        }
    }

    /// `search --no-floppy --fs-uuid --set=root UUID` and its relatives.
    fn search(&mut self, arguments: &[String]) -> Result<bool, GrubError> {
        let mut variable = None;
        let mut by = "--file";
        let mut name = "";
        let mut arguments = arguments.iter().map(String::as_str).peekable();
        while let Some(argument) = arguments.next() {
            match argument {
                "-u" | "--fs-uuid" | "-l" | "--label" | "-f" | "--file" => by = argument,
                "-s" | "--set" => variable = arguments.next().map(str::to_owned),
                "--hint" => _ = arguments.next(),
                other => match other.strip_prefix("--set=") {
                    Some(set) => variable = Some(set.to_owned()),
                    None if other.starts_with('-') => {}
                    None => name = other,
                },
            }
        }
        let volume = match by {
            "-u" | "--fs-uuid" => self.disk.with_uuid(name),
            "-l" | "--label" => self.disk.with_label(name),
            _ => self.disk.with_file(name),
        };
        self.found(volume, variable.as_ref())
    }

    fn found(
        &mut self,
        volume: Option<usize>,
        variable: Option<&String>,
    ) -> Result<bool, GrubError> {
        let Some(volume) = volume else {
            return Ok(false);
        };
        let variable = variable.map_or("root", String::as_str).to_owned();
        self.set(&variable, format!("volume{volume}"))?;
        Ok(true)
    }

    fn linux(&mut self, arguments: &[String]) -> bool {
        let Some((path, rest)) = arguments.split_first() else {
            return false;
        };
        self.boots.initrds.clear();
        let place = self.place(path);
        let found = place.is_some();
        self.boots.kernel = place.map(|place| (place, rest.join(" ")));
        found
    }

    fn initrd(&mut self, arguments: &[String]) -> bool {
        self.boots.initrds.clear();
        for path in arguments
            .iter()
            .filter(|a| !a.starts_with("--"))
            .take(INITRDS_MAX)
        {
            match self.place(path) {
                Some(place) => self.boots.initrds.push(place),
                None => return false,
            }
        }
        true
    }

    /// `(hd0,gpt1)/path`, or `/path` on `root`.
    fn place(&self, path: &str) -> Option<Place> {
        let (device, path) = match path.strip_prefix('(') {
            Some(inside) => inside.split_once(')')?,
            None => (self.value("root"), path),
        };
        let own = device.strip_prefix("volume").and_then(|n| n.parse().ok());
        let volume = match own {
            Some(volume) => volume,
            None if device.is_empty() => self.home,
            // A name that this disk does not have is one of the machine on
            // which the configuration was written.
            None => self.disk.named(device).unwrap_or(self.home),
        };
        let path = path.to_owned();
        Some(Place { volume, path })
    }

    /// `[ … ]`: `-o` binds less than `-a`, and that less than `!`.
    fn test(&self, arguments: &[String]) -> bool {
        let arguments = match arguments.split_last() {
            Some((last, rest)) if last == "]" => rest,
            _ => arguments,
        };
        let all = |part: &[String]| part.split(|a| a == "-a").all(|one| self.test_one(one));
        arguments.split(|a| a == "-o").any(all)
    }

    fn test_one(&self, arguments: &[String]) -> bool {
        let one = arguments.iter().position(|word| word != "!");
        let (negations, arguments) = arguments.split_at(one.unwrap_or(arguments.len()));
        let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let good = match words.as_slice() {
            [a, "=" | "==", b] => a == b,
            [a, "!=", b] => a != b,
            [a, "<", b] => a < b,
            [a, ">", b] => a > b,
            [a, operator, b] => {
                let number = |text: &str| text.trim().parse::<i64>().unwrap_or(0);
                let (a, b) = (number(a), number(b));
                match *operator {
                    "-eq" => a == b,
                    "-ne" => a != b,
                    "-lt" => a < b,
                    "-le" => a <= b,
                    "-gt" => a > b,
                    "-ge" => a >= b,
                    _ => false,
                }
            }
            ["-z", text] => text.is_empty(),
            ["-n", text] => !text.is_empty(),
            ["-s" | "-f" | "-e", path] => self
                .place(path)
                .is_some_and(|place| self.disk.has_file(&place)),
            [text] => !text.is_empty(),
            _ => false,
        };
        good == negations.len().is_multiple_of(2)
    }
}

/// What a command costs that may look at the disk.
fn cost(words: &[String]) -> usize {
    let looks = |word: &String| matches!(word.as_str(), "-s" | "-f" | "-e");
    match words[0].as_str() {
        "load_env" | "source" | "." | "configfile" => LOOK,
        "[" | "test" => LOOK * words.iter().filter(|w| looks(w)).count(),
        name if name.starts_with("search") => LOOK,
        _ => 0,
    }
}

/// The argument at `at`, or none.
fn argument(arguments: &[String], at: usize) -> &str {
    arguments.get(at).map_or("", String::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two volumes; the second holds the configuration.
    struct Two;

    impl Disk for Two {
        fn named(&self, device: &str) -> Option<usize> {
            ["hd0,gpt1", "hd0,gpt2"].iter().position(|d| *d == device)
        }
        fn with_uuid(&self, uuid: &str) -> Option<usize> {
            ["first", "second"].iter().position(|u| *u == uuid)
        }
        fn with_label(&self, label: &str) -> Option<usize> {
            (label == "boot").then_some(0)
        }
        fn with_file(&self, path: &str) -> Option<usize> {
            (path == "/only-first").then_some(0)
        }
        fn has_file(&self, place: &Place) -> bool {
            self.text(place).is_some()
        }
        fn text(&self, place: &Place) -> Option<String> {
            match (place.volume, place.path.as_str()) {
                (1, "/boot/grub/grubenv") => {
                    Some("# GRUB Environment Block\nsaved_entry=old>b\nextra=x y\n".into())
                }
                (1, "/boot/grub/custom.cfg") => Some("set from_custom=1".into()),
                (1, "/boot/grub/loop.cfg") => Some("source $prefix/loop.cfg".into()),
                _ => None,
            }
        }
    }

    fn choice(text: &str) -> Result<Choice, GrubError> {
        let path = "/boot/grub/grub.cfg".to_owned();
        choose(text, &Place { volume: 1, path }, &Two)
    }

    /// Title, kernel's volume and path, command line, initrds' paths.
    fn linux(text: &str) -> (String, usize, String, String, Vec<String>) {
        match choice(text) {
            Ok(Choice::Linux {
                title,
                kernel,
                cmdline,
                initrds,
            }) => {
                let initrds = initrds.into_iter().map(|i| i.path).collect();
                (title, kernel.volume, kernel.path, cmdline, initrds)
            }
            other => panic!("{other:?}"),
        }
    }

    const MENU: &str = r#"
menuentry 'A' --class a $menuentry_id_option 'a' {
    load_video
    insmod gzio
    if [ x$grub_platform = xxen ]; then insmod xzio; fi
    set root='hd0,gpt2'
    search --no-floppy --fs-uuid --set=root second
    echo 'Loading Linux 1 ...'
    linux /boot/vmlinuz-1 root=UUID=second ro  quiet
    initrd /boot/micro.img /boot/initrd.img-1
}
submenu 'Old ones' --id old {
    menuentry 'B' --id b { linux (hd0,gpt1)/vmlinuz-0 ro }
    menuentry 'Setup' { fwsetup }
}
"#;

    #[test]
    fn the_default_is_found_by_number_id_title_and_way() {
        let first = || linux(MENU);
        let (title, volume, kernel, cmdline, initrds) = first();
        assert_eq!((title.as_str(), volume), ("A", 1));
        assert_eq!(kernel, "/boot/vmlinuz-1");
        assert_eq!(cmdline, "root=UUID=second ro quiet");
        assert_eq!(initrds, ["/boot/micro.img", "/boot/initrd.img-1"]);
        for default in ["1>0", "old>b", "'Old ones>B'", "old", "1"] {
            let (title, volume, kernel, ..) = linux(&format!("set default={default}\n{MENU}"));
            assert_eq!((title.as_str(), volume), ("B", 0), "{default}");
            assert_eq!(kernel, "/vmlinuz-0");
        }
        for default in ["0", "none", "7", "''"] {
            let text = format!("set default={default}\n{MENU}");
            assert_eq!(linux(&text), first(), "{default}");
        }
        let setup = choice(&format!("set default='1>1'\n{MENU}"));
        assert_eq!(setup, Err(GrubError::NoLinux("Setup".into())));
        assert_eq!(choice("set default=0"), Err(GrubError::NoEntry));
    }

    #[test]
    fn the_saved_entry_and_conditions_count() {
        let head = r#"
if [ -s $prefix/grubenv ]; then
  set have_grubenv=true
  load_env
fi
if [ "${next_entry}" ] ; then
   set default="${next_entry}"
elif [ "${saved_entry}" -a x$have_grubenv = xtrue ]; then
   set default="${saved_entry}"
else
   set default="0"
fi
if [ x"${feature_menuentry_id}" = xy ]; then
  menuentry_id_option="--id"
else
  menuentry_id_option=""
fi
function savedefault {
  if [ -z "${boot_once}" ]; then
    saved_entry="${chosen}"
    save_env saved_entry
  fi
}
for x in a b; do set default=5; done
if loadfont unicode; then set default=6; fi
if ! [ -f /none -o x != x ]; then source $prefix/custom.cfg; fi
"#;
        let (title, ..) = linux(&format!("{head}{MENU}"));
        assert_eq!(title, "B");
        let text = "source $prefix/custom.cfg\nload_env\nmenuentry \"m $from_custom\" {\n\
                    search --label boot --set r\n linux ($r)/k $extra \"$extra\" $none\n}";
        let (title, volume, _, cmdline, _) = linux(text);
        assert_eq!((title.as_str(), volume), ("m 1", 0));
        assert_eq!(cmdline, "x y x y");
    }

    /// The stack of whoever reads it is small, and its memory bounded.
    #[test]
    fn thousands_of_negations_are_no_depth() {
        for count in [0, 1, 2, 3, 7_999, 8_000] {
            let no = "! ".repeat(count);
            for text in [format!("if {no}false"), format!("if [ {no}a = b ]")] {
                let text = format!("{text}; then set default=1; fi\n{MENU}");
                let (title, ..) = linux(&text);
                let wanted = if count % 2 == 1 { "B" } else { "A" };
                assert_eq!(title, wanted, "{count}");
            }
        }
    }

    #[test]
    fn blscfg_hands_over_and_endless_programs_end() {
        let bls = choice("set default=1\nset kernelopts=ro\nblscfg\n");
        match bls {
            Ok(Choice::Entries { default, variables }) => {
                assert_eq!(default, "1");
                assert_eq!(variables.get("kernelopts").map(String::as_str), Some("ro"));
            }
            other => panic!("{other:?}"),
        }
        let doubled = format!("set a=xx\n{}", "set a=$a$a\n".repeat(20));
        let deep = "submenu s {".repeat(20) + &"}".repeat(20);
        for endless in [
            "function f { f; f; }\nf",
            "source $prefix/loop.cfg",
            &doubled,
            &format!("set default='{}'\n{deep}", "0>".repeat(20)),
            &"search --file /x\n".repeat(1000),
            &"menuentry m {}\n".repeat(ENTRIES_MAX + 1),
        ] {
            let refused = choice(endless);
            assert_eq!(refused, Err(GrubError::TooMuch), "{}", &endless[..20]);
        }
    }
}
