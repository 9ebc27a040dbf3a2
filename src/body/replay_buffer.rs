//! Buffers a request body for retries: keeps the first part in memory and the rest in an anonymous temporary
//! file. If the rest exceeds its limit or the file cannot be used, the whole buffer is dropped, and the body is not
//! sent again.

use std::fmt;
use std::io;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};

use super::budget::{BufferBudget, BufferReservation};
use super::disk_spill::DiskSpill;

/// The reason why the replay buffer of a body was dropped, so that the body cannot be sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplayLoss {
    /// The body exceeds the limits of one body, or all bodies together exceed their limits.
    TooLarge,
    /// The disk is nearly full, or its quota is exceeded.
    DiskFull,
    /// Writing or reading the file failed.
    DiskFailed,
    /// The buffer was freed, because there will be no further attempt.
    Released,
}

impl ReplayLoss {
    /// Returns the code of this reason in the log.
    #[must_use]
    pub fn code(self) -> &'static str {
        match self {
            Self::TooLarge => "too_large",
            Self::DiskFull => "disk_full",
            Self::DiskFailed => "disk_failed",
            Self::Released => "released",
        }
    }
}

impl fmt::Display for ReplayLoss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TooLarge => "the body is larger than the replay buffer",
            Self::DiskFull => "the disk for buffered bodies is nearly full",
            Self::DiskFailed => "the disk for buffered bodies cannot be used",
            Self::Released => "the buffer was discarded",
        })
    }
}

/// Chunks smaller than this size are copied into a joined chunk. Keeping a slice would keep its whole read
/// buffer alive, so a body that arrives in single bytes would use many times its size.
const SMALL_CHUNK_SIZE: usize = 4 * 1024;
/// Minimum size of a complete joined chunk.
const JOINED_CHUNK_SIZE: usize = 16 * 1024;

/// Joins the first `max_bytes` bytes of `chunks`.
pub(super) fn join_chunks<'a>(chunks: impl Iterator<Item = &'a [u8]>, max_bytes: usize) -> Bytes {
    let mut joined_chunk = Vec::new();
    for chunk in chunks {
        let remaining = max_bytes - joined_chunk.len();
        joined_chunk.extend_from_slice(&chunk[..chunk.len().min(remaining)]);
    }
    joined_chunk.into()
}

/// The buffered part of a body, addressed by the offset in the body.
#[derive(Debug)]
pub(super) struct ReplayBuffer {
    budget: BufferBudget,
    reservation: BufferReservation,
    /// The chunks in memory, each with the offset of its end in the body.
    chunks: Vec<(Bytes, u64)>,
    /// The joined small chunks that follow `chunks`.
    small_chunks: BytesMut,
    /// The part of the body that follows the part in memory, or `None` while the whole buffer is in memory.
    spill: Option<DiskSpill>,
    loss: Option<ReplayLoss>,
}

impl ReplayBuffer {
    pub(super) fn new(budget: BufferBudget) -> Self {
        Self {
            // The reservation is replaced once the body exceeds the unbudgeted bytes. Most bodies do not exceed them.
            reservation: BufferReservation::default(),
            budget,
            chunks: Vec::new(),
            small_chunks: BytesMut::new(),
            spill: None,
            loss: None,
        }
    }

    /// Returns the reason why the buffer is incomplete, or `None` while it is complete.
    pub(super) fn loss(&self) -> Option<ReplayLoss> {
        self.loss
    }

    /// Returns whether part of the body is on disk.
    pub(super) fn is_on_disk(&self) -> bool {
        self.spill.is_some()
    }

    /// Returns the number of bytes in memory and on disk.
    pub(super) fn bytes(&self) -> u64 {
        self.memory_bytes() + self.spill.as_ref().map_or(0, DiskSpill::bytes)
    }

