//! From text to statements.

use std::rc::Rc;

/// Deepest nesting of blocks.
const DEPTH_MAX: usize = 24;
/// Most words and statements of one file.
const TOKENS_MAX: usize = 200_000;

/// Why text is no program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScriptError {
    /// Ends within quotes.
    #[error("line {0}: a quote is not closed")]
    Quote(usize),
    /// A block that does not end, or ends twice.
    #[error("line {0}: a block is not closed, or was not open")]
    Block(usize),
    /// `DEPTH_MAX` or `TOKENS_MAX`.
    #[error("line {0}: it is too long, or nested too deep")]
    TooMuch(usize),
}

/// A piece of a word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// Itself.
    Text(String),
    /// A variable's value; split at blanks where it is not quoted.
    Variable { name: String, quoted: bool },
}

/// A word before its variables are put in.
pub(super) type Word = Vec<Part>;

/// What is carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Statement {
    /// A command and its arguments.
    Command(Vec<Word>),
    /// Conditions and what each leads to; the last may have none.
    If(Vec<(Vec<Statement>, Vec<Statement>)>, Vec<Statement>),
    /// `menuentry` or `submenu`: words of the line, and the block.
    Menu {
        submenu: bool,
        words: Vec<Word>,
        body: Rc<Vec<Statement>>,
    },
    /// A function's definition.
    Function {
        name: String,
        body: Rc<Vec<Statement>>,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Word(Word),
    /// End of a command: a line's end or a semicolon.
    End,
    Open,
    Close,
}

/// Reads a program.
pub(super) fn parse(text: &str) -> Result<Vec<Statement>, ScriptError> {
    let tokens = tokens(text)?;
    let mut parser = Parser { tokens, at: 0 };
    let (statements, end) = parser.block(0, &[])?;
    match end {
        Stop::Input => Ok(statements),
        _ => Err(ScriptError::Block(parser.line())),
    }
}

fn tokens(text: &str) -> Result<Vec<(Token, usize)>, ScriptError> {
    let mut lexer = Lexer {
        rest: text,
        line: 1,
    };
    let mut tokens = Vec::new();
    while let Some(token) = lexer.token()? {
        if tokens.len() == TOKENS_MAX {
            return Err(ScriptError::TooMuch(lexer.line));
        }
        tokens.push((token, lexer.line));
    }
    tokens.push((Token::End, lexer.line));
    Ok(tokens)
}

struct Lexer<'a> {
    rest: &'a str,
    line: usize,
}

impl Lexer<'_> {
    fn peek(&self) -> Option<char> {
        self.rest.chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.rest = &self.rest[c.len_utf8()..];
        self.line += usize::from(c == '\n');
        Some(c)
    }

    fn token(&mut self) -> Result<Option<Token>, ScriptError> {
        loop {
            match self.peek() {
                None => return Ok(None),
                Some(' ' | '\t' | '\r') => _ = self.next(),
                Some('#') => {
                    while self.peek().is_some_and(|c| c != '\n') {
                        self.next();
                    }
                }
                Some('\\') if self.rest.starts_with("\\\n") => {
                    self.next();
                    self.next();
                }
                Some('\n' | ';' | '&' | '|') => {
                    self.next();
                    return Ok(Some(Token::End));
                }
                Some('{') => {
                    self.next();
                    return Ok(Some(Token::Open));
                }
                Some('}') => {
                    self.next();
                    return Ok(Some(Token::Close));
                }
                Some(_) => return self.word().map(|word| Some(Token::Word(word))),
            }
        }
    }

    fn word(&mut self) -> Result<Word, ScriptError> {
        let mut word = Word::new();
        let mut text = String::new();
        // An empty pair of quotes is a word.
        let mut quoted = false;
        while let Some(c) = self.peek() {
            match c {
                ' ' | '\t' | '\r' | '\n' | ';' | '{' | '}' | '&' | '|' => break,
                '\'' => {
                    quoted = true;
                    self.single_quoted(&mut text)?;
                }
                '"' => {
                    quoted = true;
                    self.double_quoted(&mut word, &mut text)?;
                }
                '\\' => {
                    self.next();
                    text.extend(self.next().filter(|c| *c != '\n'));
                }
                '$' => self.variable(&mut word, &mut text, false),
                c => {
                    self.next();
                    text.push(c);
                }
            }
        }
        if !text.is_empty() || (quoted && word.is_empty()) {
            word.push(Part::Text(text));
        }
        Ok(word)
    }

    fn single_quoted(&mut self, text: &mut String) -> Result<(), ScriptError> {
        let line = self.line;
        self.next();
        loop {
            match self.next() {
                None => return Err(ScriptError::Quote(line)),
                Some('\'') => return Ok(()),
                Some(c) => text.push(c),
            }
        }
    }

    fn double_quoted(&mut self, word: &mut Word, text: &mut String) -> Result<(), ScriptError> {
        let line = self.line;
        self.next();
        loop {
            match self.peek() {
                None => return Err(ScriptError::Quote(line)),
                Some('"') => {
                    self.next();
                    return Ok(());
                }
                Some('\\') => {
                    self.next();
                    match self.next() {
                        Some(c @ ('"' | '\\' | '$')) => text.push(c),
                        Some('\n') | None => {}
                        Some(c) => text.extend(['\\', c]),
                    }
                }
                Some('$') => self.variable(word, text, true),
                Some(c) => {
                    self.next();
                    text.push(c);
                }
            }
        }
    }

    /// `$name`, `${name}`; a dollar sign alone is itself.
    fn variable(&mut self, word: &mut Word, text: &mut String, quoted: bool) {
        self.next();
        let braces = self.peek() == Some('{');
        let inside = if braces { &self.rest[1..] } else { self.rest };
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let len = if braces {
            inside.find(['}', '\n']).unwrap_or(0)
        } else if inside.starts_with(['?', '*', '@', '#']) {
            1
        } else {
            inside.find(|c| !is_name(c)).unwrap_or(inside.len())
        };
        if len == 0 || (braces && inside.as_bytes().get(len) != Some(&b'}')) {
            text.push('$');
            return;
        }
        let name = inside[..len].to_owned();
        self.rest = &self.rest[len + if braces { 2 } else { 0 }..];
        if !text.is_empty() {
            word.push(Part::Text(std::mem::take(text)));
        }
        word.push(Part::Variable { name, quoted });
    }
}

