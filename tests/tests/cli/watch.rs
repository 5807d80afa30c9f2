//! `dinolab watch`: what it answers, and the page in a real browser while files grow.
//!
//! The browser is Chromium without a window; where there is none, that test says so and passes.

use dinolab_tests::program;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use dinolab_tests::program::Folder;
use serde_json::{json, Value};

/// A program that is ended with the test.
struct Ending(Child);

impl Drop for Ending {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `dinolab watch` of something, and where it listens.
fn watch(folder: &Folder, args: &[&str]) -> (Ending, SocketAddr) {
    let mut child = folder.start(&[&["watch", "--port", "0"], args].concat());
    let mut line = String::new();
    BufReader::new(child.stdout.take().expect("it is piped")).read_line(&mut line).expect("a line");
    let address =
        line.split("http://").nth(1).and_then(|rest| rest.split(' ').next()).expect("it says where it listens");
    (Ending(child), address.parse().expect("an address"))
}

/// Status, headers and text of an answer.
fn ask(address: SocketAddr, request: &str, host: &str) -> (u16, String, String) {
    let mut stream = TcpStream::connect(address).expect("it listens");
    write!(stream, "{request} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").expect("it reads");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("it answers");
    let (head, body) = text.split_once("\r\n\r\n").expect("headers, then text");
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status");
    (status, head.to_string(), body.to_string())
}

/// The page, with what it escapes.
fn page(address: SocketAddr) -> String {
    ask(address, "GET /", &address.to_string()).2.replace("&#x2f;", "/").replace("&#x27;", "'")
}

/// Waits until `ready` gives something, for a minute at most.
fn wait<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(found) = ready() {
            return found;
        }
        assert!(begin.elapsed() < Duration::from_secs(60), "{what}: nothing for a minute");
        std::thread::sleep(Duration::from_millis(50));
    }
}

const SUITE: &str = r#"
name = "two"
base = "micro.toml"
seeds = [0]
metrics = ["probe/patch_spread/share"]
baseline = "off"
[set]
probes.patch_spread.every = 4
[[arm]]
name = "off"
set = { "losses.koleo.enabled" = false }
[[arm]]
name = "on"
set = { "losses.koleo.weight" = 0.2 }
"#;

#[test]
fn a_run_is_shown_before_it_begins_while_it_goes_on_and_when_it_is_done() {
    let folder = Folder::with_micro();
    let (_watch, address) = watch(&folder, &["run"]);
    assert!(wait("a first page", || Some(page(address)).filter(|p| !p.is_empty()))
        .contains("No run and no suite is here yet"));
    folder.succeed(&["train", "micro.toml", "--out", "run", "--set", "probes.dse.batch_clusters=4"]);
    // Pictures come when there is time for them.
    let pictures = "Similarity to the framed patch";
    let done =
        wait("the run", || Some(page(address)).filter(|p| p.contains("step <b>12 of 12</b>") && p.contains(pictures)));
    let parts = ["<b>finished</b>", "loss/total", "probe/dse/inter", "Similarity to the framed patch", "<svg"];
    parts.iter().for_each(|part| assert!(done.contains(part), "no {part}"));
    // Longer: the same page goes on.
    folder.succeed(&["train", "run", "--resume", "--set", "steps=16"]);
    wait("the longer run", || Some(page(address)).filter(|p| p.contains("step <b>16 of 16</b>")));
}

#[test]
fn answers_are_of_one_page_for_this_machine() {
    let folder = Folder::with_micro();
    let (watching, address) = watch(&folder, &["run"]);
    let host = address.to_string();
    wait("a first page", || Some(page(address)).filter(|p| !p.is_empty()));
    let (status, head, _) = ask(address, "GET /page", &host);
    let tag = head.lines().find_map(|line| line.strip_prefix("ETag: ")).expect("a tag");
    assert!(status == 200 && head.contains("default-src 'none'"), "{head}");
    assert_eq!(ask(address, &format!("GET /page?have={tag}"), &host).0, 204);
    assert_eq!(ask(address, "GET /page?have=other", &host).0, 200);
    assert_eq!(ask(address, "GET /etc/passwd", &host).0, 404);
    assert_eq!(ask(address, "POST /", &host).0, 405);
    assert_eq!(ask(address, "GET /", "localhost:1").0, 200);
    assert_eq!(ask(address, "GET /", "elsewhere.example:6007").0, 403);
    let port = address.port().to_string();
    let refused = folder.run(&["watch", "run", "--port", &port]);
    assert!(
        refused.code == 2 && refused.err.contains(&format!("port {port} of 127.0.0.1 is taken")),
        "{}",
        refused.err
    );
    assert!(refused.err.contains("--port 0"), "{}", refused.err);
    let none = folder.run(&["watch", "micro.toml"]);
    assert!(none.code == 2 && none.err.contains("micro.toml"), "{}", none.err);
    drop(watching);
}

