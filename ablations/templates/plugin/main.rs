//! The whole program dinolab, with the plugins of this crate.

use my_plugin as _;

fn main() -> std::process::ExitCode {
    dinolab::cli::main()
}
