//! Words of commands in hints, quoted so that a POSIX shell and this program's command line read them back.

/// `word` as a shell reads it back. A NUL, which no word can hold, is left out.
pub fn quoted(word: &str) -> String {
    let word = word.replace('\0', "");
    shlex::try_quote(&word).map(Into::into).unwrap_or_default()
}

/// `path` as a shell reads it back; not as an option, even if it begins with a dash.
pub fn quoted_path(path: &std::path::Path) -> String {
    let path = path.display().to_string();
    quoted(&if path.starts_with('-') { format!("./{path}") } else { path })
}

/// `--name value`, or `--name=value` where the value could be taken for an option.
pub fn option(name: &str, value: &str) -> String {
    let separator = if value.starts_with('-') { '=' } else { ' ' };
    format!("--{name}{separator}{}", quoted(value))
}

/// Whether `text` can be shown and pasted on one line: it is not empty and has no control character.
pub fn is_plain(text: &str) -> bool {
    !text.is_empty() && !text.chars().any(char::is_control)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoted_words_are_read_back_by_a_shell() {
        for word in
            ["summary", " summary", "it's", "a\"b", "$HOME", "`id`", "a;b", "a\tb", "-x", "--x y", "摘要", "", "a\nb", "\\", "!x", "~"]
        {
            assert_eq!(shlex::split(&quoted(word)), Some(vec![word.to_owned()]), "{word:?}");
            let run = std::process::Command::new("sh").args(["-c", &format!("printf %s {}", quoted(word))]).output().unwrap();
            assert_eq!(String::from_utf8(run.stdout).unwrap(), word);
        }
        assert_eq!(quoted("a\0b"), "ab");
    }

    #[test]
    fn options_are_joined_only_to_values_that_begin_with_a_dash() {
        let shown = ["summary", " summary", "-x", "--a b"].map(|value| option("response_column", value)).join(" ");
        assert_eq!(shown, "--response_column summary --response_column ' summary' --response_column=-x --response_column='--a b'");
    }
}
