//! Element by element: arithmetic with a tensor of the same shape or a scalar, and functions of one variable.

use crate::cuda::{args, Arg};
use crate::ops::same_dtype;
use crate::tensor::parallel::{map, map2};
use crate::tensor::{Grads, Op, Real};
use crate::{cuda_source, dispatch_real, DType, Error, Result, Tensor};

cuda_source! { static ELEMENTWISE = "elementwise" { include_str!("elementwise.cu") } }

/// A tensor like `x`, made by a kernel of `elementwise.cu` with a thread for every 16 bytes: it gets the result, the
/// arguments, and the number of elements.
fn by_kernel(name: &'static str, x: &Tensor, args: &[Arg]) -> Result<Tensor> {
    let mut out = Tensor::uninit(x.shape(), x.dtype());
    let gpu = x.gpu().expect("called for a tensor on a GPU");
    let n = x.len();
    let all: Vec<Arg> = [Arg::from(&mut out)].into_iter().chain(args.iter().copied()).chain([n.into()]).collect();
    let size = x.dtype().size();
    let bytes = ((args.len() + 1) * n * size) as f64;
    gpu.kernel(&ELEMENTWISE, name, x.dtype())?.over((n * size).div_ceil(16)).work(0.0, bytes).launch(&mut { all })?;
    Ok(out)
}

/// A function of one variable on a GPU, by the name of its kernel.
pub(super) fn unary_on_gpu(name: &'static str, x: &Tensor) -> Result<Tensor> {
    by_kernel(name, x, &[x.into()])
}

/// `to = from` (f32, on a GPU) if `flag` is not 0; `to` is a tensor that is written, or a place in one.
pub(crate) fn copy_if(to: impl Into<Arg>, from: &Tensor, flag: &Tensor) -> Result<()> {
    let (n, gpu) = (from.len(), from.gpu().expect("called for a tensor on a GPU"));
    let to: Arg = to.into();
    gpu.kernel(&ELEMENTWISE, "copy_if", DType::F32)?.over(n).launch(args![to, from, flag, n])
}

/// Operands of one type: bf16 beside f32 is widened, as sums and losses of bf16 features are f32.
fn promoted(a: &Tensor, b: &Tensor) -> Result<(Tensor, Tensor)> {
    match (a.dtype(), b.dtype()) {
        (DType::BF16, DType::F32) if b.len() > 1 || a.len() == 1 => Ok((a.cast(DType::F32)?, b.clone())),
        (DType::F32, DType::BF16) => Ok((a.clone(), b.cast(DType::F32)?)),
        _ => Ok((a.clone(), b.clone())),
    }
}

