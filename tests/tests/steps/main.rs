//! The trainer inside this process: steps, teachers, ranks, views, runs that go back. No test here starts a program: for a moment
//! a new process holds the locks that this one holds.

mod engine;
mod finite;
mod gram_teacher;
mod lab;
mod parts;
mod ranks;
mod rewind;
mod teachers;
mod views;
