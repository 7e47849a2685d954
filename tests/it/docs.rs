//! What the documentation names is there.

use std::path::Path;

use crate::rust_source::files_below;

pub const PAGES: &[&str] = &[
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "src/ARCHITECTURE.md",
    "src/checkpoint/FORMAT.md",
    "src/kernels/PERFORMANCE.md",
    "launch/README.md",
];
/// Top-level names of the repository: something in backticks that starts with one of them is a path.
const TREES: &[&str] = &["src/", "launch/", "configs/", "tests/", "benches/", "scripts/", ".ci/", ".config/"];
/// Files at the top that are named without a folder.
const TOP: &[&str] = &["Cargo.toml", "clippy.toml", "deny.toml", "LICENSE", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"];
/// In paths that stand for many.
const PLACEHOLDERS: &[&str] = &["NAME", "OP.rs", "*", "<", "{", "$", "…"];

/// Targets of `[text](target)` that are neither addresses nor anchors.
fn relative_links(page: &str) -> Vec<&str> {
    page.split("](").skip(1).filter_map(|rest| rest.split(')').next()).filter(|t| !t.contains("://") && !t.starts_with('#')).collect()
}

/// Paths of this repository in `backticks` and in code blocks; patterns and placeholders are left out.
fn paths(page: &str) -> Vec<&str> {
    page.split(|c: char| c.is_whitespace() || "`()\"',;=".contains(c))
        .map(|word| word.trim_end_matches(['.', ':']).trim_start_matches("./"))
        .filter(|word| TREES.iter().any(|t| word.starts_with(t)) || TOP.contains(word))
        .filter(|word| !PLACEHOLDERS.iter().any(|p| word.contains(p)))
        .collect()
}

#[test]
fn pages_name_only_files_that_are_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut missing = Vec::new();
    for page in PAGES {
        let text = std::fs::read_to_string(root.join(page)).unwrap();
        let folder = root.join(page);
        let folder = folder.parent().unwrap();
        let links = relative_links(&text).into_iter().map(|link| (link, folder.join(link.split('#').next().unwrap())));
        let named = paths(&text).into_iter().map(|path| (path, root.join(path.split('#').next().unwrap())));
        missing.extend(links.chain(named).filter(|(_, path)| !path.exists()).map(|(name, _)| format!("{page}: {name}")));
    }
    assert!(missing.is_empty(), "not there:\n  {}\n", missing.join("\n  "));
}

#[test]
fn architecture_page_fits_its_bound() {
    let text = include_str!("../../src/ARCHITECTURE.md");
    assert!(text.lines().count() <= 150, "{} lines", text.lines().count());
}

#[test]
fn scripts_start_with_a_line_that_says_what_they_do() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for path in files_below(&root.join("scripts"), "sh") {
        let text = std::fs::read_to_string(&path).unwrap();
        let mut lines = text.lines();
        assert_eq!(lines.next(), Some("#!/usr/bin/env bash"), "{}", path.display());
        assert!(lines.next().is_some_and(|l| l.starts_with("# ")), "{}", path.display());
        assert!(text.contains("set -euo pipefail"), "{}", path.display());
    }
}
