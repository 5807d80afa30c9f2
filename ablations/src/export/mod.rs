//! What `dinolab export` writes beside a model's tensors: the model card, and shards with their index.

pub mod card;
pub mod shards;
