//! Paths as users write them: `~` and `$NAME` become what they stand for, and what is near a path that is not there.

use std::path::{Path, PathBuf};

/// At most this many names stand in a hint.
const SHOWN: usize = 5;
/// Two names are alike from here on (Jaro-Winkler, 1 for equal names).
const ALIKE: f64 = 0.8;

/// `text` with a `~` at its beginning, `$NAME` and `${NAME}` replaced by what `env` has, as a shell does, and `$$` by `$`.
///
/// # Errors
/// The reason: a variable that is not set or empty, another user's home, or a `${` that names no variable.
pub fn expand(text: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<String, String> {
    let variable =
        |name: &str| env(name).filter(|value| !value.is_empty()).ok_or_else(|| format!("the environment variable {name} is not set"));
    let (mut out, mut rest) = match text.strip_prefix('~') {
        None => (String::new(), text),
        Some(behind) if behind.is_empty() || behind.starts_with('/') => (variable("HOME")?, behind),
        Some(behind) => {
            let user = behind.split('/').next().unwrap_or(behind);
            return Err(format!(
                "`~{user}` is another user's home, which is not looked up: write the whole path, or `./~{user}` for that name"
            ));
        }
    };
    while let Some((before, behind)) = rest.split_once('$') {
        out.push_str(before);
        if let Some(after) = behind.strip_prefix('$') {
            out.push('$');
            rest = after;
            continue;
        }
        let (name, after) = match behind.strip_prefix('{') {
            Some(inner) => inner.split_once('}').ok_or_else(|| format!("`${behind}` has no `}}`"))?,
            None => behind.split_at(behind.find(|c: char| !is_in_name(c)).unwrap_or(behind.len())),
        };
        let is_name = name.chars().all(is_in_name) && name.starts_with(|c: char| !c.is_ascii_digit());
        if is_name {
            out.push_str(&variable(name)?);
            rest = after;
        } else if behind.starts_with('{') {
            return Err(format!("`${{{name}}}` names no variable"));
        } else {
            out.push('$');
            rest = behind;
        }
    }
    Ok(out + rest)
}

/// `path` so that [`expand`] gives it back.
pub fn escape(path: &str) -> String {
    let path = path.replace('$', "$$");
    if path.starts_with('~') { format!("./{path}") } else { path }
}

/// As [`expand`], of paths separated by commas.
///
/// # Errors
/// As [`expand`], of the first that cannot be expanded.
pub fn expand_list(text: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<String, String> {
    let paths: Result<Vec<String>, String> = text.split(',').map(|path| expand(path.trim(), env)).collect();
    Ok(paths?.join(","))
}

fn is_in_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// What a path should lead to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Folder,
    File,
}

/// A path that leads to nothing, or to the other kind of thing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.text())]
pub struct NotThere {
    pub path: PathBuf,
    pub expected: Kind,
}

/// # Errors
/// When there is no folder at `path`.
pub fn expect_folder(path: &Path) -> Result<(), NotThere> {
    if path.is_dir() { Ok(()) } else { Err(NotThere { path: path.to_owned(), expected: Kind::Folder }) }
}

/// # Errors
/// When there is nothing at `path`, or a folder. What is neither (a pipe) counts as a file.
pub fn expect_file(path: &Path) -> Result<(), NotThere> {
    if path.exists() && !path.is_dir() { Ok(()) } else { Err(NotThere { path: path.to_owned(), expected: Kind::File }) }
}

impl NotThere {
    fn text(&self) -> String {
        let path = self.path.display();
        match (self.expected, self.path.exists()) {
            (Kind::Folder, true) => format!("expected a folder, found a file: {path}"),
            (Kind::File, true) => format!("expected a file, found a folder: {path}"),
            (Kind::Folder, false) => format!("no such folder: {path}"),
            (Kind::File, false) => format!("no such file: {path}"),
        }
    }

    /// What may have been meant.
    pub fn hint(&self) -> Option<String> {
        match (self.expected, self.path.exists()) {
            (Kind::Folder, true) => {
                let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty())?;
                Some(format!("is `{}` meant?", folder.display()))
            }
            (Kind::File, true) => there(&self.path, Kind::File),
            (_, false) => self.near(),
        }
    }

    /// The hint, if there is one, and `more` behind it.
    pub fn hint_and(&self, more: &str) -> String {
        match self.hint() {
            None => more.to_owned(),
            Some(hint) if hint.ends_with('?') => format!("{hint} {more}"),
            Some(hint) => format!("{hint}; {more}"),
        }
    }

    /// Names like the first one that is missing, or else what there is instead of it.
    fn near(&self) -> Option<String> {
        let is_there = |folder: &Path| folder.as_os_str().is_empty() || folder.is_dir();
        let missing = self.path.ancestors().find(|path| path.parent().is_some_and(is_there))?;
        let (folder, name) = (missing.parent()?, missing.file_name()?.to_str()?.to_lowercase());
        let kind = if missing == self.path { self.expected } else { Kind::Folder };
        let score = |other: &String| strsim::jaro_winkler(&name, &other.to_lowercase());
        let best = names(folder, kind).into_iter().map(|other| (score(&other), other)).max_by(|a, b| a.0.total_cmp(&b.0));
        match best.filter(|(score, _)| *score >= ALIKE) {
            Some((_, other)) => Some(format!("is `{}` meant?", folder.join(other).display())),
            None => there(folder, kind),
        }
    }
}