    /// Returns up to `max_bytes` of the start of the body, without the part on disk.
    pub(super) fn start(&self, max_bytes: usize) -> Bytes {
        match self.chunks.as_slice() {
            [] => Bytes::new(),
            [(chunk, _)] if self.small_chunks.is_empty() => chunk.slice(..chunk.len().min(max_bytes)),
            chunks => {
                let chunks = chunks.iter().map(|(chunk, _)| &chunk[..]);
                join_chunks(chunks.chain([&self.small_chunks[..]]), max_bytes)
            }
        }
    }

    fn memory_bytes(&self) -> u64 {
        self.chunk_bytes() + self.small_chunks.len() as u64
    }

    /// Returns the number of bytes in `chunks`.
    fn chunk_bytes(&self) -> u64 {
        self.chunks.last().map_or(0, |(_, end)| *end)
    }

    /// Appends data to the part in memory, and joins small chunks.
    fn push_to_memory(&mut self, data: &Bytes) {
        // The first chunk is not copied, because it is the complete body of most requests.
        let is_small = data.len() < SMALL_CHUNK_SIZE && !self.chunks.is_empty();
        if is_small {
            self.small_chunks.extend_from_slice(data);
        }
        if !self.small_chunks.is_empty() && (!is_small || self.small_chunks.len() >= JOINED_CHUNK_SIZE) {
            let joined_chunk = self.small_chunks.split().freeze();
            self.push_chunk(joined_chunk);
        }
        if !is_small {
            self.push_chunk(data.clone());
        }
    }

    fn push_chunk(&mut self, chunk: Bytes) {
        let end = self.chunk_bytes() + chunk.len() as u64;
        self.chunks.push((chunk, end));
    }

    /// Returns `Ready` once more data can be buffered. A slow disk thus delays reading from the client. A failed write
    /// drops the buffer.
    pub(super) fn poll_capacity(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(spill) = &mut self.spill
            && let Err(error) = ready!(spill.poll_capacity(cx))
        {
            self.discard_after(&error);
        }
        Poll::Ready(())
    }

    /// Buffers the next data of the body, or drops the buffer if the data does not fit.
    pub(super) fn push(&mut self, data: &Bytes) {
        let bytes = data.len() as u64;
        if self.loss.is_some() || bytes == 0 {
            return;
        }
        let memory_bytes = self.memory_bytes() + bytes;
        let fits_in_memory = self.spill.is_none()
            && self.budget.fits_in_memory(memory_bytes)
            && self.try_reserve_memory(usize::try_from(memory_bytes).unwrap_or(usize::MAX));
        if fits_in_memory {
            return self.push_to_memory(data);
        }
        if !self.budget.take_disk(self.spill.as_ref().map_or(0, DiskSpill::bytes), bytes) {
            return self.discard(ReplayLoss::TooLarge);
        }
        let budget = &self.budget;
        self.spill.get_or_insert_with(|| DiskSpill::new(budget)).push(data.clone());
    }

    /// Reserves memory for a part in memory of `bytes`. Returns whether the budget had the memory.
    fn try_reserve_memory(&mut self, bytes: usize) -> bool {
        if bytes > BufferReservation::UNBUDGETED_BYTES && self.reservation.budget().is_none() {
            self.reservation = self.budget.reservation(BufferReservation::UNBUDGETED_BYTES);
        }
        self.reservation.try_resize(bytes)
    }

    pub(super) fn budget(&self) -> &BufferBudget {
        &self.budget
    }

