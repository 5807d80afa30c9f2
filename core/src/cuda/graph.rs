//! A step recorded once and replayed: one launch instead of thousands.

use cudarc::driver::{result, sys};

use super::{check, Failure, Gpu};
use crate::Result;

/// Recorded work, bound to the addresses that it was recorded with.
#[derive(Debug)]
pub struct Graph {
    gpu: &'static Gpu,
    exec: sys::CUgraphExec,
    /// Launches, copies and fills in it.
    pub nodes: usize,
}

// SAFETY: the handle is used from the thread that holds the graph, with its context bound.
unsafe impl Send for Graph {}

impl Graph {
    /// Records the work that `f` gives to the device; nothing runs. If `f` fails, nothing is recorded.
    ///
    /// # Errors
    /// Those of `f`, and if something in it cannot be recorded (waiting for the device, reading from it).
    pub fn record<R>(gpu: &'static Gpu, f: impl FnOnce() -> Result<R>) -> Result<(Self, R)> {
        let stream = gpu.stream();
        // Other threads (the loader's) may go on allocating.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream is alive and not recording: a step records once.
        check("cuStreamBeginCapture", unsafe { sys::cuStreamBeginCapture_v2(stream, mode) })?;
        let mut capture = Capture { stream, open: true };
        let done = f();
        let (graph, ended) = capture.end();
        let destroy = |graph: sys::CUgraph| {
            if !graph.is_null() {
                // SAFETY: the graph was given by the driver and is not used again.
                let _ = unsafe { result::graph::destroy(graph) };
            }
        };
        let value = match (done, ended) {
            (Ok(value), Ok(())) => value,
            (Err(error), _) => {
                destroy(graph);
                return Err(error);
            }
            (_, Err(failure)) => {
                destroy(graph);
                return Err(failure.into());
            }
        };
        let (mut exec, mut nodes) = (std::ptr::null_mut(), 0);
        // SAFETY: `graph` was just recorded; the executable form does not need it any more.
        let made = unsafe {
            check("cuGraphGetNodes", sys::cuGraphGetNodes(graph, std::ptr::null_mut(), &mut nodes))
                .and_then(|()| check("cuGraphInstantiate", sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0)))
        };
        destroy(graph);
        made?;
        Ok((Self { gpu, exec, nodes }, value))
    }

    /// Gives all recorded work to the device again.
    ///
    /// # Errors
    /// If the device refuses.
    pub fn launch(&self) -> Result<()> {
        // SAFETY: the executable graph is alive.
        let launched = unsafe { result::graph::launch(self.exec, self.gpu.stream()) };
        Ok(launched.map_err(|e| Failure { call: "cuGraphLaunch", result: e.0 })?)
    }
}

/// A capture, which is ended even if what it records unwinds: else the stream would take no other work.
struct Capture {
    stream: sys::CUstream,
    open: bool,
}

impl Capture {
    fn end(&mut self) -> (sys::CUgraph, Result<(), Failure>) {
        self.open = false;
        let mut graph = std::ptr::null_mut();
        // SAFETY: recording began on this stream.
        let ended = check("cuStreamEndCapture", unsafe { sys::cuStreamEndCapture(self.stream, &mut graph) });
        (graph, ended)
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        if self.open {
            let (graph, _) = self.end();
            if !graph.is_null() {
                // SAFETY: the graph was given by the driver and is not used again.
                let _ = unsafe { result::graph::destroy(graph) };
            }
        }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        self.gpu.bind();
        // SAFETY: made by `record`, destroyed once; the driver waits for launches under way.
        let _ = unsafe { result::graph::exec_destroy(self.exec) };
    }
}
