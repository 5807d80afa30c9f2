//! The reverse-mode tape, and the trait by which operations join it.
//!
//! [`Op`] is the one public way to add a differentiable operation, used by every built-in one:
//!
//! ```
//! use dinolab_core::tensor::{Grads, Op, Tape};
//! use dinolab_core::{DType, Result, Tensor};
//!
//! /// y = x^2, dx = 2 x dy.
//! #[derive(Default)]
//! struct Square(Option<Tensor>);
//!
//! impl Op for Square {
//!     fn name(&self) -> &'static str {
//!         "square"
//!     }
//!     fn forward(&mut self, inputs: &[&Tensor], save: bool) -> Result<Tensor> {
//!         let x = inputs[0];
//!         let y: Vec<f64> = x.as_slice::<f64>().iter().map(|x| x * x).collect();
//!         if save {
//!             self.0 = Some(x.detach());
//!         }
//!         Tensor::from_slice(&y, x.shape())
//!     }
//!     fn backward(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
//!         let x = self.0.expect("saved by forward");
//!         let dx: Vec<f64> = x.as_slice::<f64>().iter().zip(dy.as_slice::<f64>()).map(|(x, d)| 2.0 * x * d).collect();
//!         grads.add(0, Tensor::from_slice(&dx, x.shape())?)
//!     }
//! }
//!
//! let tape = Tape::new();
//! let x = tape.leaf(&Tensor::from_slice(&[1.0, -3.0], &[2])?);
//! let y = Square::default().apply(&[&x])?.sum()?;
//! assert_eq!(y.item(), 10.0);
//! let grads = tape.backward(&y, 1.0, None)?;
//! assert_eq!(grads.of(&x).unwrap().to_f64_vec(), [2.0, -6.0]);
//! # Ok::<(), dinolab_core::Error>(())
//! ```

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::kernels::{self, RowSums};
use super::{watch, Element, Tensor};
use crate::{dispatch_real, profile, scope, DType, Device, Error, Result};

/// A differentiable operation: forward once, then (if recorded) backward once.
pub trait Op: Send + 'static {
    /// Its name in diagnoses and profiles.
    fn name(&self) -> &'static str;

    /// Computes the result. With `save`, keeps in `self` what `backward` will need; without, nothing.
    fn forward(&mut self, inputs: &[&Tensor], save: bool) -> Result<Tensor>;

    /// Given `dy`, the gradient of the loss with respect to the result, adds the gradient with respect to each input
    /// that needs one. `dy` is owned: when it [is unique](Tensor::is_unique) it may be overwritten.
    fn backward(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()>;

    /// Whether it knows what to do with tensors on a GPU. One that does not runs on the host: its inputs are copied
    /// there (bf16 as f32), its results back.
    fn cuda(&self) -> bool {
        false
    }

    /// Runs the operation where its inputs are, and records it if any input is tracked.
    fn apply(self, inputs: &[&Tensor]) -> Result<Tensor>
    where
        Self: Sized,
    {
        apply(Box::new(self), inputs)
    }
}

fn apply(mut op: Box<dyn Op>, inputs: &[&Tensor]) -> Result<Tensor> {
    let device = inputs.first().map_or_else(Device::current, |x| x.device());
    if device != Device::Cpu && !op.cuda() {
        op = Box::new(OnHost { op, device });
    }
    let name = op.name();
    if let Some(other) = inputs.iter().find(|x| x.device() != device) {
        return Err(Error::shape(name, format!("operands are on {device} and {}", other.device())));
    }
    let _on = device.enter();
    let _part = profile::part(name);
    let tape = inputs.iter().find_map(|x| x.var.as_ref()).map(|v| v.tape.clone());
    let mut out = op.forward(inputs, tape.is_some())?;
    watch::observe(|| format!("{name} in {}", scope::current()), &out);
    if let Some(tape) = tape {
        let inputs = inputs.iter().map(|x| x.var.as_ref().map(|v| v.id)).collect();
        out.var = Some(tape.push(NodeKind::Op { op, inputs, scope: scope::current() }, &out));
    }
    Ok(out)
}

