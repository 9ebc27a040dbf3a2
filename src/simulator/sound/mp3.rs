//! Encodes a melody as MPEG Layer III with the minimum of ISO/IEC 11172-3 and 13818-3 that gives valid, audible frames,
//! so that clients can play and measure the response.
//!
//! The stream is mono, has a constant bit rate and long blocks, and uses no bit reservoir: `main_data_begin` is 0 in
//! each frame, so that a stream that is cut between frames can be played. A note is one spectral line with the
//! magnitude one, coded with Huffman table 1. The rest of a frame is padding.

use super::EncodedFrame;
use super::melody::{Melody, NoteCursor};
use super::samples::to_f64;

/// The bit rates of Layer III in kbit/s, by their index in the header of a frame of MPEG-1.
const KBPS_MPEG1: [u32; 15] = [0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320];
/// The bit rates of Layer III in kbit/s for MPEG-2, by the same index.
const KBPS_MPEG2: [u32; 15] = [0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160];

/// Samples, and thus spectral lines, of one granule.
const LINES_PER_GRANULE: u64 = 576;

/// The gain of the quantizer. A line with the magnitude one becomes 2^((gain - 210) / 4), a quarter of full scale.
const GLOBAL_GAIN: u32 = 202;

/// Generates one frame at a time.
#[derive(Debug)]
pub(super) struct Mp3Frames {
    cursor: NoteCursor,
    version: Version,
    sample_rate: u64,
    kbps: u32,
    total_frames: u64,
    /// The index of the next frame.
    next_frame: u64,
    /// The index of the next granule.
    next_granule: u64,
}

/// The version of MPEG, which depends on the sample rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    /// Sample rates of 32, 44.1 and 48 kHz, with two granules per frame.
    Mpeg1,
    /// Sample rates of 24 and 22.05 kHz ("low sampling frequencies"), with one granule per frame.
    Mpeg2,
}

impl Version {
    fn granules_per_frame(self) -> u64 {
        match self {
            Version::Mpeg1 => 2,
            Version::Mpeg2 => 1,
        }
    }
}

impl Mp3Frames {
    pub(super) fn new(melody: Melody, sample_rate: u32, kbps: u32) -> Self {
        let version = if sample_rate >= 32_000 { Version::Mpeg1 } else { Version::Mpeg2 };
        let samples = melody.duration_ms.saturating_mul(sample_rate.into()) / 1_000;
        let total_frames = samples.div_ceil(version.granules_per_frame() * LINES_PER_GRANULE);
        let cursor = NoteCursor::new(melody);
        Self {
            cursor,
            version,
            sample_rate: sample_rate.into(),
            kbps,
            total_frames,
            next_frame: 0,
            next_granule: 0,
        }
    }

    /// Returns the size of all frames. Padding keeps the size of the first `n` frames within one byte of the
    /// bit rate, so the size is a division.
    pub(super) fn total_bytes(&self) -> u64 {
        self.bytes_before(self.total_frames)
    }

    /// Returns the size of all frames before the frame with the given index.
    fn bytes_before(&self, frame_index: u64) -> u64 {
        let samples_per_frame = self.version.granules_per_frame() * LINES_PER_GRANULE;
        // One kbit/s is 125 bytes per second.
        frame_index * samples_per_frame * u64::from(self.kbps) * 125 / self.sample_rate
    }

    /// Returns the spectral line of the next granule, by the pitch in the middle of the granule. Returns
    /// `None` during a pause.
    fn next_line(&mut self) -> Option<u64> {
        let middle = self.next_granule * LINES_PER_GRANULE + LINES_PER_GRANULE / 2;
        self.next_granule += 1;
        let hz = self.cursor.note_at(middle * 1_000 / self.sample_rate)?.hz?;
        let mut line = 0;
        while (to_f64(line) + 1.0) * to_f64(self.sample_rate) / to_f64(2 * LINES_PER_GRANULE) < hz {
            line += 1;
        }
        Some(line)
    }

    /// Encodes the next frame.
    fn write_frame(&mut self) -> Vec<u8> {
        let length = self.bytes_before(self.next_frame + 1) - self.bytes_before(self.next_frame);
        let is_padded = length > self.bytes_before(1);
        let lines: Vec<_> = (0..self.version.granules_per_frame()).map(|_| self.next_line()).collect();

        let mut bits = BitWriter::default();
        self.write_header(&mut bits, is_padded);
        self.write_side_information(&mut bits, &lines);
        for line in lines.into_iter().flatten() {
            write_line(&mut bits, line);
        }
        let mut bytes = bits.bytes;
        bytes.resize(usize::try_from(length).unwrap_or(bytes.len()), 0);
        bytes
    }

