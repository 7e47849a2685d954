//! Planted errors: each is compiled into its kernel, and a case of the kernel's file must find it. `scripts/mutate_kernels.sh` prints the table.

mod adamw;
mod attention;
mod column_sums;
mod columns;
mod cross_entropy;
mod device;
mod elementwise;
mod embedding;
mod non_finite;
mod rms_norm;
mod rotary;
mod swiglu;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use glmddp::kernels::check::{Case, cases};

use crate::shim::{Order, Shim, sources, sources_of};

/// A line's part, which occurs once in the file, and what it becomes.
pub type Mutation = (&'static str, &'static str);

/// Errors that no case can find, by what they change, and why.
pub type Survivor = (&'static str, &'static str);

/// What is planted into which file, and the kernels whose cases must find it.
struct Planted {
    file: &'static str,
    mutations: &'static [Mutation],
    survivors: &'static [Survivor],
    found_by: &'static [&'static str],
}

const ALL: &[Planted] = &[
    Planted { file: "adamw.cu", mutations: adamw::ADAMW, survivors: &[], found_by: &["adamw"] },
    Planted { file: "attention.cu", mutations: attention::ATTENTION, survivors: &[], found_by: &["attention"] },
    Planted { file: "attention_f32.cu", mutations: attention::ATTENTION_F32, survivors: &[], found_by: &["attention_f32"] },
    Planted { file: "column_sums.cu", mutations: column_sums::COLUMN_SUMS, survivors: &[], found_by: &["column_sums"] },
    Planted { file: "columns.cuh", mutations: columns::COLUMNS, survivors: &[], found_by: &["column_sums", "rms_norm"] },
    Planted { file: "cross_entropy.cu", mutations: cross_entropy::CROSS_ENTROPY, survivors: &[], found_by: &["cross_entropy"] },
    Planted { file: "device.cuh", mutations: device::MUTATIONS, survivors: &[], found_by: &["rms_norm"] },
    Planted { file: "elementwise.cu", mutations: elementwise::ELEMENTWISE, survivors: &[], found_by: &["elementwise"] },
    Planted { file: "embedding.cu", mutations: embedding::EMBEDDING, survivors: &[], found_by: &["embedding"] },
    Planted { file: "non_finite.cu", mutations: non_finite::NON_FINITE, survivors: &[], found_by: &["non_finite"] },
    Planted { file: "rms_norm.cu", mutations: rms_norm::RMS_NORM, survivors: &[], found_by: &["rms_norm"] },
    Planted { file: "rotary.cu", mutations: rotary::ROTARY, survivors: &[], found_by: &["rotary"] },
    Planted { file: "swiglu.cu", mutations: swiglu::SWIGLU, survivors: &[], found_by: &["swiglu"] },
];

/// How the cases of `kernels` find that `change` was made to the text of `file`; none where they do not.
fn found_by(file: &Path, kernels: &[&str], change: impl Fn(&str) -> String) -> Option<String> {
    let folder = tempfile::tempdir().unwrap();
    let mut sources: Vec<PathBuf> = kernels.iter().flat_map(|name| sources_of(name)).collect();
    sources.sort();
    sources.dedup();
    // A header is found beside the file that includes it.
    for path in sources.iter().chain(&headers()) {
        std::fs::copy(path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    std::fs::write(folder.path().join(file.file_name().unwrap()), change(&std::fs::read_to_string(file).unwrap())).unwrap();
    let copies: Vec<PathBuf> = sources.iter().map(|path| folder.path().join(path.file_name().unwrap())).collect();
    let shim = Shim::compile(&copies).unwrap_or_else(|error| panic!("{} does not compile: {error}", file.display()));
    let cases: Vec<Case> = cases().into_iter().filter(|case| kernels.contains(&case.file)).collect();
    let found = |order: Order| {
        cases.iter().find_map(|case| shim.run(case, order).err().map(|error| format!("{} {}: {error}", case.file, case.name)))
    };
    found(Order::Ascending).or_else(|| found(Order::Descending)).or_else(|| {
        let differs = |case: &&Case| {
            let [first, second] = [Order::Ascending, Order::Shuffled].map(|order| shim.run(case, order).ok());
            first != second
        };
        cases.iter().find(differs).map(|case| format!("{} {}: the order of threads shows", case.file, case.name))
    })
}

/// The headers of kernels.
fn headers() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(sources()[0].parent().unwrap()).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.extension().is_some_and(|end| end == "cuh")).collect()
}