/// An operation without a kernel of its own, run on the host for tensors on a GPU.
struct OnHost {
    op: Box<dyn Op>,
    device: Device,
}

impl Op for OnHost {
    fn name(&self) -> &'static str {
        self.op.name()
    }

    fn cuda(&self) -> bool {
        true
    }

    fn forward(&mut self, inputs: &[&Tensor], save: bool) -> Result<Tensor> {
        let name = self.op.name();
        super::device::cannot_record(|| format!("operation `{name}` has no CUDA kernel and runs on the host"));
        let wide = |x: &&Tensor| match x.dtype() {
            DType::BF16 => x.cast(DType::F32).map(|x| x.to(Device::Cpu)),
            _ => Ok(x.to(Device::Cpu)),
        };
        let host: Vec<Tensor> = inputs.iter().map(wide).collect::<Result<_>>()?;
        let out = Device::Cpu.with(|| self.op.forward(&host.iter().collect::<Vec<_>>(), save))?;
        let out = out.to(self.device);
        // Features stay in the step's type, scalars in theirs.
        let narrow = out.len() > 1 && out.dtype() == DType::F32 && inputs.iter().any(|x| x.dtype() == DType::BF16);
        if narrow {
            out.cast(DType::BF16)
        } else {
            Ok(out)
        }
    }

    fn backward(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let Self { op, device, .. } = *self;
        let dy = if dy.dtype() == DType::BF16 { dy.cast(DType::F32)? } else { dy }.to(Device::Cpu);
        let _on = Device::Cpu.enter();
        let mut host = Grads { host: Some(device), ..grads.reborrow() };
        op.backward(dy, &mut host)
    }
}

/// What a tracked tensor knows of its tape.
#[derive(Clone)]
pub(crate) struct Var {
    tape: Tape,
    id: usize,
}

enum NodeKind {
    Leaf,
    Param(Range<usize>),
    Op {
        op: Box<dyn Op>,
        inputs: Vec<Option<usize>>,
        scope: String,
    },
    /// An operation whose backward pass has run.
    Done,
}

struct Node {
    kind: NodeKind,
    shape: Vec<usize>,
    dtype: DType,
}

/// A record of operations, to be run backward once.
#[derive(Clone, Default)]
pub struct Tape(Arc<Mutex<Vec<Node>>>);

