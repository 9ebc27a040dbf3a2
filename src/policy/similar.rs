//! Finds the known name that is most similar to an unknown name, for suggestions in error messages.

/// Finds the candidate that is most similar to `name`, if at most a third of the characters, or a single character,
/// differ. With a higher limit, suggestions would be guesses. With a lower limit, a short name with two typos would get
/// no suggestion.
#[must_use]
pub fn find_similar<T: AsRef<str>>(name: &str, candidates: impl IntoIterator<Item = T>) -> Option<T> {
    let max_distance = (name.chars().count() / 3).max(1);
    candidates
        .into_iter()
        .map(|candidate| (strsim::damerau_levenshtein(name, candidate.as_ref()), candidate))
        .filter(|(distance, _)| *distance <= max_distance)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_similar_name_is_suggested() {
        let names = ["strategy", "near_limit_ratio"];
        assert_eq!(find_similar("strateggy", names), Some("strategy"));
        assert_eq!(find_similar("startegy", names), Some("strategy"));
        assert_eq!(find_similar("colour", names), None);
    }
}
