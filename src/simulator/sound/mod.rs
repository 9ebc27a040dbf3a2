//! Generates the simulator's audio: valid sound whose length depends on the text or on a requested duration. The module
//! is independent of HTTP. An operation combines a [`Format`] and a [`Melody`] into a [`Sound`], and streams its
//! chunks.

pub(super) mod format;
pub(super) mod melody;

mod mp3;
mod samples;

#[cfg(test)]
mod tests;

use bytes::Bytes;

use self::format::{Codec, Format};
use self::melody::Melody;
use self::mp3::Mp3Frames;
use self::samples::SampleBlocks;

/// The length of a block. It has 64,000 bytes in the default format, and 384,000 bytes in the largest format.
const BLOCK_MS: u64 = 4_000;

/// Encoded audio. Frames are generated on demand, so that a long text needs little memory.
pub(super) struct Sound {
    frames: Box<dyn Iterator<Item = EncodedFrame> + Send>,
    /// The total size, which is known before the first frame and becomes the content length.
    pub(super) total_bytes: u64,
}

/// The smallest unit of an encoder: an MPEG frame, or 20 ms of samples.
#[derive(Debug)]
pub(super) struct EncodedFrame {
    pub(super) bytes: Vec<u8>,
    /// The time in the sound at which the frame ends.
    pub(super) end_ms: u64,
}

impl Sound {
    /// Encodes `melody` in `format`.
    pub(super) fn new(melody: Melody, format: Format) -> Self {
        match format.codec {
            Codec::Mp3 { sample_rate, kbps } => {
                let frames = Mp3Frames::new(melody, sample_rate, kbps);
                Self { total_bytes: frames.total_bytes(), frames: Box::new(frames) }
            }
            Codec::Samples { sample_rate, coding, container } => {
                let blocks = SampleBlocks::new(melody, sample_rate, coding, container);
                Self { total_bytes: blocks.total_bytes(), frames: Box::new(blocks) }
            }
        }
    }

    /// Returns the next frames up to the time `end_ms` of the sound, but at least one frame, so that a caller
    /// with short steps reaches the end. Returns `None` after the last frame.
    pub(super) fn take_until(&mut self, end_ms: u64) -> Option<Bytes> {
        let EncodedFrame { mut bytes, end_ms: mut reached_ms } = self.frames.next()?;
        while reached_ms < end_ms {
            let Some(frame) = self.frames.next() else { break };
            bytes.extend_from_slice(&frame.bytes);
            reached_ms = frame.end_ms;
        }
        Some(bytes.into())
    }

    /// Returns the remaining audio, in chunks of `chunk_ms` milliseconds.
    pub(super) fn into_chunks(mut self, chunk_ms: u64) -> impl Iterator<Item = Bytes> + Send {
        let ends = (1..).map(move |index: u64| index * chunk_ms);
        ends.map_while(move |end_ms| self.take_until(end_ms))
    }

    /// Returns the remaining audio, in blocks of a few seconds.
    pub(super) fn into_blocks(self) -> impl Iterator<Item = Bytes> + Send {
        self.into_chunks(BLOCK_MS)
    }

    /// Returns all of the remaining audio.
    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.frames.flat_map(|frame| frame.bytes).collect()
    }
}

/// Converts milliseconds to seconds for a JSON document.
pub(super) fn to_seconds(ms: u64) -> f64 {
    samples::to_f64(ms) / 1_000.0
}