impl Tape {
    /// An empty tape.
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Node>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, kind: NodeKind, value: &Tensor) -> Var {
        let mut nodes = self.lock();
        nodes.push(Node { kind, shape: value.shape.clone(), dtype: value.dtype });
        Var { tape: self.clone(), id: nodes.len() - 1 }
    }

    /// Follows `value`; its gradient is found in the result of [`backward`](Self::backward).
    pub fn leaf(&self, value: &Tensor) -> Tensor {
        let var = self.push(NodeKind::Leaf, value);
        Tensor { var: Some(var), ..value.clone() }
    }

    /// Follows a parameter: its gradient is *added* to `range` of the flat gradient buffer given to
    /// [`backward`](Self::backward).
    pub fn param(&self, value: &Tensor, range: Range<usize>) -> Tensor {
        let var = self.push(NodeKind::Param(range), value);
        Tensor { var: Some(var), ..value.clone() }
    }

    /// Runs backward from the scalar `loss` with gradient `seed`, freeing the tape as it goes.
    ///
    /// # Errors
    /// If `loss` is not a scalar of this tape, or an operation fails.
    pub fn backward(&self, loss: &Tensor, seed: f64, params: Option<&mut Tensor>) -> Result<LeafGrads> {
        if loss.len() != 1 {
            return Err(Error::shape("backward", format!("the loss must be a scalar, not {:?}", loss.shape)));
        }
        let seed = loss.device().with(|| Tensor::full(&loss.shape, loss.dtype, seed))?;
        self.backward_from(loss, seed, params)
    }

    /// Runs backward from `result`, whose gradient is `dy`, freeing the tape as it goes.
    ///
    /// # Errors
    /// If `result` is not of this tape, or an operation fails.
    pub fn backward_from(&self, result: &Tensor, dy: Tensor, params: Option<&mut Tensor>) -> Result<LeafGrads> {
        self.backward_from_slot(
            result,
            Slot { grad: dy, row_sums: None },
            params.map(|flat| flat as &mut dyn ParamGrads),
        )
    }

    /// [`backward`](Self::backward) with the gradients of parameters wherever `params` has them.
    pub(crate) fn backward_into(&self, loss: &Tensor, seed: f64, params: &mut dyn ParamGrads) -> Result<LeafGrads> {
        let seed = loss.device().with(|| Tensor::full(&loss.shape, loss.dtype, seed))?;
        self.backward_from_slot(loss, Slot { grad: seed, row_sums: None }, Some(params))
    }

    pub(crate) fn backward_from_slot(
        &self,
        result: &Tensor,
        dy: Slot,
        mut params: Option<&mut dyn ParamGrads>,
    ) -> Result<LeafGrads> {
        let Some(var) = result.var.as_ref().filter(|v| Arc::ptr_eq(&v.tape.0, &self.0)) else {
            return Err(Error::shape("backward", "the loss is not on this tape"));
        };
        // The nodes leave the tape, so that operations in `backward` may use tensors of their own freely.
        let mut nodes = std::mem::take(&mut *self.lock());
        let _on = result.device().enter();
        let mut slots: Vec<Option<Slot>> = nodes.iter().map(|_| None).collect();
        slots[var.id] = Some(dy);
        for id in (0..=var.id).rev() {
            match (&nodes[id].kind, params.as_deref_mut()) {
                (NodeKind::Op { .. }, _) => {}
                // What uses it comes behind it on the tape.
                (NodeKind::Param(range), Some(params)) => {
                    params.done(range)?;
                    continue;
                }
                _ => continue,
            }
            let NodeKind::Op { op, inputs, scope } = std::mem::replace(&mut nodes[id].kind, NodeKind::Done) else {
                unreachable!("checked just above");
            };
            let Some(Slot { grad: dy, row_sums }) = slots[id].take() else { continue };
            let name = op.name();
            let _part = profile::gradient_part(name);
            watch::observe(|| format!("gradient of {name} in {scope}"), &dy);
            let params = reborrow(&mut params);
            let mut grads = Grads { nodes: &nodes, inputs: &inputs, slots: &mut slots, params, row_sums, host: None };
            op.backward(dy, &mut grads)?;
        }
        let leaves = nodes.iter().enumerate().filter(|(_, n)| matches!(n.kind, NodeKind::Leaf));
        let grads = leaves.filter_map(|(id, _)| slots[id].take().map(|slot| (id, slot))).collect();
        Ok(LeafGrads { tape: self.clone(), grads })
    }
}

/// The gradients of a tape's leaves.
pub struct LeafGrads {
    tape: Tape,
    grads: Vec<(usize, Slot)>,
}

impl LeafGrads {
    /// The gradient with respect to `leaf`; `None` if the loss does not depend on it.
    pub fn of(&self, leaf: &Tensor) -> Option<&Tensor> {
        self.place_of(leaf).map(|at| &self.grads[at].1.grad)
    }

    /// The same, taken out.
    pub(crate) fn take(&mut self, leaf: &Tensor) -> Option<Slot> {
        self.place_of(leaf).map(|at| self.grads.swap_remove(at).1)
    }

    fn place_of(&self, leaf: &Tensor) -> Option<usize> {
        let var = leaf.var.as_ref().filter(|v| Arc::ptr_eq(&v.tape.0, &self.tape.0))?;
        self.grads.iter().position(|(id, _)| *id == var.id)
    }
}

