//! What was read of a body before anyone asked for it: in memory, within the same room as what is
//! held, and only until it is passed on.

use std::collections::VecDeque;

use bytes::Bytes;

use super::room::Room;

/// Pieces that have come and were not passed on yet.
#[derive(Debug)]
pub(super) struct Ahead {
    room: Room,
    pieces: VecDeque<Bytes>,
    bytes: u64,
    /// Of these, so many are counted in the room.
    taken: u64,
    is_full: bool,
}

impl Ahead {
    pub(super) fn new(room: Room) -> Self {
        Self { room, pieces: VecDeque::new(), bytes: 0, taken: 0, is_full: false }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Whether another piece may be read.
    pub(super) fn has_room(&self, bytes_max: usize) -> bool {
        !self.is_full && self.bytes < bytes_max as u64
    }

    /// Takes a piece; it stays, also when there was no room for it.
    pub(super) fn push(&mut self, piece: Bytes) {
        let bytes = piece.len() as u64;
        if self.room.memory().take(self.taken, bytes) {
            self.taken += bytes;
        } else {
            self.is_full = true;
        }
        self.bytes += bytes;
        self.pieces.push_back(piece);
    }

    pub(super) fn pop(&mut self) -> Option<Bytes> {
        let piece = self.pieces.pop_front()?;
        self.bytes -= piece.len() as u64;
        self.give_back(self.taken.saturating_sub(self.bytes));
        Some(piece)
    }

    /// All of it, in one piece.
    pub(super) fn start(&self) -> Bytes {
        match self.pieces.len() {
            1 => self.pieces.front().cloned().unwrap_or_default(),
            _ => self.pieces.iter().flatten().copied().collect(),
        }
    }

    fn give_back(&mut self, bytes: u64) {
        self.room.memory().give_back(bytes);
        self.taken -= bytes;
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.give_back(self.taken);
    }
}
