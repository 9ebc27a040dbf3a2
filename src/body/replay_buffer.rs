//! The replay buffer of a request body: the first part is kept in memory, the rest in an anonymous temporary
//! file, and past both bounds the whole buffer is dropped.

use std::fmt;
use std::io;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};

use super::budget::{BufferBudget, BufferShare};
use super::disk_spill::DiskSpill;

/// The reason why a body cannot be sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// The body is larger than its bound, or all bodies together are larger than theirs.
    TooLarge,
    /// The disk is nearly full.
    DiskFull,
    /// The disk cannot be written or read.
    DiskFailed,
    /// The buffer was dropped, because no attempt would use it.
    Released,
}

impl Loss {
    /// The word for the loss in the log.
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
            Self::TooLarge => "it is larger than the replay buffer",
            Self::DiskFull => "the disk for buffered bodies is nearly full",
            Self::DiskFailed => "the disk for buffered bodies cannot be used",
            Self::Released => "it was discarded",
        })
    }
}

/// A piece smaller than this is copied behind the previous one: a slice would keep its whole read
/// buffer alive, and a body that arrives in single bytes would use many times its size.
const SMALL_BYTES: usize = 4 * 1024;
/// Small pieces are copied together up to this size.
const JOINED_BYTES_MAX: usize = 16 * 1024;

/// The first `bytes_max` bytes of these pieces.
pub(super) fn joined<'a>(pieces: impl Iterator<Item = &'a [u8]>, bytes_max: usize) -> Bytes {
    let mut start = Vec::new();
    for piece in pieces {
        let left = bytes_max - start.len();
        start.extend_from_slice(&piece[..piece.len().min(left)]);
    }
    start.into()
}

/// The kept part of a body, addressed by the offset from its beginning.
#[derive(Debug)]
pub(super) struct ReplayBuffer {
    budget: BufferBudget,
    share: BufferShare,
    memory: Vec<Bytes>,
    /// The end offset of each piece in memory.
    ends: Vec<u64>,
    /// Small pieces, copied together, that follow all pieces in `memory`.
    small_pieces: BytesMut,
    spill: Option<DiskSpill>,
    loss: Option<Loss>,
}

impl ReplayBuffer {
    pub(super) fn new(budget: BufferBudget) -> Self {
        Self {
            // Without a budget until the body exceeds the free bytes: most bodies do not.
            share: BufferShare::default(),
            budget,
            memory: Vec::new(),
            ends: Vec::new(),
            small_pieces: BytesMut::new(),
            spill: None,
            loss: None,
        }
    }

    /// The reason why the buffer is incomplete; `None` while it is complete.
    pub(super) fn loss(&self) -> Option<Loss> {
        self.loss
    }

    /// Whether some of the body was written to disk.
    pub(super) fn is_on_disk(&self) -> bool {
        self.spill.is_some()
    }

    /// Bytes in memory and on disk.
    pub(super) fn bytes(&self) -> u64 {
        self.memory_bytes() + self.spill.as_ref().map_or(0, DiskSpill::bytes)
    }

    /// The first bytes of the body that are in memory, at most `bytes_max`.
    pub(super) fn start(&self, bytes_max: usize) -> Bytes {
        match self.memory.as_slice() {
            [] => Bytes::new(),
            [only] if self.small_pieces.is_empty() => only.slice(..only.len().min(bytes_max)),
            pieces => {
                joined(pieces.iter().map(|piece| &piece[..]).chain([&self.small_pieces[..]]), bytes_max)
            }
        }
    }

    fn memory_bytes(&self) -> u64 {
        self.piece_bytes() + self.small_pieces.len() as u64
    }

    /// Bytes in memory that are not in `small_pieces`.
    fn piece_bytes(&self) -> u64 {
        self.ends.last().copied().unwrap_or(0)
    }

    fn keep(&mut self, data: &Bytes) {
        // The first piece is not copied: for most requests, it is the whole body.
        if data.len() < SMALL_BYTES && !self.memory.is_empty() {
            self.small_pieces.extend_from_slice(data);
            if self.small_pieces.len() >= JOINED_BYTES_MAX {
                self.flush_small_pieces();
            }
            return;
        }
        self.flush_small_pieces();
        self.keep_piece(data.clone());
    }

    fn flush_small_pieces(&mut self) {
        if !self.small_pieces.is_empty() {
            let small_pieces = self.small_pieces.split().freeze();
            self.keep_piece(small_pieces);
        }
    }

    fn keep_piece(&mut self, piece: Bytes) {
        self.ends.push(self.piece_bytes() + piece.len() as u64);
        self.memory.push(piece);
    }

    /// Ready when another piece can be taken. A slow disk delays reading from the client.
    pub(super) fn poll_capacity(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(spill) = &mut self.spill
            && let Err(error) = ready!(spill.poll_capacity(cx))
        {
            self.fail(&error);
        }
        Poll::Ready(())
    }

