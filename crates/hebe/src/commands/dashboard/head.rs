//! The head of a request, as far as this proxy has to know it. No I/O.

/// Longest head, in bytes; also the daemon's limit.
pub const HEAD_LEN_MAX: usize = 16 << 10;
/// Longest body, in bytes; also the daemon's limit.
pub const BODY_LEN_MAX: usize = 64 << 10;

/// Why a head is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadHead(&'static str);

impl BadHead {
    /// As a sentence.
    pub fn text(self) -> &'static str {
        self.0
    }
}

/// A head that was checked: one request line, and fields that are what HTTP
/// says a field is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// The method.
    pub method: String,
    /// Path and query.
    pub target: String,
    fields: Vec<(String, String)>,
}

/// Where a head ends in `bytes`, and the body begins.
pub fn end_of_head(bytes: &[u8]) -> Option<usize> {
    bytes
        .windows(4)
        .position(|w| w == b"\r\n\r\n")
        .map(|at| at + 4)
}

impl Head {
    /// Reads a head, with the empty line at its end.
    pub fn parse(bytes: &[u8]) -> Result<Self, BadHead> {
        let bad = BadHead("this is no HTTP request");
        let text = std::str::from_utf8(bytes).map_err(|_| bad)?;
        let text = text.strip_suffix("\r\n\r\n").ok_or(bad)?;
        let mut lines = text.split("\r\n");
        let mut words = lines.next().unwrap_or_default().split(' ');
        let (method, target) = (words.next().unwrap_or_default(), words.next().ok_or(bad)?);
        if words.next() != Some("HTTP/1.1") || words.next().is_some() {
            return Err(BadHead("only HTTP/1.1 is spoken here"));
        }
        let visible = |text: &str| text.bytes().all(|b| b.is_ascii_graphic());
        let named = !method.is_empty() && method.bytes().all(|b| b.is_ascii_uppercase());
        if !named || !target.starts_with('/') || !visible(target) {
            return Err(bad);
        }
        let mut fields = Vec::new();
        for line in lines {
            let (name, value) = line.split_once(':').ok_or(bad)?;
            let token = |b: u8| b.is_ascii_alphanumeric() || b"-_.!#$%&'*+^`|~".contains(&b);
            let value = value.trim_matches([' ', '\t']);
            if name.is_empty() || !name.bytes().all(token) || value.chars().any(char::is_control) {
                return Err(bad);
            }
            fields.push((name.to_ascii_lowercase(), value.to_owned()));
        }
        Ok(Self {
            method: method.to_owned(),
            target: target.to_owned(),
            fields,
        })
    }

    /// The value of a field that is there at most once; by its name in small
    /// letters.
    pub fn one(&self, name: &str) -> Result<Option<&str>, BadHead> {
        let mut found = self.fields.iter().filter(|(key, _)| key == name);
        let first = found.next();
        match found.next() {
            Some(_) => Err(BadHead("a field is there twice that may be there once")),
            None => Ok(first.map(|(_, value)| value.as_str())),
        }
    }

    /// The values of a cookie.
    pub fn cookies<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        let fields = self.fields.iter().filter(|(key, _)| key == "cookie");
        let pairs = fields.flat_map(|(_, value)| value.split(';'));
        pairs.filter_map(move |pair| {
            let (key, value) = pair.trim().split_once('=')?;
            (key == name).then_some(value)
        })
    }

    /// How long the body is.
    pub fn body_len(&self) -> Result<usize, BadHead> {
        if self.one("transfer-encoding")?.is_some() {
            return Err(BadHead("say how long the body is, by Content-Length"));
        }
        let Some(text) = self.one("content-length")? else {
            return Ok(0);
        };
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        match text.parse() {
            Ok(len) if digits && len <= BODY_LEN_MAX => Ok(len),
            _ => Err(BadHead("the body is too long, or its length is no number")),
        }
    }

    /// The request as the daemon gets it: what it needs, and nothing else.
    pub fn onward(&self, path: &str, body_len: usize) -> Result<Vec<u8>, BadHead> {
        let mut text = format!(
            "{} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n",
            self.method
        );
        for name in ["accept", "content-type", "last-event-id"] {
            if let Some(value) = self.one(name)? {
                text.push_str(&format!("{name}: {value}\r\n"));
            }
        }
        if self.method == "POST" {
            text.push_str(&format!("content-length: {body_len}\r\n"));
        }
        text.push_str("\r\n");
        Ok(text.into_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_read() {
        let text = "POST /a/v1?x=1 HTTP/1.1\r\nHost: h:1\r\nCOOKIE: a=1; hebe=x\r\ncookie: hebe=y\r\nContent-Length: 7\r\nAccept: */*\r\n\r\n";
        assert_eq!(end_of_head(text.as_bytes()), Some(text.len()));
        assert_eq!(end_of_head(b"GET / HTTP/1.1\r\n"), None);
        let head = Head::parse(text.as_bytes()).expect("sound");
        assert_eq!(
            (head.method.as_str(), head.target.as_str()),
            ("POST", "/a/v1?x=1")
        );
        assert_eq!(head.one("host"), Ok(Some("h:1")));
        assert_eq!(head.one("origin"), Ok(None));
        assert!(head.one("cookie").is_err());
        assert_eq!(head.cookies("hebe").collect::<Vec<_>>(), ["x", "y"]);
        assert_eq!(head.body_len(), Ok(7));
        let onward = String::from_utf8(head.onward("/v1?x=1", 7).expect("sound")).expect("text");
        assert_eq!(
            onward,
            "POST /v1?x=1 HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\naccept: */*\r\ncontent-length: 7\r\n\r\n"
        );
    }

    #[test]
    fn what_could_be_read_in_two_ways_is_refused() {
        for text in [
            "",
            "GET / HTTP/1.1",
            "GET / HTTP/1.0\r\n\r\n",
            "GET / HTTP/1.1 x\r\n\r\n",
            "GET  / HTTP/1.1\r\n\r\n",
            "GET http://x/ HTTP/1.1\r\n\r\n",
            "get / HTTP/1.1\r\n\r\n",
            "GET /\u{e9} HTTP/1.1\r\n\r\n",
            "GET / HTTP/1.1\r\nHost h\r\n\r\n",
            "GET / HTTP/1.1\r\nHost : h\r\n\r\n",
            "GET / HTTP/1.1\r\n folded: h\r\n\r\n",
            "GET / HTTP/1.1\r\na: b\nc: d\r\n\r\n",
            "GET / HTTP/1.1\r\na: b\rc: d\r\n\r\n",
        ] {
            assert!(Head::parse(text.as_bytes()).is_err(), "{text:?}");
        }
        for fields in [
            "Content-Length: 1\r\nContent-Length: 1",
            "Content-Length: 65537",
            "Content-Length: +1",
            "Content-Length: ",
            "Transfer-Encoding: chunked",
        ] {
            let text = format!("POST / HTTP/1.1\r\n{fields}\r\n\r\n");
            let head = Head::parse(text.as_bytes()).expect("a head");
            assert!(head.body_len().is_err(), "{fields}");
        }
    }
}
