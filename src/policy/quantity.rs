//! Parses quantities with a unit in settings: durations (`1h30m`) and sizes (`16MiB`). No library is used, because
//! libraries also accept values that are probably mistakes in a setting. Examples are signs and `ago`, nanoseconds that
//! round to zero, months of 30.44 days, bits, and fractions of a byte.

pub mod duration;
pub mod size;

/// The reason why a text is not a quantity. The contained numbers are in the smallest unit: milliseconds or bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum QuantityError {
    /// The text is the contained number without a unit.
    NoUnit(u64),
    /// The text starts with a minus sign.
    Negative,
    /// The text is a fraction. Contains the quantity in the smallest unit, or `None` if the quantity is not a whole
    /// number of it.
    Fraction(Option<u64>),
    /// The contained unit is unknown.
    UnknownUnit(String),
    /// A unit is repeated, or follows a smaller unit.
    UnitOrder,
    /// The quantity exceeds 64 bits in the smallest unit.
    TooLarge,
    /// The text is invalid for a different reason.
    Malformed,
}

/// The name of a unit, and its size in the smallest unit.
type Unit = (&'static str, u64);

/// Splits `text` before the first character that `is_end` accepts.
fn split_where(text: &str, is_end: impl Fn(char) -> bool) -> (&str, &str) {
    text.split_at(text.find(is_end).unwrap_or(text.len()))
}

/// Whether `text` starts with a minus sign and a digit.
fn is_negative(text: &str) -> bool {
    text.strip_prefix('-').is_some_and(|rest| rest.starts_with(|first: char| first.is_ascii_digit()))
}

/// Converts a fraction such as `1.5h` to the smallest of `units`, if that is a whole number.
fn convert_fraction(text: &str, units: &[Unit]) -> Option<u64> {
    let (whole, after_whole) = text.split_once('.')?;
    let (fraction, unit) = split_where(after_whole, |character| !character.is_ascii_digit());
    let (_, factor) = units.iter().find(|(name, _)| *name == unit)?;
    let denominator = 10_u64.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let numerator = fraction.parse::<u64>().ok()?.checked_mul(*factor)?;
    let quotient = numerator.is_multiple_of(denominator).then(|| numerator / denominator)?;
    whole.parse::<u64>().ok()?.checked_mul(*factor)?.checked_add(quotient)
}
