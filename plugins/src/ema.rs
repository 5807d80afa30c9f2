//! Teacher policy `ema`: the exponential moving average of the student.

use dinolab_core::contract::{At, Follow, Role, Schedule, TeacherPolicy};
use dinolab_core::{plugin, Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The exponential moving average of the student's weights.
///
/// `teacher = momentum * teacher + (1 - momentum) * student` after every optimizer update (Tarvainen and Valpola,
/// arXiv:1703.01780); it starts as a copy of the student.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Ema {
    /// Share of the teacher that is kept each step, in [0, 1].
    pub momentum: Schedule,
}

impl Default for Ema {
    fn default() -> Self {
        Self { momentum: Schedule::constant(0.994) }
    }
}

impl Ema {
    fn build(self) -> Result<Box<dyn TeacherPolicy>> {
        self.check("ema")?;
        Ok(Box::new(self))
    }

    /// Refuses a momentum that is no share; `plugin` is whose it is.
    pub(crate) fn check(&self, plugin: &str) -> Result<()> {
        match self.momentum.as_constant() {
            Some(m) if !(0.0..=1.0).contains(&m) => Err(Error::user(
                format!("teacher `{plugin}`: `momentum` is {m}"),
                "it is the share of the teacher that is kept each step: give a number in [0, 1], such as 0.994",
            )),
            _ => Ok(()),
        }
    }
}

impl TeacherPolicy for Ema {
    fn start(&self) -> Role {
        Role::Student
    }

    fn after_step(&self, at: At) -> Follow {
        Follow::Ema { momentum: self.momentum.at(at) }
    }
}

plugin!(TeacherPolicy, "ema", Ema, |config: Ema, _: &mut _| config.build());

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_momentum_outside_the_unit_interval_is_refused() {
        for (momentum, fits) in [(0.0, true), (1.0, true), (-0.1, false), (1.5, false)] {
            assert_eq!(Ema { momentum: momentum.into() }.build().is_ok(), fits, "{momentum}");
        }
    }
}
