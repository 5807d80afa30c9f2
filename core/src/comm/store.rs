//! The store of `torchrun`: a server of keys and values that its agent runs (PyTorch's `TCPStore`), by which the processes that
//! it started are joined.
//!
//! On GPUs NCCL moves what is large, and little goes this way. A rank posts what it brings under keys of its own and waits for
//! those of the others; what all have read is deleted.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::ops::Range;
use std::sync::Mutex;
use std::time::Duration;

use super::watch::{lock, Inside};
use super::{Comm, Launch, Reduction};
use crate::{Error, Result};

/// The first word of a client.
const MAGIC: u32 = 0x3C85_F7CE;
/// What a client may ask, as `TCPStoreBackend.hpp` numbers it.
#[derive(Clone, Copy)]
enum Query {
    Validate = 0,
    Set = 1,
    Get = 3,
    Check = 5,
    Wait = 6,
    Delete = 8,
}

/// The server takes values of 8 MiB at most.
const LONGEST: usize = 4 << 20;
/// How often a rank looks whether another has failed.
const LOOKS: Duration = Duration::from_secs(1);

/// A rank that `torchrun` started.
pub struct Store {
    client: Mutex<Client>,
    world: usize,
    rank: usize,
    address: String,
    /// What keys begin with: those of earlier starts of the same processes may be there.
    prefix: String,
    posted: Mutex<Posted>,
    reduction: Reduction,
    /// The call that this rank is in.
    inside: Inside,
}

/// What this rank has posted.
#[derive(Default)]
struct Posted {
    /// Calls so far.
    calls: u64,
    /// Keys that some rank may not have read yet, by the call that they are of.
    keys: Vec<(u64, String)>,
}

struct Client(TcpStream);

impl Client {
    fn new(address: &str) -> io::Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        let mut client = Self(stream);
        client.ask(Query::Validate, &[&MAGIC.to_le_bytes()])?;
        Ok(client)
    }

    fn ask(&mut self, query: Query, parts: &[&[u8]]) -> io::Result<()> {
        self.0.write_all(&[&[query as u8][..], &parts.concat()].concat())
    }

    fn number(&mut self) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.0.read_exact(&mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn byte(&mut self) -> io::Result<u8> {
        let mut byte = [0];
        self.0.read_exact(&mut byte)?;
        Ok(byte[0])
    }

    fn set(&mut self, key: &str, value: &[u8]) -> io::Result<()> {
        self.ask(Query::Set, &[&text(key), &(value.len() as u64).to_le_bytes(), value])
    }

    /// Waits for the keys.
    fn wait(&mut self, keys: &[String]) -> io::Result<()> {
        self.ask(Query::Wait, &[&texts(keys)])?;
        match self.byte()? {
            0 => Ok(()),
            _ => Err(io::Error::other("it waits no longer")),
        }
    }

    /// Whether the key is there.
    fn has(&mut self, key: &str) -> io::Result<bool> {
        self.ask(Query::Check, &[&texts(&[key.to_string()])])?;
        Ok(self.byte()? == 0)
    }

    /// The value of a key that is there.
    fn get(&mut self, key: &str, value: &mut [u8]) -> io::Result<()> {
        self.ask(Query::Get, &[&text(key)])?;
        let len = self.number()?;
        if len != value.len() as u64 {
            return Err(io::Error::other(format!("{len} bytes where {} are expected", value.len())));
        }
        self.0.read_exact(value)
    }

    fn delete(&mut self, key: &str) -> io::Result<()> {
        self.ask(Query::Delete, &[&text(key)])?;
        self.number().map(drop)
    }
}

/// A text as the server reads it.
fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

fn texts(all: &[String]) -> Vec<u8> {
    let count = (all.len() as u64).to_le_bytes().to_vec();
    all.iter().fold(count, |bytes, one| [bytes, text(one)].concat())
}

