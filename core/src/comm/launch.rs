//! Who a process is among those that were started together: what launchers leave in the environment.

use std::fmt;

use crate::{Error, Result};

/// What started the processes of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launcher {
    /// `mpirun` of Open MPI.
    OpenMpi,
    /// `mpiexec` of MPICH, Intel MPI and others with its process manager (PMI).
    Mpich,
    /// A job step of Slurm: `srun`.
    Slurm,
    /// PyTorch's `torchrun`.
    Torchrun,
}

impl fmt::Display for Launcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OpenMpi => "Open MPI's mpirun",
            Self::Mpich => "mpiexec",
            Self::Slurm => "srun",
            Self::Torchrun => "torchrun",
        })
    }
}

/// One of the processes that were started together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// What started them.
    pub launcher: Launcher,
    /// How many there are.
    pub world: usize,
    /// This one, 0-based.
    pub rank: usize,
    /// How many there are on this machine, as far as the launcher says.
    pub local_world: Option<usize>,
    /// This one among those on this machine, 0-based, as far as the launcher says.
    pub local_rank: Option<usize>,
}

/// The name of this machine.
pub fn host() -> String {
    sysinfo::System::host_name().unwrap_or_else(|| "a machine without a name".into())
}

/// Set to 1, a process is alone whatever started it.
const ALONE: &str = "DINOLAB_RANKS";

impl Launch {
    /// What the environment says; nothing where a process is alone.
    ///
    /// # Errors
    /// If the launcher's variables make no sense, or it is one whose processes cannot be joined.
    pub fn detect() -> Result<Option<Self>> {
        Self::of(&|name| std::env::var(name).ok())
    }

    /// The same with an environment that is given.
    ///
    /// # Errors
    /// As [`detect`](Self::detect).
    pub fn of(env: &dyn Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        match env(ALONE).as_deref() {
            None | Some("") => {}
            Some("1") => return Ok(None),
            Some(other) => {
                let problem = format!("{ALONE} = {other:?} in the environment");
                return Err(Error::user(problem, "1 makes every process a run of its own; otherwise remove it"));
            }
        }
        let number = |name: &str| -> Result<Option<usize>> {
            let Some(text) = env(name) else { return Ok(None) };
            let wrong = || Error::user(format!("{name} = {text:?} in the environment is no number"), "unset it");
            text.trim().parse().map(Some).map_err(|_| wrong())
        };
        // A step of Slurm also sets PMI's variables; an allocation without a step sets SLURM_NTASKS, and starts nothing.
        let step = if env("SLURM_STEP_ID").is_some() { "SLURM_STEP_NUM_TASKS" } else { "" };
        // torchrun is started by others, as one process a machine.
        let torchrun = if env("TORCHELASTIC_RUN_ID").is_some() { ["WORLD_SIZE", "RANK"] } else { [""; 2] };
        let known = [
            (Launcher::Torchrun, torchrun, ["LOCAL_WORLD_SIZE", "LOCAL_RANK"]),
            (
                Launcher::OpenMpi,
                ["OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"],
                ["OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"],
            ),
            (Launcher::Slurm, [step, "SLURM_PROCID"], ["", "SLURM_LOCALID"]),
            (Launcher::Mpich, ["PMI_SIZE", "PMI_RANK"], ["MPI_LOCALNRANKS", "MPI_LOCALRANKID"]),
        ];
        for (launcher, [world, rank], [local_world, local_rank]) in known {
            let (Some(world), Some(rank)) = (number(world)?, number(rank)?) else { continue };
            if rank >= world {
                let problem = format!("{launcher} says that this is rank {rank} of {world}");
                return Err(Error::user(problem, format!("set {ALONE}=1 if this process is a run of its own")));
            }
            let (local_world, local_rank) = (number(local_world)?, number(local_rank)?);
            let launch = Self { launcher, world, rank, local_world, local_rank };
            return Ok((world > 1).then_some(launch));
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(env: &[(&str, &str)]) -> Result<Option<Launch>> {
        Launch::of(&|name| env.iter().find(|(known, _)| *known == name).map(|(_, value)| value.to_string()))
    }

    #[test]
    fn launchers_are_told_apart_by_what_they_leave() {
        let launch = |launcher, world, rank, local_world, local_rank| {
            Some(Launch { launcher, world, rank, local_world, local_rank })
        };
        let mpirun = [
            ("OMPI_COMM_WORLD_SIZE", "4"),
            ("OMPI_COMM_WORLD_RANK", "3"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
            ("PMIX_RANK", "3"),
        ];
        let hydra = [("PMI_SIZE", "2"), ("PMI_RANK", "0"), ("MPI_LOCALNRANKS", "2"), ("MPI_LOCALRANKID", "0")];
        let srun =
            [("SLURM_STEP_ID", "0"), ("SLURM_STEP_NUM_TASKS", "8"), ("SLURM_PROCID", "5"), ("SLURM_LOCALID", "1")];
        // What a user has in `salloc`, and the script of a job: no processes of a step.
        let salloc = [("SLURM_JOB_ID", "7"), ("SLURM_NTASKS", "8"), ("SLURM_PROCID", "0")];
        let torchrun = [
            ("TORCHELASTIC_RUN_ID", "none"),
            ("RANK", "3"),
            ("WORLD_SIZE", "4"),
            ("LOCAL_RANK", "1"),
            ("LOCAL_WORLD_SIZE", "2"),
        ];
        let below_srun = [&torchrun[..], &srun].concat();
        let cases: [(&[_], _); 9] = [
            (&[], None),
            (&mpirun, launch(Launcher::OpenMpi, 4, 3, Some(2), Some(1))),
            (&hydra, launch(Launcher::Mpich, 2, 0, Some(2), Some(0))),
            (&srun, launch(Launcher::Slurm, 8, 5, None, Some(1))),
            (&salloc, None),
            (&torchrun, launch(Launcher::Torchrun, 4, 3, Some(2), Some(1))),
            (&below_srun, launch(Launcher::Torchrun, 4, 3, Some(2), Some(1))),
            (&[("OMPI_COMM_WORLD_SIZE", "1"), ("OMPI_COMM_WORLD_RANK", "0")], None),
            (&[("RANK", "0"), ("WORLD_SIZE", "2")], None),
        ];
        for (env, expected) in cases {
            assert_eq!(of(env).unwrap(), expected, "{env:?}");
        }
        assert_eq!(of(&[&mpirun[..], &[("DINOLAB_RANKS", "1")]].concat()).unwrap(), None);
    }

    #[test]
    fn what_makes_no_sense_is_an_error_that_names_it() {
        let cases: [(&[_], &str); 3] = [
            (&[("PMI_SIZE", "two"), ("PMI_RANK", "0")], "PMI_SIZE"),
            (&[("PMI_SIZE", "2"), ("PMI_RANK", "2")], "rank 2 of 2"),
            (&[("DINOLAB_RANKS", "2")], "DINOLAB_RANKS"),
        ];
        for (env, named) in cases {
            let error = of(env).unwrap_err().to_string();
            assert!(error.contains(named), "{env:?}: {error}");
        }
    }
}
