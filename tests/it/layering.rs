//! The walls of the house: who may use whom, and what may stand only in some places. `src/ARCHITECTURE.md` says why.

use std::collections::{BTreeMap, BTreeSet};

use crate::rust_source::{Source, is_word, line_of, sources};

/// module -> modules that it may use. What is not here is not allowed; `cli`, `main` and `lib` may use everything.
const ALLOWED: &[(&str, &[&str])] = &[
    (
        "bench",
        &[
            "checkpoint",
            "config",
            "data",
            "digest",
            "dist",
            "formats",
            "json",
            "kernels",
            "model",
            "optim",
            "params",
            "peft",
            "rng",
            "telemetry",
            "tokenizer",
            "train",
        ],
    ),
    (
        "train",
        &[
            "checkpoint",
            "config",
            "data",
            "digest",
            "dist",
            "formats",
            "json",
            "kernels",
            "model",
            "optim",
            "params",
            "peft",
            "rng",
            "telemetry",
            "tokenizer",
        ],
    ),
    ("compare", &["checkpoint", "config", "data", "dist", "json", "telemetry", "train"]),
    ("config", &["data", "dist", "json", "model", "optim", "paths", "peft"]),
    ("peft", &["digest", "formats", "json", "kernels", "model", "params", "paths", "rng"]),
    ("model", &["digest", "formats", "json", "kernels", "paths", "rng"]),
    ("data", &["digest", "json", "rng", "shell", "tokenizer"]),
    ("tokenizer", &["digest", "rng"]),
    ("checkpoint", &["digest", "formats", "json", "params", "paths"]),
    ("optim", &["kernels", "params"]),
    ("telemetry", &["json"]),
    ("dist", &["kernels"]),
    ("kernels", &["digest", "rng"]),
    ("formats", &["json"]),
    ("params", &["kernels"]),
    ("paths", &[]),
    ("rng", &[]),
    ("shell", &[]),
    ("digest", &[]),
    ("json", &[]),
];
const SEES_ALL: &[&str] = &["cli", "main", "lib"];

/// Files that may hold `unsafe`, and for what.
const UNSAFE: &[(&str, &str)] = &[
    ("src/cli/allocator.rs", "mallopt and malloc_trim are C functions"),
    ("src/formats/map.rs", "memory-mapped files"),
    ("src/kernels/cuda/device.rs", "the loader and NVIDIA's driver are C libraries"),
    ("src/kernels/cuda/executor.rs", "kernels are started by NVIDIA's driver"),
    ("src/kernels/cuda/products.rs", "cuBLASLt is a C library"),
    ("src/kernels/cuda/staging.rs", "page-locked memory is the driver's"),
    ("src/kernels/on_gpu.rs", "results of kernels lie in memory that nobody cleared first"),
    ("src/kernels/gemm.rs", "tiles of registers"),
    ("src/kernels/matmul.rs", "results in uninitialised memory"),
];

/// Names of tuning methods, as words.
const METHODS: &[&str] = &[
    "ptuning",
    "p tuning",
    "prefix tuning",
    "prompt tuning",
    "lora",
    "dora",
    "rslora",
    "qlora",
    "houlsby",
    "pfeiffer",
    "adapter fusion",
    "ia3",
];
const NAME_NO_METHOD: &[&str] = &["compare", "model", "train", "dist", "checkpoint", "optim", "kernels", "data"];

const MAX_LINES: usize = 600;

fn src() -> Vec<Source> {
    sources("src")
}

/// `file:line: what` for each, or nothing.
fn assert_none(rule: &str, found: Vec<String>) {
    assert!(found.is_empty(), "{rule}:\n  {}\n", found.join("\n  "));
}

/// Lines where `needle` stands in the code as whole words.
fn lines_with(code: &str, needle: &str) -> Vec<usize> {
    let inside_word = |at: usize| {
        let behind = &code[at + needle.len()..];
        code[..at].ends_with(is_word) || (needle.ends_with(is_word) && behind.starts_with(is_word))
    };
    code.match_indices(needle).filter(|(at, _)| !inside_word(*at)).map(|(at, _)| line_of(code, at)).collect()
}

/// Each place where one of `needles` stands, outside the files that `allowed` accepts.
fn places(needles: &[&str], allowed: impl Fn(&Source) -> bool) -> Vec<String> {
    let mut found = Vec::new();
    for source in src().iter().filter(|s| !allowed(s)) {
        for needle in needles {
            found.extend(lines_with(&source.code, needle).iter().map(|line| format!("{}:{line}: {needle}", source.path)));
        }
    }
    found
}