impl Store {
    /// Joins the processes of `launch`.
    ///
    /// # Errors
    /// If the agent's store is not where the environment says.
    pub fn join(launch: &Launch, reduction: Reduction) -> Result<Self> {
        let env = |name: &str| std::env::var(name).unwrap_or_default();
        if env("TORCHELASTIC_USE_AGENT_STORE") != "True" {
            let problem = "torchrun started several processes, and its agent keeps its store to itself";
            let help = "unset TORCH_DISABLE_SHARE_RDZV_TCP_STORE, or start them with mpirun, mpiexec or srun";
            return Err(Error::user(problem, help));
        }
        let address = format!("{}:{}", env("MASTER_ADDR"), env("MASTER_PORT"));
        let prefix = format!("dinolab/{}/{}", env("TORCHELASTIC_RUN_ID"), env("TORCHELASTIC_RESTART_COUNT"));
        let unreached = |e: io::Error| {
            let problem = format!("the store of torchrun's agent at {address} cannot be reached: {e}");
            Error::user(problem, "start the processes with mpirun, mpiexec or srun")
        };
        let client = Client::new(&address).map_err(unreached)?;
        let store = Self {
            client: Mutex::new(client),
            world: launch.world,
            rank: launch.rank,
            address,
            prefix,
            posted: Mutex::default(),
            reduction,
            inside: Inside::default(),
        };
        store.end_with_others();
        Ok(store)
    }

    /// Where a rank says that it has failed.
    fn failed(&self) -> String {
        format!("{}/failed", self.prefix)
    }

    /// Ends this rank when another says that it has failed: it would wait for ever.
    fn end_with_others(&self) {
        let (address, failed) = (self.address.clone(), self.failed());
        let look = move || -> Option<()> {
            let mut client = Client::new(&address).ok()?;
            while !client.has(&failed).ok()? {
                std::thread::sleep(LOOKS);
            }
            std::process::exit(1)
        };
        // Without it, torchrun ends this rank after 30 seconds.
        drop(std::thread::Builder::new().name("failures".into()).spawn(look));
    }

    /// Calls `work` with the number of the call.
    fn call<R>(&self, what: &'static str, work: impl FnOnce(&mut Client, &mut Posted) -> io::Result<R>) -> Result<R> {
        self.inside.enter(what);
        let mut posted = lock(&self.posted);
        posted.calls += 1;
        let done = work(&mut lock(&self.client), &mut posted);
        self.inside.leave();
        done.map_err(|e| {
            let problem = format!("{what} by torchrun's store failed: {e}");
            Error::user(problem, "see what the other ranks say, and whether torchrun still runs")
        })
    }

    /// Where `from` posts part `part` of what it brings to a call, for `to` or for all.
    fn key(&self, call: u64, from: usize, to: &str, part: usize) -> String {
        format!("{}/{call}/{from}/{to}/{part}", self.prefix)
    }

    /// Posts bytes of this rank.
    fn post(&self, client: &mut Client, posted: &mut Posted, to: &str, bytes: &[u8]) -> io::Result<()> {
        // What is empty is posted too: it says that this rank has come.
        let parts = bytes.len().div_ceil(LONGEST).max(1);
        for part in 0..parts {
            let key = self.key(posted.calls, self.rank, to, part);
            client.set(&key, &bytes[part * LONGEST..bytes.len().min((part + 1) * LONGEST)])?;
            posted.keys.push((posted.calls, key));
        }
        Ok(())
    }

    /// Waits for the bytes of `from`.
    fn read(&self, client: &mut Client, call: u64, (from, to): (usize, &str), bytes: &mut [u8]) -> io::Result<()> {
        let parts = bytes.len().div_ceil(LONGEST).max(1);
        let keys: Vec<String> = (0..parts).map(|part| self.key(call, from, to, part)).collect();
        client.wait(&keys)?;
        let mut rest = bytes;
        for key in keys {
            let (part, behind) = rest.split_at_mut(rest.len().min(LONGEST));
            client.get(&key, part)?;
            rest = behind;
        }
        Ok(())
    }

