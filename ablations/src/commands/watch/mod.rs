//! `dinolab watch`: the report of a run or a suite in a browser, while it runs.
//!
//! Everything shown is read from the files: nothing is asked of the program that trains, which may run elsewhere, not have
//! begun, or have ended. The page is one text without a request to anybody but this program.

mod pages;

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use dinolab_core::text::printable;
use dinolab_core::{Error, Result};
use tiny_http::{Header, Method, Request, Response, Server};

use crate::style;
use pages::Pages;

/// How often the files are looked at, at most.
const EVERY: Duration = Duration::from_secs(1);
/// The pause after a page in the time that it took to make: the page of a long run takes a tenth of a core, and leaves the rest to
/// the training.
const PAUSE: u32 = 9;
/// The page may load nothing from anywhere but the program that serves it.
const POLICY: &str = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; \
    connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Shows the report of a run or a suite in a browser while it runs, from its files.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The folder of a run or of a suite, which need not be there yet; or a suite's file
    path: PathBuf,
    /// The suite's folder, if a suite's file is given; by default one named like the suite in runs/
    #[arg(long)]
    out: Option<PathBuf>,
    /// The port to listen on; 0: one that is free
    #[arg(long, default_value_t = 6007)]
    port: u16,
    /// The address to listen on; by default nobody can reach it from another machine
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    host: IpAddr,
}

/// Runs the command: until it is interrupted.
///
/// # Errors
/// If the suite's file is wrong, or the port is taken.
pub fn run(args: &Args) -> Result<ExitCode> {
    let mut pages = Pages::of(&args.path, args.out.as_deref())?;
    let address = SocketAddr::new(args.host, args.port);
    let server = Server::http(address).map_err(|e| refused(address, e.as_ref()))?;
    let bound = server.server_addr().to_ip().unwrap_or(address);
    if !args.host.is_loopback() {
        style::warn(
            "everybody who can reach this machine can read the page; on 127.0.0.1 (the default) nobody else can",
        );
    }
    style::say(&format!("{} is shown on http://{bound} until Ctrl-C", printable(pages.folder())));
    let page = Arc::new(Mutex::new(Page::default()));
    let shared = page.clone();
    // Answers never wait for a page to be made.
    std::thread::spawn(move || loop {
        let begin = Instant::now();
        if let Some(html) = pages.refresh() {
            *shared.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Page::of(html);
        }
        std::thread::sleep(EVERY.max(PAUSE * begin.elapsed()));
    });
    for request in server.incoming_requests() {
        let page = page.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
        let response = answer(&request, &page, args.host.is_loopback());
        // A browser that went away is no failure.
        let _ = request.respond(response);
    }
    Ok(ExitCode::SUCCESS)
}

fn refused(address: SocketAddr, error: &(dyn std::error::Error + Send + Sync + 'static)) -> Error {
    let kind = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
    match kind {
        Some(ErrorKind::AddrInUse) => {
            let problem = format!("port {} of {} is taken", address.port(), address.ip());
            Error::user(problem, "another `dinolab watch` may be there already; or choose a free one with --port 0")
        }
        Some(ErrorKind::PermissionDenied) => {
            let problem = format!("port {} may not be listened on", address.port());
            Error::user(problem, "choose one above 1023, or a free one with --port 0")
        }
        _ => Error::user(format!("cannot listen on {address}: {error}"), "choose another --host or --port"),
    }
}

/// The newest page, and a tag that tells it from any other.
#[derive(Clone, Debug, Default)]
struct Page {
    html: Arc<str>,
    tag: String,
}

impl Page {
    fn of(html: String) -> Self {
        let tag = blake3::hash(html.as_bytes()).to_hex()[..16].to_string();
        Self { html: html.into(), tag }
    }
}

/// The page at `/`; at `/page?have=TAG` the page if it has another tag.
fn answer(request: &Request, page: &Page, local: bool) -> Response<std::io::Cursor<Vec<u8>>> {
    let plain = |status: u16, text: &str| Response::from_string(text).with_status_code(status);
    if local && !asked_locally(request) {
        return plain(403, "this page is for this machine: open it as localhost\n");
    }
    if *request.method() != Method::Get {
        return plain(405, "this page can only be read\n");
    }
    let (path, query) = request.url().split_once('?').unwrap_or((request.url(), ""));
    match path {
        "/page" if query.strip_prefix("have=") == Some(page.tag.as_str()) => plain(204, ""),
        "/" | "/page" => {
            let header = |name: &str, value: &str| {
                Header::from_bytes(name, value).expect("names and values of headers are plain text")
            };
            plain(200, &page.html)
                .with_header(header("Content-Type", "text/html; charset=utf-8"))
                .with_header(header("Content-Security-Policy", POLICY))
                .with_header(header("X-Content-Type-Options", "nosniff"))
                .with_header(header("Cache-Control", "no-store"))
                .with_header(header("ETag", &page.tag))
        }
        _ => plain(404, "there is one page here: /\n"),
    }
}

/// Whether the browser knows this machine by a name of its own: a page of somebody else whose name was made to lead here does
/// not get to read this one.
fn asked_locally(request: &Request) -> bool {
    let host = request.headers().iter().find(|h| h.field.equiv("Host")).map(|h| h.value.as_str());
    let name =
        host.map(|host| host.rsplit_once(':').filter(|(name, _)| !name.ends_with(':')).map_or(host, |(name, _)| name));
    name.is_none_or(|name| {
        let address = name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
        name.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.is_loopback())
    })
}