/// `PtuningV2`, `ptuning_v2`, `p-tuning` -> words in lower case, one blank between.
fn words(text: &str) -> String {
    let mut out = String::from(" ");
    let mut before = ' ';
    for c in text.chars() {
        if !c.is_ascii_alphanumeric() {
            out.push(' ');
        } else {
            if c.is_ascii_uppercase() && before.is_ascii_lowercase() {
                out.push(' ');
            }
            out.push(c.to_ascii_lowercase());
        }
        before = c;
    }
    out.split_whitespace().map(|w| format!("{w} ")).fold(String::from(" "), |all, w| all + &w)
}

#[test]
fn every_top_level_module_stands_in_the_table() {
    let known: BTreeSet<&str> = ALLOWED.iter().map(|(m, _)| *m).chain(SEES_ALL.iter().copied()).collect();
    let there = src();
    let there: BTreeSet<&str> = there.iter().map(Source::module).collect();
    assert_eq!(there, known, "left: modules in src; right: modules in the table");
}

#[test]
fn table_of_edges_has_no_cycle() {
    let mut left: BTreeMap<&str, BTreeSet<&str>> = ALLOWED.iter().map(|(m, uses)| (*m, uses.iter().copied().collect())).collect();
    while let Some(leaf) = left.iter().find(|(_, uses)| uses.iter().all(|u| !left.contains_key(u))).map(|(m, _)| *m) {
        left.remove(leaf);
    }
    assert!(left.is_empty(), "in a cycle: {:?}", left.keys());
}

#[test]
fn modules_use_only_the_edges_in_the_table() {
    let table: BTreeMap<&str, &[&str]> = ALLOWED.iter().copied().collect();
    let mut found = Vec::new();
    for source in src() {
        let Some(allowed) = table.get(source.module()) else { continue };
        for (line, used) in source.crate_paths() {
            let is_module = ALLOWED.iter().any(|(m, _)| *m == used) || used == "cli";
            if is_module && used != source.module() && !allowed.contains(&used.as_str()) {
                found.push(format!("{}:{line}: {} uses {used}", source.path, source.module()));
            }
        }
    }
    assert_none("edges that the table does not allow", found);
}

#[test]
fn lower_modules_name_no_method() {
    let mut found = Vec::new();
    for source in src().iter().filter(|s| NAME_NO_METHOD.contains(&s.module())) {
        for (i, line) in source.code_and_strings.lines().enumerate() {
            let line_words = words(line);
            found.extend(
                METHODS.iter().filter(|m| line_words.contains(&format!(" {m} "))).map(|m| format!("{}:{}: {m}", source.path, i + 1)),
            );
        }
    }
    assert_none("methods are values of peft; these modules know none by name", found);
}

#[test]
fn feature_switches_stand_in_dist_and_kernels_only() {
    let device_choice = |s: &Source| matches!(s.module(), "dist" | "kernels") || s.path == "src/train/device.rs";
    assert_none("cfg(feature) outside dist, kernels and the device choice", places(&["cfg(feature", "cfg!(feature"], device_choice));
}

#[test]
fn standard_output_environment_and_exit_belong_to_the_command_line() {
    let cli = |s: &Source| matches!(s.module(), "cli" | "main");
    assert_none("only cli and main.rs may do this", places(&["println!", "print!", "std::env", "env::var", "stdout()"], cli));
    let may_exit = |s: &Source| matches!(s.module(), "cli" | "main" | "dist");
    assert_none("only cli, main.rs and an abort of dist end the process", places(&["process::exit", "process::abort"], may_exit));
}

/// Files that parse messages between processes of one run, which are no files of a user's.
const PARSE_MESSAGES: &[&str] = &["src/cli/bench.rs", "src/compare/run.rs", "src/data/wire.rs", "src/dist/watch.rs", "src/train/save.rs"];

#[test]
fn json_files_are_read_by_one_reader() {
    let readers = ["serde_json::from_slice", "serde_json::from_str", "serde_json::from_reader"];
    let found = places(&readers, |s| s.module() == "json" || PARSE_MESSAGES.contains(&s.path.as_str()));
    assert_none("only src/json.rs refuses keys given twice: use it", found);
}

#[test]
fn unsafe_stands_only_in_the_files_of_the_list() {
    assert_none("unsafe code", places(&["unsafe", "allow(unsafe_code"], |s| UNSAFE.iter().any(|(file, _)| *file == s.path)));
}

#[test]
fn no_source_file_is_longer_than_600_lines() {
    let long = sources("src").into_iter().chain(sources("tests")).filter(|s| s.text.lines().count() > MAX_LINES);
    assert_none("split these", long.map(|s| format!("{}: {} lines", s.path, s.text.lines().count())).collect());
}

#[test]
fn words_of_identifiers_are_split_at_case_and_underscore() {
    assert_eq!(words("PtuningV2{lora_rank}p-tuning"), " ptuning v2 lora rank p tuning ");
}