#[test]
fn a_suite_is_shown_from_its_folder_or_its_file() {
    let folder = Folder::with_micro();
    folder.write("suite.toml", SUITE);
    // By its file, before anything is begun: all runs are pending.
    let (_before, address) = watch(&folder, &["suite.toml", "--out", "out"]);
    wait("a page of a suite", || Some(page(address)).filter(|p| p.contains("off seed 0 is pending")));
    folder.succeed(&["ablate", "suite.toml", "--out", "out", "--steps", "8", "--smoke-steps", "0"]);
    let report = folder.read("out/report.html").replace("&#x2f;", "/").replace("&#x27;", "'");
    assert!(!report.contains("<script"));
    // By its folder, which knows that the command line made runs shorter.
    let (_after, other) = watch(&folder, &["out"]);
    for address in [address, other] {
        let live = wait("a complete suite", || Some(page(address)).filter(|p| p.contains("What the patches see")));
        assert!(live.contains("<script") && live.contains("--set steps=8") && !live.contains("is pending"));
        // It is the report, with its numbers.
        let results = |page: &str| {
            let rest = page.split("<h2>Results</h2>").nth(1).expect("results").to_string();
            rest.split("</section>").next().expect("an end").to_string()
        };
        assert_eq!(results(&live), results(&report));
    }
    // A folder of an earlier version does not say its file.
    let mut state = program::json(&folder, "out/suite.json");
    state.as_object_mut().expect("a table").remove("origin");
    folder.write("out/suite.json", &state.to_string());
    wait("what is missing", || Some(page(other)).filter(|p| p.contains("name the suite's file")));
    wait("the suite", || Some(page(address)).filter(|p| p.contains("What the patches see") && !p.contains("steps=8")));
}

/// Chromium by its pipe: messages of JSON that end in a zero.
struct Browser {
    _child: Ending,
    to: File,
    from: BufReader<File>,
    sent: u64,
    /// What was told without being asked.
    told: Vec<Value>,
}

impl Browser {
    /// Nothing where there is no Chromium, which is said.
    fn start(folder: &Folder) -> Option<Self> {
        let found = Command::new("chromium").arg("--version").output();
        if !found.is_ok_and(|output| output.status.success()) {
            println!("skipped: there is no chromium");
            return None;
        }
        for pipe in ["to", "from"] {
            assert!(Command::new("mkfifo").arg(folder.path(pipe)).status().expect("mkfifo").success());
        }
        let profile = format!("--user-data-dir={}", folder.path("profile").display());
        let script =
            "exec chromium --headless=new --no-sandbox --disable-gpu --remote-debugging-pipe \"$1\" 3<to 4>from";
        let child = Command::new("sh")
            .args(["-c", script, "sh", &profile])
            .current_dir(folder.path("."))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("sh starts");
        let child = Ending(child);
        let to = File::options().write(true).open(folder.path("to")).expect("the pipe is there");
        let from = File::open(folder.path("from")).expect("the pipe is there");
        Some(Self { _child: child, to, from: BufReader::new(from), sent: 0, told: Vec::new() })
    }

    fn receive(&mut self) -> Value {
        let mut message = Vec::new();
        self.from.read_until(0, &mut message).expect("the browser goes on");
        message.pop();
        serde_json::from_slice(&message).expect("JSON")
    }

    /// Asks for something and waits for the answer.
    fn ask(&mut self, session: &str, method: &str, params: &Value) -> Value {
        self.sent += 1;
        let mut message = json!({ "id": self.sent, "method": method, "params": params });
        if !session.is_empty() {
            message["sessionId"] = session.into();
        }
        self.to.write_all(format!("{message}\0").as_bytes()).expect("the browser goes on");
        loop {
            let answer = self.receive();
            if answer["id"] == self.sent {
                assert!(answer.get("error").is_none(), "{method}: {answer}");
                return answer["result"].clone();
            }
            self.told.push(answer);
        }
    }

