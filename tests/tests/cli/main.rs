//! What the program says and refuses: recipes, keys, files and schemas, the live page.

mod bad_input;
mod check;
mod fuzz_recipes;
mod old_files;
mod output;
mod ranges;
mod recipe;
mod schemas;
mod watch;