    fn write_header(&self, bits: &mut BitWriter, is_padded: bool) {
        let (version, table) = match self.version {
            Version::Mpeg1 => (0b11, KBPS_MPEG1),
            Version::Mpeg2 => (0b10, KBPS_MPEG2),
        };
        let bit_rate_index = table.iter().position(|kbps| *kbps == self.kbps).unwrap_or_default();
        // 44.1 and 22.05 kHz have the index 0 of their version, and 24 kHz has the index 1 of MPEG-2.
        let sample_rate_index = u32::from(self.sample_rate == 24_000);
        bits.push(0x7ff, 11);
        bits.push(version, 2);
        bits.push(0b01, 2); // Layer III
        bits.push(1, 1); // no checksum
        bits.push(u32::try_from(bit_rate_index).unwrap_or_default(), 4);
        bits.push(sample_rate_index, 2);
        bits.push(is_padded.into(), 1);
        bits.push(0, 1); // private
        bits.push(0b11, 2); // one channel
        bits.push(0, 2); // mode extension
        bits.push(0, 1); // copyright
        bits.push(1, 1); // original
        bits.push(0, 2); // emphasis
    }

    fn write_side_information(&self, bits: &mut BitWriter, lines: &[Option<u64>]) {
        match self.version {
            // These fields are zero: main_data_begin, private bits, and the sharing of scale factors.
            Version::Mpeg1 => bits.push(0, 9 + 5 + 4),
            Version::Mpeg2 => bits.push(0, 8 + 1),
        }
        for line in lines {
            let (pairs, length) = line.map_or((0, 0), |line| (line / 2 + 1, coded_bits(line)));
            bits.push(u32::try_from(length).unwrap_or_default(), 12);
            bits.push(u32::try_from(pairs).unwrap_or_default(), 9);
            bits.push(GLOBAL_GAIN, 8);
            match self.version {
                Version::Mpeg1 => bits.push(0, 4), // scale factors take no bits
                Version::Mpeg2 => bits.push(0, 9),
            }
            bits.push(0, 1); // no window switching: long blocks
            for _region in 0..3 {
                bits.push(1, 5); // Huffman table 1
            }
            bits.push(6, 4); // regions: any split of the 22 bands, because all regions use one table
            bits.push(6, 3);
            if self.version == Version::Mpeg1 {
                bits.push(0, 1); // no pre-emphasis
            }
            bits.push(0, 1); // scale factor scale
            bits.push(0, 1); // table of the quadruples, which these frames do not contain
        }
    }
}

impl Iterator for Mp3Frames {
    type Item = EncodedFrame;

    fn next(&mut self) -> Option<EncodedFrame> {
        if self.next_frame >= self.total_frames {
            return None;
        }
        let bytes = self.write_frame();
        self.next_frame += 1;
        Some(EncodedFrame { bytes, end_ms: self.next_granule * LINES_PER_GRANULE * 1_000 / self.sample_rate })
    }
}

/// Writes a spectral line with Huffman table 1, which codes pairs of magnitudes up to one: the pair 00 is coded as `1`,
/// 01 as `001`, and 10 as `01`.
///
/// The line is positive in each granule, because decoders then produce a pure tone at the edge of the line. Alternating
/// signs would produce a warbling tone.
fn write_line(bits: &mut BitWriter, line: u64) {
    for _pair in 0..line / 2 {
        bits.push(1, 1);
    }
    if line.is_multiple_of(2) {
        bits.push(0b01, 2)
    } else {
        bits.push(0b001, 3)
    }
    bits.push(0, 1); // positive
}

/// Returns the number of bits that [`write_line`] writes.
fn coded_bits(line: u64) -> u64 {
    line / 2 + if line.is_multiple_of(2) { 3 } else { 4 }
}

/// Writes bits, most significant bit first.
#[derive(Debug, Default)]
struct BitWriter {
    bytes: Vec<u8>,
    bit_count: u32,
}

impl BitWriter {
    /// Writes the `count` lowest bits of `value`.
    fn push(&mut self, value: u32, count: u32) {
        for index in (0..count).rev() {
            if self.bit_count.is_multiple_of(8) {
                self.bytes.push(0);
            }
            if let Some(last) = self.bytes.last_mut()
                && value >> index & 1 == 1
            {
                *last |= 0x80 >> (self.bit_count % 8);
            }
            self.bit_count += 1;
        }
    }
}
