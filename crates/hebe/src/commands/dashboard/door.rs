//! Who is let in to the dashboard. No I/O.
//!
//! Whoever reaches the daemon's socket can reboot the host, and every user of
//! this machine, and every page in a browser on it, can reach a port of
//! 127.0.0.1. So:
//!
//! - The address that is printed bears a token, which lets in once. Whoever
//!   comes with it gets a cookie that no script can read and that the browser
//!   sends to requests of the page itself alone; without it nothing is answered
//!   but a refusal.
//! - Cookies know no ports: what one server on 127.0.0.1 sets, the browser
//!   sends to any other there, also to that of another user. So the cookie is
//!   for a path that is random, too, below which all of the page lies.
//! - `Host` must be the address that was printed, which no name that was
//!   pointed at 127.0.0.1 is; an order must come from the page's own origin
//!   (`Origin`), and nothing may come from another site (`Sec-Fetch-Site`).

use super::head::{BadHead, Head};

/// The cookie's name.
const COOKIE: &str = "hebe";

/// Who is let in.
#[derive(Debug)]
pub struct Door {
    port: u16,
    /// Random, as part of paths.
    place: String,
    /// Random; `None` once it was used.
    token: Option<String>,
    /// Random; the cookie's value.
    secret: String,
}

/// What is done with a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It goes to the daemon, as a request for this path.
    Pass(String),
    /// It gets the cookie, if any, and is sent to the page.
    Enter {
        /// Where the page is.
        to: String,
        /// `Set-Cookie`.
        cookie: Option<String>,
    },
    /// It is refused.
    Refuse(u16, &'static str),
}

impl From<BadHead> for Verdict {
    fn from(bad: BadHead) -> Self {
        Self::Refuse(400, bad.text())
    }
}

impl Door {
    /// A door at a port of 127.0.0.1, with three random words.
    pub fn new(port: u16, [place, token, secret]: [String; 3]) -> Self {
        Self {
            port,
            place,
            token: Some(token),
            secret,
        }
    }

    /// What lets in once.
    pub fn address(&self) -> String {
        let token = self.token.as_deref().unwrap_or_default();
        let (port, place) = (self.port, &self.place);
        format!("http://127.0.0.1:{port}/{place}/?token={token}")
    }

    /// What is done with a request; a token is used up by it.
    pub fn judge(&mut self, head: &Head) -> Verdict {
        self.checked(head).unwrap_or_else(|refusal| refusal)
    }

    fn checked(&mut self, head: &Head) -> Result<Verdict, Verdict> {
        let refuse = |status, text| Err(Verdict::Refuse(status, text));
        let host = head.one("host")?.unwrap_or_default();
        if !self.is_own(host) {
            return refuse(421, "the Host header is not the address that was printed");
        }
        if !matches!(head.method.as_str(), "GET" | "HEAD" | "POST") {
            return refuse(405, "only GET, HEAD and POST are of use here");
        }
        let site = head.one("sec-fetch-site")?;
        if !matches!(site, None | Some("same-origin" | "none")) {
            return refuse(403, "this comes from a page of another origin");
        }
        let origin = head.one("origin")?;
        let own = |origin: &str| origin.strip_prefix("http://") == Some(host);
        if !origin.map_or(head.method != "POST", own) {
            return refuse(403, "this comes from a page of another origin");
        }
        let Some(rest) = self.below(&head.target) else {
            return refuse(403, "open the address that `hebe dashboard` printed");
        };
        let known = head.cookies(COOKIE).any(|value| same(value, &self.secret));
        let token = rest
            .strip_prefix("/?token=")
            .filter(|_| head.method == "GET");
        if let Some(token) = token {
            return self.enter(token, known);
        }
        if !known {
            return refuse(
                403,
                "this browser was not let in: open the address that `hebe dashboard` printed",
            );
        }
        Ok(Verdict::Pass(rest.to_owned()))
    }

    /// The address that was printed, or its other name.
    fn is_own(&self, host: &str) -> bool {
        let names = ["127.0.0.1", "localhost"];
        names
            .iter()
            .any(|name| host == format!("{name}:{}", self.port))
    }

    fn below<'a>(&self, target: &'a str) -> Option<&'a str> {
        let rest = target.strip_prefix('/')?;
        let place = rest.get(..self.place.len())?;
        let rest = &rest[self.place.len()..];
        (same(place, &self.place) && rest.starts_with('/')).then_some(rest)
    }

    fn enter(&mut self, token: &str, known: bool) -> Result<Verdict, Verdict> {
        let to = format!("/{}/", self.place);
        if known {
            // It was opened again where it was opened before.
            return Ok(Verdict::Enter { to, cookie: None });
        }
        if !self.token.as_deref().is_some_and(|own| same(own, token)) {
            return Err(Verdict::Refuse(
                403,
                "this address was used already, or is wrong: it lets one browser in, once. End `hebe dashboard` and begin it anew",
            ));
        }
        self.token = None;
        let cookie = format!(
            "{COOKIE}={}; Path={to}; HttpOnly; SameSite=Strict",
            self.secret
        );
        let cookie = Some(cookie);
        Ok(Verdict::Enter { to, cookie })
    }
}