    /// Keeps the next piece, or drops the buffer.
    pub(super) fn push(&mut self, data: &Bytes) {
        let bytes = data.len() as u64;
        if self.loss.is_some() || bytes == 0 {
            return;
        }
        let in_memory = self.memory_bytes() + bytes;
        let is_kept = self.spill.is_none()
            && self.budget.fits_in_memory(in_memory)
            && self.covers(usize::try_from(in_memory).unwrap_or(usize::MAX));
        if is_kept {
            return self.keep(data);
        }
        if !self.budget.take_disk(self.spill.as_ref().map_or(0, DiskSpill::bytes), bytes) {
            return self.discard(Loss::TooLarge);
        }
        let budget = &self.budget;
        self.spill.get_or_insert_with(|| DiskSpill::new(budget)).push(data.clone());
    }

    fn covers(&mut self, bytes: usize) -> bool {
        if bytes > BufferShare::FREE && self.share.budget().is_none() {
            self.share = self.budget.share(BufferShare::FREE);
        }
        self.share.cover(bytes)
    }

    /// The budget of this buffer.
    pub(super) fn budget(&self) -> &BufferBudget {
        &self.budget
    }

    /// The piece at `at`; `None` at the end of the buffer.
    pub(super) fn poll_piece(&mut self, at: u64, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Loss>>> {
        if at >= self.bytes() {
            return Poll::Ready(None);
        }
        let memory_bytes = self.memory_bytes();
        let piece_bytes = self.piece_bytes();
        if (piece_bytes..memory_bytes).contains(&at) {
            let begin = usize::try_from(at - piece_bytes).unwrap_or(usize::MAX);
            return Poll::Ready(Some(Ok(Bytes::copy_from_slice(&self.small_pieces[begin..]))));
        }
        if at < piece_bytes {
            let index = self.ends.partition_point(|&end| end <= at);
            let (piece, end) = (&self.memory[index], self.ends[index]);
            let begin = end - piece.len() as u64;
            return Poll::Ready(Some(Ok(piece.slice(usize::try_from(at - begin).unwrap_or(usize::MAX)..))));
        }
        let Some(spill) = &mut self.spill else { return Poll::Ready(None) };
        Poll::Ready(Some(ready!(spill.poll_read(at - memory_bytes, cx)).map_err(|error| self.fail(&error))))
    }

    fn fail(&mut self, error: &io::Error) -> Loss {
        let is_full = matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
        let loss = if is_full { Loss::DiskFull } else { Loss::DiskFailed };
        self.discard(loss);
        loss
    }

    /// Drops all pieces; the first reason is kept.
    pub(super) fn discard(&mut self, reason: Loss) {
        self.loss.get_or_insert(reason);
        self.memory = Vec::new();
        self.ends = Vec::new();
        self.small_pieces = BytesMut::new();
        self.share.shrink(0);
        if let Some(spill) = self.spill.take() {
            self.budget.release_disk(spill.bytes());
        }
    }
}

impl Drop for ReplayBuffer {
    fn drop(&mut self) {
        self.discard(Loss::Released);
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use super::super::budget::BufferLimits;
    use super::*;

    fn buffer() -> ReplayBuffer {
        ReplayBuffer::new(BufferBudget::new(&BufferLimits {
            memory_bytes_max: 1 << 20,
            memory_total_bytes_max: 1 << 20,
            disk_bytes_max: 0,
            disk_total_bytes_max: 0,
            disk_free_percent_min: 0,
            directory: std::path::PathBuf::new(),
        }))
    }

    async fn read(buffer: &mut ReplayBuffer) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            let at = all.len() as u64;
            let piece = pin!(std::future::poll_fn(|cx| buffer.poll_piece(at, cx))).await;
            match piece {
                Some(piece) => all.extend_from_slice(&piece.unwrap()),
                None => return all,
            }
        }
    }

    #[tokio::test]
    async fn a_body_of_single_bytes_uses_little_more_than_its_size() {
        let mut buffer = buffer();
        let sent: Vec<u8> = (0..100_000_u32).map(|n| n.to_le_bytes()[0]).collect();
        for byte in &sent {
            // Each is a slice of a whole read buffer, as with bytes that arrive one at a time.
            buffer.push(&Bytes::from(vec![*byte; 8_192]).slice(..1));
        }
        assert_eq!(read(&mut buffer).await, sent);
        assert!(buffer.memory.len() < 10, "{} pieces", buffer.memory.len());
        assert_eq!(buffer.budget.memory_bytes(), 2 * 64 * 1024);
        buffer.discard(Loss::Released);
        assert_eq!(buffer.budget.memory_bytes(), 0);
    }

    #[tokio::test]
    async fn small_and_large_pieces_keep_their_order() {
        let mut buffer = buffer();
        let mut sent = Vec::new();
        let sizes = [3, 1, 5_000, 2, 4_095, 4_096, 7, 16_384, 1, 4_000, 4_000, 4_000, 4_000, 4_000, 9];
        for (index, size) in sizes.into_iter().enumerate() {
            let piece = vec![u8::try_from(index).unwrap(); size];
            buffer.push(&Bytes::from(piece.clone()));
            sent.extend(piece);
            assert_eq!(read(&mut buffer).await, sent);
        }
    }
}
