//! Planted errors: each is compiled into its kernel, and a case of the kernel's file must find it. `scripts/mutate_kernels.sh` prints the table.

mod device;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use glmddp::kernels::check::{Case, cases};

use crate::shim::{Order, Shim, sources};

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

const ALL: &[Planted] =
    &[Planted { file: "device.cuh", mutations: device::MUTATIONS, survivors: device::SURVIVORS, found_by: &["rms_norm"] }];

/// How the cases find the mutation; none where they do not.
fn found_by(file: &Path, kernels: &[&str], (find, replace): Mutation) -> Option<String> {
    let text = std::fs::read_to_string(file).unwrap();
    assert_eq!(text.matches(find).count(), 1, "{}: `{find}` must occur once", file.display());
    let folder = tempfile::tempdir().unwrap();
    // A header is found beside the file that includes it.
    let sources: Vec<PathBuf> = sources().into_iter().filter(|path| kernels.iter().any(|name| stem(path) == *name)).collect();
    for path in sources.iter().chain([&file.with_file_name("device.cuh")]) {
        std::fs::copy(path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    std::fs::write(folder.path().join(file.file_name().unwrap()), text.replacen(find, replace, 1)).unwrap();
    let copies: Vec<PathBuf> = sources.iter().map(|path| folder.path().join(path.file_name().unwrap())).collect();
    let shim = Shim::compile(&copies).unwrap_or_else(|error| panic!("`{replace}` does not compile: {error}"));
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

fn stem(path: &Path) -> String {
    path.file_stem().unwrap().to_string_lossy().into_owned()
}

fn check(file: &str) {
    let Planted { mutations, survivors, found_by: kernels, .. } =
        ALL.iter().find(|planted| planted.file == file).expect("a file with mutations");
    let path = sources()[0].with_file_name(file);
    let mut table = String::new();
    let mut wrong = Vec::new();
    for &(find, replace) in *mutations {
        let found = found_by(&path, kernels, (find, replace));
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
fn device_planted_errors_are_found() {
    check("device.cuh");
}
