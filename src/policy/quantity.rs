//! Quantities with a unit: durations (`1h30m`) and sizes (`16MiB`). They are not parsed by a library,
//! because libraries also accept values that are probably mistakes in a setting: signs and `ago`,
//! nanoseconds that round to nothing, months of 30.44 days, bits, and fractions of a byte.

pub mod duration;
pub mod size;

/// Why a text is not a quantity. Numbers are in the smallest unit: milliseconds or bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum QuantityError {
    /// A bare number.
    NoUnit(u64),
    /// A leading minus sign.
    Negative,
    /// A fraction, with the same quantity in the smallest unit if that can express it.
    Fraction(Option<u64>),
    /// An unknown unit.
    UnknownUnit(String),
    /// A unit twice, or a larger one after a smaller one.
    UnitOrder,
    /// More than 64 bits can hold in the smallest unit.
    TooLarge,
    /// Any other text.
    Malformed,
}

/// A unit and its size in the smallest unit.
type Unit = (&'static str, u64);

/// `text` up to the first character for which `ends` holds, and the rest.
fn split_where(text: &str, ends: impl Fn(char) -> bool) -> (&str, &str) {
    text.split_at(text.find(ends).unwrap_or(text.len()))
}

/// Whether `text` is a number with a minus sign.
fn is_negative(text: &str) -> bool {
    text.strip_prefix('-').is_some_and(|rest| rest.starts_with(|first: char| first.is_ascii_digit()))
}

/// `1.5h` in the smallest of `units`, if that is a whole number.
fn exact_fraction(text: &str, units: &[Unit]) -> Option<u64> {
    let (whole, after_whole) = text.split_once('.')?;
    let (fraction, unit) = split_where(after_whole, |character| !character.is_ascii_digit());
    let (_, factor) = units.iter().find(|(name, _)| *name == unit)?;
    let denominator = 10_u64.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let numerator = fraction.parse::<u64>().ok()?.checked_mul(*factor)?;
    let rest = numerator.is_multiple_of(denominator).then(|| numerator / denominator)?;
    whole.parse::<u64>().ok()?.checked_mul(*factor)?.checked_add(rest)
}