struct Parser {
    tokens: Vec<(Token, usize)>,
    at: usize,
}

/// What ended a block.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Stop {
    Input,
    Close,
    Word(&'static str),
}

impl Parser {
    fn line(&self) -> usize {
        let at = self.at.min(self.tokens.len().saturating_sub(1));
        self.tokens.get(at).map_or(1, |(_, line)| *line)
    }

    /// Statements up to the end, a closing brace, or one of `words` where a
    /// command would begin.
    fn block(
        &mut self,
        depth: usize,
        words: &[&'static str],
    ) -> Result<(Vec<Statement>, Stop), ScriptError> {
        if depth > DEPTH_MAX {
            return Err(ScriptError::TooMuch(self.line()));
        }
        let mut statements = Vec::new();
        loop {
            match self.tokens.get(self.at).map(|(token, _)| token) {
                None => return Ok((statements, Stop::Input)),
                Some(Token::End) => self.at += 1,
                Some(Token::Close) => {
                    self.at += 1;
                    return Ok((statements, Stop::Close));
                }
                Some(Token::Open) => {
                    self.at += 1;
                    statements.extend(self.braces(depth)?);
                }
                Some(Token::Word(word)) => {
                    let keyword = plain(word).to_owned();
                    if let Some(end) = words.iter().find(|w| **w == keyword) {
                        self.at += 1;
                        return Ok((statements, Stop::Word(end)));
                    }
                    statements.extend(self.statement(&keyword, depth)?);
                }
            }
        }
    }

    fn statement(&mut self, keyword: &str, depth: usize) -> Result<Vec<Statement>, ScriptError> {
        let statement = match keyword {
            "if" => {
                self.at += 1;
                self.branches(depth)?
            }
            "for" | "while" | "until" => {
                self.at += 1;
                self.expect(depth, &["do"])?;
                self.expect(depth, &["done"])?;
                return Ok(Vec::new());
            }
            "function" => {
                self.at += 1;
                let words = self.words();
                let name = words.first().map(|word| plain(word).to_owned());
                let body = Rc::new(self.opened(depth)?);
                let name = name.unwrap_or_default();
                Statement::Function { name, body }
            }
            "menuentry" | "submenu" => {
                self.at += 1;
                let words = self.words();
                // Without a block it is a command, and makes no entry.
                if self.tokens.get(self.at).map(|(t, _)| t) != Some(&Token::Open) {
                    return Ok(Vec::new());
                }
                Statement::Menu {
                    submenu: keyword == "submenu",
                    words,
                    body: Rc::new(self.opened(depth)?),
                }
            }
            _ => Statement::Command(self.words()),
        };
        Ok(vec![statement])
    }

    fn words(&mut self) -> Vec<Word> {
        let mut words = Vec::new();
        while let Some((Token::Word(word), _)) = self.tokens.get(self.at) {
            words.push(word.clone());
            self.at += 1;
        }
        words
    }

    fn opened(&mut self, depth: usize) -> Result<Vec<Statement>, ScriptError> {
        while self.tokens.get(self.at).map(|(t, _)| t) == Some(&Token::End) {
            self.at += 1;
        }
        if self.tokens.get(self.at).map(|(t, _)| t) != Some(&Token::Open) {
            return Err(ScriptError::Block(self.line()));
        }
        self.at += 1;
        self.braces(depth)
    }

    fn braces(&mut self, depth: usize) -> Result<Vec<Statement>, ScriptError> {
        match self.block(depth + 1, &[])? {
            (body, Stop::Close) => Ok(body),
            _ => Err(ScriptError::Block(self.line())),
        }
    }

    fn expect(
        &mut self,
        depth: usize,
        words: &[&'static str],
    ) -> Result<(Vec<Statement>, &'static str), ScriptError> {
        match self.block(depth + 1, words)? {
            (body, Stop::Word(word)) => Ok((body, word)),
            _ => Err(ScriptError::Block(self.line())),
        }
    }

    fn branches(&mut self, depth: usize) -> Result<Statement, ScriptError> {
        let mut branches = Vec::new();
        loop {
            let (condition, _) = self.expect(depth, &["then"])?;
            let (body, end) = self.expect(depth, &["elif", "else", "fi"])?;
            branches.push((condition, body));
            match end {
                "elif" => {}
                "else" => {
                    let (otherwise, _) = self.expect(depth, &["fi"])?;
                    return Ok(Statement::If(branches, otherwise));
                }
                _ => return Ok(Statement::If(branches, Vec::new())),
            }
        }
    }
}

/// A word's text where it has no variables; keywords have none.
fn plain(word: &Word) -> &str {
    match word.as_slice() {
        [Part::Text(text)] => text,
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<Word> {
        match parse(text).expect("parse").as_slice() {
            [Statement::Command(words)] => words.clone(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn words_have_quotes_escapes_and_variables() {
        let text = |t: &str| Part::Text(t.to_owned());
        let variable = |name: &str, quoted| Part::Variable {
            name: name.to_owned(),
            quoted,
        };
        assert_eq!(
            words(r#"a 'b $c' "d $e\"${f}" g\ h ${i}j$ "" # k"#),
            [
                vec![text("a")],
                vec![text("b $c")],
                vec![
                    text("d "),
                    variable("e", true),
                    text("\""),
                    variable("f", true)
                ],
                vec![text("g h")],
                vec![variable("i", false), text("j$")],
                vec![text("")],
            ]
        );
        assert_eq!(words("a \\\n b").len(), 2);
    }

    #[test]
    fn blocks_nest_and_end() {
        let program = "if [ x = y ] ; then\na\nelif b; then c; else\n if d; then e; fi\nfi\n\
                       function f {\n g\n}\nfor x in 1 2; do h $x; done\n\
                       submenu 'S' { menuentry 'M' --id m { linux /k } }";
        let statements = parse(program).expect("parse");
        let [Statement::If(branches, otherwise), function, menu] = statements.as_slice() else {
            panic!("{statements:?}");
        };
        assert_eq!((branches.len(), otherwise.len()), (2, 1));
        assert!(matches!(function, Statement::Function { name, .. } if name == "f"));
        assert!(matches!(menu, Statement::Menu { submenu: true, body, .. } if body.len() == 1));
    }

    #[test]
    fn what_does_not_end_is_refused_with_its_line() {
        for (text, refused) in [
            ("a\n'b", ScriptError::Quote(2)),
            ("\"b", ScriptError::Quote(1)),
            ("menuentry a {\n", ScriptError::Block(2)),
            ("a }", ScriptError::Block(1)),
            ("if a; b; fi", ScriptError::Block(1)),
            ("if a; then b", ScriptError::Block(1)),
            ("function f\n", ScriptError::Block(2)),
        ] {
            assert_eq!(parse(text), Err(refused), "{text}");
        }
        for deep in ["{", "if if ", "menuentry a {", "for x do "] {
            let refused = parse(&deep.repeat(1000));
            assert!(matches!(
                refused,
                Err(ScriptError::TooMuch(_) | ScriptError::Block(_))
            ));
        }
        let long = "a ".repeat(TOKENS_MAX + 1);
        assert_eq!(parse(&long), Err(ScriptError::TooMuch(1)));
    }
}
