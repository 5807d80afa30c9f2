//! A case: named inputs and options, small enough to read, printable as code.

use std::fmt::Write as _;
use std::sync::Arc;

use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::TestRunner;
use serde_json::Value as Json;

use crate::rng::{Rng, Stream};
use crate::Tensor;

/// Standard normal numbers (f64); `index` tells the operands of a case apart.
pub fn normal(seed: u64, index: u64, shape: &[usize]) -> Tensor {
    let mut rng = Rng::new(seed, Stream::Plugin, 0, index);
    let data: Vec<f64> = (0..shape.iter().product::<usize>()).map(|_| rng.normal()).collect();
    Tensor::from_slice(&data, shape).expect("as many numbers were drawn")
}

/// One input of a case.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Input {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    pub(super) values: Vec<f64>,
    /// Whether it has a gradient.
    pub(super) tracked: bool,
}

/// Named inputs (f64) and options: what an operation or a loss is checked on.
#[derive(Clone, Debug, PartialEq)]
pub struct Case {
    pub(super) options: Json,
    pub(super) inputs: Vec<Input>,
}

impl Case {
    /// A case without inputs. `options` is a table: sizes and whatever else is chosen.
    pub fn new(options: Json) -> Self {
        Self { options, inputs: Vec::new() }
    }

    /// With an input that has a gradient.
    pub fn tracked(self, name: &str, shape: &[usize], values: &[f64]) -> Self {
        self.with(name, shape, values, true)
    }

    /// With an input that is held fixed.
    pub fn fixed(self, name: &str, shape: &[usize], values: &[f64]) -> Self {
        self.with(name, shape, values, false)
    }

    fn with(mut self, name: &str, shape: &[usize], values: &[f64], tracked: bool) -> Self {
        assert_eq!(shape.iter().product::<usize>(), values.len(), "input `{name}` of a case has another shape");
        self.inputs.push(Input { name: name.into(), shape: shape.into(), values: values.into(), tracked });
        self
    }

    /// With one input mapped by `f`.
    ///
    /// # Panics
    /// If there is no such input, or `f` gives another number of elements.
    pub fn mapped(&self, name: &str, f: impl FnOnce(&Tensor) -> Tensor) -> Self {
        let Input { shape, values, .. } = self.input(name);
        let moved = f(&Tensor::from_slice(values, shape).expect("an input fills its shape")).to_f64_vec();
        assert_eq!(moved.len(), values.len(), "input `{name}` keeps its shape");
        let mut case = self.clone();
        case.inputs.iter_mut().filter(|x| x.name == name).for_each(|x| x.values.clone_from(&moved));
        case
    }

    fn option(&self, key: &str) -> &Json {
        self.options.get(key).unwrap_or_else(|| panic!("the case has no option `{key}`: {}", self.options))
    }

    /// A whole number among the options.
    ///
    /// # Panics
    /// If there is none of that name, as all of these.
    pub fn size(&self, key: &str) -> usize {
        self.option(key).as_u64().unwrap_or_else(|| panic!("option `{key}` is a whole number")) as usize
    }

    /// A number among the options.
    pub fn number(&self, key: &str) -> f64 {
        self.option(key).as_f64().unwrap_or_else(|| panic!("option `{key}` is a number"))
    }

    /// A truth value among the options.
    pub fn flag(&self, key: &str) -> bool {
        self.option(key).as_bool().unwrap_or_else(|| panic!("option `{key}` is true or false"))
    }

    /// A text among the options.
    pub fn text(&self, key: &str) -> &str {
        self.option(key).as_str().unwrap_or_else(|| panic!("option `{key}` is a text"))
    }

    /// A list of whole numbers among the options.
    pub fn indices(&self, key: &str) -> Vec<usize> {
        let list = self.option(key).as_array().unwrap_or_else(|| panic!("option `{key}` is a list"));
        list.iter().filter_map(Json::as_u64).map(|i| i as usize).collect()
    }

    /// The same list as a tensor of row numbers.
    pub fn rows(&self, key: &str) -> Tensor {
        let rows: Vec<u32> = self.indices(key).into_iter().map(|i| i as u32).collect();
        Tensor::from_slice(&rows, &[rows.len()]).expect("a list has one axis")
    }

    /// The numbers of an input.
    pub fn values(&self, name: &str) -> &[f64] {
        &self.input(name).values
    }

    pub(super) fn input(&self, name: &str) -> &Input {
        let found = self.inputs.iter().find(|x| x.name == name);
        found.unwrap_or_else(|| panic!("the case has no input `{name}`"))
    }

    /// A test that holds `name` to this case again.
    pub fn code(&self, kind: &str, name: &str) -> String {
        let mut code = String::from("use dinolab_core::testing::{hold, Case};\nuse serde_json::json;\n\n#[test]\n");
        let inner = |text: &mut String| -> std::fmt::Result {
            writeln!(text, "fn {}_of_this_case() {{", name.replace('-', "_"))?;
            write!(text, "    let case = Case::new(json!({}))", self.options)?;
            for Input { name, shape, values, tracked } in &self.inputs {
                let how = if *tracked { "tracked" } else { "fixed" };
                write!(text, "\n        .{how}({name:?}, &{shape:?}, &{values:?})")?;
            }
            writeln!(text, ";\n    hold({kind:?}, {name:?}, &case).unwrap();\n}}")
        };
        inner(&mut code).expect("writing to a string");
        code
    }
}