fn check(file: &str) {
    let Planted { mutations, survivors, found_by: kernels, .. } =
        ALL.iter().find(|planted| planted.file == file).expect("a file with mutations");
    let path = sources()[0].with_file_name(file);
    assert_eq!(found_by(&path, kernels, str::to_owned), None, "without an error nothing is found");
    let mut table = String::new();
    let mut wrong = Vec::new();
    for &(find, replace) in *mutations {
        let found = found_by(&path, kernels, |text| {
            assert_eq!(text.matches(find).count(), 1, "{file}: `{find}` must occur once");
            text.replacen(find, replace, 1)
        });
        let why = survivors.iter().find(|(survivor, _)| *survivor == find).map(|(_, why)| *why);
        let text = match (&found, why) {
            (Some(found), None) => found.clone(),
            (None, Some(why)) => format!("survives: {why}"),
            (None, None) => {
                wrong.push(format!("`{find}` -> `{replace}` is not found"));
                "NOT FOUND".to_owned()
            }
            (Some(found), Some(_)) => {
                wrong.push(format!("`{find}` -> `{replace}` is said to survive, and is found: {found}"));
                found.clone()
            }
        };
        let cell = |text: &str| text.replace('|', "\\|").split_whitespace().collect::<Vec<_>>().join(" ");
        let _ = writeln!(table, "| {file} | `{}` | `{}` | {} |", cell(find), cell(replace), cell(&text));
    }
    print!("{table}");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn planted_errors_are_at_least_sixty_and_at_most_one_in_twenty_survives() {
    let mutations: usize = ALL.iter().map(|planted| planted.mutations.len()).sum();
    let survivors: usize = ALL.iter().map(|planted| planted.survivors.len()).sum();
    assert!(mutations >= 60 && survivors * 20 <= mutations, "{mutations} mutations, {survivors} survive");
    let with_mutations: Vec<&str> = ALL.iter().map(|planted| planted.file).collect();
    let missing: Vec<PathBuf> = sources().into_iter().filter(|path| !with_mutations.iter().any(|file| path.ends_with(file))).collect();
    assert!(missing.is_empty(), "without mutations: {missing:?}");
}

#[test]
#[ignore = "all of them take minutes: scripts/mutate_kernels.sh"]
fn adamw_planted_errors_are_found() {
    check("adamw.cu");
}

#[test]
#[ignore = "all of them take minutes: scripts/mutate_kernels.sh"]
fn attention_planted_errors_are_found() {
    check("attention.cu");
}

#[test]
#[ignore = "all of them take minutes: scripts/mutate_kernels.sh"]
fn attention_f32_planted_errors_are_found() {
    check("attention_f32.cu");
}

#[test]
#[ignore = "all of them take minutes: scripts/mutate_kernels.sh"]
fn column_sums_planted_errors_are_found() {
    check("column_sums.cu");
}

#[test]
#[ignore = "all of them take minutes: scripts/mutate_kernels.sh"]
fn columns_planted_errors_are_found() {
    check("columns.cuh");
}

#[test]
#[ignore = "all of them take minutes: scripts/mutate_kernels.sh"]
fn cross_entropy_planted_errors_are_found() {
    check("cross_entropy.cu");
}

#[test]
fn device_planted_errors_are_found() {
    check("device.cuh");
}

#[test]
#[ignore = "all of them take minutes: scripts/mutate_kernels.sh"]
fn elementwise_planted_errors_are_found() {
    check("elementwise.cu");
}

#[test]
#[ignore = "all of them take minutes: scripts/mutate_kernels.sh"]
fn embedding_planted_errors_are_found() {
    check("embedding.cu");
}

#[test]
#[ignore = "all of them take minutes: scripts/mutate_kernels.sh"]
fn non_finite_planted_errors_are_found() {
    check("non_finite.cu");
}

#[test]
#[ignore = "all of them take minutes: scripts/mutate_kernels.sh"]
fn rms_norm_planted_errors_are_found() {
    check("rms_norm.cu");
}

#[test]
#[ignore = "all of them take minutes: scripts/mutate_kernels.sh"]
fn rotary_planted_errors_are_found() {
    check("rotary.cu");
}

#[test]
#[ignore = "all of them take minutes: scripts/mutate_kernels.sh"]
fn swiglu_planted_errors_are_found() {
    check("swiglu.cu");
}
