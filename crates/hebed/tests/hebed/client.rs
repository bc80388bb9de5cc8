//! A client of a few lines: one request on a connection of its own.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::Value;

/// What came back.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Reply {
    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }
}

pub fn connect(socket: &Path) -> io::Result<UnixStream> {
    let stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(crate::world::PATIENCE))?;
    Ok(stream)
}

/// Sends `request` as it is, and reads to the end.
pub fn raw(socket: &Path, request: &[u8]) -> io::Result<Reply> {
    let mut stream = connect(socket)?;
    // A server may answer before it has taken all.
    let sent = stream.write_all(request);
    let read = read_reply(&mut stream);
    if read.is_err() {
        sent?;
    }
    read
}

pub fn read_reply(stream: &mut UnixStream) -> io::Result<Reply> {
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if line.trim().is_empty() {
            break;
        }
        head.push_str(&line);
    }
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok());
    let status = status.ok_or_else(|| io::Error::other(head.clone()))?;
    let mut reply = Reply {
        status,
        head,
        body: String::new(),
    };
    let length = reply.header("content-length").map(|l| l.parse::<usize>());
    let mut bytes = Vec::new();
    match length {
        Some(Ok(length)) => {
            bytes.resize(length, 0);
            reader.read_exact(&mut bytes)?;
        }
        _ => {
            reader.read_to_end(&mut bytes)?;
        }
    }
    reply.body = String::from_utf8(bytes).map_err(io::Error::other)?;
    Ok(reply)
}

/// A request with a JSON body, or without one.
pub fn request(method: &str, path: &str, body: Option<&str>) -> Vec<u8> {
    let mut text = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n");
    if let Some(body) = body {
        text += "Content-Type: application/json\r\n";
        text += &format!("Content-Length: {}\r\n", body.len());
    }
    text += "\r\n";
    text += body.unwrap_or_default();
    text.into_bytes()
}
