//! The settings of the admin API, and of the pages that show the state.

use std::path::PathBuf;

/// The access to the admin API and to the pages of the state.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AdminConfig {
    /// The file of the admin token; `None` for the generated one in the folder of the usage database.
    pub token_file: Option<PathBuf>,
    /// The pages that may be read without a token: [`PUBLIC_PAGES`].
    pub public: Vec<String>,
}

impl AdminConfig {
    /// Whether this page may be read without a token.
    #[must_use]
    pub fn is_public(&self, page: &str) -> bool {
        self.public.iter().any(|name| name == page)
    }
}

/// The names of the pages that can be public.
pub const PUBLIC_PAGES: [&str; 2] = ["status", "metrics"];
