//! The outlines of objects, as signed distances.

/// A kind of object; its place in [`Shape::ALL`] is its class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    Disc,
    Square,
    Triangle,
    Star,
    Ring,
    Cross,
    Crescent,
    Arrow,
}

impl Shape {
    /// All kinds. A dataset with fewer classes takes the first ones.
    pub const ALL: [Self; 8] =
        [Self::Disc, Self::Square, Self::Triangle, Self::Star, Self::Ring, Self::Cross, Self::Crescent, Self::Arrow];

    /// The outline in a circle of about radius 1.
    pub fn outline(self) -> Outline {
        let spokes = |n: usize, radius: &dyn Fn(usize) -> f32| {
            let angle = |i: usize| std::f32::consts::TAU * i as f32 / n as f32;
            Outline::polygon((0..n).map(|i| [radius(i) * angle(i).sin(), -radius(i) * angle(i).cos()]).collect())
        };
        match self {
            Self::Disc => Outline::Disc,
            Self::Ring => Outline::Ring,
            Self::Crescent => Outline::Crescent,
            Self::Square => spokes(4, &|_| 1.2),
            Self::Triangle => spokes(3, &|_| 1.2),
            Self::Star => spokes(10, &|i| if i % 2 == 0 { 1.2 } else { 0.5 }),
            Self::Cross => {
                let (a, b) = (0.36, 1.05);
                let quarter = [[a, -b], [a, -a], [b, -a]];
                let turned = |[x, y]: [f32; 2], turns: usize| (0..turns).fold([x, y], |[x, y], _| [-y, x]);
                Outline::polygon((0..4).flat_map(|t| quarter.map(|p| turned(p, t))).collect())
            }
            Self::Arrow => {
                let half = [[0.0, -1.15], [0.95, 0.1], [0.36, 0.1], [0.36, 1.05]];
                let mirrored = half[1..].iter().rev().map(|&[x, y]| [-x, y]);
                Outline::polygon(half.into_iter().chain(mirrored).collect())
            }
        }
    }
}

/// An outline whose signed distance (negative inside) can be computed anywhere.
pub enum Outline {
    Disc,
    Ring,
    Crescent,
    Polygon(Vec<Edge>),
}

/// From `start`, `along`, to the height `end`; `inverse` is 1 / length^2.
pub struct Edge {
    start: [f32; 2],
    end: f32,
    along: [f32; 2],
    inverse: f32,
}

impl Outline {
    fn polygon(corners: Vec<[f32; 2]>) -> Self {
        let edge = |i: usize| {
            let (start, end) = (corners[i], corners[(i + 1) % corners.len()]);
            let along = [end[0] - start[0], end[1] - start[1]];
            Edge { start, end: end[1], along, inverse: 1.0 / (along[0] * along[0] + along[1] * along[1]) }
        };
        Self::Polygon((0..corners.len()).map(edge).collect())
    }

    /// Signed distance of the points `(x[i], y[i])`.
    #[inline(always)]
    pub fn distances(&self, x: &[f32], y: &[f32], out: &mut [f32]) {
        let points = out.iter_mut().zip(x.iter().zip(y));
        match self {
            Self::Disc => points.for_each(
                #[inline(always)]
                |(d, (x, y))| *d = (x * x + y * y).sqrt() - 1.0,
            ),
            Self::Ring => points.for_each(
                #[inline(always)]
                |(d, (x, y))| *d = ((x * x + y * y).sqrt() - 0.78).abs() - 0.27,
            ),
            Self::Crescent => points.for_each(
                #[inline(always)]
                |(d, (x, y))| {
                    let bite = x - 0.55;
                    *d = ((x * x + y * y).sqrt() - 1.05).max(0.85 - (bite * bite + y * y).sqrt());
                },
            ),
            Self::Polygon(edges) => {
                // While edges are walked, `out` holds the squared distance, its sign flipped at every crossing of the
                // ray to the right: points inside cross an odd number of times.
                out.fill(f32::MAX);
                for edge in edges {
                    let ([ax, ay], [ex, ey]) = (edge.start, edge.along);
                    for (d, (x, y)) in out.iter_mut().zip(x.iter().zip(y)) {
                        let (wx, wy) = (x - ax, y - ay);
                        let t = ((wx * ex + wy * ey) * edge.inverse).clamp(0.0, 1.0);
                        let (dx, dy) = (wx - ex * t, wy - ey * t);
                        // Compared as they are, so that neighbouring edges agree on which side of their corner y is.
                        let above = *y >= ay;
                        let below = *y < edge.end;
                        let left = ex * wy > ey * wx;
                        let crossed = (above & below & left) | (!above & !below & !left);
                        let sign = if crossed { -d.signum() } else { d.signum() };
                        *d = sign * d.abs().min(dx * dx + dy * dy);
                    }
                }
                out.iter_mut().for_each(|d| *d = d.signum() * d.abs().sqrt());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shape_is_solid_where_it_should_be() {
        let inside = |shape: Shape, x: f32, y: f32| {
            let mut d = [0.0];
            shape.outline().distances(&[x], &[y], &mut d);
            d[0] < 0.0
        };
        for shape in Shape::ALL {
            let hollow = matches!(shape, Shape::Ring | Shape::Crescent);
            assert_eq!(inside(shape, 0.0, 0.0), !hollow, "{shape:?} at its centre");
            for (x, y) in [(1.3, 0.0), (-1.3, 0.2), (0.1, 1.3), (-0.9, -0.9), (0.9, 0.9)] {
                assert!(!inside(shape, x, y), "{shape:?} at {x}, {y}");
            }
        }
        assert!(inside(Shape::Ring, 0.0, 0.8) && inside(Shape::Crescent, -0.8, 0.0));
        assert!(inside(Shape::Cross, 0.9, 0.0) && !inside(Shape::Cross, 0.6, 0.6));
        assert!(inside(Shape::Star, 0.0, -1.0) && !inside(Shape::Star, 0.0, 0.9));
        assert!(inside(Shape::Arrow, 0.3, 0.9) && !inside(Shape::Arrow, 0.8, 0.6));
    }
}
