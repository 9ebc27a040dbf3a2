//! Decides from the owners of a request's identifiers which account must serve it: one, any, or none.

use super::kind::Kind;

/// Two identifiers of a request belong to different accounts, and no key can reach both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it names a {} and a {} of different accounts", .0.word(), .1.word())]
pub struct TwoOwners(pub Kind, pub Kind);

/// The account that must serve a request with these known owners: the owner and the kind of its
/// identifier, or `None` when any account may.
///
/// # Errors
///
/// When the identifiers have different owners.
pub fn owner<I: PartialEq>(
    owners: impl IntoIterator<Item = (Kind, I)>,
) -> Result<Option<(Kind, I)>, TwoOwners> {
    let mut first: Option<(Kind, I)> = None;
    for (kind, other_owner) in owners {
        match &first {
            Some((other, owner)) if *owner != other_owner => return Err(TwoOwners(*other, kind)),
            Some(_) => {}
            None => first = Some((kind, other_owner)),
        }
    }
    Ok(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_with_one_owner_select_it_and_with_two_conflict() {
        let none: [(Kind, u8); 0] = [];
        assert_eq!(owner(none), Ok(None));
        assert_eq!(owner([(Kind::Voice, 1), (Kind::Dictionary, 1)]), Ok(Some((Kind::Voice, 1))));
        assert_eq!(
            owner([(Kind::Voice, 1), (Kind::Request, 1), (Kind::Dictionary, 2)]),
            Err(TwoOwners(Kind::Voice, Kind::Dictionary))
        );
    }
}
