//! What is held of a body: the first part in memory, the rest in a file, and past both bounds
//! nothing at all.

use std::fmt;
use std::io;
use std::task::{Context, Poll, ready};

use bytes::Bytes;

use super::room::Room;
use super::spool::Spool;

/// Why a body cannot be sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// It is larger than its bound, or all bodies together are larger than theirs.
    TooLarge,
    /// The disk is nearly full.
    DiskFull,
    /// The disk cannot be written or read.
    DiskFailed,
    /// It was let go, because nobody would ask for it.
    Released,
}

impl Loss {
    /// The word in the log.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::TooLarge => "too_large",
            Self::DiskFull => "disk_full",
            Self::DiskFailed => "disk_failed",
            Self::Released => "released",
        }
    }
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TooLarge => "it is larger than may be held",
            Self::DiskFull => "the disk for held bodies is nearly full",
            Self::DiskFailed => "the disk for held bodies cannot be used",
            Self::Released => "it was let go",
        })
    }
}

/// The held part of a body, addressed by bytes from its beginning.
#[derive(Debug)]
pub(super) struct Held {
    room: Room,
    memory: Vec<Bytes>,
    /// Where each piece of memory ends.
    ends: Vec<u64>,
    spool: Option<Spool>,
    loss: Option<Loss>,
}

impl Held {
    pub(super) fn new(room: Room) -> Self {
        Self { room, memory: Vec::new(), ends: Vec::new(), spool: None, loss: None }
    }

    /// Why it is not whole, if it is not.
    pub(super) fn loss(&self) -> Option<Loss> {
        self.loss
    }

    /// Bytes that are held.
    pub(super) fn bytes(&self) -> u64 {
        self.memory_bytes() + self.spool.as_ref().map_or(0, Spool::bytes)
    }

    fn memory_bytes(&self) -> u64 {
        self.ends.last().copied().unwrap_or(0)
    }

    /// Ready when another piece can be taken. A slow disk makes the client wait.
    pub(super) fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(spool) = &mut self.spool
            && let Err(error) = ready!(spool.poll_room(cx))
        {
            self.fail(&error);
        }
        Poll::Ready(())
    }

    /// Takes the next piece, or gives up holding.
    pub(super) fn push(&mut self, data: &Bytes) {
        let bytes = data.len() as u64;
        if self.loss.is_some() || bytes == 0 {
            return;
        }
        if self.spool.is_none() && self.room.memory().take(self.memory_bytes(), bytes) {
            self.ends.push(self.memory_bytes() + bytes);
            self.memory.push(data.clone());
            return;
        }
        if !self.room.disk().take(self.spool.as_ref().map_or(0, Spool::bytes), bytes) {
            return self.let_go(Loss::TooLarge);
        }
        let room = &self.room;
        let spool =
            self.spool.get_or_insert_with(|| Spool::new(room.directory(), room.disk_free_percent_min()));
        spool.push(data.clone());
    }

    /// The piece at `at`; `None` at the end of what is held.
    pub(super) fn poll_piece(&mut self, at: u64, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Loss>>> {
        if at >= self.bytes() {
            return Poll::Ready(None);
        }
        let memory_bytes = self.memory_bytes();
        if at < memory_bytes {
            let index = self.ends.partition_point(|&end| end <= at);
            let (piece, end) = (&self.memory[index], self.ends[index]);
            let begin = end - piece.len() as u64;
            return Poll::Ready(Some(Ok(piece.slice(usize::try_from(at - begin).unwrap_or(usize::MAX)..))));
        }
        let Some(spool) = &mut self.spool else { return Poll::Ready(None) };
        Poll::Ready(Some(ready!(spool.poll_read(at - memory_bytes, cx)).map_err(|error| self.fail(&error))))
    }

    fn fail(&mut self, error: &io::Error) -> Loss {
        let is_full = matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
        let loss = if is_full { Loss::DiskFull } else { Loss::DiskFailed };
        self.let_go(loss);
        loss
    }

    /// Holds nothing any more.
    pub(super) fn let_go(&mut self, why: Loss) {
        self.loss.get_or_insert(why);
        self.room.memory().give_back(self.memory_bytes());
        self.memory = Vec::new();
        self.ends = Vec::new();
        if let Some(spool) = self.spool.take() {
            self.room.disk().give_back(spool.bytes());
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.let_go(Loss::Released);
    }
}
