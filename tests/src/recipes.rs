//! Parts of recipes that several test programs train.

/// Every shipped loss, small, that sees parts of a batch as it sees the whole, but for those of DINOv3. The images have four
/// classes.
pub const LOSSES_OF_PARTS: &str = r#"
[losses.inpainting]
[losses.rotation]
turns = 3
[losses.jigsaw]
permutations = 6
hidden = 16
[losses.relative_location]
neighbours = 5
hidden = 16
[losses.cka]
points = 3
[losses.feature_distillation]
[losses.online_linear]
classes = 4
"#;
