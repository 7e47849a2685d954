//! A look at Rust files without a parser: comments, strings and test modules blanked out, so that what is left can be searched.

use std::path::{Path, PathBuf};

/// A file under `src/`.
pub struct Source {
    /// Relative to the repository, with `/`.
    pub path: String,
    /// The text as written.
    pub text: String,
    /// The text without comments, strings and `#[cfg(test)]` items: blanks stand in their place, lines stay lines.
    pub code: String,
    /// As `code`, with the strings left in.
    pub code_and_strings: String,
}

impl Source {
    fn read(root: &Path, path: &Path) -> Self {
        let text = std::fs::read_to_string(path).unwrap();
        let name = path.strip_prefix(root).unwrap().to_str().unwrap().replace('\\', "/");
        let (mut code, mut code_and_strings) = (blank(&text, true), blank(&text, false));
        for (start, end) in test_items(&code) {
            for kept in [&mut code, &mut code_and_strings] {
                let blanks: String = kept[start..end].chars().map(|c| if c == '\n' { '\n' } else { ' ' }).collect();
                kept.replace_range(start..end, &format!("{blanks:<width$}", width = end - start));
            }
        }
        Self { path: name, text, code, code_and_strings }
    }

    /// The top-level module that the file belongs to: `data` for `src/data/prompt.rs` and for `src/data.rs`; `main` and `lib` as such.
    pub fn module(&self) -> &str {
        let inner = self.path.strip_prefix("src/").unwrap_or(&self.path);
        inner.split('/').next().unwrap().trim_end_matches(".rs")
    }

    /// How many `super::` lead from the file to the root of the crate.
    fn depth(&self) -> usize {
        self.path
            .trim_start_matches("src/")
            .trim_end_matches(".rs")
            .split('/')
            .filter(|part| !matches!(*part, "mod" | "lib" | "main"))
            .count()
    }

    /// The first names below the root of the crate (behind `crate::`, `glmddp::` or enough `super::`), with the line of each.
    pub fn crate_paths(&self) -> Vec<(usize, String)> {
        let supers = "super::".repeat(self.depth());
        let roots = ["crate::", "glmddp::", &supers];
        let mut found = Vec::new();
        for root in roots.into_iter().filter(|root| !root.is_empty()) {
            for (at, _) in self.code.match_indices(root) {
                if !self.code[..at].ends_with(|c| is_word(c) || c == ':') {
                    let line = line_of(&self.code, at);
                    found.extend(first_names(&self.code[at + root.len()..]).into_iter().map(|name| (line, name)));
                }
            }
        }
        found
    }
}

/// Every `.rs` file below `dir`, by name.
pub fn sources(dir: &str) -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    files_below(&root.join(dir), "rs").iter().map(|path| Source::read(root, path)).collect()
}

pub fn files_below(dir: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files_below(&path, extension));
        } else if path.extension().is_some_and(|e| e == extension) {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// Line (from 1) of the byte `at`.
pub fn line_of(text: &str, at: usize) -> usize {
    text[..at].matches('\n').count() + 1
}

pub fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// `a::b` -> a; `{a::{x, y}, b}` -> a, b.
fn first_names(path: &str) -> Vec<String> {
    let path = path.trim_start();
    let word = |s: &str| s.trim_start().chars().take_while(|&c| is_word(c)).collect::<String>();
    let Some(group) = path.strip_prefix('{') else { return vec![word(path)] };
    let mut names = vec![word(group)];
    let mut depth = 1;
    for (i, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 1 => names.push(word(&group[i + 1..])),
            _ => {}
        }
        if depth == 0 {
            break;
        }
    }
    names.retain(|name| !name.is_empty() && name != "self");
    names
}

/// Replaces comments, and strings and characters if asked, by blanks of the same length in bytes.
fn blank(text: &str, strings: bool) -> String {
    let bytes = text.as_bytes();
    let mut out = bytes.to_vec();
    let mut erase = |from: usize, to: usize| {
        for b in &mut out[from..to] {
            if *b != b'\n' {
                *b = b' ';
            }
        }
    };
    let mut i = 0;
    while i < bytes.len() {
        let rest = &bytes[i..];
        let (end, is_comment) = if rest.starts_with(b"//") {
            (i + rest.iter().position(|&b| b == b'\n').unwrap_or(rest.len()), true)
        } else if rest.starts_with(b"/*") {
            (i + block_comment(rest), true)
        } else if rest[0] == b'"' {
            (i + quoted(rest), false)
        } else if rest[0] == b'r' && !word_before(bytes, i) && raw_string(rest) > 0 {
            (i + raw_string(rest), false)
        } else if rest[0] == b'\'' && character(&text[i..]) > 0 {
            (i + character(&text[i..]), false)
        } else {
            i += 1;
            continue;
        };
        if is_comment || strings {
            erase(i, end);
        }
        i = end;
    }
    String::from_utf8(out).unwrap()
}