/// `there are a, b and 3 more`: the names of one kind in a folder.
fn there(folder: &Path, kind: Kind) -> Option<String> {
    let names = names(folder, kind);
    let shown: Vec<String> = names.iter().take(SHOWN).map(|name| format!("`{}`", folder.join(name).display())).collect();
    let more = if names.len() > SHOWN { format!(" and {} more", names.len() - SHOWN) } else { String::new() };
    if shown.is_empty() { None } else { Some(format!("there are {}{more}", shown.join(", "))) }
}

/// Names of one kind in a folder, sorted, without hidden ones.
fn names(folder: &Path, kind: Kind) -> Vec<String> {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let fits = |path: PathBuf| path.is_dir() == (kind == Kind::Folder);
    let mut names: Vec<String> =
        entries.filter(|entry| fits(entry.path())).filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.retain(|name| !name.starts_with('.'));
    names.sort_unstable();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(name: &str) -> Option<String> {
        [("HOME", "/home/me"), ("SCRATCH", "/scratch/me"), ("EMPTY", "")].iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned())
    }

    #[test]
    fn tilde_and_variables_become_what_they_stand_for() {
        for (text, expected) in [
            ("~", "/home/me"),
            ("~/", "/home/me/"),
            ("~/out/a b", "/home/me/out/a b"),
            ("$HOME/out", "/home/me/out"),
            ("${HOME}out", "/home/meout"),
            ("$SCRATCH/run_$HOME", "/scratch/me/run_/home/me"),
            ("out/~/x", "out/~/x"),
            ("a~", "a~"),
            ("./~me", "./~me"),
            ("price$", "price$"),
            ("$5/x", "$5/x"),
            ("a$$b", "a$b"),
            ("$$HOME/$$$HOME", "$HOME/$/home/me"),
            ("$$", "$"),
            ("$${HOME}", "${HOME}"),
            ("", ""),
        ] {
            assert_eq!(expand(text, &env).as_deref(), Ok(expected), "{text}");
        }
    }

    #[test]
    fn escaped_path_is_expanded_to_itself() {
        for path in ["out", "/a b/c", "a$b", "$HOME", "${HOME}/$", "$$", "price$", "a~b/~"] {
            assert_eq!(expand(&escape(path), &env).as_deref(), Ok(path));
        }
        assert_eq!(expand(&escape("~"), &env).as_deref(), Ok("./~"));
    }

    #[test]
    fn path_that_cannot_be_expanded_says_why() {
        for (text, reason) in [
            ("~bob/x", "`~bob` is another user's home, which is not looked up: write the whole path, or `./~bob` for that name"),
            ("~+", "`~+` is another user's home, which is not looked up: write the whole path, or `./~+` for that name"),
            ("$WORK/x", "the environment variable WORK is not set"),
            ("${WORK}/x", "the environment variable WORK is not set"),
            ("$EMPTY/x", "the environment variable EMPTY is not set"),
            ("${HOME/x", "`${HOME/x` has no `}`"),
            ("${HOME:-x}", "`${HOME:-x}` names no variable"),
            ("${}", "`${}` names no variable"),
        ] {
            assert_eq!(expand(text, &env), Err(reason.to_owned()), "{text}");
        }
        assert_eq!(expand_list("~/a, $SCRATCH/b,c", &env).as_deref(), Ok("/home/me/a,/scratch/me/b,c"));
        assert_eq!(expand("~/x", &|_| None), Err("the environment variable HOME is not set".to_owned()));
    }

    #[test]
    fn path_that_is_not_there_names_what_is_near() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["models/chatglm2-6b", "models/tiny", "out", "many/a", "many/b", "many/c", "many/d", "many/e", "many/f", ".hidden"] {
            std::fs::create_dir_all(dir.path().join(name)).unwrap();
        }
        std::fs::write(dir.path().join("models/run.toml"), b"").unwrap();
        let told = |result: Result<(), NotThere>| {
            let error = result.unwrap_err();
            format!("{error} | {}", error.hint().unwrap_or_default()).replace(&format!("{}/", dir.path().display()), "")
        };
        let folder = |name: &str| told(expect_folder(&dir.path().join(name)));
        let file = |name: &str| told(expect_file(&dir.path().join(name)));
        assert_eq!(folder("models/chatglm2_6b"), "no such folder: models/chatglm2_6b | is `models/chatglm2-6b` meant?");
        assert_eq!(folder("model/tiny"), "no such folder: model/tiny | is `models` meant?");
        assert_eq!(folder("many/xyz"), "no such folder: many/xyz | there are `many/a`, `many/b`, `many/c`, `many/d`, `many/e` and 1 more");
        assert_eq!(folder("out/xyz"), "no such folder: out/xyz | ");
        assert_eq!(folder("models/run.toml"), "expected a folder, found a file: models/run.toml | is `models` meant?");
        assert_eq!(file("models/ruin.toml"), "no such file: models/ruin.toml | is `models/run.toml` meant?");
        assert_eq!(file("models"), "expected a file, found a folder: models | there are `models/run.toml`");
        assert!(expect_folder(&dir.path().join("models/tiny")).is_ok() && expect_file(&dir.path().join("models/run.toml")).is_ok());
    }
}
