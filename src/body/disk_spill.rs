//! Stores the part of a request body that exceeds the memory limit in an anonymous temporary file. The operating
//! system deletes the file when its last handle is closed, even after a crash. A write fails if the disk is nearly
//! full.
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

/// Maximum number of bytes in the write queue at which another chunk may be queued. That chunk may exceed it.
const MAX_QUEUED_BYTES: u64 = 256 * 1024;
/// Maximum number of bytes of one read from the file.
const MAX_READ_BYTES: u64 = 64 * 1024;

/// A temporary file with a write queue. Data is appended, and can be read at any offset.
#[derive(Debug)]
pub(super) struct DiskSpill {
    directory: Arc<Path>,
    min_free_percent: u64,
    /// The temporary file, or `None` before the first write has created it.
    file: Option<Arc<File>>,
    /// The number of bytes in the file.
    written_bytes: u64,
    /// Chunks that are not yet in the file. The first of them belong to the pending write.
    queue: VecDeque<Bytes>,
    queue_bytes: u64,
    /// The memory of the queue.
    reservation: BufferReservation,
    pending_write: Option<PendingWrite>,
    pending_read: Option<PendingRead>,
}

/// A write of the first chunks of the queue.
#[derive(Debug)]
struct PendingWrite {
    task: JoinHandle<io::Result<Arc<File>>>,
    chunk_count: usize,
    bytes: u64,
}

/// A read at an offset of the file.
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
            reservation: budget.reservation(BufferReservation::UNBUDGETED_BYTES),
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

    /// Appends data to the write queue.
    pub(super) fn push(&mut self, data: Bytes) {
        self.queue_bytes += data.len() as u64;
        self.queue.push_back(data);
    }

    /// Polls the pending write, and starts the next write of the queue. Returns `Ready` once more data may be queued.
    ///
    /// # Errors
    ///
    /// Fails when the file cannot be created or written, or when the disk is nearly full.
    pub(super) fn poll_capacity(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            if let Some(write) = &mut self.pending_write {
                match Pin::new(&mut write.task).poll(cx) {
                    Poll::Pending => {
                        let queue_bytes = usize::try_from(self.queue_bytes).unwrap_or(usize::MAX);
                        let has_capacity =
                            self.queue_bytes <= MAX_QUEUED_BYTES && self.reservation.try_resize(queue_bytes);
                        return if has_capacity { Poll::Ready(Ok(())) } else { Poll::Pending };
                    }
                    Poll::Ready(written_file) => {
                        let (chunk_count, bytes) = (write.chunk_count, write.bytes);
                        self.pending_write = None;
                        self.file = Some(written_file.map_err(io::Error::other)??);
                        self.queue.drain(..chunk_count);
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
        let chunks: Vec<Bytes> = self.queue.iter().cloned().collect();
        let (file, directory) = (self.file.clone(), Arc::clone(&self.directory));
        let (offset, bytes, min_free_percent) = (self.written_bytes, self.queue_bytes, self.min_free_percent);
        let chunk_count = chunks.len();
        let task = tasks::spawn_blocking(move || -> io::Result<Arc<File>> {
            let file = match file {
                Some(file) => file,
                None => Arc::new(tempfile::tempfile_in(directory)?),
            };
            require_free_disk(&file, bytes, min_free_percent)?;
            write_chunks(&file, offset, &chunks)?;
            Ok(file)
        });
        PendingWrite { task, chunk_count, bytes }
    }

    /// Reads one or more bytes at `offset`, which must be less than [`bytes`](Self::bytes).
    ///
    /// # Errors
    ///
    /// Fails when the file cannot be read.
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

    /// Returns the bytes at `offset` of the queue, up to the end of their chunk.
    fn read_queue(&self, mut offset: u64) -> io::Result<Bytes> {
        for chunk in &self.queue {
            let length = chunk.len() as u64;
            if offset < length {
                return Ok(chunk.slice(usize::try_from(offset).unwrap_or(usize::MAX)..));
            }
            offset -= length;
        }
        Err(io::Error::other("the offset is beyond the end of the write queue"))
    }
}

/// Fails if less than `min_free_percent` of the disk would be free after a write of `bytes`.
fn require_free_disk(file: &File, bytes: u64, min_free_percent: u64) -> io::Result<()> {
    let disk = files::disk_space_of(file)?;
    if disk.free.saturating_sub(bytes) < disk.total / 100 * min_free_percent {
        return Err(io::Error::new(io::ErrorKind::StorageFull, "the disk is nearly full"));
    }
    Ok(())
}

fn write_chunks(file: &File, mut offset: u64, chunks: &[Bytes]) -> io::Result<()> {
    for chunk in chunks {
        files::write_all_at(file, chunk, offset)?;
        offset += chunk.len() as u64;
    }
    Ok(())
}

fn read_range(file: &File, offset: u64, length: u64) -> io::Result<Bytes> {
    let mut data = vec![0; usize::try_from(length).unwrap_or(0)];
    files::read_exact_at(file, &mut data, offset)?;
    Ok(data.into())
}
