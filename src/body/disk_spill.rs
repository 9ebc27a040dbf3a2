//! The part of a request body that does not fit into its memory: an anonymous temporary file, which the
//! system deletes when its last handle is closed, also when the process crashes.
//!
//! File operations block, so they run on the runtime's blocking threads. The queue of pieces to write is
//! bounded; the client's body is not read while the disk is slower than the client.

use std::collections::VecDeque;
use std::fs::File;
use std::future::Future;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use tokio::task::JoinHandle;

use super::budget::{BufferBudget, BufferShare};
use crate::tasks;

/// Maximum bytes queued for the file, beyond the last piece.
const QUEUE_BYTES_MAX: u64 = 256 * 1024;
/// Maximum bytes of one read from the file.
const READ_BYTES_MAX: u64 = 64 * 1024;

/// A file that is appended to and read at any offset.
#[derive(Debug)]
pub(super) struct DiskSpill {
    directory: Arc<Path>,
    free_percent_min: u64,
    file: Option<Arc<File>>,
    /// Bytes already in the file.
    written_bytes: u64,
    /// Pieces not yet in the file, in order; the first ones are being written.
    queue: VecDeque<Bytes>,
    queue_bytes: u64,
    /// The memory of the queue.
    share: BufferShare,
    writing: Option<SpillWriter>,
    reading: Option<SpillReader>,
}

#[derive(Debug)]
struct SpillWriter {
    job: JoinHandle<io::Result<Arc<File>>>,
    pieces: usize,
    bytes: u64,
}

#[derive(Debug)]
struct SpillReader {
    at: u64,
    job: JoinHandle<io::Result<Bytes>>,
}

impl DiskSpill {
    /// An empty spill. The file is created by the first write.
    pub(super) fn new(budget: &BufferBudget) -> Self {
        Self {
            directory: budget.directory().into(),
            free_percent_min: budget.disk_free_percent_min(),
            share: budget.share(BufferShare::FREE),
            file: None,
            written_bytes: 0,
            queue: VecDeque::new(),
            queue_bytes: 0,
            writing: None,
            reading: None,
        }
    }

    /// Bytes in the file and in the queue.
    pub(super) fn bytes(&self) -> u64 {
        self.written_bytes + self.queue_bytes
    }

    /// Queues a piece for the file.
    pub(super) fn push(&mut self, data: Bytes) {
        self.queue_bytes += data.len() as u64;
        self.queue.push_back(data);
    }

    /// Advances the write; ready when another piece may be queued.
    pub(super) fn poll_capacity(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            if let Some(writing) = &mut self.writing {
                match Pin::new(&mut writing.job).poll(cx) {
                    Poll::Pending => {
                        let bytes = usize::try_from(self.queue_bytes).unwrap_or(usize::MAX);
                        let has_capacity = self.queue_bytes <= QUEUE_BYTES_MAX && self.share.cover(bytes);
                        return if has_capacity { Poll::Ready(Ok(())) } else { Poll::Pending };
                    }
                    Poll::Ready(written) => {
                        let (pieces, bytes) = (writing.pieces, writing.bytes);
                        self.writing = None;
                        self.file = Some(written.map_err(io::Error::other)??);
                        self.queue.drain(..pieces);
                        self.queue_bytes -= bytes;
                        self.written_bytes += bytes;
                    }
                }
            }
            if self.queue.is_empty() {
                self.share.shrink(0);
                return Poll::Ready(Ok(()));
            }
            self.writing = Some(self.write_queue());
        }
    }

    fn write_queue(&self) -> SpillWriter {
        let pieces: Vec<Bytes> = self.queue.iter().cloned().collect();
        let (file, directory) = (self.file.clone(), Arc::clone(&self.directory));
        let (at, bytes, free_percent_min) = (self.written_bytes, self.queue_bytes, self.free_percent_min);
        let count = pieces.len();
        let job = tasks::blocking(move || write(file, &directory, free_percent_min, at, bytes, &pieces));
        SpillWriter { job, pieces: count, bytes }
    }

    /// Reads some bytes from offset `at` on, which lies before the end.
    pub(super) fn poll_read(&mut self, at: u64, cx: &mut Context<'_>) -> Poll<io::Result<Bytes>> {
        if at >= self.written_bytes {
            return Poll::Ready(self.queued(at - self.written_bytes));
        }
        let Some(file) = &self.file else { return Poll::Ready(Err(io::Error::other("there is no file"))) };
        // A pending read at another offset is replaced.
        if self.reading.as_ref().is_none_or(|reading| reading.at != at) {
            let (file, length) = (Arc::clone(file), (self.written_bytes - at).min(READ_BYTES_MAX));
            self.reading = Some(SpillReader { at, job: tasks::blocking(move || read(&file, at, length)) });
        }
        let Some(reading) = &mut self.reading else { return Poll::Pending };
        let data = ready!(Pin::new(&mut reading.job).poll(cx));
        self.reading = None;
        Poll::Ready(data.map_err(io::Error::other).flatten())
    }

    fn queued(&self, mut at: u64) -> io::Result<Bytes> {
        for piece in &self.queue {
            let length = piece.len() as u64;
            if at < length {
                return Ok(piece.slice(usize::try_from(at).unwrap_or(usize::MAX)..));
            }
            at -= length;
        }
        Err(io::Error::other("the offset lies beyond the end"))
    }
}

fn write(
    file: Option<Arc<File>>,
    directory: &Path,
    free_percent_min: u64,
    mut at: u64,
    bytes: u64,
    pieces: &[Bytes],
) -> io::Result<Arc<File>> {
    let file = match file {
        Some(file) => file,
        None => Arc::new(tempfile::tempfile_in(directory)?),
    };
    let disk = rustix::fs::fstatvfs(&*file)?;
    let free = disk.f_bavail.saturating_mul(disk.f_frsize).saturating_sub(bytes);
    let kept = disk.f_blocks.saturating_mul(disk.f_frsize) / 100 * free_percent_min;
    if free < kept {
        return Err(io::Error::new(io::ErrorKind::StorageFull, "the disk is nearly full"));
    }
    for piece in pieces {
        file.write_all_at(piece, at)?;
        at += piece.len() as u64;
    }
    Ok(file)
}

fn read(file: &File, at: u64, length: u64) -> io::Result<Bytes> {
    let mut data = vec![0; usize::try_from(length).unwrap_or(0)];
    file.read_exact_at(&mut data, at)?;
    Ok(data.into())
}
