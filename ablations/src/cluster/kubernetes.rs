//! A suite as an Indexed Job of Kubernetes: one index a run. The manifest is JSON, which `kubectl apply -f -` takes.

use serde_json::{json, Value};

use super::job::Jobs;
use crate::suite::{Plan, PlannedRun};

/// What is asked of Kubernetes, on the command line.
#[derive(Clone, Debug)]
pub struct Options {
    /// The container's image, which has `dinolab` in its path, and a shell.
    pub image: String,
    /// The claim of the volume that the working directory lies on.
    pub claim: String,
    /// The queue of Kueue, if one is to start the job.
    pub queue: Option<String>,
    /// Runs at a time, at most.
    pub parallel: Option<usize>,
    /// Whether a run gets a GPU.
    pub gpu: bool,
}

/// How often an index that dies without saving is begun again.
const DEATHS: u32 = 6;
/// Seconds to save in.
const GRACE: u32 = 120;

/// The manifest for the runs in `left`, all trunks or all arms.
///
/// An index that was interrupted (code 75), or whose node went away, is begun again and does not count; one that failed or
/// cannot begin (1, 2) is given up, and the others go on.
pub fn manifest(plan: &Plan, jobs: &Jobs, left: &[(&PlannedRun, bool)], options: &Options) -> Value {
    let runs: Vec<String> = left.iter().map(|(run, _)| run.dir.display().to_string()).collect();
    let again = left.iter().any(|(_, again)| *again);
    let command = jobs.run_command("\"$1\"", again);
    let script = format!("set -- {}; shift \"$JOB_COMPLETION_INDEX\"; exec {command}", runs.join(" "));
    let labels = options.queue.as_ref().map_or(json!({}), |queue| json!({ "kueue.x-k8s.io/queue-name": queue }));
    let here = jobs.here().display().to_string();
    let limits = if options.gpu { json!({ "limits": { "nvidia.com/gpu": 1 } }) } else { json!({}) };
    let on_exit = |action: &str, codes: &[u32]| json!({ "action": action, "onExitCodes": { "containerName": "dinolab", "operator": "In", "values": codes } });
    json!({
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": { "generateName": format!("{}-", name(&plan.suite.name)), "labels": labels },
        "spec": {
            "completionMode": "Indexed",
            "completions": runs.len(),
            "parallelism": options.parallel.unwrap_or(runs.len()).min(runs.len()),
            "suspend": options.queue.is_some(),
            "backoffLimitPerIndex": DEATHS,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": { "rules": [
                { "action": "Ignore", "onPodConditions": [{ "type": "DisruptionTarget" }] },
                on_exit("Ignore", &[u32::from(crate::cli::RESUMABLE)]),
                on_exit("FailIndex", &[1, 2]),
            ] },
            "template": { "spec": {
                "restartPolicy": "Never",
                "terminationGracePeriodSeconds": GRACE,
                "containers": [{
                    "name": "dinolab",
                    "image": options.image,
                    "workingDir": here,
                    "command": ["/bin/sh", "-c", script],
                    "resources": limits,
                    "volumeMounts": [{ "name": "work", "mountPath": here }],
                }],
                "volumes": [{ "name": "work", "persistentVolumeClaim": { "claimName": options.claim } }],
            } },
        },
    })
}

/// A name of Kubernetes: small letters, digits and hyphens.
fn name(suite: &str) -> String {
    let fits = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    let name: String = suite.chars().map(fits).take(50).collect();
    match name.trim_matches('-') {
        "" => "suite".into(),
        name => name.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::name;

    #[test]
    fn every_suite_has_a_name_of_kubernetes() {
        assert_eq!([name("Gram_on off"), name("---"), name("-é-")], ["gram-on-off", "suite", "suite"]);
    }
}
