//! The program `dinolab`.

fn main() -> std::process::ExitCode {
    dinolab::cli::main()
}