/// Where the gradients of parameters are added up: a flat buffer, or what gives them away as soon as they are known.
pub(crate) trait ParamGrads {
    /// A buffer with the gradient of the parameter at this range of the layout, and the element that it begins at.
    fn buffer(&mut self, range: &Range<usize>) -> Result<(&mut Tensor, usize)>;

    /// The tape that is run backward adds nothing more to the gradient of the parameter at this range.
    fn done(&mut self, range: &Range<usize>) -> Result<()>;
}

impl ParamGrads for Tensor {
    fn buffer(&mut self, _: &Range<usize>) -> Result<(&mut Tensor, usize)> {
        Ok((self, 0))
    }

    fn done(&mut self, _: &Range<usize>) -> Result<()> {
        Ok(())
    }
}

fn reborrow<'a>(params: &'a mut Option<&mut dyn ParamGrads>) -> Option<&'a mut dyn ParamGrads> {
    match params {
        Some(params) => Some(&mut **params),
        None => None,
    }
}

/// The gradient of a node so far.
pub(crate) struct Slot {
    pub(crate) grad: Tensor,
    /// The sums of its rows, if whoever wrote it last had them at hand.
    pub(crate) row_sums: Option<RowSums>,
}

/// Where an operation's backward pass puts its results.
pub struct Grads<'a> {
    nodes: &'a [Node],
    inputs: &'a [Option<usize>],
    slots: &'a mut [Option<Slot>],
    params: Option<&'a mut dyn ParamGrads>,
    /// The sums of the rows of the result's gradient, if they are known.
    row_sums: Option<RowSums>,
    /// The device of the gradients, when the operation itself runs on the host.
    host: Option<Device>,
}

/// The place of one input's gradient: write it (or add to it, when `add`).
pub struct GradMut<'a> {
    buffer: &'a mut Tensor,
    range: Range<usize>,
    /// Whether something is there already, to be added to.
    pub add: bool,
}

impl<'a> GradMut<'a> {
    /// All of a tensor, to be overwritten.
    pub(crate) fn of(buffer: &'a mut Tensor) -> Self {
        let range = 0..buffer.len();
        Self { buffer, range, add: false }
    }

    /// The elements of the gradient.
    pub fn as_mut_slice<T: Element>(&mut self) -> &mut [T] {
        &mut self.buffer.as_mut_slice()[self.range.clone()]
    }

    /// On a GPU: the address of the gradient and the type of its elements. Gradients of parameters are f32 whatever the
    /// type of the step; one that reaches its parameter through `reshape`, `cat` or another operation has the step's type
    /// until there.
    pub fn device_place(&self) -> (u64, DType) {
        let dtype = self.buffer.dtype();
        (self.buffer.device_address() + (self.range.start * dtype.size()) as u64, dtype)
    }
}

