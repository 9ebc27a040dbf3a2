//! Decides which account must serve a request, from the owners of the identifiers that the request names. Identifiers
//! of two accounts are an error, because no key can use both.

use super::kind::ResourceKind;

/// The error for a request with two identifiers of different accounts. No key can use both resources.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the request names a {} and a {} of different accounts", .0.as_str(), .1.as_str())]
pub struct ConflictingOwners(pub ResourceKind, pub ResourceKind);

/// Returns the account that must serve a request, with the kind of the first identifier that it owns.
/// Returns `None` if any account may serve the request, because the owner of no identifier is known.
///
/// # Errors
///
/// Fails if two identifiers have different owners. The error contains their kinds.
pub fn required_owner<I: PartialEq>(
    owners: impl IntoIterator<Item = (ResourceKind, I)>,
) -> Result<Option<(ResourceKind, I)>, ConflictingOwners> {
    let mut owners = owners.into_iter();
    let Some((first_kind, first_owner)) = owners.next() else { return Ok(None) };
    match owners.find(|(_, owner)| *owner != first_owner) {
        Some((kind, _)) => Err(ConflictingOwners(first_kind, kind)),
        None => Ok(Some((first_kind, first_owner))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_only_owner_is_required_and_two_owners_conflict() {
        let without_owner: [(ResourceKind, u8); 0] = [];
        assert_eq!(required_owner(without_owner), Ok(None));
        assert_eq!(
            required_owner([(ResourceKind::Voice, 1), (ResourceKind::Dictionary, 1)]),
            Ok(Some((ResourceKind::Voice, 1)))
        );
        assert_eq!(
            required_owner([
                (ResourceKind::Voice, 1),
                (ResourceKind::Request, 1),
                (ResourceKind::Dictionary, 2)
            ]),
            Err(ConflictingOwners(ResourceKind::Voice, ResourceKind::Dictionary))
        );
    }
}
