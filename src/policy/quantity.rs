//! Quantities that are written with their unit: durations (`1h30m`) and sizes (`16MiB`). They are
//! parsed here and not by a library, because those of the registry also accept what is a mistake in
//! a setting: signs and `ago`, nanoseconds that round to nothing, months of 30.44 days, bits, and
//! fractions of a byte.

pub mod duration;
pub mod size;

/// Why a text is no quantity. Numbers are in the smallest unit: milliseconds or bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum QuantityError {
    /// A number alone.
    NoUnit(u64),
    /// A minus sign in front.
    Negative,
    /// A fraction, with the same quantity in the smallest unit if that can express it.
    Fraction(Option<u64>),
    /// A unit that is not known.
    UnknownUnit(String),
    /// A unit twice, or a larger one behind a smaller one.
    UnitOrder,
    /// More than 64 bits count in the smallest unit.
    TooLarge,
    /// Anything else.
    Malformed,
}

/// A unit and how many of the smallest it has.
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
    let (whole, behind) = text.split_once('.')?;
    let (fraction, unit) = split_where(behind, |character| !character.is_ascii_digit());
    let (_, factor) = units.iter().find(|(name, _)| *name == unit)?;
    let denominator = 10_u64.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let numerator = fraction.parse::<u64>().ok()?.checked_mul(*factor)?;
    let rest = numerator.is_multiple_of(denominator).then(|| numerator / denominator)?;
    whole.parse::<u64>().ok()?.checked_mul(*factor)?.checked_add(rest)
}
