//! Encodes a melody as samples of sine waves: linear PCM with or without a RIFF header, and the two G.711 encodings of
//! telephony.

use std::f64::consts::TAU;

use super::EncodedFrame;
use super::format::{Coding, Container};
use super::melody::{Melody, NoteCursor};

/// The length of a block of samples.
const BLOCK_MS: u64 = 20;
/// The length of a RIFF header in bytes.
const WAVE_HEADER_BYTES: u64 = 44;
/// Half of full scale, which is clearly audible and clips in no encoding.
const AMPLITUDE: f64 = 16_000.0;
/// Time in which notes fade in and out. A sudden start would cause a click.
const FADE_MS: f64 = 8.0;

/// Generates 20 ms of samples at a time.
#[derive(Debug)]
pub(super) struct SampleBlocks {
    cursor: NoteCursor,
    sample_rate: u64,
    coding: Coding,
    container: Container,
    total_samples: u64,
    /// The index of the next sample.
    next_sample_index: u64,
    phase: f64,
    is_header_sent: bool,
}

impl SampleBlocks {
    pub(super) fn new(melody: Melody, sample_rate: u32, coding: Coding, container: Container) -> Self {
        let sample_rate = u64::from(sample_rate);
        let total_samples = melody.duration_ms.saturating_mul(sample_rate) / 1_000;
        let cursor = NoteCursor::new(melody);
        Self {
            cursor,
            sample_rate,
            coding,
            container,
            total_samples,
            next_sample_index: 0,
            phase: 0.0,
            is_header_sent: false,
        }
    }

    /// Returns the size of the header and of all samples.
    pub(super) fn total_bytes(&self) -> u64 {
        let header_bytes = match self.container {
            Container::Raw => 0,
            Container::Wave => WAVE_HEADER_BYTES,
        };
        header_bytes + self.total_samples * self.bytes_per_sample()
    }

    fn bytes_per_sample(&self) -> u64 {
        match self.coding {
            Coding::Linear => 2,
            Coding::MuLaw | Coding::ALaw => 1,
        }
    }

    /// Returns the next sample of the melody.
    fn next_sample(&mut self) -> i16 {
        let ms = self.next_sample_index * 1_000 / self.sample_rate;
        let exact_ms = to_f64(self.next_sample_index) * 1_000.0 / to_f64(self.sample_rate);
        self.next_sample_index += 1;
        let Some(note) = self.cursor.note_at(ms) else { return 0 };
        let Some(hz) = note.hz else {
            self.phase = 0.0;
            return 0;
        };
        self.phase = (self.phase + TAU * hz / to_f64(self.sample_rate)) % TAU;
        let distance_ms = (exact_ms - to_f64(note.start_ms)).min(to_f64(note.end_ms) - exact_ms);
        let fade = (distance_ms / FADE_MS).clamp(0.0, 1.0);
        to_sample(self.phase.sin() * AMPLITUDE * fade)
    }

    /// Creates the RIFF header, which contains the size of the samples.
    fn wave_header(&self) -> Vec<u8> {
        let data_bytes = u32::try_from(self.total_samples * self.bytes_per_sample()).unwrap_or(u32::MAX);
        let sample_rate = u32::try_from(self.sample_rate).unwrap_or(u32::MAX);
        [
            b"RIFF".as_slice(),
            &data_bytes.saturating_add(36).to_le_bytes(),
            b"WAVEfmt ",
            &16_u32.to_le_bytes(),
            // The coding is PCM, and there is one channel.
            &1_u16.to_le_bytes(),
            &1_u16.to_le_bytes(),
            &sample_rate.to_le_bytes(),
            &sample_rate.saturating_mul(2).to_le_bytes(),
            // A sample has two bytes, which are sixteen bits.
            &2_u16.to_le_bytes(),
            &16_u16.to_le_bytes(),
            b"data",
            &data_bytes.to_le_bytes(),
        ]
        .concat()
    }
}

impl Iterator for SampleBlocks {
    type Item = EncodedFrame;

    fn next(&mut self) -> Option<EncodedFrame> {
        if self.container == Container::Wave && !self.is_header_sent {
            self.is_header_sent = true;
            return Some(EncodedFrame { bytes: self.wave_header(), end_ms: 0 });
        }
        if self.next_sample_index >= self.total_samples {
            return None;
        }
        let count = (self.sample_rate * BLOCK_MS / 1_000).min(self.total_samples - self.next_sample_index);
        let mut bytes = Vec::new();
        for _ in 0..count {
            let sample = self.next_sample();
            match self.coding {
                Coding::Linear => bytes.extend_from_slice(&sample.to_le_bytes()),
                Coding::MuLaw => bytes.push(mu_law(sample)),
                Coding::ALaw => bytes.push(a_law(sample)),
            }
        }
        Some(EncodedFrame { bytes, end_ms: self.next_sample_index * 1_000 / self.sample_rate })
    }
}

/// Encodes a sample in G.711 µ-law as sign, exponent and mantissa, and inverts all bits.
pub(super) fn mu_law(sample: i16) -> u8 {
    const BIAS: u16 = 0x84;
    const CLIP: u16 = 32_635;
    let sign = if sample < 0 { 0x80 } else { 0 };
    let magnitude = sample.unsigned_abs().min(CLIP) + BIAS;
    // The bias sets bit 7 or a higher bit, so the exponent is 0 to 7.
    let exponent = 8 - magnitude.leading_zeros().min(8);
    let mantissa = (magnitude >> (exponent + 3)) & 0x0f;
    !(sign | low_byte(exponent << 4) | low_byte(mantissa.into()))
}

/// Encodes the thirteen highest bits of a sample in G.711 A-law as sign, exponent and mantissa, and inverts the even
/// bits.
pub(super) fn a_law(sample: i16) -> u8 {
    let (sign, magnitude) =
        if sample < 0 { (0, (!sample).unsigned_abs() >> 3) } else { (0x80, sample.unsigned_abs() >> 3) };
    let code = if magnitude < 32 {
        magnitude >> 1
    } else {
        let exponent = 11 - magnitude.leading_zeros().min(10);
        let mantissa = (magnitude >> exponent) & 0x0f;
        let exponent = u16::try_from(exponent).unwrap_or(7);
        (exponent << 4) | mantissa
    };
    (sign | low_byte(code.into())) ^ 0x55
}

fn low_byte(value: u32) -> u8 {
    value.to_le_bytes()[0]
}

/// Converts a count of samples or milliseconds. The conversion is exact below 2^53.
#[expect(clippy::cast_precision_loss, reason = "the conversion is exact, because counts are far below 2^53")]
pub(super) fn to_f64(count: u64) -> f64 {
    count as f64
}

/// Converts a value of the sine wave.
#[expect(
    clippy::cast_possible_truncation,
    reason = "the value fits, because the amplitude is half of full scale"
)]
fn to_sample(value: f64) -> i16 {
    value as i16
}
