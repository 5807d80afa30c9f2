//! The teachers follow: what their policies want before and after a step.

use crate::contract::{At, Follow, TeacherPolicy};
use crate::tensor::catch_out_of_memory;
use crate::{Error, Result};

use super::weights::Of;
use super::Learner;

impl Learner {
    /// What the teachers' policies do before a step.
    pub(super) fn before_step(&mut self, at: At) -> Result<()> {
        self.weights.follow(Of::Teacher, follow(self.teacher.before_step(at), at)?, &self.model, &self.ranks)?;
        self.follow_named(at, |policy| policy.before_step(at))
    }

    /// What the policies do after the update, which the EMA was part of.
    pub(super) fn follow_after(&mut self, at: At, follow: Follow) -> Result<()> {
        if let Follow::Copy(_) = follow {
            self.weights.follow(Of::Teacher, follow, &self.model, &self.ranks)?;
        }
        self.follow_named(at, |policy| policy.after_step(at))
    }

    /// After step `step`, whose update was skipped: teachers that copy weights after it copy those that there are. An average takes
    /// nothing from such a step.
    ///
    /// # Errors
    /// If weights cannot be read, or the device fails.
    pub fn pass_over(&mut self, step: u64) -> Result<()> {
        let at = At { step, total: self.total };
        let copied = |follow| if let Follow::Copy(_) = follow { follow } else { Follow::Keep };
        let _on = self.device.enter();
        catch_out_of_memory(|| {
            self.weights.follow(Of::Teacher, copied(self.teacher.after_step(at)), &self.model, &self.ranks)?;
            self.follow_named(at, |policy| copied(policy.after_step(at)))
        })
    }

    fn follow_named(&mut self, at: At, what: impl Fn(&dyn TeacherPolicy) -> Follow) -> Result<()> {
        for (i, teacher) in self.named.iter().enumerate() {
            self.weights.follow(Of::Named(i), follow(what(teacher.policy.as_ref()), at)?, &self.model, &self.ranks)?;
        }
        Ok(())
    }
}

/// What a policy wants at `at`.
///
/// # Errors
/// If it asks for a mean whose weights are no shares: the teacher would leave the student's range.
pub(super) fn follow(follow: Follow, at: At) -> Result<Follow> {
    match follow {
        Follow::Ema { momentum } if !(0.0..=1.0).contains(&momentum) => Err(Error::user(
            format!("the teacher's momentum is {momentum} in step {}", at.step + 1),
            "it is the share of the teacher that is kept: let its schedule stay in [0, 1]",
        )),
        follow => Ok(follow),
    }
}
