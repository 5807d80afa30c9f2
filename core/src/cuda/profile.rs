//! Where the time goes: every launch between two events.

use cudarc::driver::{result, sys};

use super::{check, Failure, Gpu};
use crate::profile::Profile;
use crate::Result;

struct Event(sys::CUevent);

// SAFETY: events are used with their context bound.
unsafe impl Send for Event {}

impl Event {
    fn record(stream: sys::CUstream) -> Result<Self, Failure> {
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT)
            .map_err(|e| Failure { call: "cuEventCreate", result: e.0 })?;
        // SAFETY: both are alive.
        unsafe { result::event::record(event, stream) }.map_err(|e| Failure { call: "cuEventRecord", result: e.0 })?;
        Ok(Self(event))
    }

    fn milliseconds_to(&self, end: &Event) -> Result<f64, Failure> {
        type Elapsed = unsafe extern "C" fn(*mut f32, sys::CUevent, sys::CUevent) -> sys::CUresult;
        let call = "cuEventElapsedTime";
        // Every driver has this symbol; cudarc's binding calls its second version, which those before 12.8 do not have.
        // SAFETY: the type is the function's.
        let elapsed = unsafe { sys::culib().get::<Elapsed>(call.as_bytes()) };
        let elapsed = elapsed.map_err(|_| Failure { call, result: sys::CUresult::CUDA_ERROR_NOT_FOUND })?;
        let mut ms = 0.0;
        // SAFETY: both events were recorded, and the stream was synchronised.
        check(call, unsafe { elapsed(&mut ms, self.0, end.0) })?;
        Ok(f64::from(ms))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `record`, destroyed once.
        let _ = unsafe { result::event::destroy(self.0) };
    }
}

/// One launch between its events.
struct Timed {
    name: &'static str,
    /// Operations and bytes.
    work: (f64, f64),
    start: Event,
    end: Option<Event>,
}

/// Launches with their events.
pub(super) struct Recorder(Vec<Timed>);

impl Recorder {
    pub(super) fn before(
        &mut self,
        stream: sys::CUstream,
        name: &'static str,
        work: (f64, f64),
    ) -> Result<(), Failure> {
        self.0.push(Timed { name, work, start: Event::record(stream)?, end: None });
        Ok(())
    }

    pub(super) fn after(&mut self, stream: sys::CUstream) -> Result<(), Failure> {
        self.0.last_mut().expect("`before` came first").end = Some(Event::record(stream)?);
        Ok(())
    }
}

impl Profile {
    /// Runs `f` with every launch timed. Timing keeps launches from overlapping, so the sum is a little more than `f`
    /// takes without.
    ///
    /// # Errors
    /// Those of `f`, and of the device.
    pub fn of<R>(gpu: &'static Gpu, f: impl FnOnce() -> Result<R>) -> Result<(Self, R)> {
        let lock = || gpu.recorder.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        *lock() = Some(Recorder(Vec::new()));
        let done = f().and_then(|r| gpu.synchronize().map(|()| r));
        let recorder = lock().take().expect("put there above");
        let value = done?;
        let mut profile = Self::default();
        for Timed { name, work: (flops, bytes), start, end } in recorder.0 {
            let Some(end) = end else { continue };
            profile.add(name, start.milliseconds_to(&end)?, flops, bytes);
        }
        Ok((profile.longest_first(), value))
    }
}

/// Milliseconds between two points of the stream, by the device's clock.
pub(super) fn device_ms(gpu: &'static Gpu, f: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = Event::record(gpu.stream())?;
    f()?;
    let end = Event::record(gpu.stream())?;
    gpu.synchronize()?;
    Ok(start.milliseconds_to(&end)?)
}

impl Gpu {
    /// Milliseconds that the device takes for the work that `f` gives it.
    ///
    /// # Errors
    /// Those of `f`, and of the device.
    pub fn time(&'static self, f: impl FnOnce() -> Result<()>) -> Result<f64> {
        device_ms(self, f)
    }
}
