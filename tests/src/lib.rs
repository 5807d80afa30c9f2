//! Tests that cross crates: what they share, and the pages of the book whose Rust is compiled as documentation tests.

pub mod emulator;
pub mod program;
pub mod recipes;

/// Pages, by name.
#[cfg(doctest)]
mod pages {
    #[doc = include_str!("../../book/src/checks.md")]
    mod checks {}
    #[doc = include_str!("../../book/src/contracts/optimizer.md")]
    mod optimizer {}
    #[doc = include_str!("../../book/src/plugins.md")]
    mod plugins {}
}
