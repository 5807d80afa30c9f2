//! What one of several processes on a machine may use: a GPU, a share of the cores; and how it is started.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use dinolab_core::cuda::Gpu;
use dinolab_core::{Device, Error, Result};

/// The variable by which a process sees some GPUs only.
const VISIBLE: &str = "CUDA_VISIBLE_DEVICES";

/// The file that this process runs from, even if a new one lies in its place by now.
pub const PROGRAM: &str = "/proc/self/exe";

/// What one of the processes may use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Slot {
    /// Variables of its environment.
    env: Vec<(&'static str, String)>,
    /// The CPU cores that it may run on; all if empty.
    cores: Vec<usize>,
}

impl Slot {
    /// Those of `n` processes on the kind of device that the recipe names, and what is to be said of them.
    ///
    /// # Errors
    /// If the recipe names one of several GPUs, or the driver does not start.
    pub fn divide(n: usize, device: Device) -> Result<(Vec<Self>, Option<String>)> {
        let cores = shares(&cores(), n);
        let Device::Cuda(ordinal) = device else {
            return Ok((cores.into_iter().map(|cores| Self { env: Vec::new(), cores }).collect(), None));
        };
        if ordinal > 0 {
            let help =
                "say device = \"cuda\" (or CUDA_VISIBLE_DEVICES=1,2 for some of the GPUs): each process gets one";
            return Err(Error::user(
                format!("the recipe names the GPU cuda:{ordinal}, and --parallel gives them out"),
                help,
            ));
        }
        let count = Gpu::count()?.max(1);
        let known = std::env::var(VISIBLE).unwrap_or_default();
        let names: Vec<&str> = known.split(',').map(str::trim).filter(|name| !name.is_empty()).collect();
        let gpu = |k: usize| names.get(k).map_or(k.to_string(), ToString::to_string);
        let slots = cores.into_iter().enumerate();
        let slots = slots.map(|(k, cores)| Self { env: vec![(VISIBLE, gpu(k % count))], cores }).collect();
        let shared =
            (n > count).then(|| format!("{n} processes share {count} GPU{}", if count == 1 { "" } else { "s" }));
        Ok((slots, shared))
    }

    /// Starts this program with `arguments` under the slot's limits. What it says goes to the end of `log`.
    pub(super) fn start(&self, arguments: &[String], log: &Path) -> Result<Child> {
        let file = File::options().create(true).append(true).open(log).map_err(Error::io("write", log))?;
        let both = file.try_clone().map_err(Error::io("write", log))?;
        let mut command = Command::new(PROGRAM);
        command.args(arguments).stdin(Stdio::null()).stdout(file).stderr(both).envs(self.env.iter().cloned());
        // Ctrl-C comes to this process alone, which passes it on.
        command.process_group(0);
        let cores = self.cores.clone();
        // SAFETY: between fork and exec only these two calls of the system are made, on memory that is there already.
        unsafe {
            command.pre_exec(move || {
                // A process whose parent was killed saves and stops.
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM);
                let mut set: libc::cpu_set_t = std::mem::zeroed();
                cores.iter().for_each(|&core| libc::CPU_SET(core, &mut set));
                if !cores.is_empty() {
                    // One that may not choose its cores runs on all.
                    libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set);
                }
                Ok(())
            });
        }
        command.spawn().map_err(Error::io("run", PROGRAM))
    }
}

/// The CPU cores that this process may run on.
fn cores() -> Vec<usize> {
    // SAFETY: the set is plain bits, which the call fills.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the size is that of the set.
    let known = unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) } == 0;
    // SAFETY: every number is below the set's size.
    (0..libc::CPU_SETSIZE as usize).filter(|&core| known && unsafe { libc::CPU_ISSET(core, &set) }).collect()
}

/// Neighbouring cores for each of `n` processes; where there are fewer, all for each.
fn shares(cores: &[usize], n: usize) -> Vec<Vec<usize>> {
    if cores.len() < n {
        return vec![Vec::new(); n];
    }
    let end = |k: usize| k * cores.len() / n;
    (0..n).map(|k| cores[end(k)..end(k + 1)].to_vec()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_are_divided_without_rest_and_shared_where_there_are_too_few() {
        assert_eq!(shares(&[0, 1, 2, 3, 8], 2), [vec![0, 1], vec![2, 3, 8]]);
        assert_eq!(shares(&[4, 5], 2), [vec![4], vec![5]]);
        assert_eq!(shares(&[4, 5], 3), vec![Vec::<usize>::new(); 3]);
        assert!(!cores().is_empty());
    }

    #[test]
    fn a_named_gpu_is_refused_where_gpus_are_given_out() {
        let error = Slot::divide(2, Device::Cuda(1)).expect_err("it names one").to_string();
        assert!(error.contains("cuda:1") && error.contains("device = \"cuda\""), "{error}");
        let (slots, said) = Slot::divide(2, Device::Cpu).expect("any number of processes has a CPU");
        assert!(slots.len() == 2 && said.is_none());
    }
}
