//! Text in columns.

/// Labels and texts in two columns; the lines of a text stand below each other.
pub fn columns(rows: &[(String, String)]) -> String {
    let width = rows.iter().map(|(label, _)| label.chars().count()).max().unwrap_or(0);
    let mut out = String::new();
    for (label, text) in rows {
        for (i, line) in text.lines().enumerate() {
            let label = if i == 0 { label.as_str() } else { "" };
            out.push_str(format!("{label:width$}  {line}").trim_end());
            out.push('\n');
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_with_a_text_of_two_lines_are_aligned() {
        let rows = [("a".to_owned(), "x\ny".to_owned()), ("long".to_owned(), "z".to_owned())];
        assert_eq!(columns(&rows), "a     x\n      y\nlong  z\n");
    }
}