    /// All ranks have come to this call, so they have read what was posted before.
    fn tidy(client: &mut Client, posted: &mut Posted) -> io::Result<()> {
        let Posted { calls, keys } = posted;
        let (old, new) = std::mem::take(keys).into_iter().partition(|(call, _)| call < calls);
        *keys = new;
        let old: Vec<(u64, String)> = old;
        old.iter().try_for_each(|(_, key)| client.delete(key))
    }
}

impl Comm for Store {
    fn world(&self) -> usize {
        self.world
    }
    fn rank(&self) -> usize {
        self.rank
    }
    fn all_gather(&self, own: &[u8], all: &mut [u8]) -> Result<()> {
        assert_eq!(all.len(), own.len() * self.world, "as much from every rank");
        self.call("all-gather", |client, posted| {
            self.post(client, posted, "all", own)?;
            for from in 0..self.world {
                let bytes = &mut all[from * own.len()..(from + 1) * own.len()];
                match from == self.rank {
                    true => bytes.copy_from_slice(own),
                    false => self.read(client, posted.calls, (from, "all"), bytes)?,
                }
            }
            Self::tidy(client, posted)
        })
    }
    fn gather_ranges(&self, all: &mut [u8], ranges: &[Range<usize>]) -> Result<()> {
        self.call("all-gather", |client, posted| {
            self.post(client, posted, "all", &all[ranges[self.rank].clone()])?;
            for (from, range) in ranges.iter().enumerate().filter(|(from, _)| *from != self.rank) {
                self.read(client, posted.calls, (from, "all"), &mut all[range.clone()])?;
            }
            Self::tidy(client, posted)
        })
    }
    fn exchange(&self, pieces: &[u8], received: &mut [u8]) -> Result<()> {
        let piece = pieces.len() / self.world;
        assert!(pieces.len() == received.len() && piece * self.world == pieces.len(), "as much for every rank");
        let of = |rank: usize| rank * piece..(rank + 1) * piece;
        self.call("all-to-all", |client, posted| {
            let others = || (0..self.world).filter(|rank| *rank != self.rank);
            for to in others() {
                self.post(client, posted, &to.to_string(), &pieces[of(to)])?;
            }
            received[of(self.rank)].copy_from_slice(&pieces[of(self.rank)]);
            let own = self.rank.to_string();
            for from in others() {
                self.read(client, posted.calls, (from, &own), &mut received[of(from)])?;
            }
            Self::tidy(client, posted)
        })
    }
    fn broadcast(&self, bytes: &mut [u8]) -> Result<()> {
        self.call("broadcast", |client, posted| match self.rank {
            0 => self.post(client, posted, "all", bytes),
            _ => {
                // A rank may wait long for an order.
                self.inside.leave();
                let read = self.read(client, posted.calls, (0, "all"), bytes);
                self.inside.enter("broadcast");
                read
            }
        })
    }
    fn abort(&self) {
        // The call that failed may still have the other client.
        if let Ok(mut client) = Client::new(&self.address) {
            let _ = client.set(&self.failed(), b"");
            // An answer says that it was read.
            let _ = client.has(&self.failed());
        }
    }
    fn leave(&self) {
        // What one rank ends with, torchrun ends the others for.
        let _ = self.all_gather(&[], &mut []);
    }
    fn reduction(&self) -> Reduction {
        self.reduction
    }
    fn engine(&self) -> String {
        "torchrun's store".into()
    }
    fn enter(&self, what: &'static str) {
        self.inside.enter(what);
    }
    fn leave_call(&self) {
        self.inside.leave();
    }
    fn waits(&self) -> Option<(&'static str, Duration)> {
        self.inside.waits()
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Store(rank {} of {}, {})", self.rank, self.world, self.address)
    }
}
