//! Planted errors: each is compiled into its kernel, and a case of the kernel's file must find it. `scripts/mutate_kernels.sh` prints the table.

mod adamw;
mod attention;
mod column_sums;
mod columns;
mod cross_entropy;
mod device;
mod dropout;
mod elementwise;
mod embedding;
mod non_finite;
mod rms_norm;
mod rotary;
mod swiglu;
mod tanh;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use glmddp::kernels::check::cases;
use glmddp::kernels::cuda;

use crate::kernels::problem;
use crate::libraries::{Driver, again, build, checked, is_inside, sources, text, this_test};

/// The files whose cases a process of its own runs, separated by commas.
const FILES: &str = "GLMDDP_TEST_FILES";
/// Begins the line in which it says what it has found.
const FOUND: &str = "found by ";

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
    Planted { file: "dropout.cu", mutations: dropout::DROPOUT, survivors: &[], found_by: &["dropout"] },
    Planted { file: "elementwise.cu", mutations: elementwise::ELEMENTWISE, survivors: &[], found_by: &["elementwise"] },
    Planted { file: "embedding.cu", mutations: embedding::EMBEDDING, survivors: &[], found_by: &["embedding"] },
    Planted { file: "non_finite.cu", mutations: non_finite::NON_FINITE, survivors: &[], found_by: &["non_finite"] },
    Planted { file: "philox.cuh", mutations: dropout::PHILOX, survivors: &[], found_by: &["dropout"] },
    Planted { file: "rms_norm.cu", mutations: rms_norm::RMS_NORM, survivors: &[], found_by: &["rms_norm"] },
    Planted { file: "rotary.cu", mutations: rotary::ROTARY, survivors: &[], found_by: &["rotary"] },
    Planted { file: "swiglu.cu", mutations: swiglu::SWIGLU, survivors: &[], found_by: &["swiglu"] },
    Planted { file: "tanh.cu", mutations: tanh::TANH, survivors: &[], found_by: &["tanh"] },
];

/// The sources of which the cases of `file` launch kernels.
fn sources_of(file: &str) -> Vec<PathBuf> {
    let beside = match file {
        "attention" => "attention_f32",
        "rms_norm" => "column_sums",
        _ => file,
    };
    let mut names = vec![file, beside];
    names.dedup();
    names.into_iter().map(|name| sources().join(format!("{name}.cu"))).collect()
}

/// How the cases of `kernels` find that `change` was made to the text of `file`, in a folder of its own; none if they do not.
fn found_by(file: &Path, kernels: &[&str], change: impl Fn(&str) -> String) -> Option<String> {
    let folder = tempfile::tempdir().unwrap();
    let (changed, libraries) = (folder.path().join("sources"), folder.path().join("libraries"));
    std::fs::create_dir(&changed).unwrap();
    for path in kernels.iter().flat_map(|name| sources_of(name)).chain(headers()) {
        std::fs::copy(&path, changed.join(path.file_name().unwrap())).unwrap();
    }
    std::fs::write(changed.join(file.file_name().unwrap()), change(&std::fs::read_to_string(file).unwrap())).unwrap();
    // What does not change is not built again.
    copy_folder(checked(), &libraries);
    build(&libraries, true, &changed).unwrap_or_else(|error| panic!("{} does not compile: {error}", file.display()));
    let output = again(RUN, &libraries, &[(FILES, &kernels.join(","))]);
    let said = text(&output);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
    let after = |start: &str| said.lines().find_map(|line| line.strip_prefix(start));
    // A fault has its name from the stand-in.
    after(FOUND).map(|found| after("stand-in driver: ").map_or_else(|| found.to_owned(), |fault| format!("{found}: {fault}")))
}

const RUN: &str = "mutations::cases_of_a_process_of_its_own";

/// What [`found_by`] starts.
#[test]
#[ignore = "it is started by the other tests of this file"]
fn cases_of_a_process_of_its_own() {
    assert_eq!(this_test!(), RUN);
    let Ok(files) = std::env::var(FILES) else { return };
    assert!(is_inside());
    let (gpu, driver) = (cuda::open(0).unwrap(), Driver::loaded());
    for case in cases().iter().filter(|case| files.split(',').any(|file| file == case.file)) {
        if let Some(problem) = problem(&*gpu, &driver, case, 1.0) {
            println!("\n{FOUND}{} {}: {}", case.file, case.name, problem.replace('\n', " "));
            return;
        }
    }
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        let (path, copy) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type().unwrap().is_dir() {
            copy_folder(&path, &copy);
        } else {
            std::fs::copy(&path, &copy).unwrap();
        }
    }
}

/// The headers of kernels.
fn headers() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(sources()).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.extension().is_some_and(|end| end == "cuh")).collect()
}

fn check(file: &str) {
    let Planted { mutations, survivors, found_by: kernels, .. } =
        ALL.iter().find(|planted| planted.file == file).expect("a file with mutations");
    let path = sources().join(file);
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
    let kernels = std::fs::read_dir(sources()).unwrap().map(|entry| entry.unwrap().path());
    let kernels = kernels.filter(|path| path.extension().is_some_and(|end| end == "cu"));
    let missing: Vec<PathBuf> = kernels.filter(|path| !with_mutations.iter().any(|file| path.ends_with(file))).collect();
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
fn dropout_planted_errors_are_found() {
    check("dropout.cu");
}

#[test]
#[ignore = "all of them take minutes: scripts/mutate_kernels.sh"]
fn philox_planted_errors_are_found() {
    check("philox.cuh");
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

#[test]
#[ignore = "all of them take minutes: scripts/mutate_kernels.sh"]
fn tanh_planted_errors_are_found() {
    check("tanh.cu");
}
