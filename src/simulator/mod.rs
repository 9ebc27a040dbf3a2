//! An offline ElevenLabs. So far its voice: valid, audible sound in every format, from any text.

pub(super) mod sound;