impl Grads<'_> {
    fn reborrow(&mut self) -> Grads<'_> {
        let params = reborrow(&mut self.params);
        Grads { nodes: self.nodes, inputs: self.inputs, slots: self.slots, params, row_sums: None, host: self.host }
    }

    /// The gradients of parameters, for a tape inside an operation.
    pub(crate) fn params(&mut self) -> Option<&mut dyn ParamGrads> {
        reborrow(&mut self.params)
    }

    /// Whether input `i` is tracked.
    pub fn needs(&self, i: usize) -> bool {
        self.inputs[i].is_some()
    }

    /// The number of inputs.
    pub fn inputs(&self) -> usize {
        self.inputs.len()
    }

    /// The number of elements of input `i`, if it is tracked (otherwise 0).
    pub fn input_len(&self, i: usize) -> usize {
        self.inputs[i].map_or(0, |id| self.nodes[id].shape.iter().product())
    }

    /// Adds `grad` to the gradient of input `i` (nothing if it is not tracked).
    pub fn add(&mut self, i: usize, mut grad: Tensor) -> Result<()> {
        let Some(id) = self.inputs[i] else { return Ok(()) };
        debug_assert_eq!(grad.len(), self.nodes[id].shape.iter().product::<usize>(), "gradient of another shape");
        let moves = !matches!(self.nodes[id].kind, NodeKind::Param(_)) && self.slots[id].is_none();
        if let Some(device) = self.host.take() {
            let moved = device.with(|| self.add(i, grad.to(device)));
            self.host = Some(device);
            return moved;
        }
        if moves && grad.is_unique() && grad.dtype() == self.nodes[id].dtype {
            grad.shape.clone_from(&self.nodes[id].shape);
            self.slots[id] = Some(Slot { grad, row_sums: None });
            return Ok(());
        }
        if grad.gpu().is_some() {
            return self.accumulate(i, |mut dst| kernels::accumulate(&mut dst, &grad));
        }
        dispatch_real!("gradient", grad.dtype(), T => self.accumulate(i, |mut dst| {
            let add = dst.add;
            let dst = dst.as_mut_slice::<T>();
            let src = grad.as_slice::<T>();
            if add {
                kernels::parallel::zip_mut(dst, src, |d, s| *d += s);
            } else {
                dst.copy_from_slice(src);
            }
            Ok(())
        }))
    }

    /// Lets `f` write, or add to, the gradient of input `i` in place (nothing if it is not tracked).
    pub fn accumulate(&mut self, i: usize, f: impl FnOnce(GradMut<'_>) -> Result<()>) -> Result<()> {
        let mut f = Some(f);
        self.accumulate_with(i, &mut |place| f.take().expect("called once")(place))
    }

    fn accumulate_with(&mut self, i: usize, f: &mut dyn FnMut(GradMut<'_>) -> Result<()>) -> Result<()> {
        let Some(id) = self.inputs[i] else { return Ok(()) };
        let node = &self.nodes[id];
        if self.host.is_some() {
            // Written on the host, then added where the gradient is.
            let dtype = if node.dtype == DType::BF16 { DType::F32 } else { node.dtype };
            let mut grad = Tensor::uninit(&node.shape, dtype);
            let range = 0..grad.len();
            f(GradMut { buffer: &mut grad, range, add: false })?;
            return self.add(i, grad);
        }
        if let NodeKind::Param(range) = &node.kind {
            let Some(params) = reborrow(&mut self.params) else {
                return Err(Error::shape("backward", "parameters are tracked but no gradient buffer was given"));
            };
            let (buffer, start) = params.buffer(range)?;
            return f(GradMut { buffer, range: range.start - start..range.end - start, add: true });
        }
        let add = self.slots[id].is_some();
        let new = || Slot { grad: Tensor::uninit(&node.shape, node.dtype), row_sums: None };
        let Slot { grad, row_sums } = self.slots[id].get_or_insert_with(new);
        *row_sums = None;
        if add && !grad.is_unique() {
            *grad = grad.to_owned();
        }
        let range = 0..grad.len();
        f(GradMut { buffer: grad, range, add })
    }

    /// The sums of the rows of the result's gradient `dy`, where the operation that computed it left them.
    pub(crate) fn row_sums_of_dy(&mut self) -> Option<RowSums> {
        self.row_sums.take()
    }

    /// Leaves the sums of the rows of input `i`'s gradient for the operation that made that input. They must be those of
    /// all that is in the gradient so far; what is added later makes them forgotten.
    pub(crate) fn leave_row_sums(&mut self, i: usize, sums: RowSums) {
        if let (Some(slot), None) = (self.inputs[i].and_then(|id| self.slots[id].as_mut()), self.host) {
            slot.row_sums = Some(sums);
        }
    }

    /// [`add`](Self::add), and [`leave_row_sums`](Self::leave_row_sums) if nothing was there before.
    pub(crate) fn add_slot(&mut self, i: usize, Slot { grad, row_sums }: Slot) -> Result<()> {
        let first = self.inputs[i].is_some_and(|id| self.slots[id].is_none());
        self.add(i, grad)?;
        match row_sums {
            Some(sums) if first => self.leave_row_sums(i, sums),
            _ => {}
        }
        Ok(())
    }
}