/// A function of one variable: (name, f, derivative from x and y = f(x)).
macro_rules! unary {
    ($($(#[$doc:meta])* $method:ident, $op:ident: |$x:ident| $f:expr, |$dx:ident, $dy:ident| $derivative:expr;)*) => {
        impl Tensor {$(
            $(#[$doc])*
            pub fn $method(&self) -> Result<Tensor> {
                $op::default().apply(&[self])
            }
        )*}
        $(
            #[derive(Default)]
            struct $op(Option<(Tensor, Tensor)>);

            impl Op for $op {
                fn name(&self) -> &'static str {
                    stringify!($method)
                }

                fn cuda(&self) -> bool {
                    true
                }

                fn forward(&mut self, inputs: &[&Tensor], save: bool) -> Result<Tensor> {
                    let x = inputs[0];
                    let out = match x.gpu() {
                        Some(_) => unary_on_gpu(concat!("unary_", stringify!($method)), x)?,
                        None => dispatch_real!(stringify!($method), x.dtype(), T => {
                            map(x, #[inline(always)] |$x: T| $f)
                        })?,
                    };
                    if save {
                        self.0 = Some((x.detach(), out.clone()));
                    }
                    Ok(out)
                }

                #[allow(unused_variables)]
                fn backward(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
                    let (x, y) = self.0.expect("saved by forward");
                    if x.gpu().is_some() {
                        let name = concat!("unary_", stringify!($method), "_backward");
                        return grads.add(0, by_kernel(name, &x, &[(&x).into(), (&y).into(), (&dy).into()])?);
                    }
                    let slope = dispatch_real!(stringify!($method), x.dtype(), T => {
                        map2(&x, &y, #[inline(always)] |$dx: T, $dy: T| $derivative)
                    })?;
                    grads.add(0, slope.mul(&dy)?)
                }
            }
        )*
    };
}

unary! {
    /// e^x.
    exp, Exp: |x| x.exp(), |x, y| y;
    /// Natural logarithm.
    ln, Ln: |x| x.ln(), |x, y| T::ONE / x;
    /// Square root.
    sqrt, Sqrt: |x| x.sqrt(), |x, y| T::of(0.5) / y;
    /// Sine of an angle in radians.
    sin, Sin: |x| x.sin(), |x, y| x.cos();
    /// Cosine of an angle in radians.
    cos, Cos: |x| x.cos(), |x, y| -x.sin();
    /// Hyperbolic tangent.
    tanh, Tanh: |x| x.tanh(), |x, y| T::ONE - y * y;
    /// x^2.
    square, Square: |x| x * x, |x, y| x + x;
    /// max(x, 0), NaN where x is NaN; the derivative at 0 is 0.
    relu, Relu: |x| if x <= T::ZERO { T::ZERO } else { x }, |x, y| if x > T::ZERO { T::ONE } else { T::ZERO };
    /// 1 / x.
    recip, Recip: |x| T::ONE / x, |x, y| -y * y;
    /// |x|; the derivative at 0 is 0.
    abs, Abs: |x| x.abs(), |x, y| if x > T::ZERO { T::ONE } else if x < T::ZERO { -T::ONE } else { T::ZERO };
    /// Exact GELU: x Phi(x), Phi the standard normal distribution function.
    gelu, Gelu: |x| crate::ops::elementwise::gelu(x), |x, y| gelu_and_slope(x).1;
    /// Logistic function 1 / (1 + e^-x).
    sigmoid, Sigmoid: |x| sigmoid(x), |x, y| y * (T::ONE - y);
}

/// x Phi(x) (Hendrycks and Gimpel, arXiv:1606.08415, with the exact normal distribution function Phi).
#[inline(always)]
pub(crate) fn gelu<T: Real>(x: T) -> T {
    x * x.normal().0
}

/// x Phi(x), and its derivative Phi(x) + x phi(x).
#[inline(always)]
pub(crate) fn gelu_and_slope<T: Real>(x: T) -> (T, T) {
    let (cdf, pdf) = x.normal();
    (x * cdf, cdf + x * pdf)
}

#[inline(always)]
pub(crate) fn sigmoid<T: Real>(x: T) -> T {
    T::ONE / (T::ONE + (-x).exp())
}

#[derive(Clone, Copy, PartialEq)]
enum Arithmetic {
    Add,
    Sub,
    Mul,
}

/// `a (+|-|*) b` for equal shapes, or `b` of one element.
struct Binary {
    kind: Arithmetic,
    saved: Option<(Tensor, Tensor)>,
}

impl Tensor {
    /// `self + other`; `other` has the same shape or one element.
    pub fn add(&self, other: &Tensor) -> Result<Tensor> {
        self.binary(Arithmetic::Add, other)
    }

    /// `self - other`; `other` has the same shape or one element.
    pub fn sub(&self, other: &Tensor) -> Result<Tensor> {
        self.binary(Arithmetic::Sub, other)
    }

    /// `self * other`; `other` has the same shape or one element.
    pub fn mul(&self, other: &Tensor) -> Result<Tensor> {
        self.binary(Arithmetic::Mul, other)
    }

    fn binary(&self, kind: Arithmetic, other: &Tensor) -> Result<Tensor> {
        let (a, b) = promoted(self, other)?;
        Binary { kind, saved: None }.apply(&[&a, &b])
    }

    /// `self / other`; `other` has the same shape or one element.
    pub fn div(&self, other: &Tensor) -> Result<Tensor> {
        self.mul(&other.recip()?)
    }

    /// `self * factor` for a fixed number (one that changes over time is a tensor: use [`mul`](Self::mul)).
    pub fn scale(&self, factor: f64) -> Result<Tensor> {
        Affine { factor, shift: 0.0 }.apply(&[self])
    }

    /// `self + shift` for a fixed number.
    pub fn shift(&self, shift: f64) -> Result<Tensor> {
        Affine { factor: 1.0, shift }.apply(&[self])
    }

    /// `-self`.
    pub fn neg(&self) -> Result<Tensor> {
        self.scale(-1.0)
    }

    /// max(x, low); the derivative below `low` is 0.
    pub fn clamp_min(&self, low: f64) -> Result<Tensor> {
        self.shift(-low)?.relu()?.shift(low)
    }
}

impl Op for Binary {
    fn name(&self) -> &'static str {
        match self.kind {
            Arithmetic::Add => "add",
            Arithmetic::Sub => "sub",
            Arithmetic::Mul => "mul",
        }
    }

    fn cuda(&self) -> bool {
        true
    }

    fn forward(&mut self, inputs: &[&Tensor], save: bool) -> Result<Tensor> {
        let (a, b) = (inputs[0], inputs[1]);
        if b.len() != 1 || a.gpu().is_none() {
            same_dtype(self.name(), inputs)?;
        }
        if a.shape() != b.shape() && b.len() != 1 {
            return Err(Error::shape(self.name(), format!("{:?} and {:?}", a.shape(), b.shape())));
        }
        if save && self.kind == Arithmetic::Mul {
            self.saved = Some((a.detach(), b.detach()));
        }
        let kind = self.kind;
        if a.gpu().is_some() {
            return combine(kind, a, b);
        }
        dispatch_real!(self.name(), a.dtype(), T => {
            if a.len() != b.len() {
                let s = b.as_slice::<T>()[0];
                return match kind {
                    Arithmetic::Add => map(a, |x: T| x + s),
                    Arithmetic::Sub => map(a, |x: T| x - s),
                    Arithmetic::Mul => map(a, |x: T| x * s),
                };
            }
            match kind {
                Arithmetic::Add => map2(a, b, |x: T, y: T| x + y),
                Arithmetic::Sub => map2(a, b, |x: T, y: T| x - y),
                Arithmetic::Mul => map2(a, b, |x: T, y: T| x * y),
            }
        })
    }

    fn backward(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let (da, db) = match (self.kind, self.saved) {
            (Arithmetic::Mul, saved) => {
                let (a, b) = saved.expect("saved by forward");
                let da = if grads.needs(0) { Some(dy.mul(&b)?) } else { None };
                // Many products that become one sum are not rounded before.
                let wide = |x: &Tensor| if b.len() == 1 { x.cast(x.dtype().wide()) } else { Ok(x.clone()) };
                let db = if grads.needs(1) { Some(wide(&dy)?.mul_same(&wide(&a)?)?) } else { None };
                (da, db.map(|g| (g, b.len())))
            }
            (kind, _) => {
                let db = match (grads.needs(1), kind) {
                    (false, _) => None,
                    (true, Arithmetic::Sub) => Some(dy.neg()?),
                    (true, _) => Some(dy.clone()),
                };
                let len = grads.input_len(1);
                (Some(dy), db.map(|g| (g, len)))
            }
        };
        if let Some((g, len)) = db {
            // A one-element operand met every element.
            grads.add(1, if len == 1 && g.len() != 1 { g.sum()? } else { g })?;
        }
        match da {
            Some(g) => grads.add(0, g),
            None => Ok(()),
        }
    }
}

/// [`Binary`] on a GPU.
fn combine(kind: Arithmetic, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let one = b.len() == 1 && (a.len() != 1 || a.dtype() != b.dtype());
    let narrow = i32::from(b.dtype() == DType::BF16);
    match (kind, one) {
        (Arithmetic::Add, false) => by_kernel("add", a, &[a.into(), b.into()]),
        (Arithmetic::Sub, false) => by_kernel("sub", a, &[a.into(), b.into()]),
        (Arithmetic::Mul, false) => by_kernel("mul", a, &[a.into(), b.into()]),
        (Arithmetic::Mul, true) => by_kernel("mul_one", a, &[a.into(), b.into(), narrow.into()]),
        (kind, true) => {
            let sign = if kind == Arithmetic::Sub { -1f32 } else { 1.0 };
            by_kernel("add_one", a, &[a.into(), b.into(), narrow.into(), sign.into()])
        }
    }
}

impl Tensor {
    /// Product of equal lengths, whatever the shapes.
    fn mul_same(&self, other: &Tensor) -> Result<Tensor> {
        if self.gpu().is_some() {
            return combine(Arithmetic::Mul, self, other);
        }
        dispatch_real!("mul", self.dtype(), T => map2(self, other, |x: T, y: T| x * y))
    }
}

struct Affine {
    factor: f64,
    shift: f64,
}

impl Op for Affine {
    fn name(&self) -> &'static str {
        "affine"
    }

    fn cuda(&self) -> bool {
        true
    }

    fn forward(&mut self, inputs: &[&Tensor], _: bool) -> Result<Tensor> {
        if inputs[0].gpu().is_some() {
            let factors = [inputs[0].into(), (self.factor as f32).into(), (self.shift as f32).into()];
            return by_kernel("affine", inputs[0], &factors);
        }
        dispatch_real!("affine", inputs[0].dtype(), T => {
            let (a, b) = (T::of(self.factor), T::of(self.shift));
            map(inputs[0], |x: T| x * a + b)
        })
    }

    fn backward(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        grads.add(0, if self.factor == 1.0 { dy } else { dy.scale(self.factor)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;

    #[test]
    fn what_is_not_a_number_is_not_made_one() {
        for dtype in [DType::F32, DType::F64] {
            let x = Tensor::from_f64(&[f64::NAN, -1.0, -0.0, 2.0], &[4], dtype).unwrap();
            for (made, rest) in [(x.relu(), [0.0, 0.0, 2.0]), (x.clamp_min(1.0), [1.0, 1.0, 2.0])] {
                let made = made.unwrap().to_f64_vec();
                assert!(made[0].is_nan() && made[1..] == rest, "{made:?}");
            }
        }
    }
}
