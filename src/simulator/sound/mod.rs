//! Generates the simulator's audio: valid sound whose length depends on the text. Independent of
//! HTTP: a route combines a [`Format`] and a [`Melody`] and streams the result.

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

/// Encoded audio. Pieces are generated on demand, so that a long text needs little memory.
#[derive(Debug)]
pub(super) struct Sound {
    pieces: Pieces,
    /// The total size, which is known before the first piece and becomes the content length.
    pub(super) bytes_total: u64,
}

#[derive(Debug)]
enum Pieces {
    Frames(Mp3Frames),
    Blocks(SampleBlocks),
}

/// The smallest unit of an encoder: an MPEG frame, or 20 ms of samples.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) bytes: Vec<u8>,
    /// The time in the sound at which the piece ends.
    pub(super) until_ms: u64,
}

impl Sound {
    /// Encodes `melody` in `format`.
    pub(super) fn of(melody: Melody, format: Format) -> Self {
        match format.codec {
            Codec::Mp3 { rate, kbps } => {
                let frames = Mp3Frames::new(melody, rate, kbps);
                Self { bytes_total: frames.bytes_total(), pieces: Pieces::Frames(frames) }
            }
            Codec::Samples { rate, coding, container } => {
                let blocks = SampleBlocks::new(melody, rate, coding, container);
                Self { bytes_total: blocks.bytes_total(), pieces: Pieces::Blocks(blocks) }
            }
        }
    }

    /// The next pieces up to the time `until_ms` of the sound; `None` after the last piece. Returns
    /// at least one piece, so that a caller with short steps reaches the end.
    pub(super) fn until(&mut self, until_ms: u64) -> Option<Bytes> {
        let first = self.next()?;
        let mut bytes = first.bytes;
        let mut reached = first.until_ms;
        while reached < until_ms {
            let Some(piece) = self.next() else { break };
            bytes.extend_from_slice(&piece.bytes);
            reached = piece.until_ms;
        }
        Some(bytes.into())
    }

    /// The remaining audio, in blocks of a few seconds.
    pub(super) fn into_blocks(mut self) -> impl Iterator<Item = Bytes> + Send {
        let steps = (1..).map(|step: u64| step * BLOCK_MS);
        steps.map_while(move |until_ms| self.until(until_ms))
    }
}

/// The length of a block: 64 KiB of the default MP3, and less than a megabyte of the largest
/// format.
const BLOCK_MS: u64 = 4_000;

/// Converts milliseconds to seconds for a JSON document.
pub(super) fn seconds(ms: u64) -> f64 {
    samples::to_f64(ms) / 1_000.0
}

impl Iterator for Sound {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        match &mut self.pieces {
            Pieces::Frames(frames) => frames.next(),
            Pieces::Blocks(blocks) => blocks.next(),
        }
    }
}
