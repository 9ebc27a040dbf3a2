//! Stores the part of a request body that exceeds its memory in an anonymous temporary file. The operating
//! system deletes the file when its last handle is closed, even after a crash.
//!
//! File operations block, so they run on the runtime's blocking threads. The size of the write queue is
//! limited, so that a disk that is slower than the client delays reading from the client.

use std::collections::VecDeque;
use std::fs::File;
use std::future::Future;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use tokio::task::JoinHandle;

use super::budget::{BufferBudget, BufferReservation};
use crate::platform::files;
use crate::tasks;

/// Maximum number of bytes in the write queue, not counting the chunk that exceeds it.
const MAX_QUEUED_BYTES: u64 = 256 * 1024;
/// Maximum number of bytes of one read from the file.
const MAX_READ_BYTES: u64 = 64 * 1024;

/// A temporary file with a write queue. Data is appended, and can be read at any offset.
#[derive(Debug)]
pub(super) struct DiskSpill {
    directory: Arc<Path>,
    min_free_percent: u64,
    file: Option<Arc<File>>,
    /// Bytes already in the file.
    written_bytes: u64,
    /// Chunks that are not yet in the file. The first ones may be part of the pending write.
    queue: VecDeque<Bytes>,
    queue_bytes: u64,
    /// The memory of the queue.
    reservation: BufferReservation,
    pending_write: Option<PendingWrite>,
    pending_read: Option<PendingRead>,
}

#[derive(Debug)]
struct PendingWrite {
    task: JoinHandle<io::Result<Arc<File>>>,
    chunks: usize,
    bytes: u64,
}

#[derive(Debug)]
struct PendingRead {
    offset: u64,
    task: JoinHandle<io::Result<Bytes>>,
}

impl DiskSpill {
    /// Creates an empty spill. The first write creates the file.
    pub(super) fn new(budget: &BufferBudget) -> Self {
        Self {
            directory: budget.directory().into(),
            min_free_percent: budget.min_disk_free_percent(),
            reservation: budget.reservation(BufferReservation::FREE),
            file: None,
            written_bytes: 0,
            queue: VecDeque::new(),
            queue_bytes: 0,
            pending_write: None,
            pending_read: None,
        }
    }

    /// Returns the number of bytes in the file and in the queue.
    pub(super) fn bytes(&self) -> u64 {
        self.written_bytes + self.queue_bytes
    }

    /// Queues data for the file.
    pub(super) fn push(&mut self, data: Bytes) {
        self.queue_bytes += data.len() as u64;
        self.queue.push_back(data);
    }

    /// Drives the pending write. Returns `Ready` once more data may be queued.
    pub(super) fn poll_capacity(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            if let Some(write) = &mut self.pending_write {
                match Pin::new(&mut write.task).poll(cx) {
                    Poll::Pending => {
                        let bytes = usize::try_from(self.queue_bytes).unwrap_or(usize::MAX);
                        let has_capacity =
                            self.queue_bytes <= MAX_QUEUED_BYTES && self.reservation.try_resize(bytes);
                        return if has_capacity { Poll::Ready(Ok(())) } else { Poll::Pending };
                    }
                    Poll::Ready(result) => {
                        let (chunks, bytes) = (write.chunks, write.bytes);
                        self.pending_write = None;
                        self.file = Some(result.map_err(io::Error::other)??);
                        self.queue.drain(..chunks);
                        self.queue_bytes -= bytes;
                        self.written_bytes += bytes;
                    }
                }
            }
            if self.queue.is_empty() {
                self.reservation.shrink(0);
                return Poll::Ready(Ok(()));
            }
            self.pending_write = Some(self.start_write());
        }
    }

    /// Starts a write of the whole queue.
    fn start_write(&self) -> PendingWrite {
        let data: Vec<Bytes> = self.queue.iter().cloned().collect();
        let (file, directory) = (self.file.clone(), Arc::clone(&self.directory));
        let (offset, bytes, min_free_percent) = (self.written_bytes, self.queue_bytes, self.min_free_percent);
        let chunks = data.len();
        let task =
            tasks::spawn_blocking(move || write(file, &directory, min_free_percent, offset, bytes, &data));
        PendingWrite { task, chunks, bytes }
    }

    /// Reads one or more bytes at `offset`, which must be less than [`bytes`](Self::bytes).
    pub(super) fn poll_read(&mut self, offset: u64, cx: &mut Context<'_>) -> Poll<io::Result<Bytes>> {
        if offset >= self.written_bytes {
            return Poll::Ready(self.read_queue(offset - self.written_bytes));
        }
        let Some(file) = &self.file else {
            return Poll::Ready(Err(io::Error::other("the spill file is missing")));
        };
        // A pending read at another offset is replaced.
        if self.pending_read.as_ref().is_none_or(|read| read.offset != offset) {
            let (file, length) = (Arc::clone(file), (self.written_bytes - offset).min(MAX_READ_BYTES));
            self.pending_read = Some(PendingRead {
                offset,
                task: tasks::spawn_blocking(move || read_range(&file, offset, length)),
            });
        }
        let Some(read) = &mut self.pending_read else { return Poll::Pending };
        let data = ready!(Pin::new(&mut read.task).poll(cx));
        self.pending_read = None;
        Poll::Ready(data.map_err(io::Error::other).flatten())
    }

    fn read_queue(&self, mut offset: u64) -> io::Result<Bytes> {
        for chunk in &self.queue {
            let length = chunk.len() as u64;
            if offset < length {
                return Ok(chunk.slice(usize::try_from(offset).unwrap_or(usize::MAX)..));
            }
            offset -= length;
        }
        Err(io::Error::other("the offset lies beyond the end"))
    }
}

/// Writes `data`, which has `bytes` bytes, at the end of the file. Creates a missing file. Fails if less than
/// `min_free_percent` of the disk would remain free.
fn write(
    file: Option<Arc<File>>,
    directory: &Path,
    min_free_percent: u64,
    mut offset: u64,
    bytes: u64,
    data: &[Bytes],
) -> io::Result<Arc<File>> {
    let file = match file {
        Some(file) => file,
        None => Arc::new(tempfile::tempfile_in(directory)?),
    };
    let disk = files::disk_space_of(&file)?;
    if disk.free.saturating_sub(bytes) < disk.total / 100 * min_free_percent {
        return Err(io::Error::new(io::ErrorKind::StorageFull, "the disk is nearly full"));
    }
    for chunk in data {
        files::write_all_at(&file, chunk, offset)?;
        offset += chunk.len() as u64;
    }
    Ok(file)
}

fn read_range(file: &File, offset: u64, length: u64) -> io::Result<Bytes> {
    let mut data = vec![0; usize::try_from(length).unwrap_or(0)];
    files::read_exact_at(file, &mut data, offset)?;
    Ok(data.into())
}
