//! What holds for the source itself: links, keys that are read, rooms that do not need each other.

mod book_links;
mod keys;
mod rooms;