/// Whether two words are the same, in a time that does not tell where they
/// differ.
fn same(a: &str, b: &str) -> bool {
    let differ = |(a, b): (u8, u8)| a ^ b;
    a.len() == b.len()
        && a.bytes()
            .zip(b.bytes())
            .map(differ)
            .fold(0, |all, d| all | d)
            == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: &str = "Host: 127.0.0.1:80";
    const COOKIE: &str = "Host: 127.0.0.1:80\r\nCookie: x=y; hebe=ccc";

    fn door() -> Door {
        Door::new(80, ["ppp", "ttt", "ccc"].map(str::to_owned))
    }

    fn ask(door: &mut Door, line: &str, fields: &str) -> Verdict {
        let text = format!("{line} HTTP/1.1\r\n{fields}\r\n\r\n");
        door.judge(&Head::parse(text.as_bytes()).expect("a head"))
    }

    fn status(verdict: &Verdict) -> u16 {
        match verdict {
            Verdict::Refuse(status, _) => *status,
            Verdict::Enter { .. } => 303,
            Verdict::Pass(_) => 200,
        }
    }

    #[test]
    fn the_token_lets_one_browser_in_once() {
        let mut door = door();
        assert_eq!(door.address(), "http://127.0.0.1:80/ppp/?token=ttt");
        for wrong in [
            "/ppp/?token=",
            "/ppp/?token=tt",
            "/ppp/?token=ttx",
            "/ppp/?token=ttt&x",
        ] {
            let answer = ask(&mut door, &format!("GET {wrong}"), PLAIN);
            assert_eq!(status(&answer), 403, "{wrong}");
        }
        // Neither a look at its head nor an order uses it up.
        assert_eq!(status(&ask(&mut door, "HEAD /ppp/?token=ttt", PLAIN)), 403);
        let entered = ask(&mut door, "GET /ppp/?token=ttt", PLAIN);
        let cookie = "hebe=ccc; Path=/ppp/; HttpOnly; SameSite=Strict".to_owned();
        let to = "/ppp/".to_owned();
        let cookie = Some(cookie);
        assert_eq!(
            entered,
            Verdict::Enter {
                to: to.clone(),
                cookie
            }
        );
        assert_eq!(status(&ask(&mut door, "GET /ppp/?token=ttt", PLAIN)), 403);
        // The same browser, which opens it again.
        let again = ask(&mut door, "GET /ppp/?token=ttt", COOKIE);
        assert_eq!(again, Verdict::Enter { to, cookie: None });
    }

    #[test]
    fn without_the_cookie_nothing_is_answered() {
        let mut door = door();
        let paths = [
            "/",
            "/ppp",
            "/ppp/",
            "/ppp/v1/vms",
            "/favicon.ico",
            "/v1/vms",
            "/ppp/?x=1",
        ];
        for path in paths {
            assert_eq!(
                status(&ask(&mut door, &format!("GET {path}"), PLAIN)),
                403,
                "{path}"
            );
        }
        for cookie in [
            "hebe=",
            "hebe=cc",
            "hebe=ccx",
            "hebe=cccc",
            "Hebe=ccc",
            "hebex=ccc",
        ] {
            let fields = format!("{PLAIN}\r\nCookie: {cookie}");
            assert_eq!(
                status(&ask(&mut door, "GET /ppp/v1/vms", &fields)),
                403,
                "{cookie}"
            );
        }
        let pass = |path: &str| Verdict::Pass(path.to_owned());
        assert_eq!(
            ask(&mut door, "GET /ppp/v1/vms?a=b", COOKIE),
            pass("/v1/vms?a=b")
        );
        assert_eq!(ask(&mut door, "GET /ppp/", COOKIE), pass("/"));
        // The cookie alone is no way round the place.
        for path in ["/", "/v1/vms", "/ppx/v1/vms", "/pppp/", "/ppp"] {
            assert_eq!(
                status(&ask(&mut door, &format!("GET {path}"), COOKIE)),
                403,
                "{path}"
            );
        }
    }

    #[test]
    fn pages_of_others_are_refused_also_with_the_cookie() {
        let mut door = door();
        let mut asked = |line: &str, fields: &str| {
            let fields = format!("{fields}\r\nCookie: hebe=ccc");
            status(&ask(&mut door, line, &fields))
        };
        for host in [
            "evil.example",
            "127.0.0.1",
            "127.0.0.1:81",
            "localhost.evil.example:80",
            "",
        ] {
            let fields = format!("Host: {host}");
            assert_eq!(asked("GET /ppp/", &fields), 421, "{host}");
        }
        assert_eq!(asked("GET /ppp/", "Accept: x"), 421);
        assert_eq!(
            asked("GET /ppp/", "Host: 127.0.0.1:80\r\nHost: 127.0.0.1:80"),
            400
        );
        assert_eq!(asked("GET /ppp/", "Host: localhost:80"), 200);
        for (origin, wanted) in [
            ("http://127.0.0.1:80", 200),
            ("http://localhost:80", 403),
            ("https://127.0.0.1:80", 403),
            ("http://127.0.0.1:81", 403),
            ("http://evil.example", 403),
            ("null", 403),
        ] {
            let fields = format!("{PLAIN}\r\nOrigin: {origin}");
            for method in ["GET", "POST"] {
                assert_eq!(
                    asked(&format!("{method} /ppp/x"), &fields),
                    wanted,
                    "{method} {origin}"
                );
            }
        }
        // A browser says where an order comes from.
        assert_eq!(asked("POST /ppp/x", PLAIN), 403);
        for (site, wanted) in [
            ("same-origin", 200),
            ("none", 200),
            ("same-site", 403),
            ("cross-site", 403),
        ] {
            let fields = format!("{PLAIN}\r\nSec-Fetch-Site: {site}");
            assert_eq!(asked("GET /ppp/", &fields), wanted, "{site}");
        }
        for method in ["PUT", "DELETE", "OPTIONS", "CONNECT"] {
            assert_eq!(asked(&format!("{method} /ppp/"), PLAIN), 405, "{method}");
        }
    }
}