    /// A page on which messages, errors and requests are told.
    fn open(&mut self) -> String {
        let target = self.ask("", "Target.createTarget", &json!({ "url": "about:blank" }));
        let attach = json!({ "targetId": target["targetId"], "flatten": true });
        let session = self.ask("", "Target.attachToTarget", &attach)["sessionId"].as_str().expect("a name").to_string();
        for domain in ["Page", "Runtime", "Log", "Network"] {
            self.ask(&session, &format!("{domain}.enable"), &json!({}));
        }
        session
    }

    /// The value of an expression on the page.
    fn value(&mut self, session: &str, expression: &str) -> Value {
        let params = json!({ "expression": expression, "returnByValue": true });
        self.ask(session, "Runtime.evaluate", &params)["result"]["value"].clone()
    }

    /// What was told of these methods.
    fn told<'a>(&'a self, methods: &'a [&str]) -> impl Iterator<Item = &'a Value> {
        self.told.iter().filter(move |told| methods.iter().any(|method| told["method"] == *method))
    }
}

/// A line of metrics more, as a run writes it.
fn grow(run: &Path, step: u64) {
    let mut file = File::options().append(true).open(run.join("metrics.jsonl")).expect("the run has metrics");
    writeln!(file, "{}", json!({ "step": step, "loss/total": 1.0 / step as f64, "probe/knn/top1": 0.5 }))
        .expect("a line");
}

#[test]
fn in_a_browser_the_page_follows_the_files_in_place_and_fetches_nothing_else() {
    let folder = Folder::with_micro();
    let Some(mut browser) = Browser::start(&folder) else { return };
    folder.succeed(&["train", "micro.toml", "--out", "run"]);
    std::fs::remove_file(folder.path("run/result.json")).expect("it is finished");
    let (watching, address) = watch(&folder, &["run"]);
    wait("the run", || Some(page(address)).filter(|p| p.contains("step <b>12 of 12</b>")));
    let session = browser.open();
    browser.ask(&session, "Page.navigate", &json!({ "url": format!("http://{address}/") }));
    let shown = "document.querySelector('main') ? document.querySelector('main').innerText : ''";
    wait("the page", || {
        Some(browser.value(&session, shown)).filter(|t| t.as_str().is_some_and(|t| t.contains("12 of 12")))
    });
    let icons = browser.value(&session, "document.querySelectorAll('.plots svg').length").as_u64().expect("a number");
    assert!(icons > 3, "{icons} curves");
    let images = "[...document.images].length && [...document.images].every(image => image.naturalWidth > 0)";
    wait("pictures", || Some(browser.value(&session, images)).filter(|all| *all == true));
    // A reader has scrolled down and opened what is folded.
    browser.value(&session, "document.querySelectorAll('details').forEach(d => { d.open = true; })");
    browser.value(&session, "document.querySelector('.film').scrollIntoView(); window.mark = 'the same page'");
    let place = "Math.round(document.querySelector('.film').getBoundingClientRect().top)";
    let before = browser.value(&session, place);
    browser.value(&session, "document.querySelector('.film').marked = true");
    grow(&folder.path("run"), 13);
    let newer = "document.querySelector('main').innerText.includes('13 of 12')";
    wait("the newer page", || Some(browser.value(&session, newer)).filter(|found| *found == true));
    for (what, expected) in [
        // What is looked at stays where it was, though there is more above it.
        (place, before),
        ("window.mark", json!("the same page")),
        ("[...document.querySelectorAll('details')].every(d => d.open)", json!(true)),
        // What did not change was not touched.
        ("document.querySelector('.film').marked", json!(true)),
        ("document.querySelector('main').innerText.includes('probe/knn/top1')", json!(true)),
        ("document.getElementById('live').textContent", json!("live")),
    ] {
        assert_eq!(browser.value(&session, what), expected, "{what}");
    }
    let requests = browser.told(&["Network.requestWillBeSent"]);
    let urls: Vec<&str> = requests.filter_map(|told| told["params"]["request"]["url"].as_str()).collect();
    let own = format!("http://{address}/");
    assert!(urls.len() >= 2 && urls.iter().all(|url| url.starts_with(&own) || url.starts_with("data:")), "{urls:?}");
    let errors: Vec<&Value> =
        browser.told(&["Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"]).collect();
    assert!(errors.is_empty(), "{errors:?}");
    // When the program has ended the page stays, and says so.
    drop(watching);
    let ended = "document.getElementById('live').textContent.includes('has ended')";
    wait("the end", || Some(browser.value(&session, ended)).filter(|found| *found == true));
    assert_eq!(browser.value(&session, "document.querySelector('main').innerText.includes('13 of 12')"), true);
}
