//! The command-line program; see `glmddp --help`.

fn main() -> std::process::ExitCode {
    glmddp::cli::main()
}