/// A case whose inputs are tensors, on a tape where they are tracked.
#[derive(Clone)]
pub struct Bound<'a> {
    pub(super) case: &'a Case,
    pub(super) tensors: Vec<Tensor>,
}

impl Bound<'_> {
    /// The input of that name.
    ///
    /// # Panics
    /// If there is none.
    pub fn tensor(&self, name: &str) -> &Tensor {
        let at = self.case.inputs.iter().position(|x| x.name == name);
        &self.tensors[at.unwrap_or_else(|| panic!("the case has no input `{name}`"))]
    }

    /// The input of that name, if there is one.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.case.inputs.iter().position(|x| x.name == name).map(|at| &self.tensors[at])
    }

    /// The case, for its options.
    pub fn case(&self) -> &Case {
        self.case
    }
}

/// An input before it has values.
#[derive(Clone, Debug)]
pub struct Slot {
    name: String,
    shape: Vec<usize>,
    tracked: bool,
    positive: bool,
    scale: f64,
}

/// An input that has a gradient.
pub fn tracked(name: impl Into<String>, shape: &[usize]) -> Slot {
    Slot { name: name.into(), shape: shape.into(), tracked: true, positive: false, scale: 1.0 }
}

/// An input that is held fixed.
pub fn fixed(name: impl Into<String>, shape: &[usize]) -> Slot {
    Slot { tracked: false, ..tracked(name, shape) }
}

impl Slot {
    /// With positive numbers only.
    pub fn positive(self) -> Self {
        Self { positive: true, ..self }
    }

    /// With numbers a quarter as large: weights, which keep features about as large as they are.
    pub fn small(self) -> Self {
        Self { scale: 0.25, ..self }
    }

    /// Numbers in [-2, 2] (or [0.1, 2]), three decimals and a half: short to print, and never within 0.0005 of 0, where
    /// `relu` and its like have no derivative.
    fn values(&self) -> BoxedStrategy<Vec<f64>> {
        let thousandths = if self.positive { 100..2000i32 } else { -2000..2000 };
        let scale = self.scale;
        let number = thousandths.prop_map(move |k| scale * (f64::from(k) + 0.5) / 1000.0);
        proptest::collection::vec(number, self.shape.iter().product::<usize>()).boxed()
    }

    /// Standard normal numbers, made positive and smaller as the random ones are; `index` tells inputs apart.
    fn normal(&self, index: u64) -> Vec<f64> {
        let positive = |x: f64| if self.positive { x.abs() + 0.1 } else { x };
        normal(0, index, &self.shape).to_f64_vec().into_iter().map(|x| self.scale * positive(x)).collect()
    }
}

type SlotsOf = dyn Fn(&Case) -> Vec<Slot>;

/// Cases of an operation or a loss: options, and inputs whose names and shapes follow from them.
pub struct Cases {
    options: BoxedStrategy<Json>,
    slots: Arc<SlotsOf>,
    large: Vec<Json>,
}

/// Random cases, and none that is [large](Cases::large).
pub fn cases(options: impl Strategy<Value = Json> + 'static, slots: impl Fn(&Case) -> Vec<Slot> + 'static) -> Cases {
    Cases { options: options.boxed(), slots: Arc::new(slots), large: Vec::new() }
}

impl Cases {
    /// Further cases at which an operation is held on a device to the CPU: options that make it use all that a kernel has,
    /// such as more blocks than one, rows that do not fill a block, or another kernel for wide rows.
    pub fn large(self, options: impl IntoIterator<Item = Json>) -> Self {
        Self { large: options.into_iter().collect(), ..self }
    }

    /// Random cases. One that fails shrinks by its options first, then number by number.
    pub(super) fn random(self) -> BoxedStrategy<Case> {
        let Self { options, slots, .. } = self;
        let fill = move |options: Json| {
            let case = Case::new(options);
            let slots = slots(&case);
            let values: Vec<_> = slots.iter().map(Slot::values).collect();
            values.prop_map(move |values| filled(&case, &slots, values))
        };
        options.prop_flat_map(fill).boxed()
    }

    /// The large cases, of normal numbers; where there is none, a random one that is always the same.
    pub(super) fn for_device(self) -> Vec<Case> {
        let Self { options, slots, large } = self;
        let draw = || {
            let tree = options.new_tree(&mut TestRunner::deterministic()).expect("options can be drawn");
            vec![tree.current()]
        };
        let of = |options: Json| {
            let case = Case::new(options);
            let slots = slots(&case);
            let values = (0..).zip(&slots).map(|(i, slot)| slot.normal(i)).collect();
            filled(&case, &slots, values)
        };
        if large.is_empty() { draw() } else { large }.into_iter().map(of).collect()
    }
}

fn filled(case: &Case, slots: &[Slot], values: Vec<Vec<f64>>) -> Case {
    let filled = slots.iter().zip(&values);
    filled.fold(case.clone(), |case, (slot, values)| case.with(&slot.name, &slot.shape, values, slot.tracked))
}
