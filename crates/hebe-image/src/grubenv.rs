//! GRUB's environment block: settings that outlive a boot (GRUB manual,
//! "The GRUB environment block").

use std::collections::BTreeMap;

const HEADER: &str = "# GRUB Environment Block\n";
/// Most settings that are taken.
const SETTINGS_MAX: usize = 256;

/// The settings in `text`; none where it is no environment block.
///
/// A choice for one boot (`next_entry`) is left out: GRUB would take it out of
/// the file, which nobody does here, so that it would hold for ever.
pub fn parse(text: &str) -> BTreeMap<String, String> {
    let Some(body) = text.strip_prefix(HEADER) else {
        return BTreeMap::new();
    };
    let mut settings = BTreeMap::new();
    let mut rest = body;
    while let Some((line, after)) = line(rest) {
        rest = after;
        if settings.len() == SETTINGS_MAX {
            break;
        }
        if let Some((name, value)) = line.split_once('=')
            && !name.starts_with('#')
            && name != "next_entry"
        {
            settings.insert(name.to_owned(), value.to_owned());
        }
    }
    settings
}

/// The next line, in which a backslash takes the meaning off what follows.
fn line(text: &str) -> Option<(String, &str)> {
    let mut line = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => line.extend(chars.next().map(|(_, c)| c)),
            '\n' => return Some((line, &text[at + 1..])),
            c => line.push(c),
        }
    }
    (!line.is_empty()).then_some((line, ""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_read_and_a_choice_for_once_is_not() {
        let text = "# GRUB Environment Block\nsaved_entry=a>b\nnext_entry=c\n\
                    kernelopts=root=UUID=1 ro\nodd=a\\\\b\\\nc\n#######";
        let settings = parse(text);
        let get = |name: &str| settings.get(name).map(String::as_str);
        assert_eq!(get("saved_entry"), Some("a>b"));
        assert_eq!(get("kernelopts"), Some("root=UUID=1 ro"));
        assert_eq!(get("odd"), Some("a\\b\nc"));
        assert_eq!(settings.len(), 3, "{settings:?}");
    }

    #[test]
    fn what_is_no_block_has_no_settings() {
        for text in ["", "saved_entry=1\n", "# GRUB", "\\"] {
            assert!(parse(text).is_empty(), "{text}");
        }
        let many = format!(
            "{HEADER}{}",
            (0..9999).fold(String::new(), |s, i| s + &format!("a{i}=\n"))
        );
        assert_eq!(parse(&many).len(), SETTINGS_MAX);
    }
}