/// Something like `for` or `var` before an `r`; a `b` or `c` alone is part of a literal.
fn word_before(bytes: &[u8], i: usize) -> bool {
    let word = bytes[..i].iter().rev().take_while(|&&b| is_word(b as char)).count();
    word > 1 || (word == 1 && !matches!(bytes[i - 1], b'b' | b'c'))
}

fn block_comment(text: &[u8]) -> usize {
    let (mut depth, mut i) = (0, 0);
    while i < text.len() {
        if text[i..].starts_with(b"/*") {
            (depth, i) = (depth + 1, i + 2);
        } else if text[i..].starts_with(b"*/") {
            (depth, i) = (depth - 1, i + 2);
            if depth == 0 {
                break;
            }
        } else {
            i += 1;
        }
    }
    i
}

fn quoted(text: &[u8]) -> usize {
    let mut i = 1;
    while i < text.len() && text[i] != b'"' {
        i += if text[i] == b'\\' { 2 } else { 1 };
    }
    (i + 1).min(text.len())
}

/// Length of `r"..."` or `r#"..."#`; 0 where there is none.
fn raw_string(text: &[u8]) -> usize {
    let hashes = text[1..].iter().take_while(|&&b| b == b'#').count();
    if text.get(1 + hashes) != Some(&b'"') {
        return 0;
    }
    let close = [b"\"".as_slice(), &vec![b'#'; hashes]].concat();
    let body = &text[2 + hashes..];
    body.windows(close.len()).position(|w| w == close).map_or(text.len(), |at| 2 + hashes + at + close.len())
}

/// Length of a character literal; 0 for a lifetime.
fn character(text: &str) -> usize {
    let mut chars = text.char_indices().skip(1);
    match (chars.next(), chars.next()) {
        (Some((_, '\\')), Some((at, _))) => text[at + 1..].find('\'').map_or(0, |close| at + 1 + close + 1),
        (Some(_), Some((at, '\''))) => at + 1,
        _ => 0,
    }
}

/// Byte ranges of the items behind `#[cfg(test)]`.
fn test_items(code: &str) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    for (start, attribute) in code.match_indices("#[cfg(test)]") {
        let body = &code[start + attribute.len()..];
        let mut depth = 0usize;
        let mut end = body.len();
        for (i, c) in body.char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth = depth.saturating_sub(1),
                _ => {}
            }
            if depth == 0 && matches!(c, '}' | ';') {
                end = i + 1;
                break;
            }
        }
        found.push((start, start + attribute.len() + end));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blank_removes_comments_and_strings_and_keeps_lines() {
        let text =
            "a(\"x // y\"); // crate::b\n/* crate::c /* n */\n */ d('\"', '\\'', \"\\\"\"); r#\"crate::\"e\"#; fn f<'a>(x: &'a str) {}";
        let code = blank(text, true);
        assert_eq!((code.len(), code.matches('\n').count()), (text.len(), 2));
        assert!(!code.contains("crate::") && !code.contains('"') && code.contains("fn f<'a>(x: &'a str) {}"), "{code}");
        assert!(blank(text, false).contains("x // y"));
    }

    #[test]
    fn first_names_of_nested_groups_are_the_outer_ones() {
        assert_eq!(first_names("data::{a, b}"), ["data"]);
        assert_eq!(first_names("{ data::{a, b}, dist::c, self, rng }; {x}"), ["data", "dist", "rng"]);
    }

    #[test]
    fn test_items_end_with_their_brace() {
        let code = "fn a() {}\n#[cfg(test)]\nmod tests { fn b() { {} } }\nfn c() {}";
        let [(start, end)] = test_items(code)[..] else { panic!("one item expected") };
        assert_eq!(&code[start..end], "#[cfg(test)]\nmod tests { fn b() { {} } }");
    }
}
