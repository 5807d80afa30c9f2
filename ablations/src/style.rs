//! What is printed, and how: the one place that writes to stdout and stderr. Colour on terminals only; names that hold
//! commands for the terminal are shown, not sent; a reader that goes away (`| head`), a full disk behind `>` or a terminal
//! that is gone ends nothing.

use std::io::{Error, ErrorKind, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Mutex;

use dinolab_core::text::printable;

/// Styles for one stream; plain text when it is not a terminal, a dumb one, or `NO_COLOR` is set.
#[derive(Clone, Copy, Debug)]
pub struct Style {
    colour: bool,
}

/// Styles for what goes to stdout.
pub fn out() -> Style {
    Style { colour: std::io::stdout().is_terminal() && wants_colour() }
}

/// Styles for what goes to stderr.
pub fn err() -> Style {
    Style { colour: std::io::stderr().is_terminal() && wants_colour() }
}

fn wants_colour() -> bool {
    std::env::var_os("NO_COLOR").is_none() && std::env::var_os("TERM").is_none_or(|terminal| terminal != "dumb")
}

impl Style {
    fn wrap(self, code: &str, text: &str) -> String {
        if self.colour {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_string()
        }
    }

    /// Headings and names.
    pub fn bold(self, text: &str) -> String {
        self.wrap("1", text)
    }

    /// Less important.
    pub fn dim(self, text: &str) -> String {
        self.wrap("2", text)
    }

    /// Errors.
    pub fn red(self, text: &str) -> String {
        self.wrap("1;31", text)
    }

    /// Warnings.
    pub fn yellow(self, text: &str) -> String {
        self.wrap("1;33", text)
    }

    /// What is fine.
    pub fn green(self, text: &str) -> String {
        self.wrap("32", text)
    }
}

/// Why the output of the command could not be written, if it could not.
static LOST: Mutex<Option<Error>> = Mutex::new(None);

fn lost() -> std::sync::MutexGuard<'static, Option<Error>> {
    LOST.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Writes what a command was asked for to stdout. After a failure it writes nothing more: see [`exit_code`].
pub fn print(text: &str) {
    let mut lost = lost();
    if lost.is_none() {
        let mut out = std::io::stdout();
        *lost = out.write_all(text.as_bytes()).and_then(|()| out.flush()).err();
    }
}

/// How a program ends that would end with `code`: a reader that had enough is no failure, a full disk is one.
pub fn exit_code(code: ExitCode) -> ExitCode {
    match lost().take() {
        Some(error) if code == ExitCode::SUCCESS && error.kind() != ErrorKind::BrokenPipe => {
            stderr(&format!("{} cannot write to stdout: {error}", err().red("error:")));
            ExitCode::FAILURE
        }
        _ => code,
    }
}

/// A line on stdout of what a command has done; its work is elsewhere, so one that cannot be written is no failure.
pub fn say(line: &str) {
    let mut out = std::io::stdout();
    let _ = writeln!(out, "{}", shown(line)).and_then(|()| out.flush());
}

/// Nothing can be done when stderr is closed or full.
fn stderr(line: &str) {
    let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
}

/// A line on stderr.
pub fn line(line: &str) {
    stderr(&shown(line));
}

/// Writes a warning to stderr.
pub fn warn(message: impl std::fmt::Display) {
    stderr(&format!("{} {}", err().yellow("warning:"), shown(&message.to_string())));
}

/// A text of several lines with nothing in it that commands a terminal.
pub fn shown(text: &str) -> String {
    text.split('\n').map(printable).collect::<Vec<_>>().join("\n")
}

/// Writes to stderr what a user may want to know.
pub fn note(message: impl std::fmt::Display) {
    stderr(&format!("{} {}", err().dim("note:"), shown(&message.to_string())));
}

/// Writes an error to stderr; every problem of a recipe is one.
pub fn error(error: &dinolab_core::Error) {
    stderr(&errors(error));
}

/// The same, with a line before it that says whose error it is: all at once, so that no other process speaks between.
pub fn error_of(who: &str, error: &dinolab_core::Error) {
    stderr(&format!("{}\n{}", shown(who), errors(error)));
}

fn errors(error: &dinolab_core::Error) -> String {
    let messages: Vec<String> = match error {
        dinolab_core::Error::Recipe(recipe) => recipe.0.iter().map(ToString::to_string).collect(),
        other => vec![other.to_string()],
    };
    let messages = messages.iter().map(|message| format!("{} {}", err().red("error:"), shown(message)));
    messages.collect::<Vec<_>>().join("\n")
}

/// A table without lines, for lists.
pub fn table(rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_content_arrangement(comfy_table::ContentArrangement::Dynamic);
    // The terminal that mpirun gives a process says that it is 0 wide.
    if !std::io::stdout().is_terminal() || table.width() == Some(0) {
        table.set_width(120);
    }
    for row in rows {
        table.add_row(row);
    }
    // Every cell has a space to its left; the first column needs none.
    table.lines().map(|l| format!("{}\n", l.strip_prefix(' ').unwrap_or(&l).trim_end())).collect()
}

/// A large number in three digits: `6.72 G`.
pub fn si(x: f64) -> String {
    let steps = [(1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    let (unit, name) = steps.into_iter().find(|(unit, _)| x >= *unit).unwrap_or((1.0, ""));
    let value = x / unit;
    let digits = if value >= 100.0 || (name.is_empty() && x.fract() == 0.0) {
        0
    } else if value >= 10.0 {
        1
    } else {
        2
    };
    format!("{value:.digits$} {name}").trim_end().to_string()
}

/// Seconds as a person says them, in two units at most: `340ms`, `48s`, `2m 36s`, `1day 7h`.
pub fn duration(seconds: f64) -> String {
    let units = [1e-3, 1.0, 60.0, 3600.0];
    // The unit that the last digit counts: one below the one that the first counts.
    let last = units[[1.0, 3600.0, 86_400.0].iter().filter(|from| seconds >= **from).count()];
    let rounded = std::time::Duration::try_from_secs_f64((seconds / last).round() * last).unwrap_or_default();
    humantime::format_duration(rounded).to_string()
}

/// A word for a shell.
pub fn shell(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._=+-:,@%".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.into(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        assert_eq!([si(6.716e9), si(81.0), si(2.12e12), si(303_000.0)], ["6.72 G", "81", "2.12 T", "303 k"]);
        assert_eq!(
            [0.0004, 0.34, 7.6, 90.2, 3599.8, 5000.0, 200_000.0].map(duration),
            ["0s", "340ms", "8s", "1m 30s", "1h", "1h 23m", "2days 8h"]
        );
    }

    #[test]
    fn words_reach_a_shell_as_they_are() {
        for word in ["arms/on/seed-0", "it's", "a b", "", "$HOME", "losses.gram={ enabled = true }"] {
            let said = std::process::Command::new("sh").args(["-c", &format!("printf %s {}", shell(word))]).output();
            assert_eq!(String::from_utf8_lossy(&said.expect("there is a shell").stdout), word);
        }
        assert_eq!(shell("arms/lr=0.1"), "arms/lr=0.1");
    }
}