    /// Reads one or more bytes at `offset`. Returns `None` at the end of the buffer.
    pub(super) fn poll_read(
        &mut self,
        offset: u64,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, ReplayLoss>>> {
        let (chunk_bytes, memory_bytes) = (self.chunk_bytes(), self.memory_bytes());
        let index_from = |start: u64| usize::try_from(offset - start).unwrap_or(usize::MAX);
        if offset < chunk_bytes {
            let (chunk, end) = &self.chunks[self.chunks.partition_point(|(_, end)| *end <= offset)];
            return Poll::Ready(Some(Ok(chunk.slice(index_from(end - chunk.len() as u64)..))));
        }
        if offset < memory_bytes {
            return Poll::Ready(Some(Ok(Bytes::copy_from_slice(
                &self.small_chunks[index_from(chunk_bytes)..],
            ))));
        }
        match &mut self.spill {
            Some(spill) if offset - memory_bytes < spill.bytes() => {
                let data = ready!(spill.poll_read(offset - memory_bytes, cx));
                Poll::Ready(Some(data.map_err(|error| self.discard_after(&error))))
            }
            Some(_) | None => Poll::Ready(None),
        }
    }

    /// Drops all data after an error of the disk. Returns the reason.
    fn discard_after(&mut self, error: &io::Error) -> ReplayLoss {
        let is_full = matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
        let loss = if is_full { ReplayLoss::DiskFull } else { ReplayLoss::DiskFailed };
        self.discard(loss);
        loss
    }

    /// Drops all data. The first call determines the reason of the loss.
    pub(super) fn discard(&mut self, reason: ReplayLoss) {
        self.loss.get_or_insert(reason);
        self.chunks = Vec::new();
        self.small_chunks = BytesMut::new();
        self.reservation.shrink(0);
        if let Some(spill) = self.spill.take() {
            self.budget.release_disk(spill.bytes());
        }
    }
}

impl Drop for ReplayBuffer {
    fn drop(&mut self) {
        self.discard(ReplayLoss::Released);
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use super::super::budget::BufferLimits;
    use super::*;

    fn buffer() -> ReplayBuffer {
        ReplayBuffer::new(BufferBudget::new(&BufferLimits {
            max_body_memory: 1 << 20,
            max_total_memory: 1 << 20,
            max_body_disk: 0,
            max_total_disk: 0,
            min_disk_free_percent: 0,
            directory: std::path::PathBuf::new(),
        }))
    }

    /// Reads the buffered part of the body from its start to its end.
    async fn read_all(buffer: &mut ReplayBuffer) -> Vec<u8> {
        let mut read_bytes = Vec::new();
        loop {
            let offset = read_bytes.len() as u64;
            match pin!(std::future::poll_fn(|cx| buffer.poll_read(offset, cx))).await {
                Some(data) => read_bytes.extend_from_slice(&data.unwrap()),
                None => return read_bytes,
            }
        }
    }

    #[tokio::test]
    async fn a_body_of_single_bytes_uses_little_more_than_its_size() {
        let mut buffer = buffer();
        let body_bytes: Vec<u8> = (0..100_000_u32).map(|index| index.to_le_bytes()[0]).collect();
        for byte in &body_bytes {
            // Each byte is a slice of a whole read buffer, like a byte that arrives alone.
            buffer.push(&Bytes::from(vec![*byte; 8_192]).slice(..1));
        }
        assert_eq!(read_all(&mut buffer).await, body_bytes);
        let chunk_count = buffer.chunks.len();
        assert!(chunk_count < 10, "small chunks must be joined, but there are {chunk_count} chunks");
        assert_eq!(buffer.budget.memory_bytes(), 2 * 64 * 1024, "memory must be taken in steps of 64 KiB");
        buffer.discard(ReplayLoss::Released);
        assert_eq!(buffer.budget.memory_bytes(), 0);
    }

    #[tokio::test]
    async fn small_and_large_chunks_keep_their_order() {
        let mut buffer = buffer();
        let mut sent_bytes = Vec::new();
        let sizes = [3, 1, 5_000, 2, 4_095, 4_096, 7, 16_384, 1, 4_000, 4_000, 4_000, 4_000, 4_000, 9];
        for (index, size) in sizes.into_iter().enumerate() {
            let chunk = vec![u8::try_from(index).unwrap(); size];
            buffer.push(&Bytes::from(chunk.clone()));
            sent_bytes.extend(chunk);
            assert_eq!(read_all(&mut buffer).await, sent_bytes);
        }
    }
}
